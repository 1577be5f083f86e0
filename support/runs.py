"""A training on disk: its folder, its saves and how to resume from them, its log, its previews, its prior.

OUT/step-N/ is a save: subject.safetensors, and state.pt with the optimizer's state. OUT/subject.safetensors
is a copy of the newest one. OUT/log.jsonl has a line per step, and OUT/preview.png a row per preview. The
class prior that a base generates lies beside the runs that use it.
"""
import hashlib
import json
import os
import re
import shutil
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import cache
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from support.cli import (BadInput, atomic_write, check_out, check_same, lock_folder, one_line, progress_bar,
                         remove, warn)
from support.files import read_header, save_subject
from support.video import check_ffmpeg, labelled, slug, write_mp4

# ------------------------------------------------------------------------------------------------------------
# The folder to write into, and the save to resume from


def pick_run(args, photos, process, suffix=""):
    """--out, --resume and the photos -> the folder to write into, and the save to resume from or None.

    Without --out, the folder is runs/NAME or, if that holds a run, NAME-2 and so on. NAME is the photo
    folder's, plus `suffix`. Raises BadInput, also if the nodes find different saves.
    """
    runs, name = Path("runs"), f"{Path(os.path.abspath(args.images)).name}{suffix}"
    save = None
    if args.resume is not None:
        save = pick_save(args.resume, args.out, runs, digest_of_photos(photos))
    if args.out:        # of a new run, or of a branch of another run
        out = args.out
    elif save:
        out = save.parent
    else:
        numbered = (runs / (f"{name}-{n}" if n > 1 else name) for n in count(1))
        out = next(folder for folder in numbered if not holds_run(folder))
    check_out(out)
    check_run(out, save)
    check_same(process, save=save and f"{save.name} {read_header(save).get('fingerprint')}")
    return out, save


def check_run(out, save):
    """Whether a training from this save continues the run in `out`. Raises BadInput if it overwrites one."""
    continues = save is not None and save.parent.resolve() == out.resolve()
    if continues and (save != newest_save(save.parent) or steps_done(out) > steps_done(save)):
        raise BadInput(f"--resume {save}: {out} has a newer save or subject; name a new --out for a branch")
    if holds_run(out) and not continues:
        raise BadInput(f"--out {out}: holds a run; --resume {out} continues it, another --out starts one")
    return continues


def pick_save(resume, out, runs, photos):
    """--resume (a save, a run, or "latest") -> that save, or the run's newest one. Raises BadInput."""
    if is_save(Path(resume)):
        return Path(resume)
    run = Path(resume) if resume != "latest" else out or latest_run(runs, photos)
    save = newest_save(run)
    if not save:
        raise BadInput(f"--resume {resume}: no save is under {run}; without --resume a new run starts")
    return save


def latest_run(runs, photos):
    """The run that saved last, among those of these photos. Raises BadInput."""
    times = {}
    for run in filter(saves, runs.glob("*/")):
        for folder in (run, *saves(run)):   # a run that was killed in its first save has no subject yet
            with suppress(OSError):         # an old save may just have been removed
                if json.loads(read_header(folder).get("settings", "{}")).get("photos") == photos:
                    times[run] = (folder / "subject.safetensors").stat().st_mtime
    if not times:
        raise BadInput(f"--resume latest: no run of these photos is under {runs}; name its folder")
    return max(times, key=times.get)


def is_save(path):
    """Whether a folder is a save. It may hold more than these two files, such as Finder's .DS_Store."""
    return (path / "subject.safetensors").is_file() and (path / "state.pt").is_file()


