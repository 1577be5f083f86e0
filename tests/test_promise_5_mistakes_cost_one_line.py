"""Promise 5: a mistake costs one plain line that names the file or flag and the remedy, and nothing else.

test_convert.py and test_config.py have wrong checkpoints and wrong config.json files.
"""
import errno
import io
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from makers import ROOT, random_subject
import convert_ckpt
import sample
import support.runs
import train
from data import Photo, check_photos, load_photos
from support.cli import BadInput, progress_bar, run_script, warn
from support.config import load_config, save_config
from support.files import find_subjects, load_base, save_subject
from support.texts import read_caption, subject_caption

SCRIPTS = {"train": train, "sample": sample, "convert_ckpt": convert_ckpt}

# A command | words of the line that it ends with. PHOTOS, BASE and DOG are the flags of a right command.
REFUSED = """
train BASE --images nowhere --class_word dog | --images nowhere: no such folder; it should hold 4 to 6 photos
train BASE --images empty --class_word dog | --images empty: has no readable file
train BASE --images latin --class_word dog | 0.txt: not a readable UTF-8 text file
train BASE --images photos | --class_word: is needed with --images
train BASE --images photos --class_word "a dog" | --class_word 'a dog': is a caption; write the noun alone
train BASE --images photos --class_word "V* dog" | is a caption; write the noun alone
train BASE --images photos --class_word "a photo of a V* dog" | is a caption; write the noun alone
train BASE PHOTOS --steps 0 | --steps 0: must be from 1 to
train BASE PHOTOS --steps many | --steps: invalid int value: 'many'; --help lists all flags
train BASE PHOTOS --height 40 | --height 40: must be a multiple of 16 on the base tiny0
train BASE PHOTOS --resume nowhere | --resume nowhere: no save is under nowhere
train BASE PHOTOS --out good.safetensors/x | good.safetensors is a file, or you may not write to it
sample BASE --subject nowhere.safetensors | nowhere.safetensors: not a readable safetensors file (No such file
sample BASE --subject cut.safetensors | cut.safetensors: not a readable safetensors file
sample BASE --subject plain.safetensors | plain.safetensors: is no subject, or its content
sample BASE --subject none | --prompt: is needed without a subject
sample BASE --subject none --prompt a --compare | --compare: needs a subject
sample BASE DOG --prompts empty | --prompts empty: not a readable UTF-8 text file
sample BASE DOG --prompts comments.txt | --prompts comments.txt: has no prompt
sample BASE DOG --prompts comments.txt --prompt a | --prompt: not allowed with argument --prompts
sample BASE DOG --K 5 --steps 4 | --K 5: must be at most --steps, which is 4
sample BASE DOG --lambdas 0.4*5 | --lambdas 0.4*5: has 5 steps, and --steps is 4
sample BASE DOG --lambdas x | --lambdas: "x" is not a part such as 0.4*5
sample BASE DOG --lambdas 1*4 --K 1 | --lambdas: replaces --lambda_s, --lambda_l and --K
sample --base empty --subject none --prompt a | empty/config.json: no such file
sample --base cut --subject none --prompt a | cut/unet.safetensors: not a readable safetensors file
sample --base unfit --subject none --prompt a | unfit/unet.safetensors: not the unet that config.json
convert_ckpt cut/vae.safetensors --out cut | --out cut: exists already; name another folder
""".strip().splitlines()


