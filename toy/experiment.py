"""Measures the embedded base, and the paper's claim on it, where the truth is known to the pixel.

    python toy/experiment.py base      # does the base follow its captions, and do sprites keep their look?
    python toy/experiment.py decided   # at which sampling step is the direction of motion decided?
    python toy/experiment.py claim     # three subjects, each learned twice: constant lambda, the schedule
    python toy/experiment.py methods   # the rows of the paper's Tables 1 and 2, on three subjects
    python toy/experiment.py recipe    # variants of the training where the paper leaves it open

Each trains the subjects it needs, prints tables, and writes each table with a picture into --out. Numbers are
means with standard errors: over clips, or over trainings where several share a row. In all rows of a table,
clip n has the same seed, and its prompt asks for the same motion on the same ground. Trainings and rows that
exist are not made again. `torchrun --nproc_per_node 2 toy/experiment.py ...` shares the work between
processes, which is faster on CPU cores too.

Shapes: B clips, T frames; clips (B, T, H, W, 3) uint8.
"""
import copy
import itertools
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
from PIL import Image

from paper.baselines import inserted_adapters, load_dreamvideo
from paper.evaluate import consistency
from sample import ddim_steps, generate, parse_lambdas
from support.cli import (ROOT, BadInput, FlagParser, Progress, atomic_write, check_out, join_processes,
                         lock_folder, of_all_processes, run_script, wait_for_all)
from support.config import check_flags
from support.files import load_base, load_subject
from support.runs import newest_save
from support.video import labelled, read_json, slug
from toy.measure import likeness, measure, pixel_features, psnr, through_vae
from toy.world import (DIRECTIONS, GROUNDS, SIZE, SPEED, SUBJECTS, Scene, caption, colour_words,
                       draw_clip, draw_photos, random_scene)

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
BATCH = 8                           # clips sampled at once
NAMES = ("berry", "ember", "bee")   # the subjects that are learned
SEEDS = (0, 1)                      # the seeds that each is learned with
CLIPS_PER_STEP = 4                  # as in README's torchrun --nproc_per_node 4 train.py


@dataclass(frozen=True)
class Training:
    """One way to learn a subject. Trainings of the same name share a run; the longer one has a later save."""
    name: str
    flags: tuple = ()
    command: tuple = (ROOT / "train.py",)   # Python's arguments before the flags
    length: int = 1                         # in multiples of the base's own number of steps
    word_share: float = 0.0                 # for DreamVideo: the share of the steps that train V* alone


DEFAULT, LONGER = Training("default"), Training("default", length=2)
MOVING_PRIOR = Training("moving prior", ("--prior_motion",))
# train.py has no flag for the captions' templates, so this one adds to their list before it starts.
STATIC = ("-c", "import data, train; from support.cli import run_script; "
                "data.TEMPLATES += ('a static video of a {}',); run_script(train.main)")
CHANGES = [Training("caption dropout 0.2", ("--caption_dropout", 0.2)),
           Training("a static video of", command=STATIC),
           Training("2 of 8 frames", ("--frames", 2)),
           Training("4 of 8 frames", ("--frames", 4))]


@dataclass(frozen=True)
class Row:
    """A row of a table: the training that it samples, and its --lambdas. Without lambdas: the base alone."""
    name: str
    lambdas: str = ""
    training: Training = DEFAULT


# The schedules of lambda were all fixed before any was sampled.
PAPER = "0.4*5,0.8*45"      # lambda_s, K and lambda_l of the paper
CLASS_WORD = Row("base, class word")
CONSTANT_08, PAPER_K5 = Row("constant 0.8", "0.8*50"), Row("0.4 then 0.8, K = 5 (paper)", PAPER)
SCHEDULES = [CONSTANT_08, Row("constant 0.4", "0.4*50"), PAPER_K5,
             Row("0.4 then 0.8, K = 10", "0.4*10,0.8*40")]

