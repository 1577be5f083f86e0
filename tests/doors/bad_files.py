"""Writes the bad files that test_bad_input.py names: texts, pictures, subjects, bases, checkpoints.

No test is here. Every function writes into a folder; a file's or folder's name says what is wrong with it.
"""
import json
import os
import pickle
import shutil
import struct
import zlib

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from config import load_config, save_config
from files import base_files, load_base, save_base_config, save_subject
from makers import Bomb, golden_state, random_subject


def write_all(folder, base_folder, photos_folder):
    write_pictures(folder)
    write_texts(folder, photos_folder)
    write_subjects(folder, load_base(base_folder))
    write_bases(folder, base_folder)
    write_checkpoints(folder)


# ------------------------------------------------------------------------------------------------------------
# Pictures and texts


def write_pictures(folder):
    for name in ("empty folder", "folder of texts", "folder of broken pictures", "folder of short videos"):
        (folder / name).mkdir()
    (folder / "folder of texts" / "a.txt").write_text("hello")
    (folder / "folder of short videos" / "a.mp4").write_bytes(b"not a video")
    (folder / "a file for a folder").write_text("x")

    whole, broken = folder / "whole.png", folder / "folder of broken pictures"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(whole)
    (broken / "cut.png").write_bytes(whole.read_bytes()[:-40])
    (broken / "empty.jpg").write_bytes(b"")
    (broken / "text.jpg").write_text("not a picture")
    (broken / "bomb.png").write_bytes(png_that_claims(50_000, 50_000))
    (broken / "large.png").write_bytes(png_that_claims(10_000, 10_000))


