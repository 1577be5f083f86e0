"""How much of a GPU's memory sampling and training take, and what a training step computes; without a GPU.

    python tests/tools/memory.py        # three minutes on a CPU core

The networks and the loss of this repository run at VideoCrafter2's size on meta tensors, which have shapes
and no content. The bytes that are alive are counted at every moment, gradients in flight included. The
driver, the allocator and the kernels take more, for which `on_card` adds a guess.
"""
import sys
import weakref
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))
from lora import add_lora, target_names
from model import TEXT_LENGTH, VOCAB_SIZE, Z_CHANNELS, Base
from support.config import BaseConfig
from support.files import PARTS
from train import SubjectLoss

GIB = 2**30
CARDS = (8, 12, 16, 24, 48, 80)     # a card of "24 GB" has about 24 GiB
STILL, VIDEO = BaseConfig().training.frames, BaseConfig().sampling.frames


def on_card(counted):
    """Bytes counted -> bytes on a card. What this adds is a guess."""
    return 1.05 * counted + GIB


class LiveBytes(TorchDispatchMode):
    """While it is entered, `now` is how many bytes the tensors made since then hold, and `peak` the most."""
    now = peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = lambda tree: [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
        before = {x.untyped_storage()._cdata for x in tensors((args, kwargs))}
        for storage in {x.untyped_storage() for x in tensors(result)}:
            if storage._cdata not in before:
                self.count(storage.nbytes())
                weakref.finalize(storage, self.count, -storage.nbytes())
        return result

    def count(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)


class FusedAttention(torch.autograd.Function):
    """Keeps q, k, v, the output and a number per row, as a GPU's kernel does, but no table of scores."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3], device=q.device))
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


@cache
def meta_base(dtype=torch.bfloat16, lora=False):
    """VideoCrafter2 with its UNet in `dtype` -> base, the bytes of its weights, a LoRA's layers or none."""
    config = BaseConfig()
    with torch.device("meta"):
        networks = {part: PARTS[part](getattr(config, part)).eval().requires_grad_(False) for part in PARTS}
        networks["unet"].to(dtype)
        layers = add_lora(networks["unet"], config.training.rank) if lora else {}
    weights = sum(p.nbytes for network in networks.values() for p in network.parameters())
    return Base(config, "meta", **networks), weights, layers


def inputs(base, clips, frames):
    """-> random latents (B, 4, T, h, w), t (B,), context (B, L, D) on the base's device."""
    size, factor = base.config.sampling, base.config.vae.factor
    with base.device:
        z = torch.randn(clips, Z_CHANNELS, frames, size.height // factor, size.width // factor)
        return z, torch.full((clips,), 500), torch.randn(clips, TEXT_LENGTH, base.config.text_encoder.width)


@torch.no_grad()
def count_generating(clips, frames, dtype=torch.bfloat16):
    """Bytes at the peak of generating so many clips at once, with guidance."""
    base, weights, _ = meta_base(dtype)
    z, t, context = inputs(base, 2 * clips, frames)
    with torch.device("meta"):
        with LiveBytes() as calling:
            base.unet(z, t, t, context)
        with LiveBytes() as decoding:
            base.vae.decode(inputs(base, 4, 1)[0][:, :, 0])     # as Base.decode, four frames at once
    return weights + max(calling.peak, decoding.peak)


def training_step(base, layers, clips, frames, prior_frames):
    """-> SubjectLoss, and what it takes: clips of the subject, and as many of the prior unless 0 frames."""
    size = base.config.sampling
    with base.device:
        loss = SubjectLoss(base, torch.randn(1, base.config.text_encoder.width), layers, frames, size.fps)
        eps, t, _ = inputs(base, clips, frames)
        batch = [torch.randn(clips, 3, size.height, size.width),
                 torch.full((clips, TEXT_LENGTH), VOCAB_SIZE), t, eps]
    if prior_frames:
        z_0, t, context = inputs(base, clips, prior_frames)
        batch += [z_0, context, t, torch.randn_like(z_0)]
    return loss, batch


def count_training(frames, prior_frames, clips, checkpointing=False, dtype=torch.bfloat16):
    """Bytes at the peak of train.py: of a step, or of generating the prior before the first step."""
    base, weights, layers = meta_base(dtype, lora=True)
    loss, batch = training_step(base, layers, clips, frames, prior_frames)
    base.unet.grad_checkpointing = checkpointing
    with torch.device("meta"), LiveBytes() as step:
        sum(loss(*batch)).backward()
    optimizer = 2 * sum(p.nbytes for p in loss.parameters())    # AdamW's two numbers for each
    peak = weights + optimizer + sum(x.nbytes for x in batch) + step.peak       # which includes the gradients
    if not prior_frames:
        return peak
    at_once, length = (1, prior_frames) if prior_frames > frames else (8, 1)    # as generate_prior
    prior = inputs(base, base.config.training.num_prior, length)
    return max(peak + sum(x.nbytes for x in prior), count_generating(at_once, length, dtype))


def count_operations(frames, checkpointing=False):
    """-> TFLOP of the forward and the backward pass with one clip of the subject and one of the prior."""
    base, _, layers = meta_base(lora=True)
    loss, batch = training_step(base, layers, 1, frames, frames)
    base.unet.grad_checkpointing = checkpointing
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        total = sum(loss(*batch))
        forward = counter.get_total_flops()
        total.backward()
    return forward / 1e12, (counter.get_total_flops() - forward) / 1e12


def print_memory(command, count):
    """Prints a row: `count` gives the bytes that the command takes with so many clips."""
    one, four, eight = count(1), count(4), count(8)     # with one clip, the VAE may take more than the UNet
    more = (eight - four) / 4
    largest = [max(1, 4 + int((card * GIB - on_card(four)) // (1.05 * more))) for card in CARDS]
    fits = [str(n) if on_card(one) <= card * GIB else "–" for n, card in zip(largest, CARDS)]
    print(f"| `{command}` | {one / GIB:.1f} | {more / GIB:.2f} | {on_card(one) / GIB:.1f} | "
          f"{' | '.join(fits)} |", flush=True)


def main():
    print("| training step, 1 + 1 clips | forward, TFLOP | backward | backward with --grad_checkpointing |\n"
          "|---|---|---|---|")
    for frames in (STILL, VIDEO):
        (forward, backward), (_, longer) = count_operations(frames), count_operations(frames, True)
        print(f"| {frames} frames | {forward:.1f} | {backward:.1f} | {longer:.1f} |")

    # For meta tensors PyTorch would write the table of scores out, which a GPU does not.
    F.scaled_dot_product_attention = lambda q, k, v, *mask, **options: FusedAttention.apply(q, k, v)
    print("\n| command | counted GiB | each clip more | forecast on a card "
          + "".join(f"| {card} GB " for card in CARDS) + "|\n" + "|---" * (4 + len(CARDS)) + "|")
    base, _, _ = meta_base()
    originals = sum(base.unet.get_submodule(name).weight.nbytes for name in target_names(base.unet))
    print_memory("sample.py", lambda clips: originals + count_generating(clips, VIDEO))
    for flags, arguments in {"": (STILL, STILL), " --alpha 0": (STILL, 0), " --prior_motion": (STILL, VIDEO),
                             f" --frames {VIDEO}": (VIDEO, VIDEO)}.items():
        count = partial(count_training, *arguments)
        print_memory(f"train.py{flags}", count)
        print_memory(f"train.py{flags} --grad_checkpointing", partial(count, checkpointing=True))
    count = partial(count_training, STILL, STILL, checkpointing=True, dtype=torch.float32)
    print_memory("train.py --precision float32 --grad_checkpointing", count)
    preview = count_generating(2, VIDEO)
    print(f"\nA preview, two videos: {preview / GIB:.1f} GiB counted, {on_card(preview) / GIB:.1f} on a card")


if __name__ == "__main__":
    main()
