"""Eq. 2 of CustomCrafter, W = W_0 + lambda * B A on the spatial attention, and the subject file that A, B and V* are kept in.

Nothing to run here. train.py learns a subject with `add_lora` (the update stays beside the weight, lambda = 1); sample.py
applies one with `MergedLoRA` (the update goes into the weight, so that a customised video costs what a plain one costs).

Shapes: A (r, C_in), B (C_out, r), where r is the rank; V* (n, D), one row per learned word.
"""
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from model import BadInput, Base, SpatialTransformer, Tokenizer, UNet, check_tensors, complete_or_absent


def target_names(unet: UNet):
    """The linears that get an update: to_q, to_k, to_v of self- and cross-attention in every spatial transformer.

    96 for VideoCrafter2 (paper, Sec. "Spatial Subject Learning Module"). The temporal transformers have attention layers
    of the same class; they form the motion and are left alone.
    """
    return [f"{name}.block.{attn}.{to}"
            for name, module in unet.named_modules() if isinstance(module, SpatialTransformer)
            for attn in ("attn1", "attn2") for to in ("to_q", "to_k", "to_v")]


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


def add_lora(unet: UNet, rank):
    """Puts a LoRALinear around every target, in place. Returns name -> LoRALinear."""
    layers = {}
    for name in target_names(unet):
        parent, _, child = name.rpartition(".")
        layers[name] = LoRALinear(unet.get_submodule(name), rank)
        setattr(unet.get_submodule(parent), child, layers[name])
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

    Of several subjects, the updates B A are summed.
    """

    def __init__(self, unet: UNet, *subjects: "Subject"):
        self.layers = [(unet.get_submodule(name), [s.lora[name] for s in subjects]) for name in subjects[0].lora]
        self.originals = [linear.weight.detach().clone() for linear, _ in self.layers]
        self.lam = 0.0

    @torch.no_grad()
    def set(self, lam):
        """lambda = 0 restores the base bit for bit. Setting the value already set costs nothing."""
        if lam == self.lam:
            return
        for (linear, pairs), W_0 in zip(self.layers, self.originals):
            if lam == 0:
                linear.weight.copy_(W_0)
            else:
                update = sum(B.to(W_0.device) @ A.to(W_0.device) for A, B in pairs)
                linear.weight.copy_(W_0.float() + lam * update)             # Eq. 2
        self.lam = lam


# ---------------------------------------------------------------------------------------------------------------------
# A subject: V* and the update in one file


@dataclass
class Subject:
    """What train.py learns: `lora` is name -> (A, B) in float32, `v_star` (1, D), and the facts needed to use them."""
    placeholder: str
    class_word: str
    rank: int
    base_name: str
    base_fingerprint: str
    steps: int
    method: str = "customcrafter"
    settings: dict = field(default_factory=dict)
    lora: dict = field(default_factory=dict)
    v_star: torch.Tensor = None

    def tensors(self):
        """What is learned, under the names that the file gives it (PEFT's)."""
        pairs = {f"unet.{name}.lora_{letter}.weight": x for name, pair in self.lora.items() for letter, x in zip("AB", pair)}
        return {"v_star": self.v_star, **pairs}

    def fingerprint(self):
        """16 hex digits that tell this subject's tensors from another's."""
        return hashlib.sha256(b"".join(t.detach().float().cpu().numpy().tobytes() for t in self.tensors().values())).hexdigest()[:16]


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
    facts = {key: value for key, value in vars(subject).items() if key not in ("lora", "v_star")}
    facts |= {"lora_alpha": subject.rank, "settings": json.dumps(subject.settings)}
    with complete_or_absent(Path(path)) as temporary:
        save_file(tensors, temporary, {key: str(value) for key, value in facts.items()})


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
        raise BadInput(f"{path}: not a readable safetensors file ({error})") from None
    try:
        subject = Subject(meta["placeholder"], meta["class_word"], int(meta["rank"]), meta["base_name"],
                          meta["base_fingerprint"], int(meta["steps"]), meta["method"], json.loads(meta["settings"]))
    except (KeyError, ValueError) as error:
        raise BadInput(f"{path}: not a subject of this project, its header has no valid {error}") from None
    if subject.base_fingerprint != base.config.fingerprint:
        raise BadInput(f"{path}: was learned on the base {subject.base_name} ({subject.base_fingerprint}), and this is "
                       f"{base.config.name} ({base.config.fingerprint}); pass that base with --base, or train again on this one")
    linears = {name: base.unet.get_submodule(name) for name in target_names(base.unet)}
    expected = {"v_star": torch.empty(1, base.config.text.width, device="meta")}
    for name, linear in linears.items():
        expected[f"unet.{name}.lora_A.weight"] = torch.empty(subject.rank, linear.in_features, device="meta")
        expected[f"unet.{name}.lora_B.weight"] = torch.empty(linear.out_features, subject.rank, device="meta")
    check_tensors(path, tensors, expected)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise BadInput(f"{path}: {name} is not finite float32; the file is damaged")
    subject.v_star = tensors["v_star"].to(base.device)
    subject.lora = {name: (tensors[f"unet.{name}.lora_A.weight"], tensors[f"unet.{name}.lora_B.weight"]) for name in linears}
    return subject
