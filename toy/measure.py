"""Sees what a clip of the embedded world shows, by finding the drawing that explains its pixels best.

    measure(clip, fps)        # -> Measured: shape, pattern, colour, ground, direction, distance, drift ...
    likeness(clip, "berry")   # how much of a subject's true look it shows, from 0 to 1

The ground is the painted one that most pixels agree with. Then sprites of every shape, pattern, size and turn are tried
at every position of every frame. A sprite's colours are left open: it has one weight for each of its two colours, w_1
and w_2, which hold its light and its pattern, and the colours c that fit best are a least-squares problem of two
unknowns. What a sprite explains is how much nearer to the pixels it is than the bare ground:

    gain(p) = sum_x m(x - p) [ (I(x) - G(x))^2 - (I(x) - sum_i c_i w_i(x - p))^2 ]  =  sum m [(I - G)^2 - I^2] + b A^-1 b
    b_i = sum_x m w_i I        A_ij = sum_x m w_i w_j        c = A^-1 b

with image I, ground G and the sprite's cover m. All sums are correlations, so FFTs do every position at once.

Shapes: N sprites, T frames, h w pixels of the quarter-size pictures that the search runs on.
"""
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from toy.world import (COLOURS, DIRECTIONS, GROUNDS, PATTERNS, SHAPES, SIZE, SPEED, SUBJECTS, TEXTURES, Look, Scene,
                       draw_ground, draw_sprite, face_parts, paint, pattern_cover, sprite_geometry)

SHRINK = 4        # the search runs on pictures so many times smaller
REACH = 16        # shrunk pixels; so far from the middle may a sprite's centre lie, which is up to the edge
BROKEN = 17.0     # dB; a frame is broken if the best drawing of it is not that near
STRAIGHT = 6.0    # pixels, root mean square, that a track may be off its straight line
NEAR = 0.25       # a measured colour has the name of the nearest named one if no channel is farther off
TWO = 0.2         # colours that differ less in every channel do not make a pattern


@dataclass(frozen=True)
class Measured:
    """What a clip shows. A name is empty where the clip shows none."""
    shape: str
    pattern: str
    colour: str
    ground: str
    direction: str
    distance: float      # pixels travelled from the first frame to the last, along a straight line fitted to the track
    frozen: bool         # travelled less than a quarter of what the world's sprites travel
    broken: float        # share of frames that no drawing comes near
    colour_drift: float  # from frame to frame, in the sprite's fitted colours: mean over channels, 1 is black to white
    shape_drift: float   # from frame to frame, the share of the silhouette that is not shared: 1 - intersection / union
    track: np.ndarray    # (T, 2), the sprite's centre (x, y) in pixels


