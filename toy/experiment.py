"""Measures the embedded base and the paper's claim on it, where the truth is known to the pixel.

    python toy/experiment.py base       # does the base show what captions say? Clips of unseen seeds, half of them held out
    python toy/experiment.py decided    # at which sampling step is the direction of motion decided?
    python toy/experiment.py claim      # constant lambda against the paper's schedule, on a subject that train.py learned
    python toy/experiment.py steps --run runs/berry    # the same two against training steps, over a run's saves

Each prints a table, and writes it with a picture into --out (outputs/experiment). Numbers are means over clips, each with its
standard error; clip n of every row has the same prompt and the same seed. Rows that are there already are not made again.
`torchrun --nproc_per_node 2 toy/experiment.py ...` shares every row, which is faster on CPU cores too.
"""
import argparse
import itertools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from lora import load_subject
from model import ROOT, BadInput, Tokenizer, complete_or_absent, load_base, run_script
from sample import ddim_steps, find_subjects, generate, labelled, slug, two_step_schedule
from toy.world import (DIRECTIONS, GROUNDS, SPEED, SUBJECTS, caption, class_or_subject, draw_clip, draw_photos, likeness, measure,
                       random_scene)

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}

# lambda_s, lambda_l, K of every row of the claim; fixed before any was sampled.
PAPER = (0.4, 0.8, 5)
SCHEDULES = {"constant 1.0": (1.0, 1.0, 0), "constant 0.8": (0.8, 0.8, 0), "constant 0.4": (0.4, 0.4, 0),
             "0.4 then 0.8, K = 5 (paper)": PAPER, "0.4 then 0.8, K = 2": (0.4, 0.8, 2),
             "0.4 then 0.8, K = 10": (0.4, 0.8, 10), "0.4 then 0.8, K = 20": (0.4, 0.8, 20),
             "0.0 then 0.8, K = 5": (0.0, 0.8, 5), "0.2 then 0.8, K = 5": (0.2, 0.8, 5), "0.6 then 0.8, K = 5": (0.6, 0.8, 5)}


