"""A base's config.json: every number that a base has, where the number comes from, and what it may be.

Nothing to run here. The defaults are VideoCrafter2's, from the paper or, where a comment says so, upstream.
Another base has other numbers in its config.json. What its config.json leaves out has the default here.
"""
import argparse
import difflib
import json
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path, PureWindowsPath

import numpy as np

from cli import BadInput, one_line, printable, read_json
from model import NOISE_LEVELS, ScheduleConfig, TextConfig, UNetConfig, VAEConfig


@dataclass
class SamplingDefaults:
    """What sample.py uses where a flag is left out. Values of the paper, unless a comment says otherwise."""
    frames: int = 16
    height: int = 320
    width: int = 512
    fps: int = 28            # that the base is told: upstream's sampling script; not stated in the paper
    save_fps: int = 10       # of the file: upstream's sampling script
    prompt: str = "a V* {class word} running on the grass"
    steps: int = 50
    cfg: float = 12.0
    eta: float = 1.0         # upstream's text-to-video script; not stated in the paper
    lambda_s: float = 0.4    # this and the next two: Sec. "Dynamic Weighted Video Sampling"
    lambda_l: float = 0.8
    K: int = 5


@dataclass
class TrainingDefaults:
    """What train.py uses where a flag is left out: the paper's (Sec. "Implementation details"), or ours."""
    rank: int = 16           # ours: not stated in the paper
    lr: float = 3e-5
    weight_decay: float = 1e-2
    steps: int = 10_000
    batch_size: int = 1      # ours: subject clips per process, each with one prior clip
    grad_accum: int = 1
    alpha: float = 1.0
    num_prior: int = 200
    save_every: int = 500    # ours, as the next one
    preview_every: int = 1000
    images: str = ""         # folder with the photos of the base's own subject, relative to the repository
    class_word: str = ""     # what they show


@dataclass
class BaseConfig:
    name: str = "videocrafter2"
    fingerprint: str = ""    # of the weights: a subject remembers the base that it was trained on
    crc32: tuple = ()        # checksums of the files unet, vae and text_encoder; not checked where left out
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    text: TextConfig = field(default_factory=TextConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    training: TrainingDefaults = field(default_factory=TrainingDefaults)

    def size_multiple(self):
        """Height and width in pixels are multiples of this: 8 for the VAE times 8 for the UNet's halvings."""
        return self.vae.factor * 2 ** (len(self.unet.channel_mult) - 1)


# What a number may be, in config.json and as a flag: least, most, and what --help says of the flag.
RANGES = {
    SamplingDefaults: {
        "frames": (1, 1024, "frames in a video (paper: 16)"),
        "height": (8, 8192, "height in pixels"),
        "width": (8, 8192, "width in pixels"),
        "fps": (1, 1000, "frames per second that the base is told"),
        "save_fps": (1, 240, "frames per second that the file plays at"),
        "steps": (1, NOISE_LEVELS, "DDIM steps (paper: 50)"),
        "cfg": (0, 100, "guidance scale (paper: 12)"),
        "eta": (0, 1, "DDIM noise: 0 none, 1 as much as ancestral sampling"),
        "lambda_s": (-10, 10, "LoRA weight in the first K steps, where motion forms (paper: 0.4)"),
        "lambda_l": (-10, 10, "LoRA weight in the steps after, where detail forms (paper: 0.8)"),
        "K": (0, NOISE_LEVELS, "number of steps with lambda_s (paper: 5)")},
    TrainingDefaults: {
        "rank": (1, 1024, "rank of the LoRA"),
        "lr": (0, 1, "learning rate of AdamW (paper: 3e-5)"),
        "weight_decay": (0, 1, "weight decay of AdamW (paper: 1e-2)"),
        "steps": (1, 10**7, "training steps (paper: 10,000)"),
        "batch_size": (1, 1024, "subject clips per process and step, each with one prior clip"),
        "grad_accum": (1, 1024, "batches per process and step, for less memory at the same clips per step"),
        "alpha": (0, 1000, "weight of the prior loss, 0 for none (paper: 1.0)"),
        "num_prior": (1, 10_000, "number of prior pictures or videos (paper: 200)"),
        "save_every": (1, 10**7, "steps between saves"),
        "preview_every": (0, 10**7, "steps between previews, 0 for none")},
    BaseConfig: {"crc32": (0, 2**32 - 1)},
    ScheduleConfig: {"beta_start": (1e-9, 0.1), "beta_end": (1e-9, 0.1), "scale_end": (1e-3, 1),
                     "scale_steps": (0, NOISE_LEVELS), "latent_std": (0, 1000)},
    TextConfig: {"width": (1, 8192), "heads": (1, 256), "layers": (1, 256)},
    VAEConfig: {"channels": (1, 4096), "channel_mult": (1, 64), "num_res_blocks": (1, 16),
                "norm_groups": (1, 1024), "latent_factor": (1e-6, 1e6)},
    UNetConfig: {"channels": (1, 4096), "channel_mult": (1, 64), "num_res_blocks": (1, 16),
                 "attention_resolutions": (1, 1024), "head_channels": (1, 1024), "context_dim": (1, 8192),
                 "norm_groups": (1, 1024)},
}


def load_config(path):
    """config.json -> BaseConfig. Raises BadInput that names the entry whose name, type or range is wrong."""
    path = Path(path)
    try:
        values = read_json(path)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; --base takes a folder made by convert_ckpt.py, "
                       f"or toy/base") from None
    except (ValueError, OSError) as error:
        raise BadInput(f"{path}: not a readable JSON file ({one_line(error)})") from None
    config = read_entries(BaseConfig, values, path, "")
    if len(config.crc32) not in (0, 3):
        raise BadInput(f"{path}: crc32 has {len(config.crc32)} entries; it should have 3, or be left out")
    if config.sampling.K > config.sampling.steps:
        raise BadInput(f"{path}: sampling.K is {config.sampling.K}; it should be at most sampling.steps, "
                       f"{config.sampling.steps}")
    return config


