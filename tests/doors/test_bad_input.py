"""Every wrong file and flag, through the command lines: one line on stderr that names it, exit code 2, and nothing else happens."""
import json
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import convert_ckpt
import evaluate
import sample
import train
from conftest import ROOT, write_base
from lora import load_subject, save_subject
from model import BadInput, BaseConfig, complete_or_absent, load_base, load_config, only_writer, run_script
from test_convert import SMALL, Bomb, golden_state
from test_lora import random_subject

PHOTOS = ["train.py", "--images", "{}", "--class_word", "dog"]
SUBJECT = ["sample.py", "--subject", "{}"]
PROMPTS = ["sample.py", "--subject", "none", "--prompts", "{}"]
BASE = ["sample.py", "--subject", "none", "--prompt", "a dog", "--base", "{}"]
CHECKPOINT = ["convert_ckpt.py", "{}"]
GOOD = ["train.py", "--images", "photos", "--class_word", "dog"]
ALONE = ["sample.py", "--subject", "none", "--prompt", "a dog"]
MINE = ["sample.py", "--subject", "good.safetensors"]

# What a case is called, the command with {} for the file in question, and what the line says. The files are made by `files` below.
FILES = [
    ("no photo folder", PHOTOS, "--images no photo folder: no such folder"),
    ("empty folder", PHOTOS, "holds no readable file"),
    ("folder of texts", PHOTOS, "holds no readable file"),
    ("folder of broken pictures", PHOTOS, "holds no readable file"),
    ("a file for a folder", PHOTOS, "no such folder"),
    ("binary caption", PHOTOS, "0.txt: not a readable UTF-8 text file"),
    ("latin-1 caption", PHOTOS, "0.txt: not a readable UTF-8 text file"),
    ("huge caption", PHOTOS, "larger than 1,000,000 bytes"),
    ("empty folder", [*GOOD, "--prior", "{}"], "--prior empty folder"),
    ("folder of short videos", [*GOOD, "--prior", "{}"], "holds no readable file"),
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
    ("base with an edited config", BASE, "was changed after it was written"),
    ("base with half a config", BASE, "not a readable JSON file"),
    ("base with a nested config", BASE, "not a readable JSON file"),
    ("base with a list for a config", BASE, "missing or unknown entries"),
    ("base with a word for a number", BASE, "steps is 'many', not int"),
    ("base that cannot be built", BASE, "cannot be built"),
    ("no checkpoint", CHECKPOINT, "No such file"),
    ("empty folder", CHECKPOINT, "Is a directory"),
    ("empty.ckpt", CHECKPOINT, "is empty, truncated or damaged"),
    ("page.ckpt", CHECKPOINT, "is a web page"),
    ("bomb.ckpt", CHECKPOINT, "would run code"),
    ("old bomb.ckpt", CHECKPOINT, "would run code"),
    ("noise.safetensors", CHECKPOINT, "is empty, truncated or damaged"),
    ("lying.safetensors", CHECKPOINT, "is empty, truncated or damaged"),
    ("another.ckpt", CHECKPOINT, "not VideoCrafter2's"),
    ("list.ckpt", CHECKPOINT, "holds no dictionary of tensors"),
    ("good.ckpt", [*CHECKPOINT, "--out", "photos"], "exists and is not a base folder"),
    ("empty folder", ["evaluate.py", "--images", "photos", "--videos", "{}"], "no video with its JSON"),
    ("no photo folder", ["evaluate.py", "--images", "photos", "--videos", "{}"], "no such folder"),
]
FLAGS = [
    *[([*GOOD, flag, value], flag) for flag, value in [
        ("--steps", 0), ("--lr", "nan"), ("--lr", -1), ("--lr", "inf"), ("--rank", 0), ("--rank", 5000), ("--alpha", -1), ("--batch_size", 0),
        ("--grad_accum", 0), ("--frames", 0), ("--height", 40), ("--width", 0), ("--seed", -1), ("--num_prior", 0), ("--save_every", 0),
        ("--keep_last", 0), ("--preview_every", -1), ("--weight_decay", 2), ("--placeholder", "dog"), ("--steps", "many"),
        ("--method", "magic"), ("--word_steps", 5), ("--resume", "nowhere"), ("--out", "good.safetensors"),
        ("--out", "good.safetensors/x"), ("--nonsense", 1), ("--word_lr", "nan")]],
    *[([*ALONE, flag, value], flag) for flag, value in [
        ("--steps", 0), ("--steps", 1000), ("--cfg", "nan"), ("--cfg", -1), ("--eta", 2), ("--fps", 0), ("--save_fps", 0), ("--frames", 0),
        ("--height", 33), ("--width", -8), ("--seed", -1), ("--num", 0), ("--batch_size", 0), ("--K", 99), ("--lambda_s", "inf"),
        ("--lambdas", "0.4*5"), ("--lambdas", "x"), ("--format", "avi"), ("--out", "good.safetensors"), ("--precision", "int8")]],
    ([*ALONE, "--compare"], "--compare"), (ALONE[:3], "--prompt"), ([*ALONE, "--prompts", "x"], "--prompts"), ([*MINE, "--lambdas", "1*4", "--K", 1], "--lambdas"),
    ([*MINE, *MINE[1:]], "--subject"), (["train.py", "--images", "photos"], "--class_word"),
    ([*GOOD, "--method", "dreamvideo", "--targets", "cross"], "--targets"), (["evaluate.py", "--images", "photos"], "--videos"),
    (["convert_ckpt.py", "good.ckpt", "--dtype", "int8"], "--dtype"), ([*GOOD, "--class_word", " "], "--class_word"),
]


