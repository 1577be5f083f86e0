"""What a clip of the world shows, measured from its pixels by finding the drawing that explains them best.

    from toy.measure import measure, likeness

Nothing to run here. The ground is the painted ground that most pixels agree with. Then every sprite of a bank
is tried at every position of every frame. A bank is a list of sprites of several shapes, colours, angles and
sizes. The gain of a sprite at p says how much nearer to the pixels the sprite is than the bare ground:

    gain(p) = sum_x m(x - p) [ (I(x) - G(x))^2 - (I(x) - S(x - p))^2 ]

with image I, ground G, sprite S and its cover m. Written out, the gain is a sum of correlations, so FFTs
compute all positions at once.

Shapes: T frames, N sprites of a bank; clips (T, 64, 64, 3). Lengths are in pixels.
"""
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from model import pixels
from toy.world import (COLOURS, DIRECTIONS, GROUNDS, SHAPES, SIZE, SPEED, SUBJECTS, TEXTURES, Look, Scene,
                       draw_ground, draw_sprite, sprite_layers)

BROKEN = 17.0     # dB: a frame is broken if the best drawing's PSNR is lower
FROZEN = 0.25     # a clip is frozen if its sprite travels less than this share of the world's distance
STRAIGHT = 3.0    # root mean square distance that a track may have from a straight line
AGREES = 0.08     # median difference in [0, 1] that pixels may have from a ground
REACH = 16        # half pixels: so far from the middle may a sprite's centre be, which is up to the edge


@dataclass(frozen=True)
class Measured:
    """What a clip shows. A name is empty where the clip shows none."""
    shape: str
    colour: str
    ground: str
    direction: str
    distance: float     # travelled from the first frame to the last, on a straight line fitted to the track
    frozen: bool        # whether the distance is too short, see FROZEN
    broken: float       # share of frames that no drawing comes near, see BROKEN
    track: np.ndarray   # (T, 2), the sprite's centre (x, y)


def measure(clip, fps, bank=None):
    """clip (T, 64, 64, 3) uint8 -> Measured. `bank`: the sprites to look for, by default the plain ones."""
    bank, clip = bank or plain_sprites(), clip / 255
    ground_name, ground = find_ground(clip)
    gains, tracks = bank.search(clip, ground)
    best = int(gains.sum(1).argmax())
    scene, track = bank.scenes[best], tracks[best].numpy().astype(np.float64)

    # Compare the frames with the best drawing.
    drawn = np.stack([draw_sprite(ground, scene, centre) for centre in track])
    broken = -10 * np.log10(((drawn - clip) ** 2).mean(axis=(1, 2, 3))) < BROKEN
    seen = broken.mean() < 0.5

    # Fit a straight line to the track.
    time = np.arange(len(clip)) - (len(clip) - 1) / 2
    velocity = (time[:, None] * track).sum(0) / (time ** 2).sum()
    off_line = np.sqrt(((track - track.mean(0) - time[:, None] * velocity) ** 2).sum(1).mean())
    distance = float(np.hypot(*velocity) * (len(clip) - 1))
    frozen = distance < FROZEN * SPEED / fps * (len(clip) - 1)
    moves = seen and not frozen and off_line < STRAIGHT
    direction = max(DIRECTIONS, key=lambda name: velocity @ DIRECTIONS[name])

    return Measured(shape=scene.shape if seen else "", colour=scene.colour if seen else "",
                    ground=ground_name, direction=direction if moves else "", distance=distance,
                    frozen=bool(frozen), broken=float(broken.mean()), track=track)


def likeness(clip, name):
    """How much of a subject a clip (T, 64, 64, 3) uint8 shows: 1 for its true look, about 0 for none of it.

    Every frame counts by its best match over place, size and turn. A look that is as far from the subject
    as the bare ground scores 0. So does a look that is farther.
    """
    bank, clip = subject_sprites(name), clip / 255
    _, ground = find_ground(clip)
    gains, tracks = bank.search(clip, ground)
    scores = []
    for t, best in enumerate(gains.argmax(0).tolist()):
        _, cover, body = sprite_layers(bank.scenes[best], tracks[best, t].tolist())
        error = (cover[..., None] * (clip[t] - body) ** 2).sum()
        error_of_ground = (cover[..., None] * (ground - body) ** 2).sum()
        scores.append(max(0.0, 1 - error / error_of_ground))
    return float(np.mean(scores))


def find_ground(clip):
    """clip (T, 64, 64, 3) in [0, 1] -> name, ground (64, 64, 3). The name is empty where few pixels agree."""
    names, grounds = [], []
    for name, texture in product(GROUNDS, range(TEXTURES)):
        names.append(name)
        grounds.append(draw_ground(name, texture))
    differences = [np.median(np.abs(clip - ground).mean(-1)) for ground in grounds]
    nearest = int(np.argmin(differences))
    return (names[nearest] if differences[nearest] < AGREES else ""), grounds[nearest]


# ------------------------------------------------------------------------------------------------------------
# Searching


