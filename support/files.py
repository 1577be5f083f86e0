"""Bases and subjects on disk. Loading them runs no code from a file.

A base is a folder: config.json (config.py), unet.safetensors, vae.safetensors, text_encoder.safetensors.
A subject is one file, subject.safetensors: V*, the LoRA, and in the header the metadata needed to use them.
"""
import hashlib
import json
import re
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import VAE, Base, TextEncoder, UNet
from support.cli import ROOT, BadInput, atomic_write, check_same, one_line, pick_precision, warn
from support.config import load_config

# ------------------------------------------------------------------------------------------------------------
# A base

PARTS = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder}


def default_base():
    """The folder that is used unless --base is given."""
    converted = ROOT / "checkpoints" / "videocrafter2"
    return converted if converted.exists() else ROOT / "toy" / "base"


def open_base(args, process, training=False):
    """Loads --base onto this process's device, in --precision and with --compile, and prints what it is."""
    precision = pick_precision(args.precision, process.device, training)
    base = load_base(args.base, process.device, getattr(torch, precision))
    if process.rank == 0:
        print(f"base {args.base} ({base.config.name}) on {process.device} in {precision}")
    if process.device.type == "cpu" and base.config.name == "videocrafter2":
        warn("VideoCrafter2 takes hours for a video on a CPU; to use a GPU, install a torch build for it")
    check_same(process, device=process.device.type, base=base.config.fingerprint)
    if args.compile:
        base.unet.compile()
    return base


def load_base(folder, device="cpu", dtype=torch.float32):
    """Folder -> Base on `device`, its UNet in `dtype`. Raises BadInput if its files do not match."""
    folder, networks = Path(folder), {}
    config = load_config(folder)
    with ExitStack() as stack:
        files = {part: stack.enter_context(open_safetensors(folder / f"{part}.safetensors"))
                 for part in PARTS}
        recorded = {(file.metadata() or {}).get("fingerprint") for file in files.values()}
        if None in recorded:    # another program wrote a file, so the weights have to be read
            values = ((f"{part}.{name}", files[part].get_tensor(name)) for part in PARTS
                      for name in sorted(files[part].keys()))
            config = replace(config, fingerprint=fingerprint(values))
        elif len(recorded | {config.fingerprint}) > 1:
            raise BadInput(f"{folder}: its files belong to different bases; convert or copy the base again")
        for part, file in files.items():
            with torch.device("meta"):
                network = PARTS[part](getattr(config, part))
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
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a readable safetensors file ({one_line(error)}); make it again by "
                       f"convert_ckpt.py if it is a base's, by train.py if it is a subject") from None


def fingerprint(values, header=""):
    """(name, tensor) of weights -> 16 hex digits, which depend on every value, but not on its precision.

    The parts of a base come in the order of PARTS, and the names within a part are sorted.
    """
    digest = hashlib.sha256(header.encode())
    for name, tensor in values:
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def from_hub(repository, file, flag, advice):
    """A file of the Hugging Face hub -> its path in the hub's cache. Raises BadInput, which names `flag`."""
    from huggingface_hub import hf_hub_download
    print(f"{flag}: {file} of https://huggingface.co/{repository}, downloaded unless it is in the cache")
    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # the hub, the network and the disk each raise errors of their own
        raise BadInput(f"{flag}: not downloaded ({one_line(error)}); download it, and {advice}") from None


# ------------------------------------------------------------------------------------------------------------
# A subject


