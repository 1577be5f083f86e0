"""What a clip of the world shows, measured from its pixels by finding the drawing that explains them best.

    from toy.measure import measure, likeness

Nothing to run here. The ground is the painted ground that most pixels agree with. A bank is a list of
sprites of several shapes, patterns, angles and sizes. Each is tried at every second row and column of every
frame; a parabola through the gains refines the best place. The gain of a sprite at p says how much nearer to
the pixels the sprite is than the bare ground:

    gain(p) = sum_x m(x - p) [ (I(x) - G(x))^2 - (I(x) - S(x - p))^2 ]

with image I, ground G, sprite S and its cover m. A sprite's colours may be left open. Then S = sum_i c_i w_i:
two weights w_i hold the sprite's light and its pattern. The colours c that explain most are a least-squares
problem of two unknowns:

    gain(p) = sum_x m [ (I - G)^2 - I^2 ] + b A^-1 b
    b_i = sum_x m w_i I        A_ij = sum_x m w_i w_j        c = A^-1 b

Written out, every gain is a sum of correlations, so FFTs compute all positions at once.

Shapes: T frames, N sprites of a bank; clips (T, H, W, 3). The search runs on pictures of h = H / 2 rows and
w = W / 2 columns. P = 33 rows and columns of positions are tried. Lengths are in pixels.
"""
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from model import pixels
from toy.world import (DIRECTIONS, GROUNDS, PATTERNS, SHAPES, SIZE, SPEED, SUBJECTS, TEXTURES, Look, Scene,
                       colour_name, colour_words, draw_ground, draw_sprite, face_parts, pattern_cover,
                       sprite_body, sprite_geometry)

BROKEN = 17.0     # dB: a frame is broken if its PSNR to the clip's drawing is lower
FROZEN = 0.25     # a clip is frozen if its sprite travels less than this share of the world's distance
UNIFORM = 3.0     # root mean square distance that a track may have from uniform motion
AGREES = 0.08     # median difference in [0, 1] that pixels may have from a ground
SHRINK = 2        # the search runs on pictures this many times smaller
REACH = 16        # shrunk pixels: how far from the middle a centre is looked for, here up to the edge


@dataclass(frozen=True)
class Measured:
    """What a clip shows. A name is empty where the clip shows none."""
    shape: str
    pattern: str
    colour: str          # one word, or two with "and"
    ground: str
    direction: str
    distance: float      # travelled from the first frame to the last, on a straight line fitted to the track
    frozen: bool         # whether the distance is too short, see FROZEN
    broken: float        # share of frames that the clip's drawing does not come near, see BROKEN
    colour_drift: float  # mean change of the fitted colours between two frames; black to white would be 1
    shape_drift: float   # of two neighbouring sprites' area, the mean share that only one of them covers
    track: np.ndarray    # (T, 2), the sprite's centre (x, y)


def measure(clip, fps):
    """clip (T, H, W, 3) uint8 with T >= 2, its frames per second -> Measured.

    One sprite explains the whole clip. Its colours are fitted in each frame. Where half of the frames or more
    are broken, shape, pattern, colour and direction are empty.
    """
    bank, clip = open_sprites(), clip / 255
    ground_name, ground = find_ground(clip)
    gains, tracks, colours = bank.search(clip, ground)
    best = int(gains.sum(1).argmax())
    track, fitted = tracks[best].numpy().astype(np.float64), colours[best].numpy()      # (T, 2), (T, 2, 3)
    first, second = np.clip(fitted.mean(0), 0, 1)
    scene, pattern = bank.scenes[best], bank.scenes[best].look.pattern
    if colour_name(first) == colour_name(second):   # a pattern's colours never share a name
        pattern, second, fitted = "plain", None, fitted[:, :1]
    look = Look(tuple(first), second if second is None else tuple(second), pattern)

    # Compare each frame with the best drawing, with a face or without.
    errors = []
    for face in (False, True):
        drawn = draw_sprite(ground, replace(scene, look=replace(look, face=face)), track)
        errors.append(((drawn - clip) ** 2).mean(axis=(1, 2, 3)))
    broken = -10 * np.log10(np.min(errors, axis=0)) < BROKEN
    seen = broken.mean() < 0.5

    # Compare the covers of neighbouring frames, laid over one another. Each frame has its own best sprite's,
    # which may change from frame to frame: the world's own clips have a shape drift of 0.05 after the VAE.
    outlines = bank.cover[gains.argmax(0), 0]                                       # (T, h, w)
    intersection = torch.minimum(outlines[1:], outlines[:-1]).sum((1, 2))
    union = torch.maximum(outlines[1:], outlines[:-1]).sum((1, 2))

    # Fit a straight line to the track.
    time = np.arange(len(clip)) - (len(clip) - 1) / 2
    velocity = (time[:, None] * track).sum(0) / (time ** 2).sum()
    off_line = np.sqrt(((track - track.mean(0) - time[:, None] * velocity) ** 2).sum(1).mean())
    distance = float(np.hypot(*velocity) * (len(clip) - 1))
    frozen = distance < FROZEN * SPEED / fps * (len(clip) - 1)
    moves = seen and not frozen and off_line < UNIFORM
    direction = max(DIRECTIONS, key=lambda name: velocity @ DIRECTIONS[name])

    return Measured(shape=scene.shape if seen else "", pattern=pattern if seen else "",
                    colour=colour_words(look) if seen else "", ground=ground_name,
                    direction=direction if moves else "", distance=distance, frozen=bool(frozen),
                    broken=float(broken.mean()), colour_drift=float(np.abs(np.diff(fitted, axis=0)).mean()),
                    shape_drift=float(1 - (intersection / union).mean()), track=track)


