"""Trains the embedded base from nothing: the VAE on pictures of the world, then the text tower with the UNet on its clips.

    python toy/pretrain.py                    # all stages, hours on 2 CPU cores; the same command again resumes
    python toy/pretrain.py --stage vae        # one stage: vae, latents, unet, export
    torchrun --nproc_per_node 2 toy/pretrain.py --stage unet      # the longest stage, its clips shared by processes

State is kept in --out (runs/pretrain); `export` writes the base folder, toy/base. The classes are VideoCrafter2's, and so
is what they learn: noise prediction with dropped captions. Only the numbers in CONFIG are small.

Shapes: N pictures, B clips, T frames, h w latent height and width; latents (B, 4, T, h, w).
"""
import argparse
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import (TRAIN_STEPS, BaseConfig, Defaults, NoiseSchedule, ScheduleConfig, TextConfig, Tokenizer, UNetConfig,
                   VAEConfig, build_part, complete_or_absent, fingerprint, save_config)
from toy.world import SIZE, caption, draw_clip, random_scene

FRAMES = 8
# Of the scaled latents: the larger, the more noise it takes to hide which way a clip moves, and the earlier that is
# decided. The noise rises steeply at the end (beta_end), so that all the same little is left to see at the level where
# sampling starts.
LATENT_STD = 24
CONFIG = BaseConfig(
    name="toy",
    schedule=ScheduleConfig(beta_end=0.03),
    text=TextConfig(width=64, heads=4, layers=2),
    vae=VAEConfig(channels=16, channel_mult=(1, 2, 4, 8), num_res_blocks=1, norm_groups=4),
    unet=UNetConfig(channels=48, channel_mult=(1, 2, 2), num_res_blocks=1, attention_resolutions=(2, 4),
                    head_channels=16, context_dim=64, norm_groups=8),
    defaults=Defaults(frames=FRAMES, height=SIZE, width=SIZE, fps=8, save_fps=8, eta=0.0,
                      prompt="a V* {class word} moving left on the sea", cfg=2.5, rank=32, lr=1e-3, train_steps=500,
                      batch_size=1, num_prior=16))


def main():
    p = argparse.ArgumentParser(description="Pre-train the embedded base.")
    p.add_argument("--stage", choices=["all", "vae", "latents", "unet", "export"], default="all")
    p.add_argument("--out", type=Path, default=Path("runs/pretrain"), help="folder for the state of unfinished stages")
    p.add_argument("--base", type=Path, default=Path("toy/base"), help="folder that the base is written to")
    p.add_argument("--vae_steps", type=int, default=5000, help="steps of 8 pictures")
    p.add_argument("--image_steps", type=int, default=1000, help="first steps of the UNet, on 32 single frames each")
    p.add_argument("--clip_steps", type=int, default=6000, help="further steps of the UNet, on 8 clips each")
    p.add_argument("--clips", type=int, default=8000, help="clips that are drawn and encoded once")
    args = p.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.autocast = torch.autocast(args.device, torch.bfloat16, enabled=fast_in_bfloat16(args.device))
    args.out.mkdir(parents=True, exist_ok=True)
    stages = {"vae": train_vae, "latents": encode_clips, "unet": train_unet, "export": export}
    for stage, run in stages.items():
        if args.stage in ("all", stage):
            run(args)