# The rows of the paper's tables. Learning rates are the published ones times 67, because this base's own rate
# is 67 times the paper's. "Longer" is twice as long, because the paper does not give a number.
RIVALS = ROOT / "paper" / "baselines.py"
CUSTOM_DIFFUSION = Training("Custom Diffusion", ("--lr", 5.3e-3), (RIVALS, "custom_diffusion"))
DREAMVIDEO = Training("DreamVideo", ("--word_lr", 6.7e-3, "--lr", 6.7e-4), (RIVALS, "dreamvideo"),
                      word_share=0.75)
CROSS = Training("cross", ("--targets", "cross"))
METHODS = [
    CLASS_WORD,
    Row("Custom Diffusion", "1*50", CUSTOM_DIFFUSION),
    Row("Custom Diffusion, longer", "1*50", replace(CUSTOM_DIFFUSION, length=2)),
    Row("DreamVideo", "1*50", DREAMVIDEO),
    Row("DreamVideo, longer", "1*50", replace(DREAMVIDEO, name="DreamVideo, longer", length=2)),
    Row("LoRA on cross-attention, constant 0.8", "0.8*50", CROSS),
    Row("LoRA on all spatial attention, constant 0.8", "0.8*50"),
    Row("the same, 0.4 then 0.8, K = 5 (CustomCrafter)", PAPER)]


def main():
    args = parse_args()
    process = join_processes()
    if process.rank > 0:
        sys.stdout = open(os.devnull, "w")  # rank 0 prints for all
    with lock_folder(args.out) if process.rank == 0 else nullcontext():
        base = load_base(args.base, process.device, getattr(torch, args.precision))
        args.run(args, base, process)


# ------------------------------------------------------------------------------------------------------------
# The experiments


def measure_base(args, base, process):
    """Whether clips follow the captions of scenes that were never trained on; and the VAE's error.

    The world's own clips, after the VAE, show how well a perfect UNet would do.
    """
    scenes, table = unseen_scenes(args.clips), Table(args, base, process, "base")

    def judge(i, clip):
        measures = measure(clip, scenes[i].fps)
        numbers = against(scenes[i], measures, ("direction", "colour", "pattern", "shape", "ground"))
        return numbers | {"colour drift": measures.colour_drift, "shape drift": measures.shape_drift}

    def from_the_world(base, prompts, indices):
        return np.stack([through_vae(base, draw_clip(scenes[i])) for i in indices])

    captions = [caption(scene) for scene in scenes]
    table.fill("the world's own, after the VAE", captions, judge, range(6), from_the_world)
    table.fill("base", captions, judge, range(6))
    world = [draw_clip(scene, frames=1)[0] for scene in scenes]
    photos = [photo for name in SUBJECTS for photo in draw_photos(name)]
    for source, pictures in (("the world", world), ("the subjects' photos", photos)):
        print(f"VAE on {source}: {np.mean([psnr(base, picture) for picture in pictures]):.1f} dB")


def measure_decision(args, base, process):
    """Swaps the motion word for its opposite after k steps. If the first word wins, motion was settled."""
    scenes, table = unseen_scenes(args.clips), Table(args, base, process, "decided")
    prompts = [caption(scene) for scene in scenes]
    later_prompts = [caption(replace(scene, direction=OPPOSITE[scene.direction])) for scene in scenes]

    def judge(i, clip):
        direction, first_word = measure(clip, scenes[i].fps).direction, scenes[i].direction
        return {"first word": direction == first_word, "second word": direction == OPPOSITE[first_word]}

    def sample(base, prompts, indices):
        """Like `sample_clips`, but after k steps the UNet reads `later_prompts` instead of `prompts`."""
        later = base.encode_text([later_prompts[n] for n in indices] + [""] * len(indices))  # "": guidance
        later_t, *_ = ddim_steps(base.schedule, base.config.sampling.steps, eta=0)[k]
        unet, two_prompts = base.unet, copy.copy(base)
        two_prompts.unet = lambda z, t, fps, context: unet(z, t, fps, later if t[0] <= later_t else context)
        return sample_clips(two_prompts, prompts, indices)

    for k in (1, 2, 3, 5, 7, 10, 20):
        table.fill(f"k = {k}", prompts, judge, sample=sample)


