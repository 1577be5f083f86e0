"""VideoCrafter2 from scratch: noise schedule, text encoder, VAE, 3D UNet, and `load_base`, which reads them from a folder.

Nothing to run here; the story goes on in lora.py. To see the networks and their sizes:

    python -c "from model import *; print(UNet(UNetConfig()))"

Shapes: B clips, T frames, C channels, H W height and width, L text tokens (77), D text width, N any batch.
Videos are (B, C, T, H, W); inside the UNet the frames join the batch, (B*T, C, H, W), and layers that look along time
take them apart again. Pixels are in [-1, 1]. Latents are the VAE's times `latent_factor`, 8 times smaller than pixels.

Upstream means the public VideoCrafter2 code (AILab-CVC/VideoCrafter); every module here notes the upstream file it equals.
"""
import argparse
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import sys
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import Transformer
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).parent
VOCAB_SIZE = 49408  # CLIP's byte-pair vocabulary; ids from here on are learned words V*
TEXT_LENGTH = 77    # CLIP's context length
Z_CHANNELS = 4      # latent channels of a KL-f8 VAE
TRAIN_STEPS = 1000  # noise levels


class BadInput(Exception):
    """A file or flag the user has to change. The message is one line: which one, what is wrong, what would be right."""


class FlagParser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message}; --help lists all flags")


def run_script(main):
    """Run `main()`; a BadInput or a fault of the disk becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except (BadInput, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def one_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def complete_or_absent(path):
    """Gives a temporary path in the same folder, which takes the place of `path` when the block ends without an error.

    So a reader finds the old file or the new one, never half of one, even if the process is killed. The block may make a
    folder instead, where none was. Raises BadInput if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except Exception:  # what a library makes of a full disk is its own affair
        if shutil.disk_usage(path.parent).free < 2**20:
            raise BadInput(f"{path}: not written, the disk is full; make room, or name another --out") from None
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


