"""Algorithm 1 of CustomCrafter: DDIM with a LoRA strength that depends on the step, small while motion forms, large after.

    python sample.py --lambda_s 0.4 --lambda_l 0.8 --K 5                  # the subject last trained, or the committed one
    python sample.py --subject runs/dog/subject.safetensors --prompt "a V* dog running on the grass" --num 4
    python sample.py --compare                                            # base, constant lambda and schedule side by side
    python sample.py --subject none --prompt "a red star moving left on the sea"          # the base alone
    torchrun --nproc_per_node 4 sample.py --prompts FILE --num_videos 8   # many videos, shared by 4 processes

Writes outputs/NAME.mp4 and .gif, and beside them NAME.json with all it takes to make them again.

Shapes: B clips, T frames, L text tokens, D text width; latents z (B, 4, T, h, w), 8 times smaller than pixels.
"""
import json
import os
import re
import resource
import secrets
import sys
import time
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from data import read_text
from lora import MergedLoRA, load_subject
from model import (ROOT, TEXT_LENGTH, TRAIN_STEPS, Z_CHANNELS, BadInput, FlagParser, Tokenizer, complete_or_absent, default_base,
                   load_base, load_config, only_writer, run_script)


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
def ddim(unet, schedule, z, noise, context, uncond, fps, steps, cfg, eta, strength=None, lambdas=None, look=None):
    """Algorithm 1. z (B, 4, T, h, w) standard normal -> z_0 of the same shape.

    noise: function of no arguments -> standard normal like z, called once a step if eta > 0. context (B, L, D) and uncond
    (B or 1, L, D): the prompts and the empty (or negative) prompt. fps (B,). strength: a MergedLoRA, set to lambdas[i] at
    step i. look: function (i, z_0) that is shown the clean latent predicted at step i. Raises BadInput where z stops being finite.
    """
    B, finite = z.shape[0], torch.zeros((), device=z.device)
    both = torch.cat([context, uncond.expand(B, -1, -1)])
    table = list(zip(*(column.tolist() for column in ddim_steps(schedule, steps, eta))))
    for i, (t, a, scale, a_after, scale_after, sigma) in enumerate(table):
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
        finite += z.isfinite().all()
        if look:
            look(i, z_0)
    if finite < steps:  # asked once, at the end: a question at each step would make a GPU wait
        raise BadInput(f"--precision: the latent is not finite at step {int(finite) + 1} of {steps}; try float32 or bfloat16")
    return z


def two_step_schedule(lambda_s, lambda_l, K, steps):
    """The paper's lambda for each step: lambda_s for the first K, lambda_l for the rest."""
    return [lambda_s if i < K else lambda_l for i in range(steps)]


