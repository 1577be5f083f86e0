"""How fast, how near to what the processor can do, and what each way of saving work saves.

    python tests/benchmark.py                     # VideoCrafter2's size, random weights; for GPUs
    python tests/benchmark.py --quick             # fewer, smaller frames: 5 minutes on 2 CPU cores
    python tests/benchmark.py --base toy/base     # a base's own weights and size
    python tests/benchmark.py --only "UNet call with guidance" --repeats 1      # some of the work
    python tests/benchmark.py --quick --scaling   # cost against frames, size, clips, rank, processes
    python tests/benchmark.py --quick --profile   # where the time goes, by kind of work

Prints two tables, and writes them to --json. The first has, for each piece of work: its median time; its
arithmetic, as torch counts it (matrix products, convolutions, attention); its rate; and that rate as a share
of the rate of a large matrix product in the same run. The second says how much faster each thing is done than
in the plain way. The plain way is written out here and nowhere else. All cases take turns, so that what slows
the machine slows every case. The first turn warms up and does not count.

Trials, on CPUs; what pays a tenth would have been kept (expected -> found):
    channels_last weights and activations             convolutions need no reordering, 10%
                                                      -> 3% of a UNet call
    temporal convolutions as 2D ones over (T, H*W)    nothing
                                                      -> 1.2 to 1.3 times as fast, 3% of a UNet call
    the same as 1D ones over (B*H*W, C, T)            slower, by the copies
                                                      -> 0.8 to 1.3 times as fast
    the same as one linear layer on shifted copies    slower, by the copies
                                                      -> 0.9 to 1.1 times as fast
    torch.compile (--compile)                         norms and activations fused, 10 to 20%
                                                      -> the embedded base's call 1.25 times as fast after
                                                      half a minute, its videos equal to 1 of 255; off by
                                                      default
Fused norms and CUDA graphs need a GPU, and wait for one.
"""
import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from arithmetic import count_flops
from makers import ROOT, random_subject, torchrun
from cli import BadInput, complete_or_absent, peak_memory, pick_precision, run_script
from config import BaseConfig, check_flags
from data import still_video
from files import PARTS, Base, build_part, load_base
from lora import MergedLoRA, add_lora
from model import (TEXT_LENGTH, VOCAB_SIZE, Z_CHANNELS, ResBlock, SpatialTransformer, TemporalConv,
                   TemporalTransformer)
from sample import ddim, two_step_schedule
from train import SubjectLoss

QUICK = (128, 128)  # height and width: VideoCrafter2's UNet takes multiples of 64
SHOWN = ("matrix product", "UNet call with guidance", "a video, customised", "decoding", "training step",
         "training step, checkpointed")
# What is compared: the plain way and ours.
RATIOS = {
    "plain sampling / customised sampling (1.00: LoRA costs nothing)": (
        "a video, plain", "a video, customised"),
    "guidance in one call, text once per clip": (
        "guidance in two calls, text repeated per frame", "UNet call with guidance"),
    "one encoded frame for a still video": ("encoding every frame", "encoding one frame"),
    "scaled_dot_product_attention": ("UNet call, explicit softmax", "UNet call with guidance"),
    "prior latents and texts encoded once": ("training step, encoding its prior", "training step"),
    "--compile": ("UNet call with guidance", "UNet call, compiled"),
    "only the gradients needed": ("training step, all gradients", "training step"),
    "without checkpointing (speed for memory)": ("training step, checkpointed", "training step")}


def main():
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = pick_precision(args.precision, device)
    dtype = getattr(torch, precision)
    base = load_base(args.base, device, dtype) if args.base else random_base(device, dtype)
    settings, repeats = base.config.sampling, args.repeats or (2 if args.quick else 7)
    if args.quick:
        settings = replace(settings, steps=2, K=1)
    if args.quick and not args.base:
        settings = replace(settings, frames=4, height=QUICK[0], width=QUICK[1])
    if args.steps:
        settings = replace(settings, steps=args.steps)
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, UNet in {precision}: {settings.frames} frames of "
          f"{settings.width}x{settings.height}, {settings.steps} steps, median of {repeats}", flush=True)
    if args.profile:
        return print_profile(base, settings)
    if args.scaling:
        return print_scaling(base, settings, repeats)

    work = matrix_product(device, dtype) | sampling_work(base, settings)
    work |= training_work(base, settings, base.config.training.rank)
    if args.compile:
        compiled, inputs = torch.compile(base.unet.forward), random_inputs(base, settings, 2)
        work["UNet call, compiled"] = torch.no_grad()(lambda: compiled(*inputs))
    if unknown := set(args.only) - set(work):
        raise BadInput(f"--only {unknown.pop()!r}: should be of {', '.join(map(repr, work))}")
    if args.only:
        work = {label: call for label, call in work.items() if label in (*args.only, "matrix product")}
    rows = measure(work, repeats)
    print_work(rows, rows if args.only else SHOWN)
    ratios = print_ratios(rows)
    if args.json:
        found = {"device": name, "torch": torch.__version__, "precision": precision, "work": rows,
                 "ratios": ratios}
        with complete_or_absent(args.json) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")


