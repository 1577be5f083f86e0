"""The numbers of a base, with their sources, and the flags that override them.

The defaults are VideoCrafter2's. Another base has other numbers in its config.json, which lists only those
that differ. "Paper" is CustomCrafter, "release" is its authors' code (paper/README.md compares the two), and
"upstream" is VideoCrafter2's code.
"""
import argparse
import json
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path

import torch

from model import NOISE_LEVELS, ScheduleConfig, TextConfig, UNetConfig, VAEConfig
from support.cli import ROOT, BadInput, one_line


def flag(default, low, high, text):
    """A number that is also a flag: its default, its range, and its help text."""
    return field(default=default, metadata={"low": low, "high": high, "help": text})


@dataclass
class SamplingDefaults:
    """What sample.py uses unless a flag is given."""
    frames: int = flag(16, 1, 1024, "frames in a video (VideoCrafter2's training clips: 16)")
    height: int = flag(320, 8, 8192, "height in pixels")
    width: int = flag(512, 8, 8192, "width in pixels")
    fps: int = flag(16, 1, 1000, "frames per second that the UNet is conditioned on (release: 16)")
    save_fps: int = flag(10, 1, 240, "frames per second at which the file plays (upstream: 10)")
    steps: int = flag(50, 1, NOISE_LEVELS, "DDIM steps (paper: 50)")
    cfg: float = flag(12.0, 0, 100, "guidance scale (paper: 12)")
    eta: float = flag(1.0, 0, 1, "DDIM noise: 0 none, 1 as much as ancestral sampling (release: 1)")
    lambda_s: float = flag(0.4, -10, 10, "LoRA weight in the first K steps, where motion forms (paper: 0.4)")
    lambda_l: float = flag(0.8, -10, 10, "LoRA weight in the later steps, where detail forms (paper: 0.8)")
    K: int = flag(5, 0, NOISE_LEVELS, "number of steps with lambda_s (paper: 5)")
    prompt: str = "a V* {class word} running on the grass"

    def prompt_for(self, subjects):
        """The default prompt, which names every subject: "a V* dog and a <cat> cat running on the grass"."""
        names = [f"{subject.placeholder} {subject.class_word}" for subject in subjects]
        return self.prompt.replace("V* {class word}", " and a ".join(names))


@dataclass
class TrainingDefaults:
    """What train.py uses unless a flag is given."""
    rank: int = flag(4, 1, 1024, "rank of the LoRA (release: 4)")
    lr: float = flag(3e-5, 0, 1, "learning rate of AdamW (paper: 3e-5)")
    scale_lr: bool = flag(True, 0, 1, "multiply --lr by the number of clips in a step (release: on)")
    weight_decay: float = flag(1e-2, 0, 1, "weight decay of AdamW (paper: 1e-2)")
    steps: int = flag(10_000, 1, 10**7, "training steps (paper: 10,000)")
    frames: int = flag(4, 1, 1024, "frames of a still video (release: 4)")
    batch_size: int = flag(1, 1, 1024, "subject clips per process, each with a prior clip (release: 1)")
    grad_accum: int = flag(1, 1, 1024, "batches whose gradients make one step, with less memory")
    alpha: float = flag(1.0, 0, 1000, "weight of the prior loss, 0 for no prior (paper: 1)")
    num_prior: int = flag(200, 1, 10_000, "number of prior pictures or videos (paper: 200)")
    caption_dropout: float = flag(0.0, 0, 1, "share of clips that get an empty caption (release: 0.2)")
    save_every: int = flag(500, 1, 10**7, "steps between saves")
    preview_every: int = flag(1000, 0, 10**7, "steps between previews, 0 for none")


