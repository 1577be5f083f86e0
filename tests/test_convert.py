"""The converter: strict both ways on the official names, and refusals that say what a file looks like."""
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert_ckpt
from cli import BadInput
from config import BaseConfig
from convert_ckpt import convert, match_names
from files import load_base
from makers import OFFICIAL, SMALL, Bomb, golden_state, run


def test_every_official_name_is_used_and_every_tensor_of_ours_filled():
    plan = match_names("model.ckpt", OFFICIAL, BaseConfig())
    counts = {part: len(names) for part, names in plan.items()}
    assert counts == {"unet": 1484, "vae": 248, "text_encoder": 280}
    sources = []
    for names in plan.values():
        sources += [source for source, _ in names.values()]
    assert len(set(sources)) == len(sources)
    left = set(OFFICIAL) - set(sources)
    # Left are the schedule's buffers, the text tower's last block, and what would follow it.
    assert len(left) == 13 + 12 + 2
    for name in left:
        after_the_last_block = name.endswith(("text_projection", "logit_scale"))
        assert "." not in name or "resblocks.23" in name or after_the_last_block


BIAS = "model.diffusion_model.out.2.bias"
ATTENTION = "model.diffusion_model.input_blocks.1.2.transformer_blocks.0.attn1"
VIDEOCRAFTER1 = f"{ATTENTION}.relative_position_k.embeddings_table"
OF_VIDEO = re.compile("temopral_conv|init_attn")
IMAGE_MODEL = {name: shape for name, shape in OFFICIAL.items() if not OF_VIDEO.search(name)}


