"""Eq. 1, 3 and 4 of CustomCrafter: from photos as still videos, V* and a LoRA learn a subject.

    python train.py                                         # the base's own subject, one process
    torchrun --nproc_per_node 4 train.py                    # 4 processes, GPUs or CPUs, 4 times the clips
    python train.py --images photos/dog --class_word dog    # your own photos; --base names another base
    python train.py --resume latest                         # goes on where a stopped run was

Writes OUT/subject.safetensors, which sample.py takes; OUT/step-*/, the newest saves; OUT/log.jsonl and
OUT/preview.png. V* and the pairs (A, B) are trained, 96 for VideoCrafter2. All else is frozen.

Shapes: B subject clips per process and as many prior clips, T frames, L text tokens, D text width;
latents z (B, 4, T, h, w), 8 times smaller than pixels.
"""
from dataclasses import replace
from pathlib import Path

from cli import (BadInput, FlagParser, Progress, check_out, join_processes, leave_processes, pick_precision,
                 run_script, stop_signals, this_process)
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from config import (RANGES, SamplingDefaults, TrainingDefaults, add_flags, add_speed_flags, check_flags,
                    check_sampling, load_config, with_flags)
from data import Samples, load_photos, load_prior, still_video
from files import default_base, load_base, pick_checkpointing, pick_images, warn_of_photos
from lora import LiveLoRA, Subject
from model import Tokenizer
from paper.baselines import METHODS, add_method_flags, fill_published
from runs import (Log, default_run, digests, load_training, newest_save, pick_run, prior_folder, prior_writer,
                  run_settings, run_writer, save_fingerprint, save_preview, save_prior_clip, save_training,
                  say_how_it_ended, watching)
from sample import generate
from texts import check_placeholder, counted, default_prompt


class SubjectLoss(nn.Module):
    """The losses of Eq. 1 and Eq. 3. Its parameters are exactly what is trained: V* and the updates A, B."""

    def __init__(self, base, v_star, layers, frames, fps):
        super().__init__()
        self.v_star = nn.Parameter(v_star)
        self.updates = nn.ParameterList()
        for layer in layers.values():
            self.updates.extend(layer.tensors())
        self.frames, self.fps = frames, fps
        # In a tuple, the frozen base is no submodule: DistributedDataParallel neither sends nor averages it.
        self.frozen = (base,)

    def forward(self, photos, tokens, weight, t, eps, prior_z=None, prior_context=None):
        """B subject clips, and B prior clips or none -> the losses of Eq. 1 and Eq. 3, two scalars.

        Errors have the weights of noise levels that the base was trained with (VideoCrafter2's are 1).
        photos (B, 3, H, W) in [-1, 1]; tokens (B, L), captions with V*; weight (B, h, w) of the
        places, 1 on average; t (B or 2B,) in 0 ... 999; eps (B or 2B, 4, T, h, w); prior_z (B, 4, T, h, w);
        prior_context (B, L, D). 2B where there is a prior.
        """
        base, = self.frozen
        z_0 = still_video(base.encode(photos), self.frames)                 # (B, 4, T, h, w)
        context = base.text_encoder(tokens, self.v_star)                    # (B, L, D)
        if prior_z is not None:
            z_0 = torch.cat([z_0, prior_z])                                 # (2B, 4, T, h, w)
            context = torch.cat([context, prior_context])                   # (2B, L, D)

        z_t = base.schedule.add_noise(z_0, t, eps)
        error = (base.unet(z_t, t, torch.full_like(t, self.fps), context) - eps).pow(2)
        error = base.schedule.loss_weight.to(t.device)[t].view(-1, 1, 1) * error.mean(dim=(1, 2))
        of_subject, of_prior = error[:len(photos)], error[len(photos):]
        subject_loss = (weight * of_subject).mean()                         # Eq. 1
        prior_loss = of_prior.mean() if len(of_prior) else torch.zeros_like(subject_loss)       # Eq. 3
        return subject_loss, prior_loss