def measure_claim(args, base, process):
    """Motion, composition and likeness of learned subjects at every schedule, and of the base."""
    if args.subject:
        subject = load_subject(args.subject, base)
        name = subject.settings["images"]
        if name not in SUBJECTS or subject.class_word != SUBJECTS[name][0]:
            raise BadInput(f"--subject {args.subject}: was learned from {name}, a {subject.class_word}; the "
                           f"true look is known only for toy/subjects")
        measure_rows(args, base, process, "claim", [CLASS_WORD, *SCHEDULES], [(subject, name)])
        return
    learned = learn(args, base, process, [DEFAULT, LONGER, MOVING_PRIOR])
    for title, name, rows, training in (
            ("default training", "claim", [CLASS_WORD, *SCHEDULES], DEFAULT),
            ("twice the steps", "claim-longer", SCHEDULES, LONGER),
            ("a prior of moving clips", "claim-moving-prior", [CONSTANT_08, PAPER_K5], MOVING_PRIOR)):
        print(f"\n{title}")
        numbers = measure_rows(args, base, process, name, rows, learned[training])
        for row in (CONSTANT_08, PAPER_K5):     # the same clips by subject
            by_subject = {}
            for metric in ("direction", "likeness"):
                values = np.reshape(numbers[row][metric], (len(NAMES), -1))
                by_subject |= {f"{subject} {metric}": own for subject, own in zip(NAMES, values)}
            print_row(row.name, by_subject, row is CONSTANT_08, len(SEEDS))
    for name in NAMES:
        photos = draw_photos(name)
        of_photos = np.mean([likeness(photo[None], name) for photo in photos])
        after_vae = np.mean([likeness(photo[None], name) for photo in through_vae(base, photos)])
        print(f"likeness of {name}'s photos themselves: {of_photos:.3f}, after the VAE: {after_vae:.3f}")


def measure_methods(args, base, process):
    """Every method of the paper's tables, one seed each: a table for each subject, and one for all."""
    learned = learn(args, base, process, [row.training for row in METHODS], SEEDS[:1])
    of_all = {row: {} for row in METHODS}
    for i, name in enumerate(NAMES):
        print(f"\n{name}")
        table = Table(args, base, process, f"methods-{name}", [pairs[i][0] for pairs in learned.values()])
        for row, numbers in of_all.items():
            for metric, values in measure_row(table, row, [learned[row.training][i]]).items():
                numbers.setdefault(metric, []).extend(values)
    print(f"\nall {len(NAMES)} subjects")
    for row, numbers in of_all.items():
        print_row(row.name, numbers, row is METHODS[0])


def measure_recipe(args, base, process):
    """The default training and those that change one thing, each at two schedules."""
    learned, measured = learn(args, base, process, [DEFAULT, *CHANGES]), {}
    for training in learned:
        print(f"\n{training.name}")
        name = "claim" if training is DEFAULT else slug(f"recipe {training.name}")  # claim has these rows too
        numbers = measure_rows(args, base, process, name, [CONSTANT_08, PAPER_K5], learned[training])
        measured[training.name] = numbers[PAPER_K5]
    print_differences(measured)


# ------------------------------------------------------------------------------------------------------------
# Trainings


def learn(args, base, process, trainings, seeds=SEEDS):
    """Trains every subject in NAMES with every seed, in --out/runs -> training -> list of (Subject, name).

    Each process takes one run at a time. A run that was stopped is resumed. Raises BadInput if one fails.
    """
    steps = args.steps or base.config.training.steps
    jobs = list(itertools.product(NAMES, seeds))
    save = lambda training, name, seed: (args.out.absolute() / "runs" / slug(f"{name} {seed} {training.name}")
                                         / f"step-{training.length * steps:06d}")
    # The longest training of a run makes the saves of the shorter ones too.
    longest = {training.name: training for training in sorted(trainings, key=lambda each: each.length)}
    runs = list(itertools.product(longest.values(), jobs))
    for training, job in runs[process.rank::process.world]:
        if not save(training, *job).exists():
            train(args.base, training, save(training, *job).parent, steps, *job)
    wait_for_all(process)
    learned = {}
    for training in dict.fromkeys(trainings):
        load = load_dreamvideo if training.word_share else load_subject
        learned[training] = [(load(save(training, name, seed) / "subject.safetensors", base), name)
                             for name, seed in jobs]
    return learned


