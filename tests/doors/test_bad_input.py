"""Every wrong file and flag, through the command lines: one line on stderr that names it, exit code 2, and
nothing else happens.

The bad files are made by bad_files.py.
"""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import convert_ckpt
import sample
import train
from bad_files import copy_base, write_all
from cli import BadInput, run_script
from config import load_config, save_config
from data import load_photos
from files import load_base, load_subject, subject_fingerprint
from makers import fork, wait
from paper import evaluate

SCRIPTS = {
    "train.py": train,
    "sample.py": sample,
    "convert_ckpt.py": convert_ckpt,
    "paper/evaluate.py": evaluate}
PHOTOS = ["train.py", "--images", "{}", "--class_word", "dog"]
SUBJECT = ["sample.py", "--subject", "{}"]
PROMPTS = ["sample.py", "--subject", "none", "--prompts", "{}"]
BASE = ["sample.py", "--subject", "none", "--prompt", "a dog", "--base", "{}"]
CHECKPOINT = ["convert_ckpt.py", "{}"]
VIDEOS = ["paper/evaluate.py", "--images", "photos", "--videos", "{}"]
TRAIN = ["train.py", "--images", "photos", "--class_word", "dog"]
SAMPLE = ["sample.py", "--subject", "none", "--prompt", "a dog"]
SAMPLE_SUBJECT = ["sample.py", "--subject", "good.safetensors"]

