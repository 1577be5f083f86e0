"""VideoCrafter2 from scratch: UNet, noise schedule, VAE, text tower, and the Base that holds them.

    python -c "from model import *; torch.set_default_device('meta'); print(UNet(UNetConfig()))"

Shapes: B clips, T frames, C channels, H height, W width, L text tokens (77), D text width, N any batch.
Videos are (B, C, T, H, W). Inside the UNet the frames join the batch, (B*T, C, H, W), and layers along time
separate them again. Pixels are in [-1, 1]. Latents are the VAE's, multiplied by `latent_factor`.

"Upstream" is the public VideoCrafter2 code (AILab-CVC/VideoCrafter). Each network names its file there.
"""
import math
import re
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

VOCAB_SIZE = 49408  # CLIP's byte-pair vocabulary; ids from here on are learned words V*
TEXT_LENGTH = 77    # CLIP's context length
Z_CHANNELS = 4      # latent channels of Stable Diffusion's VAE
NOISE_LEVELS = 1000
CUDA_GRID = 65_535  # the largest batch that CUDA's attention kernels take


# ------------------------------------------------------------------------------------------------------------
# UNet (upstream lvdm/modules/networks/openaimodel3d.py and lvdm/modules/attention.py)
#
# Every layer has one forward: x (B*T, C, H, W), emb (B, E) of timestep and fps, context (B, L, D) of the
# text. B is the length of emb. T is the length of x divided by B.


@dataclass
class UNetConfig:
    channels: int = 320
    channel_mult: tuple = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple = (1, 2, 4)  # downsampling factors at which there is attention
    head_channels: int = 64
    context_dim: int = 1024
    norm_groups: int = 32


