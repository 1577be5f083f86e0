"""How fast, how near to what the processor can do, and what each way of saving work saves.

    python tests/benchmark.py                     # VideoCrafter2's size, random weights; for GPUs
    python tests/benchmark.py --quick             # the same networks on fewer, smaller frames; for CPUs, about 5 minutes
    python tests/benchmark.py --base toy/base     # a base's own weights and size
    python tests/benchmark.py --only "matrix product" "UNet call with guidance" --repeats 1     # full size on a CPU: some of it
    python tests/benchmark.py --quick --scaling   # cost against frames, size, clips, rank and processes, and the start-up
    python tests/benchmark.py --quick --profile   # where a UNet call's time goes, by kind of work

Prints two tables, and writes them to --json. The first: median time of each piece of work, its arithmetic (matrix products,
convolutions and attention, as torch counts them), the rate, and the rate's share of a large matrix product's in the same
run. The second: how much faster each thing is done than in the plain way, which is written out here and nowhere else. All
cases take turns, so that what slows the machine slows every case; the first turn warms up and does not count.

Trials, on CPUs; what pays a tenth would have been kept (expected -> found):
    channels_last weights and activations             convolutions without reordering, 10% -> 3% of a UNet call
    temporal convolutions as 2D ones over (T, H*W)    nothing -> 1.2 to 1.3 times as fast, which is 3% of a UNet call
    the same as 1D ones over (B*H*W, C, T)            slower, by the copies -> 0.8 to 1.3 times as fast
    the same as one linear layer on shifted copies    slower, by the copies -> 0.9 to 1.1 times as fast
    torch.compile (--compile)                         norms and activations fused, 10 to 20% -> the embedded base's call 1.25 times as
                                                      fast after half a minute, its videos equal to 1 of 255; an option, off by default
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
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from data import still_video
from lora import MergedLoRA, add_lora
from model import (PARTS, VOCAB_SIZE, BadInput, Base, BaseConfig, NoiseSchedule, ResBlock, SpatialTransformer, TemporalConv, TemporalTransformer,
                   build_part, complete_or_absent, load_base, run_script)
from sample import check_flags, ddim, peak_memory, pick_precision, two_step_schedule
from test_lora import random_subject


def main():
    p = argparse.ArgumentParser(description="Time sampling and training against the processor's own matrix rate.")
    p.add_argument("--base", type=Path, help="base folder (default: random weights of VideoCrafter2's size)")
    p.add_argument("--quick", action="store_true", help="4 frames of 128x128, 2 sampling steps, fewer repeats")
    p.add_argument("--repeats", type=int, help="turns that count (default: 7, with --quick 2)")
    p.add_argument("--steps", type=int, help="sampling steps of a timed video (default: 50, with --quick 2)")
    p.add_argument("--precision", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="of the UNet")
    p.add_argument("--only", nargs="+", default=[], metavar="WORK", help="only these rows, and the ratios between them")
    p.add_argument("--compile", action="store_true", help="also the UNet call compiled by torch.compile, which first takes minutes")
    p.add_argument("--scaling", action="store_true", help="in their place, how cost grows with frames, size, clips, rank and processes")
    p.add_argument("--profile", action="store_true", help="in their place, a UNet call's time by kind of work")
    p.add_argument("--json", type=Path, help="also write the numbers there")
    args = p.parse_args()
    check_flags(argparse.Namespace(**vars(args), out=None), repeats=(1, 1000), steps=(1, 999))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = pick_precision(args.precision, device)
    base = load_base(args.base, device, getattr(torch, precision)) if args.base else random_base(device, getattr(torch, precision))
    d = base.config.defaults
    if args.quick and not args.base:
        d = replace(d, frames=4, height=QUICK[0], width=QUICK[1])
    d = replace(d, steps=args.steps or (2 if args.quick else d.steps), K=1 if args.quick else d.K)
    repeats = args.repeats or (2 if args.quick else 7)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, UNet in {precision}: {d.frames} frames of {d.width}x{d.height}, {d.steps} steps, "
          f"median of {repeats}", flush=True)

    if args.profile:
        return print_profile(base, d)
    if args.scaling:
        return print_scaling(base, d, repeats)
    work = {**matrix_product(device, getattr(torch, precision)), **sampling_work(base, d), **training_work(base, d)}
    if args.compile:
        compiled, inputs = torch.compile(base.unet.forward), random_inputs(base, d, 2)
        work["UNet call, compiled"] = torch.no_grad()(lambda: compiled(*inputs))
    if unknown := set(args.only) - set(work):
        raise BadInput(f"--only {unknown.pop()!r}: should be of {', '.join(map(repr, work))}")
    found = measure({label: call for label, call in work.items() if not args.only or label in (*args.only, "matrix product")}, repeats)
    peak = found["matrix product"]["TFLOP/s"]
    print("\n| work | seconds | TFLOP | TFLOP/s | of the matrix rate | peak GB |\n|---|---|---|---|---|---|")
    for label, row in found.items():
        if label in SHOWN or args.only:
            row["of the matrix rate"] = row["TFLOP/s"] / peak
            print(f"| {label} | {row['seconds']:.3f} | {row['TFLOP']:.3f} | {row['TFLOP/s']:.2f} | {row['of the matrix rate']:.0%} | "
                  f"{row['peak GB']:.1f} |")
    ratios = {label: found[plain]["seconds"] / found[ours]["seconds"] for label, (plain, ours) in RATIOS.items() if {plain, ours} <= set(found)}
    if ratios:
        print("\n| ratio | plain / ours |\n|---|---|")
    for label, ratio in ratios.items():
        print(f"| {label} | {ratio:.2f} |")
    if args.json:
        with complete_or_absent(args.json) as temporary:
            temporary.write_text(json.dumps({"device": name, "torch": torch.__version__, "precision": precision, "work": found,
                                             "ratios": ratios}, indent=1) + "\n")


QUICK = (128, 128)  # height and width: VideoCrafter2's UNet takes multiples of 64
SHOWN = ("matrix product", "UNet call with guidance", "a video, customised", "decoding", "training step",
         "training step, checkpointed")
# What is compared: the plain way and ours.
RATIOS = {"customised sampling over plain (plain / ours: 1 is free)": ("a video, plain", "a video, customised"),
          "guidance in one call, text once a clip": ("guidance in two calls, text repeated per frame", "UNet call with guidance"),
          "one encoded frame for a still video": ("encoding every frame", "encoding one frame"),
          "scaled_dot_product_attention": ("UNet call, explicit softmax", "UNet call with guidance"),
          "prior latents and texts encoded once": ("training step, encoding its prior", "training step"),
          "--compile": ("UNet call with guidance", "UNet call, compiled"),
          "only the gradients needed": ("training step, all gradients", "training step"),
          "without checkpointing (speed for memory)": ("training step, checkpointed", "training step")}


# ---------------------------------------------------------------------------------------------------------------------
# The work. Each function returns label -> function of no arguments.


def random_base(device, dtype):
    """VideoCrafter2 with random weights, none of them zero, made where they will be used."""
    config = BaseConfig()
    networks = {}
    for part in PARTS:
        with torch.device("meta"):
            network = build_part(part, config)
        network = network.to_empty(device=device).to(dtype if part == "unet" else torch.float32).eval().requires_grad_(False)
        for p in network.parameters():  # of a size that keeps what goes through, as training would
            nn.init.normal_(p, std=0.02 if p.dim() < 2 else 1 / math.sqrt(p[0].numel()))
        for module in network.modules():
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
                nn.init.ones_(module.weight)
        networks[part] = network
    return Base(config, NoiseSchedule(config.schedule), device=torch.device(device), **networks)


def matrix_product(device, dtype, n=4096):
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return {"matrix product": lambda: a @ b}


def random_inputs(base, d, clips):
    z = torch.randn(clips, 4, d.frames, d.height // 8, d.width // 8, device=base.device)
    t, fps = (torch.full((clips,), n, device=base.device) for n in (500, d.fps))
    return z, t, fps, torch.randn(clips, 77, base.config.text.width, device=base.device)


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


def sampling_work(base, d):
    z, t, fps, both = random_inputs(base, d, 2)
    picture = torch.rand(1, 3, d.height, d.width, device=base.device) * 2 - 1
    strength, lambdas = MergedLoRA(base.unet, random_subject(base, d.rank, scale=0.01)), two_step_schedule(d.lambda_s, d.lambda_l, d.K, d.steps)

    def video(strength):
        ddim(base.unet, base.schedule, z[:1], lambda: torch.randn_like(z[:1]), both[:1], both[1:], fps[:1], d.steps, d.cfg, d.eta,
             strength, lambdas)
        if strength:
            strength.set(0)

    def separate():
        for i in range(2):
            base.unet(z[i:i + 1], t[i:i + 1], fps[i:i + 1], both[i:i + 1].repeat_interleave(d.frames, 0))

    def explicit():
        with explicit_attention():
            base.unet(z, t, fps, both)

    work = {"UNet call with guidance": lambda: base.unet(z, t, fps, both), "UNet call, explicit softmax": explicit,
            "guidance in two calls, text repeated per frame": separate,
            "a video, plain": lambda: video(None), "a video, customised": lambda: video(strength), "decoding": lambda: base.decode(z[:1]),
            "encoding one frame": lambda: still_video(base.vae.encode(picture), d.frames),
            "encoding every frame": lambda: [base.vae.encode(picture) for _ in range(d.frames)]}
    return {label: torch.no_grad()(call) for label, call in work.items()}


def training_work(base, d):
    """A step of train.py's loop on random numbers, one subject and one prior clip, in the paper's way and in plainer ones.

    The LoRA stands beside the weights only while such a step runs, so that sampling is timed without it.
    """
    z, t, fps, context = random_inputs(base, d, 2)
    eps, frame = torch.randn_like(z), torch.rand(d.frames, 3, d.height, d.width, device=base.device) * 2 - 1
    tokens = torch.full((1, 77), VOCAB_SIZE, device=base.device)  # V*
    layers = add_lora(base.unet, d.rank)
    plain = {name: layer.base for name, layer in layers.items()}
    v_star = nn.Parameter(torch.randn(1, base.config.text.width, device=base.device))
    params = [v_star, *(p for layer in layers.values() for p in layer.tensors())]
    optimizer = torch.optim.AdamW(params, lr=1e-5)

    def put(modules):
        for name, module in modules.items():
            base.unet.set_submodule(name, module)

    put(plain)

    def step(checkpointing=False, encode_prior=False, all_gradients=False):
        put(layers)
        base.unet.grad_checkpointing = checkpointing
        base.unet.requires_grad_(all_gradients)
        for p in params:
            p.requires_grad_()
        with torch.no_grad():
            z_0 = [still_video(base.vae.encode(frame[:1]), d.frames), z[1:]]
            if encode_prior:
                z_0[1] = base.vae.encode(frame).transpose(0, 1)[None]
                base.text_encoder(tokens, v_star)
        text = torch.cat([base.text_encoder(tokens, v_star), context[1:]])
        loss = (base.unet(base.schedule.add_noise(torch.cat(z_0), t, eps), t, fps, text) - eps).pow(2).mean()
        loss.backward()
        optimizer.step()
        base.unet.zero_grad(set_to_none=True)
        optimizer.zero_grad(set_to_none=True)
        base.unet.requires_grad_(False)
        base.unet.grad_checkpointing = False
        put(plain)

    return {"training step": step, "training step, checkpointed": lambda: step(checkpointing=True),
            "training step, encoding its prior": lambda: step(encode_prior=True),
            "training step, all gradients": lambda: step(all_gradients=True)}


# ---------------------------------------------------------------------------------------------------------------------
# How cost grows, and where it goes


def print_scaling(base, d, repeats):
    """A row for each size: seconds, arithmetic, and the time that an operation takes, relative to that kind's first row."""
    def call(clips, **change):
        inputs = random_inputs(base, replace(d, **change), clips)
        return torch.no_grad()(lambda: base.unet(*inputs))

    kinds = {"frames": {f"{n} frames": call(1, frames=n) for n in (d.frames, 2 * d.frames, 4 * d.frames)},
             "size": {f"{d.width * n}x{d.height * n}": call(1, width=n * d.width, height=n * d.height) for n in (1, 2)},
             "clips": {f"{n} clips": call(n) for n in (1, 2, 4)},
             "rank": {f"training step, rank {rank}": training_work(base, replace(d, rank=rank))["training step"] for rank in (4, 16, 64)}}
    found = measure({label: call for rows in kinds.values() for label, call in rows.items()}, repeats)
    print("\n| UNet call with | seconds | TFLOP | seconds per TFLOP, first row: 1 |\n|---|---|---|---|")
    for rows in kinds.values():
        costs = [found[label]["seconds"] / found[label]["TFLOP"] for label in rows]
        for label, cost in zip(rows, costs):
            print(f"| {label} | {found[label]['seconds']:.3f} | {found[label]['TFLOP']:.3f} | {cost / costs[0]:.2f} |")
    print("\n| embedded base, 20 training steps | seconds a clip | start-up: seconds from the command to the end of step 1 |\n|---|---|---|")
    for processes in (1, 2, 4):
        start, seconds = time_training(processes, clips=4)
        print(f"| {processes} processes | {seconds:.3f} | {start:.1f} |")


