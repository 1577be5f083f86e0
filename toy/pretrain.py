"""Trains a base like toy/base from scratch: the VAE on pictures of the world, then text and UNet on clips.

    python toy/pretrain.py      # takes hours on 2 CPU cores; the same command resumes

Each of the four stages saves its result in --out (runs/pretrain). A finished stage is skipped, and an
unfinished training resumes from its last save. The last stage writes the base folder, OUT/base. The networks'
classes are VideoCrafter2's, and so is the task: noise prediction with caption dropout. CONFIG's numbers are
small, and its `latent_std` gives Eq. 1 the weights of v-prediction.

Shapes: N pictures, B clips, T frames, L text tokens; pictures (N, 3, 64, 64), latents z (B, 4, T, 8, 8).
"""
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel

from model import (NOISE_LEVELS, VAE, NoiseSchedule, ScheduleConfig, TextConfig, TextEncoder, Tokenizer, UNet,
                   UNetConfig, VAEConfig, pixels)
from support.cli import (BadInput, FlagParser, atomic_write, check_out, join_processes, lock_folder,
                         progress_bar, run_script)
from support.config import BaseConfig, SamplingDefaults, TrainingDefaults, loss_weights, save_config
from support.files import PARTS, fingerprint
from toy.world import FRAMES, SIZE, caption, draw_clip, random_scene

# Standard deviation of the scaled latents. Large latents need more noise to hide which way a clip moves, so
# the direction is decided earlier. The noise rises steeply at the end (`beta_end`), so at the level where
# sampling starts it still hides nearly all of a clip.
LATENT_STD = 20.0
CONFIG = BaseConfig(
    name="toy", latent_std=LATENT_STD,
    schedule=ScheduleConfig(beta_end=0.025),
    text_encoder=TextConfig(width=64, heads=4, layers=2),
    vae=VAEConfig(channels=16, channel_mult=(1, 2, 4, 4), num_res_blocks=1, norm_groups=4),
    unet=UNetConfig(channels=48, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2),
                    head_channels=16, context_dim=64, norm_groups=8),
    sampling=SamplingDefaults(frames=FRAMES, height=SIZE, width=SIZE, fps=8, save_fps=8,
                              prompt="a V* {class word} moving up on the snow", cfg=2.5),
    training=TrainingDefaults(rank=32, lr=2e-3, scale_lr=False, frames=FRAMES, steps=500, num_prior=16))

VAE_STEPS = 9000        # each on 16 pictures
CLIPS = 16_000          # for the UNet and the text tower, drawn and encoded once
IMAGE_STEPS = 3000      # their first steps: three in four are on 64 single frames, the others on 16 clips
CLIP_STEPS = 14_000     # the steps that follow: three in four are on 16 clips, the others on 64 frames


def main():
    p = FlagParser(description="Pre-train the embedded base.")
    p.add_argument("--out", type=Path, default=Path("runs/pretrain"),
                   help="folder for the files of all stages (default: %(default)s)")
    out = p.parse_args().out
    check_out(out)
    device = join_processes().device
    with lock_folder(out):
        train_vae(out, device)
        encode_clips(out, device)
        train_unet(out, device)
        export(out)


# ------------------------------------------------------------------------------------------------------------
# The VAE


def train_vae(out, device):
    """Trains the VAE to reconstruct, with a weak pull of its latents towards N(0, 1), as in AutoencoderKL."""
    batch = 16
    torch.manual_seed(0)
    vae = VAE(CONFIG.vae).to(device, memory_format=torch.channels_last)
    run = Run(out / "vae.pt", vae, lr=1.5e-3, scales={vae: 1}, steps=VAE_STEPS)
    if run.step == run.steps:
        return
    pictures = draw_pictures(min(20_000, batch * run.steps))
    for step in run.bar:
        rng = np.random.default_rng((2, step))
        x = pixels(pictures[rng.integers(len(pictures), size=batch)]).to(device)
        if rng.random() < 0.5:
            x = x.flip(3)
        mean, logvar = vae.moments(x)
        z = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * torch.randn_like(mean)
        y = vae.decode(z * vae.latent_factor)
        kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
        run.optimize(4 * F.mse_loss(y, x) + 0.2 * F.l1_loss(y, x) + 1e-6 * kl)


