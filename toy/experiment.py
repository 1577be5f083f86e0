"""Measures the embedded base, and the paper's claim on it, where the truth is known to the pixel.

    python toy/experiment.py base      # does the base follow its captions, and do sprites keep their look?
    python toy/experiment.py decided   # at which sampling step is the direction of motion decided?
    python toy/experiment.py claim --subject runs/berry     # motion and likeness of learned subjects

Each prints a table, and writes a picture with example clips of every row. Numbers are means with standard
errors: over clips, or over trainings if several of them share a row. In all rows of a table, clip n has the
same seed, and its prompt asks for the same motion on the same ground. `torchrun --nproc_per_node 2
toy/experiment.py ...` shares the clips between processes, which is faster on CPU cores too.

Shapes: B clips, T frames; clips (B, T, H, W, 3) uint8.
"""
import copy
import itertools
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
from PIL import Image

from paper.baselines import DreamVideoSubject, inserted_adapters
from paper.evaluate import consistency
from sample import ddim_steps, generate, parse_lambdas
from support.cli import (ROOT, BadInput, FlagParser, atomic_write, check_out, join_processes,
                         of_all_processes, progress_bar, run_script)
from support.config import check_flags
from support.files import Subject, find_subjects, load_base, load_subject, read_header
from support.video import labelled
from toy.measure import likeness, measure, pixel_features, psnr, through_vae
from toy.world import (DIRECTIONS, GROUNDS, SIZE, SUBJECTS, Scene, caption, colour_words,
                       draw_clip, draw_photos, random_scene)

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
BATCH = 8   # clips sampled at once
# The base without a subject, constant lambdas, and the paper's schedule with its K and with twice its K. All
# were fixed before any was sampled.
LAMBDAS = ["base", "0.8*50", "0.4*50", "0.4*5,0.8*45", "0.4*10,0.8*40"]


def main():
    args = parse_args()
    process = join_processes()
    if process.rank > 0:
        sys.stdout = open(os.devnull, "w")  # rank 0 prints for all
    base = load_base(args.base, process.device, getattr(torch, args.precision))
    args.run(args, base, process)


# ------------------------------------------------------------------------------------------------------------
# The experiments


def measure_base(args, base, process):
    """Measures how well clips follow captions of scenes that are new to the base, and the VAE's PSNR.

    The world's own clips, after the VAE, show how well a perfect UNet would do.
    """
    scenes, table = unseen_scenes(args.clips), Table(args, process, examples=range(6))
    captions = [caption(scene) for scene in scenes]

    def judge(n, clip):
        measures = measure(clip, scenes[n].fps)
        metrics = against(scenes[n], measures, ("direction", "colour", "pattern", "shape", "ground"))
        return metrics | {"colour drift": measures.colour_drift, "shape drift": measures.shape_drift}

    def from_the_world(indices):
        return np.stack([through_vae(base, draw_clip(scenes[n])) for n in indices])

    table.fill("the world's own, after the VAE", from_the_world, judge)
    table.fill("base", lambda indices: sample_clips(base, captions, indices), judge)
    world = [draw_clip(scene, frames=1)[0] for scene in scenes]
    photos = [photo for name in SUBJECTS for photo in draw_photos(name)]
    for source, pictures in (("the world", world), ("the subjects' photos", photos)):
        print(f"VAE on {source}: {np.mean([psnr(base, picture) for picture in pictures]):.1f} dB")


def measure_decision(args, base, process):
    """Swaps the motion word for its opposite after k steps. If the first word wins, motion was settled."""
    scenes, table = unseen_scenes(args.clips), Table(args, process)
    prompts = [caption(scene) for scene in scenes]
    later_prompts = [caption(replace(scene, direction=OPPOSITE[scene.direction])) for scene in scenes]

    def judge(n, clip):
        direction, first_word = measure(clip, scenes[n].fps).direction, scenes[n].direction
        return {"first word": direction == first_word, "second word": direction == OPPOSITE[first_word]}

    def sample(k, indices):
        """Samples `prompts`, but after k steps the UNet reads `later_prompts` instead."""
        later = base.encode_text([later_prompts[n] for n in indices] + [""] * len(indices))  # "": guidance
        later_t, *_ = ddim_steps(base.schedule, base.config.sampling.steps, eta=0)[k]
        unet, two_prompts = base.unet, copy.copy(base)
        two_prompts.unet = lambda z, t, fps, context: unet(z, t, fps, later if t[0] <= later_t else context)
        return sample_clips(two_prompts, prompts, indices)

    for k in (1, 2, 3, 5, 7, 10):
        table.fill(f"k = {k}", partial(sample, k), judge)


