"""Measures the embedded base, where the truth is known to the pixel.

    python toy/experiment.py base       # does the base show what captions say? 256 clips of unseen seeds, half held out
    python toy/experiment.py decided    # at which sampling step is the direction of motion decided?

Each prints a table and writes it, with a contact sheet, into --out (outputs/experiment). Numbers are means over clips, each
with its standard error.
"""
import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import ROOT, Z_CHANNELS, Tokenizer, complete_or_absent, load_base, run_script
from sample import ddim, ddim_steps
from toy.world import DIRECTIONS, SPEED, SUBJECTS, caption, draw_clip, draw_photos, measure, random_scene

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def main():
    p = argparse.ArgumentParser(description="Measure the embedded base.")
    p.add_argument("what", choices=["base", "decided"])
    p.add_argument("--base", type=Path, default=ROOT / "toy" / "base", help="base folder (default: %(default)s)")
    p.add_argument("--clips", type=int, default=256, help="clips per row of the table (default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("outputs/experiment"), help="folder for results (default: %(default)s)")
    args = p.parse_args()
    base = load_base(args.base, "cuda" if torch.cuda.is_available() else "cpu")
    {"base": measure_base, "decided": measure_decision}[args.what](args, base)


# ---------------------------------------------------------------------------------------------------------------------
# The experiments


def measure_base(args, base):
    """Clips of scenes never trained on, at default settings, against their captions; and the VAE's own error."""
    scenes = draw_scenes(args.clips)
    clips = sample_clips(base, [caption(scene) for scene in scenes], [scene.fps for scene in scenes])
    seen = [measure(clip, scene.fps) for clip, scene in zip(clips, scenes)]
    rows = {name: [getattr(m, name) == getattr(scene, name) for m, scene in zip(seen, scenes)]
            for name in ("direction", "colour", "shape", "ground")}
    rows["distance, relative to the world's"] = [m.distance / travel(scene, len(clip)) for m, scene, clip in zip(seen, scenes, clips)]
    rows["frozen clips"] = [m.frozen for m in seen]
    rows["clips with a broken frame"] = [m.broken > 0 for m in seen]
    for name, pictures in [("world", np.concatenate([draw_clip(scene, 1) for scene in scenes])),
                           ("subjects", np.concatenate([draw_photos(name) for name in SUBJECTS]))]:
        rows[f"VAE, dB on the {name}"] = [psnr(base, picture) for picture in pictures]
    report(args, "base", rows)
    save_sheet(args.out / "base.png", clips[:16])


def measure_decision(args, base):
    """The motion word is exchanged for its opposite after k steps: the later the second word still wins, the later motion forms."""
    scenes = draw_scenes(args.clips)
    texts = [caption(scene) for scene in scenes]
    others = [caption(replace(scene, direction=OPPOSITE[scene.direction])) for scene in scenes]
    rows = {}
    for k in (0, 1, 2, 3, 5, 7, 10, 15, 20, 25):
        clips = sample_clips(base, texts, [scene.fps for scene in scenes], others, k)
        seen = [measure(clip, scene.fps).direction for clip, scene in zip(clips, scenes)]
        rows[f"k = {k:2}: first word"] = [d == scene.direction for d, scene in zip(seen, scenes)]
        rows[f"k = {k:2}: second word"] = [d == OPPOSITE[scene.direction] for d, scene in zip(seen, scenes)]
        report(args, "decided", rows)


# ---------------------------------------------------------------------------------------------------------------------
# Mechanics


def draw_scenes(count, seed=1000):
    """count scenes of a seed that pre-training does not use, every second one a held-out combination; 8 frames a second."""
    rng = np.random.default_rng(seed)
    return [replace(random_scene(rng, unseen=i % 2 == 0), fps=8) for i in range(count)]


def travel(scene, frames):
    """Pixels that the world's own sprite travels in a clip."""
    return SPEED / scene.fps * (frames - 1)


@torch.no_grad()
def sample_clips(base, prompts, fps, later_prompts=None, k=None, batch=32):
    """Prompts and fps, one each a clip -> (N, T, H, W, 3) uint8 numpy, at the base's default settings.

    Clip n has seed n. With `later_prompts` the text is exchanged after k steps.
    """
    d, tokenizer, clips = base.config.defaults, Tokenizer(), []
    shape = (Z_CHANNELS, d.frames, d.height // 8, d.width // 8)
    encode = lambda texts: base.text_encoder(tokenizer(list(texts)).to(base.device))
    for i in tqdm(range(0, len(prompts), batch), desc="clips", unit=f"{batch} clips"):
        part = slice(i, min(i + batch, len(prompts)))
        generators = [torch.Generator().manual_seed(n) for n in range(part.start, part.stop)]
        noise = lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(base.device)
        context, uncond, unet = encode(prompts[part]), encode([""]), base.unet
        if later_prompts:
            later = torch.cat([encode(later_prompts[part]), uncond.expand(len(context), -1, -1)])
            last_t = ddim_steps(base.schedule, d.steps, d.eta)[0][k].item()  # the first noise level with the new text
            unet = lambda z, t, f, both: base.unet(z, t, f, later if t[0] <= last_t else both)
        z_0 = ddim(unet, base.schedule, noise(), noise, context, uncond, torch.tensor(fps[part], device=base.device),
                   d.steps, d.cfg, d.eta)
        clips.append(base.decode(z_0).numpy())
    return np.concatenate(clips)


@torch.no_grad()
def psnr(base, picture):
    """(H, W, 3) uint8 -> what is left of it after the VAE, in dB."""
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].to(base.device) / 127.5 - 1
    return (10 * torch.log10(4 / (base.vae.decode(base.vae.encode(x)).clamp(-1, 1) - x).pow(2).mean())).item()


def report(args, name, rows):
    """Prints row name -> list of numbers as mean and standard error, and writes them to name.json."""
    table = {row: {"mean": float(np.mean(x)), "error": float(np.std(x) / len(x) ** 0.5), "clips": len(x)} for row, x in rows.items()}
    print("\n".join(f"{row:36} {r['mean']:7.3f} +- {r['error']:.3f}  ({r['clips']})" for row, r in table.items()), flush=True)
    with complete_or_absent(args.out / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(table, indent=1) + "\n")


def save_sheet(path, clips):
    """Clips (N, T, H, W, 3) -> one picture, a clip a row."""
    with complete_or_absent(path) as temporary:
        Image.fromarray(np.concatenate([np.concatenate(clip, axis=1) for clip in clips])).save(temporary, format="png")


if __name__ == "__main__":
    run_script(main)