class Attention(nn.Module):
    """Multi-head attention. LoRA is put on `to_q`, `to_k` and `to_v` (lora.py)."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x, context):
        """x (N, S, C), context (M, L, D) -> (N, S, C). N is a multiple of M.

        The N/M frames of a clip share one row of context, so its keys and values are computed once per clip.
        """
        (N, S, C), M = x.shape, context.shape[0]
        head = C // self.heads
        q = self.to_q(x).view(M, -1, self.heads, head).transpose(1, 2)              # (M, heads, N/M*S, head)
        k = self.to_k(context).view(M, -1, self.heads, head).transpose(1, 2)        # (M, heads, L, head)
        v = self.to_v(context).view(M, -1, self.heads, head).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).reshape(N, S, C))


class FeedForward(nn.Module):
    """GEGLU: half of the widened features gates the other half."""

    def __init__(self, dim):
        super().__init__()
        self.proj_in = nn.Linear(dim, 8 * dim)
        self.proj_out = nn.Linear(4 * dim, dim)

    def forward(self, x):
        """(N, S, C) -> (N, S, C)"""
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, context_dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x, context=None):
        """x (N, S, C), context (M, L, D) or None (then attn2 is self-attention too) -> (N, S, C)."""
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        h = self.norm2(x)
        x = x + self.attn2(h, h if context is None else context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Within each frame: self-attention over positions, cross-attention to the text. LoRA lives here."""

    def __init__(self, channels, heads, cfg: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(cfg.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.block = TransformerBlock(channels, cfg.context_dim, heads)
        self.proj_out = zeroed(nn.Linear(channels, channels))

    def forward(self, x, emb, context):
        """(B*T, C, H, W) -> (B*T, C, H, W)"""
        H, W = x.shape[2:]
        h = self.norm(x).flatten(2).transpose(1, 2)                         # (B*T, H*W, C)
        h = self.proj_out(self.block(self.proj_in(h), context))
        return x + h.transpose(1, 2).unflatten(2, (H, W))                   # (B*T, C, H, W)


class TemporalTransformer(nn.Module):
    """At each position: self-attention over the clip's frames, twice. No text, and no position encoding."""

    def __init__(self, channels, heads, cfg: UNetConfig):
        super().__init__()
        dim = heads * cfg.head_channels
        self.norm = nn.GroupNorm(cfg.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, dim)
        # Upstream quirk (`temporal_selfatt_only`): attn2 is self-attention; the normal form reads the text.
        self.block = TransformerBlock(dim, dim, heads)
        self.proj_out = zeroed(nn.Linear(dim, channels))

    def forward(self, x, emb, context):
        """(B*T, C, H, W) -> (B*T, C, H, W)"""
        B, (H, W) = emb.shape[0], x.shape[2:]
        h = self.norm(x.unflatten(0, (B, -1)).transpose(1, 2))      # (B, C, T, H, W), normed over T, H, W
        h = h.permute(0, 3, 4, 2, 1).flatten(0, 2)                          # (B*H*W, T, C)
        h = torch.cat([self.proj_out(self.block(self.proj_in(part))) for part in h.split(CUDA_GRID)])
        h = h.unflatten(0, (B, H, W)).permute(0, 3, 4, 1, 2)                # (B, T, C, H, W)
        return x + h.flatten(0, 1)                                          # (B*T, C, H, W)


class TemporalConv(nn.Module):
    """Four convolutions along time, kernel 3, the only layers that know the order of frames.

    Upstream `TemporalConvBlock`. The norms here run over (T, H, W) together.
    """

    def __init__(self, channels, groups):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(groups, channels) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv3d(channels, channels, (3, 1, 1)) for _ in range(4))
        self.dropout = nn.Dropout(0.1)
        zeroed(self.convs[-1])

    def forward(self, x, B):
        """(B*T, C, H, W) -> (B*T, C, H, W)"""
        H, W = x.shape[2:]
        h = x = x.unflatten(0, (B, -1)).transpose(1, 2).flatten(3)          # (B, C, T, H*W)
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs)):
            h = F.silu(norm(h))
            h = self.dropout(h) if i else h
            # The kernel is 1 wide in H and W, so a 2D convolution over (T, H*W) is the same, and faster.
            h = F.conv2d(h, conv.weight[..., 0], conv.bias, padding=(1, 0))
        return (x + h).transpose(1, 2).flatten(0, 1).unflatten(2, (H, W))   # (B*T, C, H, W)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, emb_dim, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb_proj = nn.Linear(emb_dim, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.conv2 = zeroed(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.temporal_conv = TemporalConv(c_out, groups)

    def forward(self, x, emb, context):
        """(B*T, C_in, H, W) -> (B*T, C_out, H, W)"""
        B = emb.shape[0]
        e = self.emb_proj(F.silu(emb)).repeat_interleave(x.shape[0] // B, dim=0)    # (B*T, C_out)
        h = self.conv1(F.silu(self.norm1(x))) + e[:, :, None, None]
        h = self.skip(x) + self.conv2(F.silu(self.norm2(h)))
        return self.temporal_conv(h, B)


class Conv(nn.Conv2d):
    """A 3x3 convolution with a UNet layer's forward; stride 2 halves height and width."""

    def __init__(self, c_in, c_out, stride=1):
        super().__init__(c_in, c_out, 3, stride, padding=1)

    def forward(self, x, emb, context):
        """(B*T, C_in, H, W) -> (B*T, C_out, H/stride, W/stride)"""
        return super().forward(x)


class Upsample(Conv):
    def forward(self, x, emb, context):
        """(B*T, C, H, W) -> (B*T, C, 2H, 2W)"""
        return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"), emb, context)


def zeroed(module):
    """The last layer of a residual branch starts at zero, so that a new network is the identity there."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def sinusoidal_embedding(t, dim):
    """t (B,) integers -> (B, dim): cosines, then sines, of t at wavelengths from 2 pi to 20,000 pi."""
    freqs = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class UNet(nn.Module):
    """The noise predictor eps(z_t, t, fps, text). Upstream `UNetModel`; 1,413.28 M parameters by default.

    `grad_checkpointing = True` recomputes each layer in the backward pass instead of keeping its activations.
    """

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.cfg, self.grad_checkpointing = cfg, False
        c, emb_dim = cfg.channels, 4 * cfg.channels
        self.time_embed = nn.Sequential(nn.Linear(c, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.fps_embed = nn.Sequential(nn.Linear(c, emb_dim), nn.SiLU(), zeroed(nn.Linear(emb_dim, emb_dim)))

        def transformers(channels):
            heads = channels // cfg.head_channels
            return [SpatialTransformer(channels, heads, cfg), TemporalTransformer(channels, heads, cfg)]

        # Upstream quirk: `init_attn` has 8 heads of 64, so it is 512 wide inside, and not 320.
        init_attn = TemporalTransformer(c, 8, cfg)
        self.input_blocks = nn.ModuleList([nn.ModuleList([Conv(Z_CHANNELS, c), init_attn])])
        skips = [c]
        for level, mult in enumerate(cfg.channel_mult):
            for _ in range(cfg.num_res_blocks):
                layers = [ResBlock(c, mult * cfg.channels, emb_dim, cfg.norm_groups)]
                c = mult * cfg.channels
                if 2 ** level in cfg.attention_resolutions:
                    layers += transformers(c)
                self.input_blocks.append(nn.ModuleList(layers))
                skips.append(c)
            if level < len(cfg.channel_mult) - 1:
                self.input_blocks.append(nn.ModuleList([Conv(c, c, stride=2)]))
                skips.append(c)

        self.middle_block = nn.ModuleList([ResBlock(c, c, emb_dim, cfg.norm_groups), *transformers(c),
                                           ResBlock(c, c, emb_dim, cfg.norm_groups)])

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(cfg.channel_mult))):
            for i in range(cfg.num_res_blocks + 1):
                layers = [ResBlock(c + skips.pop(), mult * cfg.channels, emb_dim, cfg.norm_groups)]
                c = mult * cfg.channels
                if 2 ** level in cfg.attention_resolutions:
                    layers += transformers(c)
                if level > 0 and i == cfg.num_res_blocks:
                    layers.append(Upsample(c, c))
                self.output_blocks.append(nn.ModuleList(layers))

        self.norm_out = nn.GroupNorm(cfg.norm_groups, c)
        self.conv_out = zeroed(nn.Conv2d(c, Z_CHANNELS, 3, padding=1))

    def forward(self, z_t, t, fps, context):
        """z_t (B, C, T, H, W), t (B,) in 0 ... 999, fps (B,), context (B, L, D) -> eps (B, C, T, H, W).

        Height and width in latents are multiples of 2 ** (levels - 1): 8 for VideoCrafter2.
        """
        B, C, T, H, W = z_t.shape
        dtype = self.conv_out.weight.dtype
        emb = self.time_embed(sinusoidal_embedding(t, self.cfg.channels).to(dtype))
        emb = emb + self.fps_embed(sinusoidal_embedding(fps, self.cfg.channels).to(dtype))
        context = context.to(dtype)

        x = z_t.to(dtype).transpose(1, 2).flatten(0, 1)                     # (B*T, C, H, W)
        skips = []
        for block in self.input_blocks:
            x = self.run(block, x, emb, context)
            skips.append(x)
        x = self.run(self.middle_block, x, emb, context)
        for block in self.output_blocks:
            x = self.run(block, torch.cat([x, skips.pop()], dim=1), emb, context)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return x.unflatten(0, (B, T)).transpose(1, 2).to(z_t.dtype)         # (B, C, T, H, W)

    def run(self, block, x, emb, context):
        for layer in block:
            if self.grad_checkpointing and torch.is_grad_enabled():
                # The reentrant form gives LoRA no gradient in a layer whose inputs need none.
                x = checkpoint(layer, x, emb, context, use_reentrant=False)
            else:
                x = layer(x, emb, context)
        return x


# ------------------------------------------------------------------------------------------------------------
# Noise schedule


@dataclass
class ScheduleConfig:
    beta_start: float = 0.00085
    beta_end: float = 0.012
    scale_end: float = 0.7  # upstream `use_scale`: the signal shrinks linearly to this ...
    scale_steps: int = 400  # ... over the first so many of the 1,000 noise levels


class NoiseSchedule:
    """z_t = sqrt(alpha_bar_t) * scale_t * z_0 + sqrt(1 - alpha_bar_t) * eps, for t = 0 ... 999.

    Upstream lvdm/models/ddpm3d.py, `register_schedule` and `q_sample` with `use_scale`. Tables are (1000,).
    """

    def __init__(self, cfg: ScheduleConfig):
        beta_start, beta_end = cfg.beta_start ** 0.5, cfg.beta_end ** 0.5
        beta = torch.linspace(beta_start, beta_end, NOISE_LEVELS, dtype=torch.float64) ** 2
        self.alpha_bar = torch.cumprod(1 - beta, dim=0).float()
        # Upstream quirk: with scale_t the noisy latent's variance is not 1; the normal form is scale_t = 1.
        self.scale = torch.full((NOISE_LEVELS,), cfg.scale_end)
        self.scale[:cfg.scale_steps] = torch.linspace(1, cfg.scale_end, cfg.scale_steps)

    def add_noise(self, z_0, t, eps):
        """z_0, eps (B, C, T, H, W), t (B,) -> z_t (B, C, T, H, W). The forward process in Eq. 1."""
        alpha_bar, scale = (x.to(t.device)[t].view(-1, 1, 1, 1, 1) for x in (self.alpha_bar, self.scale))
        return alpha_bar.sqrt() * scale * z_0 + (1 - alpha_bar).sqrt() * eps


# ------------------------------------------------------------------------------------------------------------
# VAE (upstream lvdm/modules/networks/ae_modules.py; Stable Diffusion's first stage, one frame at a time)


@dataclass
class VAEConfig:
    channels: int = 128
    channel_mult: tuple = (1, 2, 4, 4)
    num_res_blocks: int = 2
    norm_groups: int = 32
    latent_factor: float = 0.18215

    @property
    def factor(self):
        """Pixels per latent cell, along height and along width: 8 for VideoCrafter2."""
        return 2 ** (len(self.channel_mult) - 1)


class VAEResBlock(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        """(N, C_in, H, W) -> (N, C_out, H, W)"""
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class VAEAttention(nn.Module):
    """Self-attention with one head over all positions of a frame."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H, W)"""
        N, C, H, W = x.shape
        h = self.norm(x).flatten(2).transpose(1, 2)                         # (N, H*W, C)
        h = F.scaled_dot_product_attention(self.q(h)[:, None], self.k(h)[:, None], self.v(h)[:, None])[:, 0]
        return x + self.proj_out(h).transpose(1, 2).reshape(N, C, H, W)


class VAEDownsample(nn.Conv2d):
    def __init__(self, channels):
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x):
        """(N, C, H, W) -> (N, C, H/2, W/2)"""
        # Upstream quirk: padded on the right and at the bottom only; the normal form pads every side.
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class VAEUpsample(nn.Conv2d):
    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x):
        """(N, C, H, W) -> (N, C, 2H, 2W)"""
        return super().forward(F.interpolate(x, scale_factor=2, mode="nearest"))


