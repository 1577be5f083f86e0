"""Eq. 2: where the update is, that it starts at nothing, merges exactly, is saved and loaded, and alone receives gradients."""
import pytest
import torch

from conftest import write_base
from lora import (TENSORS, LiveLoRA, LoRALinear, MergedLoRA, Subject, add_lora, add_updates, class_embedding, expected_shapes,
                  load_subject, save_subject, target_names)
from model import BadInput, SpatialTransformer, TemporalTransformer, Tokenizer, UNet, UNetConfig, load_base


@pytest.fixture()
def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 4, 3, 4, 6), torch.tensor([10, 800]), torch.tensor([8, 8]), torch.randn(2, 77, 32)


METHODS = ["customcrafter", "cross", "custom_diffusion", "dreamvideo"]  # "cross": the paper's with --targets cross


def random_subject(base, rank=2, scale=0.3, method="customcrafter"):
    torch.manual_seed(2)
    targets, method = ("cross", "customcrafter") if method == "cross" else ("all", method)
    subject = Subject("V*", "dog", rank, base.config.name, base.config.fingerprint, 7, method, {"targets": targets},
                      v_star=torch.randn(1, base.config.text.width))
    kind, shapes = expected_shapes(subject, base.unet, "")
    setattr(subject, kind, {name: tuple(scale * torch.randn(shape) for shape in layer) for name, layer in shapes.items()})
    return subject


def live_layers(unet, subject):
    """The subject's numbers beside the weights, as in training."""
    kind, layers = add_updates(unet, subject.method, subject.rank, subject.settings["targets"])
    for name, layer in layers.items():
        for p, value in zip(layer.tensors(), getattr(subject, kind)[name]):
            p.data = value
    return layers


def test_full_unet_has_96_targets_all_spatial():
    with torch.device("meta"):
        unet = UNet(UNetConfig())
        layers = add_lora(unet, rank=4)
    spatial = [m for m in unet.modules() if isinstance(m, SpatialTransformer)]
    temporal = [m for m in unet.modules() if isinstance(m, TemporalTransformer)]
    assert len(layers) == 96 and len(spatial) == 16 and len(temporal) == 17
    assert sum(isinstance(x, LoRALinear) for m in spatial for x in m.modules()) == 96
    assert not any(isinstance(x, LoRALinear) for m in temporal for x in m.modules())


@pytest.mark.parametrize("method, count, size", [("cross", 48, 2), ("custom_diffusion", 32, 1), ("dreamvideo", 16, 4)])
def test_full_unet_has_the_baselines_targets(method, count, size):
    with torch.device("meta"):
        unet = UNet(UNetConfig())
        kind, layers = add_updates(unet, "customcrafter" if method == "cross" else method, 4, "cross")
    assert len(layers) == count and all(len(layer.tensors()) == size == len(TENSORS[kind]) for layer in layers.values())
    if method == "dreamvideo":
        assert {layer.down.weight.shape for layer in layers.values()} == {(160, 320), (320, 640), (640, 1280)}
    if method == "custom_diffusion":
        assert {layer.delta.shape for layer in layers.values()} == {(320, 1024), (640, 1024), (1280, 1024)}


@pytest.mark.parametrize("method", METHODS)
def test_step_zero_is_the_base_exactly(base, inputs, method):
    with torch.no_grad():
        plain = base.unet(*inputs)
        add_updates(base.unet, "customcrafter" if method == "cross" else method, 2, "cross")
        assert torch.equal(base.unet(*inputs), plain)


@pytest.mark.parametrize("method", METHODS)
def test_merged_equals_unmerged(base, base_folder, inputs, method):
    subject = random_subject(base, method=method)
    live = load_base(base_folder)
    layers = live_layers(live.unet, subject)
    with torch.no_grad():
        plain = base.unet(*inputs)
        for lam in (1.0, 0.4):
            MergedLoRA(base.unet, subject).set(lam)
            LiveLoRA(layers.values()).set(lam)
            merged, unmerged = base.unet(*inputs), live.unet(*inputs)
            assert torch.allclose(merged, unmerged, atol=1e-4)
            assert not torch.allclose(merged, plain, atol=1e-2)
            base = load_base(base_folder)


