"""The program removes and writes over only what it made, and ends in one line.

Every test is in this process, but for signals while libraries are imported.
"""
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import convert_ckpt
import sample
import train
from cli import (LOCK, RECORD, ROOT, BadInput, check_out, complete_or_absent, one_line,
                 only_writer, printable, run_script, warn)
from config import load_config
from data import Photo
from files import file_crc32, load_base, load_subject, save_subject
from lora import Subject
from makers import random_subject
from paper import evaluate, protocol
from paper.baselines import CustomDiffusion
from runs import load_training, newest_save, pick_run, run_writer, save_training, saves
from toy import experiment


@pytest.fixture()
def training():
    """A subject of one vector, and its optimizer after a step."""
    v_star = torch.nn.Parameter(torch.ones(1, 4))
    optimizer = torch.optim.AdamW([v_star])
    v_star.sum().backward()
    optimizer.step()
    return Subject("V*", "dog", 2, "base", "f" * 16, 0, "customcrafter", {"seed": 0},
                   v_star=v_star), optimizer


def save(out, training, step, keep_last=3):
    training[0].steps = step
    save_training(out, *training, keep_last)
    return out / f"step-{step:06d}"


# Names near to ours. A folder is written as one with a file in it.
OTHERS = [".tmp-notes.txt", ".tmp-12-notes.txt", ".tmp-1-step-000001/", "step-000002-best/",
          "step-000002-notes.txt",
          "step-2/", "step-000009/", "step-best/", ".hidden", "subject.safetensors.old", "previews-mine/",
          "unet.safetensors.bak", ".unfinished/", ".lock"]


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_stay(tmp_path, training, name):
    path = tmp_path / name
    if name.endswith("/"):
        path.mkdir()
        path /= "mine"
    path.write_text("mine")
    with only_writer(tmp_path):
        for step in range(1, 6):
            save(tmp_path, training, step, keep_last=1)
    assert path.read_text() == "mine"
    assert saves(tmp_path) == [tmp_path / "step-000005"]


@pytest.mark.parametrize("line", ["../victim", ".tmp-9/../../victim", "/tmp/.tmp-x/y",
                                  ".tmp-link/.tmp-victim"])
def test_a_record_leads_nowhere_else(tmp_path, line):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".tmp-victim").write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    (out / ".tmp-link").symlink_to(tmp_path / "other")
    (out / RECORD).write_text(json.dumps(line) + "\n")
    with only_writer(out):
        pass
    assert (tmp_path / "victim").exists() and (tmp_path / "other" / ".tmp-victim").exists()


@pytest.mark.parametrize("place", ["x", "previews/x"])
def test_what_a_killed_writer_left_is_removed(tmp_path, place):
    pid = os.fork()
    if pid == 0:
        with only_writer(tmp_path), complete_or_absent(tmp_path / place) as temporary:
            temporary.write_text("half")
            os._exit(0)
    os.waitpid(pid, 0)
    left = [path for path in tmp_path.rglob(".tmp-*")]
    assert len(left) == 1
    with only_writer(tmp_path):
        assert not left[0].exists()
    assert not (tmp_path / RECORD).exists()


def test_a_temporary_file_of_the_same_name_stays(tmp_path):
    """In a container, every run may be process number 1."""
    left = tmp_path / f".tmp-{os.getpid()}-x"
    left.write_text("mine")
    with complete_or_absent(tmp_path / "x") as temporary:
        temporary.write_text("ours")
    assert left.read_text() == "mine" and (tmp_path / "x").read_text() == "ours"
    assert len(list(tmp_path.iterdir())) == 2


def test_one_writer(tmp_path):
    with only_writer(tmp_path):
        with pytest.raises(BadInput, match="another run is writing there"), only_writer(tmp_path):
            pass
    with only_writer(tmp_path):
        assert (tmp_path / LOCK).exists()


def test_saves_sort_as_numbers(tmp_path, training):
    for step in (999_999, 1_000_000):
        save(tmp_path, training, step, keep_last=1)
    assert saves(tmp_path) == [tmp_path / "step-1000000"]


