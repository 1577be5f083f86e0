"""Algorithm 1 of CustomCrafter: DDIM with a LoRA strength that depends on the step, small while motion forms, large after.

    python sample.py --lambda_s 0.4 --lambda_l 0.8 --K 5                  # the subject last trained, or the committed one
    python sample.py --subject runs/dog/subject.safetensors --prompt "a V* dog running on the grass" --num 4
    python sample.py --subject none --prompt "a red star moving left on the sea"          # the base alone

Writes outputs/NAME.mp4 and .gif, and beside them NAME.json with all it takes to make them again.

Shapes: B clips, T frames, L text tokens, D text width; latents z (B, 4, T, h, w), 8 times smaller than pixels.
"""
import argparse
import json
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from lora import MergedLoRA, load_subject
from model import (ROOT, TEXT_LENGTH, TRAIN_STEPS, Z_CHANNELS, BadInput, Tokenizer, complete_or_absent, default_base, load_base,
                   run_script)


def ddim_steps(schedule, steps, eta):
    """The table of a DDIM run, noisiest step first: t, alpha_bar and scale at t and at the step after it, sigma; each (steps,).

    For 50 steps, t = 981, 961, ... 1. Upstream lvdm/models/utils_diffusion.py, `make_ddim_timesteps`.
    """
    t = torch.arange(0, TRAIN_STEPS, TRAIN_STEPS // steps)[:steps] + 1
    # Upstream quirk: what follows the last step is level 0, not a clean latent; the normal form is alpha_bar = 1 there.
    after = torch.cat([torch.tensor([0]), t[:-1]])
    a, a_after = schedule.alpha_bar[t], schedule.alpha_bar[after]
    sigma = eta * ((1 - a_after) / (1 - a) * (1 - a / a_after)).sqrt()      # Song et al. 2021, Eq. 16
    return [x.flip(0) for x in (t, a, schedule.scale[t], a_after, schedule.scale[after], sigma)]


@torch.no_grad()
def ddim(unet, schedule, z, noise, context, uncond, fps, steps, cfg, eta, strength=None, lambdas=None, progress=iter):
    """Algorithm 1. z (B, 4, T, h, w) standard normal -> z_0 of the same shape.

    noise: function of no arguments -> standard normal like z, called once a step if eta > 0. context (B, L, D) and uncond
    (B or 1, L, D): the prompts and the empty (or negative) prompt. fps (B,). strength: a MergedLoRA, set to lambdas[i] at
    step i.
    """
    B = z.shape[0]
    both = torch.cat([context, uncond.expand(B, -1, -1)])
    table = list(zip(*(column.tolist() for column in ddim_steps(schedule, steps, eta))))
    for i, (t, a, scale, a_after, scale_after, sigma) in enumerate(progress(table)):
        # Choose lambda: lambda_s for the first K steps, lambda_l after.
        if strength:
            strength.set(lambdas[i])

        # Predict the noise, with and without the text in one call, and guide it.
        t = torch.full((2 * B,), t, device=z.device)
        eps_text, eps_none = unet(torch.cat([z, z]), t, fps.repeat(2), both).chunk(2)
        eps = eps_none + cfg * (eps_text - eps_none)

        # Predict the clean latent, and step towards it (Song et al. 2021, Eq. 12, with upstream's scale).
        z_0 = (z - (1 - a) ** 0.5 * eps) / (a ** 0.5 * scale)
        z = a_after ** 0.5 * scale_after * z_0 + (1 - a_after - sigma ** 2) ** 0.5 * eps
        if sigma > 0:
            z = z + sigma * noise()
    return z


def two_step_schedule(lambda_s, lambda_l, K, steps):
    """The paper's lambda for each step: lambda_s for the first K, lambda_l for the rest."""
    return [lambda_s if i < K else lambda_l for i in range(steps)]


def main():
    args = parse_args()
    base = load_base(args.base, args.device, args.dtype)
    d = fill_defaults(args, base)
    path = find_subject(args.subject, base.config.fingerprint)
    subject = load_subject(path, base) if path else None
    print(f"base {args.base} ({base.config.name}), subject {path} ({subject.placeholder} {subject.class_word}, "
          f"{subject.steps} steps)" if subject else f"base {args.base} ({base.config.name}), no subject")
    prompt = args.prompt or default_prompt(d.prompt, subject)

    # Read the prompt.
    tokenizer = Tokenizer([subject.placeholder] if subject else [])
    check_prompt(tokenizer, prompt, subject)
    tokens = tokenizer([prompt, ""]).to(args.device)
    with torch.no_grad():
        context, uncond = base.text_encoder(tokens, subject.v_star if subject else None).split(1)

    # Sample one video after the other, each from its own seed.
    strength = MergedLoRA(base.unet, subject) if subject else None
    lambdas = two_step_schedule(d.lambda_s, d.lambda_l, d.K, d.steps)
    shape = (1, Z_CHANNELS, d.frames, d.height // 8, d.width // 8)
    fps = torch.tensor([d.fps], device=args.device)
    written = []
    for k in range(args.num):
        seed = args.seed + k
        generator = torch.Generator().manual_seed(seed)
        noise = lambda: torch.randn(shape, generator=generator).to(args.device)  # drawn on the CPU: the same everywhere
        start = time.time()
        z_0 = ddim(base.unet, base.schedule, noise(), noise, context, uncond, fps, d.steps, d.cfg, d.eta, strength, lambdas,
                   lambda table: tqdm(table, desc=f"video {k + 1}/{args.num}", unit="step"))
        video = base.decode(z_0)[0].numpy()                                 # (T, H, W, 3)
        facts = {"prompt": prompt, "seed": seed, "lambda_s": d.lambda_s, "lambda_l": d.lambda_l, "K": d.K,
                 "steps": d.steps, "cfg": d.cfg, "eta": d.eta, "fps": d.fps, "save_fps": d.save_fps, "frames": d.frames,
                 "height": d.height, "width": d.width, "precision": args.precision,
                 "base": base.config.name, "base_fingerprint": base.config.fingerprint,
                 "subject": str(path) if path else None, "subject_fingerprint": subject.fingerprint() if subject else None,
                 "class_word": subject.class_word if subject else None,
                 "placeholder": subject.placeholder if subject else None, "seconds": round(time.time() - start, 2)}
        written += save_video(free_name(args.out, prompt, seed), video, d.save_fps, facts)
    print("wrote " + " ".join(str(p) for p in written))


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def parse_args():
    p = argparse.ArgumentParser(description="Sample videos of a learned subject (CustomCrafter, Algorithm 1).",
                                epilog="Flags left out take the base's own defaults, from its config.json.")
    p.add_argument("--base", type=Path, default=default_base(), help="base folder (default: %(default)s)")
    p.add_argument("--subject", default="",
                   help="subject.safetensors, or none; left out: the newest under runs/, else the committed one")
    p.add_argument("--prompt", default="", help="what to show; the subject's placeholder (V*) stands for the subject")
    p.add_argument("--lambda_s", type=float, help="LoRA strength in the first K steps, where motion forms (paper: 0.4)")
    p.add_argument("--lambda_l", type=float, help="LoRA strength in the steps after, where detail forms (paper: 0.8)")
    p.add_argument("--K", type=int, help="number of steps with lambda_s (paper: 5)")
    p.add_argument("--steps", type=int, help="DDIM steps (paper: 50)")
    p.add_argument("--cfg", type=float, help="guidance scale (paper: 12)")
    p.add_argument("--eta", type=float, help="DDIM noise: 0 none, 1 as much as ancestral sampling")
    p.add_argument("--fps", type=int, help="frames a second that the base is told")
    p.add_argument("--save_fps", type=int, help="frames a second that the file plays at")
    p.add_argument("--frames", type=int, help="frames in a video")
    p.add_argument("--height", type=int, help="height in pixels")
    p.add_argument("--width", type=int, help="width in pixels")
    p.add_argument("--seed", type=int, default=0, help="seed of the first video; the k-th has seed + k (default: %(default)s)")
    p.add_argument("--num", type=int, default=1, help="number of videos (default: %(default)s)")
    p.add_argument("--precision", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
                   help="of the UNet; auto: bfloat16 on a GPU that has it, else float32 (bfloat16 is very slow on CPUs)")
    p.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the videos (default: %(default)s)")
    args = p.parse_args()
    check_flags(args, lambda_s=(-10, 10), lambda_l=(-10, 10), K=(0, TRAIN_STEPS - 1), steps=(1, TRAIN_STEPS - 1),
                cfg=(0, 100), eta=(0, 1), fps=(1, 1000), save_fps=(1, 240), frames=(1, 1024), height=(8, 8192),
                width=(8, 8192), seed=(0, 2**62), num=(1, 100_000))
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.precision = pick_precision(args.precision, args.device)
    args.dtype = getattr(torch, args.precision)
    return args


def check_flags(args, **ranges):
    """Every number given lies in its range, and --out can be a folder. Raises BadInput."""
    for flag, (low, high) in ranges.items():
        value = getattr(args, flag)
        if value is not None and not low <= value <= high:
            raise BadInput(f"--{flag.removeprefix('train_')} {value}: should be from {low} to {high}")
    if args.out and args.out.exists() and not args.out.is_dir():
        raise BadInput(f"--out {args.out}: is a file; name a folder")


def pick_precision(precision, device):
    if precision != "auto":
        return precision
    return "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"


def fill_defaults(args, base):
    """The base's Defaults with the flags that were given put in. Raises BadInput if they do not fit together."""
    given = {key: value for key, value in vars(args).items() if value is not None and key in vars(base.config.defaults)}
    d = replace(base.config.defaults, **{key: value for key, value in given.items() if value != ""})
    check_size(base, d.height, d.width)
    if d.K > d.steps:
        raise BadInput(f"--K {d.K}: should be at most --steps, which is {d.steps}")
    return d


def check_size(base, height, width):
    multiple = base.size_multiple()
    for flag, value in (("height", height), ("width", width)):
        if value % multiple:
            raise BadInput(f"--{flag} {value}: should be a multiple of {multiple} on the base {base.config.name}")


def find_subject(given, fingerprint):
    """--subject -> path or None: the file given, else the newest of this base under runs/, else the committed one."""
    if given == "none":
        return None
    if given:
        return Path(given)
    trained = sorted(Path("runs").glob("*/subject.safetensors"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in [*trained, Path(os.path.relpath(ROOT / "toy" / "subject.safetensors"))]:
        try:
            with safe_open(path, framework="pt") as f:
                if (f.metadata() or {}).get("base_fingerprint") == fingerprint:
                    return path
        except (OSError, SafetensorError):
            continue
    raise BadInput("--subject: no subject of this base is under runs/; train one with train.py, name one, or say none")


def default_prompt(template, subject):
    if not subject:
        raise BadInput("--prompt: is needed where there is no subject")
    return template.replace("V*", subject.placeholder).replace("{class word}", subject.class_word)


def check_prompt(tokenizer, prompt, subject):
    if subject and not any(i in tokenizer.ids.values() for i in tokenizer.encode(prompt)[:TEXT_LENGTH - 2]):
        print(f"warning: --prompt {prompt!r}: {subject.placeholder} is not in it, or beyond its {TEXT_LENGTH} tokens; "
              f"the video will hardly show the subject", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Files


def slug(text):
    """Any text -> a short file name of letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "x"


def free_name(folder, prompt, seed):
    """A path without suffix that no file has yet: the prompt's letters and digits, then the seed."""
    stem = slug(prompt)
    names = [f"{stem}-{seed}"] + [f"{stem}-{seed}-{n}" for n in range(2, 10_000)]
    return next(folder / name for name in names if not (folder / f"{name}.json").exists())


def save_video(path, video, fps, facts):
    """Video (T, H, W, 3) uint8 -> path.mp4 (H.264) and path.gif, then path.json with `facts`. Returns the three paths."""
    files = {path.with_name(f"{path.name}.{end}"): end for end in ("mp4", "gif", "json")}
    for file, end in files.items():
        with complete_or_absent(file) as temporary:
            if end == "mp4":  # macro_block_size 1: the size stays as it is, instead of being rounded up to 16 in silence
                iio.imwrite(temporary, video, plugin="FFMPEG", fps=fps, codec="libx264", quality=8,
                            macro_block_size=1)
            elif end == "gif":
                iio.imwrite(temporary, video, plugin="pillow", duration=1000 / fps, loop=0)
            else:
                temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return list(files)


if __name__ == "__main__":
    run_script(main)