def measure_claim(args, base, process):
    """Measures motion, composition and likeness of subjects at each of --lambdas.

    The subjects make equal shares of a row's clips, in order. The prompts ask for every direction on every
    ground in turn.
    """
    subjects = [load_learned(path, base) for path in find_subjects(args.subject, base.config.fingerprint)]
    if not subjects:
        raise BadInput("--subject none: claim needs a subject, because it measures likeness")
    if args.clips % len(subjects):
        raise BadInput(f"--clips {args.clips}: should be a multiple of {len(subjects)}, because as many "
                       f"subjects share a row's clips equally")
    settings, share = base.config.sampling, args.clips // len(subjects)
    schedules = {text: parse_lambdas(text, settings.steps) for text in args.lambdas if text != "base"}
    looks = np.array([subject.settings["images"] for subject in subjects]).repeat(share)    # of each clip
    motions = itertools.cycle(itertools.product(GROUNDS, DIRECTIONS))
    scenes = [Scene(*SUBJECTS[look], *motion) for look, motion in zip(looks, motions)]

    def judge(n, clip):
        metrics = against(scenes[n], measure(clip, settings.fps), ("direction", "ground"))
        consistent = consistency(pixel_features(clip))
        return metrics | {"likeness": likeness(clip, looks[n]), "consistency": consistent}

    def prompt(n, words):
        return f"a {words} moving {scenes[n].direction} on the {scenes[n].ground}"

    def sample_base(indices):
        prompts = {n: prompt(n, subjects[n // share].class_word) for n in indices}
        return sample_clips(base, prompts, indices)

    def sample_subjects(lambdas, indices):
        clips = []
        for i, group in itertools.groupby(indices, key=lambda n: n // share):
            words, own = f"{subjects[i].placeholder} {subjects[i].class_word}", list(group)
            prompts = {n: prompt(n, words) for n in own}
            with inserted_adapters(base.unet, getattr(subjects[i], "adapters", {})):    # DreamVideo's
                clips.append(sample_clips(base, prompts, own, [subjects[i]], lambdas))
        return np.concatenate(clips)

    table = Table(args, process, len(subjects), examples=range(0, args.clips, share))
    rows = {}
    for text in args.lambdas:
        sample = sample_base if text == "base" else partial(sample_subjects, schedules[text])
        rows[text] = table.fill(text, sample, judge)
    for look in dict.fromkeys(looks):
        photos = draw_photos(look)
        of_photos = np.mean([likeness(photo[None], look) for photo in photos])
        after_vae = np.mean([likeness(photo[None], look) for photo in through_vae(base, photos)])
        print(f"\n{look}: its photos have a likeness of {of_photos:.3f}, after the VAE {after_vae:.3f}")
        for name, row in rows.items():
            means = [f"{metric} {row[metric][looks == look].mean():.3f}" for metric in row]
            print(f"  {name}: {', '.join(means)}")


# ------------------------------------------------------------------------------------------------------------
# Scenes, subjects and clips


def unseen_scenes(count):
    """Scenes at 8 frames per second, of a seed that pre-training does not use. Every other is held out."""
    rng = np.random.default_rng(1000)
    return [replace(random_scene(rng, unseen=i % 2 == 0), fps=8) for i in range(count)]


def against(scene, measures, names):
    """Compares a clip's Measured with the scene that was asked for -> dictionary of a number per metric."""
    target = {"shape": scene.shape, "ground": scene.ground, "direction": scene.direction,
              "pattern": scene.look.pattern, "colour": colour_words(scene.look)}
    metrics = {name: getattr(measures, name) == target[name] for name in names}
    return metrics | {"distance": measures.distance, "frozen": measures.frozen, "broken": measures.broken > 0}


def load_learned(path, base):
    """Loads a subject of any method. Raises BadInput unless it was learned from one of toy/subjects."""
    kind = Subject if "layers" in read_header(path) else DreamVideoSubject
    subject = load_subject(path, base, kind)
    name = subject.settings["images"]
    if name not in SUBJECTS or subject.class_word != SUBJECTS[name][0]:
        raise BadInput(f"--subject {path}: was learned from {name} as a {subject.class_word}, but the true "
                       f"look is known only for toy/subjects")
    return subject


def sample_clips(base, prompts, indices, subjects=(), lambdas=None):
    """Samples the B clips at these indices, which are also their seeds -> clips (B, T, H, W, 3) uint8."""
    return generate(base, [prompts[n] for n in indices], indices, subjects, lambdas=lambdas).numpy()


# ------------------------------------------------------------------------------------------------------------
# Tables


class Table:
    """Rows of numbers, printed one by one in Markdown, and a picture with example clips of each row."""

    def __init__(self, args, process, trainings=1, examples=(0, 1)):
        """If there are several `trainings`, each makes an equal share of a row's clips, in order, and the
        errors are over trainings. The picture shows the clips whose numbers are in `examples`.
        """
        self.args, self.process, self.trainings, self.examples = args, process, trainings, examples
        self.strips = []    # of the picture, one per row

    def fill(self, name, sample, judge):
        """Samples and judges --clips clips, shared by the processes -> dictionary of an array per metric.

        sample: function of B clip indices -> clips. judge: function of a clip's index and the clip ->
        dictionary of a number per metric.
        """
        mine = range(self.process.rank, self.args.clips, self.process.world)
        batches = [mine[i:i + BATCH] for i in range(0, len(mine), BATCH)]
        judged, films = {}, {}
        for batch in progress_bar(batches, desc=name, unit=f"{BATCH} clips", disable=self.process.rank > 0):
            for n, clip in zip(batch, sample(batch)):
                judged[n] = judge(n, clip)
                if n in self.examples:
                    films[n] = clip[[0, 2, 5, 7]]
        for their_judged, their_films in of_all_processes((judged, films), self.process):
            judged, films = judged | their_judged, films | their_films
        row = {metric: np.array([judged[n][metric] for n in sorted(judged)], float) for metric in judged[0]}
        if not self.strips:
            by_trainings = f" by {self.trainings} trainings" if self.trainings > 1 else ""
            print(f"| {self.args.clips} clips per row{by_trainings} | " + " | ".join(row) + " |")
            print("|---" * (1 + len(row)) + "|")
        print(f"| {name} | " + " | ".join(map(self.mean_and_error, row.values())) + " |")
        self.draw(name, [films[n] for n in sorted(films)])
        return row

    def mean_and_error(self, values):
        error = values.std() / len(values) ** 0.5
        if self.trainings > 1:
            of_trainings = values.reshape(self.trainings, -1).mean(1)
            error = of_trainings.std(ddof=1) / self.trainings ** 0.5
        return f"{values.mean():.3f} ± {error:.3f}"

    def draw(self, name, films):
        """Adds a row with films (T, H, W, 3) to the picture."""
        gap = np.full((SIZE, 8, 3), 255, np.uint8)
        images = [Image.fromarray(np.concatenate([*film, gap], axis=1)) for film in films]
        self.strips.append(labelled(images, name))
        if self.process.rank == 0:
            with atomic_write(self.args.out / f"{self.args.what}.png") as temporary:
                Image.fromarray(np.concatenate(self.strips)).save(temporary, format="png")


# ------------------------------------------------------------------------------------------------------------
# Flags


# Name -> function, default of --clips.
EXPERIMENTS = {"base": (measure_base, 256), "decided": (measure_decision, 64), "claim": (measure_claim, 120)}


def parse_args():
    p = FlagParser(description="Measure the embedded base and the paper's claim on it.")
    p.add_argument("what", choices=list(EXPERIMENTS), help="what to measure")
    p.add_argument("--base", type=Path, default=ROOT / "toy" / "base",
                   help="base folder (default: %(default)s)")
    p.add_argument("--subject", nargs="+", action="extend", default=[],
                   help="for claim: runs or files of subjects from toy/subjects (default: the newest)")
    p.add_argument("--lambdas", nargs="+", default=LAMBDAS,
                   help="for claim: one schedule per row, as in sample.py; base is the base with class words "
                        f"(default: {' '.join(LAMBDAS)})")
    numbers = ", ".join(f"{name} {clips}" for name, (_, clips) in EXPERIMENTS.items())
    p.add_argument("--clips", type=int, help=f"clips per row (default: {numbers})")
    p.add_argument("--precision", choices=["float32", "bfloat16"], default="float32",
                   help="of the UNet; bfloat16 takes half the time on CPUs that support it "
                        "(default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("outputs/experiment"),
                   help="folder for the picture (default: %(default)s)")
    args = p.parse_args()
    check_flags(args, clips=(1, 100_000))
    check_out(args.out)
    args.run, clips = EXPERIMENTS[args.what]
    args.clips = args.clips or clips
    return args


if __name__ == "__main__":
    run_script(main)