def saves(out):
    """The saves in a run's folder, oldest first."""
    folders = [path for path in out.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(filter(is_save, folders), key=lambda path: int(path.name.removeprefix("step-")))


def newest_save(out):
    return next(reversed(saves(out)), None)


def holds_run(out):
    return any((out / name).exists() for name in ("subject.safetensors", "preview.png")) or bool(saves(out))


def steps_done(folder):
    return int(read_header(folder).get("steps", 0))


@contextmanager
def lock_run(out, last_save, rank):
    """Lets only this run write into `out`. If it continues a run, that run's subject becomes `last_save`'s.

    Raises BadInput if another run has written there since `last_save` was picked.
    """
    with lock_folder(out, rank):
        if rank == 0 and check_run(out, last_save):
            copy_to_run(last_save)
        yield


# ------------------------------------------------------------------------------------------------------------
# The settings that must not change when a training resumes


def run_settings(args, training, sampling, base, photos, prior_files, process):
    """The settings of a training, recorded in its subject. To resume from a save, they must be the save's.

    Raises BadInput if the processes differ in one.
    """
    settings = {name: getattr(args, name) for name in ("targets", "seed", "placeholder", "class_word",
                                                        "no_flip", "word_lr")}
    for name in ("rank", "lr", "scale_lr", "frames", "weight_decay", "alpha", "caption_dropout"):
        settings[name] = getattr(training, name)
    settings |= {name: getattr(sampling, name) for name in ("height", "width", "fps")}
    config = asdict(replace(base.config, name="", sampling=None, training=None))
    settings |= {
        "base": digest(config), "photos": digest_of_photos(photos),
        "captions": digest([photo.caption for photo in photos]), "prior": digest(prior_files),
        "images": Path(os.path.abspath(args.images)).name,      # no path, because people share subjects
        "precision": base.precision,
        "clips_per_step": process.world * training.batch_size * training.grad_accum}
    check_same(process, **settings)
    return settings


def digest(values):
    """12 hex digits that identify values of any kind that JSON can hold."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def digest_of_photos(photos):
    return digest([photo.crc32 for photo in photos])


def check_settings(save, before, now):
    """Raises BadInput unless a save's settings are those of the training that resumes from it."""
    flags = {"base": "base", "photos": "images", "captions": "images", "prior": "prior or --num_prior"}
    for name, value in now.items():
        if name == "images" or before.get(name) == value:
            continue
        if name in flags:
            raise BadInput(f"--{flags[name]}: not the {name} that {save} was trained with")
        flag = "batch_size times --grad_accum times processes" if name == "clips_per_step" else name
        raise BadInput(f"--{flag}: is {value}, but {save} was trained with {before.get(name)}")


# ------------------------------------------------------------------------------------------------------------
# Saving and resuming


def save_training(out, subject, optimizer, keep_last):
    """Writes OUT/step-N/ with subject and optimizer, and copies the subject to OUT/subject.safetensors.

    Once the new save is on the disk, only the newest `keep_last` saves are kept.
    """
    save = out / f"step-{subject.steps:06d}"
    with atomic_write(save) as folder:
        folder.mkdir()
        save_subject(folder / "subject.safetensors", subject)
        state = {"step": subject.steps, "settings": subject.settings, "optimizer": optimizer.state_dict()}
        torch.save(state, folder / "state.pt")
    copy_to_run(save)
    for old in saves(out)[:-keep_last]:
        with best_effort(f"{old}: this old save was not removed"):
            remove(old.rename(old.with_name(f".tmp-{os.getpid()}-{old.name}")))


def copy_to_run(save):
    """Makes the subject of a save the run's subject."""
    with atomic_write(save.parent / "subject.safetensors") as temporary:
        shutil.copyfile(save / "subject.safetensors", temporary)


def load_training(save, subject, optimizer, steps):
    """Loads a save into `subject` and `optimizer`. Raises BadInput if the settings differ."""
    try:
        state = torch.load(save / "state.pt", map_location="cpu", weights_only=True)
        step, settings, adamw = state["step"], state["settings"], state["optimizer"]
        tensors = load_file(save / "subject.safetensors")
        moments = [moment["exp_avg"].shape for _, moment in sorted(adamw["state"].items())]
    except Exception as error:  # pickle, zip and safetensors each raise errors of their own
        raise BadInput(f"--resume {save}: not readable ({type(error).__name__}); try an older save") from None
    check_settings(save, settings, subject.settings)
    if step >= steps and steps_done(save.parent) >= step:
        raise BadInput(f"--steps {steps}: {save} has done {step} already; ask for more to continue")
    parameters = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    if moments != parameters:   # PyTorch would notice this only at the next step
        raise BadInput(f"--resume {save}: its optimizer is of a training of other layers; try an older save")
    with torch.no_grad():
        for name, parameter in subject.tensors().items():
            parameter.copy_(tensors[name])
    optimizer.load_state_dict(adamw)
    subject.steps = step


# ------------------------------------------------------------------------------------------------------------
# The log and the previews

warn_once = cache(warn)


@contextmanager
def best_effort(failure):
    """Logging, previews and cleaning up must not end a run, so warn about each failure once and continue."""
    try:
        yield
    except Exception as error:
        warn_once(f"{failure} ({one_line(error)}); training continues")


class Log:
    """Rank 0's progress bar, and log.jsonl with a line per step: losses, gradient norm, seconds, peak GB."""

    def __init__(self, out, done, steps, rank):
        self.out, self.steps, self.rank = out, steps, rank
        self.bar = progress_bar(desc="train", unit="step", initial=done, total=steps, disable=rank > 0)
        self.time, self.mean = time.time(), None

    def __call__(self, step, losses, grad_norm):
        if self.rank > 0:
            return
        seconds, self.time = time.time() - self.time, time.time()
        loss, prior_loss = losses.tolist()
        line = {"step": step, "loss": loss, "prior_loss": prior_loss, "grad_norm": grad_norm.item(),
                "seconds": round(seconds, 3)}
        if torch.cuda.is_available():
            line["memory"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.mean = loss if self.mean is None else 0.95 * self.mean + 0.05 * loss
        with best_effort(f"{self.out / 'log.jsonl'}: not written"):
            with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        with best_effort("progress: not shown"):
            self.bar.set_postfix(loss=f"{self.mean:.4f}", refresh=False)
            self.bar.update()

    def close(self, subject):
        """Prints the path of the subject, and if the run was stopped, how to continue it."""
        if self.rank > 0:
            return
        with suppress(OSError):     # after SIGHUP the terminal is gone
            self.bar.close()
            if subject.steps < self.steps:
                print(f"stopped after step {subject.steps} of {self.steps}; the same command with "
                      f"--resume {self.out} continues")
            print(f"wrote {self.out / 'subject.safetensors'}")


def save_preview(path, videos, label, width=96):
    """Adds a row to the picture: four frames of each of the videos (B, T, H, W, 3), under their label."""
    shown = np.linspace(0, videos.shape[1] - 1, 4).round().astype(int)
    rows = [labelled(np.concatenate(videos[:, shown]), label, width)]
    if path.exists():
        rows.insert(0, Image.open(path, formats=["PNG"]))
    with atomic_write(path) as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary)


# ------------------------------------------------------------------------------------------------------------
# The class prior that a base generates


def prior_folder(out, base, sampling, class_word):
    """The folder, beside --out, of the pictures or clips that this base makes for a class word.

    Its name ends with a digest of everything that determines their pixels. Raises BadInput if ffmpeg is
    needed and does not run.
    """
    if sampling.frames > 1:
        check_ffmpeg("--prior_motion", "or do without --prior_motion")
    identity = digest([asdict(sampling), class_word, base.config.fingerprint, base.precision])
    return out.parent / "prior" / f"{slug(base.config.name)}-{slug(class_word)}-{identity}"


def save_prior_clip(path, video, fps):
    """Writes video (T, H, W, 3) to `path`: an .mp4, or a .png of its one frame."""
    with atomic_write(path) as temporary:
        if path.suffix == ".mp4":
            write_mp4(temporary, video, fps, quality=10)
        else:
            Image.fromarray(video[0]).save(temporary, format="png")