def fast_in_bfloat16(device, size=1024):
    """Whether a matrix product in bfloat16 takes less than two thirds of its time in float32: many processors emulate it."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(size, size, device=device, dtype=dtype)
        for _ in range(4):  # the last one counts
            start = time.perf_counter()
            (a @ a).sum().item()
            seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] < seconds[torch.float32] / 1.5


def draw_pictures(count, seed):
    """count pictures (N, 3, H, W) uint8: a third as in clips, the others with sprites of any size, turn, place and look.

    Like the real VAE, this one has to code pictures that the UNet never sees: a subject's look among them.
    """
    rng = np.random.default_rng(seed)
    pictures = []
    for i in range(count):
        scene = random_scene(rng)
        if i % 3:
            look = replace(scene.look, colour=tuple(rng.uniform(0.05, 1, 3)))
            if look.second:
                look = replace(look, second=tuple(rng.uniform(0.05, 1, 3)))
            scene = replace(scene, look=look, radius=rng.uniform(24, 48), angle=rng.uniform(-0.6, 0.6),
                            start=tuple(rng.uniform(SIZE / 4, 3 * SIZE / 4, 2)), direction="")
        pictures.append(draw_clip(scene, 1, first=rng.integers(FRAMES))[0])
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def train_vae(args, batch=8, lr=2e-3, kl_weight=1e-6, pool=8000):
    """Reconstruction plus a weak pull of the latent's distribution towards N(0, 1), as in AutoencoderKL."""
    torch.manual_seed(0)
    vae = build_part("vae", CONFIG).to(args.device, memory_format=torch.channels_last)
    run = Run("vae", args.out, vae, lr, args.vae_steps, args.device)
    if run.step == run.steps:
        return
    pictures = draw_pictures(pool, seed=1)
    while run.step < run.steps:
        rng = np.random.default_rng((2, run.step))
        x = pictures[rng.integers(len(pictures), size=batch)].to(args.device).float() / 127.5 - 1
        if rng.random() < 0.5:
            x = x.flip(3)
        with args.autocast:
            mean, logvar = (y.float() for y in vae.moments(x.contiguous(memory_format=torch.channels_last)))
            z = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * torch.randn_like(mean)
            y = vae.decode(z * vae.latent_factor).float()
        # Outlines come by themselves, colours would be long in coming: for most of the training three of the four latent
        # channels are drawn towards the mean colour of their 8x8 pixels, less and less.
        mse, blurred = F.mse_loss(y, x), F.avg_pool2d(x, 8)
        coarse, lead = F.mse_loss(F.avg_pool2d(y, 8), blurred), F.mse_loss(mean[:, :3], blurred)
        lead_weight = 4 * max(0, 0.75 - run.step / run.steps)
        kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
        loss = 4 * mse + 8 * coarse + 0.2 * F.l1_loss(y, x) + lead_weight * lead + kl_weight * kl
        run.optimize(loss, coarse=coarse, lead=lead, psnr=10 * torch.log10(4 / mse), kl=kl)


def draw_scenes(count, seed=3):
    rng = np.random.default_rng(seed)
    return [random_scene(rng, FRAMES) for _ in range(count)]


@torch.no_grad()
def encode_clips(args, batch=16):
    """Draws args.clips clips and keeps their latents, (clips, T, 4, h, w) float16, and the factor that scales them."""
    path = args.out / "latents.safetensors"
    if path.exists():
        return
    vae = load_average("vae", args).to(args.device, memory_format=torch.channels_last)
    scenes, latents, start, pool = draw_scenes(args.clips), [], time.time(), ThreadPoolExecutor()
    for i in range(0, len(scenes), batch):
        clips = np.concatenate(list(pool.map(draw_clip, scenes[i:i + batch])))
        x = torch.from_numpy(clips).permute(0, 3, 1, 2).to(args.device).float() / 127.5 - 1
        with args.autocast:
            mean, _ = vae.moments(x.contiguous(memory_format=torch.channels_last))
        latents.append(mean.unflatten(0, (-1, FRAMES)).half().cpu())
        if i % (32 * batch) == 0:
            print(f"latents {i}/{len(scenes)}  {time.time() - start:.0f} s", flush=True)
    latents = torch.cat(latents)
    with complete_or_absent(path) as temporary:
        save_file({"latents": latents, "factor": LATENT_STD / latents.float().std()}, temporary)