def main():
    args = parse_args()
    process = this_process()
    config = load_config(args.base / "config.json")
    settings = with_flags(config.training, args)
    sampling = with_flags(config.sampling, args, only=("frames", "height", "width"))
    check_sampling(config, sampling)
    images, class_word = pick_images(args, config)
    photos = load_photos(images, max(sampling.height, sampling.width), args.placeholder, class_word)
    out, last_save = pick_run(args.out, args.resume, default_run(images), photos)
    join_processes(process, base=config.fingerprint, save=save_fingerprint(last_save))

    # Load the base. Make or read the class prior, and encode it once.
    precision = pick_precision(args.precision, process.device, training=True)
    base = load_base(args.base, process.device, getattr(torch, precision))
    subject_words = f"{args.placeholder} {class_word}"
    if process.rank == 0:
        print(f"base {args.base} ({config.name}), subject {images}: {counted(photos, subject_words)}")
        warn_of_photos(photos, sampling.height, sampling.width)
    prior = encode_prior(args, out, class_word, settings, sampling, base, process) if settings.alpha else None

    # Create what is trained: V*, started from the class word, and the updates of the spatial attention.
    method = METHODS[args.method]
    torch.manual_seed(args.seed)  # the same start on every process
    v_star = method.start_word(base.text_encoder, class_word)
    layers = method.add_layers(base.unet, settings.rank, args.targets)
    loss = SubjectLoss(base, v_star, layers, sampling.frames, sampling.fps)
    word_lr = settings.lr if args.word_lr is None else args.word_lr
    groups = [{"params": [loss.v_star], "lr": word_lr}, {"params": list(loss.updates)}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
    base.unet.grad_checkpointing = pick_checkpointing(args, base, settings, sampling, process.rank)
    if args.compile:
        base.unet.compile()
    model = loss
    if process.world > 1:
        model = DistributedDataParallel(loss, find_unused_parameters=method.staged)

    # Go on from a save, if asked. A save needs no random state (data.py).
    clips_per_step = process.world * settings.batch_size * settings.grad_accum
    updates = {name: layer.tensors() for name, layer in layers.items()}
    subject = Subject(args.placeholder, class_word, settings.rank, config.name, base.config.fingerprint, 0,
                      args.method, updates=updates, v_star=loss.v_star)
    subject.settings = run_settings(settings, sampling, args) | {
        "clips_a_step": clips_per_step, "precision": precision, "class_word": class_word,
        "images": str(images)} | digests(base, photos, prior)
    first = load_training(last_save, subject, optimizer, settings.steps, process.rank) if last_save else 0

    tokenizer = Tokenizer([args.placeholder])
    prior_count = len(prior[0]) if prior else 0
    samples = Samples(photos, subject_words, prior_count, args.seed, sampling, config.vae.factor,
                      method.make_sample, not args.no_flip)

    def next_batch(step, round):
        """This process's share of the samples, as SubjectLoss takes them."""
        B = settings.batch_size
        start = (step - 1) * clips_per_step + (round * process.world + process.rank) * B
        frames, captions, weight, t, eps, which = samples.batch(range(start, start + B))
        clips = [x.to(process.device) for x in (frames, tokenizer(captions), weight, t, eps)]
        if prior:
            clips += [prior[0][which].expand(-1, -1, sampling.frames, -1, -1), prior[1][which]]
        return clips

    with (run_writer(out, last_save, process.rank), stop_signals(process) as asked_to_stop,
          Log(out / "log.jsonl", first, settings.steps, process.rank) as log):
        for step in range(first + 1, settings.steps + 1):
            method.before_step(loss, step, args.word_steps)
            losses = torch.zeros(2, device=process.device)
            for round in range(settings.grad_accum):
                if stop := asked_to_stop():
                    break
                if process.world > 1:
                    model.require_backward_grad_sync = round == settings.grad_accum - 1
                subject_loss, prior_loss = model(*next_batch(step, round))
                total = subject_loss + settings.alpha * prior_loss          # Eq. 4
                (total / settings.grad_accum).backward()
                losses += torch.stack([subject_loss, prior_loss]).detach() / settings.grad_accum
            if stop:  # what is saved is the last whole step
                break
            if process.world > 1:
                dist.all_reduce(losses)
            subject_loss, prior_loss = (losses / process.world).tolist()    # means over processes
            norm = torch.stack([p.grad.norm() for p in loss.parameters() if p.grad is not None]).norm().item()
            if not np.isfinite(subject_loss + prior_loss + norm):
                raise BadInput(f"--lr {settings.lr}: the loss or its gradient is not finite at step {step}; "
                               f"the last good save is {newest_save(out) or 'none'}, try a lower rate")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            # Log, save, preview.
            subject.steps = step
            log(step, loss=subject_loss, prior_loss=prior_loss, grad_norm=norm, lr=settings.lr)
            last = step == settings.steps
            preview_due = settings.preview_every and (step % settings.preview_every == 0 or last)
            if process.rank == 0 and (step % settings.save_every == 0 or preview_due):
                save_training(out, subject, optimizer, args.keep_last)
            if process.rank == 0 and preview_due:
                with watching(f"the preview of step {step}"):
                    save_preview(out, step, *preview(base, sampling, subject, LiveLoRA(layers.values())))
        if process.rank == 0:
            save_training(out, subject, optimizer, args.keep_last)

    if process.rank == 0:
        say_how_it_ended(out, subject, settings.steps)
    leave_processes(process)


# ------------------------------------------------------------------------------------------------------------
# The class prior


def encode_prior(args, out, class_word, settings, sampling, base, process):
    """The class prior -> latents (n, 4, T, h, w), T = 1 if all are still; contexts (n, L, D); checksums."""
    class_caption, folder, count = f"a {class_word}", args.prior, settings.num_prior
    if folder is None:
        sampling_prior = replace(sampling, frames=sampling.frames if args.prior_motion else 1)
        folder, facts = prior_folder(out, base, sampling_prior, class_word)
        generate_prior(folder, facts, class_caption, count, sampling_prior, base, process)
    videos, contexts, tokenizer = [], {}, Tokenizer()
    prior = load_prior(folder, count, sampling.frames, sampling.height, sampling.width)
    captions = [caption or class_caption for _, caption, _ in prior]
    with torch.no_grad():
        for (video, _, _), caption in zip(prior, captions):
            videos.append(base.encode(video).transpose(0, 1))               # (4, 1 or T, h, w)
            if caption not in contexts:
                contexts[caption] = base.text_encoder(tokenizer([caption]).to(base.device))[0]
    longest = max(video.shape[1] for video in videos)
    z = torch.stack([video.expand(-1, longest, -1, -1) for video in videos])
    checksums = [(caption, crc32) for caption, (_, _, crc32) in zip(captions, prior)]
    return z, torch.stack([contexts[caption] for caption in captions]), checksums


def generate_prior(folder, facts, caption, count, sampling, base, process):
    """Fills `folder` with `count` pictures or clips that the base makes. Those there stay.

    A batch is always of the same numbers: rounding depends on the batch.
    The paper takes 200 pictures from LAION-400M; a folder of such pictures goes to --prior.
    """
    ending = "mp4" if sampling.frames > 1 else "png"
    path = lambda k: folder / f"{k:04d}.{ending}"
    size = max(1, 8 // sampling.frames)
    with prior_writer(folder, facts, process.rank, count):
        if process.world > 1:
            dist.barrier()
        batches = [range(i, i + size) for i in range(0, count, size)]
        mine = batches[process.rank::process.world]
        for batch in Progress(mine, desc="prior", unit="batch", disable=process.rank > 0):
            missing = [k for k in batch if k < count and not path(k).exists()]
            videos = generate(base, [caption] * len(batch), batch, settings=sampling) if missing else None
            for k in missing:
                save_prior_clip(path(k), videos[k - batch[0]].numpy(), sampling.save_fps)
        if process.world > 1:
            dist.barrier()


def preview(base, sampling, subject, lora):
    """The default prompt with the same two seeds each time -> videos (2, T, H, W, 3), label.

    Too many steps freeze the motion. The preview shows when, and an earlier save may be better.
    """
    prompt = default_prompt(sampling, [subject])
    try:
        videos = generate(base, [prompt] * 2, (0, 1), [subject], sampling, lora=lora).numpy()
    finally:
        lora.set(1.0)
    return videos, f"step {subject.steps}: {prompt}"


# ------------------------------------------------------------------------------------------------------------
# Flags


def parse_args():
    p = FlagParser(description="Learn a subject from photos (CustomCrafter, Eq. 1-4).",
                   epilog="Flags left out take the base's own defaults, from its config.json.")
    p.add_argument("--base", type=Path, default=default_base(), help="base folder (default: %(default)s)")
    p.add_argument("--images", default="",
                   help="folder with 4 to 6 photos; NAME.txt beside NAME.jpg is its caption")
    p.add_argument("--class_word", default="", help="what the photos show, such as dog; V* starts from it")
    p.add_argument("--placeholder", default="V*", help="how prompts name the subject (default: %(default)s)")
    p.add_argument("--no_flip", action="store_true", help="never mirror a photo: for text, for asymmetry")
    add_method_flags(p)
    p.add_argument("--prior", type=Path,
                   help="folder with pictures or videos of the class; left out: the base makes them, once")
    p.add_argument("--prior_motion", action="store_true", help="the base makes moving clips for the prior")
    add_flags(p, TrainingDefaults)
    add_flags(p, SamplingDefaults, only=("frames", "height", "width"))
    add_speed_flags(p, ["float32", "bfloat16"], training=True)
    p.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    p.add_argument("--out", type=Path, help="folder to write into (default: runs/NAME, as the photo folder)")
    p.add_argument("--keep_last", type=int, default=3, help="saves that stay (default: %(default)s)")
    p.add_argument("--resume", default="", help="go on with a run: its folder, one of its saves, or latest")
    args = p.parse_args()
    check_placeholder(args.placeholder)
    if args.images and not args.class_word.strip():
        raise BadInput("--class_word: is needed with --images; name what the photos show, such as dog")
    fill_published(args)
    check_flags(args, RANGES[SamplingDefaults] | RANGES[TrainingDefaults] | {
        "word_steps": (0, 10**7), "word_lr": (0, 1), "seed": (0, 2**31), "keep_last": (1, 10**7)})
    if args.out:
        check_out(args.out)
    return args


if __name__ == "__main__":
    run_script(main)
