"""A file from elsewhere is refused in one line, or read as what it is. It never makes a script hang.

Every test is in this process. bad_files.py has files that the command lines refuse.
"""
import json
import os
import signal
import stat
from dataclasses import replace
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

import convert_ckpt
from cli import BadInput, complete_or_absent, one_line, read_json
from config import BaseConfig, load_config, save_config
from data import load_photos, load_prior
from files import (base_files, check_replaced, find_subjects, load_base, load_picture, load_subject,
                   save_subject)
from makers import SMALL, golden_state, random_subject
from model import TEXT_LENGTH, Tokenizer
from paper import evaluate
from runs import Log, read_save, save_preview
from texts import read_caption, read_prompts
from video import free_path, read_video, save_video, write_mp4


@pytest.fixture(autouse=True)
def no_hang():
    def give_up(number, frame):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------------------------------
# Only regular files are read


def put(kind, path):
    """A pipe that nobody writes to, or a device that never ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


REFUSED = {
    "config.json": lambda path: load_config(path),
    "base/unet.safetensors": lambda path: load_base(path.parent),
    "subject.safetensors": lambda path: load_subject(path, None),
    "prompts.txt": read_prompts,
    "caption.txt": read_caption,
    "model.ckpt": convert_ckpt.read_shapes,
    "model.safetensors": convert_ckpt.read_shapes,
    "clip.safetensors": lambda path: evaluate.load_weights(None, path, "--clip", "", ""),
    "dino.bin": lambda path: evaluate.load_weights(None, path, "--dino", "", ""),
    "video.mp4": read_video,
    "video.gif": read_video}
LEFT_OUT = {
    "0.png": lambda path: load_photos(path.parent, 64),
    "0.mp4": lambda path: load_prior(path.parent, 10, 3, 16, 16)}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_is_refused_at_once(base_folder, tmp_path, name, kind):
    path = tmp_path / name
    put(kind, path)
    if name == "base/unet.safetensors":
        (path.parent / "config.json").write_bytes((base_folder / "config.json").read_bytes())
    with pytest.raises(BadInput, match="not a regular file") as error:
        REFUSED[name](path)
    assert name in str(error.value) and one_line(error.value) == str(error.value)


@pytest.mark.parametrize("name", LEFT_OUT)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_among_pictures_is_left_out(tmp_path, capsys, name, kind):
    put(kind, tmp_path / name)
    Image.new("RGB", (20, 20)).save(tmp_path / "whole.png")
    assert len(LEFT_OUT[name](tmp_path / name)) == 1
    line, = capsys.readouterr().err.splitlines()
    assert line == f"warning: {tmp_path / name}: not a regular file; left out"


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_is_no_subject_and_no_facts(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    put(kind, tmp_path / "runs" / "x" / "subject.safetensors")
    with pytest.raises(BadInput, match="no subject of this base"):
        find_subjects([], "another base")
    put(kind, tmp_path / "outputs" / "a-1.json")
    assert free_path(tmp_path / "outputs", "a-1", {"seed": 1}, [".gif"]).name == "a-1-2"
    with pytest.raises(BadInput, match="no video with its JSON"):
        evaluate.find_videos([tmp_path / "outputs"])


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["state.pt", "subject.safetensors", "checksums.json"])
def test_a_pipe_or_a_device_in_a_save_is_refused(tmp_path, kind, name):
    save = tmp_path / "step-000001"
    save.mkdir()
    for other in {"state.pt", "subject.safetensors", "checksums.json"} - {name}:
        (save / other).write_text("{}")
    put(kind, save / name)
    with pytest.raises(BadInput, match=f"--resume {save}: not a readable save .*not a regular file"):
        read_save(save)


def test_a_pipe_where_the_log_goes_costs_no_run(tmp_path, capsys):
    put("pipe", tmp_path / "log.jsonl")
    put("pipe", tmp_path / "previews" / "step-000001.png")
    with Log(tmp_path / "log.jsonl", 0, 1, 0) as log:
        log(1, loss=1.0)
    save_preview(tmp_path, 2, np.zeros((1, 4, 16, 16, 3), np.uint8), "a dog")
    said = "".join(capsys.readouterr())
    assert "log.jsonl: not written (it is not a regular file)" in said and (tmp_path / "preview.png").exists()


# ------------------------------------------------------------------------------------------------------------
# JSON, configs, subjects


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000])
def test_json_that_is_nested_for_ever(base, tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(path)
    with pytest.raises(BadInput, match="not a readable JSON file"):
        load_config(path)
    with pytest.raises(BadInput, match="no video with its JSON"):
        evaluate.find_videos([tmp_path])
    assert free_path(tmp_path, "config", {"seed": 1}, [".gif"]).name == "config-2"


@pytest.mark.parametrize("entry, value", [
    ("schedule.beta_start", 1), ("schedule.beta_end", 0.5), ("schedule.scale_end", 0),
    ("schedule.scale_steps", -1),
    ("text.width", 10**6), ("vae.num_res_blocks", 17), ("unet.channel_mult", [10**6]),
    ("unet.context_dim", 0),
    ("sampling.prompt", "x" * 501), ("training.class_word", "a\u202eb"), ("fingerprint", "\x1b[2J"),
    ("crc32", [2**32, 0, 0])])
def test_config_entries_that_are_impossible(tmp_path, entry, value):
    *group, name = entry.split(".")
    content = {group[0]: {name: value}} if group else {name: value}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=entry.replace(".", r"\.")) as error:
        load_config(tmp_path / "config.json")
    assert one_line(error.value).isprintable() and len(one_line(error.value)) < 1200


@pytest.mark.parametrize("entry, value", [
    ("class_word", "d\x1b[2Jg"), ("class_word", "a\nb"), ("class_word", "d" * 501), ("base_name", "a\rb"),
    ("steps", -5), ("steps", 10**4000), ("rank", 10**9), ("settings", {"targets": ["x"]}),
    ("settings", {"targets": "\x1b[2J"}), ("placeholder", "V *"), ("placeholder", "*\u202e")])
def test_a_subject_with_impossible_facts_under_a_right_checksum(base, tmp_path, entry, value):
    subject = random_subject(base)
    setattr(subject, entry, value)
    save_subject(tmp_path / "subject.safetensors", subject)
    with pytest.raises(BadInput, match=f"no valid {entry}") as error:
        load_subject(tmp_path / "subject.safetensors", base)
    assert one_line(error.value) == str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["bad\x1b[2J.png", "a\nb.png", "a\rb.png", "caf\udce9.png"])
def test_a_file_name_is_one_printable_line(tmp_path, capsys, name):
    (tmp_path / name).write_text("not a picture")
    Image.new("RGB", (20, 20)).save(tmp_path / "whole.png")
    assert len(load_photos(tmp_path, 64)) == 1
    line, = capsys.readouterr().err.splitlines()
    assert line.isprintable() and "left out" in line


# ------------------------------------------------------------------------------------------------------------
# Checkpoints, and the folder that a base goes into


def large(state):
    return next(name for name, x in state.items() if x.dim() == 2)


CHECKPOINTS = {
    "sparse": lambda state: state | {large(state): state[large(state)].to_sparse()},
    "compressed": lambda state: state | {large(state): state[large(state)].to_sparse_csr()},
    "meta": lambda state: state | {large(state): state[large(state)].to("meta")},
    "quantized": lambda state: state | {
        large(state): torch.quantize_per_tensor(state[large(state)], 0.1, 0, torch.qint8)},
    "numbered": lambda state: dict(enumerate(state.values())),
    "a number among tensors": lambda state: state | {"x": 1},
    "list": lambda state: [1, 2],
    "text": lambda state: "weights",
    "tensor": lambda state: torch.ones(3),
    "nothing": lambda state: None,
    "empty": lambda state: {}}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_state_dict_that_is_no_dictionary_of_plain_tensors(tmp_path, kind):
    torch.save({"state_dict": CHECKPOINTS[kind](golden_state())}, tmp_path / "model.ckpt")
    with pytest.raises(BadInput, match="model.ckpt: its state_dict is no dictionary of plain tensors"):
        convert_ckpt.read_shapes(tmp_path / "model.ckpt")


def test_an_expanded_tensor_is_read_as_its_values(tmp_path):
    """Its strides are zero. A small file may so claim a huge shape, which is not the base's."""
    state, config = golden_state(), replace(BaseConfig(), **SMALL)
    name = large(state)
    torch.save({"state_dict": state | {name: torch.ones(1).expand(state[name].shape)}}, tmp_path / "one.ckpt")
    convert_ckpt.convert(tmp_path / "one.ckpt", tmp_path / "base", config, torch.float32)
    part, ours = convert_ckpt.our_name(name)
    assert load_base(tmp_path / "base").unet.state_dict()[ours].eq(1).all() and part == "unet"
    torch.save({"state_dict": state | {name: torch.ones(1).expand(10**6, 10**6)}}, tmp_path / "huge.ckpt")
    with pytest.raises(BadInput, match="another shape"):
        convert_ckpt.convert(tmp_path / "huge.ckpt", tmp_path / "huge", config, torch.float32)
    assert not (tmp_path / "huge").exists()