def draw_pictures(count):
    """-> (N, 64, 64, 3) uint8: a third from the world, the others sprites of random colour, size and turn.

    Like VideoCrafter2's, this VAE has to encode pictures that its UNet never saw, such as a subject's.
    """
    rng = np.random.default_rng(1)
    pictures = []
    for i in range(count):
        scene = random_scene(rng)
        if i % 3:
            look = replace(scene.look, colour=tuple(rng.uniform(0.05, 1, 3)))
            if look.second:
                look = replace(look, second=tuple(rng.uniform(0.05, 1, 3)))
            scene = replace(scene, look=look, direction="", radius=rng.uniform(12, 24),
                            angle=rng.uniform(-0.6, 0.6), start=tuple(rng.uniform(16, SIZE - 16, 2)))
        pictures.append(draw_clip(scene, frames=1, first=rng.integers(FRAMES))[0])
    return np.stack(pictures)


# ------------------------------------------------------------------------------------------------------------
# The UNet and the text tower, which are trained on the latents of clips


def training_scenes(count):
    """-> list of the scenes for the UNet and the text tower. A larger count only adds scenes."""
    rng = np.random.default_rng(3)
    return [random_scene(rng) for _ in range(count)]


@torch.no_grad()
def encode_clips(out, device):
    """Draws CLIPS clips. Saves their latents (B, T, 4, 8, 8) in float16, with the standard deviation."""
    path, batch = out / "latents.safetensors", 32
    if path.exists():
        return
    vae = load_average(VAE(CONFIG.vae), out / "vae.pt")
    vae.to(device, memory_format=torch.channels_last)
    scenes, latents = training_scenes(CLIPS), []
    for first in progress_bar(range(0, len(scenes), batch), desc="latents", unit=f"{batch} clips"):
        clips = np.concatenate([draw_clip(scene) for scene in scenes[first:first + batch]])
        mean, _ = vae.moments(pixels(clips).to(device))
        latents.append(mean.unflatten(0, (-1, FRAMES)).half().cpu())
    latents = torch.cat(latents)
    with atomic_write(path) as temporary:
        save_file({"latents": latents, "std": latents.float().std()}, temporary)


def build_networks():
    """The untrained UNet and text tower as one module, because they are trained and averaged together."""
    return nn.ModuleDict({"unet": UNet(CONFIG.unet), "text_encoder": TextEncoder(CONFIG.text_encoder)})


def train_unet(out, device):
    """Eq. 1 on single frames and clips: at first three in four steps are on frames, later one in four.

    A step on 64 frames is cheaper than one on 16 clips, and shows four times as many looks with their names.
    """
    torch.manual_seed(0)
    data = load_file(out / "latents.safetensors")
    latents = data["latents"].float() * LATENT_STD / data["std"]
    scenes = training_scenes(len(latents))
    schedule, tokenizer = NoiseSchedule(CONFIG.schedule), Tokenizer()
    networks = build_networks().to(device)
    networks.eval()  # no dropout: there is more data than so small a network can memorise
    unet, text_encoder = networks["unet"], networks["text_encoder"]
    # A narrow tower's layers add large terms to the words' embeddings, so these start large too.
    nn.init.normal_(text_encoder.token_embedding.weight, std=0.5)
    nn.init.normal_(text_encoder.positional_embedding, std=0.2)
    # The tower learns slowly, as it would otherwise lose the directions, which single frames do not need.
    run = Run(out / "unet.pt", networks, lr=1e-3, scales={unet: 1, text_encoder: 0.1},
              steps=IMAGE_STEPS + CLIP_STEPS)
    w = loss_weights(CONFIG, schedule).to(device)
    for step in run.bar:
        single = step % 4 > 0 if step < IMAGE_STEPS else step % 4 == 0
        *tensors, captions = draw_batch(scenes, latents, step, single)
        z_0, t, fps, eps = (x.to(device) for x in tensors)
        # Plain matrix products are PyTorch's fastest attention on sequences as short as these.
        with sdpa_kernel(SDPBackend.MATH):
            context = text_encoder(tokenizer(captions).to(device))
            eps_predicted = unet(schedule.add_noise(z_0, t, eps), t, fps, context)
        error = (eps_predicted - eps).pow(2)
        run.optimize((w[t] * error.mean(dim=(1, 2, 3, 4))).mean())                  # Eq. 1, weighted