def png_that_claims(width, height):
    """A PNG whose header names a size, and which has no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"")


def png_chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def write_texts(folder, photos_folder):
    """Captions, and files of prompts."""
    shutil.copytree(photos_folder, folder / "photos")
    contents = {
        "binary": b"\x00\x01\x02",
        "latin-1": "Stra\u00dfe".encode("latin-1"),
        "huge": b"x " * 600_000}
    for name, content in contents.items():
        shutil.copytree(photos_folder, folder / f"{name} caption")
        (folder / f"{name} caption" / "0.txt").write_bytes(content)
        (folder / f"{name} prompts").write_bytes(content)
    (folder / "empty prompts").write_bytes(b"\xef\xbb\xbf\r\n\r\n")
    (folder / "comments only").write_text("# a\n# b\n")


# ------------------------------------------------------------------------------------------------------------
# Subjects


def write_subjects(folder, base):
    """Beside the bad subjects, a good one: good.safetensors."""
    good, subject = folder / "good.safetensors", random_subject(base)
    save_subject(good, subject)
    whole = good.read_bytes()
    (folder / "empty subject").write_bytes(b"")
    torch.save({"v_star": Bomb()}, folder / "pickled subject")
    (folder / "subject with a lying header").write_bytes((2**40).to_bytes(8, "little") + whole[8:])
    lying = whole.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1)
    (folder / "subject with lying offsets").write_bytes(lying)
    (folder / "cut subject").write_bytes(whole[:-10])
    save_file(load_file(good), folder / "subject without facts")

    facts = {
        "rank -1": {"rank": "-1"},
        "rank 10000000": {"rank": "10000000"},
        "rank two": {"rank": "two"},
        "strange settings": {"settings": "[]"},
        "nested settings": {"settings": "[" * 100_000},
        "an ordinary word": {"placeholder": "dog"},
        "a word with an escape code": {"placeholder": "\x1b[31m*"},
        "another base": {"base_name": "another", "base_fingerprint": "0"},
        "another method": {"method": "magic"}}
    for name, changed in facts.items():
        write_damaged_subject(folder / f"subject of {name}", good, changed_facts=changed)

    layer = f"unet.{next(iter(subject.updates))}.lora_A.weight"
    changes = {
        "with a tensor missing": lambda tensors: tensors.pop(layer),
        "with a tensor more": lambda tensors: tensors.update(more=torch.ones(1)),
        "of another shape": lambda tensors: tensors.update({layer: torch.ones(3, 3)}),
        "in float16": lambda tensors: tensors.update({layer: tensors[layer].half()}),
        "with a NaN": lambda tensors: put_first(tensors[layer], torch.nan),
        "with an infinity": lambda tensors: put_first(tensors["v_star"], torch.inf),
        "with a number changed": lambda tensors: put_first(tensors[layer], 0.5)}
    for name, change in changes.items():
        write_damaged_subject(folder / f"subject {name}", good, change_tensors=change)


def write_damaged_subject(path, good, changed_facts=None, change_tensors=None):
    """Writes the subject `good` with another header, or other tensors. Its fingerprint stays what it was."""
    content = good.read_bytes()
    header_size = int.from_bytes(content[:8], "little")
    facts = json.loads(content[8:8 + header_size])["__metadata__"] | (changed_facts or {})
    tensors = load_file(good)
    if change_tensors:
        change_tensors(tensors)
    save_file(tensors, path, facts)


def put_first(tensor, value):
    tensor.view(-1)[0] = value


# ------------------------------------------------------------------------------------------------------------
# Bases


def write_bases(folder, base_folder):
    (copy_base(folder, base_folder, "base without weights") / "unet.safetensors").unlink()
    os.truncate(copy_base(folder, base_folder, "base with a cut file") / "vae.safetensors", 5000)

    # Under right checksums, so that it is the tensors that are refused ...
    changes = {
        "a NaN": lambda tensors: put_first(tensors["conv_out.weight"], torch.nan),
        "whole numbers": lambda tensors: tensors.update({"conv_out.bias": tensors["conv_out.bias"].long()}),
        "a tensor missing": lambda tensors: tensors.pop("conv_out.bias")}
    for name, change in changes.items():
        bad = copy_base(folder, base_folder, f"base with {name}")
        change_unet(bad, change)
        config_path, *weights = base_files(bad)
        save_base_config(load_config(config_path), config_path, weights)
    # ... and under those of the right tensors.
    bad = copy_base(folder, base_folder, "base with a number changed")
    change_unet(bad, lambda tensors: put_first(tensors["conv_out.weight"], 0.5))

    config = load_config(base_folder / "config.json")
    config.unet.channels = 17
    save_config(config, copy_base(folder, base_folder, "base that cannot be built") / "config.json")
    for name, text in config_texts((base_folder / "config.json").read_text()).items():
        (copy_base(folder, base_folder, f"base with {name}") / "config.json").write_text(text)


def copy_base(folder, base_folder, name):
    shutil.copytree(base_folder, folder / name)
    return folder / name


def change_unet(base_folder, change):
    tensors = load_file(base_folder / "unet.safetensors")
    change(tensors)
    save_file(tensors, base_folder / "unet.safetensors")


def config_texts(good):
    """The text of a right config.json -> what is wrong with it -> the text of a wrong one."""
    texts = {
        "half a config": good[:100],
        "a nested config": "[" * 100_000,
        "a list for a config": "[1]"}
    changes = {
        "an unknown entry": ("unet", "chanels", 16),
        "an entry of older versions": ("training", "train_steps", 500),
        "a word for a number": ("sampling", "steps", "many"),
        "true for a number": ("sampling", "steps", True),
        "a fraction for a whole number": ("sampling", "frames", 2.5),
        "nothing for a text": ("sampling", "prompt", None),
        "a number for a list": ("unet", "channel_mult", 2),
        "a fraction in a list": ("unet", "channel_mult", [1, 2.5]),
        "an empty list": ("vae", "channel_mult", []),
        "too much guidance": ("sampling", "cfg", 1000),
        "a guidance of NaN": ("sampling", "cfg", float("nan")),
        "a guidance of 400 digits": ("sampling", "cfg", 10**400),
        "no frames": ("sampling", "frames", 0),
        "a rank of 5000": ("training", "rank", 5000),
        "a level of no channels": ("unet", "channel_mult", [1, 0]),
        "more K than steps": ("sampling", "K", 5)}
    for name, (section, entry, value) in changes.items():
        values = json.loads(good)
        values[section][entry] = value
        texts[name] = json.dumps(values)
    texts["a list for its UNet"] = json.dumps(json.loads(good) | {"unet": [16]})
    texts["two checksums"] = json.dumps(json.loads(good) | {"crc32": json.loads(good)["crc32"][:2]})
    return texts


# ------------------------------------------------------------------------------------------------------------
# Checkpoints


def write_checkpoints(folder):
    """Beside the bad checkpoints, a good one: good.ckpt."""
    torch.save({"state_dict": golden_state()}, folder / "good.ckpt")
    (folder / "empty.ckpt").write_bytes(b"")
    (folder / "page.ckpt").write_text("<html>")
    torch.save({"state_dict": Bomb()}, folder / "bomb.ckpt")
    (folder / "old bomb.ckpt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    (folder / "noise.safetensors").write_bytes(np.random.default_rng(0).bytes(3000))
    (folder / "lying.safetensors").write_bytes((2**50).to_bytes(8, "little") + b"{}")
    torch.save({"state_dict": {"model.diffusion_model.x": torch.zeros(2)}}, folder / "another.ckpt")
    torch.save([1, 2], folder / "list.ckpt")