def test_a_finished_subject_is_never_written_over(tmp_path):
    (tmp_path / "subject.safetensors").write_text("mine")
    with pytest.raises(BadInput, match="holds a run"):
        pick_run(tmp_path, "", tmp_path, [])
    assert pick_run(None, "", tmp_path, [])[0] == tmp_path.with_name(f"{tmp_path.name}-2")
    with pytest.raises(BadInput, match="meanwhile"), run_writer(tmp_path, None, 0):
        pass


def test_a_run_that_waited_goes_on_from_the_newest_or_not_at_all(tmp_path, training):
    old = save(tmp_path, training, 1)
    with run_writer(tmp_path, old, 0):
        save(tmp_path, training, 2)
    with pytest.raises(BadInput, match="newer"), run_writer(tmp_path, old, 0):
        pass


def test_the_subject_is_the_newest_save_after_a_kill(tmp_path, training):
    """Killed before it was copied. The same command ends the run: nothing is left to train."""
    before = save(tmp_path, training, 2)
    newest = save(tmp_path, training, 4)
    content, subject = (newest / "subject.safetensors").read_bytes(), tmp_path / "subject.safetensors"
    with pytest.raises(BadInput, match="has done 4 already"):
        load_training(newest, *training, steps=4)
    for left in (None, b"damaged", (before / "subject.safetensors").read_bytes()):
        subject.unlink()
        if left:
            subject.write_bytes(left)
        assert load_training(newest, *training, steps=4) == 4
        with run_writer(tmp_path, newest, 0):
            assert subject.read_bytes() == content


def test_a_subject_whose_save_was_removed_is_not_written_over(tmp_path, training):
    before = save(tmp_path, training, 2)
    shutil.rmtree(save(tmp_path, training, 4))
    content = (tmp_path / "subject.safetensors").read_bytes()
    with pytest.raises(BadInput, match="has done 4 steps, more than"), run_writer(tmp_path, before, 0):
        pass
    assert (tmp_path / "subject.safetensors").read_bytes() == content


@pytest.mark.parametrize("make", [
    lambda path: path.mkdir(), lambda path: path.write_text("mine"),
    lambda path: path.symlink_to("step-000002"),
    lambda path: shutil.copytree(path.with_name("step-000002"), path) and (path / "notes").touch()])
def test_what_is_in_the_way_of_a_save_is_said_at_the_start(tmp_path, training, make):
    newest = save(tmp_path, training, 2)
    make(tmp_path / "step-000004")
    with pytest.raises(BadInput, match="step-000004: is not a save, and in the way"):
        with run_writer(tmp_path, newest, 0):
            pass
    assert os.path.lexists(tmp_path / "step-000004")


@pytest.mark.parametrize("file", ["subject.safetensors", "state.pt"])
@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_one_bit_of_a_save(tmp_path, training, file, place):
    path = save(tmp_path, training, 1) / file
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInput, match=f"{file} is not what was saved"):
        load_training(path.parent, *training, steps=4)


@pytest.mark.parametrize("content", ["", "{}", "[]", "{", "null", '{"state.pt": 1}', "\0"])
def test_checksums_that_are_damaged(tmp_path, training, content):
    folder = save(tmp_path, training, 1)
    (folder / "checksums.json").write_text(content)
    with pytest.raises(BadInput, match="not a readable save"):
        load_training(folder, *training, steps=4)


@pytest.mark.parametrize("tensors, says", [
    ({}, "1 tensors missing"), ({"v_star": torch.ones(2, 4)}, "another shape"),
    ({"v_star": torch.ones(1, 4), "more": torch.ones(1)}, "1 unknown"),
    ({"v_star": torch.full((1, 4), torch.nan)}, "not finite"),
    ({"v_star": torch.ones(1, 4, dtype=torch.float16)}, "float16")])
def test_tensors_that_do_not_fit(tmp_path, training, tensors, says):
    """Under right checksums."""
    folder = save(tmp_path, training, 1)
    save_file(tensors, folder / "subject.safetensors")
    checksums = {name: file_crc32(folder / name) for name in ("state.pt", "subject.safetensors")}
    (folder / "checksums.json").write_text(json.dumps(checksums))
    with pytest.raises(BadInput, match=f"subject.safetensors: .*{says}"):
        load_training(folder, *training, steps=4)