def draw_batch(scenes, latents, step, single):
    """-> z_0 (B, 4, T, 8, 8), t (B,), fps (B,), eps like z_0, and B captions, all seeded by `step`.

    With `single`, T is 1, and the captions name no direction.
    """
    rng = np.random.default_rng((4, step))
    chosen = rng.integers(len(scenes), size=64 if single else 16)
    z_0 = latents[chosen].transpose(1, 2)
    if single:
        frame = torch.from_numpy(rng.integers(FRAMES, size=len(chosen)))
        z_0 = z_0[torch.arange(len(chosen)), :, frame][:, :, None]
    batch_scenes = [replace(scenes[k], direction="") if single else scenes[k] for k in chosen]
    captions = [caption(scene, rng) for scene in batch_scenes]
    fps = torch.tensor([scene.fps for scene in batch_scenes])
    # Half of the levels are drawn from the noisiest 60%, where look, layout and motion are decided.
    any_level = rng.integers(NOISE_LEVELS, size=len(chosen))
    noisy_level = 4 * NOISE_LEVELS // 10 + 6 * any_level // 10
    t = torch.from_numpy(np.where(rng.random(len(chosen)) < 1 / 2, any_level, noisy_level))
    eps = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(step))
    return z_0, t, fps, eps, captions


# ------------------------------------------------------------------------------------------------------------
# The base folder


def export(out):
    """Writes the averaged weights as the base folder OUT/base."""
    path = out / "base"
    if path.exists():
        print(f"{path} exists already and is kept")
        return
    networks = load_average(build_networks(), out / "unet.pt")
    networks["vae"] = load_average(VAE(CONFIG.vae), out / "vae.pt")
    # Words that are in no caption were never trained, so their random embeddings are set to 0.
    embeddings = networks["text_encoder"].token_embedding.weight.data
    captions = [caption(scene) for scene in training_scenes(2000)]
    untrained = torch.ones(len(embeddings), dtype=torch.bool)
    untrained[Tokenizer()(captions).unique()] = False
    embeddings[untrained] = 0

    networks.bfloat16()
    states = {part: networks[part].state_dict() for part in PARTS}
    factor = LATENT_STD / load_file(out / "latents.safetensors")["std"].item()
    values = ((f"{part}.{name}", states[part][name]) for part in PARTS for name in sorted(states[part]))
    config = replace(CONFIG, fingerprint=fingerprint(values), vae=replace(CONFIG.vae, latent_factor=factor))
    with atomic_write(path) as folder:
        folder.mkdir()
        save_config(config, folder / "config.json")
        for part in PARTS:
            save_file(states[part], folder / f"{part}.safetensors", {"fingerprint": config.fingerprint})
    print(f"wrote {path}, fingerprint {config.fingerprint}")


def load_average(network, path):
    """-> a copy of `network`, in eval mode, with the averaged weights that a run saved at `path`."""
    average = AveragedModel(network)
    average.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["average"])
    return average.module.eval()


# ------------------------------------------------------------------------------------------------------------
# One resumable run


class Run:
    """A training's optimizer, averaged weights and saves. Its `bar` iterates over the steps that are left."""
    EMA, SAVE_EVERY = 0.998, 200
    SAVED = ("network", "average", "optimizer")

    def __init__(self, path, network, lr, scales, steps):
        """path: the file of the saves. scales: part of the network -> the factor of its learning rate."""
        self.path, self.network, self.lr = path, network, lr
        self.step, self.steps = 0, steps
        groups = [{"params": list(part.parameters()), "scale": scale} for part, scale in scales.items()]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.average = AveragedModel(network, avg_fn=self.mix)
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["steps"] != steps:
                raise BadInput(f"{path}: of a run of {state['steps']} steps, not {steps}; name another --out")
            self.step = state["step"]
            for part in self.SAVED:
                getattr(self, part).load_state_dict(state[part])
        self.bar = progress_bar(range(self.step, steps), desc=path.stem, initial=self.step, total=steps)
        self.mean_loss = None

    @classmethod
    def mix(cls, average, new, n):
        """The n-th average. Early ones span only about n / 9 steps, so the random start is forgotten."""
        return average + max(1 - cls.EMA, 9 / (10 + n)) * (new - average)

    def optimize(self, loss):
        """One optimizer step on a scalar loss. The bar shows the moving average of the losses."""
        warm_up = (self.step + 1) / 100
        decay = 0.02 + 2 * (1 - self.step / self.steps)  # below 1 in the last half
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1, warm_up, decay) * group["scale"]
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.average.update_parameters(self.network)
        self.step += 1

        self.mean_loss = 0.98 * (self.mean_loss or loss.item()) + 0.02 * loss.item()
        self.bar.set_postfix(loss=f"{self.mean_loss:.4f}", refresh=False)
        if self.step % self.SAVE_EVERY == 0 or self.step == self.steps:
            state = {part: getattr(self, part).state_dict() for part in self.SAVED}
            with atomic_write(self.path) as temporary:
                torch.save(state | {"step": self.step, "steps": self.steps}, temporary)


if __name__ == "__main__":
    run_script(main)