class NoiseLoss(torch.nn.Module):
    """Eq. 1 for the text tower and the UNet together: one number for each clip."""

    def __init__(self):
        super().__init__()
        self.text_encoder, self.unet = (build_part(part, CONFIG) for part in ("text_encoder", "unet"))
        # Words have to outweigh what a narrow tower's own layers add to them, and the tower has to learn slowly: or it
        # soon says nothing but what the single frames need, and the directions, which come later, are never heard.
        torch.nn.init.normal_(self.text_encoder.token_embedding.weight, std=0.5)
        torch.nn.init.normal_(self.text_encoder.positional_embedding, std=0.2)
        self.schedule = NoiseSchedule(CONFIG.schedule)

    def forward(self, z_0, t, eps, fps, tokens):
        """z_0, eps (B, 4, T, h, w), t, fps (B,), tokens (B, L) -> (B,)"""
        # Of PyTorch's ways to attend, the plain product is the fastest where sequences are as short as these.
        with sdpa_kernel(SDPBackend.MATH):
            guess = self.unet(self.schedule.add_noise(z_0, t, eps), t, fps, self.text_encoder(tokens))
        return (guess.float() - eps).pow(2).mean(dim=(1, 2, 3, 4))

    def weight(self):
        """By noise level: what makes Eq. 1 the loss of v-prediction (Salimans and Ho 2022, Sec. 4).

        Where little but noise is left to see, the plain loss is near 0 whatever the layout and the motion; the weighted one
        is about the same at every level. The bound keeps the last few, where nothing is left to see at all, from
        outweighing the rest.
        """
        signal = self.schedule.alpha_bar * (self.schedule.scale * LATENT_STD) ** 2
        return (1 + (1 - self.schedule.alpha_bar) / signal).clamp(max=200)


def train_unet(args, images=64, clips=8, lr=1e-3):
    """Single frames first, 8 times cheaper, then clips with a share of single frames; captions drop words."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.manual_seed(0)
    data = load_file(args.out / "latents.safetensors")
    scenes, latents, factor = draw_scenes(len(data["latents"])), data["latents"], data["factor"]
    tokenizer = Tokenizer()
    loss = NoiseLoss().to(args.device).eval()  # no dropout: there is more data than so small a network can learn by heart
    weight = loss.weight().to(args.device)
    run = Run("unet", args.out, loss, lr, args.image_steps + args.clip_steps, args.device, slow=loss.text_encoder)
    model = loss
    if world > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
        model = DistributedDataParallel(loss)
    while run.step < run.steps:
        rng = np.random.default_rng((4, run.step))
        single = run.step < args.image_steps or run.step % 8 == 0
        which = rng.integers(len(scenes), size=images if single else clips)
        z_0 = factor * latents[torch.from_numpy(which)].float().transpose(1, 2)            # (B, 4, T, h, w)
        if single:
            frame = torch.from_numpy(rng.integers(FRAMES, size=len(which)))
            z_0 = z_0[torch.arange(len(which)), :, frame][:, :, None]                      # (B, 4, 1, h, w)
        texts = [caption(replace(scenes[k], direction="") if single else scenes[k], rng) for k in which]
        fps = torch.tensor([scenes[k].fps for k in which])
        # A third of the noise levels are drawn from the noisiest 30%: layout and motion are decided there.
        t = rng.integers(TRAIN_STEPS, size=len(which))
        t = torch.from_numpy(np.where(rng.random(len(which)) < 2 / 3, t, 7 * TRAIN_STEPS // 10 + 3 * t // 10))
        eps = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(run.step))
        inputs = [x[rank::world].to(args.device) for x in (z_0, t, eps, fps, tokenizer(texts))]
        with args.autocast:
            error = (weight[inputs[1]] * model(*inputs)).mean()
        run.optimize(error, **{"images" if single else "clips": error})
    if world > 1:
        dist.destroy_process_group()


def export(args):
    """The averaged weights become a base folder."""
    networks = {"vae": load_average("vae", args)}
    both = load_average("unet", args, NoiseLoss())
    networks |= {"unet": both.unet, "text_encoder": both.text_encoder}
    # Words that no caption has were never trained: their random rows become zero, which says nothing instead of anything.
    words = Tokenizer()([caption(scene) for scene in draw_scenes(2000)]).unique()
    table = both.text_encoder.token_embedding.weight.data
    keep = torch.zeros(len(table), 1)
    keep[words] = 1
    table.mul_(keep)
    factor = load_file(args.out / "latents.safetensors")["factor"].item()
    config = replace(CONFIG, vae=replace(CONFIG.vae, latent_factor=factor))
    states = {part: {name: x.bfloat16().contiguous() for name, x in network.state_dict().items()}
              for part, network in networks.items()}
    config.fingerprint = fingerprint(states)
    # The folder appears whole or not at all; one that was there gives way.
    new, old = (args.base.with_name(f".{name}-{args.base.name}") for name in ("new", "old"))
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
    new.mkdir(parents=True)
    for part, state in states.items():
        save_file(state, new / f"{part}.safetensors")
    save_config(config, new / "config.json")
    if args.base.exists():
        args.base.rename(old)
    new.rename(args.base)
    shutil.rmtree(old, ignore_errors=True)
    print(f"wrote {args.base}: {sum(x.numel() for s in states.values() for x in s.values()) / 1e6:.2f} M parameters, "
          f"fingerprint {config.fingerprint}")


def load_average(stage, args, network=None):
    """The moving average of a stage's weights, in `network` or in a new one of that name."""
    network = network or build_part(stage, CONFIG)
    state = torch.load(args.out / f"{stage}.pt", weights_only=True, map_location="cpu")["average"]
    network.load_state_dict({name.removeprefix("module."): x for name, x in state.items() if name != "n_averaged"})
    return network.eval()


