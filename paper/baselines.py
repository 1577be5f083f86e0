"""The two methods that the paper compares with, trained by the paper's own loop (`train.fit`).

    python paper/baselines.py custom_diffusion --images photos/dog --class_word dog     # Kumari et al. 2023
    python sample.py --subject runs/dog-custom_diffusion --lambdas "1*50"
    python paper/baselines.py dreamvideo --images photos/dog --class_word dog           # Wei et al. 2024
    python paper/baselines.py sample --subject runs/dog-dreamvideo --prompt "a V* dog running on the grass"

DreamVideo's motion learning is not included. Both methods use their authors' published settings, without
scaled learning rates. They save and resume like train.py, but draw no previews. sample.py samples a subject
of Custom Diffusion, at full strength. DreamVideo's adapters are not linear, so they cannot be merged into
weights; its subjects have a file format of their own, which the last command reads.

Shapes: B clips, T frames, L text tokens, D text width; N any batch, S positions, C channels.
"""
import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps

import sample
import train
from data import Samples, load_photos, still_video
from lora import class_embedding, spatial_blocks
from model import pixels, zeroed
from support.cli import BadInput, FlagParser, join_processes, run_script, stop_signals
from support.config import check_sampling, load_config, with_flags
from support.files import Subject, load_subject, open_base
from support.runs import (Log, header_of, load_training, lock_run, pick_run, run_settings, save_training,
                          steps_done)
from support.texts import pick_prompts
from train import SubjectLoss

# ------------------------------------------------------------------------------------------------------------
# Custom Diffusion: V* and, in every cross-attention, the whole matrices of keys and values


class FullLinear(nn.Module):
    """A frozen linear layer with a trainable update of its whole matrix beside it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.delta = nn.Parameter(torch.zeros_like(linear.weight, dtype=torch.float32))     # (C_out, C_in)

    def forward(self, x):
        """Text (B, L, C_in) -> keys or values (B, L, C_out).

        The first token is start-of-text in every prompt, so nothing is learned from it.
        """
        y = self.linear(x) + F.linear(x, self.delta.to(x.dtype))
        return torch.cat([y[:, :1].detach(), y[:, 1:]], dim=1)

    def lora(self):
        """The update as A, B with B A = delta. The smaller one of the two is an identity."""
        C_out, C_in = self.delta.shape
        return (torch.eye(C_in), self.delta) if C_in <= C_out else (self.delta, torch.eye(C_out))


def add_full_linears(unet):
    """Puts a FullLinear around every cross-attention's to_k and to_v (VideoCrafter2: 32) -> name -> layer."""
    layers = {}
    for block in spatial_blocks(unet):
        for name in (f"{block}.attn2.to_k", f"{block}.attn2.to_v"):
            layers[name] = FullLinear(unet.get_submodule(name))
            unet.set_submodule(name, layers[name])
    return layers


class CustomDiffusionLoss(SubjectLoss):
    """Eq. 1 with a mask, and Eq. 3. Its parameters are V* and the updates of the whole matrices."""

    def __init__(self, base, v_star, layers, num_frames, fps):
        super().__init__(base, v_star, {}, num_frames, fps)
        self.deltas = nn.ParameterList(layer.delta for layer in layers.values())

    def forward(self, images, tokens, loss_mask, t, eps, *prior):
        """Like SubjectLoss, with a loss_mask (B, h, w) for the subject's clips."""
        base, = self.frozen
        z_0 = still_video(base.encode(images), self.num_frames)             # (B, 4, T, h, w)
        context = base.text_encoder(tokens, self.v_star)                    # (B, L, D)
        subject_error, prior_error = self.squared_errors((z_0, context, t, eps), prior)
        return (loss_mask * subject_error).mean(), prior_error.mean()


