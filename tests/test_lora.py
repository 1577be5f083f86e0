"""Eq. 2: where the update is, that it starts at nothing, merges exactly, is saved and loaded, and alone receives gradients."""
import pytest
import torch

from conftest import write_base
from lora import LoRALinear, MergedLoRA, Subject, add_lora, class_embedding, load_subject, save_subject, target_names
from model import BadInput, SpatialTransformer, TemporalTransformer, Tokenizer, UNet, UNetConfig, load_base


@pytest.fixture()
def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 4, 3, 4, 6), torch.tensor([10, 800]), torch.tensor([8, 8]), torch.randn(2, 77, 32)


def random_subject(base, rank=2, scale=0.3):
    torch.manual_seed(2)
    lora = {}
    for name in target_names(base.unet):
        linear = base.unet.get_submodule(name)
        lora[name] = (scale * torch.randn(rank, linear.in_features), scale * torch.randn(linear.out_features, rank))
    return Subject("V*", "dog", rank, base.config.name, base.config.fingerprint, 7, lora=lora, v_star=torch.randn(1, 32))


def test_full_unet_has_96_targets_all_spatial():
    with torch.device("meta"):
        unet = UNet(UNetConfig())
        layers = add_lora(unet, rank=4)
    spatial = [m for m in unet.modules() if isinstance(m, SpatialTransformer)]
    temporal = [m for m in unet.modules() if isinstance(m, TemporalTransformer)]
    assert len(layers) == 96 and len(spatial) == 16 and len(temporal) == 17
    assert sum(isinstance(x, LoRALinear) for m in spatial for x in m.modules()) == 96
    assert not any(isinstance(x, LoRALinear) for m in temporal for x in m.modules())


def test_step_zero_is_the_base_exactly(base, inputs):
    with torch.no_grad():
        plain = base.unet(*inputs)
        add_lora(base.unet, rank=2)
        assert torch.equal(base.unet(*inputs), plain)


def test_merged_equals_unmerged(base, base_folder, inputs):
    subject = random_subject(base)
    live = load_base(base_folder)
    for name, layer in add_lora(live.unet, subject.rank).items():
        layer.lora_A.data, layer.lora_B.data = subject.lora[name]
    with torch.no_grad():
        plain = base.unet(*inputs)
        MergedLoRA(base.unet, subject).set(1.0)
        merged, unmerged = base.unet(*inputs), live.unet(*inputs)
    assert torch.allclose(merged, unmerged, atol=1e-4)
    assert not torch.allclose(merged, plain, atol=1e-2)


def test_lambda_zero_restores_the_base_bit_for_bit(base, inputs):
    before = {name: p.clone() for name, p in base.unet.state_dict().items()}
    strength = MergedLoRA(base.unet, random_subject(base))
    with torch.no_grad():
        plain = base.unet(*inputs)
        for lam in (0.4, 0.8, -1.0):
            strength.set(lam)
        assert not torch.equal(base.unet(*inputs), plain)
        strength.set(0)
        assert torch.equal(base.unet(*inputs), plain)
    assert all(torch.equal(p, before[name]) for name, p in base.unet.state_dict().items())


def test_update_is_linear_in_lambda(base):
    subject, name = random_subject(base), target_names(base.unet)[0]
    W = base.unet.get_submodule(name).weight
    W_0, (A, B) = W.clone(), subject.lora[name]
    strength = MergedLoRA(base.unet, subject)
    for lam in (0.4, 0.8):
        strength.set(lam)
        assert torch.allclose(W, W_0 + lam * B @ A, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_exactly_lora_and_v_star(base, inputs, checkpointing):
    z_t, t, fps, _ = inputs
    layers = add_lora(base.unet, rank=2)
    base.unet.grad_checkpointing = checkpointing
    v_star = torch.nn.Parameter(class_embedding(base.text_encoder, "dog"))
    for layer in layers.values():  # B = 0 would leave A without a gradient at step 0
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    context = base.text_encoder(Tokenizer(["V*"])(["a V* dog", "a V* cat"]), v_star)
    base.unet(z_t, t, fps, context).pow(2).mean().backward()
    trained = {id(p) for layer in layers.values() for p in (layer.lora_A, layer.lora_B)} | {id(v_star)}
    for network in (base.unet, base.text_encoder, base.vae):
        for name, p in network.named_parameters():
            assert (p.grad is not None and p.grad.abs().sum() > 0) == (id(p) in trained), name
    assert v_star.grad.abs().sum() > 0


def test_checkpointing_gives_the_same_gradients(base_folder, inputs):
    grads = []
    for checkpointing in (False, True):
        base = load_base(base_folder)
        torch.manual_seed(0)
        layers = add_lora(base.unet, rank=2)
        base.unet.grad_checkpointing = checkpointing
        base.unet(*inputs).pow(2).mean().backward()
        grads.append(torch.cat([layer.lora_B.grad.flatten() for layer in layers.values()]))
    assert grads[0].abs().sum() > 0 and torch.allclose(*grads, atol=1e-6)


def test_saved_and_loaded_equals_live(base, tmp_path):
    subject = random_subject(base)
    save_subject(tmp_path / "subject.safetensors", subject)
    loaded = load_subject(tmp_path / "subject.safetensors", base)
    assert loaded.fingerprint() == subject.fingerprint()
    assert (loaded.placeholder, loaded.class_word, loaded.rank, loaded.steps) == ("V*", "dog", 2, 7)
    assert [p.name for p in tmp_path.iterdir()] == ["subject.safetensors"]


def test_file_has_peft_names_and_says_alpha_equals_rank(base, tmp_path):
    from safetensors import safe_open
    save_subject(tmp_path / "s.safetensors", random_subject(base))
    with safe_open(tmp_path / "s.safetensors", "pt") as f:
        names, meta = set(f.keys()), f.metadata()
    assert names == {"v_star"} | {f"unet.{n}.lora_{x}.weight" for n in target_names(base.unet) for x in "AB"}
    assert meta["lora_alpha"] == meta["rank"] == "2"


def test_another_bases_subject_is_refused(base, tmp_path):
    other = load_base(write_base(tmp_path / "other", seed=1))
    save_subject(tmp_path / "s.safetensors", random_subject(other))
    with pytest.raises(BadInput, match="was learned on the base tiny1"):
        load_subject(tmp_path / "s.safetensors", base)


def test_damaged_subjects_are_refused(base, tmp_path):
    from safetensors.torch import load_file, save_file
    good = tmp_path / "good.safetensors"
    save_subject(good, random_subject(base))
    cases = {"cut": good.read_bytes()[:-10], "text": b"not a subject", "empty": b""}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=name):
            load_subject(tmp_path / name, base)
    save_file(load_file(good), tmp_path / "headless")
    with pytest.raises(BadInput, match="header"):
        load_subject(tmp_path / "headless", base)
    subject = random_subject(base)
    subject.v_star[0, 0] = float("nan")
    save_subject(tmp_path / "nan", subject)
    with pytest.raises(BadInput, match="v_star"):
        load_subject(tmp_path / "nan", base)
    subject = random_subject(base)
    subject.lora.popitem()
    save_subject(tmp_path / "fewer", subject)
    with pytest.raises(BadInput, match="missing"):
        load_subject(tmp_path / "fewer", base)
