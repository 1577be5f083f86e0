"""Algorithm 1 of CustomCrafter: DDIM with a LoRA weight that is small while motion forms, and large after.

    python sample.py --lambda_s 0.4 --lambda_l 0.8 --K 5     # the subject last trained, or the committed one
    python sample.py --subject runs/dog/subject.safetensors --prompt "a V* dog running on the grass" --num 4
    python sample.py --compare                               # base, constant lambda, schedule side by side
    python sample.py --subject none --prompt "a red star moving left on the sea"       # the base alone
    torchrun --nproc_per_node 4 sample.py --prompts FILE --num_videos 8                # shared by 4 processes

Writes outputs/NAME.mp4 and .gif, and beside them NAME.json with all it takes to make them again.
Shapes: B clips, T frames, L text tokens, D text width; latents z (B, 4, T, h, w), 1/8 of the pixels' size.
"""
import re
import secrets
import time
from pathlib import Path

import torch
from tqdm import tqdm

from cli import (BadInput, FlagParser, as_on_rank_0, check_out, only_writer, peak_memory, pick_precision,
                 run_script, this_process)
from config import (RANGES, SamplingDefaults, add_flags, add_speed_flags, check_flags, check_sampling,
                    load_config, with_flags)
from files import default_base, find_subjects, load_base, load_subject, subject_fingerprint
from model import TRAIN_STEPS, Z_CHANNELS, Tokenizer
from paper.baselines import MergedSubjects
from texts import pick_prompts, without_placeholders
from video import check_formats, endings, free_path, motion_line, save_video, sheet, side_by_side, slug


