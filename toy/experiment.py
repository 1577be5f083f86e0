"""Measures the embedded base, and the paper's claim on it, where the truth is known to the pixel.

    python toy/experiment.py base      # does the base show what captions say? Half of the scenes are held out
    python toy/experiment.py drift     # does what a caption leaves open stay the same through a clip?
    python toy/experiment.py decided   # at which sampling step is the direction of motion decided?
    python toy/experiment.py claim     # three subjects, each learned twice: constant lambda, the schedule
    python toy/experiment.py steps     # every save of the same trainings
    python toy/experiment.py sweep     # one subject with other ranks, learning rates and priors
    python toy/experiment.py           # methods: the rows of the paper's Tables 1 and 2, on three subjects

Each trains what it needs, prints a table, and writes the table with a picture into --out. Numbers are means
with standard errors: over clips, or over trainings where several share a row. Clip n of every row has the
same seed, and its prompt asks for the same motion on the same ground. What is there already is not made
again. `torchrun --nproc_per_node 2 toy/experiment.py ...` shares the work between processes, which is
faster on CPU cores too. The paper's own protocol is paper/protocol.py.

Shapes: B clips, T frames; clips (B, T, H, W, 3) uint8.
"""
import copy
import itertools
import json
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).parent.parent))
from cli import (ROOT, BadInput, FlagParser, Progress, check_out, complete_or_absent, join_processes,
                 leave_processes, only_writer, run_script, this_process)
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw

from config import check_flags, parse_lambdas
from files import load_base, load_subject, subject_fingerprint
from model import Tokenizer
from paper.evaluate import consistency
from paper.protocol import PAPER, ROWS, Row, print_row, train_subjects
from runs import saves, step_named
from sample import ddim_steps, generate
from toy.measure import likeness, measure, pixel_features, psnr, through_vae
from toy.world import (DIRECTIONS, GROUNDS, SPEED, SUBJECTS, caption, colour_words, draw_clip, draw_photos,
                       random_scene)
from video import facts_beside, labelled

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
BATCH = 16  # clips sampled at once

# The schedules of lambda, as sample.py's --lambdas. All were fixed before any was sampled.
CLASS_WORD = Row("base, class word")
CONSTANT_08 = Row("constant 0.8", lambdas="0.8*50")
CONSTANT_04 = Row("constant 0.4", lambdas="0.4*50")
PAPER_K5 = Row("0.4 then 0.8, K = 5 (paper)", lambdas=PAPER)
K10 = Row("0.4 then 0.8, K = 10", lambdas="0.4*10,0.8*40")
SCHEDULES = [
    CLASS_WORD,
    CONSTANT_08,
    CONSTANT_04,
    PAPER_K5,
    K10,
    Row("0.4 then 0.8, K = 20", lambdas="0.4*20,0.8*30"),
    Row("0.0 then 0.8, K = 5", lambdas="0*5,0.8*45")]

# Trainings: name -> flags of train.py. The paper trains for long, which is what freezes motion.
LONG = {"steps": 1000, "save_every": 250, "keep_last": 4}
NAMES = ("berry", "ember", "bee")   # the subjects that are learned
SEEDS = (0, 1)                      # and the seeds that each is learned with
# Each changes one setting of the first, which has the base's defaults.
SHORT = {"steps": 500}
SWEEP = {
    "defaults": SHORT,
    "rank 2": SHORT | {"rank": 2},
    "rank 8": SHORT | {"rank": 8},
    "lr 0.001": SHORT | {"lr": 0.001},
    "lr 0.004": SHORT | {"lr": 0.004},
    "moving prior": SHORT | {"prior_motion": True},
    "no prior": SHORT | {"alpha": 0}}
