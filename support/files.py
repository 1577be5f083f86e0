"""A base and a subject on disk, and every check of what comes from outside.

A base is a folder: config.json (config.py), unet.safetensors, vae.safetensors, text_encoder.safetensors.
A subject is one file, subject.safetensors: V*, what was learned in the UNet, and facts in the header.

Nothing to run here, and nothing of the paper. Nothing in a file is run: weights are safetensors, or pickles
that torch reads with weights_only.
"""
import hashlib
import io
import json
import os
import re
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from cli import (LOCK, RECORD, ROOT, BadInput, check_regular, complete_or_absent, device_memory, is_text,
                 one_line, printable, quiet_libraries, unfinished, warn)
from config import RANGES, BaseConfig, TrainingDefaults, load_config, save_config
from lora import Subject
from model import VAE, NoiseSchedule, TextEncoder, UNet
from paper.baselines import METHODS, TARGETS
from texts import caption_file, check_placeholder

# ------------------------------------------------------------------------------------------------------------
# A base

PARTS = {"unet": UNet, "vae": VAE, "text_encoder": TextEncoder}


class Base:
    """A loaded base: frozen networks in eval mode (dropout off), in float32 but for the UNet, on `device`."""

    def __init__(self, config: BaseConfig, device, unet, vae, text_encoder):
        self.config, self.device = config, torch.device(device)
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.schedule = NoiseSchedule(config.schedule)

    @torch.no_grad()
    def encode(self, frames, chunk=4):
        """frames (N, 3, H, W) in [-1, 1] -> latents (N, 4, h, w) on `device`, `chunk` frames at a time."""
        return torch.cat([self.vae.encode(part.to(self.device)) for part in frames.split(chunk)])

    @torch.no_grad()
    def decode(self, z, chunk=4):
        """z (B, 4, T, h, w) -> video (B, T, H, W, 3) uint8 on the CPU, `chunk` frames at a time."""
        frames = z.transpose(1, 2).flatten(0, 1)                            # (B*T, 4, h, w)
        x = torch.cat([self.vae.decode(part.float()).cpu() for part in frames.split(chunk)])
        x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
        return x.permute(0, 2, 3, 1).unflatten(0, (z.shape[0], -1))         # (B, T, H, W, 3)


def pick_checkpointing(args, base, settings, sampling, rank):
    """--grad_checkpointing, or where it is left out: True if the device is too small to train without it.

    The count is that of tests/full_size.py --estimate: 29.7 GB of activations for two clips of 16 frames of
    320x512 in VideoCrafter2's UNet in bfloat16. Activations grow with each of these numbers.
    """
    if args.grad_checkpointing is not None:
        return args.grad_checkpointing
    clips = settings.batch_size * (2 if settings.alpha > 0 else 1)
    positions = sampling.frames * sampling.height * sampling.width / base.config.vae.factor ** 2
    weights = [*base.unet.parameters(), *base.vae.parameters(), *base.text_encoder.parameters()]
    values = clips / 2 * positions / (16 * 40 * 64) * base.config.unet.channels / 320
    activations = 29.7 * 2**30 * values * base.unet.conv_out.weight.element_size() / 2
    needed = activations + sum(p.numel() * p.element_size() for p in weights)
    here = device_memory(base.device)
    if needed + 2**30 <= here:  # the driver and the allocator take the last GB
        return False
    if rank == 0:
        print(f"--grad_checkpointing is on: training without it needs {needed / 2**30:.0f} GB, and this "
              f"device has {here / 2**30:.0f}; --no-grad_checkpointing turns it off")
    return True


def as_typed(path):
    """A path of this project as a user would type it here."""
    try:
        return Path(os.path.relpath(path))
    except ValueError:  # on Windows, from another drive
        return path


def default_base():
    """The folder that is used where --base is left out."""
    converted = ROOT / "checkpoints" / "videocrafter2"
    return as_typed(converted if converted.exists() else ROOT / "toy" / "base")


def build_part(part, config: BaseConfig):
    """An untrained network: part is "unet", "vae" or "text_encoder"."""
    return PARTS[part]({"unet": config.unet, "vae": config.vae, "text_encoder": config.text}[part])


