"""Trains the embedded base from nothing: the VAE on pictures of the world, then text and UNet on its clips.

    python toy/pretrain.py                  # all stages, hours on 2 CPU cores; the same command resumes
    python toy/pretrain.py --stage vae      # one stage: vae, latents, unet, export
    torchrun --nproc_per_node 2 toy/pretrain.py      # work shared by processes: faster on CPU cores too

Each stage keeps its state in --out (runs/pretrain). `export` writes the base folder, toy/base. The classes
are VideoCrafter2's, and so is the task: noise prediction with captions that drop out. CONFIG's numbers are
small, and its `latent_std` gives Eq. 1 the weights of v-prediction.

Shapes: N pictures, B clips, T frames, L text tokens; pictures (N, 3, 64, 64), latents z (B, 4, T, 8, 8).
"""
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from cli import (BadInput, FlagParser, as_on_rank_0, check_out, complete_or_absent, join_processes,
                 leave_processes, run_script, this_process)
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from config import BaseConfig, SamplingDefaults, TrainingDefaults, check_flags
from files import base_files, build_part, fingerprint, save_base_config
from model import (NOISE_LEVELS, VAE, Z_CHANNELS, NoiseSchedule, ScheduleConfig, TextConfig, Tokenizer,
                   UNetConfig, VAEConfig, pixels)
from toy.world import FRAMES, SIZE, caption, draw_clip, random_scene

# Standard deviation of the scaled latents. Large latents need more noise to hide which way a clip moves, so
# the direction is decided earlier. The noise rises steeply at the end (`beta_end`), so at the level where
# sampling starts it still hides nearly all of a clip.
LATENT_STD = 20
CONFIG = BaseConfig(
    name="toy",
    schedule=ScheduleConfig(beta_end=0.025, latent_std=LATENT_STD),
    text=TextConfig(width=64, heads=4, layers=2),
    vae=VAEConfig(channels=16, channel_mult=(1, 2, 4, 4), num_res_blocks=1, norm_groups=4),
    unet=UNetConfig(channels=48, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2),
                    head_channels=16, context_dim=64, norm_groups=8),
    sampling=SamplingDefaults(frames=FRAMES, height=SIZE, width=SIZE, fps=8, save_fps=8,
                              prompt="a V* {class word} moving left on the sea", cfg=2.5),
    training=TrainingDefaults(rank=32, lr=2e-3, steps=500, batch_size=2, num_prior=16,
                              images="toy/subjects/berry", class_word="heart"))


