"""How long the pieces of sampling and training take, and the ratios between them, in one run.

    python tests/tools/benchmark.py             # VideoCrafter2's size, random weights; for GPUs
    python tests/tools/benchmark.py --quick     # 4 frames of 128x128, for CPUs; 12 GB of memory
    python tests/tools/benchmark.py --only "training step" "training step, checkpointed"

Cases take turns, so that whatever slows the machine slows all of them. The first turn is a warm-up that does
not count. A training step has one clip of the subject and one of the prior.
"""
import math
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from makers import random_subject  # puts the repository's root on the path, too
from lora import add_lora
from model import TEXT_LENGTH, VOCAB_SIZE, Z_CHANNELS, Base
from sample import generate
from support.cli import FlagParser, join_processes, pick_precision, run_script
from support.config import BaseConfig
from support.files import PARTS, build_part
from train import SubjectLoss

WORK = ("UNet call with guidance", "UNet call, compiled", "a video", "a customised video", "decoding",
        "training step", "training step, checkpointed", "training step on 16 frames")
RATIOS = {"plain sampling / customised (1.00: LoRA costs nothing)": ("a video", "a customised video"),
          "training on 16 frames / on 4": ("training step on 16 frames", "training step"),
          "training with --grad_checkpointing / without": ("training step, checkpointed", "training step"),
          "UNet call / compiled": ("UNet call with guidance", "UNet call, compiled")}


def main():
    args = parse_args()
    device = join_processes().device
    precision = pick_precision("auto", device)
    base = random_base(device, getattr(torch, precision))
    size = base.config.sampling
    if args.quick:
        size = replace(size, height=128, width=128, frames=4, steps=2, K=1)
    name = torch.cuda.get_device_name() if device.type == "cuda" else device
    print(f"{name}, {torch.get_num_threads()} threads, UNet in {precision}: {size.frames} frames of "
          f"{size.width}x{size.height}, {size.steps} steps, median of {args.repeats}", flush=True)

    seconds = measure(sampling_work(base, size), args)
    seconds |= measure(training_work(base, size), args)     # last, because it puts a LoRA into the UNet
    print("\n| work | seconds |\n|---|---|")
    print(*(f"| {label} | {number:.2f} |" for label, number in seconds.items()), sep="\n")
    print("\n| ratio | |\n|---|---|")
    for label, (above, below) in RATIOS.items():
        if above in seconds and below in seconds:
            print(f"| {label} | {seconds[above] / seconds[below]:.2f} |")


def random_base(device, dtype):
    """VideoCrafter2 with random weights, none of them zero, made where they will be used."""
    config, networks = BaseConfig(), {}
    for part in PARTS:
        with torch.device("meta"):
            network = build_part(part, config)
        network.to(dtype if part == "unet" else torch.float32).to_empty(device=device)
        for p in network.parameters():  # a size that keeps activations near 1, as training would
            nn.init.normal_(p, std=0.02 if p.dim() < 2 else 1 / math.sqrt(p[0].numel()))
        for module in network.modules():
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                nn.init.ones_(module.weight)
        networks[part] = network.eval().requires_grad_(False)
    return Base(config, device, **networks)


def random_inputs(base, size, clips, frames):
    """-> z (B, 4, T, h, w), t (B,), context (B, L, D)."""
    factor = base.config.vae.factor
    z = torch.randn(clips, Z_CHANNELS, frames, size.height // factor, size.width // factor)
    context = torch.randn(clips, TEXT_LENGTH, base.config.text.width)
    return [x.to(base.device) for x in (z, torch.full((clips,), 500), context)]


def sampling_work(base, size):
    """-> label -> function of no arguments."""
    z, t, context = random_inputs(base, size, 2, size.frames)
    fps, unet = torch.full_like(t, size.fps), torch.no_grad()(base.unet.forward)
    compiled = torch.compile(unet)
    subject = random_subject(base, base.config.training.rank, scale=0.01)
    subject.v_star = subject.v_star.to(base.device)
    return {"UNet call with guidance": lambda: unet(z, t, fps, context),
            "UNet call, compiled": lambda: compiled(z, t, fps, context),
            "a video": lambda: generate(base, ["a dog"], [0], [], size),
            "a customised video": lambda: generate(base, ["a V* dog"], [0], [subject], size),
            "decoding": lambda: base.decode(z[:1])}


def training_work(base, size):
    """-> label -> function of no arguments: a step of train.py's loop, on random numbers."""
    layers = add_lora(base.unet, base.config.training.rank)
    image = torch.rand(1, 3, size.height, size.width, device=base.device) * 2 - 1
    tokens = torch.full((1, TEXT_LENGTH), VOCAB_SIZE, device=base.device)   # V*

    def step(frames, checkpointing=False):
        z_0, t, context = random_inputs(base, size, 1, frames)
        loss = SubjectLoss(base, torch.randn_like(context[0, :1]), layers, frames, size.fps)
        optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-5)

        def call():
            base.unet.grad_checkpointing = checkpointing
            eps = torch.randn_like(z_0)
            sum(loss(image, tokens, t, eps, z_0, context, t, eps)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return call

    return {"training step": step(4), "training step, checkpointed": step(4, True),
            "training step on 16 frames": step(16)}


def measure(work, args):
    """Label -> function becomes label -> median of the seconds of a call, of those in --only."""
    seconds = {label: [] for label in work if label in args.only}
    for _ in tqdm(range(args.repeats + 1), desc="turns"):
        for label, times in seconds.items():
            start = time.perf_counter()
            work[label]()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - start)
    return {label: statistics.median(times[1:]) for label, times in seconds.items()}


def parse_args():
    p = FlagParser(description="Time the pieces of sampling and training at VideoCrafter2's size.")
    p.add_argument("--quick", action="store_true", help="4 frames of 128x128, 2 sampling steps, for CPUs")
    p.add_argument("--repeats", type=int, help="turns that count (default: 5, with --quick 1)")
    p.add_argument("--only", nargs="+", choices=WORK, metavar="WORK", help=f"only some of: {', '.join(WORK)}")
    p.add_argument("--compile", action="store_true", help="also the UNet call compiled; takes minutes")
    args = p.parse_args()
    args.repeats = args.repeats or (1 if args.quick else 5)
    args.only = args.only or [label for label in WORK if args.compile or label != "UNet call, compiled"]
    return args


if __name__ == "__main__":
    run_script(main)
