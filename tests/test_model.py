"""Parity with the public VideoCrafter2 reference (tests/golden), through the converter; sizes of the full network."""
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from convert_ckpt import convert
from model import (BadInput, BaseConfig, TextConfig, Tokenizer, UNet, UNetConfig, VAEConfig, VOCAB_SIZE, load_base)
from sample import ddim, ddim_steps

GOLDEN = Path(__file__).parent / "golden"
SMALL = dict(text=TextConfig(width=64, heads=4, layers=2),
             vae=VAEConfig(channels=32, channel_mult=(1, 2, 2), num_res_blocks=1),
             unet=UNetConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2), head_channels=16,
                             context_dim=64))


def golden_weight(key, shape):
    """The weight that the golden numbers were computed with; the formula is the reference's own."""
    w = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith("bias"):
        w = 0.1 * w
    elif len(shape) < 2:
        w = 1 + 0.1 * w
    else:
        w = w / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(w, dtype=np.float32))


def golden_state():
    reference = json.loads((GOLDEN / "reference.json").read_text())
    return {key: golden_weight(key, shape) for part in reference.values() for key, shape in part["shapes"].items()}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "reference.safetensors")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The reference's weights under official names, taken through the converter."""
    folder = tmp_path_factory.mktemp("golden")
    torch.save({"state_dict": golden_state()}, folder / "model.ckpt")
    convert(folder / "model.ckpt", folder / "base", BaseConfig(**SMALL), torch.float32)
    return load_base(folder / "base")


def error(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@torch.no_grad()
def test_unet_equals_reference(reference, golden):
    y = reference.unet(golden["unet.x"], golden["unet.t"], golden["unet.fps"], golden["unet.context"])
    assert error(y, golden["unet.y"]) <= 1e-5


@torch.no_grad()
def test_vae_equals_reference(reference, golden):
    assert error(torch.cat(reference.vae.moments(golden["vae.image"]), 1), golden["vae.moments"]) <= 1e-5
    assert error(reference.vae.decode(golden["vae.z"] * reference.vae.latent_factor), golden["vae.decoded"]) <= 1e-5


@torch.no_grad()
def test_text_equals_reference(reference, golden):
    prompts = json.loads((GOLDEN / "reference.json").read_text())["text"]["prompts"]
    tokens = Tokenizer()(prompts)
    assert torch.equal(tokens, golden["text.tokens"])
    assert error(reference.text_encoder(tokens), golden["text.y"]) <= 1e-5


def test_schedule_equals_reference(reference, golden):
    schedule = reference.schedule
    assert error(schedule.alpha_bar, golden["schedule.alphas_cumprod"]) <= 1e-5
    assert error(schedule.scale, golden["schedule.scale_arr"]) <= 1e-5
    z_t = schedule.add_noise(golden["q_sample.z0"], golden["q_sample.t"], golden["q_sample.eps"])
    assert error(z_t, golden["q_sample.zt"]) <= 1e-5
    for eta in (0, 1):
        t, *_, sigma = ddim_steps(schedule, 50, eta)
        assert t.flip(0).tolist() == golden["ddim50.timesteps"].tolist()
        assert torch.allclose(sigma.flip(0), golden[f"ddim50.eta{eta}.sigmas"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("eta", [0, 1])
def test_sampler_equals_reference(reference, golden, eta):
    noise = iter(golden["ddim10.eta1.noise"])
    z_0 = ddim(reference.unet, reference.schedule, golden["ddim.x_T"], lambda: next(noise), golden["ddim.context"],
               golden["ddim.uncond"], torch.tensor([28, 28]), steps=10, cfg=12.0, eta=eta)
    assert error(z_0, golden[f"ddim10.eta{eta}.z0"]) <= 1e-4


def test_full_unet_has_1413_28_million_parameters():
    with torch.device("meta"):
        unet = UNet(UNetConfig())
    assert sum(p.numel() for p in unet.parameters()) == 1_413_284_420
    assert len(unet.state_dict()) == 1484


def test_frames_height_and_width_are_free(base):
    """Any frame count runs, and a clip's result does not depend on what else is in the batch."""
    z = torch.randn(2, 4, 5, 4, 8)
    t, fps, context = torch.tensor([3, 900]), torch.tensor([8, 8]), torch.randn(2, 77, 32)
    with torch.no_grad():
        both = base.unet(z, t, fps, context)
        alone = base.unet(z[1:], t[1:], fps[1:], context[1:])
    assert torch.allclose(both[1:], alone, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Text


def test_placeholder_becomes_one_learned_token():
    tokenizer = Tokenizer(["V*", "<new1>"])
    dog = tokenizer.encode("a dog")
    assert tokenizer.encode("a V* dog") == [dog[0], VOCAB_SIZE, dog[1]]
    assert tokenizer.encode("a V*, dog")[1] == VOCAB_SIZE
    assert tokenizer.encode("a <new1> dog")[1] == VOCAB_SIZE + 1
    assert all(i < VOCAB_SIZE for i in tokenizer.encode("a AV* dog"))       # part of another word
    assert tokenizer.encode("A Dog") == dog


def test_learned_row_replaces_only_its_token(base):
    tokenizer = Tokenizer(["V*"])
    dog = tokenizer.encode("dog")[0]
    row = base.text_encoder.token_embedding.weight[[dog]]
    with torch.no_grad():
        as_word = base.text_encoder(tokenizer(["a dog"]))
        as_learned = base.text_encoder(tokenizer(["a V*"]), row)
        other = base.text_encoder(tokenizer(["a V*"]), row + 1)
    assert torch.equal(as_word, as_learned)
    assert torch.equal(other[:, :2], as_word[:, :2]) and not torch.allclose(other[:, 2:], as_word[:, 2:])


# ---------------------------------------------------------------------------------------------------------------------
# Loading a base
