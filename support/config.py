"""A base's config.json: every number that a base has, and where that number comes from; flags in their place.

Nothing to run here. The defaults are VideoCrafter2's, from the paper or, where a comment says so, from
elsewhere. Another base has other numbers in its config.json. An entry that it lacks has the default here.
"""
import argparse
import json
import re
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path

import torch

from model import NOISE_LEVELS, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from support.cli import BadInput, one_line


@dataclass
class SamplingDefaults:
    """What sample.py uses unless a flag is given. The paper's values, unless a comment names another source."""
    frames: int = 16         # the length of VideoCrafter2's own training clips
    height: int = 320
    width: int = 512
    fps: int = 16            # given to the UNet as a condition: the authors' release
    save_fps: int = 10       # of the file: upstream's sampling script
    prompt: str = "a V* {class word} running on the grass"
    steps: int = 50
    cfg: float = 12.0
    eta: float = 1.0         # upstream's text-to-video script
    lambda_s: float = 0.4    # this and the next two: Sec. "Dynamic Weighted Video Sampling"
    lambda_l: float = 0.8
    K: int = 5

    def prompt_for(self, subjects):
        """The default prompt, which names every subject: "a V* dog and a <cat> cat running on the grass"."""
        names = [f"{subject.placeholder} {subject.class_word}" for subject in subjects]
        return self.prompt.replace("V* {class word}", " and a ".join(names))


@dataclass
class TrainingDefaults:
    """What train.py uses unless a flag is given: the paper's values (Sec. "Implementation details").

    "Release" is the authors' released code, which paper/README.md compares with the paper.
    """
    rank: int = 4            # release
    lr: float = 3e-5
    scale_lr: bool = True    # release: multiply lr by all clips of a step, subject and prior
    frames: int = 4          # of a still video: release
    caption_dropout: float = 0.0    # ours; release: 0.2
    weight_decay: float = 1e-2
    steps: int = 10_000
    batch_size: int = 1      # release: subject clips per process, each with one prior clip
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
    latent_std: float = 0.0  # if > 0: the base was trained with v-prediction weights, and its scaled latents
    #                          have this standard deviation
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    text: TextConfig = field(default_factory=TextConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    training: TrainingDefaults = field(default_factory=TrainingDefaults)

    def size_multiple(self):
        """Height and width in pixels are multiples of this: 8 for the VAE times 8 for the UNet's halvings."""
        return self.vae.factor * 2 ** (len(self.unet.channel_mult) - 1)


def load_config(base):
    """The config.json of a base folder -> BaseConfig. Raises BadInput."""
    path = Path(base) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        parts = {}
        for entry in fields(BaseConfig):
            if entry.default_factory is not MISSING:    # a dataclass of its own
                own = values.pop(entry.name, {})
                own = {name: tuple(value) if isinstance(value, list) else value for name, value in own.items()}
                parts[entry.name] = entry.default_factory(**own)
        return BaseConfig(**values, **parts)            # Python itself names an unknown entry
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; --base takes a folder made by convert_ckpt.py, "
                       f"or toy/base") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}: not a base's config ({one_line(error)})") from None


def save_config(config: BaseConfig, path):
    """Writes what differs from VideoCrafter2's defaults, so that a base follows later defaults."""
    values, defaults = asdict(config), asdict(BaseConfig())
    for name, value in list(values.items()):
        if isinstance(value, dict):
            values[name] = {key: own for key, own in value.items() if own != defaults[name][key]}
        if not values[name] or values[name] == defaults[name]:
            del values[name]
    Path(path).write_text(json.dumps({"name": config.name} | values, indent=1) + "\n", encoding="utf-8")


def loss_weights(config: BaseConfig, schedule):
    """w(t) of every noise level (1000,), by which a base's loss was weighted: 1 for VideoCrafter2.

    The embedded base was trained with the weights of v-prediction (Salimans and Ho 2022), which count errors
    of eps at high noise levels more.
    """
    if not config.latent_std:
        return torch.ones(NOISE_LEVELS)
    snr = schedule.alpha_bar * (schedule.scale * config.latent_std) ** 2 / (1 - schedule.alpha_bar)
    return (1 + 1 / snr).clamp(max=100)


# ------------------------------------------------------------------------------------------------------------
# Flags in place of defaults