class SpriteBank:
    """Sprites to look for, whose place does not matter: scenes with a look of their own, or with colours left open."""

    def __init__(self, scenes, open_colours=False):
        self.scenes = scenes
        cover, weights = [], []
        for scene in scenes:
            u, v, _, m, light = sprite_geometry(scene.shape, scene.radius, scene.angle, [(SIZE / 2, SIZE / 2)])
            if open_colours:
                second = pattern_cover(scene.look.pattern, u, v, scene.radius)
                w = np.stack([light * (1 - second), light * second], -1)[0]     # (H, W, 2)
                for face, _ in face_parts(u, v, scene.radius):                  # where a face may be, nothing is asked
                    m = m * (1 - face)
            else:
                w = (paint(scene.look, u, v, scene.radius) * light[..., None])[0]
            cover.append(m)
            weights.append(w)
        m = torch.from_numpy(np.stack(cover)).float()                           # (N, 1, H, W)
        w = torch.from_numpy(np.stack(weights)).float().permute(0, 3, 1, 2)
        w = F.avg_pool2d(m * w, SHRINK) / F.avg_pool2d(m, SHRINK).clamp(min=1e-6)
        self.cover = F.avg_pool2d(m, SHRINK)                                    # (N, 1, h, w)
        self.open_colours = open_colours
        ones = torch.fft.rfft2(F.pad(torch.ones(1, 1, *self.cover.shape[2:]), (0, REACH, 0, REACH)))
        if open_colours:
            self.filters = spectrum(torch.cat([self.cover, self.cover * w], 1))  # m, m w_1, m w_2
            products = torch.stack([w[:, 0] ** 2, w[:, 0] * w[:, 1], w[:, 1] ** 2], 1)
            a, b, d = everywhere(spectrum(self.cover * products) * ones).unbind(1)
            a, d = a + 0.5, d + 0.5      # a little ridge: a colour that is hardly in the picture counts as black
            self.inverse = torch.stack([d, -b, a], 1) / (a * d - b * b)[:, None]   # of A: (N, 3, 33, 33)
        else:
            self.filters = spectrum(torch.cat([self.cover, 2 * self.cover * w], 1))
            self.constant = everywhere(spectrum(-self.cover * (w ** 2).sum(1, keepdim=True)) * ones)[:, 0]

    def search(self, clip, ground):
        """clip (T, H, W, 3), ground (H, W, 3) in [0, 1] -> of every sprite in every frame, where it explains most:

        gain (N, T), track (N, T, 2), and colours (N, T, 2, 3) if they are open, else None.
        """
        image, bare = (shrunk(x) for x in (clip, ground[None]))
        surplus = ((image - bare) ** 2 - image ** 2).sum(1, keepdim=True)
        surplus, image = (torch.fft.rfft2(F.pad(x, (0, REACH, 0, REACH))) for x in (surplus, image))
        gain = everywhere(self.filters[:, None, :1] * surplus)[:, :, 0]         # (N, T, 33, 33)
        if self.open_colours:
            # b: (N, T, 2 colours, 3 channels, 33, 33)
            b = everywhere(self.filters[:, None, 1:, None] * image[:, None])
            p, q, r = (self.inverse[:, None, i, None] for i in range(3))
            c = torch.stack([p * b[:, :, 0] + q * b[:, :, 1], q * b[:, :, 0] + r * b[:, :, 1]], 2)
            gain = gain + (b * c).sum((2, 3))
        else:
            gain = gain + everywhere((self.filters[:, None, 1:] * image).sum(2)) + self.constant[:, None]
        best, where = gain.flatten(2).max(2)
        y, x = where // (2 * REACH + 1), where % (2 * REACH + 1)
        track = torch.stack([x + vertex(gain, y, x, 3), y + vertex(gain, y, x, 2)], -1)
        colours = None
        if self.open_colours:
            at = where[:, :, None, None, None].expand(-1, -1, 2, 3, -1)
            colours = c.flatten(4).gather(4, at)[..., 0]
        return best, SIZE / 2 + SHRINK * (track - REACH), colours


def shrunk(pictures):
    """(T, H, W, 3) -> (T, 3, h, w)"""
    return F.avg_pool2d(torch.tensor(pictures, dtype=torch.float32).permute(0, 3, 1, 2), SHRINK)


def spectrum(x):
    """Filters (N, C, h, w), each with its middle in the middle -> their spectra, for correlations at REACH around it."""
    padded = F.pad(x, (0, REACH, 0, REACH))
    return torch.fft.rfft2(torch.roll(padded, (-REACH, -REACH), dims=(2, 3))).conj()


def everywhere(product):
    """A product of spectra -> the correlation at every centre: 33 rows and columns."""
    return torch.fft.irfft2(product)[..., :2 * REACH + 1, :2 * REACH + 1]


def vertex(gain, y, x, axis):
    """Where the parabola through a maximum and its two neighbours on an axis peaks, relative to the maximum."""
    n, t = torch.meshgrid(*map(torch.arange, y.shape), indexing="ij")
    at = [n, t, y, x]
    left, right = list(at), list(at)
    left[axis], right[axis] = (at[axis] - 1).clamp(min=0), (at[axis] + 1).clamp(max=gain.shape[axis] - 1)
    left, middle, right = (gain[tuple(index)] for index in (left, at, right))
    return (0.5 * (left - right) / (left - 2 * middle + right).clamp(max=-1e-6)).clamp(-0.5, 0.5)


@lru_cache
def open_sprites():
    """The bank of every shape and pattern, in any colours."""
    return SpriteBank([Scene(shape, Look((1, 1, 1), (1, 1, 1), pattern), "", "", radius=radius, angle=angle)
                       for shape in SHAPES for pattern in PATTERNS
                       for radius in (30, 33, 36) for angle in (-0.26, -0.13, 0, 0.13, 0.26)], open_colours=True)


@lru_cache
def subject_sprites(name):
    """The bank of one subject's true look, at several sizes and turns."""
    shape, look = SUBJECTS[name]
    return SpriteBank([Scene(shape, look, "", "", radius=radius, angle=angle)
                       for radius in np.linspace(26, 42, 7) for angle in np.linspace(-0.45, 0.45, 11)])


