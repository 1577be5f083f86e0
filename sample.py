"""Algorithm 1 of CustomCrafter: DDIM with a LoRA weight that is small while motion forms, then large.

    python sample.py --lambda_s 0.4 --lambda_l 0.8 --K 5     # the subject last trained, or the committed one
    python sample.py --subject runs/dog/subject.safetensors --prompt "a V* dog running on the grass" --num 4
    python sample.py --compare                               # base, constant lambda, schedule side by side
    python sample.py --subject none --prompt "a red star moving left on the sea"       # the base alone
    torchrun --nproc_per_node 4 sample.py --prompts FILE --num_videos 8                # shared by 4 processes

Writes outputs/NAME.mp4 and .gif, and beside them NAME.json with everything needed to make them again.
Shapes: B clips, T frames, L text tokens, D text width; latents z (B, 4, T, h, w), 1/8 of the pixels' size.
"""
import re
import secrets
import time
from pathlib import Path

import numpy as np
import torch

from lora import MergedLoRA
from model import NOISE_LEVELS, Z_CHANNELS, Tokenizer
from support.cli import (BadInput, FlagParser, check_out, check_same, join_processes, lock_folder,
                         of_all_processes, progress_bar, run_script, wait_for_all)
from support.config import (SamplingDefaults, add_flags, add_speed_flags, check_flags, check_sampling,
                            load_config, with_flags)
from support.files import default_base, find_subjects, load_subject, open_base
from support.texts import pick_prompts, tokens_of, without_placeholders
from support.video import check_ffmpeg, free_path, save_video, sheet, side_by_side, slug


