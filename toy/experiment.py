"""Measures the embedded base and the paper's claim on it, where the truth is known to the pixel.

    python toy/experiment.py base       # does the base show what captions say? Clips of unseen seeds, half of them held out
    python toy/experiment.py decided    # at which sampling step is the direction of motion decided?
    python toy/experiment.py claim      # a subject at constant lambda, with the paper's schedule, and with others
    python toy/experiment.py steps      # the same against training steps
    python toy/experiment.py sweep      # the same for other ranks, learning rates, training lengths and priors
    python toy/experiment.py            # methods: the rows of the paper's Tables 1 and 2, over three subjects

Each trains what it needs, prints a table, and writes it with a picture into --out (outputs/experiment). Numbers are means over
clips, each with its standard error; clip n of every row has the same prompt and the same seed. What is there already is not
made again. `torchrun --nproc_per_node 2 toy/experiment.py ...` shares the work, which is faster on CPU cores too.

    python toy/experiment.py --base checkpoints/videocrafter2 --subjects photos

is the paper's own protocol: every folder of photos in photos/ (named by its class word: dog, dog2, backpack) is a subject, learned by
every method at its published settings; 10 prompts each, from prompts/animals.txt or prompts/objects.txt; evaluate.py's metrics.
"""
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from evaluate import consistency
from lora import load_subject
from model import ROOT, BadInput, FlagParser, Tokenizer, complete_or_absent, load_base, load_config, run_script
from sample import ddim_steps, generate, labelled, parse_lambdas, slug
from toy.measure import likeness, measure
from toy.world import (DIRECTIONS, GROUNDS, SPEED, SUBJECTS, Look, caption, colour_name, draw_clip, draw_photos,
                       random_scene)
from train import PUBLISHED, newest_save

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}

# All fixed before any was sampled.
PAPER = "0.4*5,0.8*45"
SCHEDULES = {"constant 1.0": "1*50", "constant 0.8": "0.8*50", "constant 0.4": "0.4*50", "0.4 then 0.8, K = 5 (paper)": PAPER,
             "0.4 then 0.8, K = 2": "0.4*2,0.8*48", "0.4 then 0.8, K = 10": "0.4*10,0.8*40",
             "0.4 then 0.8, K = 20": "0.4*20,0.8*30", "0.0 then 0.8, K = 5": "0*5,0.8*45", "0.2 then 0.8, K = 5": "0.2*5,0.8*45",
             "0.6 then 0.8, K = 5": "0.6*5,0.8*45", "0.4, a ramp over 10, 0.8": "0.4*5,0.4>0.8*10,0.8*35"}
# The paper trains for long, at a low rate; in 500 steps this base learns a subject's shape and main colour, but not its pattern.
LONG = {"long": ["--rank", 32, "--lr", 0.001, "--steps", 3000, "--save_every", 500, "--keep_last", 6]}
# One setting at a time is changed from the first row's; the base's defaults are what this table found.
SHORT = ["--steps", 500, "--save_every", 500, "--rank", 8, "--lr", 0.003]
SWEEP = {"rank 8, lr 0.003": SHORT, "rank 2": [*SHORT, "--rank", 2], "rank 32": [*SHORT, "--rank", 32], "lr 0.0015": [*SHORT, "--lr", 0.0015],
         "lr 0.006": [*SHORT, "--lr", 0.006], "moving prior": [*SHORT, "--prior_motion"], "no prior": [*SHORT, "--alpha", 0]}
# Learning rates: the published ones times 50, as this base's own is 50 times the paper's. All train equally long, but for the two of
# the paper's rows that train longer: twice as long here, by how much there it does not say. (In this order, two processes share the work evenly.)
CUSTOM_DIFFUSION = ["--method", "custom_diffusion", "--lr", 4e-3]
DREAMVIDEO = ["--method", "dreamvideo", "--word_lr", 5e-3, "--lr", 5e-4]
METHODS = {"Custom Diffusion": ["--steps", 500, *CUSTOM_DIFFUSION], "Custom Diffusion, longer": ["--steps", 1000, *CUSTOM_DIFFUSION],
           "DreamVideo, longer": ["--steps", 1000, "--word_steps", 750, *DREAMVIDEO],
           "DreamVideo": ["--steps", 500, "--word_steps", 375, *DREAMVIDEO],
           "cross": ["--steps", 500, "--targets", "cross"], "all": ["--steps", 500]}
