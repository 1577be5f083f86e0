"""A base and a subject on disk.

A base is a folder: config.json (config.py), unet.safetensors, vae.safetensors, text_encoder.safetensors.
A subject is one file, subject.safetensors: V*, the LoRA, and in the header the metadata needed to use them.

Nothing to run here, and nothing of the paper. Loading runs no code from a file.
"""
import hashlib
import json
import os
import re
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora import target_names
from model import VAE, Base, TextEncoder, UNet
from support.cli import ROOT, BadInput, atomic_write, check_same, one_line, pick_precision, warn
from support.config import load_config

# ------------------------------------------------------------------------------------------------------------
# A base

PARTS = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder}


def default_base():
    """The folder that is used unless --base is given."""
    converted = ROOT / "checkpoints" / "videocrafter2"
    return Path(os.path.relpath(converted if converted.exists() else ROOT / "toy" / "base"))


def build_part(part, config):
    """An untrained network: part is "unet", "vae" or "text_encoder"."""
    return PARTS[part]({"unet": config.unet, "vae": config.vae, "text_encoder": config.text}[part])


def open_base(args, process, training=False):
    """--base -> Base on this process's device, its UNet in --precision and compiled if asked.

    The first line that a script prints names all of them.
    """
    precision = pick_precision(args.precision, process.device, training)
    base = load_base(args.base, process.device, getattr(torch, precision))
    if process.rank == 0:
        print(f"base {args.base} ({base.config.name}) on {process.device} in {precision}")
    if process.device.type == "cpu" and base.config.name == "videocrafter2":
        warn("VideoCrafter2 takes hours for a video on a CPU; for a GPU, install a torch build that knows it")
    check_same(process, device=process.device.type, base=base.config.fingerprint)
    if getattr(args, "compile", False):
        base.unet.compile()
    return base


def load_base(folder, device="cpu", dtype=torch.float32):
    """Folder -> Base on `device`, its UNet in `dtype`. Raises BadInput if its files do not fit together."""
    folder, networks = Path(folder), {}
    config = load_config(folder)
    with ExitStack() as stack:
        files = {part: stack.enter_context(open_safetensors(folder / f"{part}.safetensors"))
                 for part in PARTS}
        recorded = {(file.metadata() or {}).get("fingerprint") for file in files.values()}
        if None in recorded:    # someone else wrote a file, so only the weights can tell which base this is
            values = ((f"{part}.{name}", files[part].get_tensor(name)) for part in PARTS
                      for name in sorted(files[part].keys()))
            config = replace(config, fingerprint=fingerprint(values))
        elif len(recorded | {config.fingerprint}) > 1:
            raise BadInput(f"{folder}: config.json and the weights belong to different bases; convert or "
                           f"copy the base again")
        for part, file in files.items():
            with torch.device("meta"):
                network = build_part(part, config)
            try:
                network.load_state_dict({name: file.get_tensor(name) for name in file.keys()}, assign=True)
            except RuntimeError as error:
                raise BadInput(f"{folder / part}.safetensors: not the {part} that config.json describes "
                               f"({' '.join(str(error).split())[:300]})") from None
            network.to(device, dtype if part == "unet" else torch.float32)
            networks[part] = network.eval().requires_grad_(False)
    return Base(config, device, **networks)


def open_safetensors(path):
    """An open .safetensors file. Raises BadInput if it is missing or cannot be read."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; convert_ckpt.py makes a base, train.py a subject") from None
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a readable safetensors file ({one_line(error)}); "
                       f"make or copy it again") from None


def fingerprint(values, header=""):
    """(name, tensor) of weights -> 16 hex digits. Every value counts, its precision does not.

    A base's parts come in the order of PARTS, and names are sorted within a part.
    """
    digest = hashlib.sha256(header.encode())
    for name, tensor in values:
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def from_hub(repository, file, flag, advice):
    """A file of the Hugging Face hub -> its path in the hub's cache. Raises BadInput that names `flag`."""
    from huggingface_hub import hf_hub_download
    print(f"{flag}: {file} of https://huggingface.co/{repository}, downloaded unless it is in the cache")
    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # the hub's, the network's and the disk's own errors share no base class
        raise BadInput(f"{flag}: not downloaded ({one_line(error)}); do it by hand, and {advice}") from None


# ------------------------------------------------------------------------------------------------------------
# A subject