@contextmanager
def only_writer(folder, rank=0, unfinished=(".tmp-*",)):
    """Holds `folder` for this run until the block ends, however it ends, and removes what a killed one left unfinished there.

    Of a run's processes only rank 0 does so. Raises BadInput if another run writes there.
    """
    if rank > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{folder}: another run is writing there; wait for it, or name another folder") from None
        for path in [path for pattern in unfinished for path in folder.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------------------------------
# Configs. The defaults are VideoCrafter2's (upstream configs/inference_t2v_512_v2.0.yaml); toy/base has other numbers.


@dataclass
class ScheduleConfig:
    beta_start: float = 0.00085
    beta_end: float = 0.012
    scale_end: float = 0.7  # upstream `use_scale`: the signal shrinks linearly to this ...
    scale_steps: int = 400  # ... over the first so many of the 1,000 noise levels


@dataclass
class TextConfig:
    width: int = 1024
    heads: int = 16
    layers: int = 23  # OpenCLIP ViT-H/14 has 24; upstream reads the last-but-one's output, so the 24th is never built


@dataclass
class VAEConfig:
    channels: int = 128
    channel_mult: tuple = (1, 2, 4, 4)
    num_res_blocks: int = 2
    norm_groups: int = 32
    latent_factor: float = 0.18215


@dataclass
class UNetConfig:
    channels: int = 320
    channel_mult: tuple = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple = (1, 2, 4)  # downsampling factors at which there is attention
    head_channels: int = 64
    context_dim: int = 1024
    norm_groups: int = 32


@dataclass
class Defaults:
    """What train.py and sample.py use where a flag is left out. The paper's values, except where a comment says ours."""
    frames: int = 16
    height: int = 320
    width: int = 512
    fps: int = 28            # upstream's sampling script; not stated in the paper
    save_fps: int = 10       # upstream's sampling script
    # sampling (Sec. "Dynamic Weighted Video Sampling" and "Implementation details")
    prompt: str = "a V* {class word} running on the grass"
    steps: int = 50
    cfg: float = 12.0
    eta: float = 1.0         # upstream's text-to-video script; not stated in the paper
    lambda_s: float = 0.4
    lambda_l: float = 0.8
    K: int = 5
    # training (Sec. "Implementation details")
    rank: int = 16           # ours: not stated in the paper
    lr: float = 3e-5
    weight_decay: float = 1e-2
    train_steps: int = 10_000
    batch_size: int = 1      # ours: subject clips per process, each with one prior clip
    grad_accum: int = 1
    alpha: float = 1.0
    num_prior: int = 200
    save_every: int = 500    # ours, as the next one
    preview_every: int = 1000
    photos: str = "toy/subjects/berry"  # train.py's subject where --images is left out, relative to the repository
    class_word: str = "heart"


@dataclass
class BaseConfig:
    name: str = "videocrafter2"
    fingerprint: str = ""    # of the weights, see `fingerprint()`; a subject remembers the base it was trained on
    crc32: tuple = ()        # of config.json without this number, then of the weight files in the order of PARTS
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    text: TextConfig = field(default_factory=TextConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    defaults: Defaults = field(default_factory=Defaults)

    def size_multiple(self):
        """Height and width in pixels have to be multiples of this: 8 for the VAE times 8 for the UNet's halvings."""
        return 2 ** (len(self.vae.channel_mult) + len(self.unet.channel_mult) - 2)


# ---------------------------------------------------------------------------------------------------------------------
# Noise schedule


class NoiseSchedule:
    """z_t = sqrt(alpha_bar_t) * scale_t * z_0 + sqrt(1 - alpha_bar_t) * eps, for t = 0 ... 999.

    Upstream lvdm/models/ddpm3d.py, `register_schedule` and `q_sample` with `use_scale`.
    """

    def __init__(self, cfg: ScheduleConfig):
        beta = torch.linspace(cfg.beta_start ** 0.5, cfg.beta_end ** 0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
        self.alpha_bar = torch.cumprod(1 - beta, dim=0).float()
        # Upstream quirk: scale_t takes the noisy latent off the unit-variance curve; the normal form is scale_t = 1.
        self.scale = torch.full((TRAIN_STEPS,), cfg.scale_end)
        self.scale[:cfg.scale_steps] = torch.linspace(1, cfg.scale_end, cfg.scale_steps)

    def add_noise(self, z_0, t, eps):
        """z_0, eps (B, C, T, H, W), t (B,) -> z_t (B, C, T, H, W). The forward process in Eq. 1."""
        alpha_bar, scale = (table.to(t.device)[t].view(-1, 1, 1, 1, 1) for table in (self.alpha_bar, self.scale))
        return alpha_bar.sqrt() * scale * z_0 + (1 - alpha_bar).sqrt() * eps


# ---------------------------------------------------------------------------------------------------------------------
# Text


class Tokenizer:
    """CLIP's byte-pair tokenizer, which also knows learned words such as "V*".

    `placeholders` are those words, as the user types them; the i-th becomes the id VOCAB_SIZE + i. open_clip's own
    special tokens would lower-case them and read "*" as a regular expression, so the text is cut around them instead.
    """

    def __init__(self, placeholders=()):
        self.bpe = SimpleTokenizer()
        self.ids = {word: VOCAB_SIZE + i for i, word in enumerate(placeholders)}
        # A placeholder counts only where no letter or digit touches it: the V* in "V*'s", not the one in "AV*".
        words = sorted(map(re.escape, self.ids), key=len, reverse=True)
        self.cut = re.compile(rf"(?<!\w)({'|'.join(words)})(?!\w)") if words else re.compile(r"(?!)()")

    def encode(self, text):
        """text -> list of ids, without the start and end tokens and of any length."""
        ids = []
        for piece in self.cut.split(text):
            ids += [self.ids[piece]] if piece in self.ids else self.bpe.encode(piece)
        return ids

    def __call__(self, texts):
        """B texts -> ids (B, L): start, text, end, zeros. A text that is too long loses its end."""
        tokens = torch.zeros(len(texts), TEXT_LENGTH, dtype=torch.long)
        for row, text in zip(tokens, texts):
            ids = [self.bpe.sot_token_id, *self.encode(text)[:TEXT_LENGTH - 2], self.bpe.eot_token_id]
            row[:len(ids)] = torch.tensor(ids)
        return tokens


class TextEncoder(nn.Module):
    """The text tower of OpenCLIP, read before its last block. Upstream lvdm/modules/encoders/condition.py."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(VOCAB_SIZE, cfg.width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(TEXT_LENGTH, cfg.width))
        self.transformer = Transformer(cfg.width, cfg.layers, cfg.heads)
        self.ln_final = nn.LayerNorm(cfg.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def forward(self, tokens, v_star=None):
        """tokens (B, L), learned words v_star (n, D) -> context (B, L, D). Ids from VOCAB_SIZE on are rows of v_star."""
        x = self.token_embedding(tokens.clamp(max=VOCAB_SIZE - 1))
        if v_star is not None:
            learned = F.embedding((tokens - VOCAB_SIZE).clamp(min=0), v_star.to(x.dtype))
            x = torch.where((tokens >= VOCAB_SIZE)[..., None], learned, x)
        causal = torch.full((TEXT_LENGTH, TEXT_LENGTH), -math.inf, device=x.device, dtype=x.dtype).triu(1)
        return self.ln_final(self.transformer(x + self.positional_embedding, attn_mask=causal))


# ---------------------------------------------------------------------------------------------------------------------
# VAE (upstream lvdm/modules/networks/ae_modules.py; the first stage of Stable Diffusion, one frame at a time)


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
        # Upstream quirk: padded on the right and at the bottom only; the normal form is one pixel on every side.
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
            last = level == len(cfg.channel_mult) - 1
            self.down.append(nn.ModuleDict({"block": nn.Sequential(*blocks),
                                            "downsample": nn.Identity() if last else VAEDownsample(c)}))
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
        """x (N, 3, H, W) in [-1, 1] -> mean and log-variance of the latent, each (N, 4, H/8, W/8), without the factor."""
        return self.quant_conv(self.encoder(x)).chunk(2, dim=1)

    def encode(self, x):
        """x (N, 3, H, W) in [-1, 1] -> z_0 (N, 4, H/8, W/8), times the latent factor.

        The mean of the posterior, not a sample: frames of a still video then have one and the same latent.
        """
        return self.moments(x)[0] * self.latent_factor

    def decode(self, z):
        """z (N, 4, H/8, W/8), times the latent factor -> x (N, 3, H, W), about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z / self.latent_factor))


# ---------------------------------------------------------------------------------------------------------------------
# UNet (upstream lvdm/modules/networks/openaimodel3d.py and lvdm/modules/attention.py)
#
# Every layer has the same forward: x (B*T, C, H, W), emb (B, E) for timestep and fps, context (B, L, D) for the text.
# B is emb's length, so T is x's length divided by it.


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


class TemporalConv(nn.Module):
    """Four convolutions along time, kernel 3, the only layers that know the order of frames.

    Upstream `TemporalConvBlock`. The norms here run over (T, H, W) together.
    """

    def __init__(self, channels, groups):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(groups, channels) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0)) for _ in range(4))
        self.dropout = nn.Dropout(0.1)
        zeroed(self.convs[-1])

    def forward(self, x, B):
        """(B*T, C, H, W) -> (B*T, C, H, W)"""
        x = x.unflatten(0, (B, -1)).transpose(1, 2)                         # (B, C, T, H, W)
        h = x
        for i, (norm, conv) in enumerate(zip(self.norms, self.convs)):
            h = F.silu(norm(h))
            h = conv(self.dropout(h) if i else h)
        return (x + h).transpose(1, 2).flatten(0, 1)                        # (B*T, C, H, W)


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


