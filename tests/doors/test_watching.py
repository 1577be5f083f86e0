"""Watching never costs a run: whatever shows a training may fail, one line says so, and the training saves.

Every training is a forked child of four steps with two previews.
"""
import json
import os
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from makers import fork, wait

FLAGS = ["--class_word", "dog", "--alpha", 0, "--steps", 4, "--preview_every", 2]


@pytest.fixture()
def watch(base_folder, photos_folder, tmp_path):
    """Trains in tmp_path/out, with a hook run first in the child -> what it printed; it has to succeed."""
    def watch(hook=None, *flags):
        argv = ["train.py", "--base", base_folder, "--images", photos_folder, *FLAGS, "--out", "out", *flags]
        code = wait(fork(train.main, argv, tmp_path, hook))
        output = (tmp_path / "output").read_text()
        assert code == 0, output
        return output
    return watch


@pytest.fixture(scope="session")
def undisturbed(base_folder, photos_folder, tmp_path_factory):
    """The tensors of the same training without previews."""
    folder = tmp_path_factory.mktemp("undisturbed")
    argv = ["train.py", "--base", base_folder, "--images", photos_folder, *FLAGS, "--preview_every", 0,
            "--out", "out"]
    assert wait(fork(train.main, argv, folder)) == 0, (folder / "output").read_text()
    return load_file(folder / "out" / "subject.safetensors")


def assert_as_undisturbed(out, undisturbed):
    for path in (out / "subject.safetensors", out / "step-000004" / "subject.safetensors"):
        found = load_file(path)
        assert all(torch.equal(found[name], undisturbed[name]) for name in undisturbed)


# ------------------------------------------------------------------------------------------------------------
# Previews and the log


def damaged_picture(out):
    (out / "previews").mkdir()
    (out / "previews" / "step-000001.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"damaged")


def cut_picture(out):
    (out / "previews").mkdir()
    path = out / "previews" / "step-000001.png"
    Image.effect_noise((400, 80), 90).save(path)
    path.write_bytes(path.read_bytes()[:-200])


def picture_of_another_size(out):
    (out / "previews").mkdir()
    Image.new("RGB", (7, 7)).save(out / "previews" / "step-000001.png")


def folder_for_preview(out):
    (out / "preview.png").mkdir()
    (out / "preview.png" / "mine").write_text("mine")


def folder_for_one_preview(out):
    (out / "previews" / "step-000002.png" / "mine").mkdir(parents=True)


def file_for_previews(out):
    (out / "previews").write_text("mine")


def folder_for_log(out):
    (out / "log.jsonl").mkdir()


@pytest.mark.parametrize("disturb, says", [
    (damaged_picture, "the preview of step 2"), (cut_picture, "the preview of step 2"),
    (picture_of_another_size, "the preview of step 2"), (folder_for_preview, "the preview of step 2"),
    (folder_for_one_preview, "the preview of step 2"), (file_for_previews, "the preview of step 2"),
    (folder_for_log, "log.jsonl")], ids=lambda case: getattr(case, "__name__", ""))
def test_what_is_in_the_way_of_watching_stays_and_is_said(watch, undisturbed, tmp_path, disturb, says):
    """It comes while a run is stopped after its first step. A new run would refuse it (test_safety.py)."""
    out = tmp_path / "out"
    watch(None, "--steps", 1, "--preview_every", 0)
    (out / "log.jsonl").unlink()
    disturb(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    del before[out / "subject.safetensors"]
    output = watch(None, "--resume", "out")
    assert output.count(f"warning: {'out/' * (says == 'log.jsonl')}{says}: not written") == 1, output
    assert "Traceback" not in output
    assert all(path.read_bytes() == content for path, content in before.items())
    assert_as_undisturbed(out, undisturbed)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), torch.OutOfMemoryError("memory"),
                                   KeyError("x"), SyntaxError("broken PNG file")], ids=repr)
@pytest.mark.parametrize("inside", ["generate", "save_preview"])
def test_a_preview_that_fails_changes_nothing(watch, undisturbed, tmp_path, inside, error):
    """Its save came before it. Also lambda is 1 again after half a preview."""
    def fail():
        real = getattr(train, inside)

        def failing(*args, **named):
            assert (tmp_path / "out" / "step-000002").exists()
            if inside == "generate":
                args[4].steps = 1
            real(*args, **named)
            raise error
        setattr(train, inside, failing)

    output = watch(fail)
    assert output.count("training goes on") == 2  # previews, each named
    assert_as_undisturbed(tmp_path / "out", undisturbed)


@pytest.mark.parametrize("content", [b"\x00\xff\xfe\r\x0b\n\x80", b"my notes", b"\n\n", b"[1]\n{}\n", b""])
def test_a_log_of_others_stays_and_ours_follows(watch, undisturbed, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.jsonl").write_bytes(content)
    output = watch()
    assert output.count("not a training's; they stay") == bool(content)
    log = (tmp_path / "out" / "log.jsonl").read_bytes()
    assert log.startswith(content)
    ours = log[len(content):].strip().split(b"\n")
    assert [json.loads(line)["step"] for line in ours] == [1, 2, 3, 4]
    assert_as_undisturbed(tmp_path / "out", undisturbed)


# ------------------------------------------------------------------------------------------------------------
# Progress


def onto(number, target):
    """Makes a stream's file another: a full disk, a pipe that nobody reads, or none."""
    name, stream = {1: "stdout", 2: "stderr"}[number], None
    if target == "closed":
        os.close(number)
    else:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer if target == "pipe" else os.open("/dev/full", os.O_WRONLY), number)
        stream = os.fdopen(number, "w", closefd=False)
    setattr(sys, name, stream)


@pytest.mark.parametrize("target", ["full", "pipe", "closed"])
@pytest.mark.parametrize("numbers", [(1,), (2,), (1, 2)], ids=["stdout", "stderr", "both"])
def test_progress_that_nobody_can_read(watch, undisturbed, tmp_path, target, numbers):
    output = watch(lambda: [onto(number, target) for number in numbers])
    assert output.count("not written") == (target != "closed" and len(numbers) == 1), output
    assert_as_undisturbed(tmp_path / "out", undisturbed)
