"""CustomCrafter from top to bottom: tests of each equation and of Algorithm 1, in the paper's order.

`base` is a tiny base with random weights: 3 frames of 32x48 pixels, latents (B, 4, 3, 4, 6), text width 32.
"""
import pytest
import torch

import train
from data import still_video
from lora import LoRALinear, MergedLoRA, add_lora, class_embedding
from makers import random_subject
from model import (NoiseSchedule, ScheduleConfig, SpatialTransformer, TemporalTransformer, Tokenizer, UNet,
                   UNetConfig)
from sample import ddim, ddim_steps, two_step_schedule
from support.config import BaseConfig, loss_weights
from train import SubjectLoss

FPS = torch.tensor([8, 8])
LEVELS = torch.tensor([10, 800])    # a low and a high noise level


def small_batch():
    """Two photos, their captions, two noise levels, and the noise."""
    torch.manual_seed(0)
    images = 2 * torch.rand(2, 3, 32, 48) - 1
    tokens = Tokenizer(["V*"])(["a V* dog", "a photo of a V* dog"])
    return images, tokens, LEVELS, torch.randn(2, 4, 3, 4, 6)


def small_prior(num_frames=3):
    """Two clips of the class as latents, their captions as context, noise levels, and the noise."""
    torch.manual_seed(1)
    z_0, eps = torch.randn(2, 2, 4, num_frames, 4, 6)
    return z_0, torch.randn(2, 77, 32), torch.tensor([300, 600]), eps


def new_loss(base):
    layers = add_lora(base.unet, rank=2)
    return SubjectLoss(base, class_embedding(base.text_encoder, "dog"), layers, num_frames=3, fps=8)


def add_noise(base, z_0, t, eps):
    """The forward process, as the paper's preliminaries have it, with VideoCrafter2's scale."""
    alpha_bar, scale = (x[t].view(-1, 1, 1, 1, 1) for x in (base.schedule.alpha_bar, base.schedule.scale))
    return alpha_bar ** 0.5 * scale * z_0 + (1 - alpha_bar) ** 0.5 * eps


# ------------------------------------------------------------------------------------------------------------
# Training


@torch.no_grad()
def test_eq_1_the_unet_predicts_the_noise(base):
    """Eq. 1: the mean of (eps - eps_theta(z_t, t, c))^2. z_t is a still video with noise eps of level t."""
    images, tokens, t, eps = small_batch()
    loss = new_loss(base)
    subject_loss, prior_loss = loss(images, tokens, t, eps)

    z = base.vae.encode(images)                                             # (2, 4, 4, 6)
    z_0 = torch.stack([z, z, z], dim=2)                                     # (2, 4, 3, 4, 6)
    c = base.text_encoder(tokens, loss.v_star)
    predicted = base.unet(add_noise(base, z_0, t, eps), t, FPS, c)
    assert torch.allclose(subject_loss, ((eps - predicted) ** 2).mean())
    assert prior_loss == 0                                                  # no clips of the class were given