@dataclass
class Subject:
    """What train.py learns, in float32, and the metadata needed to use it."""
    placeholder: str            # how prompts name the subject: "V*"
    class_word: str             # what the subject is: "dog"
    base_name: str
    base_fingerprint: str
    steps: int                  # training steps so far
    settings: dict              # of the training
    v_star: torch.Tensor        # (1, D)
    lora: dict = field(default_factory=dict)        # name of a layer of the UNet -> (A, B)

    def tensors(self):
        """All that is learned, under the names that it has in the file: for LoRA, PEFT's."""
        tensors = {"v_star": self.v_star}
        for name, (A, B) in self.lora.items():
            tensors |= {f"unet.{name}.lora_A.weight": A, f"unet.{name}.lora_B.weight": B}
        return tensors

    def metadata(self):
        """The file's header. lora_alpha = rank tells readers of PEFT files that lambda is the only scale."""
        ranks = {name: len(A) for name, (A, B) in self.lora.items()}
        return {"placeholder": self.placeholder, "class_word": self.class_word, "base_name": self.base_name,
                "base_fingerprint": self.base_fingerprint, "steps": str(self.steps),
                "settings": json.dumps(self.settings), "layers": json.dumps(ranks),
                "lora_alpha": " ".join(map(str, sorted(set(ranks.values()))))}

    def fingerprint(self):
        """16 hex digits that tell this subject, its tensors and its metadata, from any other."""
        return fingerprint(sorted(self.tensors().items()), json.dumps(self.metadata(), sort_keys=True))


def save_subject(path, subject: Subject):
    """Subject -> safetensors file, which appears whole or not at all."""
    tensors = {name: x.detach().float().cpu().contiguous() for name, x in subject.tensors().items()}
    with atomic_write(Path(path)) as temporary:
        save_file(tensors, temporary, subject.metadata() | {"fingerprint": subject.fingerprint()})


def read_header(path):
    """A .safetensors file's header, or {} where there is none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def load_subject(path, base: Base):
    """safetensors file -> Subject for this base. Raises BadInput: not a subject, another base's, damaged."""
    path = Path(path)
    with open_safetensors(path) as file:
        metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    try:
        subject = Subject(metadata["placeholder"], metadata["class_word"], metadata["base_name"],
                          metadata["base_fingerprint"], int(metadata["steps"]),
                          json.loads(metadata["settings"]), v_star=tensors["v_star"])
        names = json.loads(metadata["layers"])
    except (KeyError, ValueError) as error:
        raise BadInput(f"{path}: not a subject of train.py, its header has no valid {error}") from None
    check_base(path, subject, base)
    for name in names:
        subject.lora[name] = tuple(tensors.get(f"unet.{name}.lora_{which}.weight") for which in "AB")
    unknown = names.keys() - set(target_names(base.unet))
    fits = not unknown and subject.tensors().keys() == tensors.keys()
    if not fits or subject.fingerprint() != metadata.get("fingerprint"):
        raise BadInput(f"{path}: its content is not what was saved; the file is damaged, copy it again")
    subject.v_star = subject.v_star.to(base.device)
    return subject


def check_base(path, subject, base):
    if subject.base_fingerprint != base.config.fingerprint:
        raise BadInput(f"{path}: was trained on the base {subject.base_name} ({subject.base_fingerprint}), "
                       f"but this is {base.config.name} ({base.config.fingerprint}); pass that base with "
                       f"--base, or train again on this one")


SAVE_NAME = "step-([0-9]{6,})"     # of a folder in a run's (runs.py)


def find_subjects(given, base_fingerprint):
    """--subject -> paths: those given, else the newest of this base under runs/, else the committed one."""
    if given:
        if "none" in given and len(given) > 1:
            raise BadInput("--subject none: means no subject; leave it out, or the others")
        paths = [Path(path) for path in given if path != "none"]
        return [path / "subject.safetensors" if path.is_dir() else path for path in paths]
    is_save = re.compile(rf"(\.tmp-.*)?{SAVE_NAME}").fullmatch
    trained = [Path(folder) / "subject.safetensors" for folder, _, names in os.walk("runs")
               if "subject.safetensors" in names and not is_save(Path(folder).name)]
    trained.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    passed_over = []
    for path in [*trained, Path(os.path.relpath(ROOT / "toy" / "subject.safetensors"))]:
        header = read_header(path)
        if header.get("base_fingerprint") == base_fingerprint and "layers" in header:
            if passed_over:
                warn(f"{passed_over[0]}, so {path} is taken; --subject names another")
            return [path]
        passed_over.append(f"{path} is newer, but {'of another base' if header else 'not readable'}")
    raise BadInput("--subject: none of this base is under runs/; train one, name one, or pass --subject none")


def pick_images(args):
    """Fills args.images and args.class_word if not given: the base's own, else the embedded base's."""
    if args.images is None:
        training = load_config(args.base).training
        if not training.images:
            training = load_config(ROOT / "toy" / "base").training
        args.images = os.path.relpath(ROOT / training.images)
        args.class_word = args.class_word or training.class_word