def ddim_steps(schedule, steps, eta):
    """A row per DDIM step, noisiest first: t; alpha_bar and scale at t; both at the next step's t; sigma.

    For 50 steps t = 981, 961, ... 1. Upstream lvdm/models/utils_diffusion.py.
    """
    t = (torch.arange(0, TRAIN_STEPS, TRAIN_STEPS // steps) + 1).clamp(max=TRAIN_STEPS - 1)
    if TRAIN_STEPS % steps:  # upstream's spacing would start below the noisiest level
        t = torch.linspace(1, TRAIN_STEPS - 1, steps, dtype=torch.float64).round().long()
    # Upstream quirk: after the last step comes level 0, not a clean latent (alpha_bar = 1).
    t_next = torch.cat([torch.tensor([0]), t[:-1]])
    a, a_next = schedule.alpha_bar[t], schedule.alpha_bar[t_next]
    sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()        # Song et al. 2021, Eq. 16
    columns = (t, a, schedule.scale[t], a_next, schedule.scale[t_next], sigma)
    return list(zip(*(column.flip(0).tolist() for column in columns)))


@torch.no_grad()
def ddim(unet, schedule, z, noise, context, uncond, fps, steps, cfg, eta, lora=None, lambdas=None,
         on_step=None):
    """Algorithm 1. z (B, 4, T, h, w) standard normal -> z_0 of the same shape.

    noise: function of no arguments -> standard normal like z, called once per step if eta > 0.
    context (B, L, D), uncond (B or 1, L, D): the prompts, and the empty (or negative) prompt. fps (B,).
    lora: sets lambda, to lambdas[i] at step i. on_step: function (i, z_0) that sees step i's predicted clean
    latent. Raises BadInput where z stops being finite.
    """
    B, finite = z.shape[0], torch.zeros((), device=z.device)
    both = torch.cat([context, uncond.expand(B, -1, -1)])
    for i, (t, a, scale, a_next, scale_next, sigma) in enumerate(ddim_steps(schedule, steps, eta)):
        # Choose lambda: lambda_s for the first K steps, lambda_l after.
        if lora:
            lora.set(lambdas[i])

        # Predict the noise, with and without the text in one call, and guide it.
        t = torch.full((2 * B,), t, device=z.device)
        eps_text, eps_none = unet(torch.cat([z, z]), t, fps.repeat(2), both).chunk(2)
        eps = eps_none + cfg * (eps_text - eps_none)

        # Predict the clean latent, and step towards it (Song et al. 2021, Eq. 12, with upstream's scale).
        z_0 = (z - (1 - a) ** 0.5 * eps) / (a ** 0.5 * scale)
        z = a_next ** 0.5 * scale_next * z_0 + (1 - a_next - sigma ** 2) ** 0.5 * eps
        if sigma > 0:
            z = z + sigma * noise()
        finite += z.isfinite().all()
        if on_step:
            on_step(i, z_0)
    if finite < steps:  # asked once, at the end: a question at each step would make a GPU wait
        raise BadInput(f"--precision: the latent is not finite at step {int(finite) + 1} of {steps}; "
                       f"try float32 or bfloat16")
    return z


def two_step_schedule(lambda_s, lambda_l, K, steps):
    """The paper's lambda for each step: lambda_s for the first K, lambda_l for the rest."""
    return [lambda_s if i < K else lambda_l for i in range(steps)]


@torch.no_grad()
def generate(base, prompts, seeds, subjects=(), settings=None, lambdas=None, negative_prompt="", on_step=None,
             lora=None):
    """B prompts and seeds -> videos (B, T, H, W, 3) uint8, of the base or with one or more Subjects in it.

    settings: the base's SamplingDefaults, or `dataclasses.replace` of them. lambdas: one per step; left out,
    the settings' two-step schedule. lora: sets lambda; left out, the subjects' updates go into the UNet.
    Clip b depends on its own seed alone: its noise is drawn on the CPU, and is the same everywhere.
    """
    settings = settings or base.config.sampling
    lambdas = lambdas or two_step_schedule(settings.lambda_s, settings.lambda_l, settings.K, settings.steps)
    tokenizer = Tokenizer([subject.placeholder for subject in subjects])
    v_star = torch.cat([subject.v_star for subject in subjects]) if subjects else None
    encode = lambda texts: base.text_encoder(tokenizer(texts).to(base.device), v_star)

    factor = base.config.vae.factor
    shape = (Z_CHANNELS, settings.frames, settings.height // factor, settings.width // factor)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(base.device)
    fps = torch.full((len(prompts),), settings.fps, device=base.device)

    lora = lora or MergedSubjects(base.unet, subjects)
    try:
        z_0 = ddim(base.unet, base.schedule, noise(), noise, encode(prompts), encode([negative_prompt]), fps,
                   settings.steps, settings.cfg, settings.eta, lora, lambdas, on_step)
    finally:
        lora.set(0)
    return base.decode(z_0)


def main():
    args = parse_args()
    process = this_process()
    config = load_config(args.base / "config.json")
    settings = with_flags(config.sampling, args)
    if args.K is None:
        settings.K = min(settings.K, settings.steps)
    check_sampling(config, settings)
    lambdas = two_step_schedule(settings.lambda_s, settings.lambda_l, settings.K, settings.steps)
    if args.lambdas:
        lambdas = parse_lambdas(args.lambdas, settings.steps)
        settings.lambda_l = lambdas[-1]  # what --compare shows as constant

    # Load the base and the subjects, read the prompts.
    precision = pick_precision(args.precision, process.device)
    base = load_base(args.base, process.device, getattr(torch, precision))
    paths = find_subjects(args.subject, base.config.fingerprint)
    subjects = [load_subject(path, base) for path in paths]
    if args.compile:
        base.unet.compile()
    prompts = pick_prompts(args, settings, subjects)
    seed = args.seed if args.seed is not None else secrets.randbelow(2**31)

    # List what to make, each with all that its pixels depend on. What is there already is left out.
    facts = {name: getattr(settings, name) for name in RANGES[SamplingDefaults]}
    if args.lambdas:
        facts |= {"lambda_s": None, "lambda_l": None, "K": None}
    facts |= {"lambdas": args.lambdas, "precision": precision, "compile": args.compile,
              "negative_prompt": args.negative_prompt, "base": config.name,
              "base_fingerprint": base.config.fingerprint, "subjects": []}
    for path, subject in zip(paths, subjects):
        facts["subjects"].append({"path": str(path), "fingerprint": subject_fingerprint(subject),
                                  "placeholder": subject.placeholder, "class_word": subject.class_word})
    seed, jobs = as_on_rank_0((seed, list_jobs(args, prompts, seed, facts)), process)
    if process.rank == 0:
        named = [f"subject {path} ({subject.placeholder} {subject.class_word}, {subject.steps} steps)"
                 for path, subject in zip(paths, subjects)]
        print(f"base {args.base} ({config.name}), {', '.join(named) or 'no subject'}, seed {seed}")

    # Make them, a batch at a time. Neither a batch nor a video depends on the number of processes.
    batches = [jobs[i:i + args.batch_size] for i in range(0, len(jobs), args.batch_size)]
    mine = batches[process.rank::process.world]
    variants = compare_variants(settings, lambdas, subjects) if args.compare else {"": (subjects, lambdas)}
    steps = sum(len(batch) for batch in mine) * len(variants) * settings.steps
    written = []
    with only_writer(args.out, process.rank), tqdm(total=steps, unit="step", disable=process.rank > 0) as bar:
        for number, batch in enumerate(mine, 1):
            bar.set_description(f"batch {number}/{len(mine)}")
            written += make_batch(args, base, settings, batch, variants, bar)
    asked = len(prompts) * args.num
    if process.rank == 0 and len(jobs) < asked:
        print(f"{asked - len(jobs)} of {asked} videos were there already")
    print(f"peak memory {peak_memory():.1f} GB")
    print("wrote " + (" ".join(map(str, written)) or "nothing"))


def list_jobs(args, prompts, seed, facts):
    """-> list of (path without suffix, facts) of the videos that are to be made, and are not there yet."""
    jobs = []
    for n, prompt in enumerate(prompts):
        number = f"{n:03d}-" if args.prompts else ""
        for k in range(args.num):
            job = {"prompt": prompt, "seed": seed + k, **facts, "compare": args.compare}
            if path := free_path(args.out, f"{number}{slug(prompt)}-{seed + k}", job, endings(args)):
                jobs.append((path, job))
    return jobs


def make_batch(args, base, settings, batch, variants, bar):
    """Samples and writes the videos of one batch of jobs, in every variant -> the paths written."""
    start, videos, written = time.time(), {}, []
    for label, (subjects, lambdas) in variants.items():
        predicted = []  # clean latents (B, 4, T, h, w), one per step
        def on_step(i, z_0):
            bar.update(len(batch))
            predicted.extend([z_0] * args.show_process)

        prompts, seeds = zip(*((job["prompt"], job["seed"]) for _, job in batch))
        if not subjects:  # the base is asked for the class
            placeholders = [subject["placeholder"] for subject in batch[0][1]["subjects"]]
            prompts = [without_placeholders(prompt, placeholders) for prompt in prompts]
        made = generate(base, prompts, seeds, subjects, settings, lambdas, args.negative_prompt, on_step)
        videos[label] = made.numpy()

    K, steps = settings.K, len(predicted)  # show mostly early steps, where motion forms (paper, Fig. 3)
    shown = sorted({0, 1, 2, K - 1, K, 2 * K, steps // 2, steps - 1} & set(range(steps)))
    process = {f"step {i + 1}, lambda {lambdas[i]:g}": base.decode(predicted[i]).numpy() for i in shown}
    for b, (path, job) in enumerate(batch):
        in_variants = {label: video[b] for label, video in videos.items()}
        pictures = {"frames": sheet(in_variants)} if args.compare else {}
        if args.show_process:
            pictures["process"] = sheet({label: video[b] for label, video in process.items()})
            bar.write(f"{path.name}: {motion_line([z_0[b] for z_0 in predicted], shown)}")
        video = side_by_side(in_variants) if args.compare else in_variants[""]
        job["seconds"] = round((time.time() - start) / len(batch), 2)
        written += save_video(path, video, args.format, settings.save_fps, job, pictures)
    return written


def compare_variants(settings, lambdas, subjects):
    """Label -> (subjects, lambdas) of the three videos that --compare sets side by side."""
    if not subjects:
        raise BadInput("--compare: needs a subject")
    constant = (subjects, [settings.lambda_l] * settings.steps)
    return {"base": ([], lambdas), f"constant {constant[1][0]:g}": constant, "schedule": (subjects, lambdas)}


# ------------------------------------------------------------------------------------------------------------
# Flags


def parse_lambdas(text, steps):
    """"0.4*5,0.4>0.8*10,0.8*35" -> one lambda per step; a>b*n goes from a to b in n steps, or BadInput."""
    lambdas = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(-?\d*\.?\d+)(?:>(-?\d*\.?\d+))?\*(\d+)", part)
        if not match or int(match[3]) > TRAIN_STEPS:
            raise BadInput(f'--lambdas: "{part}" is not a part such as 0.4*5 or 0.4>0.8*10')
        first, last, count = float(match[1]), float(match[2] or match[1]), int(match[3])
        lambdas += torch.linspace(first, last, count, dtype=torch.float64).tolist()
    if len(lambdas) != steps:
        raise BadInput(f"--lambdas {text}: has {len(lambdas)} steps, and --steps is {steps}")
    return [round(lam, 6) for lam in lambdas]


def parse_args():
    p = FlagParser(description="Sample videos of learned subjects (CustomCrafter, Algorithm 1).",
                   epilog="Flags left out take the base's own defaults, from its config.json.")
    p.add_argument("--base", type=Path, default=default_base(), help="base folder (default: %(default)s)")
    p.add_argument("--subject", action="append", default=[],
                   help="subject.safetensors, its run, or none; repeat for several; default: the newest")
    p.add_argument("--prompt", default="", help="what to show; V* stands for the subject")
    p.add_argument("--prompts", type=Path, help="text file with a prompt or a # comment on each line")
    p.add_argument("--negative_prompt", default="", help="what to steer away from")
    add_flags(p, SamplingDefaults)
    p.add_argument("--lambdas", default="",
                   help='in place of these three: "0.4*5,0.4>0.8*10,0.8*35"; a>b*n is a ramp of n steps')
    p.add_argument("--seed", type=int, help="of a prompt's first video; others count up (default: random)")
    p.add_argument("--num", "--num_videos", dest="num", type=int, default=1,
                   help="videos of each prompt; under torchrun write --num_videos (default: %(default)s)")
    p.add_argument("--batch_size", type=int, default=1, help="videos sampled at once (default: %(default)s)")
    p.add_argument("--compare", action="store_true",
                   help="base with the class word, constant lambda_l and the schedule, side by side")
    p.add_argument("--show_process", action="store_true",
                   help="also the clean video as predicted at several steps, and when it moves as it will")
    p.add_argument("--format", nargs="+", choices=["mp4", "gif", "png"], default=["mp4", "gif"],
                   help="kinds of files to write; png: one picture with all frames (default: mp4 gif)")
    add_speed_flags(p, ["float32", "bfloat16", "float16"])
    p.add_argument("--out", type=Path, default=Path("outputs"), help="folder to write to (default: outputs)")
    args = p.parse_args()
    own = {"seed": (0, 2**62), "num": (1, 100_000), "batch_size": (1, 1024)}
    check_flags(args, RANGES[SamplingDefaults] | own)
    check_out(args.out)
    check_formats(args.format)
    if args.prompt and args.prompts:
        raise BadInput("--prompts: stands in place of --prompt; give one of the two")
    if args.lambdas and not (args.lambda_s is args.lambda_l is args.K is None):
        raise BadInput("--lambdas: stands in place of --lambda_s, --lambda_l and --K; leave those out")
    return args


if __name__ == "__main__":
    run_script(main)