@torch.no_grad()
def test_w_of_t_is_the_weight_that_the_base_was_trained_with(base):
    """VideoCrafter2's w(t) is 1. With `latent_std` it turns the error of eps into that of v-prediction.

    v = a eps - b z_0, where z_t = a z_0 + b eps for z_0 of variance 1 and a^2 + b^2 = 1.
    """
    schedule = NoiseSchedule(ScheduleConfig())
    assert torch.equal(loss_weights(BaseConfig(), schedule), torch.ones(1000))

    images, tokens, t, eps = small_batch()
    w = loss_weights(BaseConfig(latent_std=3), schedule)
    signal, noise = schedule.alpha_bar[t] ** 0.5 * schedule.scale[t] * 3, (1 - schedule.alpha_bar[t]) ** 0.5
    a, b = (x / (signal ** 2 + noise ** 2) ** 0.5 for x in (signal, noise))
    z_0, wrong = torch.tensor(0.7), torch.tensor(0.1)       # a latent, and the error of the predicted noise
    z_t = a * z_0 + b * eps[:, 0, 0, 0, 0]
    predicted_z_0 = (z_t - b * (eps[:, 0, 0, 0, 0] + wrong)) / a
    error_of_v = (a * wrong - b * (predicted_z_0 - z_0)) ** 2
    assert torch.allclose(w[t] * wrong ** 2, error_of_v, rtol=1e-3)
    assert loss_weights(BaseConfig(latent_std=1), schedule).max() == 100        # bounded

    loss, (prior_z_0, prior_context, *_) = new_loss(base), small_prior()
    prior = prior_z_0, prior_context, t, eps
    each = []   # Eq. 1 and Eq. 3 of one subject clip and one prior clip at one noise level, with w(t) = 1
    for i in range(2):
        each.append(torch.stack(loss(*(x[[i]] for x in (images, tokens, t, eps, *prior)))))
    loss.w = w
    weighted = torch.stack(loss(images, tokens, t, eps, *prior))
    assert torch.allclose(weighted, (w[t[0]] * each[0] + w[t[1]] * each[1]) / 2)


def test_each_photo_is_repeated_into_a_still_video():
    z = torch.randn(2, 4, 4, 6)
    video = still_video(z, 16)
    assert video.shape == (2, 4, 16, 4, 6)
    assert all(torch.equal(video[:, :, frame], z) for frame in range(16))


def test_v_star_starts_from_the_class_word(base):
    """As long as nothing is learned, "a V*" means exactly what "a dog" means."""
    v_star = class_embedding(base.text_encoder, "dog")
    dog, = Tokenizer().encode("dog")
    assert torch.equal(v_star, base.text_encoder.token_embedding.weight[[dog]])
    as_word = base.text_encoder(Tokenizer()(["a dog"]))
    as_v_star = base.text_encoder(Tokenizer(["V*"])(["a V*"]), v_star)
    assert torch.equal(as_word, as_v_star)


def test_eq_2_the_update_beside_the_weight():
    """Eq. 2 in training: (W_0 + lambda B A) x. B is zero at the start, so that step 0 computes the base."""
    linear, x = torch.nn.Linear(6, 5, bias=False), torch.randn(3, 6)
    layer = LoRALinear(linear, rank=2)
    assert torch.equal(layer(x), linear(x))
    W_0, A, B = linear.weight, layer.lora_A, layer.lora_B
    torch.nn.init.normal_(B)
    for lam in (1.0, 0.4):
        layer.lam = lam
        assert torch.allclose(layer(x), x @ (W_0 + lam * B @ A).T, atol=1e-6)


@pytest.mark.parametrize("rank", [4, 32])
def test_A_starts_gaussian(rank):
    """Its standard deviation is 1 / rank, as in the authors' release; the paper names none."""
    torch.manual_seed(0)
    A = LoRALinear(torch.nn.Linear(1024, 8), rank).lora_A.detach()
    assert A.shape == (rank, 1024)
    assert A.std().item() == pytest.approx(1 / rank, rel=0.05) and A.mean().abs() < 0.1 / rank
    assert (A.abs() < 1 / rank).float().mean().item() == pytest.approx(0.683, abs=0.03)  # one sigma


def test_eq_2_the_update_in_the_weight(base):
    """Eq. 2 in sampling: W = W_0 + lambda B A, and lambda = 0 gives W_0 back bit for bit."""
    subject = random_subject(base)
    name, (A, B) = next(iter(subject.lora.items()))
    W = base.unet.get_submodule(name).weight
    W_0 = W.clone()
    merged = MergedLoRA(base.unet, [subject])
    for lam in (0.4, 0.8):
        merged.set(lam)
        assert torch.allclose(W, W_0 + lam * B @ A, atol=1e-6)
    merged.set(0)
    assert torch.equal(W, W_0)


