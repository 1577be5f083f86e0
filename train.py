"""Subject learning, Eq. 1-4 of CustomCrafter: photos become still videos; V* and a LoRA on the spatial attention learn them.

    python train.py                                               # the embedded subject, one process, CPU or GPU
    torchrun --nproc_per_node 4 train.py                          # the same on 4 processes (nccl on GPUs, gloo on CPUs)
    python train.py --images photos/dog --class_word dog          # your own photos; --base names another base

Writes OUT/subject.safetensors, which sample.py takes. What is trained: one vector V* and 96 pairs (A, B); all else is frozen.

Shapes: B subject clips per process and as many prior clips, T frames, L text tokens, D text width; latents z (B, 4, T, h, w).
"""
import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image
from tqdm import tqdm

from data import check_placeholder, crop, load_photos, noise_sample, prior_sample, still_video, subject_sample
from lora import Subject, add_lora, class_embedding, save_subject
from model import ROOT, TRAIN_STEPS, Z_CHANNELS, BadInput, Tokenizer, complete_or_absent, default_base, load_base, run_script
from sample import check_flags, ddim, fill_defaults, pick_precision, slug


def main():
    args = parse_args()
    rank, local_rank, world = (int(os.environ.get(key, default))
                               for key, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    cuda = torch.cuda.is_available()
    device = f"cuda:{local_rank}" if cuda else "cpu"
    if cuda and local_rank >= torch.cuda.device_count():
        raise BadInput(f"--nproc_per_node: is more than the {torch.cuda.device_count()} GPUs here; one process needs one GPU")
    if cuda:
        torch.cuda.set_device(local_rank)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")

    # Load the base and the photos.
    precision = pick_precision(args.precision, device)
    base = load_base(args.base, device, getattr(torch, precision))
    d, folder = fill_defaults(args, base), pick_photos(args, base)
    photos = load_photos(folder, max(d.height, d.width))
    words = f"{args.placeholder} {d.class_word}"
    out = args.out or Path("runs") / folder.resolve().name
    if rank == 0:
        print(f"base {args.base} ({base.config.name}), subject {folder}: {len(photos)} photos of {words}", flush=True)

    # Make or read the class prior, and encode it once: latents (n, 4, h, w), one context (n, L, D) each.
    prior_z, prior_context = encode_prior(args, d, base, rank, world) if d.alpha > 0 else (None, None)

    # Create what is trained: V*, started from the class word, and the LoRA.
    tokenizer = Tokenizer([args.placeholder])
    torch.manual_seed(args.seed)  # the same LoRA on every process
    v_star = nn.Parameter(class_embedding(base.text_encoder, d.class_word))
    lora = add_lora(base.unet, d.rank)
    params = [v_star, *(p for layer in lora.values() for p in (layer.lora_A, layer.lora_B))]
    optimizer = torch.optim.AdamW(params, lr=d.lr, weight_decay=d.weight_decay)
    base.unet.grad_checkpointing = args.grad_checkpointing

    def save(steps):
        names = ("lr", "weight_decay", "batch_size", "alpha", "frames", "height", "width", "fps")
        settings = {name: getattr(d, name) for name in names} | {
            "processes": world, "seed": args.seed, "precision": precision, "images": str(folder), "photos": len(photos)}
        save_subject(out / "subject.safetensors", Subject(
            args.placeholder, d.class_word, d.rank, base.config.name, base.config.fingerprint, steps, settings=settings,
            lora={name: (layer.lora_A, layer.lora_B) for name, layer in lora.items()}, v_star=v_star))

    B, mean_loss = d.batch_size, 0.0
    bar = tqdm(range(d.train_steps), desc="train", unit="step", disable=rank > 0)
    for step in bar:
        # Take the samples of this process. Their content follows from their number, so any number of processes sees the same.
        index = [(step * world + rank) * B + b for b in range(B)]
        frames, captions = zip(*(subject_sample(photos, i, args.seed, d.height, d.width, words) for i in index))

        # Encode one frame of each still video, and the captions with V* in them.
        with torch.no_grad():
            z_0 = still_video(base.vae.encode(torch.stack(frames).to(device)), d.frames)    # (B, 4, T, h, w)
        context = base.text_encoder(tokenizer(captions).to(device), v_star)                 # (B, L, D)
        if d.alpha > 0:
            which = [prior_sample(len(prior_z), i, args.seed) for i in index]
            z_0 = torch.cat([z_0, still_video(prior_z[which], d.frames)])                   # (2B, 4, T, h, w)
            context = torch.cat([context, prior_context[which]])                            # (2B, L, D)

        # Add noise, predict it, compare.
        numbers = [2 * i for i in index] + [2 * i + 1 for i in index]
        t, eps = zip(*(noise_sample(n, args.seed, z_0.shape[1:], TRAIN_STEPS) for n in numbers[:len(z_0)]))
        t, eps = torch.tensor(t, device=device), torch.stack(eps).to(device)
        fps = torch.full_like(t, d.fps)
        z_t = base.schedule.add_noise(z_0, t, eps)                                          # Eq. 1, forward process
        error = (base.unet(z_t, t, fps, context) - eps).pow(2).mean(dim=(1, 2, 3, 4))       # Eq. 1, one number a clip
        loss = error[:B].mean()
        if d.alpha > 0:
            loss = loss + d.alpha * error[B:].mean()                                        # Eq. 3 and 4

        # Step. One all-reduce holds the gradients of all that is trained, and the loss to print.
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        loss = average_over_processes(params, loss.detach(), world)
        optimizer.step()

        # Log and save.
        if step % 10 == 0 or step + 1 == d.train_steps:
            mean_loss = loss.item() if step == 0 else 0.8 * mean_loss + 0.2 * loss.item()
            if not loss.isfinite():
                raise BadInput(f"--lr {d.lr}: the loss is not finite at step {step}; try a lower one "
                               f"(the last save stays in {out})")
            bar.set_postfix(loss=f"{mean_loss:.4f}")
        if rank == 0 and ((step + 1) % args.save_every == 0 or step + 1 == d.train_steps):
            save(step + 1)

    if rank == 0:
        print(f"wrote {out / 'subject.safetensors'}")
    if world > 1:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Mechanics


def average_over_processes(params, loss, world):
    """Replaces every gradient, and returns the loss, by the mean over processes.

    By hand rather than by DistributedDataParallel: that would first broadcast the frozen billion of parameters, and what
    there is to send afterwards is a few megabytes.
    """
    if world == 1:
        return loss
    flat = torch.cat([loss.view(1), *(p.grad.flatten() for p in params)])
    dist.all_reduce(flat)
    loss, *grads = (flat / world).split([1, *(p.numel() for p in params)])
    for p, grad in zip(params, grads):
        p.grad.copy_(grad.view_as(p))
    return loss[0]


def encode_prior(args, d, base, rank, world):
    """The class prior -> latents (n, 4, h, w) and contexts (n, L, D), on the base's device."""
    caption = f"a {d.class_word}"
    folder = args.prior
    if folder is None:
        origin = f"{base.config.name}-{base.config.fingerprint[:6]}-{d.height}x{d.width}"
        folder = Path("runs") / "prior" / f"{origin}-{slug(d.class_word)}"
        generate_prior(folder, caption, d, base, rank, world)
    pictures = load_photos(folder, max(d.height, d.width), flag="--prior")[:d.num_prior]
    with torch.no_grad():
        z = torch.cat([base.vae.encode(crop(p.image, d.height, d.width)[None].to(base.device)) for p in pictures])
        captions, tokenizer = [p.caption or caption for p in pictures], Tokenizer()
        rows = {c: base.text_encoder(tokenizer([c]).to(base.device))[0] for c in dict.fromkeys(captions)}
    return z, torch.stack([rows[c] for c in captions])


def generate_prior(folder, caption, d, base, rank, world, batch=8):
    """Fills `folder` with d.num_prior single pictures that the base itself makes of the class; those there already stay.

    The paper takes 200 pictures from LAION-400M; a folder of such pictures goes to --prior.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [k for k in range(d.num_prior) if not (folder / f"{k:04d}.png").exists()]
    tokens = Tokenizer()([caption, ""]).to(base.device)
    with torch.no_grad():
        context, uncond = base.text_encoder(tokens).split(1)
    mine = missing[rank::world]
    for numbers in tqdm([mine[i:i + batch] for i in range(0, len(mine), batch)], desc="prior", unit="batch", disable=rank > 0):
        generators = [torch.Generator().manual_seed(k) for k in numbers]
        shape = (Z_CHANNELS, 1, d.height // 8, d.width // 8)
        noise = lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(base.device)
        fps = torch.full((len(numbers),), d.fps, device=base.device)
        z_0 = ddim(base.unet, base.schedule, noise(), noise, context.expand(len(numbers), -1, -1), uncond, fps,
                   d.steps, d.cfg, d.eta)
        for k, picture in zip(numbers, base.decode(z_0)):
            with complete_or_absent(folder / f"{k:04d}.png") as temporary:
                Image.fromarray(picture[0].numpy()).save(temporary, format="png")
    if world > 1:
        dist.barrier()


def pick_photos(args, base):
    """The folder of photos: --images, else the base's own default subject."""
    if args.photos:
        if not args.class_word:
            raise BadInput("--class_word: is needed with --images; name what the photos show, such as dog")
        return Path(args.photos)
    return Path(os.path.relpath(ROOT / base.config.defaults.photos))


def parse_args():
    p = argparse.ArgumentParser(description="Learn a subject from photos (CustomCrafter, Eq. 1-4).",
                                epilog="Flags left out take the base's own defaults, from its config.json.")
    p.add_argument("--base", type=Path, default=default_base(), help="base folder (default: %(default)s)")
    p.add_argument("--images", dest="photos", default="",
                   help="folder with 4 to 6 photos; NAME.txt beside NAME.jpg is its caption")
    p.add_argument("--class_word", default="", help="what the subject is, such as dog; V* starts from its embedding")
    p.add_argument("--placeholder", default="V*", help="how prompts name the subject (default: %(default)s)")
    p.add_argument("--prior", type=Path, help="folder with pictures of the class; left out: the base makes them, once")
    p.add_argument("--num_prior", type=int, help="number of prior pictures (paper: 200)")
    p.add_argument("--alpha", type=float, help="weight of the prior loss, 0 for none (paper: 1.0)")
    p.add_argument("--rank", type=int, help="rank of the LoRA")
    p.add_argument("--lr", type=float, help="learning rate of AdamW (paper: 3e-5)")
    p.add_argument("--weight_decay", type=float, help="weight decay of AdamW (paper: 1e-2)")
    p.add_argument("--steps", dest="train_steps", type=int, help="training steps (paper: 10,000)")
    p.add_argument("--batch_size", type=int, help="subject clips per process and step, each with one prior clip")
    p.add_argument("--frames", type=int, help="times each photo is repeated into a still video (paper: N = 16)")
    p.add_argument("--height", type=int, help="height in pixels")
    p.add_argument("--width", type=int, help="width in pixels")
    p.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto",
                   help="of the frozen UNet; V* and LoRA are float32. auto: bfloat16 on a GPU that has it, float32 on a CPU")
    p.add_argument("--grad_checkpointing", action="store_true", help="less memory for a third more time")
    p.add_argument("--seed", type=int, default=0, help="of crops, captions, noise and the LoRA's start (default: %(default)s)")
    p.add_argument("--out", type=Path, help="folder for subject.safetensors (default: runs/ and the photo folder's name)")
    p.add_argument("--save_every", type=int, default=500, help="steps between saves (default: %(default)s)")
    args = p.parse_args()
    check_placeholder(args.placeholder)
    check_flags(args, num_prior=(1, 100_000), alpha=(0, 1000), rank=(1, 1024), lr=(0, 1), weight_decay=(0, 1),
                train_steps=(1, 10**7), batch_size=(1, 1024), frames=(1, 1024), height=(8, 8192), width=(8, 8192),
                seed=(0, 2**31), save_every=(1, 10**7))
    return args


if __name__ == "__main__":
    run_script(main)
