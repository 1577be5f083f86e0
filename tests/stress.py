"""kill -9 at random moments: what was complete still loads, the rest is absent or made again, no more is
left.

    python tests/stress.py               # 60 kills, a few minutes on 2 cores; the tests do a few
    python tests/stress.py --kills 600 --seed 1
    python tests/stress.py --windows     # a kill before each change of a folder: 187, 3 minutes

The jobs are: converting, training on one process and on two, sampling, and making the class prior. A job is
killed a few times. After each kill its folder is checked. Then the job runs to its end, and has to leave what
a job that was never killed leaves.

A window is what lies between two changes of a folder: a rename, a removal, a new folder.
"""
import argparse
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from makers import (ROOT, SMALL, ended, fork, golden_state, random_subject, torchrun, wait, wait_for,
                    write_base)
import sample
import train
from cli import BadInput, only_writer
from config import BaseConfig
from convert_ckpt import convert
import runs
from files import load_base, load_subject, save_subject
from lora import Subject
from runs import (load_training, newest_save, prior_writer, read_header, read_save, run_writer, save_preview,
                  save_prior_clip, save_training, saves)

KILLS_PER_JOB = 4
SHARES = {"convert": 0.25, "train": 0.25, "sample": 0.2, "prior": 0.2, "train on 2": 0.1}


def main():
    p = argparse.ArgumentParser(description="Kill every script at random moments, and look at what is left.")
    p.add_argument("--kills", type=int, default=60, help="kills in all (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    p.add_argument("--windows", action="store_true", help="kill once in each window, in place of --kills")
    args = p.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        inputs = make_inputs(Path(folder))
        for name in WINDOWS if args.windows else ():
            start = time.time()
            kills = stress_windows(name, inputs, range(1, 10**6))
            print(f"{name}: {kills} kills, nothing lost, {time.time() - start:.0f} s", flush=True)
        if args.windows:
            return
        for name, share in SHARES.items():
            kills, start = round(share * args.kills), time.time()
            for done in range(0, kills, KILLS_PER_JOB):
                stress(name, inputs, min(KILLS_PER_JOB, kills - done), rng)
            print(f"{name}: {kills} kills, nothing lost, {time.time() - start:.0f} s", flush=True)


def make_inputs(folder):
    """What the jobs read: a base, photos, a subject and a checkpoint, all small. Returns the folder."""
    base = load_base(write_base(folder / "base"))
    save_subject(folder / "subject.safetensors", random_subject(base))
    (folder / "photos").mkdir()
    for i in range(3):
        photo = np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(photo).save(folder / "photos" / f"{i}.png")
    torch.save({"state_dict": golden_state()}, folder / "model.ckpt")
    state = {name: tensor + 0.01 for name, tensor in golden_state().items()}
    torch.save({"state_dict": state}, folder / "older.ckpt")
    convert(folder / "older.ckpt", folder / "older base", BaseConfig(**SMALL), torch.float32)
    return folder


def stress(name, inputs, kills, rng):
    """Kills a job `kills` times, and lets it end.

    A job that ends before its kill starts anew in another folder. Of several processes one is killed, and the
    others must notice.
    """
    start, check = JOBS[name]
    alone, cwd = (Path(tempfile.mkdtemp(dir=inputs)) for _ in range(2))
    began = time.time()
    assert wait(start(inputs, alone)) == 0, (name, said_in(alone))
    seconds, landed = time.time() - began, 0
    while landed < kills:
        pid = start(inputs, cwd)
        time.sleep(rng.uniform(0, seconds))
        os.kill(rng.choice(processes_of(pid)), signal.SIGKILL)
        began, code = time.time(), wait(pid)
        assert time.time() - began < 60, f"{name}: a process died, and the job went on"
        check(inputs, cwd)
        if code == 0:
            cwd = Path(tempfile.mkdtemp(dir=inputs))
        else:
            landed += 1
    finish(name, inputs, alone, cwd)


def finish(name, inputs, alone, cwd):
    """Lets a job that was killed in `cwd` end. It has to leave what the job left in `alone`."""
    start, check = JOBS[name]
    assert wait(start(inputs, cwd)) == 0, (name, said_in(cwd))
    check(inputs, cwd)
    with only_writer(cwd / "out"):  # what the next run there does first
        pass
    expected, found = files_in(alone), {file: first_name(file) for file in files_in(cwd)}
    others = set(expected) ^ set(found.values())
    older_saves = {first for first in found.values() if "/step-" in first}  # not removed yet
    assert not others - older_saves, (name, others)
    assert name == "sample" or len(found) == len(set(found.values())), (name, sorted(found))
    for file, first in found.items():
        if first in expected and file.endswith(("safetensors", "png", "gif")):
            assert content(alone / first) == content(cwd / file), (name, file)


def stress_windows(name, inputs, windows):
    """Kills a job in each of these windows that it has, and lets it end -> number of kills."""
    start, check = JOBS[name]
    alone = Path(tempfile.mkdtemp(dir=inputs))
    assert wait(start(inputs, alone)) == 0, (name, said_in(alone))
    for kills, window in enumerate(windows):
        cwd = Path(tempfile.mkdtemp(dir=inputs))
        code = wait(start(inputs, cwd, before=lambda: kill_before_change(window)))
        if code == 0:  # there are no more windows
            return kills
        assert code == -signal.SIGKILL, (name, window, said_in(cwd))
        check(inputs, cwd)
        finish(name, inputs, alone, cwd)
        shutil.rmtree(cwd)
    return kills + 1


def kill_before_change(number):
    """From now on this process kills itself before its change number `number` of a folder."""
    changes = itertools.count(1)

    def deadly(change):
        def call(*args, **named):
            if next(changes) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **named)
        return call

    for name in ("replace", "rename", "unlink", "rmdir", "mkdir"):
        setattr(os, name, deadly(getattr(os, name)))


