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
from memory import inputs, meta_base, training_step
from lora import add_lora
from model import Base
from sample import generate
from support.cli import FlagParser, join_processes, pick_precision, run_script

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
    if args.quick:
        base.config.sampling = replace(base.config.sampling, height=128, width=128, frames=4, steps=2, K=1)
    size = base.config.sampling
    name = torch.cuda.get_device_name() if device.type == "cuda" else device
    print(f"{name}, {torch.get_num_threads()} threads, UNet in {precision}: {size.frames} frames of "
          f"{size.width}x{size.height}, {size.steps} steps, median of {args.repeats}", flush=True)

    seconds = measure(sampling_work(base), args)
    seconds |= measure(training_work(base), args)   # last, because it puts a LoRA into the UNet
    print("\n| work | seconds |\n|---|---|")
    print(*(f"| {label} | {number:.2f} |" for label, number in seconds.items()), sep="\n")
    print("\n| ratio | |\n|---|---|")
    for label, (above, below) in RATIOS.items():
        if above in seconds and below in seconds:
            print(f"| {label} | {seconds[above] / seconds[below]:.2f} |")


def random_base(device, dtype):
    """VideoCrafter2 with random weights, none of them zero, made where they will be used."""
    base, _, _ = meta_base(dtype)
    networks = base.unet, base.vae, base.text_encoder
    for network in networks:
        network.to_empty(device=device)
        for p in network.parameters():  # a size that keeps activations near 1, as training would
            nn.init.normal_(p, std=0.02 if p.dim() < 2 else 1 / math.sqrt(p[0].numel()))
        for module in network.modules():
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                nn.init.ones_(module.weight)
    return Base(base.config, device, *networks)


def sampling_work(base):
    """-> label -> function of no arguments."""
    z, t, context = inputs(base, 2, base.config.sampling.frames)
    fps, unet = torch.full_like(t, base.config.sampling.fps), torch.no_grad()(base.unet.forward)
    compiled = torch.compile(unet)
    subject = random_subject(base, base.config.training.rank, scale=0.01)
    subject.v_star = subject.v_star.to(base.device)
    return {"UNet call with guidance": lambda: unet(z, t, fps, context),
            "UNet call, compiled": lambda: compiled(z, t, fps, context),
            "a video": lambda: generate(base, ["a dog"], [0]),
            "a customised video": lambda: generate(base, ["a V* dog"], [0], [subject]),
            "decoding": lambda: base.decode(z[:1])}


def training_work(base):
    """-> label -> function of no arguments: a step of train.py's loop, on random numbers."""
    layers = add_lora(base.unet, base.config.training.rank)

    def step(frames, checkpointing=False):
        loss, batch = training_step(base, layers, 1, frames, frames)
        optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-5)

        def call():
            base.unet.grad_checkpointing = checkpointing
            sum(loss(*batch)).backward()
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
    p.add_argument("--only", nargs="+", choices=WORK, metavar="WORK",
                   default=[label for label in WORK if label != "UNet call, compiled"],     # takes minutes
                   help=f"only some of: {', '.join(WORK)} (default: all but the compiled call)")
    args = p.parse_args()
    args.repeats = args.repeats or (1 if args.quick else 5)
    return args


if __name__ == "__main__":
    run_script(main)