def load_base(folder, device="cpu", dtype=torch.float32):
    """Folder -> Base on `device`, its UNet in `dtype`. Raises BadInput if a name, shape or value is wrong."""
    folder = Path(folder)
    config = load_config(folder / "config.json")
    states = {}
    networks = {}
    for part, crc32 in zip(PARTS, config.crc32 or (None, None, None), strict=True):
        path = folder / f"{part}.safetensors"
        states[part] = read_weights(path, crc32)
        try:
            with torch.device("meta"):
                network = build_part(part, config)
        except Exception as error:  # every layer of torch refuses impossible numbers in its own way
            path = folder / "config.json"
            raise BadInput(f"{path}: its {part} cannot be built ({one_line(error)})") from None
        check_tensors(path, states[part], network.state_dict())
        check_values(path, states[part])
        network.load_state_dict(states[part], assign=True)
        network.to(device, dtype if part == "unet" else torch.float32)
        networks[part] = network.eval().requires_grad_(False)
    config = replace(config, fingerprint=config.fingerprint or fingerprint(states))
    return Base(config, device, **networks)


def read_weights(path, crc32):
    """A base's .safetensors file -> name -> tensor. Raises BadInput; `crc32` None checks no bytes."""
    try:
        check_regular(path)
        if crc32 is not None and file_crc32(path) != crc32:
            raise ValueError("its bytes are not those that config.json was written for")
        return load_file(path)
    except FileNotFoundError:
        weights = ", ".join(f"{part}.safetensors" for part in PARTS)
        raise BadInput(f"{path}: no such file; a base folder holds config.json and {weights} "
                       f"(python convert_ckpt.py makes one)") from None
    except Exception as error:  # SafetensorError, OSError or ValueError, by the kind of damage
        raise BadInput(f"{path}: not a readable safetensors file ({one_line(error)}); "
                       f"convert or copy it again") from None


def is_plain_state(state):
    """Whether a pickle gave a dictionary of text -> tensors with values: not sparse, nested or meta."""
    if not isinstance(state, dict) or not state:
        return False
    plain = lambda x: (torch.is_tensor(x) and x.layout == torch.strided and x.device.type == "cpu"
                       and not x.is_nested and not x.is_quantized)
    return all(isinstance(name, str) and plain(x) for name, x in state.items())


def check_tensors(path, found, expected):
    """Two dicts of name -> tensor (or anything with a shape) agree in names and shapes. Raises BadInput."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or extra:
        first_missing = f" (first {missing[0]})" if missing else ""
        first_extra = f" (first {extra[0]})" if extra else ""
        raise BadInput(f"{path}: {len(missing)} tensors missing{first_missing}, {len(extra)} unknown"
                       f"{first_extra}; is it the file of another model, or its config?")
    other = [name for name in expected if tuple(found[name].shape) != tuple(expected[name].shape)]
    if other:
        raise BadInput(f"{path}: {len(other)} tensors of another shape, first {other[0]}: "
                       f"{tuple(found[other[0]].shape)} where {tuple(expected[other[0]].shape)} belongs")


def check_values(path, tensors, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
    """Every tensor has one of these types and is finite. Raises BadInput."""
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes:
            right = " or ".join(str(dtype) for dtype in dtypes)
            fault = f"{name} is {tensor.dtype}, and {right} belongs there"
            raise BadInput(f"{path}: {fault.replace('torch.', '')}")
        if not tensor.isfinite().all():
            raise BadInput(f"{path}: {name} holds values that are not finite; the file is damaged, "
                           f"copy or make it again")


def base_files(folder):
    """The files of a base folder, config.json first."""
    return [folder / "config.json", *(folder / f"{part}.safetensors" for part in PARTS)]


def check_replaced(out):
    """What a base will be written over in `out` is a base of this project, or nothing. Raises BadInput."""
    was_killed = (out / RECORD).exists()  # a run that is killed leaves its record
    killed_runs = {LOCK, RECORD} | {path.name for path in unfinished(out)}
    found = {file.name for file in out.glob("*")} - killed_runs
    refusal = BadInput(f"--out {out}: exists and is not a base folder; name another")
    if "config.json" in found:
        try:
            config = load_config(out / "config.json")
            if not config.crc32 or not config.fingerprint:  # which every base of ours has
                raise refusal
        except BadInput:
            raise refusal from None
    elif found and not (was_killed and found <= {file.name for file in base_files(out)}):
        raise refusal
    for file in base_files(out):
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise BadInput(f"--out {out}: {file.name} in it is no file of ours; name another folder")


def save_base_config(config: BaseConfig, path, weights):
    """Writes a base's config.json to `path`, with the checksums of its `weights`, files in PARTS' order."""
    save_config(replace(config, crc32=tuple(file_crc32(file) for file in weights)), path)


def file_crc32(path):
    check_regular(path)
    crc32 = 0
    with open(path, "rb") as f:
        while block := f.read(2**22):
            crc32 = zlib.crc32(block, crc32)
    return crc32


def fingerprint(states):
    """dict of part -> state dict becomes 16 hex digits that tell this base's weights from another's.

    Hashed are all names and shapes, and the bfloat16 values of the small tensors (norms and biases). So a
    base keeps its fingerprint whether it is stored in bfloat16 or float32.
    """
    digest = hashlib.sha256()
    for part in PARTS:
        for name, tensor in sorted(states[part].items()):
            digest.update(f"{part}.{name} {tuple(tensor.shape)}".encode())
            if tensor.dim() <= 1:
                digest.update(tensor.detach().cpu().bfloat16().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def from_hub(repository, file, flag, advice):
    """A file of the Hugging Face hub -> its path in the hub's cache. Raises BadInput that names `flag`."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars
    if not sys.stderr.isatty():
        print(f"{flag}: {file} of https://huggingface.co/{repository}, downloaded unless it is in the cache")
        disable_progress_bars()
    try:
        return Path(hf_hub_download(repository, file))
    except Exception as error:  # the hub's, the network's and the disk's own errors share no base class
        raise BadInput(f"{flag}: could not download {file} of {repository} ({one_line(error)}); get it from "
                       f"https://huggingface.co/{repository} and {advice}") from None