@pytest.mark.parametrize("shapes, says", [
    ({name: shape for name, shape in OFFICIAL.items() if name != BIAS}, "1 missing, first conv_out.bias"),
    (OFFICIAL | {"model.diffusion_model.extra": (3,)}, "1 unknown names, first model.diffusion_model.extra"),
    (OFFICIAL | {"model_ema.decay": ()}, "unknown names, first model_ema.decay"),
    (OFFICIAL | {BIAS: (5,)}, r"\(5,\) where \(4,\) belongs"),
    (OFFICIAL | {"image_proj_model.latents": (1, 16, 1024)}, "looks like an image-to-video checkpoint"),
    (OFFICIAL | {VIDEOCRAFTER1: (33, 64)}, "looks like a VideoCrafter1 checkpoint"),
    (IMAGE_MODEL, "looks like an image model"),
    ({"unet.a.lora_A.weight": (4, 320)}, "looks like a LoRA"),
    ({"down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)}, "looks like a diffusers model"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_other_checkpoints_are_told_apart(shapes, says):
    with pytest.raises(BadInput, match=says):
        match_names("model.ckpt", shapes, BaseConfig())


@pytest.mark.parametrize("ending", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("source", [torch.float16, torch.float32])
def test_round_trip(tmp_path, ending, source):
    state = {name: x.to(source) for name, x in golden_state().items()}
    path = tmp_path / f"model{ending}"
    if ending == ".ckpt":
        torch.save({"state_dict": state, "global_step": 1}, path)
    else:
        save_file(state, path)
    convert(path, tmp_path / "base", BaseConfig(**SMALL), torch.bfloat16)
    unet, vae = (load_file(tmp_path / "base" / f"{part}.safetensors") for part in ("unet", "vae"))
    assert all(x.dtype == torch.bfloat16 for x in unet.values())
    assert all(x.dtype == torch.float32 for x in vae.values())
    assert torch.equal(unet["conv_out.weight"], state["model.diffusion_model.out.2.weight"].bfloat16())
    init_attn = state["model.diffusion_model.init_attn.0.proj_in.weight"]
    assert torch.equal(unet["input_blocks.0.1.proj_in.weight"], init_attn[..., 0].bfloat16())
    conv_in = state["first_stage_model.encoder.conv_in.weight"]
    assert torch.equal(vae["encoder.conv_in.weight"], conv_in.float())
    names = sorted(path.name for path in (tmp_path / "base").iterdir())
    assert names == ["config.json", "text_encoder.safetensors", "unet.safetensors", "vae.safetensors"]
    load_base(tmp_path / "base")


def test_fingerprint_is_the_weights_not_their_storage(tmp_path):
    fingerprints = []
    for i, (change, dtype) in enumerate([(0, torch.float32), (0, torch.bfloat16), (1, torch.float32)]):
        state = golden_state()
        state[BIAS] += change
        torch.save({"state_dict": state}, tmp_path / "model.ckpt")
        convert(tmp_path / "model.ckpt", tmp_path / str(i), BaseConfig(**SMALL), dtype)
        fingerprints.append(load_base(tmp_path / str(i)).config.fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_files_that_are_not_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": golden_state()}, "whole.ckpt")
    save_file(golden_state(), "whole.safetensors")
    Path("page.ckpt").write_text("<!DOCTYPE html><html>Sign in</html>")
    Path("pointer.ckpt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    Path("empty.ckpt").write_bytes(b"")
    Path("noise.ckpt").write_bytes(bytes(5000))
    for name in ("whole.ckpt", "whole.safetensors"):
        Path(name.replace("whole", "cut")).write_bytes(Path(name).read_bytes()[:-2000])
    torch.save({"state_dict": Bomb()}, "bomb.ckpt")
    Path("old_bomb.ckpt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save([1, 2], "list.ckpt")
    torch.save({"state_dict": golden_state() | {BIAS: torch.full((4,), float("nan"))}}, "nan_bias.ckpt")
    torch.save({"state_dict": golden_state() | {BIAS: torch.arange(4)}}, "whole_bias.ckpt")
    for name, says in {
        "page.ckpt": "web page",
        "pointer.ckpt": "git-lfs",
        "empty.ckpt": "truncated",
        "noise.ckpt": "truncated",
        "cut.ckpt": "truncated",
        "cut.safetensors": "truncated",
        "bomb.ckpt": "would run code",
        "old_bomb.ckpt": "would run code",
        "list.ckpt": "state_dict",
        "nan_bias.ckpt": "not finite",
        "whole_bias.ckpt": "torch.int64",
        "nowhere.ckpt": "No such file",
    }.items():
        with pytest.raises(BadInput, match=says) as caught:
            convert(Path(name), tmp_path / "base", BaseConfig(**SMALL), torch.float32)
        assert name in str(caught.value) and "\n" not in str(caught.value)
        assert not Path("exploded").exists() and not Path("base").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".base")]


def test_a_finished_folder_survives_a_failed_conversion(tmp_path, monkeypatch):
    torch.save({"state_dict": golden_state()}, tmp_path / "model.ckpt")
    out = tmp_path / "base"
    convert(tmp_path / "model.ckpt", out, BaseConfig(**SMALL), torch.float32)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    written = []

    def fails_at_the_second_part(*args):
        written.append(args)
        if len(written) == 2:
            raise OSError("No space left on device")
        return real(*args)

    real = convert_ckpt.write_part
    monkeypatch.setattr(convert_ckpt, "write_part", fails_at_the_second_part)
    with pytest.raises(OSError):
        convert(tmp_path / "model.ckpt", out, BaseConfig(**SMALL), torch.bfloat16)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    monkeypatch.setattr(convert_ckpt, "write_part", real)
    convert(tmp_path / "model.ckpt", out, BaseConfig(**SMALL), torch.bfloat16)      # a whole one replaces it
    assert (out / "unet.safetensors").read_bytes() != before["unet.safetensors"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "model.ckpt"]
    shutil.rmtree(out)
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(BadInput, match="not a base folder"):
        convert(tmp_path / "model.ckpt", out, BaseConfig(**SMALL), torch.float32)
    assert (out / "thesis.txt").read_text() == "mine"


def test_command_line_refuses_in_one_line(tmp_path):
    (tmp_path / "model.ckpt").write_text("<html>")
    done = run("convert_ckpt.py", "model.ckpt", "--out", "base", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "model.ckpt" in done.stderr
