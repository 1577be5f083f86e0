"""Custom Diffusion and DreamVideo: what they train, in which stages, on which samples; files and sampling."""
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import sample
import train
from data import load_photos
from lora import MergedLoRA, class_embedding
from makers import fork, fork_ranks, random_subject, wait, write_base
from model import Tokenizer, UNet, UNetConfig
from paper import baselines
from paper.baselines import (AdapterLoss, CustomDiffusionLoss, DreamVideoSubject, RescaledSamples,
                             add_full_linears, inserted_adapters, load_dreamvideo, new_adapters)
from support.cli import BadInput
from support.config import SamplingDefaults, TrainingDefaults
from support.files import Subject, find_subjects, load_base, load_subject, save_subject

CUSTOM_DIFFUSION = ["custom_diffusion", "--lr", 1e-3]
DREAMVIDEO = ["dreamvideo", "--lr", 1e-3, "--word_lr", 1e-3, "--word_steps", 3]
FPS = torch.tensor([8, 8])


@pytest.fixture()
def flags(base_folder, photos_folder):
    return ["--base", base_folder, "--images", photos_folder, "--class_word", "dog"]


@pytest.fixture()
def in_process(monkeypatch, tmp_path):
    """Runs a script in this process, in tmp_path."""
    def in_process(script, *flags):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [script.__name__, *map(str, flags)])
        script.main()
    return in_process


@pytest.fixture()
def inputs():
    """z_t, t, fps, context"""
    torch.manual_seed(1)
    return torch.randn(2, 4, 3, 4, 6), torch.tensor([10, 800]), FPS, torch.randn(2, 77, 32)


def randomized(modules):
    """New layers or adapters, with random numbers in place of the zeros of a start."""
    torch.manual_seed(3)
    for module in modules.values():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
    return modules


def random_dreamvideo(base):
    plain = random_subject(base)
    settings = {"targets": "dreamvideo", "stage": 2}
    return DreamVideoSubject("V*", "dog", plain.base_name, plain.base_fingerprint, 7, settings, plain.v_star,
                             adapters=randomized(new_adapters(base.unet)))


def learned(folder):
    return load_file(folder / "subject.safetensors")


def same(a, b, atol=0.0):
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=0, atol=atol) for name in a)


# ------------------------------------------------------------------------------------------------------------
# What is trained


def test_the_full_unets_layers_and_adapters():
    with torch.device("meta"):
        unet = UNet(UNetConfig())
        adapters, layers = new_adapters(unet), add_full_linears(unet)
    assert len(layers) == 32 and all(name.endswith((".attn2.to_k", ".attn2.to_v")) for name in layers)
    assert {layer.delta.shape for layer in layers.values()} == {(320, 1024), (640, 1024), (1280, 1024)}
    assert len(adapters) == 16
    shapes = {adapter.down.weight.shape for adapter in adapters.values()}
    assert shapes == {(160, 320), (320, 640), (640, 1280)}


@torch.no_grad()
def test_step_zero_is_the_base_exactly(base, inputs):
    plain = base.unet(*inputs)
    with inserted_adapters(base.unet, new_adapters(base.unet)):
        assert torch.equal(base.unet(*inputs), plain)
    add_full_linears(base.unet)
    assert torch.equal(base.unet(*inputs), plain)


@torch.no_grad()
def test_whole_matrices_merge_as_a_lora(base, base_folder, inputs):
    """The pair (A, B) multiplies to the whole matrix exactly, whichever of its sides is smaller."""
    live, plain = load_base(base_folder), base.unet(*inputs)
    layers = randomized(add_full_linears(live.unet))
    subject = random_subject(base)
    subject.lora = {name: layer.lora() for name, layer in layers.items()}
    assert all(torch.equal(B @ A, layers[name].delta) for name, (A, B) in subject.lora.items())
    assert {len(A) for A, _ in subject.lora.values()} == {16, 32}
    MergedLoRA(base.unet, [subject]).set(1.0)
    assert torch.allclose(base.unet(*inputs), live.unet(*inputs), atol=1e-4)
    assert not torch.allclose(base.unet(*inputs), plain, atol=1e-2)