def test_a_save_under_another_step(tmp_path, training):
    folder = save(tmp_path, training, 1).rename(tmp_path / "step-000007")
    with pytest.raises(BadInput, match="state.pt is of step 1"):
        load_training(folder, *training, steps=9)
    assert load_training(folder.rename(tmp_path / "best"), *training, steps=9) == 1


def damaged(state, kind):
    moments = state["optimizer"]["state"][0]
    if kind in ("step", "settings", "optimizer"):
        del state[kind]
    elif kind == "text":
        state["step"] = "1"
    elif kind == "negative":
        state["step"] = -1
    elif kind == "list":
        return [state]
    elif kind == "shape":
        moments["exp_avg"] = torch.ones(3)
    elif kind == "nan":
        moments["exp_avg_sq"][0] = torch.nan
    elif kind == "moment":
        del moments["exp_avg"]
    elif kind == "moments":
        state["optimizer"]["state"] = {}
    elif kind == "rate":
        state["optimizer"]["param_groups"][0]["lr"] = "fast"
    elif kind == "group":
        state["optimizer"]["param_groups"] *= 2
    elif kind == "other optimizer":
        del state["optimizer"]["param_groups"][0]["betas"]
    elif kind == "optimizer text":
        state["optimizer"] = "adam"
    return state


@pytest.mark.parametrize("kind", ["step", "settings", "optimizer", "text", "negative", "list", "shape", "nan",
                                  "moment", "moments", "rate",
                                  "group", "other optimizer", "optimizer text"])
def test_a_state_that_does_not_fit(tmp_path, training, kind):
    folder = save(tmp_path, training, 1)
    (folder / "checksums.json").unlink()  # as from a former version
    state = torch.load(folder / "state.pt", weights_only=True)
    torch.save(damaged(state, kind), folder / "state.pt")
    with pytest.raises(BadInput, match="an older step-"):
        load_training(folder, *training, steps=4)


def test_a_save_of_a_former_version_is_taken_and_said(tmp_path, training, capsys):
    folder = save(tmp_path, training, 1)
    (folder / "checksums.json").unlink()
    assert newest_save(tmp_path) == folder
    assert load_training(folder, *training, steps=4) == 1
    assert "has no checksums" in capsys.readouterr().err


PARSERS = {"train.py": train.parse_args, "sample.py": sample.parse_args, "evaluate.py": evaluate.parse_args,
           "convert_ckpt.py": convert_ckpt.main, "experiment.py": experiment.parse_args,
           "protocol.py": protocol.parse_args}
FLAGS = {
    "train.py": ["--base", "--images", "--class_word", "--placeholder", "--prior", "--out", "--resume",
                 "--steps", "--method", "--lr"],
    "sample.py": ["--base", "--subject", "--prompt", "--prompts", "--lambdas", "--out", "--format", "--seed"],
    "evaluate.py": ["--videos", "--images", "--base_videos", "--clip", "--dino", "--out"],
    "convert_ckpt.py": ["--out", "--dtype"],
    "experiment.py": ["--base", "--subject", "--clips", "--out"],
    "protocol.py": ["--base", "--subjects", "--clip", "--dino", "--out"]}
SCRIPT_FLAGS = []
for script, flags in FLAGS.items():
    SCRIPT_FLAGS += [(script, flag) for flag in flags]


@pytest.mark.parametrize("script, flag", SCRIPT_FLAGS)
def test_empty_flags(monkeypatch, script, flag):
    """As an unset shell variable leaves them."""
    for given in ([flag, ""], [f"{flag}="], [flag, "  "], [flag, "x", ""]):
        monkeypatch.setattr(sys, "argv", [script, *given])
        with pytest.raises(BadInput, match=f"^{flag}: is empty"):
            PARSERS[script]()


def test_an_empty_argument_and_an_empty_flag_that_is_right(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["convert_ckpt.py", ""])
    with pytest.raises(BadInput, match="^argument 1: is empty"):
        convert_ckpt.main()
    for given in (["--negative_prompt", ""], ["--negative_prompt="]):
        monkeypatch.setattr(sys, "argv", ["sample.py", *given])
        assert sample.parse_args().negative_prompt == ""


