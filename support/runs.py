"""A training on disk: the folder it writes into, its saves and how to resume from one, its log, its previews.

OUT/step-N/ is a save: subject.safetensors, and state.pt with the optimizer's state. OUT/subject.safetensors
is a copy of the newest. OUT/log.jsonl has a line per step, OUT/preview.png a row per preview. The class prior
that a base generates lies beside the runs that use it.

Nothing to run here, and nothing of the paper. A reader of the method may skip this page.
"""
import hashlib
import json
import os
import re
import shutil
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from support.cli import (BadInput, Progress, atomic_write, check_out, check_same, lock_folder, one_line,
                         remove, wait_for_all, warn)
from support.files import SAVE_NAME, read_header, save_subject
from support.video import check_ffmpeg, labelled, slug, write_mp4

# ------------------------------------------------------------------------------------------------------------
# Which folder, which save


def pick_run(args, photos, process, suffix=""):
    """--out, --resume and the photos -> the folder to write into, and the save to start from or None.

    Without --out it is runs/NAME, where NAME is the photo folder's own name as typed, plus `suffix`. A run is
    never overwritten. Raises BadInput, also if the processes of several nodes find different saves.
    """
    default, out, save = Path("runs") / f"{Path(os.path.abspath(args.images)).name}{suffix}", args.out, None
    if args.resume is not None:
        out, save = pick_resumed_run(out, args.resume, default.parent, digest_of_photos(photos))
    elif out and holds_run(out):
        raise BadInput(f"--out {out}: holds a run; --resume {out} continues it, another --out starts one")
    elif not out:
        numbered = (default.with_name(f"{default.name}-{n}") if n > 1 else default for n in count(1))
        out = next(folder for folder in numbered if not holds_run(folder))
    check_out(out)
    check_same(process, save=save and f"{save.name} {header_of(save).get('fingerprint')}")
    return out, save


def pick_resumed_run(out, resume, parent, photos):
    if resume == "latest":
        run = out or latest_run(parent, photos)
        save = newest_save(run)
    else:
        run = Path(resume).parent if is_save(Path(resume)) else Path(resume)
        save = Path(resume) if is_save(Path(resume)) else newest_save(run)
    if not save:
        raise BadInput(f"--resume {resume}: no save is under {run}; without --resume a new run starts")
    if out and out.resolve() != run.resolve():  # a new branch of an old run
        if holds_run(out):
            raise BadInput(f"--out {out}: holds another run; name a new folder for a branch of {run}")
        return out, save
    if save != newest_save(run):
        raise BadInput(f"--resume {save}: {run} has newer saves; name a new --out for a branch from here")
    return run, save


def latest_run(parent, photos):
    """The run under `parent` that saved last, of those that record these photos. Raises BadInput."""
    times = {}
    for run in parent.iterdir() if parent.exists() else []:
        save = newest_save(run)
        with suppress(OSError):     # another run may just have removed an old save
            if save and json.loads(header_of(save).get("settings", "{}")).get("photos") == photos:
                times[run] = save.stat().st_mtime
    if not times:
        raise BadInput(f"--resume latest: no run of these photos is under {parent}; name the run's folder")
    return max(times, key=times.get)


def is_save(path):
    """A save is a folder with these two files, whatever else lies in it, such as Finder's .DS_Store."""
    return (path / "subject.safetensors").is_file() and (path / "state.pt").is_file()


def saves(out):
    """The saves in a run's folder, oldest first."""
    steps = {path: re.fullmatch(SAVE_NAME, path.name) for path in out.glob("step-*") if is_save(path)}
    return sorted(filter(steps.get, steps), key=lambda path: int(steps[path][1]))


def newest_save(out):
    return next(reversed(saves(out)), None)


def holds_run(out):
    return bool(newest_save(out)) or (out / "subject.safetensors").exists()


def header_of(folder):
    """The header of a run's or a save's subject; {} if there is none that can be read."""
    return read_header(folder / "subject.safetensors")


def steps_done(folder):
    return int(header_of(folder).get("steps", 0))


@contextmanager
def lock_run(out, last_save, rank):
    """Lets only this run write into `out`. If it continues a run, the subject there becomes `last_save`'s.

    Raises BadInput if another run has written there since `last_save` was chosen.
    """
    with lock_folder(out) if rank == 0 else nullcontext():
        if rank == 0 and last_save and last_save.parent.resolve() == out.resolve():
            if newest_save(out) != last_save or steps_done(out) > steps_done(last_save):
                raise BadInput(f"--resume {last_save}: {out} has a newer save or subject by now; start the "
                               f"command again, or move that subject")
            copy_to_run(last_save)
        elif rank == 0 and holds_run(out):
            raise BadInput(f"--out {out}: another run has been saved there by now; name another folder")
        yield


