"""The converter: strict both ways on the official names, and refusals that name what a file looks like."""
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert_ckpt
from convert_ckpt import convert, match_names
from makers import OFFICIAL, SMALL, Bomb, golden_state
from support.cli import BadInput
from support.config import BaseConfig, load_config
from support.files import PARTS, load_base


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


@pytest.mark.parametrize("shapes, message", [
    ({name: shape for name, shape in OFFICIAL.items() if name != BIAS}, "1 missing, such as conv_out.bias"),
    (OFFICIAL | {"model.diffusion_model.extra": (3,)}, "1 unknown names.* model.diffusion_model.extra"),
    (OFFICIAL | {"model_ema.decay": ()}, "1 unknown names.* model_ema.decay"),
    (OFFICIAL | {BIAS: (5,)}, rf"{BIAS}.*\(5,\).*\(4,\)"),
    (OFFICIAL | {"image_proj_model.latents": (1, 16, 1024)}, "looks like an image-to-video checkpoint"),
    (OFFICIAL | {VIDEOCRAFTER1: (33, 64)}, "looks like a VideoCrafter1 checkpoint"),
    (IMAGE_MODEL, "looks like an image model"),
    ({"unet.a.lora_A.weight": (4, 320)}, "looks like a LoRA"),
    ({"down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)}, "looks like a diffusers model"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_other_checkpoints_are_told_apart(shapes, message):
    with pytest.raises(BadInput, match=message):
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
    names = sorted(path.name for path in (tmp_path / "base").glob("[!.]*"))
    assert names == ["config.json", "text_encoder.safetensors", "unet.safetensors", "vae.safetensors"]
    load_base(tmp_path / "base")


# ------------------------------------------------------------------------------------------------------------
# The fingerprint


@pytest.fixture()
def convert_state(tmp_path):
    """Converts official name -> tensor into tmp_path/OUT -> that folder."""
    def convert_state(state, out="base", dtype=torch.float32):
        torch.save({"state_dict": state}, tmp_path / "model.ckpt")
        convert(tmp_path / "model.ckpt", tmp_path / out, BaseConfig(**SMALL), dtype)
        return tmp_path / out
    return convert_state


def test_the_fingerprint_is_of_the_weights_not_of_their_storage(convert_state):
    fingerprints = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        fingerprints.append(load_config(convert_state(golden_state(), str(dtype), dtype)).fingerprint)
    assert len(set(fingerprints)) == 1

    # One value of a large matrix of any network, changed by less than bfloat16 can show.
    for number, name in enumerate((f"{ATTENTION}.to_q.weight", "first_stage_model.decoder.conv_in.weight",
                                   "cond_stage_model.model.token_embedding.weight", BIAS)):
        state = golden_state()
        state[name].view(-1)[3] *= 1.0001
        fingerprints.append(load_config(convert_state(state, str(number), torch.bfloat16)).fingerprint)
    assert len(set(fingerprints)) == 5


def test_a_mixture_of_two_bases_is_refused(convert_state):
    mine = convert_state(golden_state(), "mine")
    other = convert_state(golden_state() | {BIAS: torch.ones(4)}, "other")
    for file in ("config.json", *(f"{part}.safetensors" for part in PARTS)):
        mixed = shutil.copytree(mine, mine.with_name(f"mixed-{file}"))
        shutil.copyfile(other / file, mixed / file)
        with pytest.raises(BadInput, match="different bases"):
            load_base(mixed)


def test_without_fingerprints_in_its_headers_a_base_is_known_by_all_weights(convert_state):
    """Another program may have written the files again, one or all, and may have changed a weight."""
    folder = convert_state(golden_state())
    fingerprints = [load_base(folder).config.fingerprint]
    for change in (0, 1):
        for path in [folder / f"{part}.safetensors" for part in PARTS]:
            state = load_file(path)
            max(state.values(), key=torch.numel).view(-1)[7] += change
            save_file(state, path)
            fingerprints.append(load_base(folder).config.fingerprint)
    assert len(set(fingerprints[:4])) == 1 and len(set(fingerprints)) == 4


# ------------------------------------------------------------------------------------------------------------
# Refusals, and files that stay


def test_files_that_are_not_checkpoints_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = golden_state()
    torch.save({"state_dict": state}, "whole.ckpt")
    save_file(state, "whole.safetensors")
    Path("page.ckpt").write_text("<!DOCTYPE html><html>Sign in</html>")
    Path("pointer.ckpt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    Path("empty.ckpt").write_bytes(b"")
    Path("noise.ckpt").write_bytes(bytes(5000))
    for name in ("whole.ckpt", "whole.safetensors"):
        Path(name.replace("whole", "cut")).write_bytes(Path(name).read_bytes()[:-2000])
    torch.save({"state_dict": Bomb()}, "bomb.ckpt")
    Path("old_bomb.ckpt").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save([1, 2], "list.ckpt")
    torch.save({"state_dict": state | {BIAS: torch.full((4,), float("nan"))}}, "nan_bias.ckpt")
    for name, message in {
        "page.ckpt": "web page",
        "pointer.ckpt": "git-lfs",
        "empty.ckpt": "damaged",
        "noise.ckpt": "damaged",
        "cut.ckpt": "truncated",
        "cut.safetensors": "truncated",
        "bomb.ckpt": "would run code",
        "old_bomb.ckpt": "would run code",
        "list.ckpt": "damaged",
        "nan_bias.ckpt": "not finite",
        "nowhere.ckpt": "No such file",
    }.items():
        with pytest.raises(BadInput, match=message) as caught:
            convert(Path(name), tmp_path / "base", BaseConfig(**SMALL), torch.float32)
        assert name in str(caught.value) and "\n" not in str(caught.value)
        assert not Path("exploded").exists() and not (tmp_path / "base").exists()


def test_a_conversion_that_fails_leaves_nothing(convert_state, tmp_path, monkeypatch):
    written = []

    def fails_at_the_second_network(*args):
        written.append(args)
        if len(written) == 2:
            raise OSError("the disk is gone")
        save_file(*args)

    monkeypatch.setattr(convert_ckpt, "save_file", fails_at_the_second_network)
    with pytest.raises(OSError, match="the disk is gone"):
        convert_state(golden_state())
    assert {path.name for path in tmp_path.iterdir()} == {"model.ckpt", ".writer.lock"}


def test_an_existing_folder_is_never_replaced(convert_state, tmp_path, call):
    """Neither before the conversion, nor if another run has made it meanwhile."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "thesis.txt").write_text("mine")
    with pytest.raises(OSError, match="not empty"):
        convert_state(golden_state())
    error = call(convert_ckpt, "model.ckpt", "--out", "base", code=2).err
    assert error == "error: --out base: exists already; name another folder, or move this one away\n"
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["thesis.txt"]