def test_custom_diffusion_learns_nothing_from_the_first_token(base):
    layer = next(iter(randomized(add_full_linears(base.unet)).values()))
    text = torch.randn(1, 5, 32, requires_grad=True)
    layer(text).pow(2).sum().backward()
    assert not text.grad[:, 0].any() and text.grad[:, 1:].abs().min() > 0
    rest, layer.delta.grad = layer.delta.grad, None
    y = layer.linear(text[:, 1:]) + F.linear(text[:, 1:], layer.delta)
    y.pow(2).sum().backward()
    assert torch.allclose(layer.delta.grad, rest, atol=1e-4)


@torch.no_grad()
def test_the_loss_counts_only_where_the_mask_is(base):
    """A mask (h, w) of 2 in the left half and 0 in the right gives the left half's mean."""
    loss = CustomDiffusionLoss(base, torch.randn(1, 32), {}, num_frames=3, fps=8)
    images, tokens = torch.rand(1, 3, 32, 48), Tokenizer(["V*"])(["a V* dog"])
    t, eps = torch.tensor([500]), torch.randn(1, 4, 3, 4, 6)
    left, right = torch.zeros(1, 4, 6), torch.zeros(1, 4, 6)
    left[..., :3], right[..., 3:] = 2, 2
    everywhere, on_left, on_right = (loss(images, tokens, mask, t, eps)[0]
                                     for mask in (torch.ones(1, 4, 6), left, right))
    assert torch.allclose((on_left + on_right) / 2, everywhere) and not torch.allclose(on_left, on_right)


def test_the_adapter_reads_what_is_not_normalised(base):
    """x <- attn2(norm2(x), text) + x + adapter(x), as the formula. An error restores the block too."""
    adapters = randomized(new_adapters(base.unet))
    name, adapter = next(iter(adapters.items()))
    block, before = base.unet.get_submodule(name), base.unet.state_dict()
    x, text = torch.randn(2, 6, block.norm2.normalized_shape[0]), torch.randn(2, 77, 32)
    with torch.no_grad():
        plain = block(x, text)
        h = block.norm1(x)
        h = x + block.attn1(h, h)
        added = F.gelu(h @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T + adapter.up.bias
        h = block.attn2(block.norm2(h), text) + h + added
        with pytest.raises(KeyError), inserted_adapters(base.unet, adapters):
            assert torch.allclose(block(x, text), h + block.ff(block.norm3(h)), atol=1e-4)
            raise KeyError
        assert torch.equal(block(x, text), plain)
    assert list(base.unet.state_dict()) == list(before)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["custom_diffusion", "dreamvideo"])
def test_gradients_reach_exactly_what_is_learned(base, method, checkpointing):
    base.unet.grad_checkpointing = checkpointing
    v_star = class_embedding(base.text_encoder, "dog")
    images, tokens = torch.rand(2, 3, 32, 48), Tokenizer(["V*"])(["a V* dog", "a photo of a V* dog"])
    noise = torch.tensor([10, 800]), torch.randn(2, 4, 3, 4, 6)
    if method == "custom_diffusion":
        loss = CustomDiffusionLoss(base, v_star, randomized(add_full_linears(base.unet)), 3, 8)
        loss(images, tokens, torch.ones(2, 4, 6), *noise)[0].backward()
    else:
        adapters = randomized(new_adapters(base.unet))
        loss = AdapterLoss(base, v_star, adapters, 3, 8)
        with inserted_adapters(base.unet, adapters):
            loss(images, tokens, *noise)[0].backward()
    blocks = 7      # spatial ones of the tiny UNet
    assert len(list(loss.parameters())) == (1 + 2 * blocks if method == "custom_diffusion" else 4 * blocks)
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.parameters())
    trained = {id(parameter) for parameter in loss.parameters()}
    for network in (base.unet, base.text_encoder, base.vae):
        for name, parameter in network.named_parameters():
            assert (parameter.grad is not None) == (id(parameter) in trained), name