@pytest.mark.parametrize("method", METHODS)
def test_lambda_zero_restores_the_base_bit_for_bit(base, inputs, method):
    before = {name: p.clone() for name, p in base.unet.state_dict().items()}
    strength = MergedLoRA(base.unet, random_subject(base, method=method), random_subject(base, scale=0.1, method=method))
    with torch.no_grad():
        plain = base.unet(*inputs)
        for lam in (0.4, 0.8, -1.0):
            strength.set(lam)
        assert not torch.equal(base.unet(*inputs), plain)
        strength.set(0)
        assert torch.equal(base.unet(*inputs), plain)
    after = base.unet.state_dict()
    assert list(after) == list(before) and all(torch.equal(p, before[name]) for name, p in after.items())


def test_dreamvideos_adapter_reads_what_is_not_normalised(base):
    """x <- attn2(norm2(x), text) + x + lambda * adapter(x), against the formula; of two subjects both adapters count."""
    first, second = (random_subject(base, scale=scale, method="dreamvideo") for scale in (0.3, 0.2))
    name = next(iter(first.adapters))
    block = base.unet.get_submodule(name)
    x, text = torch.randn(2, 6, block.norm2.normalized_shape[0]), torch.randn(2, 77, 32)
    with torch.no_grad():
        h = block.norm1(x)
        h = x + block.attn1(h, h)
        added = sum(torch.nn.functional.gelu(h @ down.T + b) @ up.T + c for down, b, up, c in (s.adapters[name] for s in (first, second)))
        h = block.attn2(block.norm2(h), text) + h + 0.4 * added
        MergedLoRA(base.unet, first, second).set(0.4)
        assert torch.allclose(block(x, text), h + block.ff(block.norm3(h)), atol=1e-4)


def test_update_is_linear_in_lambda(base):
    subject, name = random_subject(base), target_names(base.unet)[0]
    W = base.unet.get_submodule(name).weight
    W_0, (A, B) = W.clone(), subject.lora[name]
    strength = MergedLoRA(base.unet, subject)
    for lam in (0.4, 0.8):
        strength.set(lam)
        assert torch.allclose(W, W_0 + lam * B @ A, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_reach_exactly_what_is_learned(base, inputs, method, checkpointing):
    z_t, t, fps, _ = inputs
    layers = live_layers(base.unet, random_subject(base, method=method))  # no zeros, which would leave others without a gradient
    base.unet.grad_checkpointing = checkpointing
    v_star = torch.nn.Parameter(class_embedding(base.text_encoder, "dog"))
    context = base.text_encoder(Tokenizer(["V*"])(["a V* dog", "a V* cat"]), v_star)
    base.unet(z_t, t, fps, context).pow(2).mean().backward()
    trained = {id(p) for layer in layers.values() for p in layer.tensors()} | {id(v_star)}
    for network in (base.unet, base.text_encoder, base.vae):
        for name, p in network.named_parameters():
            assert (p.grad is not None and p.grad.abs().sum() > 0) == (id(p) in trained), name
    assert v_star.grad.abs().sum() > 0


def test_custom_diffusion_learns_nothing_from_the_first_token(base):
    layer = next(iter(live_layers(base.unet, random_subject(base, method="custom_diffusion")).values()))
    text = torch.randn(1, 5, 32, requires_grad=True)
    layer(text).pow(2).sum().backward()
    assert not text.grad[:, 0].any() and text.grad[:, 1:].abs().min() > 0
    rest, layer.delta.grad = layer.delta.grad, None
    y = layer.base(text[:, 1:]) + torch.nn.functional.linear(text[:, 1:], layer.delta)
    y.pow(2).sum().backward()
    assert torch.allclose(layer.delta.grad, rest, atol=1e-4)


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


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_equals_live(base, tmp_path, method):
    subject = random_subject(base, method=method)
    save_subject(tmp_path / "subject.safetensors", subject)
    loaded = load_subject(tmp_path / "subject.safetensors", base)
    assert loaded.fingerprint() == subject.fingerprint()
    assert (loaded.placeholder, loaded.class_word, loaded.rank, loaded.steps, loaded.method) == ("V*", "dog", 2, 7, subject.method)
    assert loaded.tensors().keys() == subject.tensors().keys()
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