def damaged_subject(path, good, change_facts=None, change_tensors=None, sign=True):
    """Writes `good` with changed header or tensors; with `sign`, under a fingerprint that agrees with the change."""
    tensors, facts = load_file(good), json.loads(good.read_bytes()[8:8 + int.from_bytes(good.read_bytes()[:8], "little")])["__metadata__"]
    facts.update(change_facts or {})
    if change_tensors:
        change_tensors(tensors)
    save_file(tensors, path, facts)


def put(tensors, name, index, value):
    tensors[name].view(-1)[index] = value


@pytest.fixture(scope="module")
def files(base_folder, photos_folder, tmp_path_factory):
    """A folder with every file that the cases name."""
    folder = tmp_path_factory.mktemp("bad")
    before = os.getcwd()
    os.chdir(folder)
    try:
        base = load_base(base_folder)
        good = Path("good.safetensors")
        save_subject(good, random_subject(base))
        shutil.copytree(photos_folder, "photos")
        for name in ("empty folder", "folder of texts", "folder of broken pictures", "folder of short videos"):
            Path(name).mkdir()
        Path("folder of texts/a.txt").write_text("hello")
        broken = Path("folder of broken pictures")
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save("whole.png")
        (broken / "cut.png").write_bytes(Path("whole.png").read_bytes()[:-40])
        (broken / "empty.jpg").write_bytes(b"")
        (broken / "text.jpg").write_text("not a picture")
        huge = lambda w, h: struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)
        for name, size in (("bomb.png", (50_000, 50_000)), ("large.png", (10_000, 10_000))):
            header = b"IHDR" + huge(*size)
            (broken / name).write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)))
        Path("folder of short videos/a.mp4").write_bytes(b"not a video")
        Path("a file for a folder").write_text("x")
        for name, content in (("binary", b"\x00\x01\x02"), ("latin-1", "Stra\u00dfe".encode("latin-1")), ("huge", b"x " * 600_000)):
            shutil.copytree(photos_folder, f"{name} caption")
            Path(f"{name} caption/0.txt").write_bytes(content)
            Path(f"{name} prompts").write_bytes(content)
        Path("empty prompts").write_bytes(b"\xef\xbb\xbf\r\n\r\n")
        Path("comments only").write_text("# a\n# b\n")

        whole = good.read_bytes()
        Path("empty subject").write_bytes(b"")
        torch.save({"v_star": Bomb()}, "pickled subject")
        Path("subject with a lying header").write_bytes((2**40).to_bytes(8, "little") + whole[8:])
        Path("subject with lying offsets").write_bytes(whole.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1))
        Path("cut subject").write_bytes(whole[:-10])
        save_file(load_file(good), "subject without facts")
        first = "unet." + next(iter(random_subject(base).lora)) + ".lora_A.weight"
        for name, facts in {"rank -1": {"rank": "-1"}, "rank 10000000": {"rank": "10000000"}, "rank two": {"rank": "two"},
                            "strange settings": {"settings": "[]"}, "nested settings": {"settings": "[" * 100_000},
                            "an ordinary word": {"placeholder": "dog"}, "a word with an escape code": {"placeholder": "\x1b[31m*"},
                            "another base": {"base_name": "another", "base_fingerprint": "0"},
                            "another method": {"method": "magic"}}.items():
            damaged_subject(f"subject of {name}", good, facts)
        for name, change in {"with a tensor missing": lambda x: x.pop(first), "with a tensor more": lambda x: x.update(more=torch.ones(1)),
                             "of another shape": lambda x: x.update({first: torch.ones(3, 3)}), "in float16": lambda x: x.update({first: x[first].half()}),
                             "with a NaN": lambda x: put(x, first, 0, torch.nan), "with an infinity": lambda x: put(x, "v_star", 0, torch.inf),
                             "with a number changed": lambda x: put(x, first, 0, 0.5)}.items():
            damaged_subject(f"subject {name}", good, None, change)

        from model import save_config
        config = load_config(base_folder / "config.json")

        def bad_base(name, change=None, text=None, resign=True):
            shutil.copytree(base_folder, name)
            if change:
                state = load_file(f"{name}/unet.safetensors")
                change(state)
                save_file(state, f"{name}/unet.safetensors")
                if resign:
                    save_config(config, f"{name}/config.json")
            if text:
                Path(f"{name}/config.json").write_text(text)

        plain, values = (base_folder / "config.json").read_text(), json.loads((base_folder / "config.json").read_text())
        bad_base("base without weights")
        os.remove("base without weights/unet.safetensors")
        bad_base("base with a NaN", lambda x: put(x, "conv_out.weight", 0, torch.nan))
        bad_base("base with whole numbers", lambda x: x.update({"conv_out.bias": x["conv_out.bias"].long()}))
        bad_base("base with a tensor missing", lambda x: x.pop("conv_out.bias"))
        bad_base("base with a number changed", lambda x: put(x, "conv_out.weight", 0, 0.5), resign=False)
        bad_base("base with a cut file")
        os.truncate("base with a cut file/vae.safetensors", 5000)
        bad_base("base with an edited config", text=plain.replace('"cfg": 12.0', '"cfg": 13.0'))
        bad_base("base with half a config", text=plain[:100])
        bad_base("base with a nested config", text="[" * 100_000)
        bad_base("base with a list for a config", text="[1]")
        bad_base("base with a word for a number", text=json.dumps(values | {"defaults": values["defaults"] | {"steps": "many"}}))
        bad_base("base that cannot be built")
        config.unet.channels = 17
        save_config(config, "base that cannot be built/config.json")

        state = golden_state()
        torch.save({"state_dict": state}, "good.ckpt")
        Path("empty.ckpt").write_bytes(b"")
        Path("page.ckpt").write_text("<html>")
        torch.save({"state_dict": Bomb()}, "bomb.ckpt")
        Path("old bomb.ckpt").write_bytes(pickle.dumps(Bomb(), protocol=2))
        Path("noise.safetensors").write_bytes(np.random.default_rng(0).bytes(3000))
        Path("lying.safetensors").write_bytes((2**50).to_bytes(8, "little") + b"{}")
        torch.save({"state_dict": {"model.diffusion_model.x": torch.zeros(2)}}, "another.ckpt")
        torch.save([1, 2], "list.ckpt")
    finally:
        os.chdir(before)
    return folder