@dataclass
class BaseConfig:
    name: str = "videocrafter2"
    fingerprint: str = ""    # of the weights; a subject is refused on another base
    latent_std: float = 0.0  # if > 0: the standard deviation of scaled latents, for v-prediction's weights
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    text_encoder: TextConfig = field(default_factory=TextConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    training: TrainingDefaults = field(default_factory=TrainingDefaults)


def load_config(base):
    """Base folder -> BaseConfig of its config.json. Raises BadInput."""
    path, parts = Path(base) / "config.json", {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        for entry in fields(BaseConfig):
            if is_dataclass(entry.type):
                own = {name: tuple(value) if isinstance(value, list) else value
                       for name, value in values.pop(entry.name, {}).items()}
                parts[entry.name] = entry.default_factory(**own)
        return BaseConfig(**values, **parts)            # a TypeError names an unknown entry
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; --base takes toy/base or convert_ckpt.py's --out") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}: not a base's config ({one_line(error)})") from None


def save_config(config: BaseConfig, path):
    """Writes only the numbers that differ from the defaults, so that a base gets later versions' defaults."""
    values, defaults = {"name": config.name}, asdict(BaseConfig())
    for name, value in asdict(config).items():
        if isinstance(value, dict):
            value = {key: own for key, own in value.items() if own != defaults[name][key]}
        if value and value != defaults[name]:
            values[name] = value
    Path(path).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def loss_weights(config: BaseConfig, schedule):
    """The weight w(t) (1000,) that a base was trained with at each noise level: 1 for VideoCrafter2.

    The embedded base was trained with the weights of v-prediction (Salimans and Ho 2022), by which errors of
    eps count more at high noise levels.
    """
    if not config.latent_std:
        return torch.ones(NOISE_LEVELS)
    snr = schedule.alpha_bar * (schedule.scale * config.latent_std) ** 2 / (1 - schedule.alpha_bar)
    return (1 + 1 / snr).clamp(max=100)


# ------------------------------------------------------------------------------------------------------------
# Flags that override the defaults


def add_flags(parser, cls, only=None):
    """Adds a flag for each number of a class of defaults, such as --steps, or only for those in `only`."""
    for entry in fields(cls):
        if entry.metadata and (only is None or entry.name in only):
            kind = {"action": argparse.BooleanOptionalAction} if entry.type is bool else {"type": entry.type}
            parser.add_argument(f"--{entry.name}", help=entry.metadata["help"], **kind)


def add_speed_flags(parser, precisions, training=False):
    """Adds --precision and --compile of the UNet; for training, --grad_checkpointing too."""
    parser.add_argument("--precision", choices=["auto", *precisions], default="auto",
                        help="of the UNet; auto: bfloat16 if the GPU has it, otherwise float16 to sample on "
                             "a GPU, and float32 elsewhere")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet: slow to start, then "
                        "faster; needs Triton on a GPU and a C++ compiler on a CPU")
    if training:
        parser.add_argument("--grad_checkpointing", action=argparse.BooleanOptionalAction, default=False,
                            help="recompute activations instead of keeping them: a third slower, less memory")


def check_flags(args, *classes, **ranges):
    """Raises BadInput if a flag of these classes, or of `ranges` (name=(low, high)), is out of its range."""
    for entry in sum(map(fields, classes), ()):
        if entry.metadata:
            ranges[entry.name] = entry.metadata["low"], entry.metadata["high"]
    for name, (low, high) in ranges.items():
        value = getattr(args, name, None)
        if value is not None and not low <= value <= high:
            raise BadInput(f"--{name} {value}: must be from {low} to {high}")


def pick_subject(args):
    """Fills in this repository's own subject unless --images is given. Raises BadInput for unfit words."""
    if args.images is None:
        args.images, args.class_word = ROOT / "toy" / "subjects" / "berry", args.class_word or "heart"
    placeholder, class_word = args.placeholder, args.class_word.strip()
    if not re.fullmatch(r"[^\s#]\S{0,31}", placeholder) or not re.search(r"\W", placeholder):
        raise BadInput(f"--placeholder {placeholder!r}: must be a single word with a symbol in it, such as "
                       f"V* or <new1>, and must not start with #")
    if not class_word:
        raise BadInput("--class_word: is needed with --images; name the class of the subject, such as dog")
    if placeholder in class_word or re.match(r"(a|an|the)\s", class_word, re.IGNORECASE):
        raise BadInput(f"--class_word {class_word!r}: is a caption; write the noun alone, such as dog")


def with_flags(defaults, args, only=None):
    """Returns the defaults, overridden by the flags that were given, or only by those in `only`."""
    given = {name: getattr(args, name, None) for name in only or [entry.name for entry in fields(defaults)]}
    return replace(defaults, **{name: value for name, value in given.items() if value not in (None, "")})


def check_sampling(config, sampling):
    """Raises BadInput unless this base can make the height and width, and K is one of the steps."""
    multiple = config.vae.factor * 2 ** (len(config.unet.channel_mult) - 1)  # 64 for VideoCrafter2
    for name in ("height", "width"):
        value = getattr(sampling, name)
        if value % multiple:
            raise BadInput(f"--{name} {value}: must be a multiple of {multiple} on the base {config.name}")
    if sampling.K > sampling.steps:
        raise BadInput(f"--K {sampling.K}: must be at most --steps, which is {sampling.steps}")
