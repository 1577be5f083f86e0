"""A training on disk: the folder it writes into, its saves and how to resume from one, its log, its previews.

OUT/step-N/ is a save: subject.safetensors, and state.pt with the optimizer's state. OUT/subject.safetensors is a
copy of the newest. OUT/log.jsonl has a line per step, OUT/preview.png a row per preview. The class prior that a
base generates lies beside the runs that use it.

Nothing to run here, and nothing of the paper. A reader of the method may skip this page.
"""
import hashlib
import json
import os
import re
import shutil
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from support.cli import (BadInput, Progress, atomic_write, check_out, check_same, lock_folder, one_line, remove,
                         wait_for_all, warn)
from support.files import SAVE_NAME, read_header, save_subject
from support.video import check_ffmpeg, labelled, read_json, slug, write_json, write_mp4

# ------------------------------------------------------------------------------------------------------------
# Which folder, which save


def pick_run(args, photos, process, suffix=""):
    """--out, --resume and the photos -> the folder that the run writes into, and the save it starts from or None.

    Without --out it is runs/NAME, where NAME is the photo folder's own name as typed, plus `suffix`. A finished
    run is never overwritten. Raises BadInput, also if the processes of several nodes find different saves.
    """
    default = Path("runs") / f"{Path(os.path.abspath(args.images)).name}{suffix}"
    if args.resume is not None:
        out, save = pick_resumed_run(args.out, args.resume, default.parent, digest_of_photos(photos))
    elif args.out and holds_run(args.out):
        raise BadInput(f"--out {args.out}: holds a run; --resume {args.out} continues it, another --out starts "
                       f"a new one")
    else:
        numbered = (default if n == 1 else default.with_name(f"{default.name}-{n}") for n in count(1))
        out, save = args.out or next(folder for folder in numbered if not holds_run(folder)), None
    check_out(out)
    check_same(process, save=save and f"{save.name} {read_header(save / 'subject.safetensors').get('fingerprint')}")
    return out, save


def pick_resumed_run(out, resume, parent, photos):
    if resume == "latest":
        run = out or latest_run(parent, photos)
        save = newest_save(run)
    else:
        run = save = Path(resume)
        if is_save(save):
            run = save.parent
        else:
            save = newest_save(run)
        if out and out != run and not newest_save(out):
            run = out  # a new branch of an old run
        elif out and out.resolve() != run.resolve():
            raise BadInput(f"--out {out}: holds another run; name a new folder for a branch of {run}")
        elif save != newest_save(run):
            raise BadInput(f"--resume {save}: {run} has newer saves; name a new --out for a branch from here")
    if not save:
        raise BadInput(f"--resume {resume}: no save is under {run}; without --resume a new run starts")
    return run, save


def latest_run(parent, photos):
    """The run under `parent` that saved last, of those that record these photos. Raises BadInput."""
    newest = [newest_save(run) for run in parent.iterdir() if run.is_dir()] if parent.exists() else []
    times = {}
    for save in filter(None, newest):
        with suppress(OSError):     # another run may just have removed it
            if recorded_settings(save).get("photos") == photos:
                times[save.parent] = save.stat().st_mtime
    if not times:
        raise BadInput(f"--resume latest: no run of these photos is under {parent}; name the run's folder, "
                       f"or start a new run without --resume")
    return max(times, key=times.get)


def is_save(path):
    return (path / "subject.safetensors").is_file() and (path / "state.pt").is_file()


def saves(out):
    """The saves in a run's folder, oldest first. Other files in a save, such as Finder's, do not matter."""
    steps = {path: re.fullmatch(SAVE_NAME, path.name) for path in out.glob("step-*") if is_save(path)}
    steps = {path: int(step[1]) for path, step in steps.items() if step}
    return sorted(steps, key=steps.get)


def newest_save(out):
    return next(reversed(saves(out)), None)


def holds_run(out):
    return bool(newest_save(out)) or os.path.lexists(out / "subject.safetensors")


def recorded_settings(folder):
    """The settings in the header of a folder's subject; {} if there is none that can be read."""
    return json.loads(read_header(folder / "subject.safetensors").get("settings", "{}"))


def steps_done(folder):
    """The training steps of a folder's subject; 0 if there is none that can be read."""
    return int(read_header(folder / "subject.safetensors").get("steps", 0))


@contextmanager
def lock_run(out, last_save, rank):
    """Lets only this run write into `out`, and puts the subject of `last_save` there if it continues that run.

    Raises BadInput if another run has written there since `last_save` was chosen.
    """
    if rank > 0:
        yield
        return
    with lock_folder(out):
        if last_save and last_save.parent.resolve() == out.resolve():
            if newest_save(out) != last_save:
                raise BadInput(f"--resume {last_save}: {newest_save(out)} is newer by now; start the command again")
            if steps_done(out) > steps_done(last_save):
                raise BadInput(f"{out / 'subject.safetensors'}: has {steps_done(out)} steps, more than {last_save}, "
                               f"and would be overwritten; move it")
            copy_to_run(last_save)
        elif holds_run(out):
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
    digests = {"base": digest(config), "photos": digest_of_photos(photos),
               "captions": digest([photo.caption for photo in photos]), "prior": digest(prior_files)}
    return settings | digests | {
        "images": Path(os.path.abspath(args.images)).name,      # a name, because people share subjects
        "precision": base.precision,
        "clips_per_step": process.world * training.batch_size * training.grad_accum}


