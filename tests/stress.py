"""kill -9 at random moments: what was complete stays loadable, what was not is absent or made again, and nothing else is left.

    python tests/stress.py               # 60 kills, a few minutes on 2 cores; the tests do a few
    python tests/stress.py --kills 600 --seed 1

Converting, training on one process and on two, sampling, and making the class prior take their share each. A job is killed a few
times, with a look into its folder after each; then it runs to its end, and has to leave what a job left alone leaves.
"""
import argparse
import os
import random
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

sys.path.insert(0, str(Path(__file__).parent.parent))
import sample
import train
from conftest import ROOT, fork, wait, write_base
from convert_ckpt import convert
from lora import load_subject, save_subject
from model import BaseConfig, load_base
from test_lora import random_subject
from test_model import SMALL, golden_state

KILLS_A_JOB = 4


def main():
    p = argparse.ArgumentParser(description="Kill every script at random moments, and look at what is left.")
    p.add_argument("--kills", type=int, default=60, help="kills in all (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = p.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder))
        for name, share in {"convert": 0.25, "train": 0.25, "sample": 0.2, "prior": 0.2, "train on 2": 0.1}.items():
            kills, start = round(share * args.kills), time.time()
            for n in range(0, kills, KILLS_A_JOB):
                stress(name, world, min(KILLS_A_JOB, kills - n), rng)
            print(f"{name}: {kills} kills, nothing lost, {time.time() - start:.0f} s", flush=True)


def make_world(folder):
    """A base, photos, a subject and a checkpoint, all small. Returns the folder."""
    base = load_base(write_base(folder / "base"))
    save_subject(folder / "subject.safetensors", random_subject(base))
    (folder / "photos").mkdir()
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / "photos" / f"{i}.png")
    torch.save({"state_dict": golden_state()}, folder / "model.ckpt")
    return folder


def stress(name, world, kills, rng):
    """Kills a job `kills` times, and lets it end. A job that ends before its kill is started afresh in another folder."""
    start, check = JOBS[name]
    alone, cwd = (Path(tempfile.mkdtemp(dir=world)) for _ in range(2))
    began = time.time()
    assert wait(start(world, alone)) == 0, (name, (alone / "output").read_text())
    long, landed = time.time() - began, 0
    while landed < kills:
        pid = start(world, cwd)
        time.sleep(rng.uniform(0, long))
        os.kill(rng.choice(processes_of(pid)), signal.SIGKILL)  # of several processes one, and the others have to notice
        began, code = time.time(), wait(pid)
        assert time.time() - began < 60, f"{name}: a process died, and the job went on"
        check(world, cwd)
        if code == 0:
            cwd = Path(tempfile.mkdtemp(dir=world))
        else:
            landed += 1
    assert wait(start(world, cwd)) == 0, (name, (cwd / "output").read_text())
    check(world, cwd)
    names = [sorted(str(p.relative_to(d)) for p in d.rglob("*") if p.is_file() and "log" not in p.name) for d in (alone, cwd)]
    assert names[0] == names[1], (name, set(names[0]) ^ set(names[1]))
    for file in names[0]:
        if file.endswith(("safetensors", "png", "gif")):
            assert content(alone / file) == content(cwd / file), (name, file)


def content(path):
    if path.suffix == ".safetensors":
        return {name: tensor.tolist() for name, tensor in load_file(path).items() if tensor.numel() < 10**5}
    return iio.imread(path).tolist()


def processes_of(pid):
    """A job's own processes: those that torchrun started, else the one."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in children.read_text().split()] if children.exists() and children.read_text() else [pid]


def check_subjects(world, cwd):
    for path in (*cwd.glob("out/subject.safetensors"), *cwd.glob("out/step-*/subject.safetensors")):
        load_subject(path, load_base(world / "base"))
        assert path.parent.name == "out" or torch.load(path.parent / "state.pt", weights_only=True)["step"]


def check_videos(world, cwd):
    for facts in cwd.glob("out/*.json"):
        assert iio.imread(facts.with_suffix(".gif")).shape == iio.imread(facts.with_suffix(".mp4"), plugin="FFMPEG").shape


def check_prior(world, cwd):
    check_subjects(world, cwd)
    assert all(iio.imread(path).shape == (32, 48, 3) for path in cwd.glob("runs/prior/*/[0-9]*.png"))


def check_base(world, cwd):
    if (cwd / "out").exists():
        load_base(cwd / "out")


def flags_of_train(world, *more):
    return ["train.py", "--base", world / "base", "--images", world / "photos", "--class_word", "dog", "--steps", 12, "--save_every", 2, *more]


def start_train(world, cwd, *more):
    resume = ["--resume", "out"] if list(cwd.glob("out/step-[0-9]*")) else ["--out", "out"]
    if (cwd / "out" / "step-000012").exists():
        resume = ["--help"]  # nothing is left to do
    return flags_of_train(world, *more, *resume)


def train_on_2(world, cwd):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "train.py",
               *start_train(world, cwd, "--alpha", 0)[1:]]
    with open(cwd / "output", "w") as output:
        return subprocess.Popen(list(map(str, command)), cwd=cwd, stdout=output, stderr=output,
                                env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}).pid


JOBS = {
    "convert": (lambda world, cwd: fork(lambda: convert(world / "model.ckpt", cwd / "out", BaseConfig(**SMALL), torch.float32), [], cwd), check_base),
    "train": (lambda world, cwd: fork(train.main, start_train(world, cwd, "--alpha", 0), cwd), check_subjects),
    "train on 2": (train_on_2, check_subjects),
    "prior": (lambda world, cwd: fork(train.main, start_train(world, cwd, "--num_prior", 12), cwd), check_prior),
    "sample": (lambda world, cwd: fork(sample.main, ["sample.py", "--base", world / "base", "--subject", world / "subject.safetensors", "--prompt",
                                                     "a V* dog", "--seed", 0, "--num", 6, "--out", "out"], cwd), check_videos),
}


if __name__ == "__main__":
    main()