class RescaledSamples(Samples):
    """Custom Diffusion's samples: photos are rescaled, and captions mention a large change of scale."""

    def batch(self, numbers):
        """Like Samples, with the loss masks (B, h, w) after the tokens."""
        images, tokens, *others = super().batch(numbers)
        return [images, tokens, torch.stack([self.rescaled(i)[2] for i in numbers]), *others]

    def subject_sample(self, i):
        return self.rescaled(i)[:2]

    def rescaled(self, i):
        """Sample number i -> image (3, H, W), caption, loss mask (h, w).

        A photo at less than 0.6 of its size is placed at random on grey, and the loss counts only inside the
        photo, one latent cell away from its edge. The mask's mean is 1, so that the mean over the clip
        becomes the mean over the cells that count.
        """
        photo, rng = self.photo_of(i), np.random.default_rng((self.seed, 1, i))
        caption = photo.caption or f"photo of a {self.subject_words}"
        height, width, (rows, columns) = self.height, self.width, self.z_shape[2:]
        factor, loss_mask = height // rows, torch.ones(rows, columns)
        scale = rng.uniform(1 / 3, 1) if rng.random() < 2 / 3 else rng.uniform(1.2, 1.4)
        h, w = round(scale * height), round(scale * width)
        image = ImageOps.mirror(photo.image) if self.flip and rng.random() < 0.5 else photo.image
        resized = lambda h, w: pixels(ImageOps.fit(image, (w, h), Image.BICUBIC))

        if scale < 0.6:
            canvas = torch.zeros(3, height, width)
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            canvas[:, top:top + h, left:left + w] = resized(h, w)
            first_row, first_column = min(top // factor + 1, rows - 1), min(left // factor + 1, columns - 1)
            last_row = max((top + h) // factor - 1, first_row + 1)
            last_column = max((left + w) // factor - 1, first_column + 1)
            inside = torch.zeros_like(loss_mask)
            inside[first_row:last_row, first_column:last_column] = 1
            return canvas, f"{rng.choice(['a far away', 'very small'])} {caption}", inside / inside.mean()
        if scale > 1:
            top, left = rng.integers(h - height + 1), rng.integers(w - width + 1)
            part = resized(h, w)[:, top:top + height, left:left + width]
            return part, f"{rng.choice(['zoomed in', 'close up'])} {caption}", loss_mask
        return resized(height, width), caption, loss_mask


# ------------------------------------------------------------------------------------------------------------
# DreamVideo: first V* alone; then, with V* frozen, an adapter in every spatial block


class Adapter(nn.Module):
    """The identity adapter. It adds nothing at first, because its last layer starts at zero."""

    def __init__(self, channels):
        super().__init__()
        self.down = nn.Linear(channels, channels // 2)
        self.up = zeroed(nn.Linear(channels // 2, channels))

    def forward(self, x):
        """(N, S, C) -> (N, S, C), in the precision of x. The parameters stay in float32."""
        linear = lambda layer, x: F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
        return linear(self.up, F.gelu(linear(self.down, x)))


class AdaptedAttention(nn.Module):
    """Replaces both norm2 and attn2 of a block, so that the adapter reads x before the norm."""

    def __init__(self, norm2, attn2, adapter):
        super().__init__()
        self.norm2, self.attn2, self.adapter = norm2, attn2, adapter

    def forward(self, x, context):
        """x (N, S, C), context (M, L, D) -> (N, S, C), which the block adds to x."""
        return self.attn2(self.norm2(x), context) + self.adapter(x)


def new_adapters(unet):
    """-> name of each spatial block -> a new Adapter of its width, not yet inserted into the UNet."""
    widths = {name: unet.get_submodule(name).norm3.normalized_shape[0] for name in spatial_blocks(unet)}
    return {name: Adapter(width).to(unet.conv_out.weight.device) for name, width in widths.items()}


@contextmanager
def inserted_adapters(unet, adapters):
    """Puts the adapters into the UNet's blocks, at full strength, until the `with` block ends."""
    blocks = {name: unet.get_submodule(name) for name in adapters}
    originals = {name: (block.norm2, block.attn2) for name, block in blocks.items()}
    try:
        for name, block in blocks.items():
            block.norm2, block.attn2 = nn.Identity(), AdaptedAttention(*originals[name], adapters[name])
        yield
    finally:
        for name, block in blocks.items():
            block.norm2, block.attn2 = originals[name]


class AdapterLoss(SubjectLoss):
    """The loss of the second stage. Its parameters are the adapters', and V* is a constant."""

    def __init__(self, base, v_star, adapters, num_frames, fps):
        super().__init__(base, v_star, {}, num_frames, fps)
        del self.v_star
        self.v_star = v_star
        self.adapters = nn.ModuleList(adapters.values())


@dataclass
class DreamVideoSubject(Subject):
    """V* and, after the first stage, the adapters. sample.py refuses its file, which has no LoRA layers."""
    adapters: dict = field(default_factory=dict)    # name of a spatial block -> Adapter

    def tensors(self):
        tensors = super().tensors()
        for name, adapter in self.adapters.items():
            tensors |= {f"unet.{name}.adapter.{key}": value for key, value in adapter.named_parameters()}
        return tensors

    def metadata(self):
        metadata = super().metadata()
        del metadata["layers"], metadata["lora_alpha"]
        return metadata

    @torch.no_grad()
    def read_layers(self, metadata, tensors, unet):
        if self.settings.get("targets") != "dreamvideo":
            raise ValueError("adapters; sample.py takes the subjects of other methods")
        self.adapters = new_adapters(unet) if self.settings["stage"] == 2 else {}
        for name, value in self.tensors().items():
            value.copy_(tensors[name])


def load_dreamvideo(path, base):
    """A subject.safetensors of DreamVideo -> DreamVideoSubject for this base. Raises BadInput."""
    return load_subject(path, base, DreamVideoSubject)


# ------------------------------------------------------------------------------------------------------------
# Training


def learn_subject(args, config):
    """Trains like train.py, in one stage for Custom Diffusion and two for DreamVideo.

    args.targets is the method. A save records the method, so that no other one resumes it, and the stage.
    """
    training, sampling = config.training, config.sampling
    process = join_processes()
    base = open_base(args, process, training=True)
    photos = load_photos(args.images, sampling.height, sampling.width, args.placeholder, args.class_word)
    out, last_save = pick_run(args, photos, process, f"-{args.targets}")
    saved = json.loads(header_of(last_save).get("settings", "{}")) if last_save else {}
    if last_save and saved.get("targets") != args.targets:
        raise BadInput(f"--resume {last_save}: not a save of {args.targets}; name another")
    prior, prior_files = None, []
    if training.alpha:
        prior, prior_files = train.encode_prior(args, out, base, training, sampling, process)
    base.unet.grad_checkpointing = args.grad_checkpointing

    settings = run_settings(args, training, sampling, base, photos, prior_files, process)
    settings |= {"stage": saved.get("stage", 1), "word_steps": args.word_steps}
    metadata = (args.placeholder, args.class_word, config.name, base.config.fingerprint, 0, settings)
    kind = RescaledSamples if args.targets == "custom_diffusion" else Samples
    samples = kind(photos, args.placeholder, args.class_word, prior, args.seed, training, sampling,
                   config.vae.factor, not args.no_flip)

    def train_stage(loss, parameters, last_step):
        """Trains up to `last_step`, from the save if that is of this stage, otherwise from subject.steps."""
        optimizer = torch.optim.AdamW(parameters, lr=training.lr, weight_decay=training.weight_decay)
        if last_save and saved["stage"] == settings["stage"]:
            load_training(last_save, subject, optimizer, training.steps)

        def after_step(step, losses, grad_norm):
            subject.steps = step
            log(step, losses, grad_norm)
            stop = asked_to_stop()
            if process.rank == 0 and (step % training.save_every == 0 or step == last_step or stop):
                save_training(out, subject, optimizer, args.keep_last)
            return stop

        train.fit(loss, partial(samples.share, process), optimizer, subject.steps + 1,
                  replace(training, steps=last_step), process, after_step)

    with lock_run(out, last_save, process.rank), stop_signals(process) as asked_to_stop:
        log = Log(out, steps_done(last_save) if last_save else 0, training.steps, process.rank)
        if args.targets == "custom_diffusion":
            # Token 42170 is "ktn" inside a word, which does not occur in ordinary text.
            v_star = base.text_encoder.token_embedding.weight[42170:42171].float().clone()
            layers = add_full_linears(base.unet)
            loss = CustomDiffusionLoss(base, v_star, layers, training.frames, sampling.fps)
            lora = {name: layer.lora() for name, layer in layers.items()}
            subject = Subject(*metadata, loss.v_star, lora)
            of_word = {"params": [loss.v_star], "lr": training.lr if args.word_lr is None else args.word_lr}
            train_stage(loss, [of_word, {"params": list(loss.deltas)}], training.steps)
        else:
            subject = DreamVideoSubject(*metadata, class_embedding(base.text_encoder, args.class_word))
            if settings["stage"] == 1:
                loss = SubjectLoss(base, subject.v_star, {}, training.frames, sampling.fps)
                subject.v_star = loss.v_star
                train_stage(loss, [{"params": [loss.v_star], "lr": args.word_lr}], args.word_steps)
            if settings["stage"] == 2 or (subject.steps == args.word_steps and not asked_to_stop()):
                settings["stage"] = 2
                torch.manual_seed(args.seed)    # the same start on every process
                subject.v_star, subject.adapters = subject.v_star.detach(), new_adapters(base.unet)
                loss = AdapterLoss(base, subject.v_star, subject.adapters, training.frames, sampling.fps)
                with inserted_adapters(base.unet, subject.adapters):
                    train_stage(loss, loss.parameters(), training.steps)
        log.close(subject)


# ------------------------------------------------------------------------------------------------------------
# Sampling DreamVideo's subjects


def sample_subject(args):
    """Writes videos of a DreamVideo subject, with the names and JSONs that sample.py would give them."""
    process, config, path = join_processes(), load_config(args.base), Path(args.subject[0])
    settings = replace(with_flags(config.sampling, args), K=0)
    args.lambdas = f"1*{settings.steps}"    # full strength, as the JSONs record
    check_sampling(config, settings)
    base = open_base(args, process)
    path = path / "subject.safetensors" if path.is_dir() else path
    subject = load_dreamvideo(path, base)
    print(f"subject {path} ({subject.placeholder} {subject.class_word}, {subject.steps} steps)")
    prompts, tokens = pick_prompts(args, settings, [subject])
    variants = [("", [subject], [1.0] * settings.steps)]
    with inserted_adapters(base.unet, subject.adapters):
        sample.make_videos(args, base, settings, prompts, tokens, variants, process)


# ------------------------------------------------------------------------------------------------------------
# Flags: those of train.py and sample.py

PUBLISHED = {"custom_diffusion": "--lr 8e-5 --steps 500 --alpha 1",
             "dreamvideo": "--lr 1e-5 --steps 4000 --word_lr 1e-4 --alpha 0 --weight_decay 0"}


def main():
    p = FlagParser(description="Custom Diffusion, and DreamVideo's subject learning.",
                   epilog="The first two commands take train.py's flags, and the last takes sample.py's. "
                          "dreamvideo also takes --word_steps, the number of first steps that train V* alone "
                          "(default: 3000).")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for method, published in PUBLISHED.items():
        commands.add_parser(method, help=f"by default {published}", add_help=False)
    commands.choices["dreamvideo"].add_argument("--word_steps", type=int, default=3000)
    commands.add_parser("sample", help="videos of a DreamVideo subject", add_help=False)
    own, flags = p.parse_known_args()
    sys.argv[1:] = [*PUBLISHED.get(own.command, "").split(), *flags]
    if own.command == "sample":
        args = sample.parse_args()
        if len(args.subject) != 1:
            raise BadInput("--subject: name one run of dreamvideo")
        refuse(args, "lambda_s", "lambda_l", "K", "lambdas", "compare")
        sample_subject(args)
    else:
        args, config = train.parse_args()
        refuse(args, "rank", "scale_lr", "caption_dropout", "preview_every", "targets")
        config.training = replace(config.training, scale_lr=False, caption_dropout=0.0)
        args.targets, args.word_steps = own.command, vars(own).get("word_steps")
        if not 0 <= (args.word_steps or 0) <= args.steps:
            raise BadInput(f"--word_steps {args.word_steps}: must be from 0 to --steps, which is "
                           f"{args.steps}; the adapters are trained in the other steps")
        learn_subject(args, config)


def refuse(args, *names):
    """Raises BadInput if one of these flags was given, because they have no effect here."""
    for name in names:
        if getattr(args, name) not in (None, "", False, "all"):
            raise BadInput(f"--{name}: has no effect on this method; leave it out")


if __name__ == "__main__":
    run_script(main)
