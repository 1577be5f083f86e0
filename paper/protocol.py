"""The paper's protocol (Sec. "Experiments"): every method on every subject, with the same prompts and seeds.

    python paper/protocol.py --base checkpoints/videocrafter2 --subjects photos

Every folder of photos in photos/ is a subject, named by its class word: dog, dog2, backpack. Each method
learns each subject at its published settings. Each subject has 10 prompts, from paper/prompts/animals.txt
or objects.txt. Prints the rows of the paper's Tables 1 and 2. What is there already is not made again; the
same command goes on.
"""
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from cli import ROOT, BadInput, FlagParser, check_out, complete_or_absent, run_script, this_process
import numpy as np
import torch
import torch.distributed as dist

from config import check_flags, load_config
from paper.baselines import METHODS
from runs import newest_save, read_header
from video import slug


@dataclass(frozen=True)
class Row:
    """A row of a table: the training that it samples, and its --lambdas. Without lambdas: the base alone."""
    name: str
    training: str = ""
    lambdas: str = ""


PAPER = "0.4*5,0.8*45"      # lambda_s, K and lambda_l of the paper
ROWS = [
    Row("base, class word"),
    Row("Custom Diffusion", "Custom Diffusion", "1*50"),
    Row("Custom Diffusion, longer", "Custom Diffusion, longer", "1*50"),
    Row("DreamVideo", "DreamVideo", "1*50"),
    Row("DreamVideo, longer", "DreamVideo, longer", "1*50"),
    Row("LoRA on cross-attention, constant 0.8", "cross", "0.8*50"),
    Row("LoRA on all spatial attention, constant 0.8", "all", "0.8*50"),
    Row("the same, 0.4 then 0.8, K = 5 (CustomCrafter)", "all", PAPER)]
ANIMALS = {"dog", "cat", "bird", "duck", "goose", "hen", "chicken", "owl", "parrot", "penguin", "horse",
           "pony", "cow", "sheep", "goat", "pig", "rabbit", "hamster", "squirrel", "mouse", "fox", "wolf",
           "bear", "panda", "lion", "tiger", "monkey", "elephant", "turtle", "fish"}


def published_trainings(paper_steps):
    """Name of a training -> its flags of train.py. "Longer" is twice as long here; the paper does not say."""
    custom_diffusion = METHODS["custom_diffusion"].published["steps"]
    dreamvideo, word_steps = (METHODS["dreamvideo"].published[name] for name in ("steps", "word_steps"))
    return {"Custom Diffusion": {"method": "custom_diffusion", "steps": custom_diffusion},
            "Custom Diffusion, longer": {"method": "custom_diffusion", "steps": 2 * custom_diffusion},
            "DreamVideo": {"method": "dreamvideo", "steps": dreamvideo},
            "DreamVideo, longer": {"method": "dreamvideo", "steps": 2 * dreamvideo,
                                   "word_steps": 2 * word_steps},
            "cross": {"targets": "cross", "steps": paper_steps},
            "all": {"steps": paper_steps}}


def main():
    args = parse_args()
    if this_process().world > 1:
        raise BadInput("torchrun: leave it out; this script starts processes itself, one on each GPU")
    paper_steps = load_config(args.base / "config.json").training.steps
    python = [sys.executable]
    if torch.cuda.device_count() > 1:
        python += ["-m", "torch.distributed.run", "--nproc_per_node", torch.cuda.device_count()]
    numbers = {row.name: {} for row in ROWS}
    folders = sorted(path for path in args.subjects.glob("[!.]*") if path.is_dir())
    if not folders:
        raise BadInput(f"--subjects {args.subjects}: should hold a folder of photos for each subject, "
                       f"named by its class word")
    for folder in folders:
        class_word = re.sub(r"[\d_]+", " ", folder.name).strip()
        out = args.out / folder.name
        trainings = {}
        for name, flags in published_trainings(paper_steps).items():
            trainings[f"{folder.name} {name}"] = {**flags, "images": folder, "class_word": class_word}
        learned = train_subjects(args, trainings)
        prompts = write_prompts(out / "prompts.txt", class_word)
        for row in ROWS:
            subject = ["--subject", "none"]
            if row.training:
                run = learned[f"{folder.name} {row.training}"]
                subject = ["--subject", run / "subject.safetensors", "--lambdas", row.lambdas]
            command("sampling", *python, ROOT / "sample.py", "--base", args.base, *subject,
                    "--prompts", prompts, "--num_videos", args.clips, "--seed", 0, "--format", "mp4",
                    "--out", out / slug(row.name))
        towers = []
        for flag, path in (("--clip", args.clip), ("--dino", args.dino)):
            towers += [flag, path] if path else []
        command("measuring", *python, ROOT / "paper" / "evaluate.py", "--videos",
                *(out / slug(row.name) for row in ROWS), "--images", folder, "--out", out, *towers)
        add_evaluation(numbers, out / "evaluation.json")
    print(f"{len(folders)} subjects:")
    for row in ROWS:
        print_row(row.name, numbers[row.name], row is ROWS[0])


