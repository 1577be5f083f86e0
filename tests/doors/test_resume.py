"""Runs that are stopped, killed, resumed, branched, and moved to another number of processes.

Scripts run in forked children, which have no start-up each time.
"""
import json
import os
import random
import shutil
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import files
import runs
import stress
import train
from cli import BadInput
from config import BaseConfig, load_config
from convert_ckpt import convert
from files import base_files, load_base, load_subject, save_base_config
from makers import SMALL, fork, fork_ranks, golden_state, run, wait, wait_for, write_base


@pytest.fixture()
def start(base_folder, photos_folder, tmp_path):
    """Starts train.py in a child -> its pid. Its output goes to tmp_path/output."""
    def start(*flags, before=None):
        argv = ["train.py", "--base", base_folder, "--images", photos_folder, "--class_word", "dog", *flags]
        return fork(train.main, argv, tmp_path, before)
    return start


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


def test_killed_before_the_last_copy(start, base, tmp_path):
    """The same command ends the run, whose subject is then the newest save's."""
    def die_in_the_copy():
        runs.shutil.copyfile = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)

    flags = ["--steps", 2, "--alpha", 0, "--out", "out"]
    assert wait(start(*flags, before=die_in_the_copy)) == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "out").glob("s*")] == ["step-000002"]
    assert wait(start(*flags, "--resume", "latest")) == 0
    assert load_subject(tmp_path / "out" / "subject.safetensors", base).steps == 2
    assert wait(start(*flags, "--resume", "latest")) == 2
    assert "has done 2 already" in (tmp_path / "output").read_text()


@pytest.mark.parametrize("window", [5, 11, 14])
def test_half_a_conversion_is_not_passed_over(tmp_path, monkeypatch, window):
    """Where --base is left out, its folder is named, and the embedded base is not taken."""
    torch.save({"state_dict": golden_state()}, tmp_path / "model.ckpt")
    converted = tmp_path / "checkpoints" / "videocrafter2"
    main = lambda: convert(tmp_path / "model.ckpt", converted, BaseConfig(**SMALL), torch.float32)
    pid = fork(main, [], tmp_path, lambda: stress.kill_before_change(window))
    assert wait(pid) == -signal.SIGKILL
    monkeypatch.setattr(files, "ROOT", tmp_path)
    with pytest.raises(BadInput, match="checkpoints/videocrafter2/config.json: no such file"):
        load_base(files.default_base())


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


@pytest.mark.parametrize("world", [1, 2])
def test_a_stop_is_noticed_between_the_parts_of_a_step(base_folder, photos_folder, tmp_path, world):
    """Of two processes one gets the signal. What is saved is the last whole step."""
    argv = ["train.py", "--base", base_folder, "--images", photos_folder, "--class_word", "dog", "--alpha", 0,
            "--grad_accum", 8, "--steps", 3]

    def slow_main():
        forward, calls = train.SubjectLoss.forward, []

        def slow(*args):
            calls.append(1)
            if len(calls) == 18:
                Path("in part 2 of step 3").touch()
            time.sleep(2 * (len(calls) >= 18))
            return forward(*args)
        train.SubjectLoss.forward = slow
        train.main()

    assert set(map(wait, fork_ranks(world, train.main, [*argv, "--out", "whole"], tmp_path))) == {0}
    pids = fork_ranks(world, slow_main, [*argv, "--out", "parts"], tmp_path)
    wait_for((tmp_path / "in part 2 of step 3").exists)
    os.kill(pids[-1], signal.SIGTERM)
    began = time.time()
    assert set(map(wait, pids)) == {0}
    assert time.time() - began < 8  # of the 14 that the step still takes
    assert [path.name for path in (tmp_path / "parts").glob("step-*")] == ["step-000002"]
    assert "stopped after step 2 of 3" in (tmp_path / "output").read_text()
    assert set(map(wait, fork_ranks(world, train.main, [*argv, "--resume", "parts"], tmp_path))) == {0}
    assert equal(tmp_path / "whole", tmp_path / "parts")


def test_a_stop_in_the_first_step_says_so(start, tmp_path):
    def stop_at_once():
        forward = train.SubjectLoss.forward

        def stopping(*args):
            os.kill(os.getpid(), signal.SIGTERM)
            return forward(*args)
        train.SubjectLoss.forward = stopping

    common = ["--alpha", 0, "--grad_accum", 2, "--steps", 2, "--out", "out"]
    assert wait(start(*common, before=stop_at_once)) == 0
    assert "stopped before step 1 of 2 was done" in (tmp_path / "output").read_text()
    assert wait(start(*common)) == 0


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


@pytest.mark.parametrize("name", stress.SHARES)
def test_killed_at_random_moments(tmp_path, name):
    """A few of the kills of tests/stress.py."""
    kills = 1 if name == "train on 2" else 2
    stress.stress(name, stress.make_inputs(tmp_path), kills, random.Random(0))


@pytest.mark.parametrize("name, windows", [
    ("saves", range(1, 1000, 9)), ("two on one prior", range(1, 1000, 5)), ("convert again", [14])])
def test_killed_in_a_window(tmp_path, name, windows):
    """A few of the kills of tests/stress.py --windows."""
    assert stress.stress_windows(name, stress.make_inputs(tmp_path), windows) >= min(len(windows), 6)


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
# The same content, wherever it lies


@pytest.fixture()
def begun(base_folder, photos_folder, start, tmp_path):
    """A run of two steps in tmp_path/out. Its base and its photos are copies, which a test may change."""
    shutil.copytree(base_folder, tmp_path / "base")
    shutil.copytree(photos_folder, tmp_path / "photos")
    assert wait(start("--base", "base", "--images", "photos", "--steps", 2, "--out", "out")) == 0
    return tmp_path


