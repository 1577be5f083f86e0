"""Every method's update: where it is, that it starts at nothing, merges exactly, is saved and loaded.

Eq. 2 itself is in test_paper.py. The methods are the paper's, its ablation "cross", and the two in paper/.
"""
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from cli import BadInput
from files import load_base, load_subject, save_subject, subject_fingerprint, subject_tensors
import lora
from lora import LiveLoRA, MergedLoRA, add_lora, class_embedding, target_names
from makers import random_subject, write_base
from model import Tokenizer, UNet, UNetConfig
from paper.baselines import METHODS, MergedSubjects
from train import SubjectLoss

EVERY_METHOD = ["customcrafter", "cross", "custom_diffusion", "dreamvideo"]


@pytest.fixture()
def inputs():
    """z_t, t, fps, context"""
    torch.manual_seed(1)
    return torch.randn(2, 4, 3, 4, 6), torch.tensor([10, 800]), torch.tensor([8, 8]), torch.randn(2, 77, 32)


def add_layers(unet, method, rank, targets="all"):
    if method == "cross":
        method, targets = "customcrafter", "cross"
    return METHODS[method].add_layers(unet, rank, targets)


def live_layers(unet, subject):
    """The subject's numbers beside the weights, as in training."""
    layers = METHODS[subject.method].add_layers(unet, subject.rank, subject.settings["targets"])
    for name, layer in layers.items():
        for parameter, value in zip(layer.tensors(), subject.updates[name], strict=True):
            parameter.data = value
    return layers


@pytest.mark.parametrize("method, count, size", [
    ("cross", 48, 2), ("custom_diffusion", 32, 1), ("dreamvideo", 16, 4)])
def test_full_unet_has_the_baselines_targets(method, count, size):
    with torch.device("meta"):
        layers = add_layers(UNet(UNetConfig()), method, 4)
    assert len(layers) == count
    names = METHODS["customcrafter" if method == "cross" else method].tensor_names
    assert all(len(layer.tensors()) == size == len(names) for layer in layers.values())
    if method == "dreamvideo":
        shapes = {layer.down.weight.shape for layer in layers.values()}
        assert shapes == {(160, 320), (320, 640), (640, 1280)}
    if method == "custom_diffusion":
        assert {layer.delta.shape for layer in layers.values()} == {(320, 1024), (640, 1024), (1280, 1024)}


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_step_zero_is_the_base_exactly(base, inputs, method):
    with torch.no_grad():
        plain = base.unet(*inputs)
        add_layers(base.unet, method, 2)
        assert torch.equal(base.unet(*inputs), plain)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_merged_equals_unmerged(base, base_folder, inputs, method):
    subject = random_subject(base, method=method)
    live = load_base(base_folder)
    layers = live_layers(live.unet, subject)
    with torch.no_grad():
        plain = base.unet(*inputs)
        for lam in (1.0, 0.4):
            METHODS[subject.method].merge(base.unet, subject).set(lam)
            LiveLoRA(layers.values()).set(lam)
            merged, unmerged = base.unet(*inputs), live.unet(*inputs)
            assert torch.allclose(merged, unmerged, atol=1e-4)
            assert not torch.allclose(merged, plain, atol=1e-2)
            base = load_base(base_folder)


@pytest.mark.parametrize("method", [*EVERY_METHOD, "a mix"])
def test_lambda_zero_restores_the_base_bit_for_bit(base, inputs, method):
    before = {name: p.clone() for name, p in base.unet.state_dict().items()}
    first, second = ("customcrafter", "dreamvideo") if method == "a mix" else (method, method)
    subjects = [random_subject(base, method=first), random_subject(base, scale=0.1, method=second)]
    merged = MergedSubjects(base.unet, subjects)
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


def test_subjects_of_different_methods_are_added(base, base_folder, inputs):
    """Two methods in one video: the layers of the one and the adapters of the other both count."""
    mixed = [random_subject(base), random_subject(base, method="dreamvideo")]
    live = load_base(base_folder)
    # The adapters come last: until they are in their blocks, attn2 has the name that LoRA looks for.
    layers = [*live_layers(live.unet, mixed[0]).values(), *live_layers(live.unet, mixed[1]).values()]
    LiveLoRA(layers).set(0.4)
    MergedSubjects(base.unet, mixed).set(0.4)
    with torch.no_grad():
        assert torch.allclose(base.unet(*inputs), live.unet(*inputs), atol=1e-4)