def digest(values):
    """12 hex digits that tell anything that JSON holds from anything else."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def digest_of_photos(photos):
    return digest([photo.crc32 for photo in photos])


# What is wrong where a digest differs from the save's.
DIFFERENT = {"base": "--base: this is not the base", "photos": "--images: these are not the photos",
             "captions": "--images: these are not the captions",
             "prior": "--prior or --num_prior: these are not the pictures of the class"}


def check_settings(save, before, now):
    """A save's settings are those of the training that resumes from it. Raises BadInput."""
    flags = {"clips_per_step": "batch_size times --grad_accum times processes"}
    for name, value in now.items():
        if name == "images" or before.get(name) == value:
            continue
        if name in DIFFERENT:
            raise BadInput(f"{DIFFERENT[name]} that {save} was trained with")
        raise BadInput(f"--{flags.get(name, name)}: is {value}, but {save} was trained with {before.get(name)}")


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
        with best_effort(f"{old}, an old save, is not removed"):
            remove(old.rename(old.with_name(f".tmp-{os.getpid()}-{old.name}")))


def copy_to_run(save):
    """The subject of the newest save becomes the run's."""
    with atomic_write(save.parent / "subject.safetensors") as temporary:
        shutil.copyfile(save / "subject.safetensors", temporary)


def load_training(save, subject, optimizer, steps):
    """Puts a save into `subject` and `optimizer` -> its step. Raises BadInput if it is another run's."""
    try:
        state = torch.load(save / "state.pt", map_location="cpu", weights_only=True)
        tensors, step, saved = load_file(save / "subject.safetensors"), state["step"], state["optimizer"]
        check_settings(save, state["settings"], subject.settings)
        shapes = [moments["exp_avg"].shape for _, moments in sorted(saved["state"].items())]
    except BadInput:
        raise
    except Exception as error:  # pickle, zip, safetensors and the disk each raise their own
        raise BadInput(f"--resume {save}: not a readable save ({one_line(error)}); "
                       f"an older step-* folder may be") from None
    if step >= steps and steps_done(save.parent) >= step:
        raise BadInput(f"--steps {steps}: {save} has done {step} already; ask for more to continue")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    mine = subject.tensors()
    if shapes != [p.shape for p in parameters] or {name: x.shape for name, x in tensors.items()} != {
            name: x.shape for name, x in mine.items()}:
        raise BadInput(f"--resume {save}: its tensors have other shapes than this training's; is it another run's?")
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(tensors[name])
    optimizer.load_state_dict(saved)
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
    height = round(width * videos.shape[2] / videos.shape[3])
    shown = np.linspace(0, videos.shape[1] - 1, 4).round().astype(int)
    frames = videos[:, shown].reshape(-1, *videos.shape[2:])
    images = [Image.fromarray(frame).resize((width, height)) for frame in frames]
    with atomic_write(out / "previews" / f"step-{step:06d}.png") as temporary:
        labelled(images, label).save(temporary)
    previews = (out / "previews").glob("step-[0-9]*.png")
    previews = sorted(previews, key=lambda path: (len(path.name), path.name))   # as numbers: 1000000 after 999999
    rows = [np.asarray(Image.open(path, formats=["PNG"])) for path in previews]
    with atomic_write(out / "preview.png") as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary)


# ------------------------------------------------------------------------------------------------------------
# The class prior that a base generates


def prior_folder(out, base, sampling, class_word):
    """Where the class prior lies that this base makes of a class word, beside --out: pictures, or clips.

    Its name ends with a digest of everything that determines its pictures; its prior.json records that.
    """
    if sampling.frames > 1:
        check_ffmpeg("--prior_motion", "or leave --prior_motion out")
    settings = {"class_word": class_word, "base_fingerprint": base.config.fingerprint, "precision": base.precision}
    for name in ("frames", "height", "width", "fps", "save_fps", "steps", "cfg", "eta"):
        settings[name] = getattr(sampling, name)
    folder = Path("prior") / f"{slug(base.config.name)}-{slug(class_word)}-{digest(settings)}"
    try:
        check_out(out.parent / folder)
        return out.parent / folder, settings
    except BadInput:  # nothing may be written there, or the prior there is another user's
        return out / folder, settings


@contextmanager
def prior_writer(folder, settings, process, number):
    """Lets only this run fill the prior's folder; another run of the same class waits.

    Raises BadInput if the folder was made for something else, or if this node has only a part in the end.
    """
    if process.rank == 0:
        with lock_folder(folder, wait=True):
            record = read_json(folder / "prior.json")
            if record is None:
                write_json(folder / "prior.json", settings)
            elif record != settings:
                raise BadInput(f"{folder / 'prior.json'}: this prior was made for something else; delete {folder}")
            wait_for_all(process)
            yield
            wait_for_all(process)
    else:
        wait_for_all(process)
        yield
        wait_for_all(process)
    made = [path for path in folder.glob("*") if re.fullmatch(r"\d{4}\.(png|mp4)", path.name)]
    if len(made) < number:
        raise BadInput(f"{folder}: this node has {len(made)} of the prior's {number} files, because the nodes share "
                       f"no folder; make the prior on one, and give each a copy by --prior")


def save_prior_clip(path, video, fps):
    """Video (T, H, W, 3) -> path, a .png of its one frame or an .mp4."""
    with atomic_write(path) as temporary:
        if path.suffix == ".mp4":
            write_mp4(temporary, video, fps, quality=10)
        else:
            Image.fromarray(video[0]).save(temporary, format="png")