def test_the_96_layers_of_eq_2_are_all_spatial():
    """Queries, keys, values of 16 spatial transformers' self- and cross-attention: 16 * 2 * 3 = 96 layers."""
    with torch.device("meta"):                              # VideoCrafter2's UNet, without memory
        unet = UNet(UNetConfig())
        layers = add_lora(unet, rank=4)
    spatial = [module for module in unet.modules() if isinstance(module, SpatialTransformer)]
    temporal = [module for module in unet.modules() if isinstance(module, TemporalTransformer)]
    assert len(layers) == 96 and len(spatial) == 16 and len(temporal) == 17
    assert count_lora(spatial) == 96
    assert count_lora(temporal) == 0
    assert {name.rsplit(".", 1)[1] for name in layers} == {"to_q", "to_k", "to_v"}


def count_lora(modules):
    count = 0
    for module in modules:
        count += sum(isinstance(layer, LoRALinear) for layer in module.modules())
    return count


@torch.no_grad()
@pytest.mark.parametrize("num_frames, calls", [(3, 1), (5, 2)], ids=["as many frames", "more frames"])
def test_eq_3_the_prior_loss(base, num_frames, calls):
    """Eq. 3: the same error on clips of the class, which may be longer. It does not touch Eq. 1."""
    batch, (z_0, context, t, eps) = small_batch(), small_prior(num_frames)
    loss, unet_calls = new_loss(base), []
    with base.unet.register_forward_hook(lambda *_: unet_calls.append(1)):
        subject_loss, prior_loss = loss(*batch, z_0, context, t, eps)
    assert len(unet_calls) == calls                         # clips of one length share a call

    predicted = base.unet(add_noise(base, z_0, t, eps), t, FPS, context)
    assert torch.allclose(prior_loss, ((eps - predicted) ** 2).mean())
    assert torch.allclose(subject_loss, loss(*batch)[0])


def test_eq_4_the_total_in_a_training_step(base_folder, photos_folder, tmp_path, monkeypatch):
    """Eq. 4: the gradient that train.py hands to AdamW is that of Eq. 1 + alpha * Eq. 3."""
    modules, batches, gradients = [], [], []

    class WatchedLoss(SubjectLoss):
        def forward(self, *batch):
            modules.append(self)
            batches.append(batch)
            return super().forward(*batch)

    def watched_step(optimizer):    # takes no step, so the same loss can be computed again below
        gradients.extend(parameter.grad.clone() for parameter in modules[0].parameters())

    monkeypatch.setattr(train, "SubjectLoss", WatchedLoss)
    monkeypatch.setattr(torch.optim.AdamW, "step", watched_step)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", "--base", str(base_folder), "--images", str(photos_folder),
                                     "--class_word", "dog", "--alpha", "0.5", "--steps", "1",
                                     "--preview_every", "0"])
    train.main()

    subject_loss, prior_loss = modules[0](*batches[0])
    assert subject_loss > 0 and prior_loss > 0
    total = subject_loss + 0.5 * prior_loss
    expected = torch.autograd.grad(total, list(modules[0].parameters()))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(gradients, expected, strict=True))
    assert gradients[0].abs().sum() > 0                                        # V*


def test_only_v_star_A_and_B_are_trained(base):
    """The frozen networks get no gradient, and what SubjectLoss offers to an optimizer is V*, A and B."""
    loss = new_loss(base)
    for B in loss.lora[1::2]:
        torch.nn.init.normal_(B)                            # where B is zero, A has no gradient
    subject_loss, _ = loss(*small_batch())
    subject_loss.backward()

    # A and B stand in the UNet now: the only parameters there that have a gradient.
    trained = {id(parameter) for parameter in loss.parameters()}
    assert len(trained) == 1 + 2 * 42                       # the tiny UNet has 42 target layers
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.parameters())
    for network in (base.unet, base.text_encoder, base.vae):
        for name, parameter in network.named_parameters():
            assert (parameter.grad is not None) == (id(parameter) in trained), name


# ------------------------------------------------------------------------------------------------------------
# Sampling