def main():
    p = argparse.ArgumentParser(description="Measure the embedded base and the paper's claim on it.")
    p.add_argument("what", choices=["base", "decided", "claim", "steps"])
    p.add_argument("--base", type=Path, default=ROOT / "toy" / "base", help="base folder (default: %(default)s)")
    p.add_argument("--subject", default="", help="claim: subject.safetensors learned from one of toy/subjects "
                                                 "(default: the newest under runs/, else the committed one)")
    p.add_argument("--run", type=Path, help="steps: folder of a run of train.py with several saves")
    p.add_argument("--clips", type=int, help="clips per row (default: base 256, claim 128, else 64)")
    p.add_argument("--out", type=Path, default=Path("outputs/experiment"), help="folder for results (default: %(default)s)")
    args = p.parse_args()
    args.clips = args.clips or {"base": 256, "claim": 128}.get(args.what, 64)
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.world > 1:
        dist.init_process_group("gloo")
    base = load_base(args.base, f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    {"base": measure_base, "decided": measure_decision, "claim": measure_claim, "steps": measure_steps}[args.what](args, base)


# ---------------------------------------------------------------------------------------------------------------------
# The experiments


def measure_base(args, base):
    """Clips of scenes never trained on, at default settings, against their captions; and the VAE's own error."""
    scenes, table = draw_scenes(args.clips), Table(args, base, "base")

    def judge(i, clip):
        error = {"VAE world dB": psnr(base, draw_clip(scenes[i], 1)[0])}
        return against(scenes[i], measure(clip, scenes[i].fps), ("direction", "colour", "shape", "ground")) | error

    table.fill("base", [caption(scene) for scene in scenes], judge, examples=12)
    photos = np.concatenate([draw_photos(name) for name in SUBJECTS])
    print(f"VAE on the subjects' photos: {np.mean([psnr(base, photo) for photo in photos]):.1f} dB")


def measure_decision(args, base):
    """The motion word is exchanged for its opposite after k steps; motion is decided where the first begins to win."""
    scenes, table = draw_scenes(args.clips), Table(args, base, "decided")
    texts = [caption(scene) for scene in scenes]
    others = [caption(replace(scene, direction=OPPOSITE[scene.direction])) for scene in scenes]

    def judge(i, clip):
        direction = measure(clip, scenes[i].fps).direction
        return {"first word": direction == scenes[i].direction, "second word": direction == OPPOSITE[scenes[i].direction]}

    for k in (0, 1, 2, 3, 5, 7, 10, 15, 20):
        table.fill(f"k = {k}", texts, judge, later_prompts=others, k=k)


def measure_claim(args, base):
    """Motion, composition and likeness of a learned subject at every lambda schedule; the base as reference."""
    path, = find_subjects([args.subject] if args.subject else [], base.config.fingerprint)
    subject, name = load_known_subject(path, base)
    table = Table(args, base, f"claim-{name}", subject=subject.fingerprint())
    compare_schedules(table, base, subject, name, {"base, class word": None, **SCHEDULES})


def measure_steps(args, base):
    """Constant lambda and the paper's schedule on every save of one run of train.py."""
    saves = sorted(args.run.glob("step-*/subject.safetensors")) if args.run else []
    if not saves:
        raise BadInput(f"--run {args.run}: holds no saves (step-*/subject.safetensors); train with --save_every and --keep_last")
    table = Table(args, base, f"steps-{slug(args.run.name)}", run=str(args.run))
    lines = {"constant 0.8": {}, "0.4 then 0.8, K = 5": {}}
    for path in saves:
        subject, name = load_known_subject(path, base)
        rows = {f"{subject.steps} steps, {line}": (0.8, 0.8, 0) if "constant" in line else PAPER for line in lines}
        compare_schedules(table, base, subject, name, rows)
        for line, row in zip(lines, rows):
            lines[line][subject.steps] = {metric: np.mean(values) for metric, values in table.rows[row].items()}
    if args.rank == 0:
        plot(args.out / f"{table.name}-plot.png", lines, ("direction", "distance", "frozen", "likeness"))


def load_known_subject(path, base):
    """-> Subject, and its name among the world's subjects, of which the true look is known. Raises BadInput."""
    subject = load_subject(path, base)
    name = Path(subject.settings["images"]).name
    if name not in SUBJECTS:
        raise BadInput(f"--subject {path}: was learned from {subject.settings['images']}, and the truth is known of toy/subjects only")
    return subject, name


def compare_schedules(table, base, subject, name, schedules):
    """A row for each schedule (lambda_s, lambda_l, K), or None for the base with the class word; every direction and ground in turn."""
    places = itertools.cycle((d, g) for g in GROUNDS for d in DIRECTIONS)
    scenes = [replace(scene, direction=direction, ground=ground)
              for scene, (direction, ground) in zip(draw_scenes(table.args.clips), places)]
    d = base.config.defaults

    def judge(i, clip):
        row = against(scenes[i], measure(clip, d.fps, class_or_subject(name)), ("direction", "ground"))
        return row | {"likeness": likeness(clip, name)}

    for row, schedule in schedules.items():
        words = f"{subject.placeholder} {subject.class_word}" if schedule else subject.class_word
        prompts = [f"a {words} moving {scene.direction} on the {scene.ground}" for scene in scenes]
        how = dict(subjects=[subject], lambdas=two_step_schedule(*schedule, d.steps)) if schedule else {}
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

    def fill(self, row, prompts, judge, examples=2, **how):
        """Samples every prompt, clip n from seed n, and judges it: judge(n, clip) -> metric -> number. `how` is for sample_clip."""
        args = self.args
        if row not in self.rows:
            mine, judged, shown = range(args.rank, len(prompts), args.world), {}, {}
            for n in tqdm(range(0, len(mine), BATCH), desc=row, unit=f"{BATCH} clips", disable=args.rank > 0):
                part = mine[n:n + BATCH]
                for i, clip in zip(part, sample_clips(self.base, prompts, part, **how)):
                    judged[i] = {metric: float(value) for metric, value in judge(i, clip).items()}
                    if i < examples:
                        shown[i] = clip
            judged, shown = (gathered(x, args.world) for x in (judged, shown))
            self.rows[row] = {metric: [judged[i][metric] for i in sorted(judged)] for metric in judged[0]}
            if args.rank == 0:
                self.save(row, [shown[i] for i in sorted(shown)])
        if args.rank == 0:
            numbers = {metric: f"{np.mean(x):.3f} ± {np.std(x) / len(x) ** 0.5:.3f}" for metric, x in self.rows[row].items()}
            if row == next(iter(self.rows)):
                print(f"| {args.clips} clips a row | " + " | ".join(numbers) + " |\n" + "|---" * (1 + len(numbers)) + "|")
            print(f"| {row} | " + " | ".join(numbers.values()) + " |", flush=True)

    def save(self, row, clips):
        """The rows so far as JSON; a strip with the row's first clips, a clip a line, below the strips of the rows before."""
        with complete_or_absent(self.path) as temporary:
            temporary.write_text(json.dumps({"settings": self.settings, "rows": self.rows}) + "\n", encoding="utf-8")
        picture, strips = self.path.with_suffix(".png"), []
        if len(self.rows) > 1 and picture.exists():
            strips = [np.asarray(Image.open(picture))]
        frames = [Image.fromarray(np.concatenate(list(clip), axis=1)) for clip in clips]
        strips += [np.asarray(labelled([frame], row if i == 0 else "")) for i, frame in enumerate(frames)]
        with complete_or_absent(picture) as temporary:
            Image.fromarray(np.concatenate(strips)).save(temporary, format="png")


BATCH = 16  # clips sampled at once


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
    """What a clip shows (Measured) against what was asked: metric -> number."""
    row = {name: getattr(seen, name) == getattr(scene, name) for name in names}
    return row | {"distance": seen.distance / (SPEED / scene.fps * (len(seen.track) - 1)),  # the world's own: 1
                  "frozen": seen.frozen, "broken": seen.broken > 0}


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
def psnr(base, picture):
    """(H, W, 3) uint8 -> what is left of it after the VAE, in dB."""
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].to(base.device) / 127.5 - 1
    return (10 * torch.log10(4 / (base.vae.decode(base.vae.encode(x)).clamp(-1, 1) - x).pow(2).mean())).item()


def plot(path, lines, metrics, width=300, height=200):
    """Line -> steps -> metric -> mean becomes one panel a metric, steps on a linear axis from 0, means from 0 to the largest or 1."""
    image = Image.new("RGB", (width * len(metrics), height + 14 * len(lines) + 8), "white")
    pen, colours = ImageDraw.Draw(image), ("#c03020", "#2050c0", "#208040")
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