@dataclass
class Subject:
    """V* and the LoRA that train.py learns, in float32, with the metadata needed to use them."""
    placeholder: str            # how prompts name the subject: "V*"
    class_word: str             # the class of the subject: "dog"
    base_name: str
    base_fingerprint: str
    steps: int                  # training steps so far
    settings: dict              # of the training
    v_star: torch.Tensor        # (1, D)
    lora: dict = field(default_factory=dict)        # name of a layer of the UNet -> (A, B)

    def tensors(self):
        """The learned tensors under their names in the file. A LoRA's names end as PEFT's do."""
        tensors = {"v_star": self.v_star}
        for name, (A, B) in self.lora.items():
            tensors |= {f"unet.{name}.lora_A.weight": A, f"unet.{name}.lora_B.weight": B}
        return tensors

    def metadata(self):
        """The file's header. lora_alpha = rank tells readers of PEFT files that lambda is the only scale."""
        metadata = {"placeholder": self.placeholder, "class_word": self.class_word,
                    "base_name": self.base_name, "base_fingerprint": self.base_fingerprint,
                    "steps": str(self.steps), "settings": json.dumps(self.settings)}
        if self.lora:
            ranks = {name: len(A) for name, (A, B) in self.lora.items()}
            metadata["layers"] = json.dumps(ranks)
            metadata["lora_alpha"] = " ".join(map(str, sorted(set(ranks.values()))))
        return metadata

    def read_layers(self, metadata, tensors, unet):
        """Takes the layers that the header lists from a file's tensors. Raises KeyError if it lists none."""
        for name in json.loads(metadata["layers"]):
            self.lora[name] = tuple(tensors[f"unet.{name}.lora_{which}.weight"] for which in "AB")

    def fingerprint(self):
        """16 hex digits that identify this subject by its tensors and its metadata."""
        return fingerprint(sorted(self.tensors().items()), json.dumps(self.metadata(), sort_keys=True))


def save_subject(path, subject: Subject):
    """Subject -> safetensors file, which appears whole or not at all."""
    tensors = {name: x.detach().float().cpu().contiguous() for name, x in subject.tensors().items()}
    with atomic_write(Path(path)) as temporary:
        save_file(tensors, temporary, subject.metadata() | {"fingerprint": subject.fingerprint()})


def read_header(path):
    """The header of a .safetensors file or a folder's subject, or {} if it is missing or cannot be read."""
    path = path / "subject.safetensors" if path.is_dir() else path
    with suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
        return file.metadata() or {}
    return {}


def load_subject(path, base: Base, kind=Subject):
    """safetensors file -> Subject, or a subclass. Raises BadInput if it is damaged or of another base."""
    path = Path(path)
    with open_safetensors(path) as file:
        metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    recorded = metadata.pop("fingerprint", None)
    if recorded != fingerprint(sorted(tensors.items()), json.dumps(metadata, sort_keys=True)):
        raise BadInput(f"{path}: is no subject, or its content is not what was saved; copy the file again")
    subject = kind(metadata["placeholder"], metadata["class_word"], metadata["base_name"],
                   metadata["base_fingerprint"], int(metadata["steps"]), json.loads(metadata["settings"]),
                   tensors["v_star"])
    if subject.base_fingerprint != base.config.fingerprint:
        raise BadInput(f"{path}: was trained on the base {subject.base_name} ({subject.base_fingerprint}), "
                       f"but this is {base.config.name} ({base.config.fingerprint}); pass that base with "
                       f"--base, or train again")
    try:
        subject.read_layers(metadata, tensors, base.unet)
    except KeyError as error:
        raise BadInput(f"{path}: not a subject for this command; its header has no {error}") from None
    subject.v_star = subject.v_star.to(base.device)
    return subject


def find_subjects(given, base_fingerprint):
    """--subject -> paths: those given, or the newest of this base under runs/, or this repository's."""
    if given:
        paths = [Path(path) for path in given if path != "none"]
        return [path / "subject.safetensors" if path.is_dir() else path for path in paths]
    trained = [path for path in Path("runs").glob("**/subject.safetensors")
               if path.exists() and not re.match(r"step-\d{6}|\.tmp-", path.parent.name)]    # not a save's
    trained.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in [*trained, ROOT / "toy" / "subject.safetensors"]:
        header = read_header(path)
        if header.get("base_fingerprint") == base_fingerprint and "layers" in header:
            return [path]
        warn(f"{path}: skipped, because it is not a subject of this base that sample.py can read")
    raise BadInput("--subject: none of this base is under runs/; train one, name one, or pass --subject none")