def said_in(cwd):
    return "\n".join(path.read_text() for path in sorted(cwd.glob("output*")))


def first_name(file):
    """out/a-v-dog-5-2.gif -> out/a-v-dog-5.gif. A video without its JSON stays; the next is beside it."""
    return re.sub(r"(dog-[0-9]+)-[0-9]+\.", r"\1.", file)


def processes_of(pid):
    """A job's own processes: those that torchrun started, else the job's only one."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = children.read_text().split() if children.exists() else []
    return [int(child) for child in found] or [pid]


def files_in(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = [str(path.relative_to(folder)) for path in paths]
    shown = ("log", "output", "preview")    # to look at: what is lost of it in a kill is not made again
    return sorted(name for name in names if ".tmp-" in name or not any(word in name for word in shown))


def content(path):
    """What a file holds; of a file of tensors, the small tensors."""
    if path.suffix == ".safetensors":
        return {name: tensor.tolist() for name, tensor in load_file(path).items() if tensor.numel() < 10**5}
    return iio.imread(path).tolist()


# ------------------------------------------------------------------------------------------------------------
# The jobs. Each starts in the folder `cwd`, again and again -> its pid; and each has a check of that folder.


def start_convert(inputs, cwd, before=None):
    main = lambda: convert(inputs / "model.ckpt", cwd / "out", BaseConfig(**SMALL), torch.float32)
    return fork(main, [], cwd, before)


def check_base(inputs, cwd):
    if (cwd / "out" / "config.json").exists():      # it comes last
        load_base(cwd / "out")


def start_convert_again(inputs, cwd, before=None):
    """Converts into a folder that holds a base already."""
    if not (cwd / "out").exists():
        shutil.copytree(inputs / "older base", cwd / "out")
    return start_convert(inputs, cwd, before)


def check_base_again(inputs, cwd):
    """A mixture of two bases is refused."""
    try:
        load_base(cwd / "out")
    except BadInput as error:
        assert "are not those that config.json was written for" in str(error)


def training_flags(inputs, cwd):
    flags = ["--base", inputs / "base", "--images", inputs / "photos", "--class_word", "dog", "--steps", 12,
             "--save_every", 2]
    if read_header(cwd / "out")["steps"] == 12:
        return [*flags, "--help"]  # nothing is left to do
    resume = "--resume" if list(cwd.glob("out/step-[0-9]*")) else "--out"
    return [*flags, resume, "out"]


def start_train(inputs, cwd, before=None):
    return fork(train.main, ["train.py", *training_flags(inputs, cwd), "--alpha", 0], cwd, before)


def start_train_on_2(inputs, cwd):
    command = [sys.executable, *torchrun(2), ROOT / "train.py", *training_flags(inputs, cwd), "--alpha", 0]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(cwd / "output", "w") as output:
        return subprocess.Popen(list(map(str, command)), cwd=cwd, stdout=output, stderr=output,
                                env=environment).pid


def check_subjects(inputs, cwd):
    """Every subject loads, and every save's state.pt as well."""
    base = load_base(inputs / "base")
    for path in cwd.glob("out/subject.safetensors"):
        load_subject(path, base)
    for path in cwd.glob("out/step-*/subject.safetensors"):
        load_subject(path, base)
        assert torch.load(path.parent / "state.pt", weights_only=True)["step"]