# ------------------------------------------------------------------------------------------------------------
# A subject


def subject_tensors(subject: Subject):
    """What is learned, under the names that a subject's file gives it: for LoRA, PEFT's."""
    tensors = {"v_star": subject.v_star}
    for layer, update in subject.updates.items():
        for name, tensor in zip(METHODS[subject.method].tensor_names, update):
            tensors[f"unet.{layer}.{name}"] = tensor
    return tensors


def subject_facts(subject: Subject):
    """What there is to know besides the tensors, as text."""
    tensors = ("updates", "v_star")
    facts = {key: str(value) for key, value in vars(subject).items() if key not in tensors}
    return facts | {"settings": json.dumps(subject.settings)}


def subject_fingerprint(subject: Subject):
    """16 hex digits that tell this subject, its tensors and its facts, from any other."""
    digest = hashlib.sha256(json.dumps(subject_facts(subject), sort_keys=True).encode())
    for name, tensor in sorted(subject_tensors(subject).items()):
        values = tensor.detach().float().cpu().numpy()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + values.tobytes())
    return digest.hexdigest()[:16]


def save_subject(path, subject: Subject):
    """Subject -> safetensors file. The file is complete or absent, even if the process is killed."""
    tensors = {name: x.detach().float().cpu().contiguous() for name, x in subject_tensors(subject).items()}
    # lora_alpha = rank tells readers of PEFT files that lambda is the only scale.
    facts = {"lora_alpha": str(subject.rank), "fingerprint": subject_fingerprint(subject)}
    with complete_or_absent(Path(path)) as temporary:
        save_file(tensors, temporary, subject_facts(subject) | facts)


def load_subject(path, base: Base):
    """safetensors file -> Subject for this base. Raises BadInput: not a subject, another base's, damaged."""
    path = Path(path)
    try:
        check_regular(path)
        with safe_open(path, framework="pt") as f:
            facts = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; train.py writes subject.safetensors into --out") from None
    except Exception as error:  # SafetensorError, OSError or ValueError, by the kind of damage
        raise BadInput(f"{path}: not a readable safetensors file ({one_line(error)})") from None
    subject = read_facts(path, facts)
    if subject.base_fingerprint != base.config.fingerprint:
        raise BadInput(f"{path}: was learned on the base {subject.base_name} ({subject.base_fingerprint}), "
                       f"and this is {base.config.name} ({base.config.fingerprint}); pass that base with "
                       f"--base, or train again on this one")
    # What the subject's method would train on this base, without content.
    with torch.device("meta"):
        subject.v_star = torch.empty(1, base.config.text.width)
        targets = subject.settings.get("targets", "all")
        layers = METHODS[subject.method].add_layers(build_part("unet", base.config), subject.rank, targets)
    subject.updates = {name: layer.tensors() for name, layer in layers.items()}
    check_tensors(path, tensors, subject_tensors(subject))
    check_values(path, tensors, [torch.float32])
    subject.v_star = tensors["v_star"].to(base.device)
    names = METHODS[subject.method].tensor_names
    subject.updates = {layer: tuple(tensors[f"unet.{layer}.{name}"] for name in names) for layer in layers}
    if subject_fingerprint(subject) != facts.get("fingerprint"):
        raise BadInput(f"{path}: its content is not what was saved; the file is damaged, copy it again")
    return subject


