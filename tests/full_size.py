"""The whole path at VideoCrafter2's full size, 320x512 and 16 frames, on random weights, one step of each.

    python tests/full_size.py --images PHOTOS          # about half an hour on 2 CPU cores; 20 GB of memory, 12 GB of disk
    python tests/full_size.py --estimate               # seconds: what a training step should take on a GPU, without one

Not part of the test suite. It writes a checkpoint with the official names and shapes, runs convert_ckpt.py,
train.py and sample.py as a person would, and prints the time and the peak memory of each. The video that
comes out is noise.
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
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from lora import add_lora
from model import BaseConfig, TextEncoder, UNet, VAE


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


class FusedAttention(torch.autograd.Function):
    """Keeps for the backward pass what a fused attention keeps: q, k, v and the output, but no scores."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("only the forward pass is counted")


def estimate_training(config, clips=2):
    """Peak bytes of a training step on a GPU, reckoned on meta tensors: {part: bytes}; one subject and one
    prior clip.

    Counted are weights (UNet bf16, text tower and VAE float32), what is kept of a forward pass for the
    backward one (a tensor kept by several layers counts once), and with checkpointing every layer's input
    and the largest layer's own. Not counted: gradients in flight, the CUDA context, and what the allocator
    loses.
    """
    F.scaled_dot_product_attention, plain = FusedAttention.apply, F.scaled_dot_product_attention
    with torch.device("meta"):
        unet, d = UNet(config.unet).bfloat16().eval().requires_grad_(False), config.defaults
        others = [TextEncoder(config.text), VAE(config.vae)]
        add_lora(unet, d.rank)
        z = torch.empty(clips, 4, d.frames, d.height // 8, d.width // 8)
        context = torch.empty(clips, 77, config.unet.context_dim, requires_grad=True)
        t = torch.empty(clips, dtype=torch.long)
    size = lambda tensors: sum(x.numel() * x.element_size() for x in tensors)
    weights = {p.untyped_storage()._cdata for p in unet.parameters()}
    inputs, layers, everything = {}, [], {}

    def run(block, x, emb, context):
        for layer in block:
            kept = {}

            def keep(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in weights:
                    kept[storage._cdata] = storage.nbytes()
                    alive.append(tensor)  # so that its number is not given to another
                return tensor

            inputs[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            alive.append(x)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                x = layer(x, emb, context)
            layers.append(sum(kept.values()))
            everything.update(kept)
        return x

    alive, unet.run = [], run
    unet(z, t, t, context)
    F.scaled_dot_product_attention = plain
    trained = size(p for p in unet.parameters() if p.requires_grad)
    fixed = {"UNet": size(unet.parameters()) - trained, "text tower and VAE": sum(size(part.parameters()) for part in others),
             "LoRA, its gradients and AdamW": 4 * trained}
    return fixed | {"activations": sum(everything.values())}, fixed | {"activations": sum(inputs.values()) + max(layers)}


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--estimate", action="store_true", help="only reckon the memory of a training step on a GPU")
    p.add_argument("--images", type=Path, help="folder of photos; they stand for the class prior as well")
    p.add_argument("--class_word", default="dog")
    p.add_argument("--source", choices=["float16", "float32"], default="float16", help="what the checkpoint holds")
    p.add_argument("--dir", type=Path, help="where to put the files (default: the system's temporary folder)")
    p.add_argument("--convert_only", action="store_true")
    args = p.parse_args()
    if args.estimate:
        for how, parts in zip(("plain", "--grad_checkpointing"), estimate_training(BaseConfig())):
            print(f"estimate of a training step in bf16, {how}: {sum(parts.values()) / 2**30:.1f} GB: "
                  + ", ".join(f"{name} {count / 2**30:.2f}" for name, count in parts.items()))
        sys.exit()
    if not args.images:
        p.error("--images: is needed")
    with tempfile.TemporaryDirectory(dir=args.dir) as temporary:
        folder = Path(temporary)
        # In a process of its own: a child's peak, as the system counts it, includes its parent's at the
        # time of the fork.
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