def vae_mid(channels, groups):
    return nn.Sequential(VAEResBlock(channels, channels, groups), VAEAttention(channels, groups),
                         VAEResBlock(channels, channels, groups))


class Encoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.conv_in = nn.Conv2d(3, cfg.channels, 3, padding=1)
        self.down = nn.ModuleList()
        c = cfg.channels
        for level, mult in enumerate(cfg.channel_mult):
            blocks = []
            for _ in range(cfg.num_res_blocks):
                blocks.append(VAEResBlock(c, mult * cfg.channels, cfg.norm_groups))
                c = mult * cfg.channels
            downsample = VAEDownsample(c) if level < len(cfg.channel_mult) - 1 else nn.Identity()
            self.down.append(nn.ModuleDict({"block": nn.Sequential(*blocks), "downsample": downsample}))
        self.mid = vae_mid(c, cfg.norm_groups)
        self.norm_out = nn.GroupNorm(cfg.norm_groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, 2 * Z_CHANNELS, 3, padding=1)

    def forward(self, x):
        """(N, 3, H, W) -> (N, 8, H/8, W/8)"""
        x = self.conv_in(x)
        for level in self.down:
            x = level["downsample"](level["block"](x))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        c = cfg.channel_mult[-1] * cfg.channels
        self.conv_in = nn.Conv2d(Z_CHANNELS, c, 3, padding=1)
        self.mid = vae_mid(c, cfg.norm_groups)
        self.up = nn.ModuleList()  # upstream counts levels from the finest, so the list runs backwards
        for level, mult in reversed(list(enumerate(cfg.channel_mult))):
            blocks = []
            for _ in range(cfg.num_res_blocks + 1):
                blocks.append(VAEResBlock(c, mult * cfg.channels, cfg.norm_groups))
                c = mult * cfg.channels
            self.up.insert(0, nn.ModuleDict({"block": nn.Sequential(*blocks),
                                             "upsample": VAEUpsample(c) if level else nn.Identity()}))
        self.norm_out = nn.GroupNorm(cfg.norm_groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z):
        """(N, 4, H/8, W/8) -> (N, 3, H, W)"""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level["upsample"](level["block"](x))
        return self.conv_out(F.silu(self.norm_out(x)))


