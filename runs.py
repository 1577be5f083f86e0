"""A training on disk: the folder it writes into, its saves and how to go on from one, its log, its previews.

OUT/step-N/ is a save: subject.safetensors, state.pt with what AdamW remembers, and checksums.json over
both. OUT/subject.safetensors is a copy of the newest. OUT/log.jsonl has a line per step; OUT/preview.png a
row per preview.

Nothing to run here, and nothing of the paper. A reader of the method may skip this page.
"""
import hashlib
import json
import os
import re
import shutil
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from cli import (BadInput, Busy, Progress, check_out, complete_or_absent, one_line, only_writer, peak_memory,
                 temporary_for)
from files import check_tensors, check_values, file_crc32, save_subject, subject_tensors
from video import check_ffmpeg, labelled, slug, write_mp4


SAVE_FILES = {"subject.safetensors", "state.pt"}        # and CHECKSUMS, which former versions did not write
CHECKSUMS = "checksums.json"


def pick_run(out, resume, default):
    """--out, --resume and the default folder -> where the run writes, and the save it starts from or None.

    Raises BadInput. A finished run is never written over.
    """
    if resume:
        return pick_resumed_run(out, resume, default)
    if out and holds_run(out):
        raise BadInput(f"--out {out}: holds a run; --resume {out} goes on with it, another --out starts anew")
    names = [default, *(default.with_name(f"{default.name}-{n}") for n in range(2, 10_000))]
    run = out or next(name for name in names if not holds_run(name))
    check_out(run)
    return run, None


def default_run(images):
    """runs/NAME, as the folder of photos is called where it was typed: a link keeps its own name."""
    return Path("runs") / Path(os.path.abspath(images)).name


def pick_resumed_run(out, resume, default):
    if resume == "latest":
        runs = [out] if out else [default, *default.parent.glob(f"{default.name}-[0-9]*")]
        run = max(runs, key=lambda run: newest_save(run).stat().st_mtime if newest_save(run) else 0)
        save = newest_save(run)
    else:
        run = save = Path(resume)
        if (save / "state.pt").exists():
            run = save.parent
        else:
            save = newest_save(run)
        if out and out != run and not newest_save(out):
            run = out  # a new branch of an old run
        elif save != newest_save(run):
            raise BadInput(f"--resume {save}: {run} has newer saves; name a new --out for a branch from here")
    if not save:
        raise BadInput(f"--resume {resume}: no save is under {run}; leave it out to start anew")
    return run, save


def saves(out):
    """The saves in a run's folder, oldest first: folders of exactly the name and content that we give one."""
    found = {}
    for path in out.glob("step-*"):
        name = re.fullmatch("step-([0-9]{6,18})", path.name)
        if not name or path.is_symlink() or not path.is_dir():
            continue
        if SAVE_FILES <= {file.name for file in path.iterdir()} <= SAVE_FILES | {CHECKSUMS}:
            found[path] = int(name[1])
    return sorted(found, key=found.get)


def newest_save(out):
    found = saves(out)
    return found[-1] if found else None


def holds_run(out):
    return bool(newest_save(out)) or os.path.lexists(out / "subject.safetensors")


@contextmanager
def run_writer(out, last_save, rank):
    """Holds a run's folder. Raises BadInput if another run has written there since `last_save` was chosen."""
    with only_writer(out, rank):
        going_on = last_save is not None and last_save.parent.resolve() == out.resolve()
        newest = newest_save(out) if rank == 0 else None
        if rank == 0 and not going_on and holds_run(out):
            raise BadInput(f"--out {out}: another run has ended there meanwhile; name another folder")
        if rank == 0 and going_on and newest.name != last_save.name:
            raise BadInput(f"--resume {last_save}: {newest} is newer meanwhile; start the command again")
        yield


def save_fingerprint(save):
    """What tells a save from any other, for processes to compare: its name and its files' checksums."""
    if save is None:
        return "none"
    return " ".join([save.name, *(f"{file_crc32(path):08x}" for path in sorted(save.iterdir()))])