GO_ON = ["--base", "base", "--images", "photos", "--steps", 3, "--resume", "out"]


def test_the_same_photos_and_base_elsewhere_are_the_same(begun, start):
    (begun / "elsewhere").mkdir()
    shutil.move(begun / "photos", begun / "elsewhere" / "dogs")
    shutil.move(begun / "base", begun / "elsewhere" / "base")
    moved = ["--images", begun / "elsewhere" / "dogs", "--base", "elsewhere/base"]
    assert wait(start(*GO_ON, *moved)) == 0, (begun / "output").read_text()
    os.symlink(begun / "elsewhere" / "dogs", begun / "a link")
    moved += ["--images", "a link", "--steps", 4]
    assert wait(start(*GO_ON, *moved)) == 0, (begun / "output").read_text()


def change_photo(folder):
    Image.new("RGB", (60, 40), "red").save(folder / "photos" / "0.png")


def exchange_photos(folder):
    os.rename(folder / "photos" / "0.png", folder / "photos" / "3.png")


def change_caption(folder):
    (folder / "photos" / "1.txt").write_text("V* under a table")


def change_prior(folder):
    picture, = folder.glob("prior/*/0001.png")
    Image.new("RGB", (48, 32), "red").save(picture)


def change_base(folder):
    """Other weights of the same shapes, of which base_fingerprint sees nothing."""
    config_path, *weights = base_files(folder / "base")
    tensors = load_file(weights[0])
    tensors["conv_out.weight"] += 0.1
    save_file(tensors, weights[0])
    save_base_config(load_config(config_path), config_path, weights)


def exchange_base(folder):
    shutil.rmtree(folder / "base")
    write_base(folder / "base", seed=1)


def change_noise(folder):
    config_path, *weights = base_files(folder / "base")
    config = load_config(config_path)
    config.schedule.beta_end *= 1.1
    save_base_config(config, config_path, weights)


@pytest.mark.parametrize("change, flags, says", [
    (change_photo, [], "--images: holds not the photos"),
    (exchange_photos, [], "--images: holds not the photos"),
    (change_caption, [], "--images: holds not the captions"),
    (change_prior, [], "--prior or --num_prior: does not give the pictures"),
    (None, ["--num_prior", 3], "--prior or --num_prior"),
    (None, ["--prior", "photos", "--num_prior", 2], "--prior or --num_prior"),
    (change_base, [], "--base: is not the base"),
    (exchange_base, [], "--base: is not the base"),
    (change_noise, [], "--base: is not the base")], ids=lambda case: getattr(case, "__name__", None))
def test_other_content_under_the_same_name_is_refused(begun, start, change, flags, says):
    if change:
        change(begun)
    before = {path: path.stat().st_mtime_ns for path in (begun / "out").rglob("*")}
    assert wait(start(*GO_ON, *flags)) == 2
    errors = [line for line in (begun / "output").read_text().splitlines() if "error" in line]
    assert len(errors) == 1 and says in errors[0] and "of the run that out/step-000002 is from" in errors[0]
    assert {path: path.stat().st_mtime_ns for path in (begun / "out").rglob("*")} == before


def test_a_save_without_digests_is_taken_and_said(begun, start):
    """A former version recorded the folder's path and the number of photos."""
    save = begun / "out" / "step-000002"
    state = torch.load(save / "state.pt", weights_only=True)
    for name in ("base", "captions", "prior"):
        del state["settings"][name]
    state["settings"] |= {"images": "photos", "photos": 3}
    torch.save(state, save / "state.pt")
    (save / "checksums.json").unlink()
    assert wait(start(*GO_ON)) == 0
    warnings = [line for line in (begun / "output").read_text().splitlines() if "former version" in line]
    assert len(warnings) == 2 and "no checksums" in warnings[0] and "does not record its base" in warnings[1]


def test_latest_is_the_newest_run_of_these_photos(base_folder, start, tmp_path):
    """Neither a longer name nor one that reads as a pattern leads to another's run."""
    names = ("dog", "dog-2024", "dog [1]", "dog-2")
    for n, name in enumerate(names):
        (tmp_path / name).mkdir()
        Image.new("RGB", (48, 32), (50 * n, 0, 0)).save(tmp_path / name / "a.png")
        assert wait(start("--images", name, "--alpha", 0, "--steps", 1)) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(names)
    for name in names:
        assert wait(start("--images", name, "--alpha", 0, "--steps", 2, "--resume", "latest")) == 0
        assert (tmp_path / "output").read_text().splitlines()[-1] == f"wrote runs/{name}/subject.safetensors"
    Image.new("RGB", (48, 32), "white").save(tmp_path / "dog" / "a.png")
    assert wait(start("--images", "dog", "--alpha", 0, "--steps", 3, "--resume", "latest")) == 2
    assert "--resume latest: no run of these photos is under runs" in (tmp_path / "output").read_text()


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
    lines = (tmp_path / "output").read_text().splitlines()
    warning, = [line for line in lines if line.startswith("warning") and str(folder) in line]
    assert "0002.mp4" in warning
    assert not equal(tmp_path / "made", tmp_path / "given")  # the caption counts
    assert wait(start("--steps", 1, "--prior_motion", "--num_prior", 3, "--out", "more")) == 0
    assert [p.stat().st_mtime_ns for p in sorted(folder.glob("000[01].mp4"))] == kept
    (video, caption, _), (_, other_caption, _) = data.load_prior(folder, 2, 3, 32, 48)
    assert video.shape == (3, 3, 32, 48) and not torch.equal(video[0], video[2])
    assert (caption, other_caption) == ("", "a dog on the grass")
