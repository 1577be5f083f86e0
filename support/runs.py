"""A training on disk: the folder it writes into, its saves and how to go on from one, its log, its previews.

OUT/step-N/ is a save: subject.safetensors, state.pt with what AdamW remembers, and checksums.json over
both. OUT/subject.safetensors is a copy of the newest. OUT/log.jsonl has a line per step; OUT/preview.png a
row per preview.

Nothing to run here, and nothing of the paper. A reader of the method may skip this page.
"""
import hashlib
import io
import json
import os
import re
import shutil
import time
import zlib
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

from cli import (BadInput, Busy, Progress, check_out, check_regular, complete_or_absent, one_line,
                 only_writer, peak_memory, read_bytes, read_json, temporary_for, warn)
from files import SAVE_NAME, check_tensors, check_values, file_crc32, save_subject, subject_tensors
from video import check_ffmpeg, facts_beside, labelled, slug, write_mp4


SAVE_FILES = {"subject.safetensors", "state.pt"}        # and CHECKSUMS, which former versions did not write
CHECKSUMS = "checksums.json"


def pick_run(out, resume, default, photos):
    """--out, --resume and the default folder -> where the run writes, and the save it starts from or None.

    Raises BadInput. A finished run is never written over.
    """
    if resume:
        return pick_resumed_run(out, resume, default.parent, photos)
    if out and holds_run(out):
        raise BadInput(f"--out {out}: holds a run; --resume {out} goes on with it, another --out starts anew")
    numbered = (default.with_name(f"{default.name}-{n}") for n in range(2, 10_000))
    run = out or next(name for name in chain([default], numbered) if not holds_run(name))
    check_out(run)
    return run, None


def default_run(images):
    """runs/NAME, where NAME is the photo folder's own name as typed: a link keeps its name."""
    return Path("runs") / Path(os.path.abspath(images)).name


def pick_resumed_run(out, resume, parent, photos):
    if resume == "latest":
        run = out or latest_run(parent, photos_digest(photos))
        save = newest_save(run)
    else:
        run = save = Path(resume)
        if (save / "state.pt").exists():
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
        raise BadInput(f"--resume {resume}: no save is under {run}; leave it out to start anew")
    return run, save


def latest_run(parent, photos):
    """The run under `parent` that saved last, of those that record these photos. Raises BadInput."""
    found = [path for path in parent.iterdir() if photos in recorded_photos(path)] if parent.exists() else []
    if not found:
        raise BadInput(f"--resume latest: no run of these photos is under {parent}; name the run's folder, "
                       f"or leave --resume out to start anew")
    return max(found, key=lambda run: newest_save(run).stat().st_mtime)


def recorded_photos(run):
    """What the saves in a run's folder, those that can be read, record of its photos."""
    return [read_header(save)["settings"].get("photos") for save in saves(run)]


def read_header(folder):
    """The settings and steps of a folder's subject; none and 0 if there is no subject that can be read."""
    try:
        check_regular(folder / "subject.safetensors")
        with safe_open(folder / "subject.safetensors", framework="pt") as f:
            facts = f.metadata()
        return {"settings": dict(json.loads(facts["settings"])), "steps": int(facts["steps"])}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError):
        return {"settings": {}, "steps": 0}


def saves(out):
    """The saves in a run's folder, oldest first: folders of exactly the name and content that we give one."""
    found = {}
    for path in out.glob("step-*"):
        if not step_named(path) or path.is_symlink() or not path.is_dir():
            continue
        if SAVE_FILES <= {file.name for file in path.iterdir()} <= SAVE_FILES | {CHECKSUMS}:
            found[path] = step_named(path)
    return sorted(found, key=found.get)


def step_named(path):
    """The step in a save's name; 0 for any other name."""
    name = re.fullmatch(SAVE_NAME, path.name)
    return int(name[1]) if name else 0


def newest_save(out):
    found = saves(out)
    return found[-1] if found else None


def holds_run(out):
    return bool(newest_save(out)) or os.path.lexists(out / "subject.safetensors")


@contextmanager
def run_writer(out, last_save, rank):
    """Holds a run's folder, whose subject is then that of `last_save`, if the run goes on from it.

    Raises BadInput if another run has written there since `last_save` was chosen, and where something else
    would be written over.
    """
    with only_writer(out, rank):
        if rank == 0:
            going_on = last_save is not None and last_save.parent.resolve() == out.resolve()
            check_nothing_is_lost(out, last_save, going_on)
            if going_on:
                publish(last_save)
        yield


