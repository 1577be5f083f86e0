"""Promise 3: finished work and others' files stay, and a folder has one writer. test_convert.py has bases."""
import errno
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from makers import fork, random_subject, wait, wait_for
import sample
import support.runs
import train
from support.cli import BadInput, lock_folder
from support.files import find_subjects, save_subject
from support.runs import latest_run, lock_run, save_training, saves, steps_done


@pytest.fixture()
def flags(base_folder, photos_folder):
    """Of each script, for work that takes no time."""
    train_flags = ["--base", base_folder, "--images", photos_folder, "--class_word", "dog", "--alpha", 0,
                   "--steps", 2, "--save_every", 1, "--keep_last", 1, "--preview_every", 2]
    sample_flags = ["--base", base_folder, "--subject", "none", "--prompt", "a dog", "--seed", 5]
    return {train: train_flags, sample: [*sample_flags, "--format", "gif"]}


@pytest.fixture()
def save(base, tmp_path):
    """Writes a save of a training into tmp_path -> its folder."""
    subject = random_subject(base)

    def save(step):
        subject.steps = step
        save_training(tmp_path, subject, torch.optim.AdamW([subject.v_star]), keep_last=3)
        return tmp_path / f"step-{step:06d}"
    return save


OTHERS = """notes.txt .hidden .git/config .tmp-notes.txt .writer.lock.bak log.txt preview-mine.png state.pt
 previews/step-mine.png subject.safetensors.bak step-000002-best/state.pt step-000002-notes.txt step-best/x
 step-1/x step-00001/state.pt prior/mine.txt prior/tiny0-dog/0000.png runs/x.txt runs/old/subject.safetensors
 runs/old/state.pt runs/junk/step-000001/subject.safetensors runs/junk/step-000001/state.pt outputs/mine.mp4
 a-dog-5.txt a-dog-5.gif config.json unet.safetensors.bak""".split()


@pytest.mark.parametrize("script, more, code", [
    (train, "--out .", 0), (train, "", 0), (train, "--out finished", 2), (train, "--resume finished", 2),
    (train, "--resume step-000002-best", 2), (train, "--resume latest", 2), (train, "--out notes.txt", 2),
    (sample, "--out .", 0), (sample, "--out notes.txt/x", 2), (sample, "--subject step-000002-best", 2)])
