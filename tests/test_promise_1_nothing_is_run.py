"""Promise 1: nothing in a file is run. test_convert.py has checkpoints, test_evaluate.py its own models."""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from makers import Bomb, random_subject
from data import load_photos, load_prior
from paper.evaluate import read_video
from support.cli import BadInput
from support.files import load_base, load_subject
from support.runs import load_training, save_preview


def resume(save, base):
    subject = random_subject(base)
    load_training(save, subject, torch.optim.AdamW([subject.v_star]), 9)


@pytest.mark.parametrize("name, read", [
    ("subject.safetensors", load_subject),
    ("unet.safetensors", lambda path, base: load_base(path.parent)),
    ("state.pt", lambda path, base: resume(path.parent, base))])
def test_a_pickle_that_would_run_code_is_refused(base, tmp_path, monkeypatch, name, read):
    monkeypatch.chdir(tmp_path)     # where the bomb would go off
    Path("config.json").write_text("{}")
    torch.save({"step": 1, "settings": {}, "optimizer": Bomb()}, name)
    with pytest.raises(BadInput, match="not (a )?readable"):
        read(tmp_path / name, base)
    assert not Path("exploded").exists()


@pytest.fixture()
def postscript(tmp_path, monkeypatch):
    """Writes a PostScript program under a picture's name. The test fails if Ghostscript is started.

    Pillow hands such a file to Ghostscript, which runs it, whatever the file's name.
    """
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: pytest.fail("Ghostscript ran"))

    def postscript(name):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 32\n%%EndComments\nshowpage\n"
        (tmp_path / name).write_bytes(program)
        return tmp_path / name
    return postscript


def test_a_photo_a_preview_or_a_video_that_is_postscript_is_not_run(postscript, tmp_path, capsys):
    names = ("x.png", "x.jpg", "x.tif")
    for name in names:
        postscript(name)
    Image.new("RGB", (48, 32)).save(tmp_path / "good.png")
    assert len(load_photos(tmp_path, 32, 48, "V*", "dog")) == len(load_prior(tmp_path, 9, 3, 32, 48)) == 1
    errors = capsys.readouterr().err
    assert all(errors.count(f"{name}: not readable") == 2 for name in names)
    preview = postscript("preview.png")
    with pytest.raises(OSError, match="cannot identify image file"):
        save_preview(preview, np.zeros((1, 4, 32, 48, 3), np.uint8), "a dog")
    with pytest.raises(BadInput, match="x.mp4: not a readable video"):
        read_video(postscript("x.mp4"), {})
