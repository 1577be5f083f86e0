"""Eq. 1, 3 and 4 of CustomCrafter: V* and a LoRA are learned from photos, each repeated into a still video.

    python train.py                                         # this repository's own subject, one process
    torchrun --nproc_per_node 4 train.py                    # 4 processes, GPUs or CPUs, 4 times the clips
    python train.py --images photos/dog --class_word dog    # your own photos; --base names another base
    python train.py --resume latest                         # continues the newest run of these photos

Writes into --out, or runs/NAME of the photo folder: subject.safetensors, for sample.py; step-*/, the newest
saves; log.jsonl; preview.png. V* and the pairs (A, B) are trained, 96 for VideoCrafter2. All else is frozen.

Shapes: B subject clips per process and as many prior clips, T frames, L text tokens, D text width;
latents z (B, 4, T, h, w), 8 times smaller than pixels.
"""
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from data import Samples, load_photos, load_prior, still_video
from lora import add_lora, class_embedding
from sample import generate
from support.cli import (BadInput, FlagParser, join_processes, lock_folder, mean_over_processes, progress_bar,
                         run_script, stop_signals, wait_for_all)
from support.config import (SamplingDefaults, TrainingDefaults, add_flags, add_speed_flags, check_flags,
                            check_sampling, load_config, loss_weights, pick_subject, with_flags)
from support.files import Subject, default_base, open_base
from support.runs import (Log, best_effort, load_training, lock_run, pick_run, prior_folder, run_settings,
                          save_preview, save_prior_clip, save_training)


class SubjectLoss(nn.Module):
    """The losses of Eq. 1 and Eq. 3. Its parameters are exactly the trained ones: V* and the updates A, B."""

    def __init__(self, base, v_star, layers, num_frames, fps):
        super().__init__()
        self.v_star = nn.Parameter(v_star)
        self.lora = nn.ParameterList()
        for layer in layers.values():
            self.lora.extend([layer.lora_A, layer.lora_B])
        self.num_frames, self.fps = num_frames, fps
        # In a tuple, the frozen base is no submodule: DistributedDataParallel neither sends nor averages it.
        self.frozen = (base,)
        self.w = loss_weights(base.config, base.schedule).to(base.device)   # w(t), 1 for VideoCrafter2

    def forward(self, images, tokens, t, eps, *prior):
        """B subject clips, and B prior clips or none -> the losses of Eq. 1 and Eq. 3, two scalars.

        images (B, 3, H, W) in [-1, 1]; tokens (B, L), captions with V*; t (B,) in 0 ... 999;
        eps (B, 4, T, h, w). prior: latents z_0 (B, 4, T, h, w), context (B, L, D), t and eps of the class.
        """
        base, = self.frozen
        z_0 = still_video(base.encode(images), self.num_frames)             # (B, 4, T, h, w)
        context = base.text_encoder(tokens, self.v_star)                    # (B, L, D)
        subject_error, prior_error = self.squared_errors((z_0, context, t, eps), prior)
        return subject_error.mean(), prior_error.mean()                     # Eq. 1, Eq. 3

    def squared_errors(self, subject, prior):
        """Clips of the subject and of the class, each (z_0, context, t, eps) -> squared errors (B, h, w)."""
        if not prior:
            error = self.squared_error(*subject)
            return error, torch.zeros_like(error)
        if subject[0].shape == prior[0].shape:      # one call of the UNet is faster than two
            return self.squared_error(*map(torch.cat, zip(subject, prior))).chunk(2)
        return self.squared_error(*subject), self.squared_error(*prior)

    def squared_error(self, z_0, context, t, eps):
        """-> (B, h, w): w(t) ||eps - eps_theta(z_t, t, c)||^2, averaged over channels and frames."""
        base, = self.frozen
        z_t = base.schedule.add_noise(z_0, t, eps)
        error = (base.unet(z_t, t, torch.full_like(t, self.fps), context) - eps).pow(2)
        return self.w[t].view(-1, 1, 1) * error.mean(dim=(1, 2))


