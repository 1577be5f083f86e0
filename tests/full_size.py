"""The whole path at VideoCrafter2's full size, 320x512 and 16 frames, on random weights, one step of each.

    python tests/full_size.py --images PHOTOS          # about half an hour on 2 CPU cores; 20 GB of memory, 12 GB of disk

Not part of the test suite. It writes a checkpoint with the official names and shapes, runs convert_ckpt.py, train.py and
sample.py as a person would, and prints the time and the peak memory of each. The video that comes out is noise.
"""
import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def write_checkpoint(path, dtype):
    """Random weights under the official names: matrices keep the size of what goes through, norms stay near one."""
    shapes = json.loads((ROOT / "tests" / "golden" / "official_keys.json").read_text())
    state, generator = {}, torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        w = torch.randn(shape, generator=generator)
        fan_in = w[0].numel() if w.dim() > 1 else 1
        state[name] = (0.1 * w if name.endswith("bias") else 1 + 0.1 * w if w.dim() < 2 else w / fan_in ** 0.5).to(dtype)
    torch.save({"state_dict": state}, path)


def timed(what, *command):
    """Runs a script of this repository; prints its wall time and peak memory (memory-mapped pages included)."""
    start = time.time()
    process = subprocess.Popen([sys.executable, *map(str, command)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{what}: failed")
    print(f"== {what}: {time.time() - start:.0f} s, peak memory {usage.ru_maxrss / 2**20:.1f} GB", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=Path, required=True, help="folder of photos; they stand for the class prior as well")
    p.add_argument("--class_word", default="dog")
    p.add_argument("--source", choices=["float16", "float32"], default="float16", help="what the checkpoint holds")
    p.add_argument("--dir", type=Path, help="where to put the files (default: the system's temporary folder)")
    p.add_argument("--convert_only", action="store_true")
    args = p.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as temporary:
        folder = Path(temporary)
        # In a process of its own: a child's peak, as the system counts it, includes its parent's at the time of the fork.
        writer = multiprocessing.get_context("spawn").Process(target=write_checkpoint,
                                                              args=(folder / "model.ckpt", getattr(torch, args.source)))
        writer.start()
        writer.join()
        if writer.exitcode:
            sys.exit("could not write the checkpoint")
        base = folder / "base"
        timed(f"convert {args.source} to bfloat16", ROOT / "convert_ckpt.py", folder / "model.ckpt", "--out", base)
        for part in sorted(base.glob("*.safetensors")):
            print(f"   {part.name}: {part.stat().st_size / 2**30:.2f} GB")
        if not args.convert_only:
            timed("one training step, one subject and one prior clip", ROOT / "train.py", "--base", base, "--images", args.images,
                  "--class_word", args.class_word, "--prior", args.images, "--num_prior", 1, "--steps", 1,
                  "--grad_checkpointing", "--out", folder / "run")
            timed("one sampling step with guidance, and decoding", ROOT / "sample.py", "--base", base, "--subject",
                  folder / "run" / "subject.safetensors", "--steps", 1, "--K", 1, "--out", folder / "outputs")