def main():
    args = parse_args()
    process = this_process()
    join_processes(process)
    fast = as_on_rank_0(fast_in_bfloat16(process.device), process)  # all have to train in the same precision
    args.autocast = torch.autocast(process.device.type, torch.bfloat16, enabled=fast)
    if process.rank == 0:
        print(f"products in {'bfloat16' if fast else 'float32'}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    for stage, run_stage in STAGES.items():
        if args.stage in ("all", stage):
            run_stage(args, process)
            if process.world > 1:
                dist.barrier()  # the next stage reads what rank 0 wrote
    leave_processes(process)


def fast_in_bfloat16(device):
    """Whether a matrix product in bfloat16 takes less than two thirds of its time in float32.

    Many processors do not know bfloat16 and take longer. So the products are timed.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(512, 512, device=device, dtype=dtype)
        for _ in range(3):  # the last one counts
            start = time.perf_counter()
            (a @ a).sum().item()
            seconds[dtype] = time.perf_counter() - start
    return seconds[torch.bfloat16] < seconds[torch.float32] / 1.5


# ------------------------------------------------------------------------------------------------------------
# The VAE


class SampledVAE(VAE):
    """The VAE with what its training does in one call: encode, draw a latent, decode."""

    def forward(self, x):
        """x (N, 3, H, W) in [-1, 1] -> y like x; the latent's mean and log-variance (N, 4, H/8, W/8)."""
        mean, logvar = (moment.float() for moment in self.moments(x))
        z = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * torch.randn_like(mean)
        return self.decode(z * self.latent_factor).float(), mean, logvar


def train_vae(args, process):
    """Reconstruction, and a weak pull of the latent's distribution towards N(0, 1), as in AutoencoderKL."""
    batch, pool, kl_weight = 16, 20_000, 1e-6
    torch.manual_seed(process.rank)  # noise of its own for each process; all start from rank 0's weights
    vae = SampledVAE(CONFIG.vae).to(process.device, memory_format=torch.channels_last)
    run = Run("vae", args.out, process, vae, lr=1.5e-3, steps=args.vae_steps)
    if run.step >= run.steps:
        return
    pictures = draw_pictures(pool, seed=1)
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


def draw_pictures(count, seed):
    """-> (N, 64, 64, 3) uint8: a third from the world, the others sprites of any colour, size and turn.

    Like VideoCrafter2's, this VAE has to code pictures that its UNet never saw, such as a subject's.
    """
    rng = np.random.default_rng(seed)
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
    """-> the scenes that text tower and UNet are trained on, a list. A larger count only adds scenes."""
    rng = np.random.default_rng(3)
    return [random_scene(rng) for _ in range(count)]


@torch.no_grad()
def encode_clips(args, process):
    """Draws --clips clips. Keeps their latents (B, T, 4, 8, 8), float16, and their standard deviation."""
    path, batch, start = args.out / "latents.safetensors", 32, time.time()
    if path.exists():
        return
    vae = load_average(build_part("vae", CONFIG), "vae", args)
    vae.to(process.device, memory_format=torch.channels_last)
    scenes, side = training_scenes(args.clips), SIZE // CONFIG.vae.factor
    shape = (len(scenes), FRAMES, Z_CHANNELS, side, side)
    latents = torch.zeros(shape, dtype=torch.float16, device=process.device)
    batches = range(0, len(scenes), batch)
    for n, first in enumerate(batches[process.rank::process.world]):
        clips = np.concatenate([draw_clip(scene) for scene in scenes[first:first + batch]])
        x = pixels(clips).to(process.device)
        with args.autocast:
            mean, _ = vae.moments(x.contiguous(memory_format=torch.channels_last))
        latents[first:first + batch] = mean.unflatten(0, (-1, FRAMES)).half()
        if n % 50 == 0 and process.rank == 0:
            print(f"latents {first}/{len(scenes)}  {time.time() - start:.0f} s", flush=True)
    if process.world > 1:
        dist.all_reduce(latents)  # in all processes but one a clip's latents are 0, so the sum has all clips
    if process.rank == 0:
        latents = latents.cpu()
        with complete_or_absent(path) as temporary:
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
        # Of PyTorch's ways to attend, the plain product is the fastest where sequences are as short as here.
        with sdpa_kernel(SDPBackend.MATH):
            return self.unet(z_t, t, fps, self.text_encoder(tokens))


def train_unet(args, process):
    """Eq. 1 on single frames and clips: at first three of four steps are on frames, later one.

    A step on 64 frames is cheaper than one on 16 clips, and shows four times as many looks with their names.
    """
    torch.manual_seed(0)
    data = load_file(made_by("latents", args.out / "latents.safetensors"))
    latents = data["latents"].float() * LATENT_STD / data["std"]
    scenes = training_scenes(len(latents))
    schedule, tokenizer = NoiseSchedule(CONFIG.schedule), Tokenizer()
    network = NoisePredictor().to(process.device)
    network.eval()  # no dropout: there is more data than so small a network can learn by heart
    # Words have to outweigh what a narrow tower's own layers add to them.
    nn.init.normal_(network.text_encoder.token_embedding.weight, std=0.5)
    nn.init.normal_(network.text_encoder.positional_embedding, std=0.2)
    # A fast tower would soon say only what single frames need. Then the UNet would never hear the directions.
    run = Run("unet", args.out, process, network, lr=1e-3, steps=args.image_steps + args.clip_steps,
              slow=network.text_encoder)
    weight = schedule.loss_weight.to(process.device)
    while run.step < run.steps:
        single = run.step % 4 > 0 if run.step < args.image_steps else run.step % 4 == 0
        *tensors, captions = draw_batch(scenes, latents, run.step, single)
        z_0, t, fps, eps = (x[process.rank::process.world].to(process.device) for x in tensors)
        tokens = tokenizer(captions[process.rank::process.world]).to(process.device)
        with args.autocast:
            eps_predicted = run.model(schedule.add_noise(z_0, t, eps), t, fps, tokens)
        error = (eps_predicted.float() - eps).pow(2)
        loss = (weight[t] * error.mean(dim=(1, 2, 3, 4))).mean()                    # Eq. 1, weighted
        run.optimize(loss, {"images" if single else "clips": loss})


def draw_batch(scenes, latents, step, single):
    """-> z_0 (B, 4, T, 8, 8), t (B,), fps (B,), eps like z_0, and B captions. All follow from `step`.

    With `single`, T is 1, and the captions name no direction.
    """
    rng = np.random.default_rng((4, step))
    chosen = rng.integers(len(scenes), size=64 if single else 16)
    z_0 = latents[chosen].transpose(1, 2)
    if single:
        frame = torch.from_numpy(rng.integers(FRAMES, size=len(chosen)))
        z_0 = z_0[torch.arange(len(chosen)), :, frame][:, :, None]
    described = [replace(scenes[k], direction="") if single else scenes[k] for k in chosen]
    captions = [caption(scene, rng) for scene in described]
    fps = torch.tensor([scene.fps for scene in described])
    # Half of the levels are drawn from the noisiest 60% alone: look, layout and motion are decided there.
    any_level = rng.integers(NOISE_LEVELS, size=len(chosen))
    noisy_level = 4 * NOISE_LEVELS // 10 + 6 * any_level // 10
    t = torch.from_numpy(np.where(rng.random(len(chosen)) < 1 / 2, any_level, noisy_level))
    eps = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(step))
    return z_0, t, fps, eps, captions


