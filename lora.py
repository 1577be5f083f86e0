"""Eq. 2 of CustomCrafter: W = W_0 + lambda * B A on the spatial attention, and V*, the word learned with it.

Nothing to run here. In training (`add_lora`), the update B A stays beside the weight, and lambda = 1. In
sampling (`MergedLoRA`), the update is added to the weight, so LoRA costs nothing per step.

Shapes: A (r, C_in), B (C_out, r), where r is the rank; V* (1, D), where D is the text width.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import SpatialTransformer, Tokenizer, UNet


def class_embedding(text_encoder, class_word):
    """Where V* starts: the class word's embedding (1, D), or the mean of its tokens' embeddings."""
    ids = Tokenizer().encode(class_word)
    return text_encoder.token_embedding.weight[ids].float().mean(dim=0, keepdim=True)


# ------------------------------------------------------------------------------------------------------------
# Which layers


def spatial_blocks(unet: UNet):
    """Names of the blocks that work within each frame. Temporal blocks form motion, so they get no update."""
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
        # A and B are always in float32, because their steps are too small for bfloat16.
        # Hu et al. 2021: A is Gaussian and B zero, so that step 0 computes the base exactly. The standard
        # deviation 1 / rank is that of the authors' release, because the paper names none.
        A = torch.randn(rank, linear.in_features) / rank
        B = torch.zeros(linear.out_features, rank)
        self.lora_A = nn.Parameter(A.to(linear.weight.device))
        self.lora_B = nn.Parameter(B.to(linear.weight.device))

    def forward(self, x):
        """(..., C_in) -> (..., C_out)"""
        A, lam_B = self.lora_A.to(x.dtype), (self.lam * self.lora_B).to(x.dtype)
        return self.linear(x) + F.linear(F.linear(x, A), lam_B)             # Eq. 2; lambda = 1 in training


class LiveLoRA(dict):
    """Layer name -> LoRALinear. Previews set lambda here; MergedLoRA below is for sampling."""

    def set(self, lam):
        for layer in self.values():
            layer.lam = lam


def add_lora(unet: UNet, rank, targets="all"):
    """Puts a LoRALinear around every target, in place. Returns them."""
    layers = LiveLoRA()
    for name in target_names(unet, targets):
        layers[name] = LoRALinear(unet.get_submodule(name), rank)
        unet.set_submodule(name, layers[name])
    return layers


# ------------------------------------------------------------------------------------------------------------
# Sampling: the update in the weight


class MergedLoRA:
    """Writes W_0 + lambda * B A into the UNet's own weights. The updates of several subjects are added.

    The layers stay plain nn.Linear, so a sampling step costs the same as without LoRA.
    """

    def __init__(self, unet: UNet, subjects):
        """subjects: each has `lora`, a dictionary of layer name -> (A, B)."""
        self.updates = {}
        for subject in subjects:
            for name, pair in subject.lora.items():
                self.updates.setdefault(name, []).append(pair)
        self.weights = {name: unet.get_submodule(name).weight for name in self.updates}
        self.originals = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.lam = 0.0

    @torch.no_grad()
    def set(self, lam):
        """lambda = 0 restores the base bit for bit. Nothing is computed if lambda does not change."""
        if lam == self.lam:
            return
        self.lam = None     # until every weight is written
        for name, W in self.weights.items():
            W_0 = self.originals[name]
            if lam == 0:
                W.copy_(W_0)
            else:
                BA = sum(B.to(W.device) @ A.to(W.device) for A, B in self.updates[name])
                W.copy_(W_0.float() + lam * BA)                             # Eq. 2
        self.lam = lam