def pixels(picture):
    """Image or array (..., H, W, 3) uint8 -> (..., 3, H, W) in [-1, 1], as the VAE takes them."""
    return torch.from_numpy(np.array(picture)).movedim(-1, -3) / 127.5 - 1


class VAE(nn.Module):
    """KL-regularised autoencoder of single frames. Upstream lvdm/models/autoencoder.py, `AutoencoderKL`."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.latent_factor = cfg.latent_factor
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * Z_CHANNELS, 2 * Z_CHANNELS, 1)
        self.post_quant_conv = nn.Conv2d(Z_CHANNELS, Z_CHANNELS, 1)

    def moments(self, x):
        """x (N, 3, H, W) in [-1, 1] -> mean, log-variance of the unscaled latent, each (N, 4, H/8, W/8)."""
        return self.quant_conv(self.encoder(x)).chunk(2, dim=1)

    def encode(self, x):
        """x (N, 3, H, W) in [-1, 1] -> z_0 (N, 4, H/8, W/8), times the latent factor.

        The mean of the posterior, not a sample: frames of a still video then have one and the same latent.
        """
        return self.moments(x)[0] * self.latent_factor

    def decode(self, z):
        """z (N, 4, H/8, W/8), times the latent factor -> x (N, 3, H, W), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z / self.latent_factor))