def ddim_steps(schedule, steps, eta):
    """One row per DDIM step, noisiest first: t, alpha_bar, scale, the next t's alpha_bar and scale, sigma.

    For 50 steps t = 981, 961, ... 1. Upstream lvdm/models/utils_diffusion.py.
    """
    t = (torch.arange(0, NOISE_LEVELS, NOISE_LEVELS // steps) + 1).clamp(max=NOISE_LEVELS - 1)
    if NOISE_LEVELS % steps:  # here upstream's spacing has too many levels, and drops the noisiest
        t = torch.linspace(1, NOISE_LEVELS - 1, steps, dtype=torch.float64).round().long()
    # Upstream quirk: the last step goes to level 0; the normal form goes to a clean latent (alpha_bar = 1).
    t_next = torch.cat([torch.tensor([0]), t[:-1]])
    alpha_bar, alpha_bar_next = schedule.alpha_bar[t], schedule.alpha_bar[t_next]
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    sigma = eta * variance.sqrt()                                           # Song et al. 2021, Eq. 16
    columns = (t, alpha_bar, schedule.scale[t], alpha_bar_next, schedule.scale[t_next], sigma)
    return list(zip(*(column.flip(0).tolist() for column in columns)))


@torch.no_grad()
def ddim(unet, schedule, z, noise, context, uncond, fps, steps, cfg, eta, lora=None, lambdas=None,
         on_step=None):
    """Algorithm 1. z (B, 4, T, h, w) standard normal -> z_0 of the same shape.

    noise: function of no arguments -> standard normal like z, called once per step if eta > 0.
    context (B, L, D), uncond (B or 1, L, D): the prompts, and the empty (or negative) prompt. fps (B,).
    lora.set(lambdas[i]) is called before step i. on_step(i, z_0) is called after it with the predicted clean
    latent. Raises BadInput if the result is not finite.
    """
    B = z.shape[0]
    both = torch.cat([context, uncond.expand(B, -1, -1)])
    rows = ddim_steps(schedule, steps, eta)
    for i, (t, alpha_bar, scale, alpha_bar_next, scale_next, sigma) in enumerate(rows):
        # Choose lambda: lambda_s for the first K steps, lambda_l after.
        if lora:
            lora.set(lambdas[i])

        # Predict the noise, with and without the text in one call, and guide it.
        t = torch.full((2 * B,), t, device=z.device)
        eps_text, eps_none = unet(torch.cat([z, z]), t, fps.repeat(2), both).chunk(2)
        eps = eps_none + cfg * (eps_text - eps_none)

        # Predict the clean latent, and step towards it (Song et al. 2021, Eq. 12, with upstream's scale).
        z_0 = (z - (1 - alpha_bar) ** 0.5 * eps) / (alpha_bar ** 0.5 * scale)
        z = alpha_bar_next ** 0.5 * scale_next * z_0 + (1 - alpha_bar_next - sigma ** 2) ** 0.5 * eps
        if sigma > 0:
            z = z + sigma * noise()
        if on_step:
            on_step(i, z_0)
    if not z.isfinite().all():
        raise BadInput("--precision: the latent is not finite; try float32 or bfloat16")
    return z


def two_step_schedule(lambda_s, lambda_l, K, steps):
    """The paper's lambda for each step: lambda_s for the first K, lambda_l for the rest."""
    return [lambda_s if i < K else lambda_l for i in range(steps)]


def parse_lambdas(text, steps):
    """"0.4*5,0.4>0.8*10,0.8*35" -> one lambda per step; a>b*n is a ramp of n steps. Raises BadInput."""
    lambdas = []
    for ramp in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(-?\d*\.?\d+)(?:>(-?\d*\.?\d+))?\*(\d{1,4})", ramp)
        if not match:
            raise BadInput(f'--lambdas: "{ramp}" is not a part such as 0.4*5 or 0.4>0.8*10')
        first, last, count = float(match[1]), float(match[2] or match[1]), int(match[3])
        lambdas += [round(number, 6) for number in np.linspace(first, last, count).tolist()]
    if len(lambdas) != steps:
        raise BadInput(f"--lambdas {text}: has {len(lambdas)} steps, and --steps is {steps}")
    return lambdas


@torch.no_grad()
def generate(base, prompts, seeds, subjects=(), settings=None, lambdas=None, negative_prompt="", on_step=None,
             lora=None):
    """B prompts and seeds -> videos (B, T, H, W, 3) uint8, of the base or with one or more Subjects in it.

    prompts: texts, or their tokens (B, L). settings: the base's SamplingDefaults, or `dataclasses.replace` of
    them. lambdas: one per step; by default the settings' two-step schedule. lora: sets lambda; by default, it
    merges the subjects' updates into the UNet. The noise of clip b follows from its own seed alone, and is
    drawn on the CPU, so it is the same on every device.
    """
    settings = settings or base.config.sampling
    lambdas = lambdas or two_step_schedule(settings.lambda_s, settings.lambda_l, settings.K, settings.steps)
    tokenizer = Tokenizer([subject.placeholder for subject in subjects])
    v_star = torch.cat([subject.v_star for subject in subjects]) if subjects else None
    tokens = prompts if torch.is_tensor(prompts) else tokenizer(prompts)
    context, uncond = (base.text_encoder(ids.to(base.device), v_star)
                       for ids in (tokens, tokenizer([negative_prompt])))

    factor = base.config.vae.factor
    shape = (Z_CHANNELS, settings.frames, settings.height // factor, settings.width // factor)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(base.device)
    fps = torch.full((len(tokens),), settings.fps, device=base.device)

    lora = lora or MergedLoRA(base.unet, subjects)
    try:
        z_0 = ddim(base.unet, base.schedule, noise(), noise, context, uncond, fps, settings.steps,
                   settings.cfg, settings.eta, lora, lambdas, on_step)
    finally:
        lora.set(0)
    return base.decode(z_0)


def main():
    args = parse_args()
    process = join_processes()
    config = load_config(args.base)
    settings = with_flags(config.sampling, args)
    if args.K is None:
        settings.K = min(settings.K, settings.steps)
    check_sampling(config, settings)
    lambdas = two_step_schedule(settings.lambda_s, settings.lambda_l, settings.K, settings.steps)
    if args.lambdas:
        lambdas = parse_lambdas(args.lambdas, settings.steps)
        settings.lambda_l = lambdas[-1]  # the constant lambda of --compare

    # Load the base and the subjects, and read the prompts.
    base = open_base(args, process)
    paths = find_subjects(args.subject, base.config.fingerprint)
    subjects = [load_subject(path, base) for path in paths]
    if args.compare and not subjects:
        raise BadInput("--compare: needs a subject")
    prompts, tokens = pick_prompts(args, settings, subjects)
    tokens_of([args.negative_prompt], [], "--negative_prompt")
    if process.rank == 0:
        named = [f"subject {path} ({subject.placeholder} {subject.class_word}, {subject.steps} steps)"
                 for path, subject in zip(paths, subjects)]
        print(f"{', '.join(named) or 'no subject'}, seed {args.seed}")
    variants = [("", subjects, lambdas)]
    if args.compare:
        constant = [settings.lambda_l] * settings.steps
        variants = [("base", [], lambdas), (f"constant {settings.lambda_l:g}", subjects, constant),
                    ("schedule", subjects, lambdas)]
    make_videos(args, base, settings, prompts, tokens, variants, process)


def make_videos(args, base, settings, prompts, tokens, variants, process):
    """Samples and writes --num videos of each prompt, unless they exist, on all processes together.

    variants: one (label, subjects, lambdas), or for --compare the three that are put side by side.
    """
    recorded = video_settings(args, settings, base, variants[-1][1])
    check_same(process, subjects=recorded["subjects"])
    with lock_folder(args.out, process.rank):
        # List the videos to make, with everything that determines their pixels. Skip those that exist.
        jobs = list_jobs(args, prompts, recorded) if process.rank == 0 else None
        jobs = of_all_processes(jobs, process)[0]

        # Make them, a batch at a time. Neither a batch nor a video depends on the number of processes.
        batches = [jobs[i:i + args.batch_size] for i in range(0, len(jobs), args.batch_size)]
        mine, written = batches[process.rank::process.world], []
        steps = sum(len(batch) for batch in mine) * len(variants) * settings.steps
        with progress_bar(total=steps, unit="step", disable=process.rank > 0) as bar:
            for number, batch in enumerate(mine, 1):
                bar.set_description_str(f"batch {number}/{len(mine)}")
                written += make_batch(args, base, settings, tokens, batch, variants, bar)
        wait_for_all(process)
    existing = len(prompts) * args.num - len(jobs)
    if process.rank == 0 and existing:
        print(f"{existing} of {len(prompts) * args.num} videos were there already")
    print("wrote " + (" ".join(written) or "nothing"))


def video_settings(args, settings, base, subjects):
    """Everything besides prompt and seed that determines the pixels of a video, for its JSON."""
    recorded = dict(vars(settings))
    if args.lambdas:
        recorded |= {"lambda_s": None, "lambda_l": None, "K": None}
    of_subjects = [{"fingerprint": subject.fingerprint(), "placeholder": subject.placeholder,
                    "class_word": subject.class_word} for subject in subjects]
    return recorded | {"lambdas": args.lambdas, "precision": base.precision, "compile": args.compile,
                       "negative_prompt": args.negative_prompt, "base": base.config.name,
                       "base_fingerprint": base.config.fingerprint, "subjects": of_subjects,
                       "compare": args.compare}


def list_jobs(args, prompts, recorded):
    """-> list of (path without suffix, prompt number, settings) of the videos that do not exist yet."""
    endings = [f".{ending}" for ending in args.format]
    endings += ["-frames.png"] * args.compare + ["-process.png"] * args.show_process
    jobs = []
    for n, prompt in enumerate(prompts):
        number = f"{n:03d}-" if args.prompts else ""
        for k in range(args.seed, args.seed + args.num):
            job = {**recorded, "prompt": prompt, "seed": k}
            if path := free_path(args.out, f"{number}{slug(prompt)}-{k}", job, endings):
                jobs.append((path, n, job))
    return jobs


def make_batch(args, base, settings, tokens, batch, variants, bar):
    """Samples and writes the videos of one batch of jobs, in every variant -> the paths of the files."""
    start, videos, written = time.time(), {}, []
    K, steps = settings.K, settings.steps  # show mostly early steps, where motion forms (paper, Fig. 3)
    shown = {0, 1, 2, K - 1, K, 2 * K, steps // 2, steps - 1} if args.show_process else ()
    for label, subjects, lambdas in variants:
        predicted = {}  # label of a step -> predicted clean videos

        def on_step(i, z_0):
            bar.update(len(batch))
            if i in shown and label == variants[-1][0]:
                predicted[f"step {i + 1}, lambda {lambdas[i]:g}"] = base.decode(z_0).numpy()

        prompts = tokens[[n for _, n, _ in batch]]
        if args.compare and not subjects:  # the base draws the class instead of the subject
            words = [subject["placeholder"] for subject in batch[0][2]["subjects"]]
            prompts = [without_placeholders(job["prompt"], words) for _, _, job in batch]
        seeds = [job["seed"] for _, _, job in batch]
        videos[label] = generate(base, prompts, seeds, subjects, settings, lambdas, args.negative_prompt,
                                 on_step).numpy()

    for b, (path, _, job) in enumerate(batch):
        video, pictures = videos[label][b], {}
        if args.compare:
            variants_of_b = {label: video[b] for label, video in videos.items()}
            video, pictures["frames"] = side_by_side(variants_of_b), sheet(variants_of_b)
        if args.show_process:
            pictures["process"] = sheet({label: video[b] for label, video in predicted.items()})
        job["seconds"] = round((time.time() - start) / len(batch), 2)
        written += save_video(path, video, args.format, settings.save_fps, job, pictures)
    return written


# ------------------------------------------------------------------------------------------------------------
# Flags


def parse_args():
    p = FlagParser(description="Sample videos of learned subjects (CustomCrafter, Algorithm 1).",
                   epilog="A flag that is not given takes its value from the base's config.json.")
    p.add_argument("--base", type=Path, default=default_base(), help="base folder (default: %(default)s)")
    p.add_argument("--subject", action="append", default=[],
                   help="subject.safetensors, its run, or none; repeat for several (default: the newest)")
    prompt = p.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="description of the video, in which V* stands for the subject")
    prompt.add_argument("--prompts", type=Path, help="text file with one prompt or # comment on each line")
    p.add_argument("--negative_prompt", default="", help="description to steer away from")
    add_flags(p, SamplingDefaults)
    p.add_argument("--lambdas", default="",
                   help='instead of the three: "0.4*5,0.4>0.8*10,0.8*35", where a>b*n is a ramp of n steps')
    p.add_argument("--seed", type=int, default=secrets.randbelow(2**31),
                   help="of a prompt's first video; the others count up (default: random)")
    p.add_argument("--num", "--num_videos", dest="num", type=int, default=1,
                   help="videos of each prompt; under torchrun write --num_videos (default: %(default)s)")
    p.add_argument("--batch_size", type=int, default=1, help="videos sampled at once (default: %(default)s)")
    p.add_argument("--compare", action="store_true", help="base, constant lambda_l, schedule, side by side")
    p.add_argument("--show_process", action="store_true", help="also save a picture of the clean video "
                   "that is predicted at several steps")
    p.add_argument("--format", nargs="+", choices=["mp4", "gif", "png"], default=["mp4", "gif"],
                   help="kinds of files to write; png: one picture with all frames (default: mp4 gif)")
    add_speed_flags(p, ["float32", "bfloat16", "float16"])
    p.add_argument("--out", type=Path, default=Path("outputs"), help="folder to write to (default: outputs)")
    args = p.parse_args()
    check_flags(args, SamplingDefaults, seed=(0, 2**62), num=(1, 100_000), batch_size=(1, 1024))
    check_out(args.out)
    if "mp4" in args.format:
        check_ffmpeg("--format mp4", "or pass --format gif")
    if args.lambdas and not (args.lambda_s is args.lambda_l is args.K is None):
        raise BadInput("--lambdas: replaces --lambda_s, --lambda_l and --K; leave those out")
    return args


if __name__ == "__main__":
    run_script(main)
