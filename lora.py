"""Eq. 2 of CustomCrafter, W = W_0 + lambda * B A on the spatial attention, and the subject file that A, B and V* are kept in.

Nothing to run here. train.py learns a subject with `add_lora` (the update stays beside the weight, lambda = 1); sample.py
applies one with `MergedLoRA` (the update goes into the weight, so that a customised video costs what a plain one costs). What
the paper compares with, Custom Diffusion's full matrices and DreamVideo's adapters, stands at the end of the page.

Shapes: A (r, C_in), B (C_out, r), where r is the rank; V* (n, D), one row per learned word.
"""
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from model import (BadInput, Base, SpatialTransformer, Tokenizer, TransformerBlock, UNet, check_tensors, check_values,
                   complete_or_absent, one_line, zeroed)


def target_names(unet: UNet, targets="all"):
    """The linears that get an update: to_q, to_k, to_v of self- and cross-attention in every spatial transformer.

    96 for VideoCrafter2 (paper, Sec. "Spatial Subject Learning Module"); with targets "cross", the ablation of its Table 2, the
    48 of the cross-attention. The temporal transformers have attention layers of the same class; they form the motion and are left alone.
    """
    return [f"{name}.{attn}.{to}" for name in spatial_blocks(unet)
            for attn in ("attn1", "attn2")[targets == "cross":] for to in ("to_q", "to_k", "to_v")]


def spatial_blocks(unet: UNet):
    return [f"{name}.block" for name, module in unet.named_modules() if isinstance(module, SpatialTransformer)]