def test_custom_diffusions_rescaling(photos_folder):
    """Words, grey border and loss mask belong together, in the proportions that its authors give."""
    photos, beginnings = load_photos(photos_folder, 128, 192, "V*", "dog")[:1], []
    sampling = SamplingDefaults(height=128, width=192)
    samples = RescaledSamples(photos, "V*", "dog", None, 0, TrainingDefaults(), sampling, factor=8)
    for i in range(300):
        image, caption, mask = samples.rescaled(i)
        assert caption.endswith("photo of a V* dog") and image.shape == (3, 128, 192)
        beginnings.append(caption.removesuffix("photo of a V* dog").strip())
        assert mask.mean().item() == pytest.approx(1, abs=1e-5)
        # (16, 24), 0 where a latent's 8x8 pixels are all grey
        cells = image.unfold(1, 8, 8).unfold(2, 8, 8).abs().amax(dim=(0, 3, 4))
        if beginnings[-1] in ("a far away", "very small"):
            assert (cells[mask > 0] > 0).all() and 0 < (mask > 0).sum() < (cells > 0).sum() < 16 * 24
        else:
            assert torch.equal(mask, torch.ones(16, 24)) and (cells > 0).all()
    share = lambda *words: sum(beginning in words for beginning in beginnings) / len(beginnings)
    assert share("a far away", "very small") == pytest.approx(2 / 3 * 0.4, abs=0.08)
    assert share("zoomed in", "close up") == pytest.approx(1 / 3, abs=0.08) and len(set(beginnings)) == 5
    images, tokens, masks, t, eps = samples.batch(range(2))
    assert torch.equal(masks[1], samples.rescaled(1)[2]) and torch.equal(images[1], samples.rescaled(1)[0])


# ------------------------------------------------------------------------------------------------------------
# Files, stages, processes


def test_a_subject_of_dreamvideo_saved_and_loaded(base, tmp_path, monkeypatch):
    """It comes back whole. sample.py passes it over and refuses it, and the other way round."""
    monkeypatch.chdir(tmp_path)
    subject, path = random_dreamvideo(base), tmp_path / "runs" / "x" / "subject.safetensors"
    save_subject(path, subject)
    loaded = load_dreamvideo(path, base)
    assert same(loaded.tensors(), subject.tensors()) and loaded.fingerprint() == subject.fingerprint()
    with pytest.raises(BadInput, match="not a subject for this command"):
        load_subject(path, base)
    save_subject(tmp_path / "runs" / "y" / "subject.safetensors", random_subject(base))
    assert find_subjects([], base.config.fingerprint)[0].parent.name == "y"
    with pytest.raises(BadInput, match="not a subject for this command.*adapters"):
        load_dreamvideo(tmp_path / "runs" / "y" / "subject.safetensors", base)
    with pytest.raises(BadInput, match="was trained on the base tiny0"):
        load_dreamvideo(path, load_base(write_base(tmp_path / "other", seed=1)))


@pytest.mark.parametrize("method", [CUSTOM_DIFFUSION, DREAMVIDEO], ids=lambda method: method[0])
def test_processes_agree_and_resume_on_any_number(flags, tmp_path, method):
    """A run begins on two processes, moves to one as DreamVideo's second stage begins, and ends on two."""
    def train_on(world, *more):
        argv = ["baselines.py", *method, *flags, "--alpha", 0.5, *more]
        pids = fork_ranks(world, baselines.main, argv, tmp_path) if world > 1 else [
            fork(baselines.main, argv, tmp_path)]
        assert [wait(pid) for pid in pids] == [0] * world, (tmp_path / "output").read_text()

    train_on(1, "--steps", 6, "--batch_size", 2, "--out", "one")
    train_on(2, "--steps", 3, "--out", "moved")
    train_on(1, "--steps", 5, "--batch_size", 2, "--resume", "moved")
    train_on(2, "--steps", 6, "--resume", "moved")
    assert same(learned(tmp_path / "one"), learned(tmp_path / "moved"), atol=1e-5)
    assert len((tmp_path / "moved" / "log.jsonl").read_text().splitlines()) == 6