# Row -> run, schedule.
ROWS = {"base, class word": ("all", None), "Custom Diffusion": ("Custom Diffusion", "1*50"),
        "Custom Diffusion, longer": ("Custom Diffusion, longer", "1*50"), "DreamVideo": ("DreamVideo", "1*50"),
        "DreamVideo, longer": ("DreamVideo, longer", "1*50"),
        "LoRA on cross-attention, constant 0.8": ("cross", "0.8*50"), "LoRA on all spatial attention, constant 0.8": ("all", "0.8*50"),
        "the same, 0.4 then 0.8, K = 5 (CustomCrafter)": ("all", PAPER)}
THREE = ("berry", "ember", "bee")
# The same rows on a large base, at the methods' published settings; longer is twice as long.
PROTOCOL = {"Custom Diffusion": ["--method", "custom_diffusion"], "Custom Diffusion, longer": ["--method", "custom_diffusion"],
            "DreamVideo": ["--method", "dreamvideo"], "DreamVideo, longer": ["--method", "dreamvideo", "--word_steps", 6000],
            "cross": ["--targets", "cross"], "all": []}
ANIMALS = {"dog", "cat", "bird", "duck", "goose", "hen", "chicken", "owl", "parrot", "penguin", "horse", "pony", "cow", "sheep", "goat", "pig",
           "rabbit", "hamster", "squirrel", "mouse", "fox", "wolf", "bear", "panda", "lion", "tiger", "monkey", "elephant", "turtle", "fish"}