# Name -> least, most, and what --help says.
FLAGS = {
    SamplingDefaults: {
        "frames": (1, 1024, "frames in a video"),
        "height": (8, 8192, "height in pixels"),
        "width": (8, 8192, "width in pixels"),
        "fps": (1, 1000, "frames per second that the UNet is conditioned on"),
        "save_fps": (1, 240, "frames per second at which the file plays"),
        "steps": (1, NOISE_LEVELS, "DDIM steps (paper: 50)"),
        "cfg": (0, 100, "guidance scale (paper: 12)"),
        "eta": (0, 1, "DDIM noise: 0 is deterministic, 1 is as much as ancestral sampling"),
        "lambda_s": (-10, 10, "LoRA weight in the first K steps, where motion forms (paper: 0.4)"),
        "lambda_l": (-10, 10, "LoRA weight in the later steps, where detail forms (paper: 0.8)"),
        "K": (0, NOISE_LEVELS, "number of steps with lambda_s (paper: 5)")},
    TrainingDefaults: {
        "rank": (1, 1024, "rank of the LoRA"),
        "lr": (0, 1, "learning rate of AdamW (paper: 3e-5)"),
        "scale_lr": (0, 1, "multiply --lr by all clips of a step, subject and prior"),
        "frames": (1, 1024, "frames of a still video"),
        "caption_dropout": (0, 1, "share of clips, subject and prior, that are trained with an empty caption"),
        "weight_decay": (0, 1, "weight decay of AdamW (paper: 1e-2)"),
        "steps": (1, 10**7, "training steps (paper: 10,000)"),
        "batch_size": (1, 1024, "subject clips per process and step, each with one prior clip"),
        "grad_accum": (1, 1024, "batches per process and step, for less memory at the same clips per step"),
        "alpha": (0, 1000, "weight of the prior loss, 0 for none (paper: 1.0)"),
        "num_prior": (1, 10_000, "number of prior pictures or videos (paper: 200)"),
        "save_every": (1, 10**7, "steps between saves"),
        "preview_every": (0, 10**7, "steps between previews, 0 for none")},
}


def add_flags(parser, cls, only=None):
    """Adds the flags of a class of defaults, --steps and so on, or those named in `only`."""
    for name in only or FLAGS[cls]:
        kind, text = type(getattr(cls, name)), FLAGS[cls][name][2]
        if kind is bool:
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(f"--{name}", type=kind, help=text)


def add_speed_flags(parser, precisions, training=False):
    """--precision and --compile of the UNet; for training, --grad_checkpointing too."""
    without_bfloat16 = "float32" if training else "float16 on a GPU that has none, float32 elsewhere"
    parser.add_argument("--precision", choices=["auto", *precisions], default="auto",
                        help=f"of the UNet (V* and LoRA train in float32); auto: bfloat16 on a GPU that has "
                             f"it, else {without_bfloat16}")
    parser.add_argument("--compile", action="store_true",
                        help="torch.compile the UNet: slow to start, then faster; needs a C++ compiler on a CPU "
                             "and Triton on a GPU")
    if training:
        parser.add_argument("--grad_checkpointing", action=argparse.BooleanOptionalAction, default=False,
                            help="recompute activations instead of keeping them: a quarter of the memory for "
                                 "a third more time")


def check_flags(args, ranges):
    """Every flag that was given lies in its range (low, high, ...). Raises BadInput."""
    for flag, (low, high, *_) in ranges.items():
        value = getattr(args, flag, None)
        if value is not None and not low <= value <= high:
            raise BadInput(f"--{flag} {value}: should be from {low} to {high}")


def check_placeholder(placeholder):
    if not re.fullmatch(r"[^\s#]\S{0,31}", placeholder) or not re.search(r"\W", placeholder):
        raise BadInput(f"--placeholder {placeholder!r}: must be a single word with a symbol in it, such as V* or "
                       f"<new1>, and does not begin with #")


def with_flags(defaults, args, only=None):
    """Returns the defaults, overridden by the flags that were given, or by those in `only`."""
    names = only or [entry.name for entry in fields(defaults)]
    given = {name: getattr(args, name, None) for name in names}
    return replace(defaults, **{name: value for name, value in given.items() if value not in (None, "")})


def check_sampling(config, sampling):
    """This base can draw the height and width, and K is one of the steps. Raises BadInput."""
    for flag, value in (("height", sampling.height), ("width", sampling.width)):
        if value % config.size_multiple():
            raise BadInput(f"--{flag} {value}: should be a multiple of {config.size_multiple()} "
                           f"on the base {config.name}")
    if sampling.K > sampling.steps:
        raise BadInput(f"--K {sampling.K}: should be at most --steps, which is {sampling.steps}")
