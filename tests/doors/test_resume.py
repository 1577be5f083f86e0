"""Runs that are stopped, killed, resumed, branched, and moved to another number of processes.

Scripts run in forked children, which have no start-up each time.
"""
import json
import os
import random
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import runs
import stress
import train
from files import load_subject
from makers import fork, run, wait


@pytest.fixture()
def start(base_folder, photos_folder, tmp_path):
    """Starts train.py in a child -> its pid. Its output goes to tmp_path/output."""
    def start(*flags, before=None):
        argv = ["train.py", "--base", base_folder, "--images", photos_folder, "--class_word", "dog", *flags]
        return fork(train.main, argv, tmp_path, before)
    return start


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.002)


def steps_logged(out):
    """The steps in OUT/log.jsonl, of lines that are whole."""
    path = out / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def equal(a, b):
    """Two runs have the same subject, bit for bit."""
    a, b = load_file(a / "subject.safetensors"), load_file(b / "subject.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------------
# Killed, stopped


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
        module = torch if inside == "save" else runs.shutil
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
    out = tmp_path / "out"
    pid = start("--steps", 10_000, "--alpha", 0, "--out", "out")
    wait_for(lambda: steps_logged(out))
    os.kill(pid, number)
    assert wait(pid) == 0
    steps = steps_logged(out)
    output = (tmp_path / "output").read_text()
    assert f"stopped after step {steps[-1]} of 10000" in output and "--resume out" in output
    assert [p.name for p in out.glob("step-*")] == [f"step-{steps[-1]:06d}"]
    assert wait(start("--steps", steps[-1] + 2, "--alpha", 0, "--resume", "out")) == 0
    assert steps_logged(out) == list(range(1, steps[-1] + 3))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_save(start, base, tmp_path):
    def poison():
        real, calls = data.noise_sample, []

        def noise(*args):
            calls.append(1)
            t, eps = real(*args)
            return t, eps * float("nan") if len(calls) > 3 else eps
        data.noise_sample = noise

    common = ["--steps", 9, "--alpha", 0, "--save_every", 2, "--out", "out"]
    assert wait(start(*common, before=poison)) == 2
    output = (tmp_path / "output").read_text()
    assert "not finite at step 4" in output and "step-000002" in output
    subject = load_subject(tmp_path / "out" / "subject.safetensors", base)
    assert subject.steps == 2
    assert all(A.isfinite().all() and B.isfinite().all() for A, B in subject.updates.values())


@pytest.mark.parametrize("name", stress.JOBS)
def test_killed_at_random_moments(tmp_path, name):
    """A few of the kills of tests/stress.py."""
    kills = 1 if name == "train on 2" else 3
    stress.stress(name, stress.make_inputs(tmp_path), kills, random.Random(0))


# ------------------------------------------------------------------------------------------------------------
# Moved, branched, kept


def test_accumulation_and_two_nodes_equal_one_process(base_folder, photos_folder, start, tmp_path):
    """Four clips per step: at once; in four parts; on two nodes of one process each, with two parts each.

    The last run begins on one process, and goes on under two launchers.
    """
    assert wait(start("--steps", 5, "--batch_size", 4, "--out", "one")) == 0
    assert wait(start("--steps", 5, "--batch_size", 1, "--grad_accum", 4, "--out", "parts")) == 0
    assert wait(start("--steps", 3, "--batch_size", 2, "--grad_accum", 2, "--out", "moved")) == 0
    flags = ["--base", base_folder, "--images", photos_folder, "--class_word", "dog", "--batch_size", 1,
             "--grad_accum", 2, "--steps", 5, "--out", "moved", "--resume", "moved"]

    with socket.create_server(("127.0.0.1", 0)) as server:
        free_port = str(server.getsockname()[1])

    def launch(node):
        launcher = ("-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node),
                    "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", free_port)
        return run("train.py", *flags, cwd=tmp_path, launcher=launcher)

    with ThreadPoolExecutor() as pool:
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


def test_a_finished_run_is_not_written_over(start, tmp_path, photos_folder):
    name, folder = photos_folder.name, tmp_path / "runs"
    assert wait(start("--steps", 1)) == 0
    assert wait(start("--steps", 1, "--seed", 1)) == 0
    assert sorted(p.name for p in folder.glob(f"{name}*")) == [name, f"{name}-2"]
    assert not equal(folder / name, folder / f"{name}-2")
    again = ["--resume", f"runs/{name}"]
    refusals = [
        (["--steps", 1, "--out", f"runs/{name}"], f"--out runs/{name}: holds a run"),
        (["--steps", 2, *again, "--lr", 0.5], "--lr: is 0.5, and was 0.001"),
        (["--steps", 2, *again, "--batch_size", 3], "--batch_size"),
        (["--steps", 1, *again], "has done 1 already"),
        (["--resume", "nowhere"], "--resume nowhere: no save")]
    for flags, says in refusals:
        assert wait(start(*flags)) == 2
        assert says in (tmp_path / "output").read_text()


# ------------------------------------------------------------------------------------------------------------
# What lies in a run's folder


def test_previews_grow(start, tmp_path):
    common = ["--steps", 4, "--alpha", 0]
    assert wait(start(*common, "--preview_every", 2, "--out", "out")) == 0
    row = Image.open(tmp_path / "out" / "previews" / "step-000002.png")
    sheet = Image.open(tmp_path / "out" / "preview.png")
    assert sheet.size == (row.width, 2 * row.height)
    assert np.asarray(sheet)[:row.height].tolist() == np.asarray(row).tolist()
    # Looking does not change what is learned.
    assert wait(start(*common, "--preview_every", 0, "--out", "blind")) == 0
    assert equal(tmp_path / "out", tmp_path / "blind")


def test_the_prior_may_be_videos_with_captions(start, tmp_path):
    assert wait(start("--steps", 1, "--prior_motion", "--out", "made")) == 0
    folder, = (tmp_path / "prior").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["0000.mp4", "0001.mp4", "prior.json"]
    kept = [p.stat().st_mtime_ns for p in sorted(folder.glob("*.mp4"))]
    (folder / "0001.txt").write_text("a dog on the grass")
    (folder / "0002.mp4").write_bytes(b"not a video")
    assert wait(start("--steps", 1, "--prior", folder, "--num_prior", 5, "--out", "given")) == 0
    output = (tmp_path / "output").read_text()
    assert output.count("warning") == 1 and "0002.mp4" in output
    assert not equal(tmp_path / "made", tmp_path / "given")  # the caption counts
    assert wait(start("--steps", 1, "--prior_motion", "--num_prior", 3, "--out", "more")) == 0
    assert [p.stat().st_mtime_ns for p in sorted(folder.glob("000[01].mp4"))] == kept
    (video, caption, _), (_, other_caption, _) = data.load_prior(folder, 2, 3, 32, 48)
    assert video.shape == (3, 3, 32, 48) and not torch.equal(video[0], video[2])
    assert (caption, other_caption) == ("", "a dog on the grass")