class Run:
    """One resumable training run: optimizer, warm-up and a decay at the end, moving average of the weights, saves, log lines."""

    def __init__(self, name, out, network, lr, steps, device, slow=None, ema=0.998, save_every=200):
        self.path, self.network, self.lr, self.steps, self.save_every = out / f"{name}.pt", network, lr, steps, save_every
        slow = set(slow.parameters()) if slow else set()  # a part of the network that learns at a tenth of the rate
        self.optimizer = torch.optim.AdamW([{"params": [p for p in network.parameters() if p not in slow], "scale": 1.0},
                                            {"params": [p for p in network.parameters() if p in slow], "scale": 0.1}],
                                           lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
        # Young averages look back on a ninth of their life, so that the random start is soon forgotten.
        self.average = AveragedModel(network, avg_fn=lambda average, new, n: average + max(1 - ema, 9 / (10 + n)) * (new - average))
        self.step, self.log, self.start = 0, {}, time.time()
        if self.path.exists():
            state = torch.load(self.path, weights_only=True, map_location=device)
            self.step = state["step"]
            self.network.load_state_dict(state["network"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            print(f"{name}: resumed at step {self.step} of {steps}", flush=True)

    def optimize(self, loss, **metrics):
        """One optimizer step on a scalar loss; metrics are averaged into the next log line."""
        lr = self.lr * min(1, (self.step + 1) / 100, 0.02 + 4 * (1 - self.step / self.steps))  # falls over the last quarter
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.average.update_parameters(self.network)
        self.step += 1
        for key, value in {"loss": loss, **metrics}.items():
            self.log.setdefault(key, []).append(float(value.detach()))
        if dist.is_initialized() and dist.get_rank() > 0:
            return
        if self.step % 50 == 0 or self.step == self.steps:
            line = "  ".join(f"{key} {np.mean(values):.4f}" for key, values in self.log.items())
            print(f"{self.path.stem} step {self.step}/{self.steps}  {line}  lr {lr:.1e}  {time.time() - self.start:.0f} s",
                  flush=True)
            self.log = {}
        if self.step % self.save_every == 0 or self.step == self.steps:
            with complete_or_absent(self.path) as temporary:
                torch.save({"step": self.step, "network": self.network.state_dict(), "average": self.average.state_dict(),
                            "optimizer": self.optimizer.state_dict()}, temporary)


if __name__ == "__main__":
    main()