@pytest.fixture(scope="module")
def wrong_files(base_folder, photos_folder, tmp_path_factory):
    """A folder with every file that the commands name."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty").mkdir()
    for name in ("photos", "latin"):
        shutil.copytree(photos_folder, folder / name)
    (folder / "latin" / "0.txt").write_bytes("Stra\u00dfe".encode("latin-1"))
    (folder / "comments.txt").write_text("# a V* dog\n\n")
    save_subject(folder / "good.safetensors", random_subject(load_base(base_folder)))
    (folder / "cut.safetensors").write_bytes((folder / "good.safetensors").read_bytes()[:-10])
    save_file(load_file(folder / "good.safetensors"), folder / "plain.safetensors")
    cut, unfit = (shutil.copytree(base_folder, folder / name) for name in ("cut", "unfit"))
    os.truncate(cut / "unet.safetensors", 5000)
    config = load_config(unfit)
    config.unet.channels = 24
    save_config(config, unfit / "config.json")
    return folder


@pytest.mark.parametrize("command, message", [line.split(" | ") for line in REFUSED])
def test_a_wrong_command_costs_one_line(wrong_files, base_folder, monkeypatch, capsys, command, message):
    for name, flags in {"BASE": f"--base {base_folder}", "DOG": "--subject good.safetensors",
                        "PHOTOS": "--images photos --class_word dog"}.items():
        command = command.replace(name, flags)
    script, *flags = shlex.split(command)
    monkeypatch.chdir(wrong_files)
    monkeypatch.setattr("sys.argv", [f"{script}.py", *flags])
    before = {path: path.stat().st_mtime_ns for path in wrong_files.rglob("*")}
    with pytest.raises(SystemExit) as end:
        run_script(SCRIPTS[script].main)
    *others, error = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and error.startswith("error: ") and message in error
    assert all(line.startswith("warning: ") for line in others)
    assert {path: path.stat().st_mtime_ns for path in wrong_files.rglob("*")} == before


@pytest.mark.parametrize("error, message", [
    (BadInput("--x: wrong"), "error: --x: wrong"),
    (PermissionError(errno.EACCES, "Permission denied", "a.png"), "error: a.png: Permission denied"),
    (MemoryError(), "error: out of memory (MemoryError); use fewer --frames"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "--batch_size 1"),
    (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), "or in training --grad_checkpointing")])
def test_a_known_fault_is_one_line_and_exit_code_2(capsys, error, message):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_script(main)
    line, = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and message in line


def test_an_unforeseen_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):      # Python prints it, and ends with exit code 1
        run_script(lambda: 1 / 0)


def test_streams_of_a_notebook_and_of_an_ascii_terminal(monkeypatch):
    """The first cannot be reconfigured. The second has no letter for what is printed."""
    notebook, ascii_bytes = io.StringIO(), io.BytesIO()
    assert not hasattr(notebook, "reconfigure")
    monkeypatch.setattr("sys.stdout", notebook)
    monkeypatch.setattr("sys.stderr", io.TextIOWrapper(ascii_bytes, "ascii"))
    run_script(lambda: (print("läuft"), warn("läuft")))
    assert notebook.getvalue() == "läuft\n" and ascii_bytes.getvalue() == b"warning: l\\xe4uft\n"


@pytest.mark.parametrize("script", ["train.py", "sample.py", "paper/evaluate.py", "toy/experiment.py"])
def test_packages_of_the_same_names_elsewhere_do_not_matter(tmp_path, script):
    for name in ("support", "paper", "toy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('another package')")
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


@pytest.fixture()
def flags(base_folder, photos_folder):
    train_flags = ["--images", photos_folder, "--class_word", "dog", "--alpha", 0, "--out", "out"]
    return {train: ["--base", base_folder, *train_flags],
            sample: ["--base", base_folder, "--subject", "none", "--prompt", "a dog"]}


def test_a_missing_ffmpeg_is_found_before_the_work(flags, call, tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nothing")
    monkeypatch.setattr(sample, "open_base", lambda *args: pytest.fail("the base was loaded"))
    line, = call(sample, *flags[sample], code=2).err.splitlines()
    assert line.startswith("error: --format mp4: needs ffmpeg") and "unset" in line and "--format gif" in line
    errors = call(train, *flags[train], "--alpha", 1, "--prior_motion", code=2).err.splitlines()
    assert errors[-1].startswith("error: --prior_motion: needs ffmpeg")
    assert not list(tmp_path.iterdir())


def test_a_preview_or_a_log_line_that_fails_is_only_a_warning(flags, call, tmp_path, monkeypatch):
    def failing(base, prompts, seeds, subjects, settings, lora):
        generate(base, prompts, seeds, subjects, replace(settings, steps=1, K=1), lora=lora)
        raise torch.OutOfMemoryError("CUDA out of memory")

    call(train, *flags[train], "--preview_every", 0, "--out", "blind")
    call(train, *flags[train], "--preview_every", 2, "--out", "watched")
    generate = train.generate
    monkeypatch.setattr(train, "generate", failing)
    support.runs.warn_once.cache_clear()
    (tmp_path / "out" / "log.jsonl").mkdir(parents=True)
    errors = call(train, *flags[train], "--preview_every", 2).err
    for words in ("out/log.jsonl: not written (", "the preview of step 2", "the preview of step 4"):
        assert errors.count(f"warning: {words}") == 1
    a, b, c = (load_file(tmp_path / run / "subject.safetensors") for run in ("blind", "watched", "out"))
    assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]) for name in a)
    preview = Image.open(tmp_path / "watched" / "preview.png")
    assert preview.height == 2 * (14 + 64)  # a row for each of two previews


def test_captions_get_the_placeholder_or_are_refused(tmp_path, capsys):
    photo = tmp_path / "a.PNG"
    assert read_caption(photo) == ""
    (tmp_path / "a.txt").write_text("a Dog on grass\n")
    assert subject_caption(photo, "V*", "dog") == "a V* Dog on grass"
    assert "a.txt: lacks V*; read as 'a V* Dog on grass'" in capsys.readouterr().err
    for text, message in (("on grass", "has neither V\\* nor dog"), ("on " * 80 + "V*", "after the 75")):
        (tmp_path / "a.txt").write_text(text)
        with pytest.raises(BadInput, match=f"a.txt.*{message}"):
            subject_caption(photo, "V*", "dog")


def test_photos_that_show_little_and_stray_captions_are_named(tmp_path, capsys):
    sizes = {"fits": (1600, 1000), "half": (800, 1000), "small": (700, 300), "wide": (2400, 700)}
    photos = [Photo(Image.new("RGB", size), "", tmp_path / f"{name}.jpg", 0) for name, size in sizes.items()]
    for name in ("fits.txt", "gone.txt", "half.caption"):
        (tmp_path / name).write_text("a V* dog")
    check_photos(photos, 320, 512)
    small, wide, *stray = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/small.jpg: smaller than 512x320 pixels, so enlarged" in small
    assert "wide.jpg: a crop of 512x320 pixels loses more than half" in wide and "or change --height" in wide
    for name, line in zip(("gone.txt", "half.caption"), stray, strict=True):
        assert f"{tmp_path}/{name}: skipped; the caption of a photo NAME.jpg is" in line


def test_files_of_a_photo_folder_that_are_not_read_are_named(tmp_path, capsys):
    (tmp_path / "more").mkdir()
    long_name = f"{'x' * 246}.png"      # 250 bytes
    for name in (long_name, "more/c.png"):
        Image.new("RGB", (48, 32)).save(tmp_path / name)
    for name in ("a.heic", "b.mp4", "broken.jpg"):
        (tmp_path / name).write_text("x")
    photo, = load_photos(tmp_path, 32, 48, "V*", "dog")
    assert photo.path.name == long_name
    heic, mp4, broken, more = capsys.readouterr().err.splitlines()
    assert ".heic is not read" in heic and ".mp4 is not read" in mp4
    assert "broken.jpg: not readable" in broken and "more: subfolders are not read" in more


def test_a_newer_subject_that_is_skipped_is_named(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    right, other, broken = (Path("runs") / run / "subject.safetensors" for run in ("1/dog", "2/dog", "cat"))
    subject = random_subject(base)
    save_subject(right, subject)
    os.utime(right, (1, 1))
    assert find_subjects([], base.config.fingerprint) == [right] and not capsys.readouterr().err
    subject.base_fingerprint = "another"
    save_subject(other, subject)
    assert find_subjects([], base.config.fingerprint) == [right]
    assert f"{other}: skipped, because it is not a subject of this base" in capsys.readouterr().err
    broken.parent.mkdir()
    broken.write_bytes(b"not a subject")
    find_subjects([], base.config.fingerprint)
    assert f"{broken}: skipped" in capsys.readouterr().err


def test_progress_is_lines_where_there_is_no_terminal(monkeypatch):
    for on_terminal in (True, False):
        stream = io.StringIO()
        stream.isatty = lambda: on_terminal
        monkeypatch.setattr("sys.stderr", stream)
        with progress_bar(desc="train", unit="step", total=4) as bar:
            for _ in range(4):
                bar.set_postfix(loss="0.5", refresh=False)
                bar.update()
        words = stream.getvalue().split()
        assert ("train: 100%" in stream.getvalue()) == on_terminal
    assert [word for word in words if "/4" in word] == ["0/4", "4/4"]