def start_prior(inputs, cwd, before=None):
    return fork(train.main, ["train.py", *training_flags(inputs, cwd), "--num_prior", 12], cwd, before)


def check_prior(inputs, cwd):
    check_subjects(inputs, cwd)
    assert all(iio.imread(path).shape == (32, 48, 3) for path in cwd.glob("**/prior/*/[0-9]*.png"))


def start_saves(inputs, cwd, before=None):
    """What a training does around its steps: six saves and previews, of which two saves stay."""
    def main():
        out, v_star = cwd / "out", torch.nn.Parameter(torch.zeros(1, 4))
        optimizer = torch.optim.AdamW([v_star])
        subject = Subject("V*", "dog", 2, "base", "f" * 16, 0, "customcrafter", {"base": "f"}, v_star=v_star)
        save = newest_save(out)
        if save and read_header(out)["steps"] < 6:
            load_training(save, subject, optimizer, 6)
        done = max(subject.steps, read_header(out)["steps"])
        with run_writer(out, save, 0):
            for subject.steps in range(done + 1, 7):
                v_star.grad = torch.full_like(v_star, subject.steps)
                optimizer.step()
                save_training(out, subject, optimizer, keep_last=2)
                save_preview(out, subject.steps, np.zeros((1, 2, 32, 32, 3), np.uint8), "x")
    return fork(main, [], cwd, before)


def check_saves(inputs, cwd):
    """Every save is whole. The subject is that of the newest save, or of the save before."""
    steps = [read_save(save)[0]["step"] for save in saves(cwd / "out")]
    assert read_header(cwd / "out")["steps"] in (steps[-2:] or [0]) + [0] * (len(steps) < 2)


def start_two(inputs, cwd, before=None):
    """Two runs fill one prior. The first may be killed; the other waits for its end, and does the rest.

    The other begins when the first is at work or dead. Else it might do all of it, and leave no window.
    """
    def main():
        runs.time.sleep = lambda seconds: time_sleep(0.01)
        with prior_writer(cwd / "prior", {"class_word": "dog"}, 0, 8):
            for k in range(8):
                path = cwd / "prior" / f"{k:04d}.png"
                if not path.exists():
                    save_prior_clip(path, np.full((1, 32, 48, 3), k, np.uint8), 8)

    time_sleep = time.sleep
    first = fork(main, [], cwd, before)
    wait_for(lambda: (cwd / "prior" / "0000.png").exists() or ended(first))
    second = fork(main, [], cwd, output="output-2")
    assert wait(second) == 0, said_in(cwd)
    return first


def check_two(inputs, cwd):
    pictures = sorted((cwd / "prior").glob("*.png"))
    assert [iio.imread(path).max() for path in pictures] == list(range(8))


def start_sample(inputs, cwd, before=None):
    flags = ["--base", inputs / "base", "--subject", inputs / "subject.safetensors", "--prompt", "a V* dog",
             "--seed", 0, "--num", 6, "--out", "out"]
    return fork(sample.main, ["sample.py", *flags], cwd, before)


def check_videos(inputs, cwd):
    """A video whose JSON is there is complete."""
    for facts in cwd.glob("out/*.json"):
        gif = iio.imread(facts.with_suffix(".gif"))
        assert gif.shape == iio.imread(facts.with_suffix(".mp4"), plugin="FFMPEG").shape


JOBS = {"convert": (start_convert, check_base), "train": (start_train, check_subjects),
        "train on 2": (start_train_on_2, check_subjects), "prior": (start_prior, check_prior),
        "sample": (start_sample, check_videos), "convert again": (start_convert_again, check_base_again),
        "saves": (start_saves, check_saves), "two on one prior": (start_two, check_two)}
WINDOWS = "convert", "convert again", "saves", "two on one prior"


if __name__ == "__main__":
    main()