def print_work(rows, shown):
    """Label -> a row of `measure`: prints those shown, and adds to each its share of the matrix rate."""
    peak = rows["matrix product"]["TFLOP/s"]
    print("\n| work | seconds | TFLOP | TFLOP/s | of the matrix rate | peak GB |\n|---|---|---|---|---|---|")
    for label in shown:
        row = rows[label]
        row["of the matrix rate"] = row["TFLOP/s"] / peak
        print(f"| {label} | {row['seconds']:.3f} | {row['TFLOP']:.3f} | {row['TFLOP/s']:.2f} | "
              f"{row['of the matrix rate']:.0%} | {row['peak GB']:.1f} |")


def print_ratios(rows):
    """-> label -> the plain way's time over ours, of the pairs of which both were timed."""
    ratios = {}
    for label, (plain, ours) in RATIOS.items():
        if plain in rows and ours in rows:
            ratios[label] = rows[plain]["seconds"] / rows[ours]["seconds"]
    if ratios:
        print("\n| ratio | plain / ours |\n|---|---|")
    for label, ratio in ratios.items():
        print(f"| {label} | {ratio:.2f} |")
    return ratios


# ------------------------------------------------------------------------------------------------------------
# The work. Each function returns label -> function of no arguments.


def random_base(device, dtype):
    """VideoCrafter2 with random weights, none of them zero, made where they will be used."""
    config = BaseConfig()
    networks = {}
    for part in PARTS:
        with torch.device("meta"):
            network = build_part(part, config)
        network.to_empty(device=device).to(dtype if part == "unet" else torch.float32)
        for p in network.parameters():  # of a size that keeps what goes through, as training would
            nn.init.normal_(p, std=0.02 if p.dim() < 2 else 1 / math.sqrt(p[0].numel()))
        for module in network.modules():
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                nn.init.ones_(module.weight)
        networks[part] = network.eval().requires_grad_(False)
    return Base(config, device, **networks)


def matrix_product(device, dtype, n=4096):
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return {"matrix product": lambda: a @ b}


def random_inputs(base, settings, clips):
    """-> z_t, t, fps, context, as the UNet takes them."""
    factor = base.config.vae.factor
    z = torch.randn(clips, Z_CHANNELS, settings.frames, settings.height // factor, settings.width // factor)
    context = torch.randn(clips, TEXT_LENGTH, base.config.text.width)
    t, fps = torch.full((clips,), 500), torch.full((clips,), settings.fps)
    return [x.to(base.device) for x in (z, t, fps, context)]


@contextmanager
def explicit_attention():
    """Attention with its table of scores written out, as in the paper that introduced it."""
    def attend(q, k, v):
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v

    fused, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


def sampling_work(base, settings):
    z, t, fps, both = random_inputs(base, settings, 2)
    picture = torch.rand(1, 3, settings.height, settings.width, device=base.device) * 2 - 1
    merged = MergedLoRA(base.unet, random_subject(base, base.config.training.rank, scale=0.01))
    lambdas = two_step_schedule(settings.lambda_s, settings.lambda_l, settings.K, settings.steps)

    def video(lora):
        noise = lambda: torch.randn_like(z[:1])
        ddim(base.unet, base.schedule, z[:1], noise, both[:1], both[1:], fps[:1], settings.steps,
             settings.cfg, settings.eta, lora, lambdas)
        if lora:
            lora.set(0)

    def separate():
        for i in range(2):
            text = both[i:i + 1].repeat_interleave(settings.frames, 0)
            base.unet(z[i:i + 1], t[i:i + 1], fps[i:i + 1], text)

    def explicit():
        with explicit_attention():
            base.unet(z, t, fps, both)

    def encode_every_frame():
        for _ in range(settings.frames):
            base.vae.encode(picture)

    work = {
        "UNet call with guidance": lambda: base.unet(z, t, fps, both),
        "UNet call, explicit softmax": explicit,
        "guidance in two calls, text repeated per frame": separate,
        "a video, plain": lambda: video(None),
        "a video, customised": lambda: video(merged),
        "decoding": lambda: base.decode(z[:1]),
        "encoding one frame": lambda: still_video(base.vae.encode(picture), settings.frames),
        "encoding every frame": encode_every_frame}
    return {label: torch.no_grad()(call) for label, call in work.items()}


def training_work(base, settings, rank):
    """A step of train.py's loop on random numbers, one subject and one prior clip, the paper's way and
    plainer ones.

    The LoRA stands beside the weights only while such a step runs, so that sampling is timed without it.
    """
    z, t, _, context = random_inputs(base, settings, 2)
    eps, weight = torch.randn_like(z), torch.ones_like(z[:1, 0, 0])
    clip = torch.rand(settings.frames, 3, settings.height, settings.width, device=base.device) * 2 - 1
    tokens = torch.full((1, TEXT_LENGTH), VOCAB_SIZE, device=base.device)  # V*
    layers = add_lora(base.unet, rank)
    frozen = {name: layer.linear for name, layer in layers.items()}
    v_star = torch.randn(1, base.config.text.width, device=base.device)
    loss = SubjectLoss(base, v_star, layers, settings.frames, settings.fps)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-5)

    def put(modules):
        for name, module in modules.items():
            base.unet.set_submodule(name, module)

    put(frozen)

    def step(checkpointing=False, encode_prior=False, all_gradients=False):
        put(layers)
        base.unet.grad_checkpointing = checkpointing
        base.unet.requires_grad_(all_gradients)
        loss.requires_grad_()
        prior_z, prior_context = z[1:], context[1:]
        if encode_prior:
            with torch.no_grad():
                prior_z = base.encode(clip).transpose(0, 1)[None]
                prior_context = base.text_encoder(tokens, loss.v_star)
        subject_loss, prior_loss = loss(clip[:1], tokens, weight, t, eps, prior_z, prior_context)
        (subject_loss + prior_loss).backward()
        optimizer.step()
        base.unet.zero_grad(set_to_none=True)
        optimizer.zero_grad(set_to_none=True)
        base.unet.requires_grad_(False)
        base.unet.grad_checkpointing = False
        put(frozen)

    return {"training step": step,
            "training step, checkpointed": lambda: step(checkpointing=True),
            "training step, encoding its prior": lambda: step(encode_prior=True),
            "training step, all gradients": lambda: step(all_gradients=True)}