# What a case is called, the command with {} for the file in question, and what the line says.
FILES = [
    ("no photo folder", PHOTOS, "--images no photo folder: no such folder"),
    ("empty folder", PHOTOS, "holds no readable file"),
    ("folder of texts", PHOTOS, "holds no readable file"),
    ("folder of broken pictures", PHOTOS, "holds no readable file"),
    ("a file for a folder", PHOTOS, "no such folder"),
    ("binary caption", PHOTOS, "0.txt: not a readable UTF-8 text file"),
    ("latin-1 caption", PHOTOS, "0.txt: not a readable UTF-8 text file"),
    ("huge caption", PHOTOS, "larger than 1,000,000 bytes"),
    ("empty folder", [*TRAIN, "--prior", "{}"], "--prior empty folder"),
    ("folder of short videos", [*TRAIN, "--prior", "{}"], "holds no readable file"),
    ("empty prompts", PROMPTS, "holds no prompt"),
    ("comments only", PROMPTS, "holds no prompt"),
    ("binary prompts", PROMPTS, "--prompts binary prompts: not a readable UTF-8 text file"),
    ("latin-1 prompts", PROMPTS, "not a readable UTF-8 text file"),
    ("huge prompts", PROMPTS, "larger than 1,000,000 bytes"),
    ("no prompts", PROMPTS, "No such file"),
    ("empty folder", PROMPTS, "not a readable UTF-8 text file"),
    ("no subject", SUBJECT, "no such file"),
    ("empty subject", SUBJECT, "not a readable safetensors file"),
    ("pickled subject", SUBJECT, "not a readable safetensors file"),
    ("subject with a lying header", SUBJECT, "not a readable safetensors file"),
    ("subject with lying offsets", SUBJECT, "not a readable safetensors file"),
    ("cut subject", SUBJECT, "not a readable safetensors file"),
    ("subject without facts", SUBJECT, "header has no valid"),
    ("subject of rank -1", SUBJECT, "header has no valid"),
    ("subject of rank 10000000", SUBJECT, "header has no valid"),
    ("subject of rank two", SUBJECT, "header has no valid"),
    ("subject of strange settings", SUBJECT, "header has no valid"),
    ("subject of nested settings", SUBJECT, "header has no valid"),
    ("subject of an ordinary word", SUBJECT, "header has no valid"),
    ("subject of a word with an escape code", SUBJECT, "header has no valid"),
    ("subject of another base", SUBJECT, "was learned on the base another"),
    ("subject of another method", SUBJECT, "method 'magic'"),
    ("subject with a tensor missing", SUBJECT, "1 tensors missing"),
    ("subject with a tensor more", SUBJECT, "1 unknown"),
    ("subject of another shape", SUBJECT, "tensors of another shape"),
    ("subject in float16", SUBJECT, "float16, and float32 belongs there"),
    ("subject with a NaN", SUBJECT, "not finite"),
    ("subject with an infinity", SUBJECT, "not finite"),
    ("subject with a number changed", SUBJECT, "not what was saved"),
    ("no base", BASE, "no base/config.json: no such file"),
    ("base without weights", BASE, "unet.safetensors: no such file"),
    ("base with a NaN", BASE, "not finite"),
    ("base with whole numbers", BASE, "int64"),
    ("base with a tensor missing", BASE, "1 tensors missing"),
    ("base with a number changed", BASE, "not those that config.json was written for"),
    ("base with a cut file", BASE, "not those that config.json was written for"),
    ("base with half a config", BASE, "not a readable JSON file"),
    ("base with a nested config", BASE, "not a readable JSON file"),
    ("base with a list for a config", BASE, "its content is not an object with entries but [1]"),
    ("base with a list for its UNet", BASE, "unet is not an object with entries but [16]"),
    ("base with an unknown entry", BASE, "unet.chanels is unknown; known is channels"),
    ("base with an entry of older versions", BASE, "training.train_steps is unknown; known is steps"),
    ("base with a word for a number", BASE, "sampling.steps is 'many', not int"),
    ("base with true for a number", BASE, "sampling.steps is True, not int"),
    ("base with a fraction for a whole number", BASE, "sampling.frames is 2.5, not int"),
    ("base with nothing for a text", BASE, "sampling.prompt is None, not str"),
    ("base with a number for a list", BASE, "unet.channel_mult is 2, not a list of whole numbers"),
    ("base with a fraction in a list", BASE, "channel_mult is [1, 2.5], not a list of whole numbers"),
    ("base with an empty list", BASE, "vae.channel_mult has 0 entries"),
    ("base with two checksums", BASE, "crc32 has 2 entries"),
    ("base with too much guidance", BASE, "sampling.cfg is 1000.0; it should be from 0 to 100"),
    ("base with a guidance of NaN", BASE, "sampling.cfg is nan; it should be from 0 to 100"),
    ("base with a guidance of 400 digits", BASE, "sampling.cfg is inf; it should be from 0 to 100"),
    ("base with no frames", BASE, "sampling.frames is 0; it should be from 1 to 1024"),
    ("base with a rank of 5000", BASE, "training.rank is 5000; it should be from 1 to 1024"),
    ("base with a level of no channels", BASE, "unet.channel_mult is 0; it should be from 1 to 64"),
    ("base with more K than steps", BASE, "sampling.K is 5; it should be at most sampling.steps, 4"),
    ("base that cannot be built", BASE, "cannot be built"),
    ("no checkpoint", CHECKPOINT, "No such file"),
    ("empty folder", CHECKPOINT, "not a regular file"),
    ("empty.ckpt", CHECKPOINT, "is empty, truncated or damaged"),
    ("page.ckpt", CHECKPOINT, "is a web page"),
    ("bomb.ckpt", CHECKPOINT, "would run code"),
    ("old bomb.ckpt", CHECKPOINT, "would run code"),
    ("noise.safetensors", CHECKPOINT, "is empty, truncated or damaged"),
    ("lying.safetensors", CHECKPOINT, "is empty, truncated or damaged"),
    ("another.ckpt", CHECKPOINT, "not VideoCrafter2's"),
    ("list.ckpt", CHECKPOINT, "no dictionary of plain tensors"),
    ("good.ckpt", [*CHECKPOINT, "--out", "photos"], "exists and is not a base folder"),
    ("empty folder", VIDEOS, "no video with its JSON"),
    ("no photo folder", VIDEOS, "no such folder"),
]