# ------------------------------------------------------------------------------------------------------------
# Text


@dataclass
class TextConfig:
    width: int = 1024
    heads: int = 16
    layers: int = 23  # OpenCLIP ViT-H/14 has 24; upstream reads the output of the 23rd


class TextEncoder(nn.Module):
    """The text tower of OpenCLIP, read before its last block. Upstream lvdm/modules/encoders/condition.py."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        from open_clip.transformer import Transformer  # here, because it takes as long to import as PyTorch
        self.token_embedding = nn.Embedding(VOCAB_SIZE, cfg.width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(TEXT_LENGTH, cfg.width))
        self.transformer = Transformer(cfg.width, cfg.layers, cfg.heads)
        self.ln_final = nn.LayerNorm(cfg.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, tokens, v_star=None):
        """tokens (B, L), learned words v_star (n, D) -> context (B, L, D). Id VOCAB_SIZE + i is v_star[i]."""
        x = self.token_embedding(tokens.clamp(max=VOCAB_SIZE - 1))
        if v_star is not None:
            learned = F.embedding((tokens - VOCAB_SIZE).clamp(min=0), v_star.to(x.dtype))
            x = torch.where((tokens >= VOCAB_SIZE)[..., None], learned, x)
        causal = torch.full((TEXT_LENGTH, TEXT_LENGTH), -math.inf, device=x.device, dtype=x.dtype).triu(1)
        return self.ln_final(self.transformer(x + self.positional_embedding, attn_mask=causal))


@cache
def byte_pairs():
    """CLIP's byte-pair tokenizer."""
    from open_clip.tokenizer import SimpleTokenizer
    return SimpleTokenizer()