def test_dreamvideos_adapter_reads_what_is_not_normalised(base):
    """x <- attn2(norm2(x), text) + x + lambda * adapter(x), as the formula; both subjects' adapters count."""
    subjects = [random_subject(base, scale=scale, method="dreamvideo") for scale in (0.3, 0.2)]
    name = next(iter(subjects[0].updates))
    block = base.unet.get_submodule(name)
    x, text = torch.randn(2, 6, block.norm2.normalized_shape[0]), torch.randn(2, 77, 32)
    with torch.no_grad():
        h = block.norm1(x)
        h = x + block.attn1(h, h)
        added = 0
        for subject in subjects:
            down, down_bias, up, up_bias = subject.updates[name]
            added = added + F.gelu(h @ down.T + down_bias) @ up.T + up_bias
        h = block.attn2(block.norm2(h), text) + h + 0.4 * added
        MergedSubjects(base.unet, subjects).set(0.4)
        assert torch.allclose(block(x, text), h + block.ff(block.norm3(h)), atol=1e-4)


def test_a_merge_that_fails_half_way_is_taken_back(base, monkeypatch):
    """Out of memory at the fifth of the matrices: lambda = 0 still restores every one."""
    before = {name: weight.clone() for name, weight in base.unet.state_dict().items()}
    merged, done, whole_product = MergedLoRA(base.unet, random_subject(base)), [], lora.product

    def product(tensors, device):
        done.append(tensors)
        if len(done) == 5:
            raise MemoryError
        return whole_product(tensors, device)

    with monkeypatch.context() as patch:
        patch.setattr("lora.product", product)
        with pytest.raises(MemoryError):
            merged.set(0.4)
    merged.set(0)
    assert all(torch.equal(weight, before[name]) for name, weight in base.unet.state_dict().items())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", EVERY_METHOD)
def test_gradients_reach_exactly_what_is_learned(base, inputs, method, checkpointing):
    z_t, t, fps, _ = inputs
    # Random numbers, not the zeros of a start, which would leave others without a gradient.
    layers = live_layers(base.unet, random_subject(base, method=method))
    base.unet.grad_checkpointing = checkpointing
    v_star = torch.nn.Parameter(class_embedding(base.text_encoder, "dog"))
    context = base.text_encoder(Tokenizer(["V*"])(["a V* dog", "a V* cat"]), v_star)
    base.unet(z_t, t, fps, context).pow(2).mean().backward()
    trained = {id(v_star)}
    for layer in layers.values():
        trained |= {id(parameter) for parameter in layer.tensors()}
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
    y = layer.linear(text[:, 1:]) + F.linear(text[:, 1:], layer.delta)
    y.pow(2).sum().backward()
    assert torch.allclose(layer.delta.grad, rest, atol=1e-4)


@torch.no_grad()
def test_the_loss_counts_only_where_the_weight_is(base):
    """Custom Diffusion's weight (h, w): 2 in the left half and 0 in the right gives the left half's mean."""
    loss = SubjectLoss(base, torch.randn(1, 32), {}, frames=3, fps=8)
    photos, tokens = torch.rand(1, 3, 32, 48), Tokenizer(["V*"])(["a V* dog"])
    t, eps = torch.tensor([500]), torch.randn(1, 4, 3, 4, 6)
    left, right = torch.zeros(1, 4, 6), torch.zeros(1, 4, 6)
    left[..., :3], right[..., 3:] = 2, 2
    everywhere, on_left, on_right = (loss(photos, tokens, weight, t, eps)[0]
                                     for weight in (torch.ones(1, 4, 6), left, right))
    assert torch.allclose((on_left + on_right) / 2, everywhere) and not torch.allclose(on_left, on_right)


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


# ------------------------------------------------------------------------------------------------------------
# A subject's file


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_saved_and_loaded_equals_live(base, tmp_path, method):
    subject = random_subject(base, method=method)
    save_subject(tmp_path / "subject.safetensors", subject)
    loaded = load_subject(tmp_path / "subject.safetensors", base)
    assert subject_fingerprint(loaded) == subject_fingerprint(subject)
    assert (loaded.placeholder, loaded.class_word, loaded.rank, loaded.steps) == ("V*", "dog", 2, 7)
    assert (loaded.method, loaded.settings) == (subject.method, subject.settings)
    assert loaded.updates.keys() == subject.updates.keys()
    before, after = subject_tensors(subject), subject_tensors(loaded)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [p.name for p in tmp_path.iterdir()] == ["subject.safetensors"]


def test_file_has_peft_names_and_says_alpha_equals_rank(base, tmp_path):
    save_subject(tmp_path / "s.safetensors", random_subject(base))
    with safe_open(tmp_path / "s.safetensors", "pt") as f:
        names, facts = set(f.keys()), f.metadata()
    expected = {"v_star"}
    for name in target_names(base.unet):
        expected |= {f"unet.{name}.lora_A.weight", f"unet.{name}.lora_B.weight"}
    assert names == expected
    assert facts["lora_alpha"] == facts["rank"] == "2"


def test_another_bases_subject_is_refused(base, tmp_path):
    other = load_base(write_base(tmp_path / "other", seed=1))
    save_subject(tmp_path / "s.safetensors", random_subject(other))
    with pytest.raises(BadInput, match="was learned on the base tiny1"):
        load_subject(tmp_path / "s.safetensors", base)