def read_facts(path, facts):
    """A subject file's header -> Subject without tensors. Raises BadInput."""
    try:
        subject = Subject(facts["placeholder"], facts["class_word"], int(facts["rank"]), facts["base_name"],
                          facts["base_fingerprint"], int(facts["steps"]), facts["method"],
                          json.loads(facts["settings"]))
        for name in ("rank", "steps"):
            low, high = RANGES[TrainingDefaults][name][:2]
            if not low <= getattr(subject, name) <= high:
                raise ValueError(name)
        if not isinstance(subject.settings, dict) or subject.settings.get("targets", "all") not in TARGETS:
            raise ValueError("settings")
        check_placeholder(subject.placeholder, "placeholder")
        for name in ("class_word", "base_name", "base_fingerprint", "method"):
            if not is_text(facts[name]) or len(facts[name]) > 500:
                raise ValueError(f"{name}: {printable(facts[name])[:60]}")
    except (KeyError, ValueError, RecursionError, BadInput) as error:
        raise BadInput(f"{path}: not a subject of this project, its header has no valid "
                       f"{one_line(error)}") from None
    if subject.method not in METHODS:
        raise BadInput(f"{path}: was learned by the method {subject.method!r}, "
                       f"which this version does not know")
    return subject


SAVE_NAME = "step-([0-9]{6,18})"     # of a folder in a run's (runs.py)


def find_subjects(given, base_fingerprint):
    """--subject -> paths: those given, else the newest of this base under runs/, else the committed one."""
    if given:
        if "none" in given and len(given) > 1:
            raise BadInput("--subject none: means no subject; leave it out, or the others")
        paths = [Path(path) for path in given if path != "none"]
        return [path / "subject.safetensors" if path.is_dir() else path for path in paths]
    is_save = re.compile(rf"(\.tmp-.*)?{SAVE_NAME}").fullmatch
    found = [path for path in Path("runs").rglob("subject.safetensors") if not is_save(path.parent.name)]
    trained, newer = sorted(found, key=lambda path: path.stat().st_mtime), []
    for path in [*reversed(trained), as_typed(ROOT / "toy" / "subject.safetensors")]:
        try:
            check_regular(path)
            with safe_open(path, framework="pt") as f:
                if (f.metadata() or {}).get("base_fingerprint") == base_fingerprint:
                    if newer:
                        warn(f"{newer[0]}, so {path} is taken; --subject names another")
                    return [path]
            newer.append(f"{path} is newer, but of another base")
        except (OSError, SafetensorError):
            newer.append(f"{path} is newer, but not readable")
    raise BadInput("--subject: no subject of this base is under runs/; train one with train.py, name one, "
                   "or say none")


def pick_images(args, config):
    """-> folder of photos and their class word: from flags, else the base's own, else the embedded base's."""
    if args.images:
        return Path(args.images), args.class_word
    training = config.training
    if not training.images:
        training = load_config(ROOT / "toy" / "base" / "config.json").training
    return as_typed(ROOT / training.images), args.class_word or training.class_word


# ------------------------------------------------------------------------------------------------------------
# Pictures

PICTURES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"}
UNREAD_PICTURES = {".heic", ".heif", ".jxl", ".raw", ".dng", ".cr2", ".nef", ".svg", ".psd"}
MOST_PIXELS = 250_000_000  # a phone's 200 MP; 0.75 GB as RGB
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, 179 million, calls such a photo an attack
VIDEOS = {".mp4", ".webm", ".avi", ".mov", ".mkv"}


