"""The program removes and writes over only what it made, and ends in one line.

Every test is in this process.
"""
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from cli import (LOCK, RECORD, BadInput, FlagParser, check_out, complete_or_absent, one_line,  # noqa: E402
                 only_writer, printable, run_script)
from config import load_config  # noqa: E402
from files import file_crc32, load_base, load_subject  # noqa: E402
from lora import Subject  # noqa: E402
from runs import load_training, newest_save, pick_run, run_writer, save_training, saves  # noqa: E402


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


@pytest.mark.parametrize("flag", ["--images", "--resume", "--prior", "--out", "--base", "--subject",
                                  "--class_word"])
@pytest.mark.parametrize("given", [["{}", ""], ["{}="], ["{}", " "]])
def test_empty_flags(flag, given):
    parser = FlagParser()
    parser.add_argument(flag)
    with pytest.raises(BadInput, match=f"{flag}: is empty"):
        parser.parse_args([text.format(flag) for text in given])


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
    (OSError(28, "No space"), 2, "error: "),
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
