"""Measures the embedded base and the paper's claim on it, where the truth is known to the pixel.

    python toy/experiment.py base       # does the base show what captions say? Clips of unseen seeds, half of them held out
    python toy/experiment.py decided    # at which sampling step is the direction of motion decided?
    python toy/experiment.py claim      # constant lambda against the paper's schedule, on a subject that train.py learned

Each prints a table, and writes it with a contact sheet into --out (outputs/experiment). Numbers are means over clips, each
with its standard error; clip n of every row has the same prompt and the same seed.
"""
import argparse
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from lora import load_subject
from model import ROOT, BadInput, Tokenizer, complete_or_absent, load_base, run_script
from sample import ddim_steps, find_subjects, generate, two_step_schedule
from toy.world import (DIRECTIONS, GROUNDS, SPEED, SUBJECTS, caption, class_or_subject, draw_clip, draw_photos, likeness, measure,
                       random_scene)

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}

# lambda_s, lambda_l, K of every row of the claim; fixed before any was sampled.
SCHEDULES = {"constant 1.0": (1.0, 1.0, 0), "constant 0.8": (0.8, 0.8, 0), "constant 0.4": (0.4, 0.4, 0),
             "0.4 then 0.8, K = 5 (paper)": (0.4, 0.8, 5), "0.4 then 0.8, K = 2": (0.4, 0.8, 2),
             "0.4 then 0.8, K = 10": (0.4, 0.8, 10), "0.4 then 0.8, K = 20": (0.4, 0.8, 20),
             "0.0 then 0.8, K = 5": (0.0, 0.8, 5), "0.2 then 0.8, K = 5": (0.2, 0.8, 5), "0.6 then 0.8, K = 5": (0.6, 0.8, 5)}


def main():
    p = argparse.ArgumentParser(description="Measure the embedded base and the paper's claim on it.")
    p.add_argument("what", choices=["base", "decided", "claim"])
    p.add_argument("--base", type=Path, default=ROOT / "toy" / "base", help="base folder (default: %(default)s)")
    p.add_argument("--subject", default="", help="claim: subject.safetensors learned from one of toy/subjects "
                                                 "(default: the newest under runs/, else the committed one)")
    p.add_argument("--clips", type=int, help="clips per row (default: 256 for base, else 128)")
    p.add_argument("--out", type=Path, default=Path("outputs/experiment"), help="folder for results (default: %(default)s)")
    args = p.parse_args()
    args.clips = args.clips or (256 if args.what == "base" else 128)
    base = load_base(args.base, "cuda" if torch.cuda.is_available() else "cpu")
    {"base": measure_base, "decided": measure_decision, "claim": measure_claim}[args.what](args, base)


# ---------------------------------------------------------------------------------------------------------------------
# The experiments


def measure_base(args, base):
    """Clips of scenes never trained on, at default settings, against their captions; and the VAE's own error."""
    scenes = draw_scenes(args.clips)
    clips = sample_clips(base, [caption(scene) for scene in scenes])
    seen = [measure(clip, scene.fps) for clip, scene in zip(clips, scenes)]
    row = against(scenes, seen, ("direction", "colour", "shape", "ground"))
    for name, pictures in [("world", np.concatenate([draw_clip(scene, 1) for scene in scenes])),
                           ("subjects", np.concatenate([draw_photos(name) for name in SUBJECTS]))]:
        row[f"VAE {name} dB"] = [psnr(base, picture) for picture in pictures]
    report(args, "base", {"base": row})
    save_sheet(args.out / "base.png", clips[:16])


def measure_decision(args, base):
    """The motion word is exchanged for its opposite after k steps; motion is decided where the first begins to win."""
    scenes, rows = draw_scenes(args.clips), {}
    texts = [caption(scene) for scene in scenes]
    others = [caption(replace(scene, direction=OPPOSITE[scene.direction])) for scene in scenes]
    for k in (0, 1, 2, 3, 5, 7, 10, 15, 20, 30):
        seen = [measure(clip, scene.fps).direction for clip, scene in zip(sample_clips(base, texts, others, k), scenes)]
        rows[f"k = {k}"] = {"first word": [d == scene.direction for d, scene in zip(seen, scenes)],
                            "second word": [d == OPPOSITE[scene.direction] for d, scene in zip(seen, scenes)]}
    report(args, "decided", rows)