def read_folder(folder, endings, read, flag, content, count=None):
    """The first `count` files that `read` can read -> list of (path, its result). Others get a warning."""
    folder, found = Path(folder), []
    if not folder.is_dir():
        raise BadInput(f"{flag} {folder}: no such folder; it should hold {content}")
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        ending = path.suffix.lower()
        if ending in UNREAD_PICTURES or (ending in PICTURES | VIDEOS and ending not in endings):
            warn(f"{path}: {ending} is not read; left out")
        if path.is_dir() and any(file.suffix.lower() in endings for file in path.iterdir()):
            warn(f"{path}: subfolders are not read; left out")
        if ending not in endings:
            continue
        if not path.is_file():
            warn(f"{path}: not a regular file; left out")
            continue
        try:
            with quiet_libraries():
                found.append((path, read(path)))
        except MemoryError:
            raise
        except Exception as error:  # Pillow's and FFMPEG's readers each raise their own
            warn(f"{path}: not readable ({one_line(error)}); left out")
        if len(found) == count:
            break
    if not found:
        raise BadInput(f"{flag} {folder}: holds no readable file ({', '.join(sorted(endings))}); "
                       f"it should hold {content}")
    return found


def warn_of_photos(photos, height, width):
    """Says once which photos show little, or little at once, in a frame; and which texts are no captions."""
    small, cut = [], []
    for photo in photos:
        w, h = photo.image.size
        if w < width or h < height:
            small.append(photo.path.name)
        if not 0.5 <= (w * height) / (h * width) <= 2:
            cut.append(photo.path.name)
    folder, frame = photos[0].path.parent, f"the frame of {width}x{height} pixels"
    captions = {caption_file(photo.path) for photo in photos}
    texts = {path for path in folder.iterdir() if path.suffix.lower() in (".txt", ".caption")}
    stray = sorted(path.name for path in texts - captions)
    for names, fault in (
            (stray, "left out: no photo has this name, or it has another caption"),
            (small, f"smaller than {frame}, so enlarged; larger photos show more detail"),
            (cut, f"{frame} holds less than half at once; crop nearer to its shape, or change --height and "
                  f"--width")):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            warn(f"{folder}: {', '.join(names[:5])}{more}: {fault}")


def load_picture(path, shortest):
    """A file in any mode and orientation -> sRGB, upright, over white; of an animation the first frame.

    Scaled down while it is decoded, where the format can. Raises ValueError over MOST_PIXELS, or where a
    picture's numbers have no depth that is known.
    """
    with warnings.catch_warnings(action="ignore"), Image.open(path) as image:  # EXIF that is broken, size
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"it has {image.width}x{image.height} pixels; {MOST_PIXELS:,} are the most")
        image.draft("RGB", (2 * shortest, 2 * shortest))
        profile = image.info.get("icc_profile")
        bits_and_sign = [np.ravel(getattr(image, "tag_v2", {}).get(tag, usual))[0]
                         for tag, usual in ((258, 16), (339, 1))]  # BitsPerSample, SampleFormat
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # 16 bits, which convert("RGB") clips
            image = eight_bits(np.asarray(image), *bits_and_sign)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode not in ("RGB", "CMYK", "L"):
            image = image.convert("RGB")
        image = in_srgb(image, profile)
    if min(image.size) > 2 * shortest:
        image = ImageOps.scale(image, 2 * shortest / min(image.size), Image.LANCZOS)
    return image


def eight_bits(grey, bits, sample_format):
    """Grey numbers of up to 16 bits, or floats in 0 ... 1 -> 8-bit image. Raises ValueError for any others.

    The depth is the file's own, from its tags where it is a TIFF: 12 bits of 16 are not dark.
    """
    if not np.isfinite(grey).all():
        raise ValueError("it holds values that are not finite")
    is_float = grey.dtype.kind == "f"
    if not is_float and (bits > 16 or sample_format != 1):
        raise ValueError(f"its numbers have {bits} bits or a sign; 8 or 16 bits without sign are expected")
    top = 1 if is_float else 2 ** int(bits) - 1
    if grey.min() < 0 or grey.max() > top:
        raise ValueError(f"its values go from {grey.min()} to {grey.max()}, and 0 to {top} is expected")
    return Image.fromarray((grey.astype(np.float32) / top * 255).round().astype(np.uint8))


def in_srgb(image, profile):
    """An image and its colour profile -> RGB. A profile that is broken, or another mode's, is ignored."""
    if profile:
        try:
            return ImageCms.profileToProfile(image, io.BytesIO(profile), ImageCms.createProfile("sRGB"),
                                             outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass
    return image.convert("RGB")