def test_dreamvideo_learns_the_word_and_then_the_adapters(flags, base, base_folder, tmp_path, in_process):
    common = ["dreamvideo", *flags, "--lr", 0.01, "--word_lr", 0.02, "--word_steps", 2, "--steps", 4]
    in_process(baselines, *common, "--save_every", 1, "--keep_last", 9, "--out", "x")
    saves = [load_dreamvideo(path, base) for path in sorted((tmp_path / "x").glob("step-*/*.safetensors"))]
    words = [class_embedding(base.text_encoder, "dog"), *(subject.v_star for subject in saves)]
    assert [not torch.equal(a, b) for a, b in zip(words, words[1:])] == [True, True, False, False]
    assert [subject.settings["stage"] for subject in saves] == [1, 1, 2, 2]
    assert [len(subject.adapters) for subject in saves] == [0, 0, 7, 7]
    assert all(adapter.up.bias.abs().sum() > 0 for adapter in saves[2].adapters.values())

    # From a save in either stage, and from the one between them, the rest is the same bit for bit.
    for step in (1, 2, 3):
        in_process(baselines, *common, "--resume", f"x/step-00000{step}", "--out", f"from-{step}")
        assert same(learned(tmp_path / f"from-{step}"), learned(tmp_path / "x"))
    assert not list(tmp_path.rglob("prior"))                                # its prior loss has weight 0

    # The same command again samples nothing. A save of the first stage, V* alone, is sampled too.
    for folder in ("x", "x", "x/step-000002"):
        in_process(baselines, "sample", "--base", base_folder, "--subject", folder, "--seed", 0)
    jobs = [json.loads(path.read_text()) for path in sorted((tmp_path / "outputs").glob("*.json"))]
    assert [job["lambdas"] for job in jobs] == ["1*4"] * 2
    assert len(list((tmp_path / "outputs").glob("*.mp4"))) == 2
    assert jobs[0]["subjects"][0]["placeholder"] == "V*" and jobs[0]["frames"] == 3
    with pytest.raises(BadInput, match="not a subject for this command"):
        in_process(sample, "--base", base_folder, "--subject", "x")


def test_custom_diffusion_starts_from_a_rare_word(flags, base, base_folder, tmp_path, in_process):
    in_process(baselines, "custom_diffusion", *flags, "--lr", 1e-6, "--steps", 1, "--out", "x")
    subject = load_subject(tmp_path / "x" / "subject.safetensors", base)
    assert type(subject) is Subject
    assert torch.allclose(subject.v_star[0], base.text_encoder.token_embedding.weight[42170], atol=1e-5)
    assert all((B @ A).abs().sum() > 0 for A, B in subject.lora.values())
    assert list((tmp_path / "prior").glob("*/*.png"))                       # its prior loss has weight 1
    in_process(sample, "--base", base_folder, "--subject", "x", "--lambdas", "1*4")
    assert list((tmp_path / "outputs").glob("*.mp4"))
    with pytest.raises(BadInput, match="is all, but x/step-000001 was trained with custom_diffusion"):
        in_process(train, *flags, "--steps", 4, "--lr", 1e-6, "--no-scale_lr", "--resume", "x")


# ------------------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize("method, expected", [
    ("custom_diffusion", (8e-5, 500, None, None, 1, 1e-2)), ("dreamvideo", (1e-5, 4000, 1e-4, 3000, 0, 0))])
def test_published_settings_are_the_defaults(flags, in_process, monkeypatch, method, expected):
    """Nothing of the base's recipe for CustomCrafter comes in: no scaled rate, no dropped captions."""
    seen = []
    monkeypatch.setattr(baselines, "learn_subject", lambda *parsed: seen.append(parsed))
    in_process(baselines, method, *flags)
    (args, config), training = seen[0], seen[0][1].training
    assert (training.lr, training.steps, args.word_lr, args.word_steps, training.alpha,
            training.weight_decay) == expected
    assert not training.scale_lr and training.caption_dropout == 0
    in_process(baselines, method, *flags, "--lr", 0.5)
    assert seen[1][1].training.lr == 0.5


@pytest.mark.parametrize("argv, reason", [
    ([], "COMMAND"), (["dreambooth"], "invalid choice"),
    (["custom_diffusion", "--word_steps", 10], "--word_steps"),
    (["dreamvideo", "--word_steps", 4001], "from 0 to --steps, which is 4000"),
    (["dreamvideo", "--rank", 8], "--rank"), (["custom_diffusion", "--scale_lr"], "--scale_lr"),
    (["sample", "--subject", "x", "--K", 3], "--K"), (["sample"], "--subject"),
    (["custom_diffusion", "--resume", "runs/x"], "not a save of custom_diffusion")])
def test_refusals(in_process, flags, base, tmp_path, argv, reason):
    (tmp_path / "runs/x/step-000007").mkdir(parents=True)
    save_subject(tmp_path / "runs/x/step-000007/subject.safetensors", random_dreamvideo(base))
    (tmp_path / "runs/x/step-000007/state.pt").touch()
    if argv and argv[0] in ("custom_diffusion", "dreamvideo"):
        argv = [*argv, *flags]
    with pytest.raises(BadInput, match=reason):
        in_process(baselines, *argv)
