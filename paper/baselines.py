"""The two methods that the paper compares with, trained by train.py's own loop (`fit`).

    python paper/baselines.py custom_diffusion --images photos/dog --class_word dog     # Kumari et al. 2023
    python sample.py --subject runs/dog-custom_diffusion --lambdas "1*50"
    python paper/baselines.py dreamvideo --images photos/dog --class_word dog           # Wei et al. 2024
    python paper/baselines.py sample --subject runs/dog-dreamvideo --prompt "a V* dog running on the grass"

DreamVideo's motion learning is not included. Both methods use their authors' published settings, without
scaled learning rates. They save and resume like train.py, but draw no previews. DreamVideo's adapters are not
linear, so they cannot be merged into weights, and only the last command samples its subjects.

Shapes: B clips, T frames, L text tokens, D text width; N any batch, S positions, C channels.
"""
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
from lora import LoRALinear, class_embedding, spatial_blocks
from model import pixels, zeroed
from support.cli import BadInput, FlagParser, join_processes, run_script, stop_signals
from support.config import check_sampling, with_flags
from support.files import Subject, find_subjects, load_subject, open_base
from support.runs import Log, load_training, lock_run, pick_run, run_settings, save_training, steps_done
from support.texts import pick_prompts

# ------------------------------------------------------------------------------------------------------------
# Custom Diffusion: V* and, in every cross-attention, the whole matrices of keys and values


class FullLinear(LoRALinear):
    """A LoRA of full rank. Its smaller factor stays an identity, so the other one is the whole update."""

    def __init__(self, linear: nn.Linear):
        C_out, C_in = linear.weight.shape
        super().__init__(linear, rank=min(C_out, C_in))
        identity, update = (self.lora_A, self.lora_B) if C_in <= C_out else (self.lora_B, self.lora_A)
        nn.init.eye_(identity).requires_grad_(False)
        nn.init.zeros_(update)

    def forward(self, x):
        """Text (B, L, C_in) -> keys or values (B, L, C_out).

        The first token is start-of-text in every prompt, so nothing is learned from it.
        """
        y = super().forward(x)
        return torch.cat([y[:, :1].detach(), y[:, 1:]], dim=1)


def add_full_linears(unet):
    """Puts a FullLinear around every cross-attention's to_k and to_v (VideoCrafter2: 32) -> name -> layer."""
    layers = {}
    for block in spatial_blocks(unet):
        for name in (f"{block}.attn2.to_k", f"{block}.attn2.to_v"):
            layers[name] = FullLinear(unet.get_submodule(name))
            unet.set_submodule(name, layers[name])
    return layers


class CustomDiffusionLoss(train.SubjectLoss):
    """Eq. 1 with a mask, and Eq. 3. V* and the updates of the whole matrices are trained."""

    def forward(self, images, tokens, t, eps, *prior):
        """Like SubjectLoss, but images (B, 4, H, W) have the loss mask as their fourth channel."""
        base, = self.frozen
        z_0 = still_video(base.encode(images[:, :3]), self.num_frames)      # (B, 4, T, h, w)
        factor = base.config.vae.factor
        loss_mask = images[:, 3, ::factor, ::factor]                        # (B, h, w)
        context = base.text_encoder(tokens, self.v_star)                    # (B, L, D)
        subject_error, prior_error = self.squared_errors((z_0, context, t, eps), prior)
        return (loss_mask * subject_error).mean(), prior_error.mean()