class Attention(nn.Module):
    """Multi-head attention; `to_q`, `to_k`, `to_v` are what LoRA is put on (lora.py)."""

    def __init__(self, dim, context_dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x, context):
        """x (N, S, C), context (M, L, D) -> (N, S, C).

        N is a multiple of M: so many neighbouring rows of x read the same row of context. The T frames of a clip share
        the clip's text that way, and its keys and values are computed once per clip.
        """
        N, S, C = x.shape
        M = context.shape[0]
        q = self.to_q(x).view(M, -1, self.heads, C // self.heads).transpose(1, 2)           # (M, heads, N/M*S, C/heads)
        k = self.to_k(context).view(M, -1, self.heads, C // self.heads).transpose(1, 2)     # (M, heads, L, C/heads)
        v = self.to_v(context).view(M, -1, self.heads, C // self.heads).transpose(1, 2)
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
        """x (N, S, C), context (M, L, D) or None -> (N, S, C). Without context, attn2 is self-attention as well."""
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

    def __init__(self, channels, heads, head_channels, cfg: UNetConfig):
        super().__init__()
        dim = heads * head_channels
        self.norm = nn.GroupNorm(cfg.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, dim)
        # Upstream quirk (`temporal_selfatt_only`): a second self-attention stands where the text's cross-attention was.
        self.block = TransformerBlock(dim, dim, heads)
        self.proj_out = zeroed(nn.Linear(dim, channels))

    def forward(self, x, emb, context):
        """(B*T, C, H, W) -> (B*T, C, H, W)"""
        B, (H, W) = emb.shape[0], x.shape[2:]
        h = self.norm(x.unflatten(0, (B, -1)).transpose(1, 2))              # (B, C, T, H, W), normalised over T, H, W
        h = h.permute(0, 3, 4, 2, 1).flatten(0, 2)                          # (B*H*W, T, C)
        h = self.proj_out(self.block(self.proj_in(h)))
        h = h.unflatten(0, (B, H, W)).permute(0, 3, 4, 1, 2)                # (B, T, C, H, W)
        return x + h.flatten(0, 1)                                          # (B*T, C, H, W)


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


class UNet(nn.Module):
    """The noise predictor eps(z_t, t, fps, text). Upstream `UNetModel`; 1,413.28 M parameters with the default config.

    `grad_checkpointing = True` recomputes each layer in the backward pass instead of keeping its activations.
    """

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.cfg = cfg
        self.grad_checkpointing = False
        c, emb_dim = cfg.channels, 4 * cfg.channels
        self.time_embed = nn.Sequential(nn.Linear(c, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.fps_embed = nn.Sequential(nn.Linear(c, emb_dim), nn.SiLU(), zeroed(nn.Linear(emb_dim, emb_dim)))

        def transformers(channels):
            heads = channels // cfg.head_channels
            return [SpatialTransformer(channels, heads, cfg),
                    TemporalTransformer(channels, heads, cfg.head_channels, cfg)]

        # input_blocks.0: the first convolution, then upstream's `init_attn`, whose 8 heads are wider than the channels.
        self.input_blocks = nn.ModuleList([nn.ModuleList([
            Conv(Z_CHANNELS, c), TemporalTransformer(c, 8, cfg.head_channels, cfg)])])
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
        """z_t (B, C, T, H, W), t (B,) in 0 ... 999, fps (B,), context (B, L, D) -> predicted eps (B, C, T, H, W).

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
                # The reentrant form would give no gradient to LoRA: none of a frozen layer's inputs may need one.
                x = checkpoint(layer, x, emb, context, use_reentrant=False)
            else:
                x = layer(x, emb, context)
        return x


# ---------------------------------------------------------------------------------------------------------------------
# A base: a folder with config.json, unet.safetensors, vae.safetensors, text_encoder.safetensors

PARTS = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder}


@dataclass
class Base:
    """A loaded base: frozen networks in eval mode (dropout off), float32 text encoder and VAE, UNet in `dtype`."""
    config: BaseConfig
    schedule: NoiseSchedule
    text_encoder: TextEncoder
    vae: VAE
    unet: UNet
    device: torch.device

    @torch.no_grad()
    def decode(self, z, chunk=4):
        """z (B, 4, T, h, w) -> video (B, T, H, W, 3) uint8 on the CPU, `chunk` frames at a time to bound the memory."""
        frames = z.transpose(1, 2).flatten(0, 1)                            # (B*T, 4, h, w)
        x = torch.cat([self.vae.decode(part.float()).cpu() for part in frames.split(chunk)])
        x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
        return x.permute(0, 2, 3, 1).unflatten(0, (z.shape[0], -1))         # (B, T, H, W, 3)


def default_base():
    """The folder used where --base is left out."""
    converted = ROOT / "checkpoints" / "videocrafter2"
    return Path(os.path.relpath(converted if (converted / "config.json").exists() else ROOT / "toy" / "base"))


def build_part(part, config: BaseConfig):
    """An untrained network: part is "unet", "vae" or "text_encoder"."""
    return PARTS[part]({"unet": config.unet, "vae": config.vae, "text_encoder": config.text}[part])


def load_base(folder, device="cpu", dtype=torch.float32):
    """Folder -> Base on `device`, every tensor checked against the config by name and shape. Raises BadInput."""
    folder = Path(folder)
    config = load_config(folder / "config.json")
    networks = {}
    for part, crc32 in zip(PARTS, config.crc32[1:], strict=True):
        path = folder / f"{part}.safetensors"
        try:
            if file_crc32(path) != crc32:
                raise ValueError("its bytes are not those that config.json was written for")
            state = load_file(path)
        except FileNotFoundError:
            raise BadInput(f"{path}: no such file; a base folder holds config.json and "
                           f"{', '.join(p + '.safetensors' for p in PARTS)} (python convert_ckpt.py makes one)") from None
        except Exception as error:  # safetensors raises its own SafetensorError, OSError or ValueError by the kind of damage
            raise BadInput(f"{path}: not a readable safetensors file ({one_line(error)}); convert or copy it again") from None
        try:
            with torch.device("meta"):
                network = build_part(part, config)
        except Exception as error:  # torch's layers each refuse impossible numbers in their own way
            raise BadInput(f"{folder / 'config.json'}: its {part} cannot be built ({one_line(error)})") from None
        check_tensors(path, state, network.state_dict())
        check_values(path, state)
        network.load_state_dict(state, assign=True)
        network.to(device, dtype if part == "unet" else torch.float32)
        networks[part] = network.eval().requires_grad_(False)
    return Base(config, NoiseSchedule(config.schedule), device=torch.device(device), **networks)


def check_tensors(path, found, expected):
    """Two dicts of name -> tensor (or anything with a shape) must agree in names and shapes. Raises BadInput."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    shapes = [n for n in expected if n in found and tuple(found[n].shape) != tuple(expected[n].shape)]
    if missing or extra:
        raise BadInput(f"{path}: {len(missing)} tensors missing{f' (first {missing[0]})' if missing else ''}, "
                       f"{len(extra)} unknown{f' (first {extra[0]})' if extra else ''}; "
                       f"is it the file of another model, or its config?")
    if shapes:
        name = shapes[0]
        raise BadInput(f"{path}: {len(shapes)} tensors of another shape, first {name}: "
                       f"{tuple(found[name].shape)} where {tuple(expected[name].shape)} belongs")


def check_values(path, tensors, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
    """Every one of name -> tensor has one of these types and is finite. Raises BadInput."""
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes:
            raise BadInput(f"{path}: {name} is {str(tensor.dtype)[6:]}, and {' or '.join(str(dtype)[6:] for dtype in dtypes)} belongs there")
        if not tensor.isfinite().all():
            raise BadInput(f"{path}: {name} holds values that are not finite; the file is damaged, copy or make it again")


def load_config(path):
    """config.json -> BaseConfig. Raises BadInput on anything but exactly the dataclasses' names and types."""
    path = Path(path)
    try:
        config = config_from_dict(BaseConfig, json.loads(path.read_text(encoding="utf-8")), path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; --base takes a folder made by convert_ckpt.py, or toy/base") from None
    except (ValueError, OSError, RecursionError) as error:
        raise BadInput(f"{path}: not a readable JSON file ({one_line(error)})") from None
    if len(config.crc32) != 1 + len(PARTS) or config.crc32[0] != config_crc32(config):
        raise BadInput(f"{path}: was changed after it was written; copy or make the base again, flags change what a run does")
    return config


def config_from_dict(cls, values, path):
    default = cls()
    names = {f.name for f in fields(cls)}
    if not isinstance(values, dict) or values.keys() != names:
        wrong = sorted(names ^ values.keys()) if isinstance(values, dict) else [f"not an object but {values!r}"]
        raise BadInput(f"{path}: {cls.__name__} has missing or unknown entries: {', '.join(wrong)}")
    out = {}
    for name, value in values.items():
        like = getattr(default, name)
        if isinstance(like, (ScheduleConfig, TextConfig, VAEConfig, UNetConfig, Defaults)):
            value = config_from_dict(type(like), value, path)
        elif isinstance(like, tuple):
            if not isinstance(value, list) or not all(type(v) is int and v >= 0 for v in value):
                raise BadInput(f"{path}: {name} is {value!r}, not a list of whole numbers")
            value = tuple(value)
        elif isinstance(like, float) and type(value) is int:
            value = float(value)
        elif type(value) is not type(like):
            raise BadInput(f"{path}: {name} is {value!r}, not {type(like).__name__}")
        out[name] = value
    return cls(**out)


def save_config(config: BaseConfig, path):
    """Writes config.json for the weight files that lie beside it."""
    path = Path(path)
    config = replace(config, crc32=(0, *(file_crc32(path.with_name(f"{part}.safetensors")) for part in PARTS)))
    config = replace(config, crc32=(config_crc32(config), *config.crc32[1:]))
    path.write_text(json.dumps(asdict(config), indent=1) + "\n", encoding="utf-8")


def config_crc32(config: BaseConfig):
    return zlib.crc32(json.dumps(asdict(replace(config, crc32=config.crc32[1:])), sort_keys=True).encode())


def file_crc32(path):
    crc32 = 0
    with open(path, "rb") as f:
        while block := f.read(2**22):
            crc32 = zlib.crc32(block, crc32)
    return crc32


def fingerprint(networks):
    """dict of part -> state dict -> 16 hex digits that tell this base's weights from another's.

    Hashed are the names and shapes of all tensors and the bfloat16 values of the small ones (norms and biases), so that a
    base keeps its fingerprint whether it is stored in bfloat16 or float32.
    """
    digest = hashlib.sha256()
    for part in PARTS:
        for name, tensor in sorted(networks[part].items()):
            digest.update(f"{part}.{name} {tuple(tensor.shape)}".encode())
            if tensor.dim() <= 1:
                digest.update(tensor.detach().cpu().bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