def test_algorithm_1_lambda_s_for_K_steps_then_lambda_l(base):
    """The UNet's weights are W_0 + lambda_s B A in the first K steps, and W_0 + lambda_l B A after."""
    assert two_step_schedule(0.4, 0.8, 5, 50) == [0.4] * 5 + [0.8] * 45
    assert two_step_schedule(0.4, 0.8, 0, 3) == [0.8] * 3
    assert two_step_schedule(0.4, 0.8, 3, 3) == [0.4] * 3

    subject = random_subject(base)
    name, (A, B) = next(iter(subject.lora.items()))
    W = base.unet.get_submodule(name).weight
    W_0, seen = W.clone(), []

    def watched_unet(*inputs):
        seen.append(((W - W_0) / (B @ A)).median())         # lambda, read back from the weights
        return base.unet(*inputs)

    z, context = torch.randn(1, 4, 3, 4, 6), torch.randn(1, 77, 32)
    noise = lambda: torch.randn_like(z)
    ddim(watched_unet, base.schedule, z, noise, context, context, FPS[:1], steps=6, cfg=12.0, eta=1.0,
         lora=MergedLoRA(base.unet, [subject]), lambdas=two_step_schedule(0.4, 0.8, 2, 6))
    assert torch.allclose(torch.stack(seen), torch.tensor([0.4, 0.4, 0.8, 0.8, 0.8, 0.8]), atol=1e-3)


def test_algorithm_1_guidance():
    """eps = eps_none + cfg * (eps_text - eps_none), where the tiny "UNet" predicts what its context says."""
    schedule, z = NoiseSchedule(ScheduleConfig()), torch.randn(1, 4, 3, 4, 6)
    text, none = torch.full((1, 77, 32), 0.3), torch.full((1, 77, 32), 0.1)
    predicts_its_context = lambda z_t, t, fps, context: context[:, :1, :1, None, None].expand_as(z_t)
    predictions = []
    ddim(predicts_its_context, schedule, z, None, text, none, FPS[:1], steps=1, cfg=12.0, eta=0.0,
         on_step=lambda i, z_0: predictions.append(z_0))

    (t, alpha_bar, scale, *_), = ddim_steps(schedule, 1, 0.0)
    eps = 0.1 + 12.0 * (0.3 - 0.1)
    clean = (z - (1 - alpha_bar) ** 0.5 * eps) / (alpha_bar ** 0.5 * scale)
    assert torch.allclose(predictions[0], clean, rtol=1e-4)


def test_algorithm_1_ddim_finds_a_known_point():
    """The data set is one point, so the exact noise predictor is known. DDIM ends there, at level 0's noise.

    Every step keeps the marginal: z_t = sqrt(alpha_bar) * scale * point + sqrt(1 - alpha_bar) * unit noise.
    """
    torch.manual_seed(0)
    schedule = NoiseSchedule(ScheduleConfig())
    point, eps = torch.randn(2, 1, 4, 8, 16, 16)
    context = torch.zeros(1, 77, 8)

    def exact(z_t, t, fps, context):
        alpha_bar, scale = schedule.alpha_bar[t[0]], schedule.scale[t[0]]
        return (z_t - alpha_bar ** 0.5 * scale * point) / (1 - alpha_bar) ** 0.5

    for steps in (1, 7, 50):
        for eta in (0.0, 1.0):
            _, alpha_bar, scale, *_ = ddim_steps(schedule, steps, eta)[0]
            z = alpha_bar ** 0.5 * scale * point + (1 - alpha_bar) ** 0.5 * eps
            noise = lambda: torch.randn_like(z)
            z_0 = ddim(exact, schedule, z, noise, context, context, FPS[:1], steps, 3.0, eta)
            alpha_bar, scale = schedule.alpha_bar[0], schedule.scale[0]
            rest = (z_0 - alpha_bar ** 0.5 * scale * point) / (1 - alpha_bar) ** 0.5
            if eta == 0:        # the first noise stays to the end
                assert torch.allclose(rest, eps, atol=1e-3)
            else:               # noise of the same size ...
                assert abs(rest.std() - 1) < 0.03
            if eta == 1 and steps > 1:      # ... that has nothing of the first left
                assert abs((rest * eps).mean()) < 0.03