def likeness(clip, name):
    """How much of a subject a clip (T, H, W, 3) uint8 shows: 1 for its true look, about 0 for none of it.

    A frame's score is that of its best match over place, size and turn. A look that is as far from the
    subject as the bare ground scores 0. So does a look that is farther.
    """
    bank, clip = subject_sprites(name), clip / 255
    _, ground = find_ground(clip)
    gains, tracks, _ = bank.search(clip, ground)
    scores = []
    for t, best in enumerate(gains.argmax(0).tolist()):
        _, cover, body = sprite_body(bank.scenes[best], [tracks[best, t].tolist()])
        error = (cover[0, ..., None] * (clip[t] - body[0]) ** 2).sum()
        error_of_ground = (cover[0, ..., None] * (ground - body[0]) ** 2).sum()
        scores.append(max(0.0, 1 - error / error_of_ground))
    return float(np.mean(scores))


def find_ground(clip):
    """clip (T, H, W, 3) in [0, 1] -> name, ground (H, W, 3). The name is empty where few pixels agree."""
    places = list(product(GROUNDS, range(TEXTURES)))
    grounds = [draw_ground(*place) for place in places]
    some = clip[:, ::2, ::2]  # a quarter of the pixels says enough
    differences = [np.median(np.abs(some - ground[::2, ::2]).mean(-1)) for ground in grounds]
    nearest = int(np.argmin(differences))
    return (places[nearest][0] if differences[nearest] < AGREES else ""), grounds[nearest]


# ------------------------------------------------------------------------------------------------------------
# Searching


class SpriteBank:
    """Sprites to look for: scenes whose place does not matter. Their colours are given, or left open."""

    def __init__(self, scenes, open_colours=False):
        self.scenes, self.open_colours = scenes, open_colours
        parts = self.open_parts if open_colours else self.painted_parts
        covers, weights = zip(*(parts(scene) for scene in scenes))
        m = torch.from_numpy(np.stack(covers)).float()                                  # (N, 1, H, W)
        S = torch.from_numpy(np.stack(weights)).float().permute(0, 3, 1, 2)     # (N, 3 or 2 for open, H, W)
        S = F.avg_pool2d(m * S, SHRINK) / F.avg_pool2d(m, SHRINK).clamp(min=1e-6)
        self.cover = m = F.avg_pool2d(m, SHRINK)                                        # (N, 1, h, w)
        ones = torch.fft.rfft2(padded(torch.ones(1, 1, *m.shape[2:])))
        if open_colours:
            self.filters = spectrum(torch.cat([m, m * S], 1))                           # m, m w_1, m w_2
            products = torch.stack([S[:, 0] ** 2, S[:, 0] * S[:, 1], S[:, 1] ** 2], 1)
            a, b, d = at_all_places(spectrum(m * products) * ones).unbind(1)            # A = ((a, b), (b, d))
            a, d = a + 0.5, d + 0.5   # a small ridge: a colour that is hardly in the picture counts as black
            self.inverse = torch.stack([d, -b, a], 1) / (a * d - b * b)[:, None]        # of A: (N, 3, P, P)
        else:  # -(I - S)^2 = -I^2 + 2 I S - S^2, and the first term is in search's surplus
            self.filters = spectrum(torch.cat([m, 2 * m * S], 1))
            self.constant = at_all_places(spectrum(-m * (S ** 2).sum(1, keepdim=True)) * ones)[:, 0]

    @staticmethod
    def painted_parts(scene):
        """-> cover (1, H, W) and body (H, W, 3) of a sprite in the middle."""
        _, cover, body = sprite_body(scene, [(SIZE / 2, SIZE / 2)])
        return cover, body[0]

    @staticmethod
    def open_parts(scene):
        """-> cover (1, H, W) without the places of a face; weights (H, W, 2) of the two colours."""
        middle = [(SIZE / 2, SIZE / 2)]
        u, v, _, cover, light = sprite_geometry(scene.shape, scene.radius, scene.angle, middle)
        second = pattern_cover(scene.look.pattern, u, v, scene.radius)
        for face, _ in face_parts(u, v, scene.radius):
            cover = cover * (1 - face)
        return cover, np.stack([light * (1 - second), light * second], -1)[0]

    def search(self, clip, ground):
        """clip (T, H, W, 3), ground (H, W, 3), in [0, 1] -> each sprite's best place in each frame.

        Returns gains (N, T); tracks (N, T, 2), the centres (x, y) there; and colours (N, T, 2, 3) if they are
        open, else None.
        """
        image, bare = shrunk(clip), shrunk(ground[None])                                # (T or 1, 3, h, w)
        surplus = ((image - bare) ** 2 - image ** 2).sum(1, keepdim=True)
        surplus, image = torch.fft.rfft2(padded(surplus)), torch.fft.rfft2(padded(image))
        gain = at_all_places(self.filters[:, None, :1] * surplus)[:, :, 0]              # (N, T, P, P)
        if self.open_colours:
            b = at_all_places(self.filters[:, None, 1:, None] * image[:, None])         # (N, T, 2, 3, P, P)
            p, q, r = (self.inverse[:, None, i, None] for i in range(3))
            c = torch.stack([p * b[:, :, 0] + q * b[:, :, 1], q * b[:, :, 0] + r * b[:, :, 1]], 2)
            gain = gain + (b * c).sum((2, 3))
        else:
            gain = gain + at_all_places((self.filters[:, None, 1:] * image).sum(2)) + self.constant[:, None]
        places = 2 * REACH + 1
        gains, best = gain.flatten(2).max(2)
        y, x = best // places, best % places
        centres = torch.stack([x + vertex(gain, y, x, 3), y + vertex(gain, y, x, 2)], -1)
        colours = None
        if self.open_colours:
            there = best[:, :, None, None, None].expand(-1, -1, 2, 3, -1)
            colours = c.flatten(4).gather(4, there)[..., 0]
        return gains, SIZE / 2 + SHRINK * (centres - REACH), colours


