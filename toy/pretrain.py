"""Trains the embedded base from scratch: the VAE on pictures of the world, then text and UNet on its clips.

    python toy/pretrain.py                  # all stages, hours on 2 CPU cores; the same command resumes
    python toy/pretrain.py --stage vae      # one stage: vae, latents, unet, export
    torchrun --nproc_per_node 2 toy/pretrain.py      # shares the work, which is faster on CPU cores too

Each stage keeps its state in --out (runs/pretrain). `export` writes the base folder, OUT/base unless --base
names another. The classes are VideoCrafter2's, and so is the task: noise prediction with caption
dropout. CONFIG's numbers are small, and its `latent_std` gives Eq. 1 the weights of v-prediction.

Shapes: N pictures, B clips, T frames, L text tokens; pictures (N, 3, 64, 64), latents z (B, 4, T, 8, 8).
"""
import os
import sys
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from model import (NOISE_LEVELS, VAE, Z_CHANNELS, NoiseSchedule, ScheduleConfig, TextConfig, Tokenizer,
                   UNetConfig, VAEConfig, pixels)
from support.cli import (BadInput, FlagParser, Progress, atomic_write, check_out, join_processes, lock_folder,
                         run_script, wait_for_all)
from support.config import (BaseConfig, SamplingDefaults, TrainingDefaults, check_flags, loss_weights,
                            save_config)
from support.files import PARTS, build_part, fingerprint
from support.video import read_json
from toy.world import FRAMES, SIZE, caption, draw_clip, random_scene

# Standard deviation of the scaled latents. Large latents need more noise to hide which way a clip moves, so
# the direction is decided earlier. The noise rises steeply at the end (`beta_end`), so at the level where
# sampling starts it still hides nearly all of a clip.
LATENT_STD = 20.0
CONFIG = BaseConfig(
    name="toy", latent_std=LATENT_STD,
    schedule=ScheduleConfig(beta_end=0.025),
    text=TextConfig(width=64, heads=4, layers=2),
    vae=VAEConfig(channels=16, channel_mult=(1, 2, 4, 4), num_res_blocks=1, norm_groups=4),
    unet=UNetConfig(channels=48, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2),
                    head_channels=16, context_dim=64, norm_groups=8),
    sampling=SamplingDefaults(frames=FRAMES, height=SIZE, width=SIZE, fps=8, save_fps=8,
                              prompt="a V* {class word} moving up on the snow", cfg=2.5),
    training=TrainingDefaults(rank=32, lr=2e-3, scale_lr=False, frames=FRAMES, steps=500, num_prior=16,
                              images="toy/subjects/berry", class_word="heart"))


def main():
    args = parse_args()
    process = join_processes()
    args.autocast = torch.autocast(process.device.type, torch.bfloat16, enabled=args.precision == "bfloat16")
    with lock_folder(args.out) if process.rank == 0 else nullcontext():
        for stage, run_stage in STAGES.items():
            if args.stage in ("all", stage):
                run_stage(args, process)
                wait_for_all(process)   # the next stage reads what rank 0 wrote


# ------------------------------------------------------------------------------------------------------------
# The VAE


class SampledVAE(VAE):
    """The VAE, whose forward pass in training is one call: encode, draw a latent, decode."""

    def forward(self, x):
        """x (N, 3, H, W) in [-1, 1] -> y like x; the latent's mean and log-variance (N, 4, H/8, W/8)."""
        mean, logvar = (moment.float() for moment in self.moments(x))
        z = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * torch.randn_like(mean)
        return self.decode(z * self.latent_factor).float(), mean, logvar


def train_vae(args, process):
    """Reconstruction, and a weak pull of the latent's distribution towards N(0, 1), as in AutoencoderKL."""
    batch, kl_weight = 16, 1e-6
    torch.manual_seed(process.rank)  # each process draws its own noise; all start from rank 0's weights
    vae = SampledVAE(CONFIG.vae).to(process.device, memory_format=torch.channels_last)
    run = Run("vae", args.out, process, vae, lr=1.5e-3, scales={vae: 1}, steps=args.vae_steps)
    if run.step >= run.steps:
        return
    pictures = draw_pictures(min(20_000, batch * run.steps))
    while run.step < run.steps:
        rng = np.random.default_rng((2, run.step))
        chosen = rng.integers(len(pictures), size=batch)[process.rank::process.world]
        x = pixels(pictures[chosen]).to(process.device)
        if rng.random() < 0.5:
            x = x.flip(3)
        with args.autocast:
            y, mean, logvar = run.model(x.contiguous(memory_format=torch.channels_last))
        mse, l1 = F.mse_loss(y, x), F.l1_loss(y, x)
        kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
        run.optimize(4 * mse + 0.2 * l1 + kl_weight * kl, {"psnr": 10 * torch.log10(4 / mse), "kl": kl})


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
# The clips' latents


def training_scenes(count):
    """-> list of the scenes that text tower and UNet are trained on. A larger count only adds scenes."""
    rng = np.random.default_rng(3)
    return [random_scene(rng) for _ in range(count)]