def ours(folder, **changed):
    folder.mkdir()
    config = replace(BaseConfig(), **{"fingerprint": "f" * 16, "crc32": (1, 2, 3)} | changed)
    save_config(config, folder / "config.json")


OTHER_FOLDERS = {
    "an empty config": lambda out: (out.mkdir(), (out / "config.json").write_text("{}")),
    "a list for a config": lambda out: (out.mkdir(), (out / "config.json").write_text("[]")),
    "a nested config": lambda out: (out.mkdir(), (out / "config.json").write_text("[" * 100_000)),
    "a config without checksums": lambda out: ours(out, crc32=()),
    "a config without fingerprint": lambda out: ours(out, fingerprint=""),
    "another model's weights": lambda out: (out.mkdir(), (out / "unet.safetensors").write_text("mine")),
    "a checkpoint": lambda out: (out.mkdir(), (out / "model.ckpt").write_text("mine")),
    "a linked file": lambda out: (ours(out), (out / "vae.safetensors").symlink_to("../mine")),
    "a folder for a file": lambda out: (ours(out), (out / "vae.safetensors").mkdir()),
    "a config that is a pipe": lambda out: put("pipe", out / "config.json")}


@pytest.mark.parametrize("kind", OTHER_FOLDERS)
def test_what_is_no_base_is_not_written_over(tmp_path, kind):
    out = tmp_path / "out"
    OTHER_FOLDERS[kind](out)
    before = sorted(out.rglob("*"))
    with pytest.raises(BadInput, match="^--out "):
        check_replaced(out)
    assert sorted(out.rglob("*")) == before