def check_nothing_is_lost(out, last_save, going_on):
    found, learned = saves(out), read_header(out)["steps"]
    if not going_on and holds_run(out):
        raise BadInput(f"--out {out}: another run has ended there meanwhile; name another folder")
    if going_on and found[-1].name != last_save.name:
        raise BadInput(f"--resume {last_save}: {found[-1]} is newer meanwhile; start the command again")
    if going_on and learned > read_header(last_save)["steps"]:  # its save was removed
        raise BadInput(f"{out / 'subject.safetensors'}: has done {learned} steps, more than {last_save}, and "
                       f"would be written over; move it")
    for path in out.glob("step-*"):
        if step_named(path) and path not in found:
            raise BadInput(f"{path}: is not a save, and in the way of one; move it, or name another --out")
    if not going_on:    # a run's first preview comes after its first save, so these are someone else's
        for path in [out / "preview.png", *(out / "previews").glob("step-[0-9]*.png")]:
            if os.path.lexists(path):
                raise BadInput(f"{path}: would be written over; move it, or name another --out")


def save_fingerprint(save):
    """What tells a save from any other, for processes to compare: its name and its files' checksums."""
    if save is None:
        return "none"
    checksums = save / CHECKSUMS
    files = [checksums] if checksums.exists() else sorted(save.iterdir())
    return " ".join([save.name, *(f"{file_crc32(path):08x}" for path in files)])


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
    folder = Path("prior") / f"{slug(base.config.name)}-{slug(class_word)}-{digest(facts)}"
    try:
        check_out(out.parent / folder)
    except BadInput:  # nothing may be written there, or the prior there is another user's
        return out / folder, facts
    return out.parent / folder, facts


@contextmanager
def prior_writer(folder, facts, rank, count):
    """Holds the prior's folder, once no other run fills it, until `count` pictures or clips are in it.

    Raises BadInput if the folder is of other facts, or if this node has only a part in the end.
    """
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
        if rank == 0 and facts_beside(record) != facts:
            raise BadInput(f"{record}: says that this prior was made for something else; delete {folder}")
        yield
        made = [path for path in folder.iterdir() if re.fullmatch(r"\d{4}\.(png|mp4)", path.name)]
        if len(made) < count:
            raise BadInput(f"{folder}: this node has {len(made)} of the prior's {count} files, for the "
                           f"nodes share no folder; make the prior on one, and give each a copy by --prior")


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


def digest(facts):
    """12 hex digits that tell facts, anything that JSON holds, from any others."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


# What is wrong where a digest is not the save's.
DIGESTS = {"base": "--base: is not the base", "photos": "--images: holds not the photos",
           "captions": "--images: holds not the captions",
           "prior": "--prior or --num_prior: does not give the pictures of the class"}


def digests(base, photos, prior):
    """Of all that a training learns from, wherever it lies. A resumed training has them in common."""
    of_base = asdict(base.config)
    for name in ("name", "sampling", "training"):
        del of_base[name]
    return {"base": digest(of_base), "photos": photos_digest(photos),
            "captions": digest([photo.caption for photo in photos]), "prior": digest(prior and prior[2])}


def photos_digest(photos):
    return digest([photo.crc32 for photo in photos])


def save_training(out, subject, optimizer, keep_last):
    """OUT/step-N/ with subject and optimizer, complete or absent; OUT/subject.safetensors is its copy."""
    save = out / f"step-{subject.steps:06d}"
    if subject.steps == 0 or save in saves(out):  # stopped before the first step, or right after a save
        return
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


def say_how_it_ended(out, subject, steps):
    if subject.steps == 0:
        print(f"stopped before step 1 of {steps} was done; the same command starts anew")
        return
    if subject.steps < steps:
        print(f"stopped after step {subject.steps} of {steps}; the same command with --resume {out} goes on")
    print(f"wrote {out / 'subject.safetensors'}")


def load_training(save, subject, optimizer, steps, rank=0):
    """Puts a save into `subject` and `optimizer` -> its step. Raises BadInput if it is another run's."""
    state, tensors = read_save(save)
    check_settings(save, state["settings"], subject.settings, rank)
    killed_before_its_subject_was_copied = read_header(save.parent)["steps"] < state["step"]
    if state["step"] >= steps and not killed_before_its_subject_was_copied:
        raise BadInput(f"--steps {steps}: {save} has done {state['step']} already; ask for more to go on")
    parameters = subject_tensors(subject)
    check_tensors(save / "subject.safetensors", tensors, parameters)
    check_values(save / "subject.safetensors", tensors, [torch.float32])
    check_optimizer(save / "state.pt", state["optimizer"], optimizer)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    optimizer.load_state_dict(state["optimizer"])
    subject.steps = state["step"]
    return subject.steps


def check_settings(save, before, now, rank):
    """A save's settings are those of the training that goes on from it. Raises BadInput."""
    former = "base" not in before
    if former and rank == 0:
        warn(f"{save}: is from a former version and does not record its base, photos, captions and "
             f"prior; they are taken to be the same")
    flags = {"clips_a_step": "batch_size times --grad_accum times processes"}
    before = {"no_flip": False} | before    # former versions always mirrored
    for name, value in now.items():
        if name == "images" or (name in DIGESTS and former) or before.get(name) == value:
            continue
        if name in DIGESTS:
            raise BadInput(f"{DIGESTS[name]} of the run that {save} is from")
        raise BadInput(f"--{flags.get(name, name)}: is {value}, and was {before.get(name)} in the run that "
                       f"{save} is from")