@torch.no_grad()
def encode_clips(args, process):
    """Draws --clips clips. Saves their latents (B, T, 4, 8, 8) in float16, with the standard deviation."""
    path, batch = args.out / "latents.safetensors", 32
    if path.exists():
        return
    vae = load_average(build_part("vae", CONFIG), args.out / "vae.pt")
    vae.to(process.device, memory_format=torch.channels_last)
    scenes, side = training_scenes(args.clips), SIZE // CONFIG.vae.factor
    shape = (len(scenes), FRAMES, Z_CHANNELS, side, side)
    latents = torch.zeros(shape, dtype=torch.float16, device=process.device)
    batches = range(0, len(scenes), batch)[process.rank::process.world]
    for first in Progress(batches, desc="latents", unit=f"{batch} clips", disable=process.rank > 0):
        clips = np.concatenate([draw_clip(scene) for scene in scenes[first:first + batch]])
        x = pixels(clips).to(process.device)
        with args.autocast:
            mean, _ = vae.moments(x.contiguous(memory_format=torch.channels_last))
        latents[first:first + batch] = mean.unflatten(0, (-1, FRAMES)).half()
    if process.world > 1:
        dist.all_reduce(latents)  # a clip's latents are 0 on all processes but one, so the sum has all
    if process.rank == 0:
        latents = latents.cpu()
        with atomic_write(path) as temporary:
            save_file({"latents": latents, "std": latents.float().std()}, temporary)


# ------------------------------------------------------------------------------------------------------------
# The UNet and the text tower


class NoisePredictor(nn.Module):
    """eps(z_t, t, fps, text): text tower and UNet in one call."""

    def __init__(self):
        super().__init__()
        self.unet, self.text_encoder = build_part("unet", CONFIG), build_part("text_encoder", CONFIG)

    def forward(self, z_t, t, fps, tokens):
        """z_t (B, 4, T, h, w), t (B,), fps (B,), tokens (B, L) -> eps (B, 4, T, h, w)"""
        # Plain matrix products are PyTorch's fastest attention on sequences as short as these.
        with sdpa_kernel(SDPBackend.MATH):
            return self.unet(z_t, t, fps, self.text_encoder(tokens))


def train_unet(args, process):
    """Eq. 1 on single frames and clips: at first three in four steps are on frames, later one in four.

    A step on 64 frames is cheaper than one on 16 clips, and shows four times as many looks with their names.
    """
    torch.manual_seed(0)
    data = load_file(args.out / "latents.safetensors")
    latents = data["latents"].float() * LATENT_STD / data["std"]
    scenes = training_scenes(len(latents))
    schedule, tokenizer = NoiseSchedule(CONFIG.schedule), Tokenizer()
    network = NoisePredictor().to(process.device)
    network.eval()  # no dropout: there is more data than so small a network can memorise
    # The embeddings of words have to outweigh the updates that a narrow tower's layers add to them.
    nn.init.normal_(network.text_encoder.token_embedding.weight, std=0.5)
    nn.init.normal_(network.text_encoder.positional_embedding, std=0.2)
    # The tower learns slowly, as it would otherwise lose the directions, which single frames do not need.
    run = Run("unet", args.out, process, network, lr=1e-3,
              scales={network.unet: 1, network.text_encoder: 0.1}, steps=args.image_steps + args.clip_steps)
    w = loss_weights(CONFIG, schedule).to(process.device)
    while run.step < run.steps:
        single = run.step % 4 > 0 if run.step < args.image_steps else run.step % 4 == 0
        *tensors, captions = draw_batch(scenes, latents, run.step, single)
        z_0, t, fps, eps = (x[process.rank::process.world].to(process.device) for x in tensors)
        tokens = tokenizer(captions[process.rank::process.world]).to(process.device)
        with args.autocast:
            eps_predicted = run.model(schedule.add_noise(z_0, t, eps), t, fps, tokens)
        error = (eps_predicted.float() - eps).pow(2)
        loss = (w[t] * error.mean(dim=(1, 2, 3, 4))).mean()                         # Eq. 1, weighted
        run.optimize(loss, {"images" if single else "clips": loss})


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


def export(args, process):
    """Writes the averaged weights as a base folder, which is complete once its config.json appears."""
    if process.rank > 0:
        return
    predictor = load_average(NoisePredictor(), args.out / "unet.pt")
    networks = {"unet": predictor.unet, "text_encoder": predictor.text_encoder,
                "vae": load_average(build_part("vae", CONFIG), args.out / "vae.pt")}
    # Words that are in no caption were never trained. Set their random embeddings to 0, so they mean nothing.
    captions = [caption(scene) for scene in training_scenes(2000)]
    untrained = torch.ones(len(predictor.text_encoder.token_embedding.weight), dtype=torch.bool)
    untrained[Tokenizer()(captions).unique()] = False
    predictor.text_encoder.token_embedding.weight.data[untrained] = 0

    states = {part: {name: x.bfloat16().contiguous() for name, x in networks[part].state_dict().items()}
              for part in PARTS}
    factor = LATENT_STD / load_file(args.out / "latents.safetensors")["std"].item()
    values = ((f"{part}.{name}", states[part][name]) for part in PARTS for name in sorted(states[part]))
    config = replace(CONFIG, fingerprint=fingerprint(values), vae=replace(CONFIG.vae, latent_factor=factor))
    with lock_folder(args.base), ExitStack() as files:
        check_replaced(args.base)
        save_config(config, files.enter_context(atomic_write(args.base / "config.json")))   # appears last
        for part in PARTS:
            temporary = files.enter_context(atomic_write(args.base / f"{part}.safetensors"))
            save_file(states[part], temporary, {"fingerprint": config.fingerprint})
    print(f"wrote {args.base}, fingerprint {config.fingerprint}")