# ------------------------------------------------------------------------------------------------------------
# The base folder


def export(args, process):
    """The averaged weights become a base folder. config.json comes last, with the checksums of the others."""
    if process.rank > 0:
        return
    predictor = load_average(NoisePredictor(), "unet", args)
    networks = {"vae": load_average(build_part("vae", CONFIG), "vae", args), "unet": predictor.unet,
                "text_encoder": predictor.text_encoder}
    # Words that no caption has were never trained. Their random rows become 0, so these words say nothing.
    trained = Tokenizer()([caption(scene) for scene in training_scenes(2000)]).unique()
    table = predictor.text_encoder.token_embedding.weight.data
    keep = torch.zeros(len(table), 1)
    keep[trained] = 1
    table.mul_(keep)

    states, parameters = {}, 0
    for part, network in networks.items():
        parameters += sum(p.numel() for p in network.parameters())
        states[part] = {name: x.bfloat16().contiguous() for name, x in network.state_dict().items()}
        with complete_or_absent(args.base / f"{part}.safetensors") as temporary:
            save_file(states[part], temporary)
    factor = LATENT_STD / load_file(made_by("latents", args.out / "latents.safetensors"))["std"].item()
    config = replace(CONFIG, fingerprint=fingerprint(states), vae=replace(CONFIG.vae, latent_factor=factor))
    config_path, *weights = base_files(args.base)
    with complete_or_absent(config_path) as temporary:
        save_base_config(config, temporary, weights)
    print(f"wrote {args.base}: {parameters / 1e6:.2f} M parameters, fingerprint {config.fingerprint}")


def made_by(stage, path):
    """`path`, which an earlier stage makes. Raises BadInput."""
    if not path.exists():
        raise BadInput(f"{path}: no such file; --stage {stage} makes it")
    return path


def load_average(network, stage, args):
    """Puts the moving average of a stage's weights into `network`, in eval mode."""
    path = made_by(stage, args.out / f"{stage}.pt")
    average = torch.load(path, map_location="cpu", weights_only=True)["average"]
    del average["n_averaged"]
    network.load_state_dict({name.removeprefix("module."): x for name, x in average.items()})
    return network.eval()


# ------------------------------------------------------------------------------------------------------------
# One resumable run


