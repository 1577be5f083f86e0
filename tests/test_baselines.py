"""Custom Diffusion and DreamVideo: what they train, in which stages, on which samples; files and sampling."""
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import sample
from data import load_photos
from lora import MergedLoRA, class_embedding
from makers import fork, fork_ranks, random_subject, wait
from model import Tokenizer
from paper import baselines
from paper.baselines import (CustomDiffusionLoss, DreamVideoSubject, RescaledSamples, add_full_linears,
                             inserted_adapters, new_adapters)
from support.cli import BadInput
from support.config import BaseConfig, SamplingDefaults, TrainingDefaults
from support.files import load_base, load_subject, save_subject
from train import SubjectLoss


@pytest.fixture()
def flags(base_folder, photos_folder):
    return ["--base", base_folder, "--images", photos_folder, "--class_word", "dog"]


def randomized(modules):
    """New layers or adapters, with random numbers in place of the zeros of a start."""
    torch.manual_seed(3)
    for module in modules.values():
        for parameter in module.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
    return modules


def learned(folder):
    return load_file(folder / "subject.safetensors")


def same(a, b, atol=0.0):
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=0, atol=atol) for name in a)


@torch.no_grad()
def test_whole_matrices_start_at_the_base_and_merge_as_a_lora(base, base_folder):
    """A layer's smaller factor stays an identity, whichever of its sides is smaller."""
    live, subject = load_base(base_folder), random_subject(base)
    inputs = (torch.randn(2, 4, 3, 4, 6), torch.tensor([10, 800]), torch.tensor([8, 8]),
              torch.randn(2, 77, 32))
    plain, layers = base.unet(*inputs), add_full_linears(live.unet)
    assert torch.equal(live.unet(*inputs), plain)
    subject.lora = {name: (layer.lora_A, layer.lora_B) for name, layer in randomized(layers).items()}
    for A, B in subject.lora.values():
        assert torch.equal(min(A, B, key=torch.numel), torch.eye(len(A)))
    MergedLoRA(base.unet, [subject]).set(1.0)
    assert torch.allclose(base.unet(*inputs), live.unet(*inputs), atol=1e-4)
    assert not torch.allclose(base.unet(*inputs), plain, atol=1e-2)


def test_custom_diffusion_learns_nothing_from_the_first_token(base):
    layer = next(iter(randomized(add_full_linears(base.unet)).values()))
    update, = (parameter for parameter in layer.parameters() if parameter.requires_grad)
    text = torch.randn(1, 5, 32, requires_grad=True)
    layer(text)[:, 0].pow(2).sum().backward()
    assert not text.grad.any() and not update.grad.any()
    layer(text)[:, 1:].pow(2).sum().backward()
    assert text.grad[:, 1:].all() and update.grad.all()


