"""A folder full of other people's files, with names near to ours, stays as it is around every script.

The scripts run in it, in forked children: those that succeed write beside the files, those that fail leave
nothing at all.
"""
import json
import os
import shutil

import numpy as np
import pytest
import torch

import convert_ckpt
import sample
import train
from config import BaseConfig
from convert_ckpt import convert
from files import load_base, save_subject
from makers import SMALL, fork, golden_state, random_subject, wait
from paper import evaluate, protocol
from test_evaluate import small_tower
from toy import experiment, pretrain
from video import save_video

FILES = [
    "notes.txt", ".hidden", ".git/config", ".tmp-notes.txt", ".tmp-1-subject.safetensors",
    ".tmp-99-step-000002/state.pt", ".writer.lock.bak", ".writer.locked", ".writer.unfinished.txt",
    "log.jsonl.1", "log.txt", "preview.png.old", "preview-mine.png", "previews-mine/step-000001.png",
    "previews/step-mine.png", "subject.safetensors.bak", "subject-2.safetensors", "state.pt",
    "checksums.json",
    "step-000002-best/state.pt", "step-000002-best/subject.safetensors", "step-000002-notes.txt",
    "step-2/state.pt", "step-/x", "step-best/x", "Step-000001/x", "step-00003/state.pt",
    "prior/mine.txt", "prior/tiny0-dog/0000.png", "prior/.tmp-1-x.png", "prior-mine/0000.png",
    "runs/notes.txt", "runs/photos-old/subject.safetensors", "runs/.tmp-1-photos/x",
    "outputs/mine.mp4", "outputs/protocol-2/table.md", "outputs/experiment.json", "prompts.txt",
    "a-v-dog-5.txt", "a-v-dog-5.mp4.part", "a-v-dog-5-process.png", "evaluation.txt", "evaluation.json.old",
    "config.json.bak", "model.safetensors", "vae.safetensors.old", "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors", "another model/config.json",
    "another model/unet.safetensors", "checkpoints/another/config.json",
    "latents.safetensors.bak", "vae.pt.old", "base.json"]


@pytest.fixture(scope="module")
def inputs(base_folder, photos_folder, tmp_path_factory):
    """What our scripts read: base, photos, subject, checkpoint, videos, a run whose saves were removed."""
    inputs = tmp_path_factory.mktemp("inputs")
    shutil.copytree(base_folder, inputs / "base")
    shutil.copytree(photos_folder, inputs / "photos")
    for run in ("finished", "runs/photos"):
        save_subject(inputs / run / "subject.safetensors", random_subject(load_base(base_folder)))
    torch.save({"state_dict": golden_state()}, inputs / "model.ckpt")
    video = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), dtype=np.uint8)
    facts = {"prompt": "a V* dog", "seed": 1, "subjects": [{"placeholder": "V*", "class_word": "dog"}]}
    save_video(inputs / "videos" / "a", video, ["mp4"], 8, facts, {})
    return inputs


@pytest.fixture()
def mess(inputs, tmp_path):
    """The folder. Some of its links lead to tmp_path/elsewhere."""
    mess = tmp_path / "mess"
    shutil.copytree(inputs, mess)
    for name in FILES:
        path = mess / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"mine: {name}")
    (mess / "config.json").write_text('{"model_type": "another"}')
    (mess / "empty folder").mkdir()
    (mess / "step-000005.zip").write_bytes(b"PK")
    os.mkfifo(mess / "pipe.txt")

    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "step-000004").mkdir(parents=True)
    for name in ("subject.safetensors", "state.pt", "checksums.json"):
        (elsewhere / "step-000004" / name).write_text("mine")
    (elsewhere / "folder").mkdir()
    (elsewhere / "folder" / "mine.txt").write_text("mine")
    for name, target in [("link", elsewhere), (".tmp-link", elsewhere), ("dangling", "nothing"),
                         ("linked folder", elsewhere / "folder"),
                         ("previews/link.png", elsewhere / "step-000004" / "state.pt"),
                         ("prior/link", elsewhere), ("runs/link", elsewhere)]:
        (mess / name).symlink_to(target)
    return mess