def read_entries(cls, values, path, where):
    """A JSON object -> the dataclass `cls`. `where` is what comes before an entry's name, such as "unet."."""
    if not isinstance(values, dict):
        what = where.rstrip(".") or "its content"
        raise BadInput(f"{path}: {what} is not an object with entries but {values!r}")
    known = {entry.name: getattr(cls(), entry.name) for entry in fields(cls)}
    entries = {}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) or [", ".join(known)]
            raise BadInput(f"{path}: {where}{name} is unknown; known is {near[0]}")
        if is_dataclass(known[name]):
            entries[name] = read_entries(type(known[name]), value, path, f"{where}{name}.")
        else:
            entries[name] = read_value(known[name], value, f"{path}: {where}{name}")
            check_range(cls, name, entries[name], f"{path}: {where}{name}")
    return cls(**entries)


def read_value(default, value, where):
    """A JSON value -> one of the default's type. Raises BadInput."""
    if isinstance(default, tuple):
        if not isinstance(value, list) or not all(type(number) is int for number in value):
            raise BadInput(f"{where} is {value!r}, not a list of whole numbers")
        return tuple(value)
    if isinstance(default, float) and type(value) is int:
        return float(str(value))  # of text: too large a number becomes inf, which no range allows
    if type(value) is not type(default):
        raise BadInput(f"{where} is {value!r}, not {type(default).__name__}")
    return value