@pytest.mark.parametrize("script, flag", [
    ("train.py", "--images"), ("train.py", "--class_word"), ("train.py", "--placeholder"),
    ("train.py", "--out"), ("train.py", "--resume"), ("sample.py", "--prompt"),
    ("sample.py", "--negative_prompt"), ("sample.py", "--subject"), ("convert_ckpt.py", "--out"),
    ("evaluate.py", "--videos")])
def test_flags_that_are_no_text(monkeypatch, script, flag):
    for given in ([flag, "caf\udce9*"], [f"{flag}=caf\udce9*"], [flag, "a\x1b[2J*"], [flag, "a\nb*"],
                  [flag, "a\u202eb*"]):
        monkeypatch.setattr(sys, "argv", [script, *given])
        with pytest.raises(BadInput, match=f"^{flag} .*holds control codes, or bytes") as error:
            PARSERS[script]()
        assert one_line(error.value).isascii()


def test_a_subject_that_can_be_learned_can_be_loaded(base, tmp_path, monkeypatch):
    """Whatever class word the flags take: letters, an emoji that is joined, a space that does not break."""
    word = "صورة \U0001f468\u200d\U0001f469\u200d\U0001f467 a\u00a0b\u200cc"
    monkeypatch.setattr(sys, "argv", ["train.py", "--images", "photos", "--class_word", word])
    subject = random_subject(base)
    subject.class_word = train.parse_args().class_word
    save_subject(tmp_path / "subject.safetensors", subject)
    assert load_subject(tmp_path / "subject.safetensors", base).class_word == word


def test_a_shell_leaves_the_home_folder_in_a_flag(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--out=~/videos", "--prompt", "~/ is a home"])
    args = sample.parse_args()
    assert args.out == Path.home() / "videos" and args.prompt == "~/ is a home"


IMAGES = ["--images", "photos", "--class_word", "dog"]
# A command, and how its one line begins.
AT_FAULT = [
    (["train.py", *IMAGES, "--method", "dreamvideo", "--word_steps", 5, "--steps", 4], "--word_steps 5: "),
    (["train.py", *IMAGES, "--method", "dreamvideo", "--steps", 4], "--word_steps 3000: "),
    (["train.py", *IMAGES, "--method", "dreamvideo", "--word_steps", 4001], "--word_steps 4001: "),
    (["sample.py", "--lambdas", "1000*5", "--steps", 5], "--lambdas: 1000 in it"),
    (["sample.py", "--lambdas", "0.4*3,0.4>-11*2", "--steps", 5], "--lambdas: -11 in it"),
    (["sample.py", "--lambdas", "0.4*4,-11*1", "--steps", 5], "--lambdas: -11 in it"),
    (["sample.py", "--lambdas", "0.8*2", "--steps", 3], "--lambdas 0.8*2: has 2 steps"),
    (["sample.py", "--K", 4, "--steps", 3], "--K 4: "),
    (["sample.py", "--height", 24], "--height 24: "),
    (["sample.py", "--width", 24], "--width 24: "),
    (["train.py", *IMAGES, "--height", 24], "--height 24: "),
    (["sample.py", "--subject", "none", "--subject", "x", "--prompt", "a"], "--subject none: "),
    (["sample.py", "--subject", "x", "--subject", "none", "--prompt", "a"], "--subject none: "),
    (["experiment.py", "base", "--clips", 0], "--clips 0: "),
    (["experiment.py", "base", "--clips", -1], "--clips -1: ")]


@pytest.mark.parametrize("command, begins", AT_FAULT, ids=[" ".join(map(str, c)) for c, _ in AT_FAULT])
def test_the_flag_at_fault_is_named(tmp_path, base_folder, monkeypatch, command, begins):
    script, *flags = map(str, command)
    flags += ["--out", str(tmp_path / "out")]
    if script != "experiment.py":
        flags += ["--base", str(base_folder)]
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(BadInput) as error:
        {"train.py": train, "sample.py": sample, "experiment.py": experiment}[script].main()
    assert str(error.value).startswith(begins) and not (tmp_path / "out").exists()


def test_two_experiments_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiment.py", "base", "--clips", "1", "--out", str(tmp_path)])
    with only_writer(tmp_path), pytest.raises(BadInput, match="another run is writing there"):
        experiment.main()


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "half", '{"settings": 1}', "\0"])
def test_a_table_that_is_no_experiments_is_not_gone_on_with(tmp_path, monkeypatch, text):
    (tmp_path / "base.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["experiment.py", "base", "--clips", "1", "--out", str(tmp_path)])
    with pytest.raises(BadInput, match=r"base\.json in it has other settings"):
        experiment.main()
    assert (tmp_path / "base.json").read_text() == text


def test_custom_diffusion_on_the_smallest_frame_has_a_finite_loss():
    """Of two latent rows, one at least lies inside a photo that is placed anywhere."""
    photo = Photo(Image.new("RGB", (40, 40)), "", Path(), 0)
    for seed in range(200):
        _, _, weight = CustomDiffusion.make_sample(photo, np.random.default_rng(seed), 16, 16, 8, "V* dog")
        assert weight.shape == (2, 2) and weight.isfinite().all() and abs(weight.mean() - 1) < 1e-6


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "a\rb", "a\x07b", "a\u202eb", "a\x9bb", "a\nb", "a\udcffb"])
def test_names_are_one_printable_line(text):
    assert printable(text).isprintable() and printable(text)[0] + printable(text)[-1] == "ab"
    assert one_line(BadInput(text)).isprintable()