# ------------------------------------------------------------------------------------------------------------
# How cost grows


def print_scaling(base, settings, repeats):
    """A row for each size: seconds, arithmetic, and time per operation relative to the group's first row."""
    def call(clips, **changed):
        inputs = random_inputs(base, replace(settings, **changed), clips)
        return torch.no_grad()(lambda: base.unet(*inputs))

    frames, width, height = settings.frames, settings.width, settings.height
    groups = [
        {f"{n} frames": call(1, frames=n) for n in (frames, 2 * frames, 4 * frames)},
        {f"{n * width}x{n * height}": call(1, width=n * width, height=n * height) for n in (1, 2)},
        {f"{n} clips": call(n) for n in (1, 2, 4)},
        {f"training step, rank {rank}": training_work(base, settings, rank)["training step"]
         for rank in (4, 16, 64)}]
    work = {}
    for group in groups:
        work |= group
    found = measure(work, repeats)
    print("\n| UNet call with | seconds | TFLOP | seconds per TFLOP, first row: 1 |\n|---|---|---|---|")
    for group in groups:
        costs = [found[label]["seconds"] / found[label]["TFLOP"] for label in group]
        for label, cost in zip(group, costs):
            row = found[label]
            print(f"| {label} | {row['seconds']:.3f} | {row['TFLOP']:.3f} | {cost / costs[0]:.2f} |")
    print("\n| embedded base, 20 training steps | seconds per clip | "
          "start-up: seconds from the command to the end of step 1 |\n|---|---|---|")
    for processes in (1, 2, 4):
        start, seconds = time_training(processes, clips=4)
        print(f"| {processes} processes | {seconds:.3f} | {start:.1f} |")