# A flag of train.py or sample.py, and its wrong value.
TRAIN_FLAGS = [
    ("--steps", 0), ("--steps", "many"), ("--lr", "nan"), ("--lr", -1), ("--lr", "inf"), ("--rank", 0),
    ("--rank", 5000), ("--alpha", -1), ("--batch_size", 0), ("--grad_accum", 0), ("--weight_decay", 2),
    ("--frames", 0), ("--height", 40), ("--width", 0), ("--seed", -1), ("--num_prior", 0),
    ("--save_every", 0), ("--keep_last", 0), ("--preview_every", -1), ("--placeholder", "dog"),
    ("--method", "magic"), ("--word_steps", 5), ("--word_lr", "nan"), ("--resume", "nowhere"),
    ("--out", "good.safetensors"), ("--out", "good.safetensors/x"), ("--class_word", " "), ("--nonsense", 1)]
SAMPLE_FLAGS = [
    ("--steps", 0), ("--steps", 1001), ("--cfg", "nan"), ("--cfg", -1), ("--eta", 2), ("--fps", 0),
    ("--save_fps", 0), ("--frames", 0), ("--height", 33), ("--width", -8), ("--seed", -1), ("--num", 0),
    ("--batch_size", 0), ("--K", 99), ("--lambda_s", "inf"), ("--lambdas", "0.4*5"), ("--lambdas", "x"),
    ("--format", "avi"), ("--out", "good.safetensors"), ("--precision", "int8"), ("--prompts", "x")]
# A command, and the flag that the line names.
FLAGS = [([*TRAIN, flag, value], flag) for flag, value in TRAIN_FLAGS]
FLAGS += [([*SAMPLE, flag, value], flag) for flag, value in SAMPLE_FLAGS]
FLAGS += [
    ([*SAMPLE, "--compare"], "--compare"),
    (["sample.py", "--subject", "none"], "--prompt"),
    ([*SAMPLE_SUBJECT, "--lambdas", "1*4", "--K", 1], "--lambdas"),
    ([*SAMPLE_SUBJECT, "--subject", "good.safetensors"], "--subject"),
    (["train.py", "--images", "photos"], "--class_word"),
    ([*TRAIN, "--method", "dreamvideo", "--targets", "cross"], "--targets"),
    (["paper/evaluate.py", "--images", "photos"], "--videos"),
    (["convert_ckpt.py", "good.ckpt", "--dtype", "int8"], "--dtype"),
]


@pytest.fixture(scope="module")
def files(base_folder, photos_folder, tmp_path_factory):
    """A folder with every file that the cases name."""
    folder = tmp_path_factory.mktemp("bad")
    write_all(folder, base_folder, photos_folder)
    return folder


def change_times(folder):
    """Every path under a folder -> when the file was changed; of folders None."""
    return {path: path.stat().st_mtime_ns if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture()
def refused(files, base_folder, monkeypatch, capsys):
    """Runs a command in the folder of bad files -> the one line that it must end with."""
    def refused(command):
        script, *flags = map(str, command)
        if script in ("train.py", "sample.py") and "--base" not in flags:
            flags += ["--base", str(base_folder)]
        monkeypatch.chdir(files)
        monkeypatch.setattr("sys.argv", [script, *flags])
        capsys.readouterr()
        before = change_times(files)
        with pytest.raises(SystemExit) as caught:
            run_script(SCRIPTS[script].main)
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
        assert caught.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        assert change_times(files) == before and not (files / "exploded").exists()
        return lines[0]
    return refused


def test_there_are_sixty_cases():
    assert len(FILES) >= 60


FILE_IDS = [f"{i}-{name}" for i, (name, _, _) in enumerate(FILES)]
FLAG_IDS = [" ".join(map(str, command)) for command, _ in FLAGS]


@pytest.mark.parametrize("name, command, says", FILES, ids=FILE_IDS)
def test_bad_files(refused, name, command, says):
    line = refused([part.replace("{}", name) for part in command])
    assert says in line and (name in line or "--out photos" in line)


@pytest.mark.parametrize("command, says", FLAGS, ids=FLAG_IDS)
def test_bad_flags(refused, command, says):
    assert says in refused(command)


def test_good_files_among_bad_ones_are_taken(files, tmp_path, capsys):
    """Each unreadable picture gets one warning, and the run goes on with the others."""
    folder = tmp_path / "photos"
    shutil.copytree(files / "folder of broken pictures", folder)
    shutil.copy(files / "whole.png", folder / "good.png")
    photo, = load_photos(folder, 64)
    assert photo.image.size == (64, 64)
    assert photo.image.tobytes() == Image.open(folder / "good.png").tobytes()
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("warning: ") for line in lines)
    bomb, cut, empty, large, text = lines
    assert "bomb.png" in bomb and "250,000,000 are the most" in bomb
    assert "large.png" in large and "truncated" in large
    assert "cut.png" in cut and "empty.jpg" in empty and "text.jpg" in text