# ---------------------------------------------------------------------------------------------------------------------
# Training: the update beside the weight


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update beside it."""

    def __init__(self, base: nn.Linear, rank):
        super().__init__()
        self.base = base
        self.lam = 1.0
        # A and B stay in float32 whatever the frozen weights are in: their steps are too small for bfloat16.
        # Hu et al. 2021: A is Gaussian and B zero, so that step 0 computes the base exactly.
        A, B = torch.randn(rank, base.in_features) / base.in_features ** 0.5, torch.zeros(base.out_features, rank)
        self.lora_A = nn.Parameter(A.to(base.weight.device))
        self.lora_B = nn.Parameter(B.to(base.weight.device))

    def forward(self, x):
        """(..., C_in) -> (..., C_out)"""
        update = F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype))
        return self.base(x) + self.lam * update                             # Eq. 2; lambda = 1 in training

    def tensors(self):
        return self.lora_A, self.lora_B


def add_lora(unet: UNet, rank, targets="all"):
    """Puts a LoRALinear around every target, in place. Returns name -> LoRALinear."""
    return wrap(unet, target_names(unet, targets), lambda linear: LoRALinear(linear, rank))


def wrap(unet, names, layer):
    """Puts layer(module) in the place of each named module. Returns name -> layer."""
    layers = {}
    for name in names:
        layers[name] = layer(unet.get_submodule(name))
        unet.set_submodule(name, layers[name])
    return layers


class LiveLoRA:
    """Sets lambda while the update is still beside the weight: what a preview needs in the middle of training."""

    def __init__(self, layers):
        self.layers = layers

    def set(self, lam):
        for layer in self.layers:
            layer.lam = lam


# ---------------------------------------------------------------------------------------------------------------------
# Sampling: the update in the weight


class MergedLoRA:
    """Writes W_0 + lambda * B A into the UNet's own weights; between two calls the network is a plain one.

    Of several subjects, the updates are summed. (A DreamVideo subject's adapters are no update of a weight: they are put into
    their blocks while lambda is not 0.)
    """

    def __init__(self, unet: UNet, *subjects: "Subject"):
        updates = {}
        for s in subjects:
            for name, tensors in (*s.lora.items(), *s.full.items()):
                updates.setdefault(name, []).append(tensors)
        self.layers = [(unet.get_submodule(name), learned) for name, learned in updates.items()]
        self.originals = [linear.weight.detach().clone() for linear, _ in self.layers]
        blocks = [(unet.get_submodule(name), tensors) for s in subjects for name, tensors in s.adapters.items()]
        self.without = [(block, block.norm2, block.attn2) for block, _ in blocks]
        self.adapters = [Adapter(block, tensors) for block, tensors in blocks]
        self.with_adapters = [(block, block.norm2, block.attn2) for block, _ in blocks]
        self._put(self.without)
        self.lam = 0.0

    @torch.no_grad()
    def set(self, lam):
        """lambda = 0 restores the base bit for bit. Setting the value already set costs nothing."""
        if lam == self.lam:
            return
        for (linear, learned), W_0 in zip(self.layers, self.originals):
            if lam == 0:
                linear.weight.copy_(W_0)
            else:
                update = sum(whole(tensors, W_0.device) for tensors in learned)
                linear.weight.copy_(W_0.float() + lam * update)             # Eq. 2
        for adapter in self.adapters:
            adapter.lam = lam
        self._put(self.with_adapters if lam else self.without)
        self.lam = lam

    @staticmethod
    def _put(blocks):
        for block, norm2, attn2 in blocks:
            block.norm2, block.attn2 = norm2, attn2


def whole(tensors, device):
    """(A, B), or (a whole matrix,) -> the update of a linear, (C_out, C_in), on `device`."""
    *A, B = (x.to(device) for x in tensors)
    return B @ A[0] if A else B


# ---------------------------------------------------------------------------------------------------------------------
# A subject: V* and the update in one file


MAX_RANK = 1024
TENSORS = {"lora": ("lora_A.weight", "lora_B.weight"), "full": ("delta.weight",),
           "adapters": ("adapter.down.weight", "adapter.down.bias", "adapter.up.weight", "adapter.up.bias")}


@dataclass
class Subject:
    """What train.py learns, in float32: `v_star` (1, D), `lora` name -> (A, B), and the facts needed to use them.

    The baselines have, in place of `lora`, `full` name -> (update of a whole matrix,) or `adapters` name of a block -> 4 tensors.
    """
    placeholder: str
    class_word: str
    rank: int
    base_name: str
    base_fingerprint: str
    steps: int
    method: str = "customcrafter"
    settings: dict = field(default_factory=dict)
    lora: dict = field(default_factory=dict)
    full: dict = field(default_factory=dict)
    adapters: dict = field(default_factory=dict)
    v_star: torch.Tensor = None

    def tensors(self):
        """What is learned, under the names that the file gives it (for LoRA, PEFT's)."""
        return {"v_star": self.v_star, **{f"unet.{name}.{end}": x for kind, ends in TENSORS.items()
                                          for name, layer in getattr(self, kind).items() for end, x in zip(ends, layer)}}

    def facts(self):
        """What there is to know besides the tensors, as text."""
        facts = {key: str(value) for key, value in vars(self).items() if key not in (*TENSORS, "v_star", "settings")}
        return facts | {"settings": json.dumps(self.settings)}

    def fingerprint(self):
        """16 hex digits that tell this subject, its tensors and its facts, from any other."""
        digest = hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode())
        for name, tensor in sorted(self.tensors().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def check_placeholder(placeholder, flag="--placeholder"):
    if not re.fullmatch(r"\S{1,32}", placeholder) or not placeholder.isprintable() or not re.search(r"\W", placeholder):
        raise BadInput(f"{flag} {placeholder!r}: should be one word, without spaces, that holds a sign which ordinary "
                       f"words do not, such as V* or <new1>")


def class_embedding(text_encoder, class_word):
    """Where V* starts: the class word's row of the embedding table (1, D); the mean of its rows if it has several."""
    return text_encoder.token_embedding.weight[class_ids(class_word)].float().mean(dim=0, keepdim=True)


def class_ids(class_word):
    ids = Tokenizer().encode(class_word)
    if not ids:
        raise BadInput(f"--class_word {class_word!r}: is empty; name what the subject is, such as dog")
    return ids


def save_subject(path, subject: Subject):
    """Subject -> safetensors file under PEFT's names. The file is complete or absent, even if the process is killed."""
    tensors = {name: x.detach().float().cpu().contiguous() for name, x in subject.tensors().items()}
    # lora_alpha = rank tells readers of PEFT files that lambda is the only scale.
    facts = subject.facts() | {"lora_alpha": str(subject.rank), "fingerprint": subject.fingerprint()}
    with complete_or_absent(Path(path)) as temporary:
        save_file(tensors, temporary, facts)


def load_subject(path, base: Base):
    """safetensors file -> Subject for this base. Raises BadInput: not a subject, another base's, damaged."""
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as f:
            meta = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; train.py writes subject.safetensors into its --out folder") from None
    except Exception as error:  # SafetensorError, OSError or ValueError, by the kind of damage
        raise BadInput(f"{path}: not a readable safetensors file ({one_line(error)})") from None
    try:
        subject = Subject(meta["placeholder"], meta["class_word"], int(meta["rank"]), meta["base_name"],
                          meta["base_fingerprint"], int(meta["steps"]), meta["method"], json.loads(meta["settings"]))
        if not 1 <= subject.rank <= MAX_RANK or not isinstance(subject.settings, dict):
            raise ValueError("rank or settings")
        check_placeholder(subject.placeholder, "placeholder")
    except (KeyError, ValueError, RecursionError, BadInput) as error:
        raise BadInput(f"{path}: not a subject of this project, its header has no valid {one_line(error)}") from None
    if subject.base_fingerprint != base.config.fingerprint:
        raise BadInput(f"{path}: was learned on the base {subject.base_name} ({subject.base_fingerprint}), and this is "
                       f"{base.config.name} ({base.config.fingerprint}); pass that base with --base, or train again on this one")
    kind, shapes = expected_shapes(subject, base.unet, path)
    expected = {"v_star": torch.empty(1, base.config.text.width, device="meta")}
    for name, layer in shapes.items():
        expected |= {f"unet.{name}.{end}": torch.empty(shape, device="meta") for end, shape in zip(TENSORS[kind], layer)}
    check_tensors(path, tensors, expected)
    check_values(path, tensors, [torch.float32])
    subject.v_star = tensors["v_star"].to(base.device)
    setattr(subject, kind, {name: tuple(tensors[f"unet.{name}.{end}"] for end in TENSORS[kind]) for name in shapes})
    if subject.fingerprint() != meta.get("fingerprint"):
        raise BadInput(f"{path}: its content is not what was saved; the file is damaged, copy it again")
    return subject


def expected_shapes(subject, unet, path):
    """-> the kind of update that the subject's method learns, and name -> the shapes of its tensors."""
    if subject.method == "dreamvideo":
        d = {name: unet.get_submodule(name).norm3.normalized_shape[0] for name in spatial_blocks(unet)}
        return "adapters", {name: ((d[name] // 2, d[name]), (d[name] // 2,), (d[name], d[name] // 2), (d[name],)) for name in d}
    if subject.method == "custom_diffusion":
        return "full", {name: (unet.get_submodule(name).weight.shape,) for name in full_names(unet)}
    if subject.method != "customcrafter":
        raise BadInput(f"{path}: was learned by the method {subject.method!r}, which this version does not know")
    linears = {name: unet.get_submodule(name) for name in target_names(unet, subject.settings.get("targets", "all"))}
    return "lora", {name: ((subject.rank, x.in_features), (x.out_features, subject.rank)) for name, x in linears.items()}


# ---------------------------------------------------------------------------------------------------------------------
# What the paper compares with


def full_names(unet: UNet):
    """Custom Diffusion's targets: keys and values of every cross-attention, 32 matrices for VideoCrafter2."""
    return [f"{name}.attn2.{to}" for name in spatial_blocks(unet) for to in ("to_k", "to_v")]


def rare_embedding(text_encoder):
    """Where Custom Diffusion's word starts: a token that ordinary text does not have, "ktn" within a word. (1, D)"""
    return text_encoder.token_embedding.weight[42170:42171].float().clone()


class FullLinear(nn.Module):
    """A frozen linear layer with a trainable update of its whole matrix beside it (Kumari et al. 2023)."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.lam = base, 1.0
        self.delta = nn.Parameter(torch.zeros_like(base.weight, dtype=torch.float32))

    def forward(self, x):
        """Text (B, L, D) -> keys or values (B, L, C). The first token, start-of-text, is the same in every prompt: nothing is learned from it."""
        y = self.base(x) + self.lam * F.linear(x, self.delta.to(x.dtype))
        return torch.cat([y[:, :1].detach(), y[:, 1:]], dim=1)

    def tensors(self):
        return self.delta,


class Adapter(nn.Module):
    """DreamVideo's identity adapter (Wei et al. 2024): x <- attn2(norm2(x), text) + x + lambda * adapter(x), on the un-normalised x.

    It takes the places of its block's norm2 and attn2.
    """

    def __init__(self, block: TransformerBlock, tensors=()):
        super().__init__()
        self.norm, self.attn, self.lam = block.norm2, block.attn2, 1.0
        d, device = block.norm3.normalized_shape[0], block.norm3.weight.device
        self.down, self.up = nn.Linear(d, d // 2, device=device), zeroed(nn.Linear(d // 2, d, device=device))
        for p, value in zip(self.tensors(), tensors):
            p.data = value.to(device)
        block.norm2, block.attn2 = nn.Identity(), self

    def forward(self, x, context):
        """(N, S, C) -> (N, S, C)"""
        linear = lambda layer, x: F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
        return self.attn(self.norm(x), context) + self.lam * linear(self.up, F.gelu(linear(self.down, x)))

    def tensors(self):
        return self.down.weight, self.down.bias, self.up.weight, self.up.bias


def add_updates(unet: UNet, method, rank, targets):
    """Puts what `method` trains beside or into the frozen UNet, in place. Returns the kind of update, and name -> layer."""
    if method == "custom_diffusion":
        return "full", wrap(unet, full_names(unet), FullLinear)
    if method == "dreamvideo":
        return "adapters", {name: Adapter(unet.get_submodule(name)) for name in spatial_blocks(unet)}
    return "lora", add_lora(unet, rank, targets)