# ------------------------------------------------------------------------------------------------------------
# What a resumed training has in common with its save


def run_settings(args, training, sampling, base, photos, prior_files, process):
    """What a resumed training has to share with its save, recorded in the subject."""
    settings = {name: getattr(training, name) for name in ("rank", "lr", "scale_lr", "frames", "weight_decay",
                                                            "alpha", "caption_dropout")}
    settings |= {name: getattr(sampling, name) for name in ("height", "width", "fps")}
    for name in ("seed", "placeholder", "class_word", "no_flip", "targets", "word_lr"):
        settings[name] = getattr(args, name)
    config = asdict(base.config)
    for name in ("name", "sampling", "training"):
        del config[name]
    return settings | {
        "base": digest(config), "photos": digest_of_photos(photos),
        "captions": digest([photo.caption for photo in photos]), "prior": digest(prior_files),
        "images": Path(os.path.abspath(args.images)).name,      # a name, because people share subjects
        "precision": base.precision,
        "clips_per_step": process.world * training.batch_size * training.grad_accum}


def digest(values):
    """12 hex digits that tell anything that JSON holds from anything else."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def digest_of_photos(photos):
    return digest([photo.crc32 for photo in photos])


def check_settings(save, before, now):
    """A save's settings are those of the training that resumes from it. Raises BadInput."""
    different = {"base": "--base: this is not the base", "photos": "--images: these are not the photos",
                 "captions": "--images: these are not the captions",
                 "prior": "--prior or --num_prior: these are not the pictures of the class"}
    for name, value in now.items():
        if name == "images" or before.get(name) == value:
            continue
        if name in different:
            raise BadInput(f"{different[name]} that {save} was trained with")
        name_of_flag = "batch_size times --grad_accum times processes" if name == "clips_per_step" else name
        raise BadInput(f"--{name_of_flag}: is {value}, but {save} was trained with {before.get(name)}")


# ------------------------------------------------------------------------------------------------------------
# Saving and resuming


def save_training(out, subject, optimizer, keep_last):
    """Writes OUT/step-N/ with subject and optimizer; OUT/subject.safetensors becomes its copy.

    Older saves than the last `keep_last` are removed, after the new one is safely on the disk.
    """
    save = out / f"step-{subject.steps:06d}"
    if save in saves(out):  # stopped right after a save
        return
    with atomic_write(save) as folder:
        folder.mkdir()
        save_subject(folder / "subject.safetensors", subject)
        state = {"step": subject.steps, "settings": subject.settings, "optimizer": optimizer.state_dict()}
        torch.save(state, folder / "state.pt")
    copy_to_run(save)
    for old in saves(out)[:-keep_last]:
        with best_effort(f"{old}: this old save stays"):
            remove(old.rename(old.with_name(f".tmp-{os.getpid()}-{old.name}")))


def copy_to_run(save):
    """The subject of the newest save becomes the run's."""
    with atomic_write(save.parent / "subject.safetensors") as temporary:
        shutil.copyfile(save / "subject.safetensors", temporary)


def load_training(save, subject, optimizer, steps):
    """Puts a save into `subject` and `optimizer` -> its step. Raises BadInput if it is another run's."""
    try:
        state = torch.load(save / "state.pt", map_location="cpu", weights_only=True)
        step, settings, adamw = state["step"], state["settings"], state["optimizer"]
        tensors = load_file(save / "subject.safetensors")
        moments = [moment["exp_avg"].shape for _, moment in sorted(adamw["state"].items())]
    except Exception as error:  # pickle, zip, safetensors and the disk each raise their own
        raise BadInput(f"--resume {save}: not readable ({one_line(error)}); try an older save") from None
    check_settings(save, settings, subject.settings)
    if step >= steps and steps_done(save.parent) >= step:
        raise BadInput(f"--steps {steps}: {save} has done {step} already; ask for more to continue")
    own, parameters = subject.tensors(), sum((group["params"] for group in optimizer.param_groups), [])
    shapes = [{name: x.shape for name, x in named.items()} for named in (own, tensors)]
    if shapes[0] != shapes[1] or moments != [parameter.shape for parameter in parameters]:
        raise BadInput(f"--resume {save}: its tensors have other shapes than this training's")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    optimizer.load_state_dict(adamw)
    subject.steps = step
    return step


