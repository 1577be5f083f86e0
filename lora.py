"""Eq. 2 of CustomCrafter: W = W_0 + lambda * B A on the spatial attention, and V*, the word learned with it.

Nothing to run here. In training (`add_lora`) the update B A stays beside the weight, and lambda = 1. In
sampling (`MergedLoRA`) the update goes into the weight, so LoRA costs nothing per step.

Shapes: A (r, C_in), B (C_out, r), where r is the rank; V* (1, D), where D is the text width.
"""
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from cli import BadInput
from model import SpatialTransformer, Tokenizer, UNet


@dataclass
class Subject:
    """What train.py learns, in float32, and the facts needed to use it. files.py saves and loads one."""
    placeholder: str            # how prompts name the subject: "V*"
    class_word: str             # what the subject is: "dog"
    rank: int
    base_name: str
    base_fingerprint: str
    steps: int                  # training steps so far
    method: str = "customcrafter"
    settings: dict = field(default_factory=dict)    # of the training
    updates: dict = field(default_factory=dict)     # name of a layer of the UNet -> (A, B)
    v_star: torch.Tensor = None                     # (1, D)


def class_embedding(text_encoder, class_word):
    """Where V* starts: the class word's embedding (1, D), or the mean of its tokens' embeddings."""
    ids = Tokenizer().encode(class_word)
    if not ids:
        raise BadInput(f"--class_word {class_word!r}: is empty; name what the subject is, such as dog")
    return text_encoder.token_embedding.weight[ids].float().mean(dim=0, keepdim=True)


# ------------------------------------------------------------------------------------------------------------
# Which layers


def spatial_blocks(unet: UNet):
    """Names of the blocks that look within one frame. Temporal blocks form motion, and get no update."""
    modules = unet.named_modules()
    return [f"{name}.block" for name, module in modules if isinstance(module, SpatialTransformer)]


def target_names(unet: UNet, targets="all"):
    """The linear layers that get an update: to_q, to_k and to_v of every spatial block's attention.

    The paper names these layers (Sec. "Spatial Subject Learning Module"). VideoCrafter2 has 96 of them.
    targets="cross" gives the 48 of the cross-attention, the ablation in the paper's Table 2.
    """
    attentions = ("attn2",) if targets == "cross" else ("attn1", "attn2")
    names = []
    for block in spatial_blocks(unet):
        for attention in attentions:
            names += [f"{block}.{attention}.{linear}" for linear in ("to_q", "to_k", "to_v")]
    return names


# ------------------------------------------------------------------------------------------------------------
# Training: the update beside the weight


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update beside it."""

    def __init__(self, linear: nn.Linear, rank):
        super().__init__()
        self.linear = linear
        self.lam = 1.0
        # A and B stay in float32 whatever the frozen weights are in: their steps are too small for bfloat16.
        # Hu et al. 2021: A is Gaussian and B zero, so that step 0 computes the base exactly.
        A = torch.randn(rank, linear.in_features) / linear.in_features ** 0.5
        B = torch.zeros(linear.out_features, rank)
        self.lora_A = nn.Parameter(A.to(linear.weight.device))
        self.lora_B = nn.Parameter(B.to(linear.weight.device))

    def forward(self, x):
        """(..., C_in) -> (..., C_out)"""
        A, lam_B = self.lora_A.to(x.dtype), (self.lam * self.lora_B).to(x.dtype)
        return self.linear(x) + F.linear(F.linear(x, A), lam_B)             # Eq. 2; lambda = 1 in training

    def tensors(self):
        return self.lora_A, self.lora_B


def add_lora(unet: UNet, rank, targets="all"):
    """Puts a LoRALinear around every target, in place. Returns name -> LoRALinear."""
    layers = {}
    for name in target_names(unet, targets):
        layers[name] = LoRALinear(unet.get_submodule(name), rank)
        unet.set_submodule(name, layers[name])
    return layers


class LiveLoRA:
    """Sets lambda while the updates are still beside the weights: for previews in the middle of training."""

    def __init__(self, layers):
        self.layers = layers

    def set(self, lam):
        for layer in self.layers:
            layer.lam = lam


# ------------------------------------------------------------------------------------------------------------
# Sampling: the update in the weight


class MergedLoRA:
    """Writes W_0 + lambda * B A into the UNet's own weights. The updates of several subjects are added.

    The layers stay plain nn.Linear, so a sampling step costs what the base's own step costs.
    """

    def __init__(self, unet: UNet, *subjects: Subject):
        self.updates = {}
        for subject in subjects:
            for name, tensors in subject.updates.items():
                self.updates.setdefault(name, []).append(tensors)
        self.weights = {name: unet.get_submodule(name).weight for name in self.updates}
        self.originals = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.lam = 0.0

    @torch.no_grad()
    def set(self, lam):
        """lambda = 0 restores the base bit for bit. Setting the value that is already set costs nothing."""
        if lam == self.lam:
            return
        self.lam = None     # until every weight is written
        for name, W in self.weights.items():
            W_0 = self.originals[name]
            if lam == 0:
                W.copy_(W_0)
            else:
                update = sum(product(tensors, W_0.device) for tensors in self.updates[name])
                W.copy_(W_0.float() + lam * update)                         # Eq. 2
        self.lam = lam


def product(tensors, device):
    """(A, B) -> B A (C_out, C_in) on `device`; a whole matrix alone is its own product."""
    *A, B = (tensor.to(device) for tensor in tensors)
    return B @ A[0] if A else B
