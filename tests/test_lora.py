"""The LoRA on the whole UNet: where it is, that it starts at zero, merges exactly, is saved and loaded.

Eq. 2 itself is in test_paper.py. `targets` is the paper's choice, "all", or its Table 2's ablation, "cross".
"""
import json

import pytest
import torch
from safetensors import safe_open

from lora import MergedLoRA, add_lora, target_names
from makers import random_subject
from model import UNet, UNetConfig
from support.files import load_base, load_subject, save_subject

TARGETS = pytest.mark.parametrize("targets", ["all", "cross"])


@pytest.fixture()
def inputs():
    """z_t, t, fps, context"""
    torch.manual_seed(1)
    return torch.randn(2, 4, 3, 4, 6), torch.tensor([10, 800]), torch.tensor([8, 8]), torch.randn(2, 77, 32)


def live_layers(unet, subject, targets):
    """The subject's LoRA beside the weights, as in training."""
    layers = add_lora(unet, 2, targets)
    assert layers.keys() == subject.lora.keys()
    for name, (A, B) in subject.lora.items():
        layers[name].lora_A.data, layers[name].lora_B.data = A, B
    return layers


def test_cross_has_the_48_layers_of_the_cross_attention():
    with torch.device("meta"):
        names = target_names(UNet(UNetConfig()), "cross")
    assert len(names) == 48 and all(".attn2.to_" in name for name in names)


@TARGETS
def test_step_zero_is_the_base_exactly(base, inputs, targets):
    with torch.no_grad():
        plain = base.unet(*inputs)
        add_lora(base.unet, 2, targets)
        assert torch.equal(base.unet(*inputs), plain)


@TARGETS
def test_merged_equals_unmerged(base, base_folder, inputs, targets):
    subject, live = random_subject(base, targets=targets), load_base(base_folder)
    live_lora = live_layers(live.unet, subject, targets)
    merged_lora = MergedLoRA(base.unet, [subject])
    with torch.no_grad():
        plain = base.unet(*inputs)
        for lam in (1.0, 0.4):
            live_lora.set(lam)
            merged_lora.set(lam)
            merged, unmerged = base.unet(*inputs), live.unet(*inputs)
            assert torch.allclose(merged, unmerged, atol=1e-4)
            assert not torch.allclose(merged, plain, atol=1e-2)


def test_lambda_zero_restores_the_base_bit_for_bit(base, inputs):
    """Also with two subjects, of other ranks and with other layers."""
    before = {name: p.clone() for name, p in base.unet.state_dict().items()}
    merged = MergedLoRA(base.unet, [random_subject(base), random_subject(base, rank=3, targets="cross")])
    with torch.no_grad():
        plain = base.unet(*inputs)
        for lam in (0.4, 0.8, -1.0):
            merged.set(lam)
        assert not torch.equal(base.unet(*inputs), plain)
        merged.set(0)
        assert torch.equal(base.unet(*inputs), plain)
    after = base.unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(p, before[name]) for name, p in after.items())


def test_a_merge_that_fails_half_way_is_taken_back(base):
    """If memory runs out at the fifth of the matrices, lambda = 0 still restores every one."""
    class TooLarge:
        def to(self, device):
            raise MemoryError

    weights = base.unet.state_dict()    # references, not copies
    before = {name: weight.clone() for name, weight in weights.items()}
    subject = random_subject(base)
    fifth = list(subject.lora)[4]
    subject.lora[fifth] = TooLarge(), TooLarge()
    merged = MergedLoRA(base.unet, [subject])
    with pytest.raises(MemoryError):
        merged.set(0.4)
    assert sum(not torch.equal(weight, before[name]) for name, weight in weights.items()) == 4
    merged.set(0)
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())


# ------------------------------------------------------------------------------------------------------------
# A subject's file


@TARGETS
def test_saved_and_loaded_equals_live(base, tmp_path, targets):
    subject = random_subject(base, targets=targets)
    save_subject(tmp_path / "subject.safetensors", subject)
    loaded = load_subject(tmp_path / "subject.safetensors", base)
    assert loaded.fingerprint() == subject.fingerprint()
    assert (loaded.placeholder, loaded.class_word, loaded.steps) == ("V*", "dog", 7)
    assert loaded.settings == subject.settings
    assert list(loaded.lora) == list(subject.lora)
    before, after = subject.tensors(), loaded.tensors()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [path.name for path in tmp_path.iterdir()] == ["subject.safetensors"]


def test_file_has_pefts_names_and_an_alpha_that_equals_the_rank(base, tmp_path):
    save_subject(tmp_path / "s.safetensors", random_subject(base, rank=3))
    with safe_open(tmp_path / "s.safetensors", "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    expected = {"v_star"}
    for name in target_names(base.unet):
        expected |= {f"unet.{name}.lora_A.weight", f"unet.{name}.lora_B.weight"}
    assert names == expected
    assert json.loads(metadata["layers"]) == {name: 3 for name in target_names(base.unet)}
    assert metadata["lora_alpha"] == "3"