# For the rows of the paper's tables. Learning rates are the published ones times 67, as this base's own
# rate is 67 times the paper's. All train for 500 steps, except "longer": twice as long, since the paper does
# not say how long. In this order two processes share the work evenly. ROWS names these trainings.
CUSTOM_DIFFUSION = {"method": "custom_diffusion", "lr": 5.3e-3}
DREAMVIDEO = {"method": "dreamvideo", "word_lr": 6.7e-3, "lr": 6.7e-4}
TRAININGS = {
    "Custom Diffusion": CUSTOM_DIFFUSION | {"steps": 500},
    "Custom Diffusion, longer": CUSTOM_DIFFUSION | {"steps": 1000},
    "DreamVideo, longer": DREAMVIDEO | {"steps": 1000, "word_steps": 750},
    "DreamVideo": DREAMVIDEO | {"steps": 500, "word_steps": 375},
    "cross": {"targets": "cross", "steps": 500},
    "all": {"steps": 500}}


def main():
    args = parse_args()
    process = this_process()
    join_processes(process, backend="gloo")
    with only_writer(args.out, process.rank):
        base = load_base(args.base, process.device, getattr(torch, args.precision))
        EXPERIMENTS[args.what].run(args, base)
    leave_processes(process)


# ------------------------------------------------------------------------------------------------------------
# The experiments


def measure_base(args, base):
    """Clips of scenes never trained on, at default settings, against their captions. Also the VAE's error."""
    scenes, table = unseen_scenes(args.clips), Table(args, base, "base")

    def judge(i, clip):
        seen = measure(clip, scenes[i].fps)
        numbers = against(scenes[i], seen, ("direction", "colour", "pattern", "shape", "ground"))
        return numbers | {"VAE world dB": psnr(base, draw_clip(scenes[i], 1)[0])}

    table.fill("base", [caption(scene) for scene in scenes], judge, examples=range(12))
    if table.process.rank == 0:
        photos = np.concatenate([draw_photos(name) for name in SUBJECTS])
        print(f"VAE on the subjects' photos: {np.mean([psnr(base, photo) for photo in photos]):.1f} dB")


def measure_drift(args, base):
    """How much a sprite changes from frame to frame, where captions name its look and where they do not.

    The world's own clips after the VAE say what a perfect UNet would reach.
    """
    scenes, table = unseen_scenes(args.clips), Table(args, base, "drift")

    def judge(i, clip):
        seen = measure(clip, scenes[i].fps)
        numbers = against(scenes[i], seen, ("direction", "shape", "ground"))
        return numbers | {"colour drift": seen.colour_drift, "shape drift": seen.shape_drift}

    def from_the_world(base, prompts, which):
        return np.stack([through_vae(base, draw_clip(scenes[i])) for i in which])

    named, open_look = [caption(scene) for scene in scenes], [caption(scene, look=False) for scene in scenes]
    table.fill("the world's own, after the VAE", named, judge, sample=from_the_world)
    table.fill("the captions name the look", named, judge, examples=range(12))
    table.fill("they leave the look open", open_look, judge, examples=range(12))


def measure_decision(args, base):
    """After k steps the motion word becomes its opposite. Motion is decided where the first word wins."""
    scenes, table = unseen_scenes(args.clips), Table(args, base, "decided")
    prompts = [caption(scene) for scene in scenes]
    later_prompts = [caption(replace(scene, direction=OPPOSITE[scene.direction])) for scene in scenes]

    def judge(i, clip):
        seen, asked = measure(clip, scenes[i].fps).direction, scenes[i].direction
        return {"first word": seen == asked, "second word": seen == OPPOSITE[asked]}

    for k in (1, 2, 3, 5, 7, 10, 20):
        sample = partial(sample_exchanged, later_prompts=later_prompts, k=k)
        table.fill(f"k = {k}", prompts, judge, sample=sample)