def test_a_base_of_ours_is_written_over_and_what_lies_beside_it_stays(tmp_path):
    torch.save({"state_dict": golden_state()}, tmp_path / "model.ckpt")
    out, config = tmp_path / "out", replace(BaseConfig(), **SMALL)
    ours(out)
    for name in ("notes.txt", "model.safetensors"):
        (out / name).write_text("mine")
    convert_ckpt.convert(tmp_path / "model.ckpt", out, config, torch.float32)
    assert {file.name for file in out.iterdir()} == {
        "notes.txt", "model.safetensors", *(file.name for file in base_files(out))}
    assert (out / "notes.txt").read_text() == "mine" and load_base(out)


LINKS = {
    "link": ("real", None), "dangling": ("nothing", "is a link to nothing"),
    "loop": ("loop", "is a link to nothing"), "dangling/below": ("nothing", "is a link to nothing"),
    "file": ("mine.txt", "is a file"), "file/below": ("mine.txt", "is a file")}


@pytest.mark.parametrize("name", LINKS)
def test_out_that_is_a_link(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": golden_state()}, "model.ckpt")
    Path("real").mkdir()
    Path("mine.txt").write_text("mine")
    target, says = LINKS[name]
    link = Path(name.split("/")[0])
    link.symlink_to(target)
    convert = lambda: convert_ckpt.convert(Path("model.ckpt"), Path(name), replace(BaseConfig(), **SMALL),
                                           torch.float32)
    if says:
        with pytest.raises(BadInput, match=f"--out {name}: .*{says}"):
            convert()
    else:
        convert()
        assert load_base("real")
    assert os.readlink(link) == target and Path("mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", [".", "..", "sub/.."])
def test_out_that_is_dots(tmp_path, monkeypatch, name):
    torch.save({"state_dict": golden_state()}, tmp_path / "model.ckpt")
    (tmp_path / "sub" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "sub")
    with pytest.raises(BadInput, match="exists and is not a base folder"):
        convert_ckpt.convert(Path("../model.ckpt"), Path(name), replace(BaseConfig(), **SMALL), torch.float32)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model.ckpt", "sub", "sub"]


# ------------------------------------------------------------------------------------------------------------
# Texts


def random_word(letters):
    return "".join(np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), letters))


@pytest.mark.parametrize("text", [random_word(900_000), "字" * 300_000, f"a V* dog {random_word(900_000)}",
                                  " ".join(random_word(n) for n in range(1, 1300))])
def test_a_text_without_end_is_tokenised_at_once(text):
    tokenizer = Tokenizer(["V*"])
    signal.alarm(10)
    ids = tokenizer.encode(text)
    assert ids[:TEXT_LENGTH] == tokenizer.encode(text[:5000])[:TEXT_LENGTH] and len(ids) < 40_000