class Tokenizer:
    """CLIP's tokenizer, which also knows learned words such as "V*".

    `placeholders` are those words, as the user types them. The i-th gets the id VOCAB_SIZE + i. The text is
    split around them, because open_clip would lower-case its special tokens and read "*" as a regular
    expression.
    """

    def __init__(self, placeholders=()):
        self.bpe = byte_pairs()
        self.ids = {word: VOCAB_SIZE + i for i, word in enumerate(placeholders)}
        self.splitter = self.splitter_at(placeholders)

    @staticmethod
    def splitter_at(placeholders):
        """A placeholder counts only where no letter or digit touches it: the V* in "V*'s", not in "AV*"."""
        longest_first = sorted(map(re.escape, placeholders), key=len, reverse=True)
        pattern = rf"(?<!\w)({'|'.join(longest_first)})(?!\w)"
        return re.compile(pattern if longest_first else r"(?!)()")  # the second matches nowhere

    def encode(self, text):
        """text -> ids without start and end."""
        ids = []
        for piece in self.splitter.split(text):
            ids += [self.ids[piece]] if piece in self.ids else self.bpe.encode(piece)
        return ids

    def __call__(self, texts):
        """B texts -> ids (B, L): start, text, end, zeros. A text that is too long loses its end."""
        tokens = torch.zeros(len(texts), TEXT_LENGTH, dtype=torch.long)
        for row, text in zip(tokens, texts):
            ids = [self.bpe.sot_token_id, *self.encode(text)[:TEXT_LENGTH - 2], self.bpe.eot_token_id]
            row[:len(ids)] = torch.tensor(ids)
        return tokens


# ------------------------------------------------------------------------------------------------------------
# A base: the three networks and the schedule, which encode pixels and texts and decode latents


class Base:
    """A loaded base: frozen networks in eval mode (dropout off), all but the UNet in float32, on `device`.

    support/files.py loads one. `config` is its BaseConfig (support/config.py).
    """

    def __init__(self, config, device, unet, vae, text_encoder):
        self.config, self.device = config, torch.device(device)
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.schedule = NoiseSchedule(config.schedule)

    @property
    def precision(self):
        return str(self.unet.conv_out.weight.dtype).removeprefix("torch.")

    @torch.no_grad()
    def encode(self, images, chunk=4):
        """images (N, 3, H, W) in [-1, 1] -> latents (N, 4, h, w) on `device`, `chunk` images at a time."""
        return torch.cat([self.vae.encode(part.to(self.device)) for part in images.split(chunk)])

    @torch.no_grad()
    def encode_text(self, texts):
        """B texts without learned words -> context (B, L, D)."""
        return self.text_encoder(Tokenizer()(texts).to(self.device))

    @torch.no_grad()
    def decode(self, z, chunk=4):
        """z (B, 4, T, h, w) -> video (B, T, H, W, 3) uint8 on the CPU, `chunk` frames at a time."""
        frames = z.transpose(1, 2).flatten(0, 1)                            # (B*T, 4, h, w)
        x = torch.cat([self.vae.decode(part.float()).cpu() for part in frames.split(chunk)])
        x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
        return x.permute(0, 2, 3, 1).unflatten(0, (z.shape[0], -1))         # (B, T, H, W, 3)