def measure_claim(args, base):
    """Motion, composition and likeness of learned subjects at every schedule, and of the base."""
    trainings = {} if args.subject else claim_trainings()
    folders = train_subjects(args, trainings)
    paths = [folder / "subject.safetensors" for folder in folders.values()] or [args.subject]
    learned = [load_known_subject(path, base) for path in paths]
    table = Table(args, base, "claim", {"subjects": [subject_fingerprint(subject) for subject, _ in learned]})
    for row in SCHEDULES:
        measure_row(table, row, learned)
    if table.process.rank == 0:
        for name in dict.fromkeys(name for _, name in learned):
            photos = draw_photos(name)
            of_photos = np.mean([likeness(photo[None], name) for photo in photos])
            after_vae = np.mean([likeness(photo[None], name) for photo in through_vae(base, photos)])
            print(f"likeness of {name}'s photos themselves: {of_photos:.3f}, after the VAE: {after_vae:.3f}")


def claim_trainings():
    """Every subject, learned with every seed: name -> flags of train.py."""
    trainings = {}
    for name, seed in itertools.product(NAMES, SEEDS):
        trainings[f"{name} seed {seed}"] = LONG | photos_of(name) | {"seed": seed}
    return trainings


def photos_of(name):
    """The flags of train.py that name a subject."""
    return {"images": ROOT / "toy" / "subjects" / name, "class_word": SUBJECTS[name][0]}


def measure_steps(args, base):
    """Constant lambda and two schedules on every save of the claim's trainings."""
    folders = train_subjects(args, claim_trainings()).values()
    groups = {f"{step_named(equal[0])} steps": equal for equal in zip(*map(saves, folders))}
    rows = [CONSTANT_08, PAPER_K5, K10]
    measured = measure_groups(args, base, "steps", groups, rows)
    if this_process().rank == 0:
        steps = [step_named(equal[0]) for equal in groups.values()]
        lines = [Line(row.name, dict(zip(steps, numbers))) for row, numbers in zip(rows, zip(*measured))]
        plot(args.out / "steps-plot.png", lines, ("direction", "distance", "frozen", "likeness"))


def measure_sweep(args, base):
    """Constant lambda and the paper's schedule. One setting of the training changes at a time."""
    groups = {name: [folder] for name, folder in train_subjects(args, SWEEP).items()}
    measure_groups(args, base, "sweep", groups, [CONSTANT_08, PAPER_K5])


def measure_methods(args, base):
    """Every method on three subjects, and last a table over the clips of all three."""
    trainings = {}
    for name in NAMES:
        for training, flags in TRAININGS.items():
            trainings[f"{name} {training}"] = flags | photos_of(name)
    folders = train_subjects(args, trainings)

    together = [{} for _ in ROWS]
    for name in NAMES:
        learned = {}
        for training in TRAININGS:
            path = folders[f"{name} {training}"] / "subject.safetensors"
            learned[training], _ = load_known_subject(path, base)
        fingerprints = {training: subject_fingerprint(subject) for training, subject in learned.items()}
        table = Table(args, base, f"methods-{name}", {"subjects": fingerprints})
        for row, numbers in zip(ROWS, together):
            subject = learned[row.training or "all"]  # the base alone takes the class word only
            for metric, values in measure_row(table, row, [(subject, name)]).items():
                numbers.setdefault(metric, []).extend(values)
    if this_process().rank == 0:
        print(f"all {len(NAMES)} subjects:")
        for row, numbers in zip(ROWS, together):
            print_row(row.name, numbers, row is ROWS[0])


# ------------------------------------------------------------------------------------------------------------
# Rows


def unseen_scenes(count):
    """Scenes at 8 frames per second, of a seed that pre-training does not use. Every second is held out."""
    rng = np.random.default_rng(1000)
    return [replace(random_scene(rng, unseen=i % 2 == 0), fps=8) for i in range(count)]


def against(scene, seen, names):
    """What a clip shows (Measured) against what was asked: metric -> number.

    The distance is relative to that of the world's own clips.
    """
    asked = {"shape": scene.shape, "ground": scene.ground, "direction": scene.direction,
             "pattern": scene.look.pattern, "colour": colour_words(scene.look)}
    numbers = {name: getattr(seen, name) == asked[name] for name in names}
    distance = seen.distance / (SPEED / scene.fps * (len(seen.track) - 1))
    return numbers | {"distance": distance, "frozen": seen.frozen, "broken": seen.broken > 0}