def raising(error):
    def main():
        raise error
    return main


@pytest.mark.parametrize("error, code, says", [
    (BadInput("--x: wrong"), 2, "error: --x: wrong"),
    (OSError(28, "No space"), 2, "error: No space; the disk is full, make room"),
    (OSError(28, "No space", "a.png"), 2, "error: a.png: No space; the disk is full, make room"),
    (OSError(122, "Quota exceeded", "a\nb"), 2, "error: a\\nb: Quota exceeded; the disk is full"),
    (PermissionError(13, "Permission denied", "a.png"), 2, "error: a.png: Permission denied"),
    (OSError(12, "Cannot allocate memory"), 2, "error: out of memory (Cannot allocate memory)"),
    (RuntimeError("std::bad_alloc"), 2, "error: out of memory"),
    (RuntimeError("could not create a primitive"), 2, "error: out of memory"),
    (BadInput("x: a\nb\x1b[2J\udcff"), 2, "error: x: a\\nb\\x1b[2J\\udcff"),
    (BadInput("x" * 10**6), 2, " ... "),
    (KeyError("a"), 1, "unexpected: KeyError"),
    (RecursionError("deep"), 1, "unexpected: RecursionError"),
    (UnicodeEncodeError("ascii", "é", 0, 1, "no"), 1, "unexpected: UnicodeEncodeError"),
    (MemoryError(), 2, "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "--grad_checkpointing"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, "--frames"),
    (KeyboardInterrupt(), 130, "stopped")])
@pytest.mark.parametrize("flags", [[], ["--traceback"]])
def test_every_end_is_one_line(monkeypatch, capfd, error, code, says, flags):
    streams = [open(os.dup(number), "w") for number in (1, 2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(sys, "argv", ["script", *flags])
    with pytest.raises(SystemExit) as end:
        run_script(raising(error))
    for stream in streams:
        stream.close()
    lines = capfd.readouterr().err.splitlines()
    assert end.value.code == code and says in lines[-1]
    if not flags:
        assert len(lines) == 1


@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2)])
def test_closed_streams(monkeypatch, closed):
    """As after >&-, where Python has no stream."""
    for number in closed:
        monkeypatch.setattr(sys, {1: "stdout", 2: "stderr"}[number], None)
    if 1 not in closed:
        monkeypatch.setattr(sys, "stdout", open(os.devnull, "w"))
    if 2 not in closed:
        monkeypatch.setattr(sys, "stderr", open(os.devnull, "w"))
    monkeypatch.setattr(sys, "argv", ["script"])
    run_script(lambda: (print("a"), warn("b")))
    with pytest.raises(SystemExit) as end:
        run_script(raising(BadInput("--x: wrong")))
    assert end.value.code == 2


def test_an_ascii_terminal(monkeypatch):
    content = [io.BytesIO(), io.BytesIO()]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content[0], "ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(content[1], "ascii"))
    monkeypatch.setattr(sys, "argv", ["script"])
    run_script(lambda: (print("läuft 走"), warn("läuft 走")))
    with pytest.raises(SystemExit):
        run_script(raising(BadInput("--prompt läuft: wrong")))
    assert content[0].getvalue() == b"l\\xe4uft \\u8d70\n"
    assert content[1].getvalue() == b"warning: l\\xe4uft \\u8d70\nerror: --prompt l\\xe4uft: wrong\n"