def test_what_is_read_of_a_long_word_is_as_if_all_of_it_were():
    tokenizer, word = Tokenizer(), random_word(3000)
    assert tokenizer.encode(word)[:TEXT_LENGTH] == tokenizer.bpe.encode(word)[:TEXT_LENGTH]


def test_a_caption_and_a_prompt_of_one_long_word(tmp_path, capsys):
    Image.new("RGB", (20, 20)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text(f"{random_word(900_000)} V*")
    signal.alarm(10)
    with pytest.raises(BadInput, match=r"0\.txt: V\* comes after the 75 tokens"):
        load_photos(tmp_path, 64, "V*", "dog")
    assert len(read_prompts(tmp_path / "0.txt")) == 1


# ------------------------------------------------------------------------------------------------------------
# Pictures


RAMP = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)


def save_tiff(path, values, bits, sample_format):
    """A grey TIFF of one strip, written by hand: Pillow writes neither 12 bits nor signed numbers."""
    content = values.astype("<u2").tobytes()
    if bits == 12:
        pairs = values.astype(int).reshape(-1, 2)
        content = b"".join(bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255]) for a, b in pairs)
    tags = {256: 64, 257: 64, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 64, 279: len(content),
            339: sample_format}
    table = len(tags).to_bytes(2, "little")
    for tag, value in tags.items():
        table += tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + value.to_bytes(4, "little")
    path.write_bytes(b"II*\0" + (8 + len(content)).to_bytes(4, "little") + content + table + bytes(4))


def with_first(values, number):
    values = values.copy()
    values[0, 0] = number
    return values


save_array = lambda path, values: Image.fromarray(values).save(path)
# A picture's file, its values, and the mean of what is read or what the refusal says.
PICTURES = [
    ("float.tif", RAMP, 127.5), ("dark float.tif", RAMP / 10, 12.75),
    ("16 bits.png", (65535 * RAMP).astype(np.uint16), 127.5),
    ("dark 16 bits.png", (6553.5 * RAMP).astype(np.uint16), 12.75),
    ("16 bits.tif", (65535 * RAMP).astype(np.uint16), 127.5),
    ("float to 255.tif", 255 * RAMP, "values go from 0.0 to 255.0"),
    ("below 0.tif", with_first(RAMP, -0.1), "values go from -0.1"),
    ("nan.tif", with_first(RAMP, np.nan), "not finite"), ("inf.tif", with_first(RAMP, np.inf), "not finite"),
    ("32 bits, small.tif", (255 * RAMP).astype(np.int32), "32 bits"),
    ("32 bits.tif", (2e9 * RAMP).astype(np.int32), "32 bits"),
    ("12 bits.tif", (4095 * RAMP, 12, 1), 127.5), ("16 of 16 bits.tif", (65535 * RAMP, 16, 1), 127.5),
    ("signed.tif", (32767 * RAMP, 16, 2), "a sign")]


@pytest.mark.parametrize("name, values, found", PICTURES, ids=[name for name, _, _ in PICTURES])
def test_a_picture_is_read_by_its_own_depth_or_refused(tmp_path, name, values, found):
    if isinstance(values, tuple):
        save_tiff(tmp_path / name, *values)
    else:
        save_array(tmp_path / name, values)
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            load_picture(tmp_path / name, 64)
    else:
        assert abs(np.asarray(load_picture(tmp_path / name, 64)).mean() - found) < 0.6


def test_libraries_say_nothing_of_damaged_pictures(tmp_path, capfd):
    """libtiff writes to the terminal itself; Pillow warns of EXIF."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x112] = 6
    noise.save(tmp_path / "exif.jpg", exif=exif)
    content = bytearray((tmp_path / "exif.jpg").read_bytes())
    content[content.index(b"Exif") + 14] = 200  # more entries than there are
    (tmp_path / "exif.jpg").write_bytes(content)
    noise.save(tmp_path / "cut.tif", compression="tiff_lzw")
    content = bytearray((tmp_path / "cut.tif").read_bytes())
    content[8:200] = b"\xff" * 192
    (tmp_path / "cut.tif").write_bytes(content)
    with pytest.raises(OSError):
        load_picture(tmp_path / "cut.tif", 64)
    assert capfd.readouterr().err  # which libtiff says, where nobody keeps it from the terminal
    assert len(load_photos(tmp_path, 64)) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"warning: {tmp_path / 'cut.tif'}: not readable")


# ------------------------------------------------------------------------------------------------------------
# Videos that are not whole

VIDEO = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
FACTS = {"prompt": "a V* dog", "seed": 1, "frames": 3,
         "subjects": [{"placeholder": "V*", "class_word": "dog"}]}
FFMPEGS = {
    "fails at once": "exit 1",
    "writes nothing": "exec {real} -version",
    "is killed": "read line; kill -9 $$",
    "leaves half": """{real} "$@"; for last; do :; done