def train(base_folder, training, folder, steps, name, seed):
    """Starts or resumes one run. There is a save after every `steps`, the base's own number of steps."""
    flags = ["--base", base_folder.absolute(), "--images", ROOT / "toy" / "subjects" / name,
             "--class_word", SUBJECTS[name][0], "--seed", seed, *training.flags,
             "--steps", training.length * steps, "--save_every", steps, "--keep_last", 100,
             "--batch_size", CLIPS_PER_STEP,
             "--resume" if newest_save(folder) else "--out", folder]
    if training.word_share:
        flags += ["--word_steps", max(1, int(training.word_share * training.length * steps))]
    # The training is a process of its own, which must not join this process's torchrun.
    of_torchrun = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC", "MASTER")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(of_torchrun)}
    command = [str(word) for word in (sys.executable, *training.command, *flags)]
    if subprocess.run(command, env=environment | {"PYTHONPATH": str(ROOT)}).returncode:
        raise BadInput(f"training {folder.name}: stopped, see above; the same command resumes it")


# ------------------------------------------------------------------------------------------------------------
# Scenes, clips and rows


def unseen_scenes(count):
    """Scenes at 8 frames per second, of a seed that pre-training does not use. Every other is held out."""
    rng = np.random.default_rng(1000)
    return [replace(random_scene(rng, unseen=i % 2 == 0), fps=8) for i in range(count)]


def against(scene, measures, names):
    """Compares a clip's measures (Measured) with the scene that was asked for -> metric -> number.

    The distance is relative to that of the world's own clips.
    """
    target = {"shape": scene.shape, "ground": scene.ground, "direction": scene.direction,
              "pattern": scene.look.pattern, "colour": colour_words(scene.look)}
    numbers = {name: getattr(measures, name) == target[name] for name in names}
    distance = measures.distance / (SPEED / scene.fps * (len(measures.track) - 1))
    return numbers | {"distance": distance, "frozen": measures.frozen, "broken": measures.broken > 0}


def sample_clips(base, prompts, indices, subjects=(), lambdas=None):
    """The prompts at `indices`, each with its index as seed -> clips (B, T, H, W, 3) uint8."""
    return generate(base, [prompts[n] for n in indices], indices, subjects, lambdas=lambdas).numpy()


def measure_rows(args, base, process, name, rows, learned):
    """Fills a table whose rows all sample the same subjects -> row -> metric -> a number per clip."""
    table = Table(args, base, process, name, [subject for subject, _ in learned])
    return {row: measure_row(table, row, learned) for row in rows}