class SpriteBank:
    """Sprites to look for: scenes whose place does not matter. Half resolution keeps the search fast."""

    def __init__(self, scenes):
        self.scenes = scenes
        covers, bodies = [], []
        for scene in scenes:
            _, cover, body = sprite_layers(scene, (SIZE / 2, SIZE / 2))
            covers.append(cover)
            bodies.append(body)
        m = torch.tensor(np.stack(covers), dtype=torch.float32)[:, None]                # (N, 1, 64, 64)
        S = torch.tensor(np.stack(bodies), dtype=torch.float32).permute(0, 3, 1, 2)     # (N, 3, 64, 64)
        m, S = F.avg_pool2d(m, 2), F.avg_pool2d(m * S, 2) / F.avg_pool2d(m, 2).clamp(min=1e-6)
        # gain = m * A + 2 (m S) * I - (m S^2) * 1, where * is a correlation and A = (I - G)^2 - I^2
        terms = torch.cat([m, 2 * m * S, -m * (S ** 2).sum(1, keepdim=True)], dim=1)    # (N, 5, 32, 32)
        terms = torch.roll(F.pad(terms, (0, REACH, 0, REACH)), (-REACH, -REACH), dims=(2, 3))
        self.terms = torch.fft.rfft2(terms).conj()                                      # (N, 5, 48, 25)

    def search(self, clip, ground):
        """clip (T, 64, 64, 3), ground (64, 64, 3), in [0, 1] -> each sprite's best place in each frame.

        Returns gains (N, T) and tracks (N, T, 2), the centres (x, y) there.
        """
        image, ground = half_size(clip), half_size(ground[None])                        # (T or 1, 3, 32, 32)
        A = ((image - ground) ** 2 - image ** 2).sum(1, keepdim=True)
        frames = torch.cat([A, image, torch.ones_like(A)], dim=1)                       # (T, 5, 32, 32)
        frames = torch.fft.rfft2(F.pad(frames, (0, REACH, 0, REACH)))                   # (T, 5, 48, 25)
        gain = torch.fft.irfft2(torch.einsum("ncyx,tcyx->ntyx", self.terms, frames))
        places = 2 * REACH + 1
        gain = gain[:, :, :places, :places]                                             # (N, T, 33, 33)
        gains, best = gain.flatten(2).max(2)
        y, x = best // places, best % places
        centres = torch.stack([x + vertex(gain, y, x, 3), y + vertex(gain, y, x, 2)], -1)
        return gains, SIZE / 2 + 2 * (centres - REACH)


def half_size(pictures):
    """(T, 64, 64, 3) array -> (T, 3, 32, 32) tensor."""
    return F.avg_pool2d(torch.tensor(pictures, dtype=torch.float32).permute(0, 3, 1, 2), 2)


def vertex(gain, y, x, axis):
    """gain (N, T, H, W), its maxima y, x (N, T) -> (N, T), how far from them the peaks are along `axis`.

    A peak is that of the parabola through the maximum and its two neighbours.
    """
    n, t = torch.meshgrid(torch.arange(gain.shape[0]), torch.arange(gain.shape[1]), indexing="ij")

    def at(step):
        place = [n, t, y, x]
        place[axis] = (place[axis] + step).clamp(0, gain.shape[axis] - 1)
        return gain[tuple(place)]

    left, middle, right = at(-1), at(0), at(1)
    return (0.5 * (left - right) / (left - 2 * middle + right).clamp(max=-1e-6)).clamp(-0.5, 0.5)


@lru_cache
def plain_sprites():
    """The bank of every shape and colour of the world."""
    choices = product(SHAPES, COLOURS.items(), (14.5, 16.5, 18.5), (-0.26, -0.13, 0, 0.13, 0.26))
    return SpriteBank([Scene(shape, Look(rgb), "", "", colour, radius=radius, angle=angle)
                       for shape, (colour, rgb), radius, angle in choices])


@lru_cache
def subject_sprites(name):
    """The bank of one subject's true look, in several sizes and turns."""
    shape, look = SUBJECTS[name]
    choices = product((13, 15, 17, 19, 21), (-0.45, -0.3, -0.15, 0, 0.15, 0.3, 0.45))
    return SpriteBank([Scene(shape, look, "", "", radius=radius, angle=angle) for radius, angle in choices])


@lru_cache
def class_or_subject(name):
    """The bank of what a customised clip may show: the subject, or any plain sprite of its class."""
    shape = SUBJECTS[name][0]
    plain = [scene for scene in plain_sprites().scenes if scene.shape == shape]
    return SpriteBank(plain + subject_sprites(name).scenes)


# ------------------------------------------------------------------------------------------------------------
# Measures of pixels alone


def pixel_features(clip):
    """(T, H, W, 3) uint8 -> (T, D) of length 1: the pixels less the clip's mean colour, in place of CLIP."""
    frames = torch.from_numpy(clip).float()
    return F.normalize((frames - frames.mean(dim=(0, 1, 2))).flatten(1), dim=1)


@torch.no_grad()
def through_vae(base, picture):
    """(H, W, 3) uint8 -> (H, W, 3) uint8, encoded and decoded by the base's VAE."""
    z = base.vae.encode(pixels(picture)[None].to(base.device))
    return base.decode(z[:, :, None])[0, 0].numpy()


def psnr(base, picture):
    """(H, W, 3) uint8 -> peak signal-to-noise ratio of the picture after the base's VAE, in dB."""
    error = picture.astype(float) - through_vae(base, picture)
    return 10 * np.log10(255 ** 2 / np.mean(error ** 2))
