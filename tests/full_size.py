"""The whole path at VideoCrafter2's full size, 320x512 and 16 frames, on random weights, one step of each.

    python tests/full_size.py --images PHOTOS   # half an hour on 2 CPU cores; 20 GB of memory, 12 GB of disk
    python tests/full_size.py --estimate        # a minute: what fits on a card of 8 ... 80 GB, without one

Not part of the test suite. It writes a checkpoint with the official names and shapes, runs convert_ckpt.py,
train.py and sample.py as a person would, and prints the time and the peak memory of each. The video that
comes out is noise.

--estimate runs the same networks and the same loss on meta tensors, which have shapes and no content. It
counts the bytes that are alive at each moment, gradients in flight included. It leaves out what the driver
and the allocator take; `on_card` adds a guess.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
import weakref
from functools import partial
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from makers import OFFICIAL, ROOT
from config import BaseConfig
from files import PARTS, Base, build_part
from lora import add_lora, target_names
from model import TEXT_LENGTH, VOCAB_SIZE, Z_CHANNELS
from train import SubjectLoss

# ------------------------------------------------------------------------------------------------------------
# What fits on a card

GB = 2**30
CARDS = (8, 12, 16, 24, 48, 80)


def on_card(counted):
    """Bytes counted -> bytes on a card. What fragments and the driver add is a guess until measured."""
    return 1.05 * counted + GB


class LiveBytes(TorchDispatchMode):
    """While it is entered, `now` is how many bytes the tensors made since then hold, and `peak` the most."""

    def __init__(self):
        super().__init__()
        self.now, self.peak = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        before = {tensor.untyped_storage()._cdata for tensor in tensors}
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in before:
                self.count(tensor.untyped_storage())
        return found

    def count(self, storage):
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.release, size)

    def release(self, size):
        self.now -= size


class FusedAttention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: q, k, v, the output, a number per row; but no table of scores."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3], device=q.device))
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])

    @classmethod
    def attend(cls, q, k, v, *mask, **options):
        return cls.apply(q, k, v)


def meta_base(config, dtype):
    """A base whose tensors have shapes and no content."""
    with torch.device("meta"):
        networks = {part: build_part(part, config) for part in PARTS}
    networks["unet"].to(dtype)
    for network in networks.values():
        network.eval().requires_grad_(False)
    return Base(config, "meta", **networks)


def weight_bytes(base):
    weights = [*base.unet.parameters(), *base.vae.parameters(), *base.text_encoder.parameters()]
    return sum(p.numel() * p.element_size() for p in weights)


def latent_shape(config):
    """(4, T, h, w)"""
    size, factor = config.sampling, config.vae.factor
    return Z_CHANNELS, size.frames, size.height // factor, size.width // factor


def count_sampling(config, dtype, clips):
    """Bytes at the peak of sampling `clips` videos at once with guidance, with a LoRA in the weights."""
    base = meta_base(config, dtype)
    channels, frames, h, w = latent_shape(config)
    originals = [base.unet.get_submodule(name).weight for name in target_names(base.unet)]
    kept = sum(weight.numel() * weight.element_size() for weight in originals)
    with torch.no_grad(), torch.device("meta"):
        z = torch.empty(2 * clips, channels, frames, h, w)
        t = torch.empty(2 * clips, dtype=torch.long)
        context = torch.empty(2 * clips, TEXT_LENGTH, config.text.width)
        with LiveBytes() as unet:
            base.unet(z, t, t, context)
        with LiveBytes() as decoding:
            base.vae.decode(torch.empty(4, channels, h, w))  # as Base.decode, four frames at a time
    return weight_bytes(base) + kept + max(unet.peak, decoding.peak)


def count_training(config, dtype, clips, prior, checkpointing):
    """Bytes at the peak of a training step: `clips` clips of the subject, as many of the prior or none."""
    base, size = meta_base(config, dtype), config.sampling
    weights = weight_bytes(base)
    base.unet.grad_checkpointing = checkpointing
    all_clips = clips * (2 if prior else 1)
    latents = latent_shape(config)
    with torch.device("meta"):
        layers = add_lora(base.unet, config.training.rank)
        loss = SubjectLoss(base, torch.empty(1, config.text.width), layers, size.frames, size.fps)
        inputs = [torch.empty(clips, 3, size.height, size.width),               # photos
                  torch.full((clips, TEXT_LENGTH), VOCAB_SIZE),                 # tokens
                  torch.empty(clips, *latents[2:]),                             # weight
                  torch.empty(all_clips, dtype=torch.long),                     # t
                  torch.empty(all_clips, *latents)]                             # eps
        if prior:
            inputs += [torch.empty(clips, *latents), torch.empty(clips, TEXT_LENGTH, config.text.width)]
        with LiveBytes() as step:
            sum(loss(*inputs)).backward()
    trained = sum(p.numel() * p.element_size() for p in loss.parameters())
    return weights + 3 * trained + step.peak  # AdamW keeps two numbers for each; gradients are in the peak


def largest_batch(one, two, three, card):
    """Bytes for one, two and three clips -> the largest batch on a card of so many GB; 0 if none fits.

    From two on, each clip takes as much as the one before. One alone may take less than the decoder does.
    """
    room = card * GB - on_card(two)
    if room >= 0:
        return 2 + int(room / (1.05 * (three - two)))
    return 1 if on_card(one) <= card * GB else 0


def estimate(config, dtype=torch.bfloat16):
    """Prints how much each piece of work takes, then which batch sizes fit on which card."""
    training = partial(count_training, config, dtype)
    work = {"sample.py": partial(count_sampling, config, dtype),
            "train.py": partial(training, prior=True, checkpointing=False),
            "train.py --grad_checkpointing": partial(training, prior=True, checkpointing=True),
            "train.py --grad_checkpointing --alpha 0": partial(training, prior=False, checkpointing=True)}
    fused, F.scaled_dot_product_attention = F.scaled_dot_product_attention, FusedAttention.attend
    try:
        counted = {label: (count(1), count(2), count(3)) for label, count in work.items()}
    finally:
        F.scaled_dot_product_attention = fused
    print("| work, UNet in bfloat16 | counted, --batch_size 1 | each further clip | forecast on a card |")
    print("|---|---|---|---|")
    for label, (one, two, three) in counted.items():
        forecast = on_card(one) / GB
        print(f"| `{label}` | {one / GB:.1f} GB | {(three - two) / GB:.2f} GB | {forecast:.1f} GB |")
    print("\n| largest --batch_size on a card of | " + " | ".join(f"{card} GB" for card in CARDS) + " |")
    print("|---" * (1 + len(CARDS)) + "|")
    for label, numbers in counted.items():
        fits = [largest_batch(*numbers, card) for card in CARDS]
        print(f"| `{label}` | " + " | ".join(str(n or "–") for n in fits) + " |")


# ------------------------------------------------------------------------------------------------------------
# The path itself, on random weights


def write_checkpoint(path, dtype):
    """Random weights under the official names. What goes through keeps its size."""
    state, generator = {}, torch.Generator().manual_seed(0)
    for name, shape in OFFICIAL.items():
        w = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            w = 0.1 * w
        elif w.dim() < 2:
            w = 1 + 0.1 * w
        else:
            w = w / w[0].numel() ** 0.5
        state[name] = w.to(dtype)
    torch.save({"state_dict": state}, path)


def timed(what, script, *flags):
    """Runs a script of this repository; prints its time and peak memory (memory-mapped pages included)."""
    start, peak = time.time(), 0
    process = psutil.Popen([sys.executable, str(ROOT / script), *map(str, flags)])
    while process.poll() is None:
        try:
            memory = process.memory_info()
            peak = max(peak, getattr(memory, "peak_wset", memory.rss))
        except psutil.Error:  # it ended in between
            pass
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"{what}: failed")
    print(f"== {what}: {time.time() - start:.0f} s, peak memory {peak / GB:.1f} GB", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--estimate", action="store_true", help="only count what fits on which card")
    p.add_argument("--images", type=Path, help="folder of photos; they stand for the class prior as well")
    p.add_argument("--class_word", default="dog")
    p.add_argument("--source", choices=["float16", "float32"], default="float16", help="what it is made of")
    p.add_argument("--dir", type=Path,
                   help="where to put the files (default: the system's temporary folder)")
    p.add_argument("--convert_only", action="store_true")
    args = p.parse_args()
    if args.estimate:
        return estimate(BaseConfig())
    if not args.images:
        p.error("--images: is needed")
    with tempfile.TemporaryDirectory(dir=args.dir) as temporary:
        run_all(args, Path(temporary))


def run_all(args, folder):
    # In a process of its own, so that its memory is given back before the scripts are measured.
    arguments = (folder / "model.ckpt", getattr(torch, args.source))
    writer = multiprocessing.get_context("spawn").Process(target=write_checkpoint, args=arguments)
    writer.start()
    writer.join()
    if writer.exitcode:
        sys.exit("could not write the checkpoint")
    base = folder / "base"
    timed(f"convert {args.source} to bfloat16", "convert_ckpt.py", folder / "model.ckpt", "--out", base)
    for part in sorted(base.glob("*.safetensors")):
        print(f"   {part.name}: {part.stat().st_size / GB:.2f} GB")
    if args.convert_only:
        return
    prior = ["--prior", args.images, "--num_prior", 1]
    timed("one training step, one subject and one prior clip", "train.py", "--base", base,
          "--images", args.images, "--class_word", args.class_word, *prior, "--steps", 1,
          "--grad_checkpointing", "--out", folder / "run")
    timed("one sampling step with guidance, and decoding", "sample.py", "--base", base,
          "--subject", folder / "run" / "subject.safetensors", "--steps", 1, "--K", 1,
          "--out", folder / "outputs")


if __name__ == "__main__":
    main()