# ------------------------------------------------------------------------------------------------------------
# The log and the previews

warned = set()


@contextmanager
def best_effort(what):
    """Logging, previews and cleaning up must not end a run: warn of each failure once, and continue."""
    try:
        yield
    except Exception as error:
        if what not in warned:
            warn(f"{what} ({one_line(error)}); training continues")
        warned.add(what)


class Log:
    """Rank 0's progress bar, and log.jsonl with a line per step: losses, gradient norm, seconds, peak GB."""

    def __init__(self, out, done, steps, rank):
        self.out, self.steps, self.rank = out, steps, rank
        self.bar = Progress(desc="train", unit="step", initial=done, total=steps, disable=rank > 0)
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
        """Prints where the subject is, and how to continue if the run was stopped."""
        if self.rank > 0:
            return
        with suppress(OSError):     # after SIGHUP the terminal is gone
            self.bar.close()
            if subject.steps < self.steps:
                print(f"stopped after step {subject.steps} of {self.steps}; the same command with "
                      f"--resume {self.out} continues")
            print(f"wrote {self.out / 'subject.safetensors'}")


class LiveLoRA:
    """Sets lambda while the updates are still beside the weights: for previews in the middle of training."""

    def __init__(self, layers):
        self.layers = layers

    def set(self, lam):
        for layer in self.layers.values():
            layer.lam = lam


def save_preview(out, step, videos, label, width=96):
    """Videos (B, T, H, W, 3) become OUT/previews/step-N.png; all previews so far become OUT/preview.png."""
    size = width, round(width * videos.shape[2] / videos.shape[3])
    shown = np.linspace(0, videos.shape[1] - 1, 4).round().astype(int)
    images = [Image.fromarray(frame).resize(size) for video in videos for frame in video[shown]]
    with atomic_write(out / "previews" / f"step-{step:06d}.png") as temporary:
        labelled(images, label).save(temporary)
    in_order = lambda path: (len(path.name), path.name)     # 1000000 after 999999
    previews = sorted((out / "previews").glob("step-[0-9]*.png"), key=in_order)
    rows = [np.asarray(Image.open(path, formats=["PNG"])) for path in previews]
    with atomic_write(out / "preview.png") as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary)


# ------------------------------------------------------------------------------------------------------------
# The class prior that a base generates


def prior_folder(out, base, sampling, class_word):
    """Where the class prior lies that this base makes of a class word, beside --out: pictures, or clips.

    Its name ends with a digest of everything that determines its pictures.
    """
    if sampling.frames > 1:
        check_ffmpeg("--prior_motion", "or leave --prior_motion out")
    settings = {name: getattr(sampling, name) for name in ("frames", "height", "width", "fps", "save_fps",
                                                            "steps", "cfg", "eta")}
    settings |= {"class_word": class_word, "base": base.config.fingerprint, "precision": base.precision}
    folder = Path("prior") / f"{slug(base.config.name)}-{slug(class_word)}-{digest(settings)}"
    try:
        check_out(out.parent / folder)
        return out.parent / folder
    except BadInput:  # nothing may be written there, or the prior there is another user's
        return out / folder


@contextmanager
def prior_writer(folder, process, number):
    """Lets only this run fill the prior's folder; another run of the same class waits.

    Raises BadInput if this node has only a part of the `number` files in the end.
    """
    with lock_folder(folder, wait=True) if process.rank == 0 else nullcontext():
        wait_for_all(process)
        try:
            yield
        except KeyboardInterrupt:
            print(f"{folder}: keeps what has been made so far; the same command continues")
            raise
        wait_for_all(process)
    made = [path for path in folder.iterdir() if re.fullmatch(r"\d{4}\.(png|mp4)", path.name)]
    if len(made) < number:
        raise BadInput(f"{folder}: this node has {len(made)} of the prior's {number} files, because the "
                       f"nodes share no folder; make the prior on one, and give each a copy by --prior")


def save_prior_clip(path, video, fps):
    """Video (T, H, W, 3) -> path, a .png of its one frame or an .mp4."""
    with atomic_write(path) as temporary:
        if path.suffix == ".mp4":
            write_mp4(temporary, video, fps, quality=10)
        else:
            Image.fromarray(video[0]).save(temporary, format="png")