def contents(folder):
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
        before = contents(files)
        with pytest.raises(SystemExit) as caught:
            run_script({"train.py": train, "sample.py": sample, "convert_ckpt.py": convert_ckpt, "evaluate.py": evaluate}[script].main)
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
        assert caught.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        assert contents(files) == before and not (files / "exploded").exists()
        return lines[0]
    return refused


def test_there_are_sixty_cases():
    assert len(FILES) >= 60


@pytest.mark.parametrize("name, command, says", FILES, ids=[f"{i}-{case[0]}" for i, case in enumerate(FILES)])
def test_bad_files(refused, name, command, says):
    line = refused([part.replace("{}", name) for part in command])
    assert says in line and (name in line or "--out photos" in line)


@pytest.mark.parametrize("command, says", FLAGS, ids=[" ".join(map(str, command)).replace("good.safetensors", "FILE") for command, _ in FLAGS])
def test_bad_flags(refused, command, says):
    assert says in refused(command)


def test_good_files_among_bad_ones_are_taken(files, tmp_path, capsys, monkeypatch):
    """Each unreadable picture gets one warning, and the run goes on with the others."""
    from data import load_photos
    folder = tmp_path / "photos"
    shutil.copytree(files / "folder of broken pictures", folder)
    shutil.copy(files / "whole.png", folder / "good.png")
    assert [photo.path.name for photo in load_photos(folder, 64)] == ["good.png"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and all(line.startswith("warning: ") for line in lines)
    assert all(any(name in line for line in lines) for name in ("cut.png", "empty.jpg", "text.jpg", "bomb.png", "large.png"))


def mutations(content, count, seed):
    """Variants of a file: cut at the end, with a bit flipped, a byte replaced, or a piece missing."""
    rng = np.random.default_rng(seed)
    for n in range(count):
        at, kind = int(rng.integers(len(content))), n % 4
        changed = bytearray(content)
        if kind == 0:
            del changed[at:]
        elif kind == 1:
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            changed[at] = int(rng.integers(256))
        else:
            del changed[at:at + int(rng.integers(1, 64))]
        yield bytes(changed)


@pytest.mark.parametrize("kind, count", [("subject", 200), ("config", 200), ("weights", 60), ("checkpoint", 200)])
def test_mutated_files_are_refused_or_equal(base_folder, files, tmp_path, kind, count):
    base = load_base(base_folder)
    whole = load_subject(files / "good.safetensors", base).fingerprint()
    state = {f"model.{i}": torch.full((40, 3), float(i)) for i in range(4)}
    shutil.copytree(base_folder, tmp_path / "base")
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    shutil.copy(files / "good.safetensors", tmp_path / "subject")

    def load_checkpoint(path):
        shapes = convert_ckpt.read_shapes(path)
        get = convert_ckpt.open_checkpoint(path)[1]
        return shapes.keys() == state.keys() and all(torch.equal(get(name), state[name]) for name in shapes)

    path, equal = {
        "subject": (tmp_path / "subject", lambda path: load_subject(path, base).fingerprint() == whole),
        "config": (tmp_path / "base" / "config.json", lambda path: load_config(path) == base.config),
        "weights": (tmp_path / "base" / "unet.safetensors", lambda path: load_base(path.parent).config == base.config),
        "checkpoint": (tmp_path / "model.ckpt", load_checkpoint)}[kind]
    content, refusals = path.read_bytes(), 0
    assert equal(path)
    for changed in mutations(content, count, seed=1):
        path.write_bytes(changed)
        try:
            assert equal(path)
        except BadInput as error:
            refusals += 1
            assert path.name in str(error) and "\n" not in str(error)
    assert refusals > count / 2


def test_a_folder_has_one_writer(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".tmp-1-x").write_text("half")
    with only_writer(tmp_path / "out"):
        assert not list((tmp_path / "out").iterdir())
        with pytest.raises(BadInput, match="another run is writing there"), only_writer(tmp_path / "out"):
            pass
        with only_writer(tmp_path / "out", rank=1), only_writer(tmp_path / "other"):
            pass
    with only_writer(tmp_path / "out"):
        pass


def test_an_infinite_latent_names_its_step(base_folder):
    from dataclasses import replace
    base = load_base(base_folder)
    unet = base.unet
    broken = replace(base, unet=lambda z, t, fps, context: unet(z, t, fps, context) / (t.view(-1, 1, 1, 1, 1) > 300))
    with pytest.raises(BadInput, match="not finite at step 3 of 4"):
        sample.generate(broken, ["a dog"], [0])


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_leaves_the_old_file(tmp_path):
    import subprocess
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        path = tmp_path / "x.safetensors"
        path.write_bytes(b"old")
        for write in (lambda temporary: save_file({"x": torch.ones(10**6)}, temporary), lambda temporary: torch.save(torch.ones(10**6), temporary),
                      lambda temporary: temporary.write_bytes(bytes(10**7))):
            with pytest.raises(BadInput, match="x.safetensors: not written, the disk is full"), complete_or_absent(path) as temporary:
                write(temporary)
            assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)  # at once, whatever a failed write still holds open
