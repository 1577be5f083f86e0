"""Runs that are stopped, killed, resumed and moved to another number of processes. Children are forked: no start-up each time."""
import json
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import stress
import train
from conftest import fork, run, wait
from lora import load_subject
from model import load_base


@pytest.fixture()
def start(base_folder, photos_folder, tmp_path):
    """Starts train.py in a child -> its pid. Its output goes to tmp_path/output."""
    def start(*flags, before=None):
        return fork(train.main, ["train.py", "--base", base_folder, "--images", photos_folder, "--class_word", "dog", *flags], tmp_path, before)
    return start


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.002)


def steps_logged(out):
    path = out / "log.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def equal(a, b):
    a, b = load_file(a / "subject.safetensors"), load_file(b / "subject.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_killed_and_resumed_equals_uninterrupted(start, tmp_path):
    assert wait(start("--steps", 20, "--save_every", 10, "--out", "whole")) == 0
    pid = start("--steps", 20, "--save_every", 10, "--out", "parts")
    wait_for(lambda: len(steps_logged(tmp_path / "parts")) >= 13)
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL
    assert wait(start("--steps", 20, "--save_every", 10, "--out", "parts", "--resume", "latest")) == 0
    assert equal(tmp_path / "whole", tmp_path / "parts")
    assert steps_logged(tmp_path / "parts") == list(range(1, 21))
    assert not list((tmp_path / "parts").glob(".tmp*"))


@pytest.mark.parametrize("inside", ["save", "copyfile", "rmtree"])
def test_killed_inside_a_save(start, base, tmp_path, inside):
    """Every save found afterwards is whole, and the run goes on from it."""
    def die_in_third_save():
        module = torch if inside == "save" else train.shutil
        real, calls = getattr(module, inside), []

        def deadly(*args, **kwargs):
            calls.append(args)
            if len(calls) == 3:
                with open(args[1] if inside == "save" else os.devnull, "wb") as f:
                    f.write(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        setattr(module, inside, deadly)

    common = ["--steps", 12, "--save_every", 2, "--keep_last", 2, "--alpha", 0, "--out", "out"]
    assert wait(start(*common, before=die_in_third_save)) == -signal.SIGKILL
    out = tmp_path / "out"
    for folder in [out, *out.glob("step-*")]:
        assert load_subject(folder / "subject.safetensors", base).steps % 2 == 0
    assert wait(start(*common, "--resume", "out")) == 0
    assert sorted(p.name for p in out.glob("step-*")) == ["step-000010", "step-000012"]
    assert not list(out.glob(".tmp*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_say_how_to_go_on(start, tmp_path, number):
    pid = start("--steps", 10_000, "--alpha", 0, "--out", "out")
    wait_for(lambda: steps_logged(tmp_path / "out"))
    os.kill(pid, number)
    assert wait(pid) == 0
    steps = steps_logged(tmp_path / "out")
    output = (tmp_path / "output").read_text()
    assert f"stopped after step {steps[-1]} of 10000" in output and "--resume out" in output
    assert [p.name for p in (tmp_path / "out").glob("step-*")] == [f"step-{steps[-1]:06d}"]
    assert wait(start("--steps", steps[-1] + 2, "--alpha", 0, "--resume", "out")) == 0
    assert steps_logged(tmp_path / "out") == list(range(1, steps[-1] + 3))


def test_accumulation_and_two_nodes_equal_one_process(base_folder, photos_folder, start, tmp_path):
    """Four clips a step: at once, in four parts, and on two nodes (two launchers) of one process with two parts each."""
    assert wait(start("--steps", 5, "--batch_size", 4, "--out", "one")) == 0
    assert wait(start("--steps", 5, "--batch_size", 1, "--grad_accum", 4, "--out", "parts")) == 0
    assert wait(start("--steps", 3, "--batch_size", 2, "--grad_accum", 2, "--out", "moved")) == 0
    flags = ["--base", base_folder, "--images", photos_folder, "--class_word", "dog", "--batch_size", 1, "--grad_accum", 2]
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor() as pool:  # `moved` begins on one process and goes on on two
        launch = lambda rank: run("train.py", *flags, "--steps", 5, "--out", "moved", "--resume", "moved", cwd=tmp_path, launcher=(
            "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1",
            "--master_addr", "127.0.0.1", "--master_port", "29533"))
        for done in pool.map(launch, (0, 1)):
            assert done.returncode == 0, done.stderr
    one, *others = (load_file(tmp_path / out / "subject.safetensors") for out in ("one", "parts", "moved"))
    for other in others:
        for name in one:
            assert torch.allclose(one[name], other[name], atol=1e-5), name


def test_a_branch_from_an_older_save(start, tmp_path):
    common = ["--alpha", 0, "--save_every", 2]
    assert wait(start(*common, "--steps", 6, "--out", "out")) == 0
    assert wait(start(*common, "--steps", 8, "--resume", "out/step-000002")) == 2
    assert "out has newer saves" in (tmp_path / "output").read_text()
    assert wait(start(*common, "--steps", 6, "--resume", "out/step-000002", "--out", "branch")) == 0
    assert equal(tmp_path / "out", tmp_path / "branch")


def test_a_finished_run_is_not_written_over(start, base, tmp_path, photos_folder):
    name = photos_folder.name
    assert wait(start("--steps", 1)) == 0 and wait(start("--steps", 1, "--seed", 1)) == 0
    assert sorted(p.name for p in (tmp_path / "runs").glob(f"{name}*")) == [name, f"{name}-2"]
    assert not equal(tmp_path / "runs" / name, tmp_path / "runs" / f"{name}-2")
    for more, says in [(["--steps", 1, "--out", f"runs/{name}"], f"--out runs/{name}: holds a run"),
                       (["--steps", 2, "--resume", f"runs/{name}", "--lr", 0.5], "--lr: is 0.5, and was 0.001"),
                       (["--steps", 2, "--resume", f"runs/{name}", "--batch_size", 3], "--batch_size"),
                       (["--steps", 1, "--resume", f"runs/{name}"], "has done 1 already"),
                       (["--resume", "nowhere"], "--resume nowhere: no save")]:
        assert wait(start(*more)) == 2
        assert says in (tmp_path / "output").read_text()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_save(start, base, tmp_path):
    def poison():
        real, calls = train.noise_sample, []

        def noise(*args):
            calls.append(1)
            t, eps = real(*args)
            return t, eps * float("nan") if len(calls) > 3 else eps
        train.noise_sample = noise

    assert wait(start("--steps", 9, "--alpha", 0, "--save_every", 2, "--out", "out", before=poison)) == 2
    assert "not finite at step 4" in (tmp_path / "output").read_text() and "step-000002" in (tmp_path / "output").read_text()
    subject = load_subject(tmp_path / "out" / "subject.safetensors", base)
    assert subject.steps == 2 and all(A.isfinite().all() and B.isfinite().all() for A, B in subject.lora.values())


def test_previews_grow(start, tmp_path):
    assert wait(start("--steps", 4, "--alpha", 0, "--preview_every", 2, "--out", "out")) == 0
    row, sheet = Image.open(tmp_path / "out" / "previews" / "step-000002.png"), Image.open(tmp_path / "out" / "preview.png")
    assert sheet.size == (row.width, 2 * row.height)
    assert np.asarray(sheet)[:row.height].tolist() == np.asarray(row).tolist()
    # Looking does not change what is learned.
    assert wait(start("--steps", 4, "--alpha", 0, "--preview_every", 0, "--out", "blind")) == 0
    assert equal(tmp_path / "out", tmp_path / "blind")


def test_the_prior_may_be_videos_with_captions(start, base_folder, tmp_path):
    assert wait(start("--steps", 1, "--prior_motion", "--out", "made")) == 0
    folder, = (tmp_path / "runs" / "prior").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["0000.mp4", "0001.mp4"]
    kept = [p.stat().st_mtime_ns for p in sorted(folder.iterdir())]
    (folder / "0001.txt").write_text("a dog on the grass")
    (folder / "0002.mp4").write_bytes(b"not a video")
    assert wait(start("--steps", 1, "--prior", folder, "--num_prior", 5, "--out", "given")) == 0
    output = (tmp_path / "output").read_text()
    assert output.count("warning") == 1 and "0002.mp4" in output
    assert not equal(tmp_path / "made", tmp_path / "given")                              # the caption counts
    assert wait(start("--steps", 1, "--prior_motion", "--num_prior", 3, "--out", "more")) == 0
    assert [p.stat().st_mtime_ns for p in sorted(folder.glob("000[01].mp4"))] == kept
    base = load_base(base_folder)
    from data import load_prior
    (video, caption), (other, _) = load_prior(folder, 2, 3, 32, 48)
    assert video.shape == (3, 3, 32, 48) and caption == "" and not torch.equal(video[0], video[2]) and base.config.name == "tiny0"


@pytest.mark.parametrize("name", stress.JOBS)
def test_killed_at_random_moments(tmp_path, name):
    """A few of the kills of tests/stress.py."""
    stress.stress(name, stress.make_world(tmp_path), 1 if name == "train on 2" else 3, random.Random(0))
