"""Parity with the public VideoCrafter2 reference (tests/golden), through the converter."""
import json

import pytest
import torch
from safetensors.torch import load_file

from convert_ckpt import convert
from makers import GOLDEN, SMALL, golden_state
from model import Tokenizer
from sample import ddim, ddim_steps
from support.config import BaseConfig
from support.files import load_base


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
    decoded = reference.vae.decode(golden["vae.z"] * reference.vae.latent_factor)
    assert error(decoded, golden["vae.decoded"]) <= 1e-5


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


@pytest.mark.parametrize("eta", [0, 1])
def test_ddims_steps_equal_reference(reference, golden, eta):
    t, *_, sigma = zip(*reversed(ddim_steps(reference.schedule, 50, eta)))
    assert list(t) == golden["ddim50.timesteps"].tolist()
    assert torch.allclose(torch.tensor(sigma), golden[f"ddim50.eta{eta}.sigmas"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("eta", [0, 1])
def test_sampler_equals_reference(reference, golden, eta):
    noise = iter(golden["ddim10.eta1.noise"])
    fps = torch.tensor([28, 28])
    z_0 = ddim(reference.unet, reference.schedule, golden["ddim.x_T"], lambda: next(noise),
               golden["ddim.context"], golden["ddim.uncond"], fps, steps=10, cfg=12.0, eta=eta)
    assert error(z_0, golden[f"ddim10.eta{eta}.z0"]) <= 1e-4