def shrunk(pictures):
    """(T, H, W, 3) array -> (T, 3, h, w) tensor."""
    return F.avg_pool2d(torch.tensor(pictures, dtype=torch.float32).permute(0, 3, 1, 2), SHRINK)


def padded(x):
    """Adds zeros right and below: a sprite that leaves the picture meets them, not the other side."""
    return F.pad(x, (0, REACH, 0, REACH))


def spectrum(x):
    """Filters (N, C, h, w) around the middle -> their spectra, for correlations at P by P places."""
    return torch.fft.rfft2(torch.roll(padded(x), (-REACH, -REACH), dims=(2, 3))).conj()


def at_all_places(product_of_spectra):
    """-> the correlation (..., P, P), with a sprite's centre at each place."""
    return torch.fft.irfft2(product_of_spectra)[..., :2 * REACH + 1, :2 * REACH + 1]


def vertex(gain, y, x, axis):
    """gain (N, T, P, P), its maxima at y, x (N, T) -> (N, T): from the maximum to the peak along `axis`.

    The peak is that of the parabola through the maximum and its two neighbours; -0.5 to 0.5.
    """
    n, t = torch.meshgrid(torch.arange(gain.shape[0]), torch.arange(gain.shape[1]), indexing="ij")

    def at(step):
        place = [n, t, y, x]
        place[axis] = (place[axis] + step).clamp(0, gain.shape[axis] - 1)
        return gain[tuple(place)]

    left, middle, right = at(-1), at(0), at(1)
    return (0.5 * (left - right) / (left - 2 * middle + right).clamp(max=-1e-6)).clamp(-0.5, 0.5)


@lru_cache
def open_sprites():
    """The bank of every shape and pattern, in any colours."""
    # A plain sprite needs no entry: any pattern in two equal colours is plain.
    choices = product(SHAPES, PATTERNS[1:], (15.5, 17.5), (-0.24, -0.12, 0, 0.12, 0.24))
    scenes = []
    for shape, pattern, radius, angle in choices:
        look = Look((1, 1, 1), (1, 1, 1), pattern)
        scenes.append(Scene(shape, look, "", "", radius=radius, angle=angle))
    return SpriteBank(scenes, open_colours=True)


@lru_cache
def subject_sprites(name):
    """The bank of one subject's true look, in several sizes and turns."""
    shape, look = SUBJECTS[name]
    choices = product(np.linspace(13, 21, 7), np.linspace(-0.45, 0.45, 11))
    return SpriteBank([Scene(shape, look, "", "", radius=radius, angle=angle) for radius, angle in choices])


# ------------------------------------------------------------------------------------------------------------
# Measures of pixels alone


def pixel_features(clip):
    """(T, H, W, 3) uint8 -> (T, H * W * 3): less the clip's mean colour, then of length 1 each."""
    frames = torch.from_numpy(clip).float()
    return F.normalize((frames - frames.mean(dim=(0, 1, 2))).flatten(1), dim=1)


def through_vae(base, pictures):
    """(N, H, W, 3) uint8 -> (N, H, W, 3) uint8, encoded and decoded by the base's VAE."""
    return base.decode(base.encode(pixels(pictures))[:, :, None])[:, 0].numpy()


def psnr(base, picture):
    """(H, W, 3) uint8 -> peak signal-to-noise ratio of the picture after the base's VAE, in dB."""
    error = picture.astype(float) - through_vae(base, picture[None])[0]
    return 10 * np.log10(255 ** 2 / np.mean(error ** 2))