def measure_claim(args, base):
    """Motion, composition and likeness of a learned subject at every lambda schedule; the base as reference."""
    path, = find_subjects([args.subject] if args.subject else [], base.config.fingerprint)
    subject = load_subject(path, base)
    name = Path(subject.settings["images"]).name
    if name not in SUBJECTS:
        raise BadInput(f"--subject {path}: was learned from {subject.settings['images']}, and the truth is known of toy/subjects only")
    print(f"subject {path}: {name}, {subject.steps} steps")
    places = [(d, g) for g in GROUNDS for d in DIRECTIONS]
    scenes = [replace(scene, direction=direction, ground=ground)
              for scene, (direction, ground) in zip(draw_scenes(args.clips), itertools.cycle(places))]
    text = "a {} moving {} on the {}"
    d, rows, sheet = base.config.defaults, {}, []
    for row, schedule in {"base, class word": None, **SCHEDULES}.items():
        words = f"{subject.placeholder} {subject.class_word}" if schedule else subject.class_word
        prompts = [text.format(words, scene.direction, scene.ground) for scene in scenes]
        how = dict(subjects=[subject], lambdas=two_step_schedule(*schedule, d.steps)) if schedule else {}
        clips = sample_clips(base, prompts, **how)
        rows[row] = against(scenes, [measure(clip, d.fps, class_or_subject(name)) for clip in clips], ("direction", "ground"))
        rows[row]["likeness"] = [likeness(clip, name) for clip in clips]
        sheet += list(clips[:2])
        report(args, f"claim-{name}", rows)
        save_sheet(args.out / f"claim-{name}.png", sheet)


# ---------------------------------------------------------------------------------------------------------------------
# Mechanics


def draw_scenes(count, seed=1000):
    """count scenes of a seed that pre-training does not use, every second one a held-out combination; 8 frames a second."""
    rng = np.random.default_rng(seed)
    return [replace(random_scene(rng, unseen=i % 2 == 0), fps=8) for i in range(count)]


def against(scenes, seen, names):
    """What clips show (list of Measured) against what was asked: metric -> one number a clip."""
    row = {name: [getattr(m, name) == getattr(scene, name) for m, scene in zip(seen, scenes)] for name in names}
    row["distance"] = [m.distance / (SPEED / scene.fps * (len(m.track) - 1)) for m, scene in zip(seen, scenes)]  # world: 1
    row["frozen"] = [m.frozen for m in seen]
    row["broken"] = [m.broken > 0 for m in seen]
    return row


@torch.no_grad()
def sample_clips(base, prompts, later_prompts=None, k=None, batch=32, **how):
    """One prompt a clip -> (N, T, H, W, 3) uint8 numpy, by `generate` of sample.py with `how`. Clip n has seed n.

    With `later_prompts` the text is exchanged after k steps.
    """
    clips = []
    for i in tqdm(range(0, len(prompts), batch), desc="clips", unit=f"{batch} clips"):
        part, model = slice(i, i + batch), base
        if later_prompts:
            texts = later_prompts[part] + [""] * len(later_prompts[part])
            later = base.text_encoder(Tokenizer()(texts).to(base.device))
            last_t = ddim_steps(base.schedule, base.config.defaults.steps, 0)[0][k]  # the first noise level with the new text
            model = replace(base, unet=lambda z, t, fps, both: base.unet(z, t, fps, later if t[0] <= last_t else both))
        clips.append(generate(model, prompts[part], range(len(prompts))[part], **how).numpy())
    return np.concatenate(clips)


@torch.no_grad()
def psnr(base, picture):
    """(H, W, 3) uint8 -> what is left of it after the VAE, in dB."""
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].to(base.device) / 127.5 - 1
    return (10 * torch.log10(4 / (base.vae.decode(base.vae.encode(x)).clamp(-1, 1) - x).pow(2).mean())).item()


def report(args, name, rows):
    """Row -> metric -> list of numbers becomes a table of means and standard errors, printed and written to name.json."""
    table = {row: {metric: (float(np.mean(x)), float(np.std(x) / len(x) ** 0.5)) for metric, x in metrics.items()}
             for row, metrics in rows.items()}
    metrics = list(next(iter(table.values())))
    print(f"| {args.clips} clips a row | " + " | ".join(metrics) + " |\n" + "|---" * (1 + len(metrics)) + "|")
    for row, values in table.items():
        print(f"| {row} | " + " | ".join(f"{mean:.3f} ± {error:.3f}" for mean, error in values.values()) + " |", flush=True)
    with complete_or_absent(args.out / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def save_sheet(path, clips):
    """Clips (N, T, H, W, 3) -> one picture, a clip a row."""
    with complete_or_absent(path) as temporary:
        Image.fromarray(np.concatenate([np.concatenate(clip, axis=1) for clip in clips])).save(temporary, format="png")


if __name__ == "__main__":
    run_script(main)