def prior_folder(out, base, sampling, class_word):
    """Where the class prior lies that this base makes of a class word, beside --out: pictures, or clips.

    Its name ends with a digest of all that its pictures depend on, and its prior.json records it.
    """
    if sampling.frames > 1:
        check_ffmpeg("--prior_motion", "or leave --prior_motion out")
    facts = {"class_word": class_word, "base_fingerprint": base.config.fingerprint,
             "precision": str(next(base.unet.parameters()).dtype)}
    pictures_depend_on = ("frames", "height", "width", "fps", "save_fps", "steps", "cfg", "eta")
    facts |= {name: getattr(sampling, name) for name in pictures_depend_on}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path("prior") / f"{slug(base.config.name)}-{slug(class_word)}-{digest}"
    try:
        check_out(out.parent / folder)
    except BadInput:  # nothing may be written there, or the prior there is another user's
        return out / folder, facts
    return out.parent / folder, facts


@contextmanager
def prior_writer(folder, facts, rank):
    """Holds the prior's folder, once no other run fills it. Raises BadInput if it is of other facts."""
    with ExitStack() as stack:
        told = False
        while True:
            try:
                stack.enter_context(only_writer(folder, rank))
                break
            except Busy:
                if not told:
                    print(f"{folder}: another run makes this prior; waiting for it")
                told = True
                time.sleep(2)
        record = folder / "prior.json"
        if rank == 0 and not record.exists():
            with complete_or_absent(record) as temporary:
                temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if rank == 0 and json.loads(record.read_text(encoding="utf-8")) != facts:
            raise BadInput(f"{record}: says that this prior was made for something else; delete {folder}")
        yield


def save_prior_clip(path, video, fps):
    """Video (T, H, W, 3) -> path, a .png of its one frame or an .mp4, complete or absent."""
    with complete_or_absent(path) as temporary:
        if path.suffix == ".mp4":
            write_mp4(temporary, video, fps, quality=10)
        else:
            Image.fromarray(video[0]).save(temporary, format="png")


def run_settings(settings, sampling, args):
    """The flags that a resumed training has to have in common with its save."""
    found = {name: getattr(settings, name) for name in ("rank", "lr", "weight_decay", "alpha")}
    found |= {name: getattr(sampling, name) for name in ("frames", "height", "width", "fps")}
    from_args = ("seed", "placeholder", "no_flip", "method", "targets", "word_steps", "word_lr")
    return found | {name: getattr(args, name) for name in from_args}


def save_training(out, subject, optimizer, keep_last):
    """OUT/step-N/ with subject and optimizer, complete or absent; OUT/subject.safetensors is its copy."""
    save = out / f"step-{subject.steps:06d}"
    with complete_or_absent(save) as folder:
        folder.mkdir()
        save_subject(folder / "subject.safetensors", subject)
        state = {"step": subject.steps, "settings": subject.settings, "optimizer": optimizer.state_dict()}
        torch.save(state, folder / "state.pt")
        checksums = {name: file_crc32(folder / name) for name in sorted(SAVE_FILES)}
        (folder / CHECKSUMS).write_text(json.dumps(checksums))
    publish(save)
    for old in saves(out)[:-keep_last]:
        shutil.rmtree(old.rename(temporary_for(old)))


def publish(save):
    """The subject of the newest save becomes the run's."""
    with complete_or_absent(save.parent / "subject.safetensors") as temporary:
        shutil.copyfile(save / "subject.safetensors", temporary)


