"""Promise 2: a file appears whole or not at all, at any kill or full disk, and --resume continues exactly."""
import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
from itertools import count
from pathlib import Path
from unittest.mock import Mock

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from makers import SMALL, fork, fork_ranks, golden_state, random_subject, wait, wait_for
import convert_ckpt
import sample
import support.cli
import train
from convert_ckpt import convert
from support.cli import BadInput, atomic_write, lock_folder
from support.config import BaseConfig
from support.files import Subject, load_base
from support.runs import (load_training, lock_run, newest_save, save_preview, save_prior_clip,
                          save_training, saves, steps_done)
from support.video import free_path, save_video, write_mp4

VIDEO = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


@pytest.fixture()
def flags(base_folder, photos_folder):
    """Of a training without a prior and previews, unless they are asked for again."""
    return ["--base", base_folder, "--images", photos_folder, "--class_word", "dog", "--alpha", 0,
            "--preview_every", 0, "--out", "out"]


@pytest.fixture()
def start(flags, tmp_path):
    """Starts train.py in a child, which runs `before` first -> its pid. It writes to tmp_path/output."""
    return lambda *more, before=None: fork(train.main, ["train.py", *flags, *more], tmp_path, before)


def steps_logged(out):
    path = out / "log.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def equal(a, b):
    """Two folders' subjects are the same, bit for bit."""
    a, b = load_file(a / "subject.safetensors"), load_file(b / "subject.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def killed(main, tmp_path, numbers, changes=("replace", "rename", "unlink", "rmdir", "mkdir")):
    """Kills main() before its change number n of a folder, for each n that it has -> the folders left."""
    for number in numbers:
        def die_at_a_change():
            calls = count(1)
            for name in changes:
                def deadly(*args, change=getattr(os, name), **named):
                    if next(calls) == number:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return change(*args, **named)
                setattr(os, name, deadly)

        cwd = tmp_path / f"killed before change {number}"
        cwd.mkdir()
        code = wait(fork(main, [], cwd, die_at_a_change))
        if code == 0:
            return
        assert code == -signal.SIGKILL, (cwd / "output").read_text()
        yield cwd


def six_steps():
    """What a training does around its steps: a save and a preview after each. Two saves stay."""
    out, v_star = Path("out"), torch.nn.Parameter(torch.zeros(1, 4))
    optimizer = torch.optim.AdamW([v_star])
    subject = Subject("V*", "dog", "base", "f" * 16, 999_996, {}, v_star)   # 1,000,000 comes after 999,999
    save = newest_save(out)
    if save:
        load_training(save, subject, optimizer, steps=2_000_000)
    with lock_run(out, save, 0):
        for subject.steps in range(subject.steps + 1, 1_000_003):
            v_star.grad = torch.full_like(v_star, subject.steps)
            optimizer.step()
            save_training(out, subject, optimizer, 2)
            save_preview(out / "preview.png", np.full((1, 4, 32, 32, 3), subject.steps % 50, np.uint8), "")


def test_saves_are_whole_at_every_kill(tmp_path):
    assert wait(fork(six_steps, [], tmp_path)) == 0
    rows = iio.imread(tmp_path / "out" / "preview.png").reshape(6, -1, 384, 3)
    assert rows[:, -1, 0, 0].tolist() == [47, 48, 49, 0, 1, 2]
    for kills, cwd in enumerate(killed(six_steps, tmp_path, range(1, 1000, 5)), 1):
        out = cwd / "out"
        steps = [torch.load(save / "state.pt", weights_only=True)["step"] for save in saves(out)]
        assert steps == [steps_done(save) for save in saves(out)]
        assert steps_done(out) in (steps[-2:] or [0]) + [0] * (len(steps) < 2)     # the newest, or one before
        assert wait(fork(six_steps, [], cwd)) == 0, (cwd / "output").read_text()
        assert [save.name for save in saves(out)][-2:] == ["step-1000001", "step-1000002"]
        assert equal(tmp_path / "out", out) and not list(out.glob(".tmp-*"))
    assert kills > 8


def test_a_base_is_absent_until_it_is_whole(tmp_path):
    torch.save({"state_dict": golden_state()}, tmp_path / "model.ckpt")
    main = lambda: convert(tmp_path / "model.ckpt", Path("base"), BaseConfig(**SMALL), torch.float32)
    assert wait(fork(main, [], tmp_path)) == 0
    for cwd in killed(main, tmp_path, [1], ("replace",)):   # before the folder gets its name
        with pytest.raises(BadInput, match="config.json: no such file"):
            load_base(cwd / "base")
        assert wait(fork(main, [], cwd)) == 0, (cwd / "output").read_text()
        assert {path.name: path.read_bytes() for path in (cwd / "base").iterdir()} == {
            path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}


def test_the_prior_and_videos_are_whole_at_every_kill(tmp_path):
    def main():
        with lock_folder(Path("prior"), wait=True):
            for k in range(3):
                path = Path("prior") / f"{k:04d}.png"
                if not path.exists():
                    save_prior_clip(path, np.full((1, 32, 48, 3), k, np.uint8), 8)
        for seed in range(2):
            if path := free_path(Path("videos"), f"dog-{seed}", {"seed": seed}, [".gif", ".png"]):
                save_video(path, VIDEO, ["gif", "png"], 8, {"seed": seed}, {})

    for cwd in killed(main, tmp_path, count(1), ("replace",)):
        for count_now in (0, 3):
            pictures, records = (sorted(cwd.glob(name)) for name in ("prior/[0-9]*.png", "videos/dog*.json"))
            assert all((iio.imread(picture) == k).all() for k, picture in enumerate(pictures))
            assert all(len(iio.imread(record.with_suffix(".gif"))) == 3 for record in records)
            assert len(pictures) >= count_now and len(records) >= count_now - 1
            assert wait(fork(main, [], cwd)) == 0, (cwd / "output").read_text()


def test_killed_and_resumed_equals_uninterrupted(start, tmp_path):
    """With a prior that the base makes. The kill comes at no particular moment."""
    common = ["--alpha", 1, "--steps", 14, "--save_every", 5]
    assert wait(start(*common, "--out", "whole")) == 0
    pid = start(*common)
    wait_for(lambda: len(steps_logged(tmp_path / "out")) >= 8)
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL
    assert wait(start(*common, "--resume", "latest")) == 0
    assert equal(tmp_path / "whole", tmp_path / "out")
    assert not list((tmp_path / "out").glob(".tmp-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_prints_how_to_continue_and_ends_the_training(start, tmp_path, number):
    out, pid = tmp_path / "out", start("--steps", 10_000)
    wait_for(lambda: steps_logged(out))
    for _ in range(2 if number == signal.SIGTERM else 1):   # a scheduler may send one and torchrun another
        os.kill(pid, number)
    assert wait(pid) == -number
    steps, output = steps_logged(out), (tmp_path / "output").read_text()
    assert f"stopped after step {steps[-1]} of 10000" in output and "--resume out continues" in output
    assert [save.name for save in saves(out)] == [f"step-{steps[-1]:06d}"] and "Traceback" not in output

    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)       # as nohup does
    pid = start("--steps", steps[-1] + 4, "--resume", "out", before=ignore)
    wait_for(lambda: len(steps_logged(out)) > len(steps))
    os.kill(pid, signal.SIGHUP)
    assert wait(pid) == 0 and steps_logged(out) == list(range(1, steps[-1] + 5))


def test_of_two_processes_one_gets_the_signal_and_both_end(flags, tmp_path):
    pids = fork_ranks(2, train.main, ["train.py", *flags, "--steps", 10_000], tmp_path)
    wait_for(lambda: steps_logged(tmp_path / "out"))
    os.kill(pids[1], signal.SIGTERM)
    assert [wait(pid) for pid in pids] == [-signal.SIGTERM] * 2
    assert steps_done(tmp_path / "out") == steps_logged(tmp_path / "out")[-1]


def then_kill(module, name, number):
    """Makes a function send its own process a signal after its work."""
    real = getattr(module, name)
    setattr(module, name, lambda *args: (real(*args), os.kill(os.getpid(), number)))


def test_a_signal_while_the_prior_is_made_keeps_its_pictures(start, tmp_path):
    common, stop = ["--alpha", 1, "--steps", 1], lambda: then_kill(train, "save_prior_clip", signal.SIGTERM)
    assert wait(start(*common, before=stop)) == -signal.SIGTERM
    picture, = (tmp_path / "prior").glob("*/*.png")
    made = picture.stat().st_mtime_ns
    assert wait(start(*common)) == 0 and picture.stat().st_mtime_ns == made


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_sampling_and_leaves_whole_videos(base_folder, tmp_path, number):
    argv = ["sample.py", "--base", base_folder, "--subject", "none", "--prompt", "a dog", "--seed", 1,
            "--num", 3, "--format", "gif"]
    assert wait(fork(sample.main, argv, tmp_path, lambda: then_kill(sample, "save_video", number))) == -number
    names = sorted(path.name for path in (tmp_path / "outputs").glob("[!.]*"))
    assert names == ["a-dog-1.gif", "a-dog-1.json"]
    assert wait(fork(sample.main, argv, tmp_path)) == 0
    assert "1 of 3 videos were there already" in (tmp_path / "output").read_text()


@pytest.mark.parametrize("write", [
    lambda path: save_file({"x": torch.ones(10**6)}, path),
    lambda path: torch.save(torch.ones(10**6), path),
    lambda path: path.write_bytes(bytes(10**7))], ids=["safetensors", "torch", "bytes"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, write):
    """On a disk of 2 MB. Who may not mount one gets an error when a file is flushed."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
    mounted = os.geteuid() == 0 and not subprocess.run(mount, capture_output=True).returncode
    if not mounted:
        no_space = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(support.cli, "make_durable", Mock(side_effect=no_space))
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    try:
        with pytest.raises(BadInput, match="x.safetensors: the disk is full; make room"):
            with atomic_write(path) as temporary:
                write(temporary)
        assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)     # even if a file is open


@pytest.fixture()
def save(base, tmp_path):
    """Saves a training after some steps, in tmp_path, where one save stays -> its subject and optimizer."""
    subject = random_subject(base)
    optimizer = torch.optim.AdamW([subject.v_star])

    def save(*steps):
        for subject.steps in steps:
            subject.v_star.grad = torch.ones_like(subject.v_star)
            optimizer.step()
            save_training(tmp_path, subject, optimizer, keep_last=1)
        return subject, optimizer
    return save


def test_a_save_is_on_the_disk_before_an_older_one_is_removed(save, monkeypatch):
    events = []
    for name in ("fsync", "replace", "rename"):
        def note(file, *more, name=name, real=getattr(os, name)):
            path = os.readlink(f"/proc/self/fd/{file}") if name == "fsync" else str(file)
            events.append((name, re.sub(r".*step-", "", path)))
            return real(file, *more)
        monkeypatch.setattr(os, name, note)
    save(1, 2)
    written = max(events.index(("fsync", f"000002/{file}")) for file in ("subject.safetensors", "state.pt"))
    assert written < events.index(("replace", "000002")) < events.index(("rename", "000001"))


def test_an_old_save_that_cannot_be_removed_stays_with_one_warning(save, tmp_path, monkeypatch, capsys):
    refuse = Mock(side_effect=PermissionError(errno.EACCES, "Permission denied"))
    monkeypatch.setattr(os, "rename", refuse)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    save(1, 2)
    assert [path.name for path in saves(tmp_path)] == ["step-000001", "step-000002"]
    warning, = capsys.readouterr().err.splitlines()
    assert "step-000001" in warning and "Permission denied" in warning


def test_another_pytorchs_optimizer_and_files_of_file_managers_do_not_matter(save, tmp_path):
    """The optimizer's groups have a setting more, or one less."""
    subject, _ = save(1)
    for name in (".DS_Store", "desktop.ini", ".nfs0000"):
        (newest_save(tmp_path) / name).write_text("x")
    for change in (lambda group: group.update(new_setting=True), lambda group: group.pop("fused")):
        file = newest_save(tmp_path) / "state.pt"
        state = torch.load(file, weights_only=True)
        change(state["optimizer"]["param_groups"][0])
        torch.save(state, file)
        again = torch.optim.AdamW([subject.v_star])
        load_training(file.parent, subject, again, 9)
        assert subject.steps == 1
        again.step()
    save(2)
    assert [path.name for path in tmp_path.glob("*step-*")] == ["step-000002"]


@pytest.mark.parametrize("umask", [0o002, 0o027])
def test_every_file_obeys_the_umask(flags, call, tmp_path, monkeypatch, umask):
    torch.save({"state_dict": golden_state()}, tmp_path / "model.ckpt")
    monkeypatch.setattr(convert_ckpt, "BaseConfig", lambda: BaseConfig(**SMALL))
    before = os.umask(umask)
    try:
        call(train, *flags, "--alpha", 1, "--steps", 1, "--preview_every", 1, "--out", "runs/dog")
        call(sample, *flags[:2], "--format", "mp4", "gif", "png", "--compare", "--show_process")
        call(convert_ckpt, "model.ckpt", "--out", "base")
    finally:
        os.umask(before)
    written = [path for folder in ("runs", "outputs", "base") for path in (tmp_path / folder).rglob("*")]
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in written}
    assert len(written) > 20
    assert not [path for path in written if modes[path] != (0o777 if path.is_dir() else 0o666) & ~umask]


HALF = """{real} "$@"; for last; do :; done
case "$last" in *.mp4) truncate -s $(($(stat -c %s "$last") / 2)) "$last";; esac"""


@pytest.mark.parametrize("command", ["exit 1", "exec {real} -version", HALF], ids=["fail", "nothing", "half"])
def test_an_mp4_that_ffmpeg_did_not_finish_is_absent(base_folder, call, tmp_path, monkeypatch, command):
    """imageio trusts ffmpeg, for which this stands in. The gif stays."""
    script = tmp_path / "ffmpeg"
    command = command.replace("{real}", imageio_ffmpeg.get_ffmpeg_exe())
    script.write_text(f'#!/bin/sh\ncase "$*" in *-version*) exit 0;; esac\n{command}\n')
    script.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(script))
    flags = ["--base", base_folder, "--subject", "none", "--prompt", "a dog", "--seed", 1]
    error = call(sample, *flags, code=2).err.splitlines()[-1]
    assert error.startswith("error: ffmpeg did not write all 3 frames")
    assert [path.name for path in (tmp_path / "outputs").glob("[!.]*")] == ["a-dog-1.gif"]


def test_a_browser_can_play_an_mp4_before_all_of_it_is_there(tmp_path):
    write_mp4(tmp_path / "a.mp4", VIDEO, 8, quality=8)
    content = (tmp_path / "a.mp4").read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")