case "$last" in *.mp4) truncate -s $(($(stat -c %s "$last") / 2)) "$last";; esac"""}


@pytest.mark.parametrize("kind", FFMPEGS)
def test_an_mp4_that_ffmpeg_did_not_finish_is_not_there(tmp_path, monkeypatch, capfd, kind):
    script = tmp_path / "ffmpeg"
    script.write_text("#!/bin/sh\n" + FFMPEGS[kind].replace("{real}", imageio_ffmpeg.get_ffmpeg_exe()))
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(script))
    path = tmp_path / "out" / "a.mp4"
    with pytest.raises(BadInput) as error, complete_or_absent(path) as temporary:
        write_mp4(temporary, VIDEO, 8, quality=8)
    assert str(error.value).startswith(f"{path}: ffmpeg did not write all 3 frames")
    assert not list(path.parent.iterdir()) and not capfd.readouterr().err


@pytest.mark.parametrize("ending", ["mp4", "gif"])
@pytest.mark.parametrize("damage", ["cut", "empty", "deleted", "a folder"])
def test_a_video_that_was_damaged_is_made_again(tmp_path, ending, damage):
    facts = {"prompt": "a dog", "seed": 1, "frames": 3}
    file, _ = save_video(tmp_path / "a-dog-1", VIDEO, [ending], 8, facts, {})
    assert free_path(tmp_path, "a-dog-1", facts, [f".{ending}"]) is None
    if damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
        if damage == "a folder":
            file.mkdir()
    assert free_path(tmp_path, "a-dog-1", facts, [f".{ending}"]) == tmp_path / "a-dog-1"


def test_a_video_with_fewer_frames_than_its_json_says_is_not_measured(tmp_path):
    save_video(tmp_path / "a", VIDEO[:2], ["gif"], 8, FACTS, {})
    (video, facts), = evaluate.find_videos([tmp_path])
    with pytest.raises(BadInput, match=r"a\.gif: .*2 frames, and its JSON says 3"):
        read_video(video, facts["frames"])


@pytest.mark.parametrize("changed", [
    {"seed": "1"}, {"seed": float("nan")}, {"seed": True}, {"seed": None}, {"prompt": 5}, {"frames": "3"},
    {"subjects": None}, {"subjects": {"placeholder": "V*"}},
    {"subjects": [{"placeholder": ["V*"], "class_word": "dog"}]},
    {"subjects": [{"placeholder": "V*", "class_word": 5}]}], ids=str)
def test_a_json_with_other_types_is_no_videos(tmp_path, changed):
    save_video(tmp_path / "a", VIDEO, ["gif"], 8, FACTS, {})
    assert len(evaluate.find_videos([tmp_path])) == 1
    (tmp_path / "a.json").write_text(json.dumps(FACTS | changed))
    with pytest.raises(BadInput, match="no video with its JSON"):
        evaluate.find_videos([tmp_path])


@pytest.mark.parametrize("second", ["v", "./v", "v/../v", "link", "{}"])
def test_a_folder_given_twice_counts_once(tmp_path, monkeypatch, second):
    monkeypatch.chdir(tmp_path)
    save_video(tmp_path / "v" / "a", VIDEO, ["gif"], 8, FACTS, {})
    (tmp_path / "link").symlink_to("v")
    (path, _), = evaluate.find_videos([Path("v"), Path(second.replace("{}", str(tmp_path / "v")))])
    assert path == Path("v/a.gif")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_in_no_table(tmp_path, capsys, number):
    row = {"folder": "v\x1b", "text": "a \udcff dog", "seed": 1, "subjects": "dog"}
    rows = [row | {"video": "a", **dict.fromkeys(evaluate.METRICS, 0.5)},
            row | {"video": "b", **dict.fromkeys(evaluate.METRICS, number)}]
    evaluate.report(rows, tmp_path)
    printed = capsys.readouterr()
    cells = " | ".join(["0.500 ± 0.000"] * len(evaluate.METRICS))
    assert printed.out.splitlines()[2] == f"| v\\x1b | 2 | {cells} |"
    assert len(printed.err.splitlines()) == len(evaluate.METRICS)
    for name in ("evaluation.json", "evaluation.csv"):
        words = (tmp_path / name).read_text().lower().replace(",", " ").split()
        assert not {"nan", "inf", "-inf", "infinity", "-infinity"} & set(words)