class RescaledSamples(Samples):
    """Custom Diffusion's samples: photos are rescaled, and captions mention a large change of scale."""

    def subject_sample(self, i):
        """Sample number i -> image (4, H, W), whose fourth channel is the loss mask, and caption.

        Most photos fill the frame. One at less than 0.6 of its size is placed at random on grey, and the loss
        counts only inside it, one latent cell away from its edge. The mask's mean is 1, so that the mean over
        the clip becomes the mean over the cells that count.
        """
        photo, rng = self.photo_of(i), np.random.default_rng((self.seed, 1, i))
        caption = photo.caption or f"photo of a {self.subject_words}"
        height, width, cell = self.height, self.width, self.height // self.z_shape[2]
        scale = rng.uniform(1 / 3, 1) if rng.random() < 2 / 3 else rng.uniform(1.2, 1.4)
        h, w = round(scale * height), round(scale * width)
        source = ImageOps.mirror(photo.image) if self.flip and rng.random() < 0.5 else photo.image
        resized = lambda h, w: pixels(ImageOps.fit(source, (w, h), Image.BICUBIC))

        image, loss_mask = resized(height, width), torch.ones(1, height, width)
        if scale < 0.6:
            image = torch.zeros(3, height, width)
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            image[:, top:top + h, left:left + w] = resized(h, w)
            first_y = min((top // cell + 1) * cell, height - cell)
            first_x = min((left // cell + 1) * cell, width - cell)
            last_y = max(((top + h) // cell - 1) * cell, first_y + cell)
            last_x = max(((left + w) // cell - 1) * cell, first_x + cell)
            loss_mask = torch.zeros(1, height, width)
            loss_mask[:, first_y:last_y, first_x:last_x] = 1
            loss_mask /= loss_mask.mean()
            caption = f"{rng.choice(['a far away', 'very small'])} {caption}"
        elif scale > 1:
            top, left = rng.integers(h - height + 1), rng.integers(w - width + 1)
            image = resized(h, w)[:, top:top + height, left:left + width]
            caption = f"{rng.choice(['zoomed in', 'close up'])} {caption}"
        return torch.cat([image, loss_mask]), caption


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

    def __init__(self, block, adapter):
        super().__init__()
        self.norm2, self.attn2, self.adapter = block.norm2, block.attn2, adapter

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
    for name, block in blocks.items():
        block.norm2, block.attn2 = nn.Identity(), AdaptedAttention(block, adapters[name])
    try:
        yield
    finally:
        for block in blocks.values():
            block.norm2, block.attn2 = block.attn2.norm2, block.attn2.attn2


@dataclass
class DreamVideoSubject(Subject):
    """V* and, after the first stage, the adapters. sample.py refuses its file, which has no LoRA layers."""
    adapters: dict = field(default_factory=dict)    # name of a spatial block -> Adapter

    def tensors(self):
        tensors = super().tensors()
        for name, adapter in self.adapters.items():
            tensors |= {f"unet.{name}.adapter.{key}": value for key, value in adapter.named_parameters()}
        return tensors

    @torch.no_grad()
    def read_layers(self, metadata, tensors, unet):
        if self.steps > self.settings["word_steps"]:    # of the second stage
            self.adapters = new_adapters(unet)
        for name, value in self.tensors().items():
            value.copy_(tensors[name])


# ------------------------------------------------------------------------------------------------------------
# Training, and sampling DreamVideo's subjects


def learn_subject(args, config):
    """Trains like train.py, by the method args.targets: Custom Diffusion, or DreamVideo in two stages."""
    training, sampling = config.training, config.sampling
    process = join_processes()
    base = open_base(args, process, training=True)
    photos = load_photos(args.images, sampling.height, sampling.width, args.placeholder, args.class_word)
    out, last_save = pick_run(args, photos, process, f"-{args.targets}")
    done = steps_done(last_save) if last_save else 0
    prior, prior_files = None, []
    if training.alpha:
        prior, prior_files = train.encode_prior(args, out, base, training, sampling, process)
    base.unet.grad_checkpointing = args.grad_checkpointing

    settings = run_settings(args, training, sampling, base, photos, prior_files, process)
    metadata = (args.placeholder, args.class_word, config.name, base.config.fingerprint, done, settings)
    kind = RescaledSamples if args.targets == "custom_diffusion" else Samples
    samples = kind(photos, args.placeholder, args.class_word, prior, args.seed, training, sampling,
                   config.vae.factor, not args.no_flip)

    def train_stage(loss, parameters, last_step, save):
        """Trains from the save, or if there is none from subject.steps, up to `last_step`."""
        optimizer = torch.optim.AdamW(parameters, lr=training.lr, weight_decay=training.weight_decay)
        if save:
            load_training(save, subject, optimizer, training.steps)

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
        log = Log(out, done, training.steps, process.rank)
        if args.targets == "custom_diffusion":
            # Token 42170 is "ktn" inside a word, which does not occur in ordinary text.
            v_star = base.text_encoder.token_embedding.weight[42170:42171].float().clone()
            layers = add_full_linears(base.unet)
            loss = CustomDiffusionLoss(base, v_star, layers, training.frames, sampling.fps)
            lora = {name: (layer.lora_A, layer.lora_B) for name, layer in layers.items()}
            subject = Subject(*metadata, loss.v_star, lora)
            of_word = {"params": [loss.v_star], "lr": training.lr if args.word_lr is None else args.word_lr}
            updates = [parameter for parameter in loss.lora if parameter.requires_grad]
            train_stage(loss, [of_word, {"params": updates}], training.steps, last_save)
        else:
            settings["word_steps"] = args.word_steps
            v_star = class_embedding(base.text_encoder, args.class_word)
            loss = train.SubjectLoss(base, v_star, {}, training.frames, sampling.fps)
            subject = DreamVideoSubject(*metadata, loss.v_star)
            if done <= args.word_steps:     # the first stage
                train_stage(loss, [{"params": [loss.v_star], "lr": args.word_lr}], args.word_steps, last_save)
            if subject.steps >= args.word_steps and not asked_to_stop():     # the second
                loss.v_star.requires_grad_(False)
                torch.manual_seed(args.seed)    # the same start on every process
                subject.adapters = new_adapters(base.unet)
                loss.adapters = nn.ModuleList(subject.adapters.values())
                save = last_save if done > args.word_steps else None
                with inserted_adapters(base.unet, subject.adapters):
                    train_stage(loss, loss.adapters.parameters(), training.steps, save)
        log.close(subject)


def sample_subject(args):
    """Writes videos of a DreamVideo subject, with the names and JSONs that sample.py would give them."""
    process = join_processes()
    base = open_base(args, process)
    settings = replace(with_flags(base.config.sampling, args), K=0)
    check_sampling(base.config, settings)
    args.lambdas = f"1*{settings.steps}"    # full strength, as the JSONs record
    path, = find_subjects(args.subject, base.config.fingerprint)
    subject = load_subject(path, base, DreamVideoSubject)
    prompts, tokens = pick_prompts(args, settings, [subject])
    variants = [("", [subject], [1.0] * settings.steps)]
    with inserted_adapters(base.unet, subject.adapters):
        sample.make_videos(args, base, settings, prompts, tokens, variants, process)


# ------------------------------------------------------------------------------------------------------------
# Flags: those of train.py and sample.py

PUBLISHED = {"custom_diffusion": "--lr 8e-5 --steps 500 --alpha 1",
             "dreamvideo": "--lr 1e-5 --steps 4000 --word_lr 1e-4 --alpha 0 --weight_decay 0"}
WITHOUT_EFFECT = {"--rank", "--scale_lr", "--no-scale_lr", "--caption_dropout", "--preview_every",
                  "--targets", "--lambda_s", "--lambda_l", "--K", "--lambdas", "--compare"}


def main():
    p = FlagParser(description="Custom Diffusion, and DreamVideo's subject learning.",
                   epilog="Training takes train.py's flags, and sampling those of sample.py. dreamvideo also "
                          "takes --word_steps, the number of steps that train V* alone (default: 3000).")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for method, published in PUBLISHED.items():
        commands.add_parser(method, help=f"by default {published}", add_help=False)
    commands.choices["dreamvideo"].add_argument("--word_steps", type=int, default=3000)
    commands.add_parser("sample", help="videos of a DreamVideo subject", add_help=False)
    own, flags = p.parse_known_args()
    for flag in flags:
        if flag.partition("=")[0] in WITHOUT_EFFECT:
            raise BadInput(f"{flag}: has no effect here; leave it out")

    sys.argv[1:] = [*PUBLISHED.get(own.command, "").split(), *flags]
    if own.command == "sample":
        args = sample.parse_args()
        if len(args.subject) != 1 or "none" in args.subject:
            raise BadInput("--subject: name one run of dreamvideo")
        sample_subject(args)
    else:
        args, config = train.parse_args()
        config.training = replace(config.training, scale_lr=False, caption_dropout=0.0)
        args.targets, args.word_steps = own.command, getattr(own, "word_steps", 0)
        if not 0 <= args.word_steps <= args.steps:
            raise BadInput(f"--word_steps {args.word_steps}: must be from 0 to --steps ({args.steps})")
        learn_subject(args, config)


if __name__ == "__main__":
    run_script(main)