@pytest.mark.parametrize("script", ["train.py", "sample.py", "convert_ckpt.py", "paper/evaluate.py",
                                    "paper/protocol.py", "toy/experiment.py", "toy/pretrain.py"])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_while_libraries_are_imported(tmp_path, script, number, code):
    """The torch that this test puts in the way of PyTorch sends the signal while it is imported."""
    sends = f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(9)\n"
    (tmp_path / "torch.py").write_text(sends)
    done = subprocess.run([sys.executable, ROOT / script], env=os.environ | {"PYTHONPATH": str(tmp_path)},
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    assert done.stderr == ("stopped\n" if number == signal.SIGINT else "") and not done.stdout


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    """And not the temporary path, whoever raises it."""
    path = tmp_path / "out" / "a.png"
    for fault in (lambda file: open(file / "x"), lambda file: raising(BadInput(f"{file}: is bad"))(),
                  lambda file: raising(ValueError(f"cannot write {file}"))()):
        with pytest.raises(BadInput) as error, complete_or_absent(path) as temporary:
            fault(temporary)
        assert str(path) in str(error.value) and ".tmp-" not in str(error.value)
        assert not list(path.parent.iterdir())


@pytest.mark.parametrize("name", [LOCK, RECORD])
def test_a_link_where_a_writer_notes_things(tmp_path, name):
    """Neither read nor written through."""
    (tmp_path / "mine").write_text('".tmp-mine"\n')
    out = tmp_path / "out"
    out.mkdir()
    (out / ".tmp-mine").write_text("mine")
    (out / name).symlink_to("../mine")
    try:
        with only_writer(out), complete_or_absent(out / "x") as temporary:
            temporary.write_text("x")
    except OSError:  # filelock follows no link
        assert name == LOCK
    assert (tmp_path / "mine").read_text() == '".tmp-mine"\n'
    assert (out / ".tmp-mine").exists()


def test_out_that_is_a_link_to_nothing(tmp_path):
    (tmp_path / "link").symlink_to("nothing")
    with pytest.raises(BadInput, match="link to nothing"):
        check_out(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("entry, value", [
    ("name", "../../x"), ("name", "/etc"), ("name", "a\x1b[2J"), ("name", "a\nb"), ("name", ""),
    ("name", ".hidden"),
    ("name", "a" * 65), ("name", "a\\b"), ("training.images", "../photos"), ("training.images", "/etc"),
    ("training.images", "C:\\photos"), ("training.class_word", "a\x1bb"), ("sampling.prompt", "a\nb"),
    ("sampling.steps", 5000), ("sampling.frames", 0), ("sampling.frames", -3), ("sampling.frames", 10**9),
    ("sampling.height", 0), ("sampling.save_fps", 0), ("sampling.eta", 9), ("sampling.K", -7),
    ("vae.latent_factor", 0), ("vae.latent_factor", float("nan")), ("training.batch_size", 0),
    ("training.rank", 0),
    ("training.lr", float("nan")), ("training.alpha", -1), ("unet.num_res_blocks", 10**7),
    ("unet.channel_mult", [1] * 10**6), ("unet.channel_mult", []), ("text.layers", 10**7)])
def test_config_entries(tmp_path, entry, value):
    *group, name = entry.split(".")
    content = {group[0]: {name: value}} if group else {name: value}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=entry.replace(".", r"\.")) as error:
        load_config(tmp_path / "config.json")
    assert one_line(error.value).isprintable()


def test_a_config_that_is_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(BadInput, match="not a regular file"):
        load_config(tmp_path / "config.json")


def test_the_committed_base_and_subject_load():
    root = Path(__file__).parent.parent.parent
    base = load_base(root / "toy" / "base")
    assert load_subject(root / "toy" / "subject.safetensors", base).class_word


@pytest.mark.parametrize("name", ["preview.png", "previews/step-000002.png"])
def test_a_new_run_writes_over_no_picture(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(BadInput, match="would be written over"), run_writer(tmp_path, None, 0):
        pass
    assert (tmp_path / name).read_bytes() == b"mine"