def write_prompts(path, class_word):
    """The ten prompts of an animal or an object, with its class word in them -> path."""
    prompt_list = "animals" if class_word in ANIMALS else "objects"
    text = (ROOT / "paper" / "prompts" / f"{prompt_list}.txt").read_text(encoding="utf-8")
    with complete_or_absent(path) as temporary:
        temporary.write_text(text.replace("{class word}", class_word), encoding="utf-8")
    return path


def add_evaluation(numbers, path):
    """Adds what paper/evaluate.py wrote to row -> metric -> a number per video."""
    names = {slug(row.name): row.name for row in ROWS}
    for video in json.loads(path.read_text(encoding="utf-8"))["videos"]:
        metrics = numbers[names[Path(video["folder"]).name]]
        for metric, value in video.items():
            if isinstance(value, float):
                metrics.setdefault(metric, []).append(value)


# ------------------------------------------------------------------------------------------------------------
# Also for toy/experiment.py


def train_subjects(args, trainings):
    """Name -> flags of train.py; each becomes a run under args.out. Returns name -> folder.

    Each process takes one training at a time. A training that has its last save is not started again. A
    training that has an earlier save is resumed.
    """
    process = this_process()
    folders = {name: args.out / "runs" / slug(name) for name in trainings}
    environment = dict(os.environ)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # each training is a process of its own
        environment.pop(name, None)
    if process.world > 1 and process.device.type == "cuda":     # and sees its parent's device alone
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        own = visible.split(",")[process.device.index] if visible else str(process.device.index)
        environment["CUDA_VISIBLE_DEVICES"] = own
    if len(trainings) < process.world:
        environment.pop("OMP_NUM_THREADS", None)  # a training on its own has all cores
    for name in list(trainings)[process.rank::process.world]:
        flags, folder = trainings[name], folders[name]
        if read_header(folder)["steps"] < flags["steps"]:
            training_flags = []
            for flag, value in flags.items():
                training_flags += [f"--{flag}"] if value is True else [f"--{flag}", value]
            start = "--resume" if newest_save(folder) else "--out"
            command(f"training {name}", sys.executable, ROOT / "train.py", "--base", args.base,
                    *training_flags, start, folder, environment=environment)
    if process.world > 1:
        dist.barrier()
    return folders


def command(what, *arguments, environment=None):
    """Runs a command to its end. Raises BadInput if the command fails, having said why itself."""
    if subprocess.run([str(argument) for argument in arguments], env=environment).returncode:
        raise BadInput(f"{what}: stopped, see above; the same command goes on with it")


def print_row(name, numbers, first, trainings=1):
    """Prints a row of a Markdown table: means and standard errors. The `first` has the header above it.

    numbers: metric -> a number per clip. With several `trainings` each made an equal share of the clips, one
    share after the other, and the errors are over trainings.
    """
    if first:
        clips = len(next(iter(numbers.values())))
        shared = f" by {trainings} trainings" if trainings > 1 else ""
        print(f"| {clips} clips per row{shared} | " + " | ".join(numbers) + " |")
        print("|---" * (1 + len(numbers)) + "|")
    cells = [mean_and_error(values, trainings) for values in numbers.values()]
    print(f"| {name} | " + " | ".join(cells) + " |")


def mean_and_error(values, trainings):
    error = np.std(values) / len(values) ** 0.5
    if trainings > 1:
        error = np.reshape(values, (trainings, -1)).mean(1).std(ddof=1) / trainings ** 0.5
    return f"{np.mean(values):.3f} ± {error:.3f}"


def parse_args():
    p = FlagParser(description="The paper's protocol: Tables 1 and 2 on a real base.")
    p.add_argument("--base", type=Path, default=ROOT / "checkpoints" / "videocrafter2",
                   help="base folder (default: %(default)s)")
    p.add_argument("--subjects", type=Path, required=True,
                   help="folder with a folder of photos for each subject, named by its class word")
    p.add_argument("--clips", type=int, default=1, help="videos of each prompt (default: %(default)s)")
    p.add_argument("--clip", type=Path, help="as for paper/evaluate.py")
    p.add_argument("--dino", type=Path, help="as for paper/evaluate.py")
    p.add_argument("--out", type=Path, default=Path("outputs/protocol"),
                   help="folder for all that is made (default: %(default)s)")
    args = p.parse_args()
    check_flags(args, {"clips": (1, 100_000)})
    check_out(args.out)
    return args


if __name__ == "__main__":
    run_script(main)