def read_save(save):
    """-> (state, name -> tensor) of a save whose checksums are right. Raises BadInput."""
    try:
        content = {name: read_bytes(save / name) for name in sorted(SAVE_FILES)}
        if (save / CHECKSUMS).exists():
            checksums = read_json(save / CHECKSUMS)
            for name in content:
                if checksums[name] != zlib.crc32(content[name]):
                    raise ValueError(f"{name} is not what was saved")
        else:
            warn(f"{save}: is from a former version and has no checksums; taken as it is")
        state = torch.load(io.BytesIO(content["state.pt"]), map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not state.keys() >= {"step", "settings", "optimizer"}:
            raise ValueError("state.pt has no step, settings and optimizer")
        if type(state["step"]) is not int or state["step"] < 1 or not isinstance(state["settings"], dict):
            raise ValueError("state.pt has no valid step and settings")
        if step_named(save) not in (0, state["step"]):
            raise ValueError(f"state.pt is of step {state['step']}")
        return state, load(content["subject.safetensors"])
    except Exception as error:  # pickle, zip, safetensors and the disk each raise their own
        raise BadInput(f"--resume {save}: not a readable save ({one_line(error)}); "
                       f"an older step-* folder may be") from None


def check_optimizer(path, found, optimizer):
    """An AdamW state has this optimizer's groups, and moments of its parameters' shapes. Raises BadInput."""
    fault = BadInput(f"{path}: its optimizer is not this run's; an older step-* folder may be right")
    expected = optimizer.state_dict()
    try:
        if found["param_groups"] != expected["param_groups"] or not found["state"]:
            raise fault
        parameters = sum((group["params"] for group in optimizer.param_groups), [])
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


told = set()    # of what could not be written


@contextmanager
def watching(what):
    """What only shows a run never costs it: each failure is said once, and training goes on."""
    try:
        yield
    except Exception as error:  # of the disk, of Pillow, of the device's memory
        if what not in told:
            warn(f"{what}: not written ({one_line(error)}); training goes on")
        told.add(what)


class Log:
    """Rank 0's progress bar; log.jsonl with a line per step: losses, gradient norm, lr, seconds, peak GB."""

    def __init__(self, path, first, steps, rank):
        self.path, self.rank = path, rank
        if rank == 0:
            with watching(path):
                self.drop_lines_after(first)
        self.bar = Progress(desc="train", unit="step", initial=first, total=steps, disable=rank > 0)
        self.time, self.mean = time.time(), None

    def __call__(self, step, **numbers):
        if self.rank > 0:
            return
        seconds, self.time = time.time() - self.time, time.time()
        line = {"step": step, **numbers, "seconds": round(seconds, 3), "memory": round(peak_memory(), 2)}
        with watching(self.path):
            check_regular(self.path)
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        self.mean = numbers["loss"] if self.mean is None else 0.95 * self.mean + 0.05 * numbers["loss"]
        self.bar.set_postfix(loss=f"{self.mean:.4f}", refresh=False)
        self.bar.update()

    def drop_lines_after(self, first):
        """Steps after the save are done and logged again. What is not a line of ours stays."""
        if not self.path.exists() or not self.path.stat().st_size:
            return
        kept, others = [], 0
        for line in self.path.read_bytes().removesuffix(b"\n").split(b"\n"):
            step = re.match(rb'{"step": ([0-9]{1,18}), ', line)
            if not step or (int(step[1]) <= first and line.endswith(b"}")):
                kept.append(line + b"\n")
            others += not step
        with complete_or_absent(self.path) as temporary:
            temporary.write_bytes(b"".join(kept))
        if others:
            warn(f"{self.path}: {others} lines are not a training's; they stay")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()


def save_preview(out, step, videos, label, width=96):
    """Videos (B, T, H, W, 3) become OUT/previews/step-N.png; all previews so far become OUT/preview.png."""
    height = round(width * videos.shape[2] / videos.shape[3])
    shown = np.linspace(0, videos.shape[1] - 1, 4).round().astype(int)
    frames = videos[:, shown].reshape(-1, *videos.shape[2:])
    images = [Image.fromarray(frame).resize((width, height)) for frame in frames]
    with complete_or_absent(out / "previews" / f"step-{step:06d}.png") as temporary:
        labelled(images, label).save(temporary)
    previews = [path for path in (out / "previews").glob("step-[0-9]*.png") if path.is_file()]
    previews.sort(key=lambda path: (len(path.name), path.name))     # as numbers: 1000000 after 999999
    rows = [np.asarray(Image.open(path)) for path in previews]
    with complete_or_absent(out / "preview.png") as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary)