def test_other_files_stay(base, flags, call, tmp_path, script, more, code):
    for name in OTHERS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f'{{"mine": "{name}"}}')
    save_subject(tmp_path / "finished" / "subject.safetensors", random_subject(base))
    content = lambda: {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    before = content()
    call(script, *flags[script], *more.split(), code=code)
    after = content()
    assert before.items() <= after.items() and (before == after) == (code == 2)
    assert not [path for path in after.keys() - before.keys() if ".tmp-" in path.name]


@pytest.mark.parametrize("name", ["preview.png", "subject.safetensors"])
def test_a_new_run_does_not_begin_beside_a_file_that_it_would_overwrite(flags, call, tmp_path, name):
    (tmp_path / name).write_text("mine")
    call(train, *flags[train], "--out", ".", code=2)
    assert (tmp_path / name).read_text() == "mine" and not saves(tmp_path)


def test_a_finished_run_is_not_overwritten(flags, call, photos_folder, tmp_path):
    name, runs = photos_folder.name, tmp_path / "runs"
    for seed in (0, 1):
        call(train, *flags[train], "--seed", seed)
    first, second = (load_file(runs / n / "subject.safetensors")["v_star"] for n in (name, f"{name}-2"))
    assert not torch.equal(first, second) and len(list(runs.iterdir())) == 2
    for more, message in {f"--out runs/{name}": "holds a run; --resume",
                          f"--resume runs/{name}": "has done 2 already",
                          f"--resume runs/{name} --steps 3 --out runs/{name}-2": "holds a run"}.items():
        assert message in call(train, *flags[train], *more.split(), code=2).err


def test_a_branch_from_an_older_save_leaves_its_run(flags, call, tmp_path):
    common = [*flags[train], "--keep_last", 9, "--preview_every", 0, "--steps", 4]
    call(train, *common, "--out", "out")
    old = ["--resume", "out/step-000002"]
    assert "out has a newer save or subject" in call(train, *common, *old, code=2).err
    call(train, *common, *old, "--out", "branch")
    whole, branch = (load_file(tmp_path / out / "subject.safetensors") for out in ("out", "branch"))
    assert all(torch.equal(whole[name], branch[name]) for name in whole)


@pytest.mark.parametrize("script", [train, sample])
def test_a_second_run_into_a_folder_is_refused(flags, call, tmp_path, script):
    with lock_folder(tmp_path / "out"):
        error = call(script, *flags[script], "--out", "out", code=2).err.splitlines()[-1]
    assert error.startswith("error: out: another run is writing there") and "delete out/.writer.lock" in error
    call(script, *flags[script], "--out", "out")


def test_a_run_that_finds_another_one_finished_meanwhile_is_refused(tmp_path, save):
    with lock_run(tmp_path, None, 0):
        old = save(1)
    with pytest.raises(BadInput, match="holds a run"), lock_run(tmp_path, None, 0):
        pass
    with lock_run(tmp_path, old, 0):
        save(2)
    with pytest.raises(BadInput, match="newer save or subject"), lock_run(tmp_path, old, 0):
        pass
    shutil.rmtree(tmp_path / "step-000002")     # its subject stays
    with pytest.raises(BadInput, match="newer save or subject"), lock_run(tmp_path, old, 0):
        pass
    assert steps_done(tmp_path) == 2


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("flock")])
def test_without_locks_there_is_one_warning_that_names_the_lock(flags, call, tmp_path, monkeypatch, error):
    monkeypatch.setattr(FileLock, "acquire", Mock(side_effect=error))
    errors = call(train, *flags[train], "--out", "out").err
    assert errors.count("out/.writer.lock: this file system has no locks") == errors.count(".lock") == 1
    assert steps_done(tmp_path / "out") == 2


def test_the_second_training_of_a_class_waits_for_the_prior_and_uses_it(flags, tmp_path):
    output = tmp_path / "output-2"
    output.touch()

    def wait_for_the_second():
        save_clip, waits = train.save_prior_clip, lambda: "waiting for it" in output.read_text()
        train.save_prior_clip = lambda *args: (wait_for(waits), save_clip(*args))

    argv = ["train.py", *flags[train], "--alpha", 1, "--steps", 1, "--preview_every", 0]
    first = fork(train.main, [*argv, "--out", "first"], tmp_path, wait_for_the_second)
    wait_for(lambda: list(tmp_path.glob("prior/*/.writer.lock")))
    second = fork(train.main, [*argv, "--out", "second"], tmp_path, output=output,
                  before=lambda: setattr(train, "generate", None))
    assert wait(first) == wait(second) == 0, output.read_text()


def test_latest_looks_again_where_another_run_has_just_replaced_its_save(save, tmp_path, monkeypatch):
    """The run that saved last is found, although the save that was listed has gone."""
    saved = save(1)
    for run in ("older", "newer"):
        shutil.copytree(saved, tmp_path / run / "step-000001")
        shutil.copy(tmp_path / "subject.safetensors", tmp_path / run)
    for path in (tmp_path / "older").rglob("*"):
        os.utime(path, (1, 1))
    real, renamed = support.runs.read_header, []

    def read_header(path):
        if path.parent.parent.name == "newer" and not renamed:
            renamed.append(path.parent.rename(path.parent.with_name("step-000002")))
        return real(path)

    monkeypatch.setattr(support.runs, "read_header", read_header)
    assert latest_run(tmp_path, None) == tmp_path / "newer"


def test_sampling_looks_on_where_a_run_has_just_been_deleted(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_subject("runs/dog/subject.safetensors", random_subject(base))
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda top: [*walk(top), ("runs/gone", [], ["subject.safetensors"])])
    assert find_subjects([], base.config.fingerprint) == [Path("runs/dog/subject.safetensors")]