def find_ground(clip):
    """clip (T, H, W, 3) in [0, 1] -> (name, painted ground (H, W, 3)); the name is empty if few pixels agree with any."""
    candidates = [(name, draw_ground(name, texture)) for name in GROUNDS for texture in range(TEXTURES)]
    small = clip[:, ::2, ::2]
    off = [np.median(np.abs(small - ground[::2, ::2]).mean(-1)) for _, ground in candidates]
    name, ground = candidates[int(np.argmin(off))]
    return (name if min(off) < 0.08 else ""), ground


def likeness(clip, name):
    """How much of what sets the subject off from the bare ground a clip shows: 1 for its true look, about 0 for none.

    clip (T, H, W, 3) uint8. Every frame counts by its best match over place, size and turn; a look as far from the
    subject as the ground is scores 0, and so does a farther one.
    """
    bank, clip = subject_sprites(name), clip / 255
    _, ground = find_ground(clip)
    gains, tracks, _ = bank.search(clip, ground)
    scores = []
    for t, best in enumerate(gains.argmax(0).tolist()):
        scene, centre = bank.scenes[best], tracks[best, t].tolist()
        u, v, _, cover, light = (x[0] for x in sprite_geometry(scene.shape, scene.radius, scene.angle, [centre]))
        body = paint(scene.look, u, v, scene.radius) * light[..., None]
        off, bare = ((cover[..., None] * (picture - body) ** 2).sum() for picture in (clip[t], ground))
        scores.append(max(0.0, 1 - off / bare))
    return float(np.mean(scores))


def measure(clip, fps):
    """clip (T, H, W, 3) uint8 -> Measured"""
    bank, clip = open_sprites(), clip / 255
    ground_name, ground = find_ground(clip)
    gains, tracks, colours = bank.search(clip, ground)

    # One sprite explains the whole clip; its colours are fitted in every frame.
    best = int(gains.sum(1).argmax())
    track, fitted = tracks[best].numpy().astype(np.float64), colours[best].numpy()
    first, second = np.clip(fitted.mean(0), 0, 1)
    scene = bank.scenes[best]
    if scene.look.pattern == "plain" or np.abs(first - second).max() < TWO:
        scene, fitted = replace(scene, look=Look(tuple(first))), fitted[:, :1]
    else:
        scene = replace(scene, look=Look(tuple(first), tuple(second), scene.look.pattern))
    drawn = [draw_sprite(ground, replace(scene, look=replace(scene.look, face=face)), track) for face in (False, True)]
    error = np.min([((picture - clip) ** 2).mean(axis=(1, 2, 3)) for picture in drawn], axis=0)
    broken = -10 * np.log10(error) < BROKEN

    # What changes from frame to frame: the fitted colours, and the outline of the sprite that explains each frame best.
    each = bank.cover[gains.argmax(0), 0]                                        # (T, h, w)
    shared = torch.minimum(each[1:], each[:-1]).sum((1, 2)) / torch.maximum(each[1:], each[:-1]).sum((1, 2))

    # Where it goes: a straight line through the track.
    time = np.arange(len(clip)) - (len(clip) - 1) / 2
    slope = (time[:, None] * track).sum(0) / max((time ** 2).sum(), 1e-9)
    off_line = np.sqrt(((track - track.mean(0) - time[:, None] * slope) ** 2).sum(1).mean())
    distance = float(np.hypot(*slope) * (len(clip) - 1))
    frozen = distance < 0.25 * SPEED / fps * (len(clip) - 1)
    direction = max(DIRECTIONS, key=lambda d: slope @ DIRECTIONS[d])
    seen = broken.mean() < 0.5
    return Measured(shape=scene.shape if seen else "", pattern=scene.look.pattern if seen else "",
                    colour=nearest_colour(first) if seen else "", ground=ground_name,
                    direction=direction if seen and not frozen and off_line < STRAIGHT else "", distance=distance,
                    frozen=bool(frozen), broken=float(broken.mean()),
                    colour_drift=float(np.abs(np.diff(fitted, axis=0)).mean()), shape_drift=float(1 - shared.mean()),
                    track=track)


def nearest_colour(rgb):
    away = {name: np.abs(np.subtract(rgb, named)).max() for name, named in COLOURS.items()}
    name = min(away, key=away.get)
    return name if away[name] < NEAR else ""