def time_training(processes, clips, steps=20):
    """train.py on the embedded base -> seconds until the end of step 1, and per clip after it (median)."""
    launcher = torchrun(processes) if processes > 1 else ()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "run" / "log.jsonl"
        command = [sys.executable, *launcher, ROOT / "train.py", "--base", ROOT / "toy" / "base",
                   "--alpha", 0, "--steps", steps, "--batch_size", clips // processes, "--out", log.parent]
        began = time.time()
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise BadInput(f"train.py on {processes} processes: {done.stderr.strip()[-300:]}")
        seconds = [json.loads(line)["seconds"] for line in log.read_text().splitlines()]
        end = log.stat().st_mtime
    return end - sum(seconds[1:]) - began, statistics.median(seconds[1:]) / clips


# ------------------------------------------------------------------------------------------------------------
# Where the time goes


COPIES = ("aten::copy_", "aten::cat", "aten::repeat_interleave", "aten::index_select")
ARITHMETIC = ("aten::addmm", "aten::mm", "aten::bmm", "conv", "scaled_dot_product")
KINDS = ("products and convolutions", "copies", "all else")
LAYERS = (TemporalConv, TemporalTransformer, SpatialTransformer, ResBlock)


@contextmanager
def named_layers():
    """Every call of one of LAYERS stands in a profile under its class's name."""
    forwards = {layer: layer.forward for layer in LAYERS}

    def named(layer):
        def forward(self, *x):
            with torch.profiler.record_function(layer.__name__):
                return forwards[layer](self, *x)
        return forward

    for layer in LAYERS:
        layer.forward = named(layer)
    try:
        yield
    finally:
        for layer, forward in forwards.items():
            layer.forward = forward


def print_profile(base, settings):
    """Seconds in arithmetic, copies and all else: of a guided UNet call by layer, and of a training step."""
    inputs = random_inputs(base, settings, 2)
    with named_layers():
        table = profiled(torch.no_grad()(lambda: base.unet(*inputs)))
    # The backward pass runs outside the layers' calls, so a training step has one row.
    step = profiled(training_work(base, settings, base.config.training.rank)["training step"])
    table["a training step"] = {kind: sum(row[kind] for row in step.values()) for kind in KINDS}
    print(f"\n| layer | {', s | '.join(KINDS)}, s |\n|---|---|---|---|")
    for name, seconds in table.items():
        print(f"| {name} | " + " | ".join(f"{seconds[kind]:.4f}" for kind in KINDS) + " |")


def profiled(call):
    """-> name of one of LAYERS, or "other" -> kind of work -> seconds. The first call only warms up."""
    call()
    with torch.profiler.profile(acc_events=True) as found:
        call()
    table = {name: dict.fromkeys(KINDS, 0.0) for name in (*[layer.__name__ for layer in LAYERS], "other")}
    for event in found.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a kernel's time already stands with the operation that launched it
        inner = event
        while inner and inner.name not in table:
            inner = inner.cpu_parent
        seconds = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
        table[inner.name if inner else "other"][kind_of(event.name)] += seconds / 1e6
    return table


def kind_of(operation):
    if operation in COPIES:
        return "copies"
    if any(name in operation for name in ARITHMETIC):
        return "products and convolutions"
    return "all else"


# ------------------------------------------------------------------------------------------------------------
# The clock


def measure(work, repeats):
    """Label -> function becomes label -> seconds (median), TFLOP, TFLOP/s, peak GB.

    On a CPU the peak is that of the process so far.
    """
    cuda = torch.cuda.is_available()
    seconds, rows = {label: [] for label in work}, {}
    for turn in range(repeats + 1):
        for label, call in work.items():
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            if turn == 0:
                rows[label] = {"TFLOP": count_flops(call) / 1e12}
            else:
                seconds[label].append(clocked(call, cuda))
                rows[label]["peak GB"] = peak_memory()
        print(f"turn {turn} of {repeats}", file=sys.stderr, flush=True)
    for label, row in rows.items():
        row["seconds"] = statistics.median(seconds[label])
        row["TFLOP/s"] = row["TFLOP"] / row["seconds"]
    return rows


def clocked(call, cuda):
    """Seconds of one call: by the GPU's own events where there is one."""
    if not cuda:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def parse_args():
    p = argparse.ArgumentParser(description="Time sampling and training against the processor's matrix rate.")
    p.add_argument("--base", type=Path, help="base folder (default: random weights of VideoCrafter2's size)")
    p.add_argument("--quick", action="store_true",
                   help="4 frames of 128x128, 2 sampling steps, fewer repeats")
    p.add_argument("--repeats", type=int, help="turns that count (default: 7, with --quick 2)")
    p.add_argument("--steps", type=int, help="sampling steps of a timed video (default: 50, with --quick 2)")
    p.add_argument("--precision", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
                   help="of the UNet")
    p.add_argument("--only", nargs="+", default=[], metavar="WORK",
                   help="only these rows, and the ratios between them")
    p.add_argument("--compile", action="store_true",
                   help="also the UNet call compiled by torch.compile, which first takes minutes")
    p.add_argument("--scaling", action="store_true",
                   help="in their place, how cost grows with frames, size, clips, rank and processes")
    p.add_argument("--profile", action="store_true",
                   help="in their place, a UNet call's and a training step's time by kind of work")
    p.add_argument("--json", type=Path, help="also write the numbers there")
    args = p.parse_args()
    check_flags(args, {"repeats": (1, 1000), "steps": (1, 999)})
    return args


if __name__ == "__main__":
    run_script(main)
