"""Subject learning, Eq. 1-4 of CustomCrafter: photos become still videos; V* and a LoRA on the spatial attention learn them.

    python train.py                                               # the embedded subject, one process, CPU or GPU
    torchrun --nproc_per_node 4 train.py                          # the same on 4 processes (nccl on GPUs, gloo on CPUs)
    python train.py --images photos/dog --class_word dog          # your own photos; --base names another base
    python train.py --resume latest                               # goes on where a stopped run was

Writes OUT/subject.safetensors, which sample.py takes, OUT/step-*/ (older saves, with what resuming needs), OUT/log.jsonl and
OUT/preview.png. What is trained: one vector V* and 96 pairs (A, B); all else is frozen.

Shapes: B subject clips per process and as many prior clips, T frames, L text tokens, D text width; latents z (B, 4, T, h, w).
"""
import json
import os
import shutil
import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

from data import load_photos, load_prior, noise_sample, prior_sample, rescaled_sample, still_video, subject_sample
from lora import MAX_RANK, LiveLoRA, Subject, add_updates, check_placeholder, class_embedding, rare_embedding, save_subject
from model import (ROOT, TRAIN_STEPS, BadInput, FlagParser, Tokenizer, complete_or_absent, default_base, load_base, load_config, one_line,
                   only_writer, run_script)
from sample import (check_flags, default_prompt, fill_defaults, generate, labelled, peak_memory, pick_precision, slug,
                    write_mp4)


# What the other methods' authors set, where it is not the base's own default.
PUBLISHED = {"customcrafter": {},
             "custom_diffusion": {"lr": 8e-5, "train_steps": 500, "alpha": 1.0},
             "dreamvideo": {"lr": 1e-5, "train_steps": 4000, "word_lr": 1e-4, "word_steps": 3000, "weight_decay": 0.0, "alpha": 0.0}}