@torch.no_grad()
def generate(base, prompts, seeds, subjects=(), settings=None, lambdas=None, negative_prompt="", look=None, strength=None):
    """B prompts and seeds -> videos (B, T, H, W, 3) uint8, of the base or with one or more Subjects in it.

    settings: the base's Defaults, or `dataclasses.replace` of them. lambdas: one a step; left out, the two-step schedule of
    the settings. strength: what sets lambda, by default a MergedLoRA of the subjects. Clip b depends on its own seed alone:
    its noise is drawn on the CPU, and is the same everywhere.
    """
    d = settings or base.config.defaults
    tokenizer = Tokenizer([s.placeholder for s in subjects])
    v_star = torch.cat([s.v_star for s in subjects]) if subjects else None
    encode = lambda texts: base.text_encoder(tokenizer(texts).to(base.device), v_star)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (Z_CHANNELS, d.frames, d.height // 8, d.width // 8)
    noise = lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(base.device)
    fps = torch.full((len(prompts),), d.fps, device=base.device)
    strength = strength or (MergedLoRA(base.unet, *subjects) if subjects else None)
    try:
        z_0 = ddim(base.unet, base.schedule, noise(), noise, encode(prompts), encode([negative_prompt]), fps, d.steps, d.cfg,
                   d.eta, strength, lambdas or two_step_schedule(d.lambda_s, d.lambda_l, d.K, d.steps), look)
    finally:
        if strength:
            strength.set(0)
    return base.decode(z_0)


def main():
    args = parse_args()
    rank, local_rank, world = (int(os.environ.get(key, default))
                               for key, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    config = load_config(args.base / "config.json")
    d = fill_defaults(args, config)
    lambdas = parse_lambdas(args.lambdas, d.steps) if args.lambdas else two_step_schedule(d.lambda_s, d.lambda_l, d.K, d.steps)
    paths = find_subjects(args.subject, config.fingerprint)

    # Load the base and the subjects, read the prompts.
    precision = pick_precision(args.precision, device)
    base = load_base(args.base, device, getattr(torch, precision))
    subjects = [load_subject(path, base) for path in paths]
    if args.compile:
        base.unet.compile()
    prompts = read_prompts(args, d, subjects)
    seed = args.seed if args.seed is not None else secrets.randbelow(2**31)

    # List what to make, each with all that its pixels depend on; what is there already is left out.
    facts = {name: getattr(d, name) for name in ("steps", "cfg", "eta", "fps", "save_fps", "frames", "height", "width")} | {
        "lambda_s": d.lambda_s, "lambda_l": d.lambda_l, "K": d.K, "lambdas": args.lambdas, "precision": precision, "compile": args.compile,
        "negative_prompt": args.negative_prompt, "base": base.config.name, "base_fingerprint": base.config.fingerprint,
        "subjects": [{"path": str(path), "fingerprint": s.fingerprint(), "placeholder": s.placeholder, "class_word": s.class_word}
                     for path, s in zip(paths, subjects)]}
    seed, jobs = as_on_rank_0((seed, list_jobs(args, prompts, seed, facts)), world)
    if rank == 0:
        named = ", ".join(f"subject {path} ({s.placeholder} {s.class_word}, {s.steps} steps)" for path, s in zip(paths, subjects))
        print(f"base {args.base} ({base.config.name}), {named or 'no subject'}, seed {seed}", flush=True)

    # Make them, a batch at a time. The batches do not depend on the number of processes, so neither does a video.
    batches = [jobs[i:i + args.batch_size] for i in range(0, len(jobs), args.batch_size)][rank::world]
    variants = compare_variants(d, lambdas, subjects) if args.compare else {"": (subjects, lambdas)}
    steps_shown, written = process_steps(d) if args.show_process else [], []
    with only_writer(args.out, rank), tqdm(total=sum(map(len, batches)) * len(variants) * d.steps, unit="step", disable=rank > 0) as bar:
        for n, batch in enumerate(batches):
            bar.set_description(f"video {min(n * args.batch_size + len(batch), sum(map(len, batches)))}/{sum(map(len, batches))}")
            start, videos, seen = time.time(), {}, {}

            def look(i, z_0):
                bar.update(len(batch))
                if i in steps_shown:
                    seen[f"step {i + 1}, lambda {lambdas[i]:g}"] = base.decode(z_0).numpy()

            for label, (who, strengths) in variants.items():
                texts = [job["prompt"] if who else without_placeholders(job["prompt"], [s.placeholder for s in subjects]) for _, job in batch]
                videos[label] = generate(base, texts, [job["seed"] for _, job in batch], who, d, strengths, args.negative_prompt,
                                         look).numpy()
            for b, (path, job) in enumerate(batch):
                pictures = {"frames": sheet({label: v[b] for label, v in videos.items()})} if args.compare else {}
                pictures |= {"process": sheet({label: v[b] for label, v in seen.items()})} if args.show_process else {}
                video = side_by_side({label: v[b] for label, v in videos.items()}) if args.compare else videos[""][b]
                job["seconds"] = round((time.time() - start) / len(batch), 2)
                written += save_video(path, video, args.format, d.save_fps, job, pictures)
    if len(jobs) < len(prompts) * args.num and rank == 0:
        print(f"{len(prompts) * args.num - len(jobs)} of {len(prompts) * args.num} videos were there already")
    print(f"peak memory {peak_memory():.1f} GB")
    print("wrote " + (" ".join(map(str, written)) or "nothing"))


# ---------------------------------------------------------------------------------------------------------------------
# Flags


def parse_args():
    p = FlagParser(description="Sample videos of learned subjects (CustomCrafter, Algorithm 1).",
                                epilog="Flags left out take the base's own defaults, from its config.json.")
    p.add_argument("--base", type=Path, default=default_base(), help="base folder (default: %(default)s)")
    p.add_argument("--subject", action="append", default=[],
                   help="subject.safetensors, or none; more than once for several subjects; left out: the newest under runs/, "
                        "else the committed one")
    p.add_argument("--prompt", default="", help="what to show; the subject's placeholder (V*) stands for the subject, and is left out with --subject none")
    p.add_argument("--prompts", type=Path, help="text file with a prompt on each line; lines that begin with # are left out")
    p.add_argument("--negative_prompt", default="", help="what to steer away from, in place of the empty prompt")
    p.add_argument("--lambda_s", type=float, help="LoRA strength in the first K steps, where motion forms (paper: 0.4)")
    p.add_argument("--lambda_l", type=float, help="LoRA strength in the steps after, where detail forms (paper: 0.8)")
    p.add_argument("--K", type=int, help="number of steps with lambda_s (paper: 5)")
    p.add_argument("--lambdas", default="", help='any schedule in place of these three: "0.4*5,0.4>0.8*10,0.8*35" is 0.4 for 5 '
                                                 "steps, a ramp of 10, 0.8 for 35")
    p.add_argument("--steps", type=int, help="DDIM steps (paper: 50)")
    p.add_argument("--cfg", type=float, help="guidance scale (paper: 12)")
    p.add_argument("--eta", type=float, help="DDIM noise: 0 none, 1 as much as ancestral sampling")
    p.add_argument("--fps", type=int, help="frames a second that the base is told")
    p.add_argument("--save_fps", type=int, help="frames a second that the file plays at")
    p.add_argument("--frames", type=int, help="frames in a video")
    p.add_argument("--height", type=int, help="height in pixels")
    p.add_argument("--width", type=int, help="width in pixels")
    p.add_argument("--seed", type=int, help="seed of a prompt's first video, the k-th has seed + k (default: random, and printed)")
    p.add_argument("--num", "--num_videos", dest="num", type=int, default=1,
                   help="videos of each prompt; torchrun takes --num for its own, so there write --num_videos (default: %(default)s)")
    p.add_argument("--batch_size", type=int, default=1, help="videos sampled at once (default: %(default)s)")
    p.add_argument("--compare", action="store_true", help="base with the class word, constant lambda_l and the schedule, side by side")
    p.add_argument("--show_process", action="store_true", help="also a picture of the clean video as predicted at several steps")
    p.add_argument("--format", nargs="+", choices=["mp4", "gif", "png"], default=["mp4", "gif"],
                   help="kinds of files to write; png: one picture with all frames (default: mp4 gif)")
    p.add_argument("--precision", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
                   help="of the UNet; auto: bfloat16 on a GPU that has it, else float32 (bfloat16 is very slow on CPUs)")
    p.add_argument("--compile", action="store_true", help="torch.compile the UNet: slow to start, then faster; the same up to rounding")
    p.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the videos (default: %(default)s)")
    args = p.parse_args()
    check_flags(args, lambda_s=(-10, 10), lambda_l=(-10, 10), K=(0, TRAIN_STEPS - 1), steps=(1, TRAIN_STEPS - 1),
                cfg=(0, 100), eta=(0, 1), fps=(1, 1000), save_fps=(1, 240), frames=(1, 1024), height=(8, 8192),
                width=(8, 8192), seed=(0, 2**62), num=(1, 100_000), batch_size=(1, 1024))
    if args.prompt and args.prompts:
        raise BadInput("--prompts: stands in place of --prompt; give one of the two")
    if args.lambdas and not (args.lambda_s is args.lambda_l is args.K is None):
        raise BadInput("--lambdas: stands in place of --lambda_s, --lambda_l and --K; leave those out")
    return args


def check_flags(args, **ranges):
    """Every number given lies in its range, and --out can be a folder. Raises BadInput."""
    for flag, (low, high) in ranges.items():
        value = getattr(args, flag)
        if value is not None and not low <= value <= high:
            raise BadInput(f"--{flag.removeprefix('train_')} {value}: should be from {low} to {high}")
    if args.out:
        nearest = next(folder for folder in (args.out, *args.out.absolute().parents) if folder.exists())
        if not nearest.is_dir():
            raise BadInput(f"--out {args.out}: {nearest} is a file; name a folder")
        if not os.access(nearest, os.W_OK):
            raise BadInput(f"--out {args.out}: {nearest} may not be written to; name another folder")


def pick_precision(precision, device):
    if precision != "auto":
        return precision
    return "bfloat16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "float32"


def fill_defaults(args, config):
    """The base's Defaults with the flags that were given put in. Raises BadInput if they do not fit together."""
    given = {key: value for key, value in vars(args).items() if value is not None and key in vars(config.defaults)}
    d = replace(config.defaults, **{key: value for key, value in given.items() if value != ""})
    for flag, value in (("height", d.height), ("width", d.width)):
        if value % config.size_multiple():
            raise BadInput(f"--{flag} {value}: should be a multiple of {config.size_multiple()} on the base {config.name}")
    if d.K > d.steps:
        raise BadInput(f"--K {d.K}: should be at most --steps, which is {d.steps}")
    return d


def parse_lambdas(text, steps):
    """"0.4*5,0.4>0.8*10,0.8*35" -> one lambda a step; a>b*n goes from a to b in n equal parts. Raises BadInput."""
    lambdas = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(-?\d*\.?\d+)(?:>(-?\d*\.?\d+))?\*(\d+)", part)
        if not match or int(match[3]) > TRAIN_STEPS:
            raise BadInput(f'--lambdas: "{part}" is not a part such as 0.4*5 or 0.4>0.8*10')
        lambdas += torch.linspace(float(match[1]), float(match[2] or match[1]), int(match[3]), dtype=torch.float64).tolist()
    if len(lambdas) != steps:
        raise BadInput(f"--lambdas {text}: has {len(lambdas)} steps, and --steps is {steps}")
    return [round(lam, 6) for lam in lambdas]


def find_subjects(given, fingerprint):
    """--subject -> list of paths: the files given, else the newest of this base under runs/, else the committed one."""
    if given:
        return [Path(path) for path in given if path != "none"]
    trained = sorted(Path("runs").glob("*/subject.safetensors"), key=lambda p: p.stat().st_mtime, reverse=True)
    for path in [*trained, Path(os.path.relpath(ROOT / "toy" / "subject.safetensors"))]:
        try:
            with safe_open(path, framework="pt") as f:
                if (f.metadata() or {}).get("base_fingerprint") == fingerprint:
                    return [path]
        except (OSError, SafetensorError):
            continue
    raise BadInput("--subject: no subject of this base is under runs/; train one with train.py, name one, or say none")


def peak_memory():
    """The most memory that this process has held so far, in GB: the GPU's where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def as_on_rank_0(value, world):
    """Rank 0's value, on every process: a random seed, or what another process may find written already."""
    box = [value]
    if world > 1:
        dist.init_process_group("gloo")
        dist.broadcast_object_list(box)
        dist.destroy_process_group()
    return box[0]


def read_prompts(args, d, subjects):
    """--prompts, --prompt or the base's own -> list of prompts, each checked. Raises BadInput; warns of what will not show."""
    words = [s.placeholder for s in subjects]
    if len(set(words)) < len(words):
        raise BadInput(f"--subject: {len(words)} subjects share the placeholder {words[0]}; train one again with another --placeholder")
    source, prompts = "--prompt", [args.prompt]
    if args.prompts:
        source = f"--prompts {args.prompts}"
        try:
            lines = [line.strip() for line in read_text(args.prompts).splitlines()]
        except (OSError, ValueError) as error:
            raise BadInput(f"{source}: not a readable UTF-8 text file ({error})") from None
        prompts = [line for line in lines if line and not line.startswith("#")]
        if not prompts:
            raise BadInput(f"{source}: holds no prompt; write one on each line")
    elif not args.prompt:
        if not subjects:
            raise BadInput("--prompt: is needed where there is no subject")
        prompts = [default_prompt(d, subjects)]
    if not subjects:  # the base alone, asked what a subject's prompts ask
        prompts = [without_placeholders(prompt, ["V*"]) for prompt in prompts]
    tokenizer = Tokenizer(words)
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        kept, dropped = ids[:TEXT_LENGTH - 2], ids[TEXT_LENGTH - 2:]
        for word in words:
            if tokenizer.ids[word] in dropped:
                raise BadInput(f"{source} {prompt!r}: {word} comes after the {TEXT_LENGTH - 2} tokens that are read; put it earlier")
            if tokenizer.ids[word] not in kept:
                print(f"warning: {source} {prompt!r}: {word} is not in it, so the video will hardly show that subject", file=sys.stderr)
        if dropped:
            print(f"warning: {source}: only {TEXT_LENGTH - 2} tokens are read; dropped: {tokenizer.bpe.decode(dropped)!r}", file=sys.stderr)
    return prompts


def default_prompt(d, subjects):
    return d.prompt.replace("V* {class word}", " and a ".join(f"{s.placeholder} {s.class_word}" for s in subjects))


def without_placeholders(prompt, placeholders):
    """What the base is asked in place of the subjects: "a V* dog" -> "a dog"."""
    for word in placeholders:
        prompt = prompt.replace(f"{word} ", "")
    return prompt


# ---------------------------------------------------------------------------------------------------------------------
# Looking at the schedule


def compare_variants(d, lambdas, subjects):
    """Label -> (subjects, lambdas) of the three videos that --compare sets side by side."""
    if not subjects:
        raise BadInput("--compare: needs a subject")
    return {"base": ([], None), f"constant {d.lambda_l:g}": (subjects, [d.lambda_l] * d.steps), "schedule": (subjects, lambdas)}


def process_steps(d):
    """The steps that --show_process shows: most of them early, where the paper's Figure 3 sees motion form."""
    return sorted({min(i, d.steps - 1) for i in (0, 1, 2, d.K - 1, d.K, 2 * d.K, d.steps // 2, d.steps - 1) if i >= 0})


def enlarged(frame):
    """(H, W, 3) -> PIL image at least 128 pixels wide, so that a label fits over it."""
    image = Image.fromarray(frame)
    factor = max(1, round(128 / image.width))
    return image.resize((factor * image.width, factor * image.height), Image.BICUBIC)


def labelled(images, label):
    """A row of images of one size with a label over it."""
    w, h = images[0].size
    row = Image.new("RGB", (len(images) * w, h + 14), "white")
    ImageDraw.Draw(row).text((3, 1), label, fill="black")
    for i, image in enumerate(images):
        row.paste(image, (i * w, 14))
    return row


def side_by_side(videos):
    """Label -> video (T, H, W, 3), all of one size -> one video with all of them under their labels."""
    columns = [[np.asarray(labelled([enlarged(frame)], label)) for frame in video] for label, video in videos.items()]
    return np.concatenate([np.stack(column) for column in columns], axis=2)


def sheet(videos, columns=8):
    """Label -> video -> one picture, a video a row under its label, at most `columns` frames of each."""
    rows = []
    for label, video in videos.items():
        shown = np.linspace(0, len(video) - 1, min(columns, len(video))).round().astype(int)
        rows.append(np.asarray(labelled([enlarged(video[t]) for t in shown], label)))
    return Image.fromarray(np.concatenate(rows))


# ---------------------------------------------------------------------------------------------------------------------
# Files


def list_jobs(args, prompts, seed, facts):
    """-> list of (path without suffix, facts) of the videos to make: those with the very same facts are there already."""
    jobs = []
    for n, prompt in enumerate(prompts):
        for k in range(args.num):
            job = {"prompt": prompt, "seed": seed + k, **facts, "compare": args.compare}
            stem = f"{f'{n:03d}-' if args.prompts else ''}{slug(prompt)}-{seed + k}"
            for path in [args.out / stem, *(args.out / f"{stem}-{i}" for i in range(2, 10_000))]:
                found = read_facts(path)
                if found is None:
                    jobs.append((path, job))
                if found is None or {key: found.get(key) for key in job} == job:
                    break
    return jobs


def read_facts(path):
    """path.json -> its content; None if there is none, {} if it is not one of ours."""
    try:
        facts = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
        return facts if isinstance(facts, dict) else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}


def slug(text):
    """Any text -> a short file name of letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "x"


def save_video(path, video, formats, fps, facts, pictures):
    """Video (T, H, W, 3) uint8 -> path.mp4 (H.264), path.gif or path.png; pictures -> path-NAME.png; last, path.json with `facts`.

    Returns the paths. The JSON comes last, so a video with one is complete.
    """
    written = []

    def file(ending):
        written.append(path.with_name(f"{path.name}{ending}"))
        return complete_or_absent(written[-1])

    for end in formats:
        with file(f".{end}") as temporary:
            if end == "mp4":
                write_mp4(temporary, video, fps, quality=8)
            elif end == "gif":
                iio.imwrite(temporary, video, plugin="pillow", duration=1000 / fps, loop=0)
            else:
                Image.fromarray(np.concatenate(list(video), axis=1)).save(temporary)
    for name, picture in pictures.items():
        with file(f"-{name}.png") as temporary:
            picture.save(temporary)
    with file(".json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return written


def write_mp4(path, video, fps, quality):
    """Video (T, H, W, 3) uint8 -> H.264. macro_block_size 1: the size stays, instead of being rounded up to 16 in silence."""
    iio.imwrite(path, video, plugin="FFMPEG", fps=fps, codec="libx264", quality=quality, macro_block_size=1)


if __name__ == "__main__":
    run_script(main)