def check_range(cls, name, value, where):
    """A number lies in its range; a list is short; a text is one printable line, and leads nowhere."""
    if isinstance(value, str) and (len(value) > 500 or not value.isprintable()):
        raise BadInput(f"{where} is {printable(value)[:60]}; it should be one printable line")
    if cls is BaseConfig and name == "name" and not re.fullmatch(r"\w[\w .+-]{0,63}", value):
        raise BadInput(f"{where} is {value!r}; it should be letters, digits, spaces and .+-_, at most 64")
    if name == "images" and (PureWindowsPath(value).anchor or ".." in re.split(r"[/\\]", value)):
        raise BadInput(f"{where} is {value!r}; it should be a folder inside the repository")
    if name in ("channel_mult", "attention_resolutions") and not 1 <= len(value) <= 8:
        raise BadInput(f"{where} has {len(value)} entries; it should have from 1 to 8")
    if name not in RANGES[cls]:
        return
    low, high = RANGES[cls][name][:2]
    for number in value if isinstance(value, tuple) else (value,):
        if not low <= number <= high:
            raise BadInput(f"{where} is {number}; it should be from {low} to {high}")


def save_config(config: BaseConfig, path):
    Path(path).write_text(json.dumps(asdict(config), indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------
# Flags in place of defaults


def add_flags(parser, cls, only=None):
    """Adds the flags of a class of defaults, --steps and so on, or those named in `only`."""
    for name in only or RANGES[cls]:
        parser.add_argument(f"--{name}", type=type(getattr(cls, name)), help=RANGES[cls][name][2])


def add_speed_flags(parser, precisions, training=False):
    """--precision and --compile of the UNet; for training, --grad_checkpointing too."""
    without_bfloat16 = "float32" if training else "float16 on a GPU that has none, float32 elsewhere"
    parser.add_argument("--precision", choices=["auto", *precisions], default="auto",
                        help=f"of the UNet (V* and LoRA train in float32); auto: bfloat16 on a GPU that has "
                             f"it, else {without_bfloat16}")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile the UNet: slow to start, then faster; the same up to rounding")
    if training:
        parser.add_argument("--grad_checkpointing", action=argparse.BooleanOptionalAction,
                            help="less memory for a third more time (left out: where the device needs it)")


def check_flags(args, ranges):
    """Every flag that was given lies in its range (low, high, ...). Raises BadInput."""
    for flag, (low, high, *_) in ranges.items():
        value = getattr(args, flag, None)
        if value is not None and not low <= value <= high:
            raise BadInput(f"--{flag} {value}: should be from {low} to {high}")


def parse_lambdas(text, steps):
    """"0.4*5,0.4>0.8*10,0.8*35" -> one lambda per step; a>b*n goes from a to b in n steps, or BadInput."""
    low, high = RANGES[SamplingDefaults]["lambda_l"][:2]
    lambdas = []
    for ramp in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(-?\d*\.?\d+)(?:>(-?\d*\.?\d+))?\*(\d+)", ramp)
        if not match or int(match[3]) > NOISE_LEVELS:
            raise BadInput(f'--lambdas: "{ramp}" is not a part such as 0.4*5 or 0.4>0.8*10')
        first, last, count = float(match[1]), float(match[2] or match[1]), int(match[3])
        for number in (first, last):
            if not low <= number <= high:
                raise BadInput(f"--lambdas: {number:g} in it should be from {low} to {high}")
        lambdas += [round(number, 6) for number in np.linspace(first, last, count).tolist()]
    if len(lambdas) != steps:
        raise BadInput(f"--lambdas {text}: has {len(lambdas)} steps, and --steps is {steps}")
    return lambdas


def with_flags(defaults, args, only=None):
    """A dataclass of defaults in which the flags that were given take their places, or those in `only`."""
    given = {}
    for name in only or [entry.name for entry in fields(defaults)]:
        value = getattr(args, name, None)
        if value is not None and value != "":
            given[name] = value
    return replace(defaults, **given)


def check_sampling(config, sampling):
    """This base can take the height and width, and K is one of the steps. Raises BadInput."""
    for flag, value in (("height", sampling.height), ("width", sampling.width)):
        if value % config.size_multiple():
            raise BadInput(f"--{flag} {value}: should be a multiple of {config.size_multiple()} "
                           f"on the base {config.name}")
    if sampling.K > sampling.steps:
        raise BadInput(f"--K {sampling.K}: should be at most --steps, which is {sampling.steps}")