def main():
    args = parse_args()
    rank, local_rank, world = (int(os.environ.get(key, default))
                               for key, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    cuda = torch.cuda.is_available()
    device = f"cuda:{local_rank}" if cuda else "cpu"
    if cuda and local_rank >= torch.cuda.device_count():
        raise BadInput(f"--nproc_per_node: is more than the {torch.cuda.device_count()} GPUs here; one process needs one GPU")
    config = load_config(args.base / "config.json")
    d, folder = fill_defaults(args, config), pick_photos(args, config)
    out, last_save = pick_run(args, folder)
    if cuda:
        torch.cuda.set_device(local_rank)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")

    # Load the base and the photos.
    precision = pick_precision(args.precision, device)
    base = load_base(args.base, device, getattr(torch, precision))
    photos = load_photos(folder, max(d.height, d.width))
    words = f"{args.placeholder} {d.class_word}"
    if rank == 0:
        print(f"base {args.base} ({base.config.name}), subject {folder}: {len(photos)} photos of {words}", flush=True)

    # Make or read the class prior, and encode it once: latents (n, 4, T, h, w), one context (n, L, D) each.
    prior_z, prior_context = encode_prior(args, d, base, rank, world) if d.alpha > 0 else (None, None)

    # Create what is trained: V*, started from the class word, and the LoRA.
    tokenizer = Tokenizer([args.placeholder])
    torch.manual_seed(args.seed)  # the same LoRA on every process
    v_star = nn.Parameter(rare_embedding(base.text_encoder) if args.method == "custom_diffusion" else
                          class_embedding(base.text_encoder, d.class_word))
    kind, layers = add_updates(base.unet, args.method, d.rank, args.targets)
    subject = Subject(args.placeholder, d.class_word, d.rank, base.config.name, base.config.fingerprint, steps=0, v_star=v_star,
                      method=args.method, **{kind: {name: layer.tensors() for name, layer in layers.items()}})
    params = list(subject.tensors().values())
    optimizer = torch.optim.AdamW([{"params": params[:1], "lr": args.word_lr or d.lr}, {"params": params[1:]}],
                                  lr=d.lr, weight_decay=d.weight_decay)
    base.unet.grad_checkpointing = args.grad_checkpointing
    if args.compile:
        base.unet.compile()

    # Go on from a save, if asked. Everything random follows from the number of a sample, so a run's state is short.
    B = d.batch_size
    subject.settings = {name: getattr(d, name) for name in ("rank", "lr", "weight_decay", "alpha", "frames", "height", "width", "fps")} | {
        "clips_a_step": world * B * d.grad_accum, "seed": args.seed, "precision": precision, "images": str(folder),
        "photos": len(photos), "placeholder": args.placeholder, "class_word": d.class_word,
        "method": args.method, "targets": args.targets, "word_steps": args.word_steps, "word_lr": args.word_lr}
    first = load_state(last_save, subject, optimizer, d.train_steps) if last_save else 0
    take = rescaled_sample if args.method == "custom_diffusion" else subject_sample

    with only_writer(out, rank, (".tmp-*", "previews/.tmp-*")), stop_signals() as signals, Log(out / "log.jsonl", first, d.train_steps, rank) as log:
        for step in range(first + 1, d.train_steps + 1):
            if args.word_steps:  # DreamVideo: first V* alone, then the adapters alone
                for p in params:
                    p.requires_grad_((p is v_star) == (step <= args.word_steps))
            loss = torch.zeros(2, device=device)
            for part in range(d.grad_accum):
                # Take samples. Their content follows from their number, so any number of processes sees the same ones.
                start = ((step - 1) * d.grad_accum + part) * world * B + rank * B
                index = range(start, start + B)
                frames, captions, weight = zip(*(take(photos, i, args.seed, d.height, d.width, words) for i in index))

                # Encode one frame of each still video, and the captions with V* in them.
                with torch.no_grad():
                    z_0 = still_video(base.vae.encode(torch.stack(frames).to(device)), d.frames)    # (B, 4, T, h, w)
                context = base.text_encoder(tokenizer(captions).to(device), v_star)                 # (B, L, D)
                if d.alpha > 0:
                    which = [prior_sample(len(prior_z), i, args.seed) for i in index]
                    z_0 = torch.cat([z_0, prior_z[which].expand(-1, -1, d.frames, -1, -1)])         # (2B, 4, T, h, w)
                    context = torch.cat([context, prior_context[which]])                            # (2B, L, D)

                # Add noise, predict it, compare.
                numbers = [2 * i for i in index] + [2 * i + 1 for i in index]
                t, eps = zip(*(noise_sample(n, args.seed, z_0.shape[1:], TRAIN_STEPS) for n in numbers[:len(z_0)]))
                t, eps = torch.tensor(t, device=device), torch.stack(eps).to(device)
                fps = torch.full_like(t, d.fps)
                z_t = base.schedule.add_noise(z_0, t, eps)                                          # Eq. 1, forward process
                error = (base.unet(z_t, t, fps, context) - eps).pow(2).mean(dim=(1, 2))             # Eq. 1, (B or 2B, h, w)
                weight = torch.stack(weight).to(device)  # all 1, but where Custom Diffusion leaves a part of the picture out
                subject_loss = (weight * error[:B]).mean()
                prior_loss = error[B:].mean() if d.alpha > 0 else torch.zeros((), device=device)
                ((subject_loss + d.alpha * prior_loss) / d.grad_accum).backward()                   # Eq. 3 and 4
                loss += torch.stack([subject_loss, prior_loss]).detach() / d.grad_accum

            # Step. One all-reduce holds the gradients of all that is trained, the losses, and the wish to stop.
            subject_loss, prior_loss, stop, norm = average_over_processes(params, loss, bool(signals), world)
            if not np.isfinite(subject_loss + prior_loss + norm):
                raise BadInput(f"--lr {d.lr}: the loss or its gradient is not finite at step {step}; the last good save is "
                               f"{newest_save(out) or 'none'}, try a lower rate from there")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # Log, look, save.
            log(step, loss=subject_loss, prior_loss=prior_loss, grad_norm=norm, lr=d.lr)
            subject.steps = step
            if rank == 0 and d.preview_every and (step % d.preview_every == 0 or step == d.train_steps):
                preview(out, step, base, d, subject, LiveLoRA(layers.values()))
            if rank == 0 and (step % d.save_every == 0 or step == d.train_steps or stop):
                save(out, subject, optimizer, args.keep_last)
            if stop:
                break

    if rank == 0 and stop:
        print(f"stopped after step {step} of {d.train_steps}; the same command with --resume {out} goes on")
    if rank == 0:
        print(f"wrote {out / 'subject.safetensors'}")
    if world > 1:
        dist.destroy_process_group()


def average_over_processes(params, losses, stop, world):
    """Replaces every gradient by its mean over processes.

    Returns the mean of the two losses, whether any process wants to stop, and the norm of the gradient.

    By hand rather than by DistributedDataParallel: that would first broadcast the frozen billion of parameters, and what
    there is to send afterwards is a few megabytes.
    """
    numbers = torch.cat([losses, losses.new_tensor([stop])])
    params = [p for p in params if p.grad is not None]
    if world > 1:
        flat = torch.cat([numbers, *(p.grad.flatten() for p in params)])
        dist.all_reduce(flat)
        numbers, *grads = (flat / world).split([3, *(p.numel() for p in params)])
        for p, grad in zip(params, grads):
            p.grad.copy_(grad.view_as(p))
    norm = torch.stack([p.grad.norm() for p in params]).norm()
    *losses, stop, norm = torch.cat([numbers, norm[None]]).tolist()
    return *losses, stop > 0, norm


# ---------------------------------------------------------------------------------------------------------------------
# The class prior


def encode_prior(args, d, base, rank, world):
    """The class prior -> latents (n, 4, T, h, w), T = 1 if all of it is still, and contexts (n, L, D), on the base's device."""
    words, folder = f"a {d.class_word}", args.prior
    if folder is None:
        kind = f"{d.frames}-frames" if args.prior_motion else "still"
        origin = f"{base.config.name}-{base.config.fingerprint[:6]}-{d.height}x{d.width}-{kind}"
        folder = Path("runs") / "prior" / f"{origin}-{slug(d.class_word)}"
        generate_prior(folder, words, d, base, rank, world, d.frames if args.prior_motion else 1)
    prior, tokenizer = load_prior(folder, d.num_prior, d.frames, d.height, d.width), Tokenizer()
    with torch.no_grad():
        z = [base.vae.encode(video.to(base.device)).transpose(0, 1) for video, _ in prior]           # (4, 1 or T, h, w)
        captions = [caption or words for _, caption in prior]
        rows = {c: base.text_encoder(tokenizer([c]).to(base.device))[0] for c in dict.fromkeys(captions)}
    frames = max(x.shape[1] for x in z)
    return torch.stack([x.expand(-1, frames, -1, -1) for x in z]), torch.stack([rows[c] for c in captions])


def generate_prior(folder, caption, d, base, rank, world, frames, batch=8):
    """Fills `folder` with d.num_prior pictures, or clips of several frames, that the base itself makes of the class.

    Those there already stay. The paper takes 200 pictures from LAION-400M; a folder of such pictures goes to --prior.
    """
    ending = "mp4" if frames > 1 else "png"
    mine = [k for k in range(rank, d.num_prior, world) if not (folder / f"{k:04d}.{ending}").exists()]
    batch = max(1, batch // frames)
    with only_writer(folder, rank):
        for numbers in tqdm([mine[i:i + batch] for i in range(0, len(mine), batch)], desc="prior", unit="batch", disable=rank > 0):
            videos = generate(base, [caption] * len(numbers), numbers, settings=replace(d, frames=frames)).numpy()
            for k, video in zip(numbers, videos):
                with complete_or_absent(folder / f"{k:04d}.{ending}") as temporary:
                    if frames > 1:
                        write_mp4(temporary, video, d.save_fps, quality=10)
                    else:
                        Image.fromarray(video[0]).save(temporary, format="png")
        if world > 1:
            dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Saving, resuming, stopping


def pick_run(args, photos):
    """Where the run writes, and the save it starts from or None. A finished run is never written over."""
    default = Path("runs") / photos.resolve().name
    if args.resume:
        if args.resume != "latest":
            out = Path(args.resume)
            out, chosen = (out.parent, out) if (out / "state.pt").exists() else (out, newest_save(out))
            if args.out and args.out != out and not newest_save(args.out):
                out = args.out  # a new branch of an old run
            elif chosen != newest_save(out):
                raise BadInput(f"--resume {chosen}: {out} has newer saves; name a new --out for a branch from here")
        else:
            outs = [args.out] if args.out else [default, *default.parent.glob(f"{default.name}-[0-9]*")]
            out = max(outs, key=lambda o: newest_save(o).stat().st_mtime if newest_save(o) else 0)
            chosen = newest_save(out)
        if not chosen:
            raise BadInput(f"--resume {args.resume}: no save is under {out}; leave it out to start anew")
        return out, chosen
    if args.out and newest_save(args.out):
        raise BadInput(f"--out {args.out}: holds a run; --resume {args.out} goes on with it, another --out starts anew")
    names = [default, *(default.with_name(f"{default.name}-{n}") for n in range(2, 10_000))]
    return args.out or next(name for name in names if not newest_save(name)), None


def newest_save(out):
    return max(out.glob("step-[0-9]*"), default=None)


def save(out, subject, optimizer, keep_last):
    """OUT/step-N/ with the subject and the optimizer's state, complete or absent; OUT/subject.safetensors is the newest one."""
    save = out / f"step-{subject.steps:06d}"
    with complete_or_absent(save) as folder:
        folder.mkdir()
        save_subject(folder / "subject.safetensors", subject)
        torch.save({"step": subject.steps, "settings": subject.settings, "optimizer": optimizer.state_dict()}, folder / "state.pt")
    with complete_or_absent(out / "subject.safetensors") as temporary:
        shutil.copyfile(save / "subject.safetensors", temporary)
    for old in sorted(out.glob("step-[0-9]*"))[:-keep_last]:
        shutil.rmtree(old.rename(old.with_name(f".tmp-{os.getpid()}-{old.name}")))


def load_state(folder, subject, optimizer, steps):
    """Puts a save's numbers into `subject` and `optimizer`. Returns its step. Raises BadInput if it is another run's."""
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        tensors = load_file(folder / "subject.safetensors")
    except Exception as error:  # pickle, zip, safetensors and the disk each raise their own
        raise BadInput(f"--resume {folder}: not a readable save ({one_line(error)}); an older step-* folder may be") from None
    for name, value in subject.settings.items():
        if state["settings"].get(name) != value:
            flag = {"clips_a_step": "batch_size times --grad_accum times processes", "photos": "images"}.get(name, name)
            raise BadInput(f"--{flag}: is {value}, and was {state['settings'].get(name)} in the run that {folder} is from")
    if state["step"] >= steps:
        raise BadInput(f"--steps {steps}: {folder} has done {state['step']} already; ask for more to go on")
    with torch.no_grad():
        for name, p in subject.tensors().items():
            p.copy_(tensors[name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


@contextmanager
def stop_signals():
    """Gives a list that fills when SIGTERM or Ctrl-C comes; the loop looks at it after each step. A second Ctrl-C ends at once."""
    came = []

    def note(number, frame):
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Watching


class Log:
    """Rank 0's progress bar, and log.jsonl with one line a step: loss, prior loss, gradient norm, lr, seconds, peak memory in GB."""

    def __init__(self, path, first, steps, rank):
        self.file, self.rank = None, rank
        if rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            with complete_or_absent(path) as temporary:  # steps after the save are done again, and logged again
                temporary.write_text("".join(line for line in lines[:first] if line.endswith("\n")))
            self.file = open(path, "a", buffering=1)
        self.bar = tqdm(desc="train", unit="step", initial=first, total=steps, disable=rank > 0)
        self.time, self.mean = time.time(), None

    def __call__(self, step, **numbers):
        if self.rank > 0:
            return
        seconds, self.time = time.time() - self.time, time.time()
        line = {"step": step, **numbers, "seconds": round(seconds, 3), "memory": round(peak_memory(), 2)}
        self.file.write(json.dumps(line) + "\n")
        self.mean = numbers["loss"] if self.mean is None else 0.95 * self.mean + 0.05 * numbers["loss"]
        self.bar.set_postfix(loss=f"{self.mean:.4f}", refresh=False)
        self.bar.update()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()
        if self.file:
            self.file.close()


def preview(out, step, base, d, subject, strength, seeds=(0, 1), width=96):
    """The default prompt with the same seeds at every call: previews/step-N.png, and all steps so far in preview.png.

    Too many steps freeze the motion; here a person sees it come, and can take an earlier save.
    """
    prompt = default_prompt(d, [subject])
    videos = generate(base, [prompt] * len(seeds), seeds, [subject], d, strength=strength).numpy()
    strength.set(1.0)
    size = (width, round(width * d.height / d.width))
    shown = np.linspace(0, d.frames - 1, 4).round().astype(int)
    images = [Image.fromarray(frame).resize(size) for video in videos for frame in video[shown]]
    row = labelled(images, f"step {step}: {prompt}")
    with complete_or_absent(out / "previews" / f"step-{step:06d}.png") as temporary:
        row.save(temporary)
    rows = [np.asarray(Image.open(path)) for path in sorted((out / "previews").glob("step-*.png"))]
    with complete_or_absent(out / "preview.png") as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary)


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def pick_photos(args, config):
    """The folder of photos: --images, else the base's own default subject."""
    if args.photos:
        if not args.class_word.strip():
            raise BadInput("--class_word: is needed with --images; name what the photos show, such as dog")
        return Path(args.photos)
    return Path(os.path.relpath(ROOT / config.defaults.photos))


def parse_args():
    p = FlagParser(description="Learn a subject from photos (CustomCrafter, Eq. 1-4).",
                                epilog="Flags left out take the base's own defaults, from its config.json.")
    p.add_argument("--base", type=Path, default=default_base(), help="base folder (default: %(default)s)")
    p.add_argument("--images", dest="photos", default="",
                   help="folder with 4 to 6 photos; NAME.txt beside NAME.jpg is its caption")
    p.add_argument("--class_word", default="", help="what the subject is, such as dog; V* starts from its embedding")
    p.add_argument("--placeholder", default="V*", help="how prompts name the subject (default: %(default)s)")
    p.add_argument("--method", choices=list(PUBLISHED), default="customcrafter",
                   help="how to learn: the paper's way, or one of those it compares with, at their published settings, which are for "
                        "large bases; sample those with --lambdas \"1*50\" (default: %(default)s)")
    p.add_argument("--targets", choices=["all", "cross"], default="all", help="LoRA on all spatial attention, or on the cross-attention "
                                                                           "alone (paper, Table 2) (default: %(default)s)")
    p.add_argument("--word_steps", type=int, help="dreamvideo: of --steps, the first that learn V* alone (published: 3,000)")
    p.add_argument("--word_lr", type=float, help="learning rate of V*, if not --lr (dreamvideo, published: 1e-4)")
    p.add_argument("--prior", type=Path, help="folder with pictures or videos of the class; left out: the base makes pictures, once")
    p.add_argument("--num_prior", type=int, help="number of prior pictures or videos (paper: 200)")
    p.add_argument("--prior_motion", action="store_true", help="let the base make moving clips for the prior, not pictures")
    p.add_argument("--alpha", type=float, help="weight of the prior loss, 0 for none (paper: 1.0)")
    p.add_argument("--rank", type=int, help="rank of the LoRA")
    p.add_argument("--lr", type=float, help="learning rate of AdamW (paper: 3e-5)")
    p.add_argument("--weight_decay", type=float, help="weight decay of AdamW (paper: 1e-2)")
    p.add_argument("--steps", dest="train_steps", type=int, help="training steps (paper: 10,000)")
    p.add_argument("--batch_size", type=int, help="subject clips per process and step, each with one prior clip")
    p.add_argument("--grad_accum", type=int, help="batches per process and step, for less memory at the same clips a step")
    p.add_argument("--frames", type=int, help="times each photo is repeated into a still video (paper: N = 16)")
    p.add_argument("--height", type=int, help="height in pixels")
    p.add_argument("--width", type=int, help="width in pixels")
    p.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto",
                   help="of the frozen UNet; V* and LoRA are float32. auto: bfloat16 on a GPU that has it, float32 on a CPU")
    p.add_argument("--grad_checkpointing", action="store_true", help="less memory for a third more time")
    p.add_argument("--compile", action="store_true", help="torch.compile the UNet: slow to start, then faster; the same up to rounding")
    p.add_argument("--seed", type=int, default=0, help="of crops, captions, noise and the LoRA's start (default: %(default)s)")
    p.add_argument("--out", type=Path, help="folder for subject.safetensors (default: runs/ and the photo folder's name)")
    p.add_argument("--save_every", type=int, help="steps between saves")
    p.add_argument("--keep_last", type=int, default=3, help="number of saves that stay (default: %(default)s)")
    p.add_argument("--preview_every", type=int, help="steps between previews, 0 for none")
    p.add_argument("--resume", default="", help="go on with a run: its folder, one of its step-* folders, or latest")
    args = p.parse_args()
    check_placeholder(args.placeholder)
    if args.targets != "all" and args.method != "customcrafter":
        raise BadInput(f"--targets {args.targets}: belongs to --method customcrafter; leave it out")
    if args.method != "dreamvideo" and args.word_steps is not None:
        raise BadInput("--word_steps: belongs to --method dreamvideo; leave it out")
    for flag, value in PUBLISHED[args.method].items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    check_flags(args, word_steps=(0, 10**7), word_lr=(0, 1), num_prior=(1, 100_000), alpha=(0, 1000), rank=(1, MAX_RANK), lr=(0, 1),
                weight_decay=(0, 1), train_steps=(1, 10**7), batch_size=(1, 1024), frames=(1, 1024), height=(8, 8192), width=(8, 8192),
                seed=(0, 2**31), grad_accum=(1, 1024),
                save_every=(1, 10**7), keep_last=(1, 10**7), preview_every=(0, 10**7))
    return args


if __name__ == "__main__":
    run_script(main)