def time_training(processes, clips, steps=20):
    """train.py on the embedded base -> seconds until the end of step 1, and median seconds for each of the `clips` of a step."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, ROOT / "train.py", "--base", ROOT / "toy" / "base", "--alpha", 0, "--steps", steps,
                   "--batch_size", clips // processes, "--out", Path(folder) / "run"]
        began = time.time()
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            raise BadInput(f"train.py on {processes} processes: {done.stderr.strip()[-300:]}")
        seconds = [json.loads(line)["seconds"] for line in (Path(folder) / "run" / "log.jsonl").read_text().splitlines()]
        end = (Path(folder) / "run" / "log.jsonl").stat().st_mtime
    return end - sum(seconds[1:]) - began, statistics.median(seconds[1:]) / clips


COPIES = ("aten::copy_", "aten::cat", "aten::repeat_interleave", "aten::index_select")
ARITHMETIC = ("aten::addmm", "aten::mm", "aten::bmm", "conv", "scaled_dot_product")
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


@torch.no_grad()
def print_profile(base, d):
    """A UNet call with guidance by kind of layer: seconds in products and convolutions, in copies, and in all else."""
    inputs = random_inputs(base, d, 2)
    base.unet(*inputs)
    with named_layers(), torch.profiler.profile(acc_events=True) as found:
        base.unet(*inputs)
    table = {layer.__name__: [0.0, 0.0, 0.0] for layer in LAYERS} | {"other": [0.0, 0.0, 0.0]}
    for event in found.events():
        inner = event
        while inner and inner.name not in table:
            inner = inner.cpu_parent
        kind = 1 if event.name in COPIES else 0 if any(name in event.name for name in ARITHMETIC) else 2
        seconds = event.self_device_time_total if base.device.type == "cuda" else event.self_cpu_time_total
        table[inner.name if inner else "other"][kind] += seconds / 1e6
    print("\n| layer | products and convolutions, s | copies, s | all else, s |\n|---|---|---|---|")
    for layer, seconds in table.items():
        print(f"| {layer} | " + " | ".join(f"{x:.3f}" for x in seconds) + " |")


# ---------------------------------------------------------------------------------------------------------------------
# The clock


def measure(work, repeats):
    """label -> function becomes label -> seconds (median), TFLOP, TFLOP/s, peak GB (on a CPU: of the process so far)."""
    cuda = torch.cuda.is_available()
    seconds, rows = {label: [] for label in work}, {}
    for turn in range(repeats + 1):
        for label, call in work.items():
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            if turn == 0:
                with FlopCounterMode(display=False) as counter:
                    call()
                rows[label] = {"TFLOP": counter.get_total_flops() / 1e12}
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


if __name__ == "__main__":
    run_script(main)