def load_known_subject(path, base):
    """-> Subject, and its name in toy/subjects, where the true look is known. Raises BadInput."""
    subject = load_subject(path, base)
    images = subject.settings["images"]
    if Path(images).name not in SUBJECTS:
        raise BadInput(f"--subject {path}: was learned from {images}, "
                       f"and the truth is known of toy/subjects only")
    return subject, Path(images).name


def measure_row(table, row, learned):
    """Fills one row: subjects at the row's lambdas, or the base with their class words. Returns its numbers.

    learned: list of (subject, name). Each makes an equal share of the clips, one share after the other. The
    prompts ask for every direction on every ground in turn.
    """
    settings, share = table.base.config.sampling, table.args.clips // len(learned)
    places = itertools.cycle(itertools.product(GROUNDS, DIRECTIONS))    # of a scene, only these are asked for
    scenes = [replace(scene, ground=ground, direction=direction)
              for scene, (ground, direction) in zip(unseen_scenes(table.args.clips), places)]
    prompts = []
    for n, scene in enumerate(scenes):
        subject, _ = learned[n // share]
        named = f"{subject.placeholder} {subject.class_word}" if row.lambdas else subject.class_word
        prompts.append(f"a {named} moving {scene.direction} on the {scene.ground}")

    def sample(base, prompts, which):
        if not row.lambdas:
            return sample_clips(base, prompts, which)
        clips, lambdas = [], parse_lambdas(row.lambdas, settings.steps)
        for number, part in itertools.groupby(which, key=lambda n: n // share):
            clips.append(sample_clips(base, prompts, list(part), [learned[number][0]], lambdas))
        return np.concatenate(clips)

    def judge(n, clip):
        _, name = learned[n // share]
        numbers = against(scenes[n], measure(clip, settings.fps), ("direction", "ground"))
        return numbers | {"likeness": likeness(clip, name), "consistency": consistency(pixel_features(clip))}

    examples = (0, 1) if len(learned) == 1 else [i * share for i in range(len(learned))]
    return table.fill(row.name, prompts, judge, examples, sample, len(learned))


@dataclass
class Line:
    """One line of a plot: training steps -> metric -> a number per clip, of which the mean is drawn."""
    name: str
    numbers: dict

    def points(self, metric):
        """[(training steps, mean), ...]"""
        return [(steps, np.mean(numbers[metric])) for steps, numbers in self.numbers.items()]


def measure_groups(args, base, title, groups, rows):
    """A row for every group and each of `rows`. Returns their numbers: a list of lists, group by group.

    groups: name -> folders with a subject.safetensors each, which share the clips of a row.
    """
    learned = {}
    for group, folders in groups.items():
        learned[group] = [load_known_subject(folder / "subject.safetensors", base) for folder in folders]
    fingerprints = {group: [subject_fingerprint(subject) for subject, _ in known]
                    for group, known in learned.items()}
    table = Table(args, base, title, {"subjects": fingerprints})
    measured = []
    for group, known in learned.items():
        named = [replace(row, name=f"{group}, {row.name}") for row in rows]
        measured.append([measure_row(table, row, known) for row in named])
    return measured


# ------------------------------------------------------------------------------------------------------------
# Tables


class Table:
    """Rows of metric -> a number per clip, and a picture of them. Printed row by row.

    The rows are kept in --out/NAME.json, so an interrupted table goes on.
    """

    def __init__(self, args, base, name, more_settings=None):
        self.args, self.base, self.rows, self.process = args, base, {}, this_process()
        self.settings = {"clips": args.clips, "base": base.config.fingerprint,
                         "precision": str(next(base.unet.parameters()).dtype),
                         "sampling": asdict(base.config.sampling), **(more_settings or {})}
        self.path = args.out / f"{name}.json"
        found = facts_beside(self.path)
        if found is not None:
            if found.get("settings") != self.settings:
                raise BadInput(f"--out {args.out}: {self.path.name} in it has other settings "
                               f"({found.get('settings')}); name another folder")
            if self.path.with_suffix(".png").exists():  # if not, the rows' clips are made again
                self.rows = found["rows"]

    def fill(self, name, prompts, judge, examples=(0, 1), sample=None, trainings=1):
        """Samples every prompt, clip n from seed n, and judges the clips -> metric -> a number per clip.

        judge: function (n, clip) -> metric -> number. sample: function (base, prompts, which) -> clips, by
        default `sample_clips`. The picture shows the clips numbered `examples`. `trainings`: how many share
        the clips (print_row).
        """
        if name not in self.rows:
            judged, shown = self.judge_clips(name, prompts, judge, examples, sample or sample_clips)
            numbers = self.rows[name] = {}
            for n in sorted(judged):
                for metric, value in judged[n].items():
                    numbers.setdefault(metric, []).append(value)
            if self.process.rank == 0:
                self.save(name, [shown[n] for n in sorted(shown)])
        if self.process.rank == 0:
            print_row(name, self.rows[name], name == next(iter(self.rows)), trainings)
        return self.rows[name]

    def judge_clips(self, name, prompts, judge, examples, sample):
        """-> n -> metric -> number, and n -> clip for the examples. Processes share the work."""
        mine = range(self.process.rank, len(prompts), self.process.world)
        batches = [mine[i:i + BATCH] for i in range(0, len(mine), BATCH)]
        judged, shown = {}, {}
        for batch in Progress(batches, desc=name, unit=f"{BATCH} clips", disable=self.process.rank > 0):
            for n, clip in zip(batch, sample(self.base, prompts, batch)):
                judged[n] = {metric: float(value) for metric, value in judge(n, clip).items()}
                if n in examples:
                    shown[n] = clip
        return gathered(judged, self.process.world), gathered(shown, self.process.world)

    def save(self, name, clips):
        """Writes the rows so far as JSON. The clips go below the earlier rows' picture, two per strip."""
        with complete_or_absent(self.path) as temporary:
            content = {"settings": self.settings, "rows": self.rows}
            temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
        picture, strips = self.path.with_suffix(".png"), []
        if len(self.rows) > 1 and picture.exists():
            strips = [np.asarray(Image.open(picture))]
        films = [Image.fromarray(np.concatenate(list(clip), axis=1)) for clip in clips]
        if len(films) % 2 and len(films) > 1:
            films.append(Image.new("RGB", films[0].size, "white"))
        for i in range(0, len(films), 2):
            strips.append(np.asarray(labelled(films[i:i + 2], "" if i else name)))
        with complete_or_absent(picture) as temporary:
            Image.fromarray(np.concatenate(strips)).save(temporary, format="png")


def gathered(mine, world):
    """A dictionary of each process -> all of them in one."""
    dictionaries = [mine]
    if world > 1:
        dictionaries = [None] * world
        dist.all_gather_object(dictionaries, mine)
    together = {}
    for dictionary in dictionaries:
        together |= dictionary
    return together


# ------------------------------------------------------------------------------------------------------------
# Sampling


def sample_clips(base, prompts, which, subjects=(), lambdas=None):
    """The prompts numbered `which`, each with its number as seed -> clips (B, T, H, W, 3) uint8."""
    return generate(base, [prompts[n] for n in which], which, subjects, lambdas=lambdas).numpy()


@torch.no_grad()
def sample_exchanged(base, prompts, which, later_prompts, k):
    """As `sample_clips`. After k steps the UNet reads `later_prompts` in place of `prompts`."""
    texts = [later_prompts[n] for n in which] + [""] * len(which)  # and the empty prompts of the guidance
    later = base.text_encoder(Tokenizer()(texts).to(base.device))
    first_t, *_ = ddim_steps(base.schedule, base.config.sampling.steps, eta=0)[k]
    unet, exchanged = base.unet, copy.copy(base)
    exchanged.unet = lambda z, t, fps, context: unet(z, t, fps, later if t[0] <= first_t else context)
    return sample_clips(exchanged, prompts, which)


# ------------------------------------------------------------------------------------------------------------
# Plotting


def plot(path, lines, metrics, width=300, height=200):
    """Lines become one panel per metric. Steps are on a linear axis from 0, means from 0 to 1 or more."""
    image = Image.new("RGB", (width * len(metrics), height + 14 * len(lines) + 8), "white")
    for i, metric in enumerate(metrics):
        image.paste(panel(lines, metric, width, height), (width * i, 0))
    pen = ImageDraw.Draw(image)
    for n, (colour, line) in enumerate(zip(LINE_COLOURS, lines)):
        pen.text((40, height + 2 + 14 * n), line.name, fill=colour)
    with complete_or_absent(path) as temporary:
        image.save(temporary, format="png")


def panel(lines, metric, width, height):
    """The lines' means of one metric against training steps -> PIL image."""
    image = Image.new("RGB", (width, height), "white")
    pen, all_steps, top = ImageDraw.Draw(image), list(lines[0].numbers), 1.0
    for line in lines:
        top = max(top, *(mean for _, mean in line.points(metric)))

    def at(steps, value):
        return 40 + (width - 60) * steps / max(all_steps), height - 20 - (height - 50) * value / top

    pen.text((40, 6), f"{metric}, against training steps", fill="black")
    for value in (0, top / 2, top):
        pen.line([at(0, value), at(max(all_steps), value)], fill="#dddddd")
        pen.text((8, at(0, value)[1] - 6), f"{value:.2g}", fill="black")
    for steps in all_steps:
        pen.text((at(steps, 0)[0] - 8, height - 16), str(steps), fill="black")
    for colour, line in zip(LINE_COLOURS, lines):
        pen.line([at(steps, mean) for steps, mean in line.points(metric)], fill=colour, width=2)
    return image


LINE_COLOURS = ("#c03020", "#2050c0", "#208040")


# ------------------------------------------------------------------------------------------------------------
# Flags


@dataclass(frozen=True)
class Experiment:
    run: Callable
    clips: int      # per row, where --clips is left out


EXPERIMENTS = {
    "base": Experiment(measure_base, 256),
    "drift": Experiment(measure_drift, 128),
    "decided": Experiment(measure_decision, 64),
    "claim": Experiment(measure_claim, 132),
    "steps": Experiment(measure_steps, 66),
    "sweep": Experiment(measure_sweep, 32),
    "methods": Experiment(measure_methods, 32)}


def parse_args():
    p = FlagParser(description="Measure the embedded base and the paper's claim on it.")
    p.add_argument("what", nargs="?", choices=list(EXPERIMENTS), default="methods",
                   help="what to measure (default: %(default)s)")
    p.add_argument("--base", type=Path, default=ROOT / "toy" / "base",
                   help="base folder (default: %(default)s)")
    p.add_argument("--subject", type=Path,
                   help="for claim: subject.safetensors learned from one of toy/subjects "
                        "(default: three subjects, each trained for long with two seeds)")
    numbers = ", ".join(f"{name} {experiment.clips}" for name, experiment in EXPERIMENTS.items())
    p.add_argument("--clips", type=int,
                   help=f"clips per row, for methods per subject (default: {numbers})")
    p.add_argument("--precision", choices=["float32", "bfloat16"], default="float32",
                   help="of the UNet that samples; bfloat16 takes half the time on a processor that knows it "
                        "(default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("outputs/experiment"),
                   help="folder for results (default: %(default)s)")
    args = p.parse_args()
    check_flags(args, {"clips": (1, 100_000)})
    check_out(args.out)
    if args.subject and args.what != "claim":
        raise BadInput(f"--subject {args.subject}: is for claim; {args.what} learns subjects of its own")
    args.clips = args.clips or EXPERIMENTS[args.what].clips
    shares = len(claim_trainings())
    if args.what in ("claim", "steps") and not args.subject and args.clips % shares:
        raise BadInput(f"--clips {args.clips}: should be a multiple of {shares}, so that {shares} trainings "
                       f"share a row's clips equally")
    return args


if __name__ == "__main__":
    run_script(main)