def measure_row(table, row, learned):
    """Fills one row: subjects at the row's lambdas, or the base with their class words -> its numbers.

    learned: list of (subject, name), each of which makes an equal share of the clips, in order. The prompts
    ask for every direction on every ground in turn.
    """
    settings, share = table.base.config.sampling, table.args.clips // len(learned)
    motions, scenes, prompts = itertools.cycle(itertools.product(GROUNDS, DIRECTIONS)), [], []
    for n, (ground, direction) in zip(range(table.args.clips), motions):
        subject, name = learned[n // share]
        scenes.append(Scene(*SUBJECTS[name], ground, direction))
        words = f"{subject.placeholder} {subject.class_word}" if row.lambdas else subject.class_word
        prompts.append(f"a {words} moving {direction} on the {ground}")

    def sample(base, prompts, indices):
        if not row.lambdas:
            return sample_clips(base, prompts, indices)
        clips, lambdas = [], parse_lambdas(row.lambdas, settings.steps)
        for number, part in itertools.groupby(indices, key=lambda n: n // share):
            subject, _ = learned[number]
            with inserted_adapters(base.unet, getattr(subject, "adapters", {})):    # DreamVideo's
                clips.append(sample_clips(base, prompts, list(part), [subject], lambdas))
        return np.concatenate(clips)

    def judge(n, clip):
        _, name = learned[n // share]
        numbers = against(scenes[n], measure(clip, settings.fps), ("direction", "ground"))
        return numbers | {"likeness": likeness(clip, name), "consistency": consistency(pixel_features(clip))}

    examples = (0, 1) if len(learned) == 1 else [i * share for i in range(len(learned))]
    return table.fill(row.name, prompts, judge, examples, sample, len(learned))


# ------------------------------------------------------------------------------------------------------------
# Tables


class Table:
    """Rows of metric -> a number per clip, printed one by one, and a picture with example clips of each.

    The rows are kept in --out/NAME.json, so an interrupted table continues.
    """

    def __init__(self, args, base, process, name, subjects=()):
        self.args, self.base, self.process, self.printed = args, base, process, False
        self.settings = {"clips": args.clips, "base": base.config.fingerprint, "precision": base.precision,
                         "sampling": asdict(base.config.sampling),
                         "subjects": [subject.fingerprint() for subject in subjects]}
        self.path, self.picture = args.out / f"{name}.json", args.out / f"{name}.png"
        recorded = read_json(self.path) or {"settings": self.settings, "rows": {}}
        if recorded.get("settings") != self.settings:
            raise BadInput(f"--out {args.out}: {self.path.name} in it has other settings "
                           f"({recorded.get('settings')}); name another folder")
        self.rows = recorded["rows"] if self.picture.exists() else {}   # without it, rows are made again

    def fill(self, name, prompts, judge, examples=(0, 1), sample=None, trainings=1):
        """Samples every prompt, clip n from seed n, and judges the clips -> metric -> a number per clip.

        judge: function (n, clip) -> metric -> number. sample: function (base, prompts, indices) -> clips, by
        default `sample_clips`. The picture shows the clips at `examples`. `trainings` is how many of them
        share the clips (see `print_row`). Processes share the work.
        """
        if name not in self.rows:
            mine = range(self.process.rank, len(prompts), self.process.world)
            batches = [mine[i:i + BATCH] for i in range(0, len(mine), BATCH)]
            numbers, films = {}, {}
            for batch in Progress(batches, desc=name, unit=f"{BATCH} clips", disable=self.process.rank > 0):
                for n, clip in zip(batch, (sample or sample_clips)(self.base, prompts, batch)):
                    numbers[n] = {metric: float(value) for metric, value in judge(n, clip).items()}
                    if n in examples:
                        films[n] = clip[[0, 2, 5, 7]]
            for their_numbers, their_films in of_all_processes((numbers, films), self.process):
                numbers, films = numbers | their_numbers, films | their_films
            self.rows[name] = {metric: [numbers[n][metric] for n in sorted(numbers)] for metric in numbers[0]}
            if self.process.rank == 0:
                self.save(name, [films[n] for n in sorted(films)])
        print_row(name, self.rows[name], not self.printed, trainings)
        self.printed = True
        return self.rows[name]

    def save(self, name, films):
        """Writes the rows so far as JSON, and adds a strip with films (T, H, W, 3) to the picture."""
        with atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps({"settings": self.settings, "rows": self.rows}) + "\n")
        gap = np.full((SIZE, 8, 3), 255, np.uint8)
        images = [Image.fromarray(np.concatenate([*film, gap], axis=1)) for film in films]
        strips = [np.asarray(labelled(images, name))]
        if len(self.rows) > 1:
            strips.insert(0, np.asarray(Image.open(self.picture, formats=["PNG"])))
        with atomic_write(self.picture) as temporary:
            Image.fromarray(np.concatenate(strips)).save(temporary, format="png")


def print_row(name, numbers, first, trainings=1):
    """Prints a row of a Markdown table: means and standard errors. The `first` has the header above it.

    numbers: metric -> a number per clip. If there are several `trainings`, each made an equal share of the
    clips, in order, and the errors are over trainings.
    """
    if first:
        clips = len(next(iter(numbers.values())))
        by_trainings = f" by {trainings} trainings" if trainings > 1 else ""
        print(f"| {clips} clips per row{by_trainings} | " + " | ".join(numbers) + " |")
        print("|---" * (1 + len(numbers)) + "|")
    cells = [mean_and_error(values, trainings) for values in numbers.values()]
    print(f"| {name} | " + " | ".join(cells) + " |")


def mean_and_error(values, trainings):
    error = np.std(values) / len(values) ** 0.5
    if trainings > 1:
        error = np.reshape(values, (trainings, -1)).mean(1).std(ddof=1) / trainings ** 0.5
    return f"{np.mean(values):.3f} ± {error:.3f}"


def print_differences(measured):
    """measured: name of a training, the default's first -> metric -> a number per clip, at K = 5.

    Prints the differences from the default training, paired by subject and seed, and whether a change may
    become a default, which it may if it loses at most 0.05 of direction and 0.02 of likeness on average, and
    at most 0.15 of either on any subject.
    """
    (_, default), *changed = measured.items()
    columns = [f"{metric} {name}".strip() for metric in ("direction", "likeness") for name in ("", *NAMES)]
    print("\n| K = 5 less the default's | " + " | ".join(columns) + " | accepted |")
    print("|---" * (len(columns) + 2) + "|")
    for name, numbers in changed:
        cells, accepted = [], True
        for metric, max_loss in (("direction", 0.05), ("likeness", 0.02)):
            difference = np.subtract(numbers[metric], default[metric])
            of_subjects = difference.reshape(len(NAMES), -1).mean(1)
            cells.append(mean_and_error(difference, len(NAMES) * len(SEEDS)))
            cells += [f"{mean:.3f}" for mean in of_subjects]
            accepted &= of_subjects.mean() >= -max_loss and of_subjects.min() >= -0.15
        print(f"| {name} | " + " | ".join(cells) + f" | {'yes' if accepted else 'no'} |")


# ------------------------------------------------------------------------------------------------------------
# Flags


# Name -> function, default of --clips, and the number of trainings that share a row's clips.
EXPERIMENTS = {
    "base": (measure_base, 256, 1),
    "decided": (measure_decision, 64, 1),
    "claim": (measure_claim, 120, len(NAMES) * len(SEEDS)),
    "methods": (measure_methods, 20, 1),
    "recipe": (measure_recipe, 120, len(NAMES) * len(SEEDS))}


def parse_args():
    p = FlagParser(description="Measure the embedded base and the paper's claim on it.")
    p.add_argument("what", choices=list(EXPERIMENTS), help="what to measure")
    p.add_argument("--base", type=Path, default=ROOT / "toy" / "base",
                   help="base folder (default: %(default)s)")
    p.add_argument("--subject", type=Path,
                   help="for claim: subject.safetensors learned from one of toy/subjects "
                        "(default: three subjects, each trained with two seeds)")
    numbers = ", ".join(f"{name} {clips}" for name, (_, clips, _) in EXPERIMENTS.items())
    p.add_argument("--clips", type=int, help=f"clips per row (default: {numbers})")
    p.add_argument("--steps", type=int, help="of a default training, for a quick look (default: the base's)")
    p.add_argument("--precision", choices=["float32", "bfloat16"], default="float32",
                   help="of the UNet that samples; bfloat16 takes half the time on CPUs that support it "
                        "(default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("outputs/experiment"),
                   help="folder for results (default: %(default)s)")
    args = p.parse_args()
    check_flags(args, clips=(1, 100_000), steps=(1, 10**6))
    check_out(args.out)
    if args.subject and args.what != "claim":
        raise BadInput(f"--subject {args.subject}: is for claim; {args.what} learns subjects of its own")
    args.run, clips, shares = EXPERIMENTS[args.what]
    args.clips = args.clips or clips
    if args.clips % shares and not args.subject:
        raise BadInput(f"--clips {args.clips}: should be a multiple of {shares}, because {shares} trainings "
                       f"share a row's clips equally")
    return args


if __name__ == "__main__":
    run_script(main)