def test_a_subject_of_a_base_without_fingerprint(base_folder, photos_folder, tmp_path):
    """train.py writes the fingerprint that load_base computes, and sample.py finds the subject by it."""
    values = json.loads((base_folder / "config.json").read_text())
    del values["fingerprint"]
    (copy_base(tmp_path, base_folder, "bare") / "config.json").write_text(json.dumps(values))
    flags = ["--base", "bare", "--images", photos_folder, "--class_word", "dog", "--steps", 1, "--alpha", 0]
    assert wait(fork(train.main, ["train.py", *flags], tmp_path)) == 0
    assert wait(fork(sample.main, ["sample.py", "--base", "bare", "--prompt", "a V* dog"], tmp_path)) == 0
    fingerprint = load_config(base_folder / "config.json").fingerprint
    facts, = (tmp_path / "outputs").glob("*.json")
    assert json.loads(facts.read_text())["base_fingerprint"] == fingerprint
    path = tmp_path / "runs" / photos_folder.name / "subject.safetensors"
    assert load_subject(path, load_base(base_folder)).base_fingerprint == fingerprint


# ------------------------------------------------------------------------------------------------------------
# Files with a changed byte


def mutations(content, count, seed):
    """Variants of a file: cut at the end, with a bit flipped, a byte replaced, or a piece missing."""
    rng = np.random.default_rng(seed)
    for n in range(count):
        at, way = int(rng.integers(len(content))), n % 4
        changed = bytearray(content)
        if way == 0:
            del changed[at:]
        elif way == 1:
            changed[at] ^= 1 << int(rng.integers(8))
        elif way == 2:
            changed[at] = int(rng.integers(256))
        else:
            del changed[at:at + int(rng.integers(1, 64))]
        yield bytes(changed)


def check_mutations(path, count, is_right):
    """Every variant of the file is refused in one line that names the file, or is right; most are refused."""
    content, refusals = path.read_bytes(), 0
    assert is_right(path)
    for changed in mutations(content, count, seed=1):
        path.write_bytes(changed)
        try:
            assert is_right(path)
        except BadInput as error:
            refusals += 1
            assert path.name in str(error) and "\n" not in str(error)
    assert refusals > count / 2


def test_mutated_subjects_are_refused_or_equal(base, files, tmp_path):
    path = tmp_path / "subject"
    shutil.copy(files / "good.safetensors", path)
    whole = subject_fingerprint(load_subject(path, base))
    check_mutations(path, 200, lambda path: subject_fingerprint(load_subject(path, base)) == whole)


def test_mutated_weights_are_refused_or_equal(base, base_folder, tmp_path):
    path = copy_base(tmp_path, base_folder, "base") / "unet.safetensors"
    check_mutations(path, 60, lambda path: load_base(path.parent).config == base.config)


def test_mutated_checkpoints_are_refused_or_equal(tmp_path):
    state = {f"model.{i}": torch.full((40, 3), float(i)) for i in range(4)}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")

    def is_equal(path):
        shapes = convert_ckpt.read_shapes(path)
        get = convert_ckpt.open_checkpoint(path)[1]
        return shapes.keys() == state.keys() and all(torch.equal(get(name), state[name]) for name in shapes)

    check_mutations(tmp_path / "model.ckpt", 200, is_equal)


def test_mutated_configs_are_refused_or_in_range(base_folder, tmp_path):
    """A config has no checksum. A changed config that is taken can be written, and read again as the same."""
    shutil.copy(base_folder / "config.json", tmp_path / "config.json")

    def is_in_range(path):
        config = load_config(path)
        save_config(config, tmp_path / "again.json")
        return load_config(tmp_path / "again.json") == config

    check_mutations(tmp_path / "config.json", 200, is_in_range)