def check_replaced(folder):
    """Raises BadInput if an export to `folder` would replace files of a base that has another name."""
    files = [folder / "config.json", *(folder / f"{part}.safetensors" for part in PARTS)]
    present = [file.name for file in files if os.path.lexists(file)]
    if present and (read_json(files[0]) or {}).get("name") != CONFIG.name:
        raise BadInput(f"--base {folder}: {present[0]} in it is another model's; name another folder")


def load_average(network, path):
    """-> a copy of `network`, in eval mode, with the moving average of the weights that a run saved."""
    average = AveragedModel(network)
    average.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["average"])
    return average.module.eval()


# ------------------------------------------------------------------------------------------------------------
# One resumable run


class Run:
    """Optimizer with warm-up and a decay at the end, moving average of the weights, saves, progress.

    The training calls `model`, which is the network, under torchrun wrapped in DistributedDataParallel.
    """
    EMA, SAVE_EVERY = 0.998, 200
    SAVED = ("network", "average", "optimizer")

    def __init__(self, name, out, process, network, lr, scales, steps):
        """scales: part of the network -> the factor of its learning rate."""
        self.path, self.process, self.network = out / f"{name}.pt", process, network
        self.lr, self.steps, self.step = lr, steps, 0
        self.model = DistributedDataParallel(network) if process.world > 1 else network
        groups = [{"params": list(part.parameters()), "scale": scale} for part, scale in scales.items()]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.average = AveragedModel(network, avg_fn=self.mix)
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            if state["steps"] != steps:
                raise BadInput(f"{self.path}: is of a run of {state['steps']} steps, and this is one of "
                               f"{steps}; name another --out")
            self.step = state["step"]
            for part in self.SAVED:
                getattr(self, part).load_state_dict(state[part])
        self.bar = Progress(desc=name, unit="step", initial=self.step, total=steps, disable=process.rank > 0)
        self.means = {}

    @classmethod
    def mix(cls, average, new, n):
        """The n-th average. Early ones span only about n / 9 steps, so the random start is forgotten."""
        return average + max(1 - cls.EMA, 9 / (10 + n)) * (new - average)

    def optimize(self, loss, metrics):
        """One optimizer step on a scalar loss. The bar shows moving averages of rank 0's metrics."""
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

        for name, value in metrics.items():
            self.means[name] = 0.98 * self.means.get(name, value.item()) + 0.02 * value.item()
        self.bar.set_postfix({name: f"{mean:.4f}" for name, mean in self.means.items()}, refresh=False)
        self.bar.update()
        last = self.step == self.steps
        if self.process.rank == 0 and (self.step % self.SAVE_EVERY == 0 or last):
            state = {part: getattr(self, part).state_dict() for part in self.SAVED}
            with atomic_write(self.path) as temporary:
                torch.save(state | {"step": self.step, "steps": self.steps}, temporary)
        if last:
            self.bar.close()


# ------------------------------------------------------------------------------------------------------------
# Flags

STAGES = {"vae": train_vae, "latents": encode_clips, "unet": train_unet, "export": export}
# Name -> default, and the help text.
SIZES = {"vae_steps": (9000, "steps of the VAE on 16 pictures"),
         "clips": (16000, "clips that are drawn and encoded once"),
         "image_steps": (3000, "first steps of the UNet, three in four on 64 single frames"),
         "clip_steps": (14000, "further steps of the UNet, three in four on 16 clips")}


def parse_args():
    p = FlagParser(description="Pre-train the embedded base.")
    p.add_argument("--stage", choices=["all", *STAGES], default="all",
                   help="stage to run, which needs the files of the earlier ones (default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("runs/pretrain"),
                   help="folder for every stage's state (default: %(default)s)")
    p.add_argument("--base", type=Path, help="folder to write the base into (default: OUT/base)")
    p.add_argument("--precision", choices=["float32", "bfloat16"], default="float32",
                   help="of the matrix products; bfloat16 takes half the time on CPUs that support it "
                        "(default: %(default)s)")
    for name, (default, text) in SIZES.items():
        p.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: %(default)s)")
    args = p.parse_args()
    check_flags(args, **dict.fromkeys(SIZES, (1, 10**7)))
    args.base = args.base or args.out / "base"
    for folder in (args.out, args.base):
        check_out(folder)
    if args.stage in ("all", "export"):
        check_replaced(args.base)
    return args


if __name__ == "__main__":
    run_script(main)