def load_training(save, subject, optimizer, steps):
    """Puts a save into `subject` and `optimizer` -> its step. Raises BadInput if it is another run's."""
    state, tensors = read_save(save)
    flags = {"clips_a_step": "batch_size times --grad_accum times processes", "photos": "images"}
    saved = {"no_flip": False} | state["settings"]  # former versions always mirrored
    for name, value in subject.settings.items():
        before = saved.get(name)
        if before != value:
            raise BadInput(f"--{flags.get(name, name)}: is {value}, and was {before} in the run that {save} "
                           f"is from")
    if state["step"] >= steps:
        if save == newest_save(save.parent):  # the run may have been killed before its subject was copied
            publish(save)
        raise BadInput(f"--steps {steps}: {save} has done {state['step']} already; ask for more to go on")
    parameters = subject_tensors(subject)
    check_tensors(save / "subject.safetensors", tensors, parameters)
    check_values(save / "subject.safetensors", tensors, [torch.float32])
    check_optimizer(save / "state.pt", state["optimizer"], optimizer)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def read_save(save):
    """-> (state, name -> tensor) of a save whose checksums are right. Raises BadInput."""
    try:
        if (save / CHECKSUMS).exists():
            for name, crc32 in json.loads((save / CHECKSUMS).read_text()).items():
                if name not in SAVE_FILES or file_crc32(save / name) != crc32:
                    raise ValueError(f"{name} is not what was saved")
        else:
            print(f"warning: {save}: is from a former version and has no checksums; taken as it is",
                  file=sys.stderr)
        state = torch.load(save / "state.pt", map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not state.keys() >= {"step", "settings", "optimizer"}:
            raise ValueError("state.pt has no step, settings and optimizer")
        if type(state["step"]) is not int or state["step"] < 1 or not isinstance(state["settings"], dict):
            raise ValueError("state.pt has no valid step and settings")
        return state, load_file(save / "subject.safetensors")
    except Exception as error:  # pickle, zip, safetensors and the disk each raise their own
        raise BadInput(f"--resume {save}: not a readable save ({one_line(error)}); "
                       f"an older step-* folder may be") from None


def check_optimizer(path, found, optimizer):
    """An AdamW state has this optimizer's groups, and moments of its parameters' shapes. Raises BadInput."""
    fault = BadInput(f"{path}: its optimizer is not this run's; an older step-* folder may be right")
    expected = optimizer.state_dict()
    try:
        if [group["params"] for group in found["param_groups"]] != [
                group["params"] for group in expected["param_groups"]]:
            raise fault
        if any(group.keys() != own.keys() for group, own in zip(found["param_groups"],
                                                                 expected["param_groups"])):
            raise fault
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, moments in found["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                if moments[name].shape != parameters[index].shape or not moments[name].isfinite().all():
                    raise fault
            if not torch.is_tensor(moments["step"]) or moments["step"].numel() != 1:
                raise fault
    except (KeyError, IndexError, TypeError, AttributeError):
        raise fault from None


# ------------------------------------------------------------------------------------------------------------
# Watching


@contextmanager
def watching(what):
    """What only shows a run never costs it: a full disk or a closed terminal is said, if that is possible."""
    try:
        yield
    except (OSError, ValueError) as error:
        try:
            print(f"warning: {what}: not written ({one_line(error)}); training goes on", file=sys.stderr)
        except (OSError, ValueError):  # stderr itself is what is gone
            pass


class Log:
    """Rank 0's progress bar; log.jsonl with a line per step: losses, gradient norm, lr, seconds, peak GB."""

    def __init__(self, path, first, steps, rank):
        self.file, self.rank = None, rank
        if rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = []
            if path.exists():
                lines = path.read_text(errors="replace").splitlines(keepends=True)
            with complete_or_absent(path) as temporary:  # steps after the save are done and logged again
                temporary.write_text("".join(line for line in lines[:first] if line.endswith("\n")))
            self.file = open(path, "a", buffering=1)
        self.bar = Progress(desc="train", unit="step", initial=first, total=steps, disable=rank > 0)
        self.time, self.mean = time.time(), None

    def __call__(self, step, **numbers):
        if self.rank > 0:
            return
        seconds, self.time = time.time() - self.time, time.time()
        line = {"step": step, **numbers, "seconds": round(seconds, 3), "memory": round(peak_memory(), 2)}
        with watching("log.jsonl"):
            self.file.write(json.dumps(line) + "\n")
        self.mean = numbers["loss"] if self.mean is None else 0.95 * self.mean + 0.05 * numbers["loss"]
        with watching("progress"):
            self.bar.set_postfix(loss=f"{self.mean:.4f}", refresh=False)
            self.bar.update()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()
        if self.file:
            self.file.close()


def save_preview(out, step, videos, label, width=96):
    """Videos (B, T, H, W, 3) become OUT/previews/step-N.png; all previews so far become OUT/preview.png."""
    height = round(width * videos.shape[2] / videos.shape[3])
    shown = np.linspace(0, videos.shape[1] - 1, 4).round().astype(int)
    frames = videos[:, shown].reshape(-1, *videos.shape[2:])
    images = [Image.fromarray(frame).resize((width, height)) for frame in frames]
    with complete_or_absent(out / "previews" / f"step-{step:06d}.png") as temporary:
        labelled(images, label).save(temporary)
    previews = sorted((out / "previews").glob("step-*.png"), key=lambda path: (len(path.name), path.name))
    rows = [np.asarray(Image.open(path)) for path in previews]  # as numbers: 1000000 after 999999
    with complete_or_absent(out / "preview.png") as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary)