def snapshot(*folders):
    """Path -> what it is: a link's target, a file's content and time, or the kind of anything else."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            info = path.lstat()
            if path.is_symlink():
                found[path] = os.readlink(path)
            elif path.is_file():
                found[path] = (path.read_bytes(), info.st_mtime_ns, info.st_mode)
            else:
                found[path] = info.st_mode
    return found


def convert_small():
    convert_ckpt.convert = lambda path, out, config, dtype: convert(path, out, BaseConfig(**SMALL), dtype)
    convert_ckpt.main()


def evaluate_small():
    evaluate.load_clip = evaluate.load_dino = small_tower
    evaluate.main()


def protocol_without_commands():
    def command(what, python, script, *flags, environment=None):
        if script.name == "evaluate.py":
            row = {"folder": "x", "video": "x", "text": "a", "seed": 0, "CLIP-T": 0.1}
            out = flags[flags.index("--out") + 1]
            (out / "evaluation.json").write_text(json.dumps({"videos": [row | {"folder": str(folder)} for
                                                                        folder in flags[1:9]]}))
    protocol.command = command
    protocol.main()


def pretrain_small():
    draw = pretrain.draw_pictures
    pretrain.draw_pictures = lambda count, seed: draw(16, seed)
    pretrain.main()


TRAIN = ("--base base --images photos --class_word dog --steps 3 --save_every 1 --preview_every 2 "
         "--keep_last 1")
SAMPLE = "--base base --steps 2 --K 1 --seed 5"
RUNS = [    # script, flags, exit code
    (train.main, f"{TRAIN} --out .", 0),
    (train.main, TRAIN, 0),
    (train.main, f"{TRAIN} --out empty\0folder", 0),
    (train.main, f"{TRAIN} --out another\0model", 0),
    (train.main, f"{TRAIN} --out link", 2),
    (train.main, f"{TRAIN} --out linked\0folder", 0),
    (train.main, f"{TRAIN} --out finished", 2),
    (train.main, f"{TRAIN} --out dangling", 2),
    (train.main, f"{TRAIN} --out notes.txt", 2),
    (train.main, f"{TRAIN} --out pipe.txt", 2),
    (train.main, f"{TRAIN} --out . --alpha 0 --lr 1 --weight_decay 1 --seed -1", 2),
    (train.main, f"{TRAIN} --resume finished", 2),
    (train.main, f"{TRAIN} --resume step-000002-best", 2),
    (train.main, f"{TRAIN} --resume link/step-000004 --alpha 0", 2),
    (train.main, f"{TRAIN} --resume latest", 2),
    (train.main, f"{TRAIN} --resume latest --out .", 2),
    (train.main, f"{TRAIN} --out . --prior empty\0folder", 2),
    (sample.main, f"{SAMPLE} --subject finished --prompt a\0V*\0dog --out . --format mp4 gif png "
                  "--show_process --compare", 0),
    (sample.main, f"{SAMPLE} --subject none --prompt a\0dog", 0),
    (sample.main, f"{SAMPLE} --subject finished --prompt a\0V*\0dog --out link", 0),
    (sample.main, f"{SAMPLE} --subject step-000002-best --prompt a\0V*\0dog --out .", 2),
    (sample.main, f"{SAMPLE} --base another\0model --prompt a\0V*\0dog --out .", 2),
    (sample.main, f"{SAMPLE} --prompts pipe.txt --out .", 2),
    (convert_small, "model.ckpt --out converted", 0),
    (convert_small, "model.ckpt --out empty\0folder", 0),
    (convert_small, "model.ckpt --out .", 2),
    (convert_small, "model.ckpt --out another\0model", 2),
    (convert_small, "model.ckpt --out link", 2),
    (convert_small, "model.ckpt --out dangling", 2),
    (convert_small, "model.safetensors --out converted", 2),
    (evaluate_small, "--videos videos --images photos --out .", 0),
    (evaluate_small, "--videos outputs --images photos --out .", 2),
    (evaluate_small, "--videos videos --images another\0model", 2),
    (protocol_without_commands, "--base base --subjects runs --out .", 0),
    (protocol_without_commands, "--base another\0model --subjects runs --out .", 2),
    (protocol_without_commands, "--base base --subjects empty\0folder --out .", 2),
    (experiment.main, "base --clips 1 --out empty\0folder", 0),
    (experiment.main, "base --clips 1 --out .", 2),     # a base.json of another's is there
    (experiment.main, "base --base another\0model --out .", 2),
    (experiment.main, "claim --subject subject.safetensors.bak --out .", 2),
    (pretrain_small, "--vae_steps 1 --image_steps 1 --small_clip_steps 1 --clip_steps 1 --clips 2 --out . "
                     "--base trained", 0),
    (pretrain.main, "--stage latents --out . --base base", 2),
    (pretrain.main, "--stage unet --out . --base base", 2),
    (pretrain.main, "--stage export --out . --base another\0model", 2)]


@pytest.mark.parametrize("main, flags, code", RUNS)
def test_other_peoples_files_stay(mess, tmp_path, main, flags, code):
    argv = ["script", *(flag.replace("\0", " ") for flag in flags.split(" "))]
    folders = mess, tmp_path / "elsewhere"
    before = snapshot(*folders)
    ended = wait(fork(main, argv, mess, output=tmp_path / "output"))
    output = (tmp_path / "output").read_text()
    assert ended == code and "Traceback" not in output, output
    after = snapshot(*folders)
    for path, content in before.items():
        assert after.get(path) == content, path
    new = [str(path.relative_to(tmp_path)) for path in after.keys() - before.keys()]
    assert not [name for name in new if "/.tmp-" in name or "/.writer" in name]
    if code:
        assert output.count("error: ") == 1 and new == [], output
    else:
        assert new