def main():
    p = FlagParser(description="Measure the embedded base and the paper's claim on it.")
    p.add_argument("what", nargs="?", choices=["base", "decided", "claim", "steps", "sweep", "methods"], default="methods")
    p.add_argument("--base", type=Path, default=ROOT / "toy" / "base", help="base folder (default: %(default)s)")
    p.add_argument("--subject", type=Path, help="claim: subject.safetensors learned from one of toy/subjects (default: one trained for long)")
    p.add_argument("--clips", type=int,
                   help="clips a row (default: base 256, claim 128, decided 64, steps and sweep 32, methods 32 a subject; with --subjects, "
                        "1 for each of its 10 prompts)")
    p.add_argument("--subjects", type=Path, help="the paper's protocol, on the subjects whose folders of photos are here")
    p.add_argument("--clip", type=Path, help="--subjects: as for evaluate.py")
    p.add_argument("--dino", type=Path, help="--subjects: as for evaluate.py")
    p.add_argument("--out", type=Path, default=Path("outputs/experiment"), help="folder for results (default: %(default)s)")
    args = p.parse_args()
    args.clips = args.clips or {"base": 256, "claim": 128, "decided": 64}.get(args.what, 32)
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.subjects:
        return run_protocol(args)
    if args.world > 1:
        dist.init_process_group("gloo")
    base = load_base(args.base, f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    {"base": measure_base, "decided": measure_decision, "claim": measure_claim, "steps": measure_steps,
     "sweep": measure_sweep, "methods": measure_methods}[args.what](args, base)


# ---------------------------------------------------------------------------------------------------------------------
# The experiments


def measure_base(args, base):
    """Clips of scenes never trained on, at default settings, against their captions, once with looks left open.

    The world's own clips of the same scenes, encoded and decoded, show what a perfect base would reach.
    """
    scenes, table = draw_scenes(args.clips), Table(args, base, "base")
    vague = [replace(scene, look=Look((0.5, 0.5, 0.5))) for scene in scenes]  # grey has no name, so the caption has none
    seen = ("direction", "shape", "ground")

    def judge(i, clip):
        found = measure(clip, scenes[i].fps)
        return against(scenes[i], found, (*seen, "pattern", "colour")) | drift(found)

    def judge_vague(i, clip):
        found = measure(clip, scenes[i].fps)
        return against(vague[i], found, seen) | {"pattern": np.nan, "colour": np.nan} | drift(found)

    table.fill("base", [caption(scene) for scene in scenes], judge, examples=12)
    table.fill("base, look left open", [caption(scene) for scene in vague], judge_vague, examples=12)
    table.fill("the world's own, after the VAE", scenes, judge, make=lambda scene: through_vae(base, draw_clip(scene)))
    if args.rank == 0:
        pictures = {"the world": [draw_clip(scene, 1)[0] for scene in scenes],
                    "the subjects' photos": np.concatenate([draw_photos(name) for name in SUBJECTS])}
        for name, some in pictures.items():
            print(f"VAE on {name}: {np.mean([psnr(base, picture) for picture in some]):.1f} dB")


def measure_decision(args, base):
    """The motion word is exchanged for its opposite after k steps; motion is decided where the first begins to win."""
    scenes, table = draw_scenes(args.clips), Table(args, base, "decided")
    texts = [caption(scene) for scene in scenes]
    others = [caption(replace(scene, direction=OPPOSITE[scene.direction])) for scene in scenes]

    def judge(i, clip):
        direction = measure(clip, scenes[i].fps).direction
        return {"first word": direction == scenes[i].direction, "second word": direction == OPPOSITE[scenes[i].direction]}

    for k in (1, 2, 3, 5, 7, 10, 20):
        table.fill(f"k = {k}", texts, judge, later_prompts=others, k=k)


def measure_claim(args, base):
    """Motion, composition and likeness of a learned subject at every lambda schedule; the base as reference."""
    subject, name = load_known_subject(args.subject or train_subjects(args, LONG)["long"] / "subject.safetensors", base)
    table = Table(args, base, f"claim-{name}", subject=subject.fingerprint())
    compare_schedules(table, base, subject, name, {"base, class word": None, **SCHEDULES})
    if args.rank == 0:
        photos = draw_photos(name)
        found = [np.mean([likeness(photo[None], name) for photo in some]) for some in (photos, through_vae(base, photos))]
        print(f"likeness of the photos themselves: {found[0]:.3f}, after the VAE: {found[1]:.3f}")


def measure_steps(args, base):
    """Constant lambda and the paper's schedule on every save of a long run."""
    lines = compare_saves(args, base, "steps", train_subjects(args, LONG), ("constant 0.8", "constant 0.4", "0.4 then 0.8, K = 5 (paper)", "0.4 then 0.8, K = 10"))
    if args.rank == 0:
        plot(args.out / "steps-plot.png", lines, ("direction", "distance", "frozen", "likeness"))


def measure_sweep(args, base):
    """Constant lambda and the paper's schedule, one training setting changed at a time."""
    compare_saves(args, base, "sweep", train_subjects(args, SWEEP), ("constant 0.8", "0.4 then 0.8, K = 5 (paper)"))


def measure_methods(args, base):
    """Every method on three subjects; a row's numbers are over the clips of all of them."""
    runs = {f"{name} {run}": [*flags, "--images", ROOT / "toy" / "subjects" / name, "--class_word", SUBJECTS[name][0]]
            for name in THREE for run, flags in METHODS.items()}
    folders, together = train_subjects(args, runs), {row: {} for row in ROWS}
    for name in THREE:
        learned = {run: load_known_subject(folders[f"{name} {run}"] / "subject.safetensors", base)[0] for run in METHODS}
        table = Table(args, base, f"methods-{name}", subjects={run: subject.fingerprint() for run, subject in learned.items()})
        for row, (run, schedule) in ROWS.items():
            compare_schedules(table, base, learned[run], name, {row: schedule})
            for metric, values in table.rows[row].items():
                together[row].setdefault(metric, []).extend(values)
    if args.rank == 0:
        print(f"all {len(THREE)} subjects:")
        for row, values in together.items():
            print_row(row, values, row == next(iter(ROWS)))


def run_protocol(args):
    """The paper's protocol (Sec. "Experiments"), on a base whose truth only the towers know: one command after another."""
    if args.world > 1:
        raise BadInput("--subjects: starts processes itself, one on each GPU for sampling; run it without torchrun")
    config, table, python = load_config(args.base / "config.json"), {}, [sys.executable]
    if torch.cuda.device_count() > 1:
        python += ["-m", "torch.distributed.run", "--nproc_per_node", torch.cuda.device_count()]
    folders = sorted(path for path in args.subjects.iterdir() if path.is_dir()) if args.subjects.is_dir() else []
    if not folders:
        raise BadInput(f"--subjects {args.subjects}: should hold a folder of photos for each subject, named by its class word")
    for folder in folders:
        word = re.sub(r"[\d_]+", " ", folder.name).strip()
        videos, kind = args.out / folder.name, "animals" if word in ANIMALS else "objects"
        prompts = videos / "prompts.txt"
        with complete_or_absent(prompts) as temporary:
            temporary.write_text((ROOT / "prompts" / f"{kind}.txt").read_text(encoding="utf-8").replace("{class word}", word), encoding="utf-8")
        runs = {}
        for run, flags in PROTOCOL.items():
            steps = PUBLISHED[flags[1] if "--method" in flags else "customcrafter"].get("train_steps", config.defaults.train_steps)
            steps *= 1 + run.endswith("longer")
            runs[f"{folder.name} {run}"] = [*flags, "--steps", steps, "--images", folder, "--class_word", word]
        learned = train_subjects(args, runs)
        rows = {videos / slug(row): (learned.get(f"{folder.name} {run}") if schedule else None, schedule) for row, (run, schedule) in ROWS.items()}
        for out, (run, schedule) in rows.items():
            how = ["--subject", run / "subject.safetensors", "--lambdas", schedule] if schedule else ["--subject", "none"]
            command("sampling", *python, ROOT / "sample.py", "--base", args.base, *how, "--prompts", prompts,
                    "--num_videos", max(1, (args.clips or 10) // 10), "--seed", 0, "--format", "mp4", "--out", out)
        towers = [x for flag in ("clip", "dino") if getattr(args, flag) for x in (f"--{flag}", getattr(args, flag))]
        command("measuring", *python, ROOT / "evaluate.py", "--videos", *rows, "--images", folder, "--out", videos, *towers)
        for video in json.loads((videos / "evaluation.json").read_text(encoding="utf-8"))["videos"]:
            for metric, value in video.items():
                if isinstance(value, float):
                    table.setdefault(Path(video["folder"]).name, {}).setdefault(metric, []).append(value)
    print(f"{len(folders)} subjects:")
    for row in ROWS:
        print_row(row, table[slug(row)], row == next(iter(ROWS)))


def command(what, *words, environment=None):
    if subprocess.run(list(map(str, words)), env=environment).returncode:
        raise BadInput(f"{what}: stopped, see above; the same command goes on with it")


def train_subjects(args, runs):
    """Name -> flags of train.py, which makes a run of each under --out/runs. Returns name -> folder. A process takes one run at a time."""
    folders = {name: args.out / "runs" / slug(name) for name in runs}
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if len(runs) < args.world:
        environment.pop("OMP_NUM_THREADS", None)  # a run on its own has all cores
    for name, flags in list(runs.items())[args.rank::args.world]:
        if not (folders[name] / f"step-{flags[1 + flags.index('--steps')]:06d}").exists():
            start = ["--resume" if newest_save(folders[name]) else "--out", folders[name]]
            command(f"training {name}", sys.executable, ROOT / "train.py", "--base", args.base, *flags, *start, environment=environment)
    if args.world > 1:
        dist.barrier()
    return folders


def compare_saves(args, base, title, folders, schedules):
    """A row for every save of every run and each schedule. Returns schedule -> steps -> metric -> mean."""
    saves = {name: [load_known_subject(path, base) for path in sorted(folder.glob("step-*/subject.safetensors"))]
             for name, folder in folders.items()}
    table = Table(args, base, title, subjects={name: subjects[-1][0].fingerprint() for name, subjects in saves.items()})
    lines = {label: {} for label in schedules}
    for name, subjects in saves.items():
        for subject, look in subjects:
            for label, line in lines.items():
                row = f"{name}, {subject.steps} steps, {label}"
                compare_schedules(table, base, subject, look, {row: SCHEDULES[label]})
                line[subject.steps] = {metric: np.mean(values) for metric, values in table.rows[row].items()}
    return lines


def load_known_subject(path, base):
    """-> Subject, and its name among the world's subjects, of which the true look is known. Raises BadInput."""
    subject = load_subject(path, base)
    name = Path(subject.settings["images"]).name
    if name not in SUBJECTS:
        raise BadInput(f"--subject {path}: was learned from {subject.settings['images']}, and the truth is known of toy/subjects only")
    return subject, name


def compare_schedules(table, base, subject, name, schedules):
    """A row for each schedule, as sample.py's --lambdas, or None for the base with the class word; every direction and ground in turn."""
    places = itertools.cycle((d, g) for g in GROUNDS for d in DIRECTIONS)
    scenes = [replace(scene, direction=direction, ground=ground)
              for scene, (direction, ground) in zip(draw_scenes(table.args.clips), places)]
    d = base.config.defaults

    def judge(i, clip):
        row = against(scenes[i], measure(clip, d.fps), ("direction", "ground"))
        return row | {"likeness": likeness(clip, name), "consistency": consistency(pixel_features(clip))}

    for row, schedule in schedules.items():
        words = f"{subject.placeholder} {subject.class_word}" if schedule else subject.class_word
        prompts = [f"a {words} moving {scene.direction} on the {scene.ground}" for scene in scenes]
        how = dict(subjects=[subject], lambdas=parse_lambdas(schedule, d.steps)) if schedule else {}
        table.fill(row, prompts, judge, **how)


# ---------------------------------------------------------------------------------------------------------------------
# Mechanics


class Table:
    """Rows of metric -> one number a clip, kept in --out/NAME.json so that an interrupted table goes on; and a picture of it."""

    def __init__(self, args, base, name, **settings):
        self.args, self.base, self.name, self.rows = args, base, name, {}
        self.settings = {"clips": args.clips, "base": base.config.fingerprint, **settings}
        self.path = args.out / f"{name}.json"
        if self.path.exists():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["settings"] != self.settings:
                raise BadInput(f"--out {args.out}: {self.path.name} in it has other settings ({found['settings']}); name another folder")
            self.rows = found["rows"]

    def fill(self, row, prompts, judge, examples=2, make=None, **how):
        """Samples every prompt, clip n from seed n, and judges it: judge(n, clip) -> metric -> number.

        `how` is for sample_clips; `make` makes a clip of each prompt in its place.
        """
        args = self.args
        if row not in self.rows:
            mine, judged, shown = range(args.rank, len(prompts), args.world), {}, {}
            for n in tqdm(range(0, len(mine), BATCH), desc=row, unit=f"{BATCH} clips", disable=args.rank > 0):
                part = mine[n:n + BATCH]
                clips = [make(prompts[i]) for i in part] if make else sample_clips(self.base, prompts, part, **how)
                for i, clip in zip(part, clips):
                    judged[i] = {metric: float(value) for metric, value in judge(i, clip).items()}
                    if i < examples:
                        shown[i] = clip
            judged, shown = (gathered(x, args.world) for x in (judged, shown))
            self.rows[row] = {metric: [judged[i][metric] for i in sorted(judged)] for metric in judged[0]}
            if args.rank == 0:
                self.save(row, [shown[i] for i in sorted(shown)])
        if args.rank == 0:
            print_row(row, self.rows[row], row == next(iter(self.rows)))

    def save(self, row, clips):
        """The rows so far as JSON; strips with the row's first clips, two a strip, below the strips of the rows before."""
        with complete_or_absent(self.path) as temporary:
            temporary.write_text(json.dumps({"settings": self.settings, "rows": self.rows}) + "\n", encoding="utf-8")
        picture, strips = self.path.with_suffix(".png"), []
        if len(self.rows) > 1 and picture.exists():
            strips = [np.asarray(Image.open(picture))]
        frames = [Image.fromarray(np.concatenate(list(clip), axis=1)) for clip in clips]
        strips += [np.asarray(labelled(frames[i:i + 2], "" if i else row)) for i in range(0, len(frames), 2)]
        with complete_or_absent(picture) as temporary:
            Image.fromarray(np.concatenate(strips)).save(temporary, format="png")


BATCH = 16  # clips sampled at once


def print_row(row, values, first):
    """Metric -> a number a clip, as a line of a Markdown table: means and standard errors."""
    if first:
        print(f"| {len(next(iter(values.values())))} clips a row | " + " | ".join(values) + " |\n" + "|---" * (1 + len(values)) + "|")
    print(f"| {row} | " + " | ".join(map(mean_and_error, values.values())) + " |", flush=True)


def mean_and_error(x):
    """Of the clips that were asked for this: all but those with NaN."""
    x = np.array(x)[~np.isnan(x)]
    return f"{x.mean():.3f} ± {x.std() / len(x) ** 0.5:.3f}" if len(x) else ""


def gathered(mine, world):
    """A dictionary of each process -> all of them in one."""
    parts = [mine]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, mine)
    return {key: value for part in parts for key, value in part.items()}


def draw_scenes(count, seed=1000):
    """count scenes of a seed that pre-training does not use, every second one a held-out combination; 8 frames a second."""
    rng = np.random.default_rng(seed)
    return [replace(random_scene(rng, unseen=i % 2 == 0), fps=8) for i in range(count)]


def against(scene, seen, names):
    """What a clip shows (Measured) against what was asked: metric -> number, NaN where nothing was asked."""
    asked = {"colour": colour_name(scene.look.colour), "pattern": scene.look.pattern}
    asked |= {name: getattr(scene, name) for name in ("shape", "ground", "direction")}
    row = {name: getattr(seen, name) == asked[name] if asked[name] else np.nan for name in names}
    return row | {"distance": seen.distance / (SPEED / scene.fps * (len(seen.track) - 1)),  # the world's own: 1
                  "frozen": seen.frozen, "broken": seen.broken > 0}


def drift(seen):
    return {"colour drift": seen.colour_drift, "shape drift": seen.shape_drift}


def pixel_features(clip):
    """(T, H, W, 3) uint8 -> (T, D) of length 1: the pixels themselves, off the clip's mean colour, in place of CLIP's features."""
    pixels = torch.from_numpy(clip).float()
    return F.normalize((pixels - pixels.mean(dim=(0, 1, 2))).flatten(1), dim=1)


@torch.no_grad()
def sample_clips(base, prompts, which, later_prompts=None, k=None, **how):
    """The prompts and seeds numbered `which` -> clips (N, T, H, W, 3) uint8, by `generate` of sample.py with `how`.

    With `later_prompts` the text is exchanged after k steps.
    """
    if later_prompts:
        later = base.text_encoder(Tokenizer()([later_prompts[i] for i in which] + [""] * len(which)).to(base.device))
        last_t = ddim_steps(base.schedule, base.config.defaults.steps, 0)[0][k]  # the first noise level with the new text
        unet = base.unet
        base = replace(base, unet=lambda z, t, fps, both: unet(z, t, fps, later if t[0] <= last_t else both))
    return generate(base, [prompts[i] for i in which], which, **how).numpy()


@torch.no_grad()
def through_vae(base, pictures):
    """(N, H, W, 3) uint8 -> the same, encoded and decoded."""
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(base.device) / 127.5 - 1
    return base.decode(base.vae.encode(x).transpose(0, 1)[None])[0].numpy()


def psnr(base, picture):
    """(H, W, 3) uint8 -> what is left of it after the VAE, in dB."""
    error = picture.astype(float) - through_vae(base, picture[None])[0]
    return 10 * np.log10(255 ** 2 / np.mean(error ** 2))


def plot(path, lines, metrics, width=300, height=200):
    """Line -> steps -> metric -> mean becomes one panel a metric, steps on a linear axis from 0, means from 0 to the largest or 1."""
    image = Image.new("RGB", (width * len(metrics), height + 14 * len(lines) + 8), "white")
    pen, colours = ImageDraw.Draw(image), ("#c03020", "#808080", "#2050c0", "#208040")
    for i, metric in enumerate(metrics):
        top = max(1.0, max(values[metric] for line in lines.values() for values in line.values()))
        last = max(step for line in lines.values() for step in line)
        at = lambda step, value: (width * i + 40 + (width - 60) * step / last, height - 20 - (height - 50) * value / top)
        pen.text((width * i + 40, 6), metric, fill="black")
        for value in (0, top / 2, top):
            pen.line([at(0, value), at(last, value)], fill="#dddddd")
            pen.text((width * i + 8, at(0, value)[1] - 6), f"{value:.2g}", fill="black")
        for step in next(iter(lines.values())):
            pen.text((at(step, 0)[0] - 8, height - 16), str(step), fill="black")
        for colour, line in zip(colours, lines.values()):
            pen.line([at(step, values[metric]) for step, values in line.items()], fill=colour, width=2)
    for n, (colour, label) in enumerate(zip(colours, lines)):
        pen.text((40, height + 2 + 14 * n), label, fill=colour)
    with complete_or_absent(path) as temporary:
        image.save(temporary, format="png")


if __name__ == "__main__":
    run_script(main)