def fit(loss, next_batch, optimizer, first_step, training, process, after_step):
    """Trains `loss` up to training.steps, under DistributedDataParallel if there are several processes.

    next_batch(step, micro_step) returns the arguments of `loss`. after_step(step, losses, grad_norm) logs,
    saves and previews; to stop early, it returns True on every process. Raises BadInput, before the weights
    change, if the gradient is not finite.
    """
    model = DistributedDataParallel(loss) if process.world > 1 else loss
    for step in range(first_step, training.steps + 1):
        losses = torch.zeros(2, device=process.device)
        for micro_step in range(training.grad_accum):
            # DistributedDataParallel averages gradients in the last micro-step only.
            model.require_backward_grad_sync = micro_step == training.grad_accum - 1
            subject_loss, prior_loss = model(*next_batch(step, micro_step))
            total = subject_loss + training.alpha * prior_loss              # Eq. 4
            (total / training.grad_accum).backward()
            losses += torch.stack([subject_loss, prior_loss]).detach() / training.grad_accum
        grad_norm = nn.utils.clip_grad_norm_(loss.parameters(), float("inf"))       # only measured
        if not grad_norm.isfinite():
            raise BadInput(f"--lr: the gradient is not finite at step {step}; start again with a lower rate")
        optimizer.step()
        optimizer.zero_grad()
        if after_step(step, mean_over_processes(losses, process), grad_norm):
            break


def main():
    args, config = parse_args()
    training, sampling = config.training, config.sampling
    process = join_processes()
    photos = load_photos(args.images, sampling.height, sampling.width, args.placeholder, args.class_word)
    out, last_save = pick_run(args, photos, process)
    base = open_base(args, process, training=True)
    if process.rank == 0:
        captions = sum(bool(photo.caption) for photo in photos)
        print(f"subject {args.images}: {len(photos)} photos of {args.placeholder} {args.class_word}, "
              f"{captions} with a caption")
    prior, prior_files = None, []
    if training.alpha:
        prior, prior_files = encode_prior(args, out, base, training, sampling, process)

    # Create the parameters: V*, which starts as the class word, and the updates of the spatial attention.
    torch.manual_seed(args.seed)    # the same start on every process
    layers = add_lora(base.unet, training.rank, args.targets)
    v_star = class_embedding(base.text_encoder, args.class_word)
    loss = SubjectLoss(base, v_star, layers, training.frames, sampling.fps)
    lr = scaled_lr(training, process)
    word_lr = lr if args.word_lr is None else args.word_lr
    groups = [{"params": [loss.v_star], "lr": word_lr}, {"params": list(loss.lora)}]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=training.weight_decay)
    base.unet.grad_checkpointing = args.grad_checkpointing

    # Resume from a save, if asked. It needs no random state, because a sample follows from its number.
    settings = run_settings(args, training, sampling, base, photos, prior_files, process)
    lora = {name: (layer.lora_A, layer.lora_B) for name, layer in layers.items()}
    subject = Subject(args.placeholder, args.class_word, config.name, base.config.fingerprint, 0, settings,
                      loss.v_star, lora)
    if last_save:
        load_training(last_save, subject, optimizer, training.steps)
    samples = Samples(photos, args.placeholder, args.class_word, prior, args.seed, training, sampling,
                      config.vae.factor, not args.no_flip)

    def after_step(step, losses, grad_norm):
        subject.steps = step
        log(step, losses, grad_norm)
        last, stop = step == training.steps, asked_to_stop()
        preview = training.preview_every and (step % training.preview_every == 0 or last) and not stop
        if process.rank == 0 and (step % training.save_every == 0 or last or preview or stop):
            save_training(out, subject, optimizer, args.keep_last)
        if process.rank == 0 and preview:
            draw_preview(out, base, subject, layers, sampling)
        return stop

    with lock_run(out, last_save, process.rank), stop_signals(process) as asked_to_stop:
        log = Log(out, subject.steps, training.steps, process.rank)
        fit(loss, partial(samples.share, process), optimizer, subject.steps + 1, training, process,
            after_step)
        log.close(subject)


def scaled_lr(training, process):
    """--lr times all clips of a step, subject and prior, as in the authors' release, or --lr as it is."""
    clips = process.world * training.batch_size * training.grad_accum * (2 if training.alpha else 1)
    factor = clips if training.scale_lr else 1
    if process.rank == 0:
        print(f"learning rate {training.lr * factor:g} = {training.lr:g} x {factor}")
    return training.lr * factor


def draw_preview(out, base, subject, layers, sampling):
    """Adds a row to OUT/preview.png: videos of the default prompt, with the same two seeds each time.

    Too many steps freeze the motion. The preview shows when that begins, so that an earlier save can be used.
    """
    prompt = sampling.prompt_for([subject])
    with best_effort(f"the preview of step {subject.steps} was not drawn"):
        try:
            videos = generate(base, [prompt] * 2, (0, 1), [subject], sampling, lora=layers).numpy()
        finally:
            layers.set(1.0)
        save_preview(out / "preview.png", videos, f"step {subject.steps}: {prompt}")


# ------------------------------------------------------------------------------------------------------------
# The class prior