class Run:
    """Optimizer with warm-up and a decay at the end, moving average of the weights, saves, log lines.

    `model` is what the training calls: the network, under torchrun in DistributedDataParallel.
    """
    EMA, SAVE_EVERY, LOG_EVERY = 0.998, 200, 50

    def __init__(self, name, out, process, network, lr, steps, slow=None):
        """slow: a part of the network that learns at a tenth of the rate."""
        self.path, self.process, self.network = out / f"{name}.pt", process, network
        self.lr, self.steps, self.step = lr, steps, 0
        self.model = DistributedDataParallel(network) if process.world > 1 else network
        slow_parameters = set(slow.parameters()) if slow else set()
        groups = [{"params": [p for p in network.parameters() if p not in slow_parameters], "scale": 1.0},
                  {"params": [p for p in network.parameters() if p in slow_parameters], "scale": 0.1}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.average = AveragedModel(network, avg_fn=self.mix)
        self.log, self.start = {}, time.time()
        if self.path.exists():
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            self.step = state["step"]
            self.network.load_state_dict(state["network"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            if process.rank == 0:
                print(f"{name}: resumed at step {self.step} of {steps}", flush=True)

    @classmethod
    def mix(cls, average, new, n):
        """The n-th average. The first ones span about n / 9 steps, so the random start is forgotten."""
        return average + max(1 - cls.EMA, 9 / (10 + n)) * (new - average)

    def optimize(self, loss, metrics):
        """One optimizer step on a scalar loss. Loss and metrics are averaged into the next log line."""
        warm_up = (self.step + 1) / 100
        decay = 0.02 + 2 * (1 - self.step / self.steps)  # below 1 in the last half
        lr = self.lr * min(1, warm_up, decay)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.average.update_parameters(self.network)
        self.step += 1

        for name, value in {"loss": loss, **metrics}.items():
            self.log.setdefault(name, []).append(float(value.detach()))
        last = self.step == self.steps
        if self.step % self.LOG_EVERY == 0 or last:
            self.print_log(lr)
        if self.process.rank == 0 and (self.step % self.SAVE_EVERY == 0 or last):
            state = {"step": self.step, "network": self.network.state_dict(),
                     "average": self.average.state_dict(), "optimizer": self.optimizer.state_dict()}
            with complete_or_absent(self.path) as temporary:
                torch.save(state, temporary)

    def print_log(self, lr):
        """One line: means over the steps since the last line, and over processes."""
        means = torch.tensor([np.mean(values) for values in self.log.values()], device=self.process.device)
        if self.process.world > 1:
            dist.all_reduce(means)
        if self.process.rank == 0:
            numbers = "  ".join(f"{name} {mean:.4f}" for name, mean in
                                zip(self.log, (means / self.process.world).tolist()))
            print(f"{self.path.stem} step {self.step}/{self.steps}  {numbers}  lr {lr:.1e}  "
                  f"{time.time() - self.start:.0f} s", flush=True)
        self.log = {}


# ------------------------------------------------------------------------------------------------------------
# Flags

STAGES = {"vae": train_vae, "latents": encode_clips, "unet": train_unet, "export": export}


def parse_args():
    p = FlagParser(description="Pre-train the embedded base.")
    p.add_argument("--stage", choices=["all", *STAGES], default="all",
                   help="what to do (default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("runs/pretrain"),
                   help="folder for every stage's state (default: %(default)s)")
    p.add_argument("--base", type=Path, default=Path("toy/base"),
                   help="folder that the base is written to (default: %(default)s)")
    p.add_argument("--vae_steps", type=int, default=9000, help="steps of 16 pictures (default: %(default)s)")
    p.add_argument("--image_steps", type=int, default=3000,
                   help="first steps of the UNet, three of four on 64 single frames (default: %(default)s)")
    p.add_argument("--clip_steps", type=int, default=14000,
                   help="further steps of the UNet, three of four on 16 clips (default: %(default)s)")
    p.add_argument("--clips", type=int, default=16000,
                   help="clips that are drawn and encoded once (default: %(default)s)")
    args = p.parse_args()
    check_flags(args, {"vae_steps": (1, 10**7), "image_steps": (0, 10**7), "clip_steps": (0, 10**7),
                       "clips": (1, 10**7)})
    check_out(args.out)
    return args


if __name__ == "__main__":
    run_script(main)