def test_the_adapter_reads_what_is_not_normalised(base):
    """x <- attn2(norm2(x), text) + x + adapter(x), as the formula. An error restores the block too."""
    adapters = randomized(new_adapters(base.unet))
    name, adapter = next(iter(adapters.items()))
    block, C = base.unet.get_submodule(name), adapter.up.out_features
    x, text = torch.randn(2, 6, C), torch.randn(2, 77, 32)
    assert adapter.down.weight.shape == (C // 2, C)
    with torch.no_grad():
        plain = block(x, text)
        with inserted_adapters(base.unet, new_adapters(base.unet)):
            assert torch.equal(block(x, text), plain)
        h = block.norm1(x)
        h = x + block.attn1(h, h)
        added = F.gelu(h @ adapter.down.weight.T + adapter.down.bias) @ adapter.up.weight.T + adapter.up.bias
        h = block.attn2(block.norm2(h), text) + h + added
        with pytest.raises(KeyError), inserted_adapters(base.unet, adapters):
            assert torch.allclose(block(x, text), h + block.ff(block.norm3(h)), atol=1e-4)
            raise KeyError
        assert torch.equal(block(x, text), plain)


@pytest.mark.parametrize("method, count", [("custom_diffusion", 1 + 2 * 7), ("dreamvideo", 1 + 4 * 7)])
def test_gradients_reach_exactly_what_is_learned(base, method, count):
    """In the tiny UNet's 7 spatial blocks, and V*. Custom Diffusion's loss counts only where its mask is."""
    base.unet.grad_checkpointing = True
    v_star = class_embedding(base.text_encoder, "dog")
    images, tokens = torch.rand(2, 3, 32, 48), Tokenizer(["V*"])(["a V* dog", "a photo of a V* dog"])
    batch = tokens, torch.tensor([10, 800]), torch.randn(2, 4, 3, 4, 6)
    if method == "custom_diffusion":
        loss = CustomDiffusionLoss(base, v_star, randomized(add_full_linears(base.unet)), 3, 8)
        left = torch.zeros(2, 1, 32, 48)
        left[..., :24] = 2
        whole, of_left, of_right = (loss(torch.cat([images, mask], dim=1), *batch)[0]
                                    for mask in (torch.ones(2, 1, 32, 48), left, 2 - left))
        assert torch.allclose((of_left + of_right) / 2, whole) and not torch.allclose(of_left, of_right)
        whole.backward()
    else:
        adapters = randomized(new_adapters(base.unet))
        loss = SubjectLoss(base, v_star, {}, 3, 8)
        loss.adapters = torch.nn.ModuleList(adapters.values())
        with inserted_adapters(base.unet, adapters):
            loss(images, *batch)[0].backward()
    trained = {id(parameter) for parameter in loss.parameters() if parameter.requires_grad}
    assert len(trained) == count and all(x.grad.any() for x in loss.parameters() if x.requires_grad)
    for network in (base.unet, base.text_encoder, base.vae):
        for name, parameter in network.named_parameters():
            assert (parameter.grad is not None) == (id(parameter) in trained), name


def test_custom_diffusions_rescaling(photos_folder):
    """Words, grey border and loss mask belong together, in the proportions that its authors give."""
    photos, beginnings = load_photos(photos_folder, 128, 192, "V*", "dog")[:1], []
    sampling = SamplingDefaults(height=128, width=192)
    samples = RescaledSamples(photos, "V*", "dog", None, 0, TrainingDefaults(), sampling, factor=8)
    for i in range(300):
        image, caption = samples.subject_sample(i)
        assert caption.endswith("photo of a V* dog") and image.shape == (4, 128, 192)
        image, mask = image[:3], image[3, ::8, ::8]
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


@pytest.mark.parametrize("method, rates", [
    ("custom_diffusion", ["--lr", 1e-3]),
    ("dreamvideo", ["--lr", 1e-3, "--word_lr", 1e-3, "--word_steps", 3])])
def test_processes_agree_and_resume_on_any_number(flags, tmp_path, method, rates):
    """A run begins on two processes, moves to one as DreamVideo's second stage begins, and ends on two."""
    def train_on(world, *more):
        argv = ["baselines.py", method, *rates, *flags, "--alpha", 0.5, *more]
        pids = fork_ranks(world, baselines.main, argv, tmp_path) if world > 1 else [
            fork(baselines.main, argv, tmp_path)]
        assert [wait(pid) for pid in pids] == [0] * world, (tmp_path / "output").read_text()

    train_on(1, "--steps", 6, "--batch_size", 2, "--out", "one")
    train_on(2, "--steps", 3, "--out", "moved")
    train_on(1, "--steps", 5, "--batch_size", 2, "--resume", "moved")
    train_on(2, "--steps", 6, "--resume", "moved")
    assert same(learned(tmp_path / "one"), learned(tmp_path / "moved"), atol=1e-5)
    assert len((tmp_path / "moved" / "log.jsonl").read_text().splitlines()) == 6


def test_dreamvideo_learns_the_word_and_then_the_adapters(flags, base, base_folder, tmp_path, call):
    common = ["dreamvideo", *flags, "--lr", 0.01, "--word_lr", 0.02, "--word_steps", 2, "--steps", 4]
    call(baselines, *common, "--save_every", 1, "--keep_last", 9, "--out", "x")
    paths = sorted((tmp_path / "x").glob("step-*/*.safetensors"))
    saves = [load_subject(path, base, DreamVideoSubject) for path in paths]
    words = [class_embedding(base.text_encoder, "dog"), *(subject.v_star for subject in saves)]
    assert [not torch.equal(a, b) for a, b in zip(words, words[1:])] == [True, True, False, False]
    assert [len(subject.adapters) for subject in saves] == [0, 0, 7, 7]
    assert all(adapter.up.bias.abs().sum() > 0 for adapter in saves[2].adapters.values())
    assert not list(tmp_path.rglob("prior"))                                # its prior loss has weight 0

    # From a save in either stage, and from the one between them, the rest is the same bit for bit.
    last_line = lambda folder: json.loads((tmp_path / folder / "log.jsonl").read_text().splitlines()[-1])
    for step in (1, 2, 3):
        call(baselines, *common, "--resume", f"x/step-00000{step}", "--out", f"from-{step}")
        assert same(learned(tmp_path / f"from-{step}"), learned(tmp_path / "x"))
        assert last_line(f"from-{step}")["grad_norm"] == last_line("x")["grad_norm"]    # without V*
    with pytest.raises(BadInput, match="--word_steps: is 1"):
        call(baselines, *common, "--word_steps", 1, "--steps", 5, "--resume", "x")

    # The same command again samples nothing. A save of the first stage, V* alone, is sampled too.
    sampled = ["sample", "--base", base_folder, "--seed", 0, "--subject"]
    for folder in ("x", "x", "x/step-000002"):
        call(baselines, *sampled, folder)
    jobs = [json.loads(path.read_text()) for path in sorted((tmp_path / "outputs").glob("*.json"))]
    assert [job["lambdas"] for job in jobs] == ["1*4"] * 2

    save_subject(tmp_path / "lora" / "subject.safetensors", random_subject(base))
    for script, argv in (sample, [*sampled[1:], "x"]), (baselines, [*sampled, "lora"]):
        with pytest.raises(BadInput, match="not a subject for this command"):
            call(script, *argv)


def test_custom_diffusion_starts_from_a_rare_word(flags, base, tmp_path, call):
    call(baselines, "custom_diffusion", *flags, "--lr", 1e-6, "--steps", 1, "--out", "x")
    subject = load_subject(tmp_path / "x" / "subject.safetensors", base)
    assert torch.allclose(subject.v_star[0], base.text_encoder.token_embedding.weight[42170], atol=1e-5)
    assert all((B @ A).abs().sum() > 0 for A, B in subject.lora.values())
    assert list((tmp_path / "prior").glob("*/*.png"))                       # its prior loss has weight 1
    call(sample, *flags[:2], "--subject", "x", "--lambdas", "1*4")


@pytest.mark.parametrize("method, expected", [
    ("custom_diffusion", (8e-5, 500, None, 0, 1, 1e-2)), ("dreamvideo", (1e-5, 4000, 1e-4, 3000, 0, 0))])
def test_published_settings_are_the_defaults(flags, call, monkeypatch, method, expected):
    """Nothing of the base's recipe for CustomCrafter comes in: no scaled rate, no dropped captions."""
    seen = []
    config = BaseConfig(training=TrainingDefaults(scale_lr=True, caption_dropout=0.2))
    monkeypatch.setattr("train.load_config", lambda base: config)
    monkeypatch.setattr(baselines, "learn_subject", lambda *parsed: seen.append(parsed))
    call(baselines, method, *flags)
    (args, config), training = seen[0], seen[0][1].training
    assert (training.lr, training.steps, args.word_lr, args.word_steps, training.alpha,
            training.weight_decay) == expected
    assert not training.scale_lr and training.caption_dropout == 0


@pytest.mark.parametrize("argv, reason", [
    ([], "COMMAND"), (["dreambooth"], "invalid choice"),
    (["custom_diffusion", "--word_steps", 10], "--word_steps"),
    (["dreamvideo", "--word_steps", 4001, "--steps", 9], "from 0 to --steps"),
    (["dreamvideo", "--rank", 8], "--rank"), (["custom_diffusion", "--scale_lr"], "--scale_lr"),
    (["sample", "--subject", "x", "--K", 3], "--K"), (["sample"], "--subject")])
def test_refusals(call, flags, argv, reason):
    if argv and argv[0] in baselines.PUBLISHED:
        argv = [*argv, *flags]
    with pytest.raises(BadInput, match=reason):
        call(baselines, *argv)