def encode_prior(args, out, base, training, sampling, process):
    """The class prior, encoded once -> (latents (n, 4, T, h, w), contexts (n, L, D), the empty text's context
    (L, D)), and the captions and crc32s that identify it. T = 1 if it has pictures only.
    """
    class_caption, folder = f"a {args.class_word}", args.prior
    if folder is None:
        settings = sampling if args.prior_motion else replace(sampling, frames=1)
        folder = prior_folder(out, base, settings, args.class_word)
        generate_prior(folder, class_caption, training.num_prior, settings, base, process)
    prior = load_prior(folder, training.num_prior, sampling.frames, sampling.height, sampling.width)
    if process.rank == 0:
        print(f"prior {folder}: {len(prior)} pictures or clips of {class_caption}")
    latents, contexts, files = [], {}, []
    for video, caption, crc32 in prior:
        caption = caption or class_caption
        latents.append(base.encode(video).transpose(0, 1))                  # (4, 1 or T, h, w)
        if caption not in contexts:
            contexts[caption] = base.encode_text([caption])[0]
        files.append((caption, crc32))
    longest = max(z.shape[1] for z in latents)
    z = torch.stack([z.expand(-1, longest, -1, -1) for z in latents])
    contexts = torch.stack([contexts[caption] for caption, _ in files])
    return (z, contexts, base.encode_text([""])[0]), files


def generate_prior(folder, caption, number, sampling, base, process):
    """Generates those of `number` pictures or clips that are missing.

    Batches never change, because batch composition affects rounding. The paper takes 200 pictures from
    LAION-400M instead; --prior reads a folder of such pictures.
    """
    ending = "mp4" if sampling.frames > 1 else "png"
    path = lambda k: folder / f"{k:04d}.{ending}"
    size = max(1, 8 // sampling.frames)
    batches = [range(i, i + size) for i in range(0, number, size)]
    with lock_folder(folder, process.rank, wait=True):
        wait_for_all(process)
        mine = batches[process.rank::process.world]
        for batch in progress_bar(mine, desc="prior", unit="batch", disable=process.rank > 0):
            missing = [k for k in batch if k < number and not path(k).exists()]
            videos = generate(base, [caption] * len(batch), batch, settings=sampling) if missing else None
            for k in missing:
                save_prior_clip(path(k), videos[k - batch[0]].numpy(), sampling.save_fps)
        wait_for_all(process)


# ------------------------------------------------------------------------------------------------------------
# Flags


def parse_args():
    """-> the flags, and the base's config, whose defaults they override. Raises BadInput."""
    p = FlagParser(description="Learn a subject from photos (CustomCrafter, Eq. 1-4).",
                   epilog="A flag that is not given takes its value from the base's config.json.")
    p.add_argument("--base", type=Path, default=default_base(), help="base folder (default: %(default)s)")
    p.add_argument("--images", help="folder with 4 to 6 photos; NAME.txt beside NAME.jpg is its caption")
    p.add_argument("--class_word", default="", help="class of the subject, such as dog; V* starts from it")
    p.add_argument("--placeholder", default="V*", help="how prompts name the subject (default: %(default)s)")
    p.add_argument("--no_flip", action="store_true", help="never mirror a photo, such as one with text")
    p.add_argument("--targets", choices=["all", "cross"], default="all",
                   help="LoRA on all spatial attention, or on its cross-attention alone (paper, Table 2)")
    p.add_argument("--word_lr", type=float, help="learning rate of V* (default: --lr)")
    p.add_argument("--prior", type=Path, help="folder of the class's pictures (default: the base makes them)")
    p.add_argument("--prior_motion", action="store_true", help="the base makes moving clips for the prior")
    add_flags(p, TrainingDefaults)
    add_flags(p, SamplingDefaults, only=("height", "width", "fps"))
    add_speed_flags(p, ["float32", "bfloat16"], training=True)
    p.add_argument("--seed", type=int, default=0, help="of all random numbers (default: %(default)s)")
    p.add_argument("--out", type=Path, help="folder to write into (default: runs/NAME of the photo folder)")
    p.add_argument("--keep_last", type=int, default=3, help="newest saves to keep (default: %(default)s)")
    p.add_argument("--resume", help="continue a run: its folder, one of its saves, or latest")
    args = p.parse_args()
    pick_subject(args)
    check_flags(args, SamplingDefaults, TrainingDefaults,
                word_lr=(0, 1), seed=(0, 2**31), keep_last=(1, 10**7))
    config = load_config(args.base)
    config.training = with_flags(config.training, args)
    config.sampling = with_flags(config.sampling, args, only=("height", "width", "fps"))
    check_sampling(config, config.sampling)
    return args, config


if __name__ == "__main__":
    run_script(main)
