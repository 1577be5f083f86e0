"""Measures a clip of the world from its pixels, by finding the drawing that explains them best.

The ground is the one of the world's that most pixels agree with. The sprite is found in two stages: a bank of
sprites in many shapes, patterns, sizes and turns is tried at many places, and then `fit` moves, sizes and
turns the best few until their drawings come nearest to the pixels. The bank ranks sprites by their gain,
which is how much nearer to the pixels a sprite at p is than the ground without it:

    gain(p) = sum_x m(x - p) [ (I(x) - G(x))^2 - (I(x) - S(x - p))^2 ]

with image I, ground G, sprite S and its cover m, which is 0 where a face may be. S = c_1 w_1 + c_2 w_2, where
the weights w_i hold the sprite's light and pattern. The colours c are given, or else chosen to maximise the
gain (up to RIDGE), which is a least-squares problem of two unknowns in each colour channel:

    gain(p) = sum_x m [ (I - G)^2 - I^2 ] + 2 b c - c A c
    b_i = sum_x m w_i I        A_ij = sum_x m w_i w_j        c = (A + RIDGE)^-1 b

Shapes: T frames, N sprites of a bank; clips (T, H, W, 3). A bank works on pictures shrunk to H / 2 rows and
W / 2 columns. A patch is the K = k * k pixels around one of M places. Lengths are in pixels.
"""
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from model import pixels
from toy.world import (DIRECTIONS, GROUNDS, PATTERNS, SHAPES, SIZE, SPEED, SUBJECTS, TEXTURES, WHITE, Look,
                       Scene, X, Y, colour_name, colour_words, draw_ground, draw_sprite, face_parts,
                       pattern_cover, sprite_body, sprite_geometry)

BROKEN = 17.0     # dB: a frame is broken if its PSNR against the clip's drawing is lower
FROZEN = 0.25     # a clip is frozen if its sprite travels less than this share of the world's distance
UNIFORM = 3.0     # a direction counts only if the track's RMS distance from uniform motion is smaller
AGREES = 0.08     # a ground is named only if the pixels' median difference from it, in [0, 1], is smaller
UPRIGHT = 0.45    # radians: the world's sprites are turned by less, those of learned subjects by any angle
RIDGE = 0.5       # added to A's diagonal, so a colour that hardly shows is taken as nearly black
STEPS = 3         # Gauss-Newton steps of a fit
SHRINK = 2        # a bank's pictures are this many times smaller
REACH = 12        # shrunk pixels: half a patch's side k, enough for a sprite of radius 21
COARSE = 2        # shrunk pixels between neighbouring places of the first search
NEAR = 3          # shrunk pixels: how far around the first search's result the second search goes


@dataclass(frozen=True)
class Measured:
    """The measures of a clip. A word is empty if the clip does not show such a thing clearly."""
    shape: str
    pattern: str
    colour: str          # one word, or two with "and"
    ground: str
    direction: str
    distance: float      # travelled on a straight line fitted to the track, relative to the world's own clips
    frozen: bool         # whether the distance is too short, see FROZEN
    broken: float        # share of frames that differ too much from the clip's drawing, see BROKEN
    colour_drift: float  # mean change of the fitted colours between two frames; black to white would be 1
    shape_drift: float   # mean share of two neighbouring outlines' area that only one of them covers


def measure(clip, fps):
    """clip (T, H, W, 3) uint8 with T >= 2, its frames per second -> Measured.

    One sprite explains the whole clip, but its colours are fitted in each frame. If half of the frames or
    more are broken, then shape, pattern, colour and direction are empty.
    """
    clip = clip / 255
    ground_name, ground = find_ground(clip)
    scene, track, colours, outlines = find_sprite(clip, ground)
    first, second = np.clip(colours.mean(0), 0, 1)
    look = Look(tuple(first), tuple(second), scene.look.pattern)
    if colour_name(first) == colour_name(second):   # plain: a pattern's colours have different names
        look, colours = Look(tuple(first)), colours[:, :1]

    # Compare each frame with the best drawing, with a face or without.
    errors = []
    for face in (False, True):
        drawn = draw_sprite(ground, replace(scene, look=replace(look, face=face)), track)
        errors.append(((drawn - clip) ** 2).mean(axis=(1, 2, 3)))
    broken = -10 * np.log10(np.min(errors, axis=0)) < BROKEN
    intact = broken.mean() < 0.5

    # Lay the outlines of neighbouring frames over one another.
    intersection = torch.minimum(outlines[1:], outlines[:-1]).sum((1, 2))
    union = torch.maximum(outlines[1:], outlines[:-1]).sum((1, 2))

    # Fit a straight line to the track.
    time = np.arange(len(clip)) - (len(clip) - 1) / 2
    velocity = (time[:, None] * track).sum(0) / (time ** 2).sum()
    deviation = np.sqrt(((track - track.mean(0) - time[:, None] * velocity) ** 2).sum(1).mean())
    distance = float(np.hypot(*velocity) * fps / SPEED)
    frozen = distance < FROZEN
    moves = intact and not frozen and deviation < UNIFORM
    direction = max(DIRECTIONS, key=lambda name: velocity @ DIRECTIONS[name])

    return Measured(shape=scene.shape if intact else "", pattern=look.pattern if intact else "",
                    colour=colour_words(look) if intact else "", ground=ground_name,
                    direction=direction if moves else "", distance=distance, frozen=frozen,
                    broken=float(broken.mean()), colour_drift=float(np.abs(np.diff(colours, axis=0)).mean()),
                    shape_drift=float(1 - (intersection / union).mean()))


def likeness(clip, name):
    """How much of a subject a clip (T, H, W, 3) uint8 shows: 1 for its true look, about 0 for none of it.

    A frame's score is that of its best match over position, size and turn. It is 0 if the frame is no nearer
    to the subject there than the bare ground is.
    """
    bank, look, clip = subject_sprites(name), SUBJECTS[name][1], clip / 255
    _, ground = find_ground(clip)
    terms, colours = gain_terms(clip, ground), np.array([look.colour, look.second])
    gains, _ = bank.search(terms, colours)
    best = int(gains.sum(1).argmax())
    gains, places = bank.search(terms, colours, first=[best])
    # A star turned by one point looks much the same, so a frame's sprite should suit the other frames too.
    best_by_frame = (gains + gains.mean(1, keepdim=True)).argmax(0)
    scores = []
    for t, n in enumerate(best_by_frame):
        scene, place, _, _ = fit(clip[t:t + 1], ground, bank.scenes[n], places[n, t:t + 1], colours)
        _, cover, body = sprite_body(replace(scene, look=look), place)
        error = (cover[..., None] * (clip[t] - body) ** 2).sum()
        error_of_ground = (cover[..., None] * (ground - body) ** 2).sum()
        scores.append(max(0.0, 1 - error / error_of_ground))
    return float(np.mean(scores))


def find_ground(clip):
    """clip (T, H, W, 3) in [0, 1] -> name, ground (H, W, 3). The name is empty if too few pixels agree."""
    places = list(product(GROUNDS, range(TEXTURES)))
    grounds = [draw_ground(*place) for place in places]
    some = clip[:, ::2, ::2]  # a quarter of the pixels is enough
    differences = [np.median(np.abs(some - ground[::2, ::2]).mean(-1)) for ground in grounds]
    nearest = int(np.argmin(differences))
    return (places[nearest][0] if differences[nearest] < AGREES else ""), grounds[nearest]


# ------------------------------------------------------------------------------------------------------------
# Finding the sprite


def find_sprite(clip, ground):
    """The sprite that best explains a clip (T, H, W, 3) in [0, 1] -> scene, track (T, 2), colours (T, 2, 3).

    Also returns outlines (T, k, k), those of the sprite in the bank that fits each frame best on its own. So
    even the world's own clips have some shape drift.
    """
    bank, terms = all_sprites(), gain_terms(clip, ground)
    gains, places = bank.search(terms)
    total = gains.sum(1)
    upright = torch.tensor([abs(scene.angle) < UPRIGHT for scene in bank.scenes])

    # Sprites of different shapes can look alike once turned, so fit the best few before choosing one.
    fits = []
    for group in (upright, ~upright):
        best = {}   # shape, pattern -> number of the best sprite, which comes last
        for n in total.argsort().tolist():
            if group[n]:
                best[bank.scenes[n].shape, bank.scenes[n].look.pattern] = n
        for n in sorted(best.values(), key=lambda n: total[n])[-3:]:
            # Search for this sprite everywhere, because the bank searched only where others fit.
            own_gain, own_place = bank.search(terms, first=[n], then=[n])
            track = np.where((own_gain[0] > gains[n])[:, None], own_place[0], places[n])
            scene, _, _, error = fit(clip[::3], ground, bank.scenes[n], track[::3])   # a third suffices
            fits.append((error, scene, track, group))
    _, scene, track, group = min(fits, key=lambda result: result[0])
    scene, track, colours, _ = fit(clip, ground, scene, track)
    return scene, track, colours, bank.cover[gains.masked_fill(~group[:, None], -torch.inf).argmax(0)]


def fit(clip, ground, scene, track, colours=None):
    """Moves, sizes and turns a scene's sprite until its drawing comes nearest to a clip (T, H, W, 3).

    The clip is in [0, 1], and track (T, 2) is the start. Size and turn are the same in all frames. Colours
    (2, 3) are given or, if None, fitted in each frame (T, 2, 3). Pixels where a face may be do not count.
    Returns scene, track, colours and the squared error per pixel.
    """
    T = len(clip)
    for step in range(STEPS + 1):
        shadow, cover, valid, weights = sprite_parts(scene, track)
        behind = ((1 - cover) * (1 - shadow))[..., None] * ground
        w = (cover * weights).reshape(2, T, -1).transpose(1, 2, 0)                      # (T, H*W, 2)
        c = colours
        if colours is None:
            w_t = (valid.reshape(T, -1, 1) * w).transpose(0, 2, 1)
            c = np.linalg.solve(w_t @ w + RIDGE * np.eye(2), w_t @ (clip - behind).reshape(T, -1, 3))
        drawn = behind + (w @ c).reshape(clip.shape)
        residual = valid[..., None] * (clip - drawn)
        if step == STEPS:
            return scene, track, c, (residual ** 2).sum() / valid.sum()

        # J is how the drawing changes if the sprite moves right, moves down, grows or turns, each by a pixel.
        # All of these shift the sprite's pixels over the ground, so J follows from the gradient.
        dy, dx = np.gradient(drawn - ground, axis=(1, 2))
        x, y = (X - track[:, 0, None, None])[..., None], (Y - track[:, 1, None, None])[..., None]
        r = scene.radius
        J = -np.stack([dx, dy, (dx * x + dy * y) / r, (dy * x - dx * y) / r], -1).reshape(T, -1, 4)
        J_t = J.transpose(0, 2, 1)
        change = np.linalg.solve(J_t @ J + 1e-3 * np.eye(4), J_t @ residual.reshape(T, -1, 1))[..., 0]
        change = change.clip(-1, 1)                                                     # (T, 4), pixels
        growth, turn = np.median(change[:, 2:], axis=0)
        track = track + change[:, :2]
        scene = replace(scene, radius=r + growth, angle=scene.angle + turn / r)


def sprite_parts(scene, centres):
    """A sprite at centres (T, 2) -> shadow, cover, valid (T, H, W); weights (2, T, H, W) of its colours."""
    u, v, shadow, cover, light = sprite_geometry(scene, centres)
    second = pattern_cover(scene.look.pattern, u, v, scene.radius)
    valid = sum(part for part, _ in face_parts(u, v, scene.radius)) == 0    # false where a face may be
    return shadow, cover, valid.astype(np.float32), np.stack([light * (1 - second), light * second])


class SpriteBank:
    """Sprites to search for, each (shape, pattern, radius, angle). Every `step`-th is tried everywhere."""

    def __init__(self, sprites, step):
        self.few = slice(None, None, step)
        self.scenes = [Scene(shape, Look(WHITE, WHITE, pattern), "", "", radius=radius, angle=float(angle))
                       for shape, pattern, radius, angle in sprites]
        inner = slice(SIZE // 2 - SHRINK * REACH, SIZE // 2 + SHRINK * REACH)
        parts = []
        for scene in self.scenes:
            _, cover, valid, weights = sprite_parts(scene, [(SIZE / 2, SIZE / 2)])
            parts.append(np.concatenate([cover, valid * cover, *(valid * cover * weights)])[:, inner, inner])
        parts = F.avg_pool2d(torch.from_numpy(np.stack(parts)).float(), SHRINK)
        self.cover = parts[:, 0]                                                        # (N, k, k)
        self.m, mw_1, mw_2 = parts[:, 1:].flatten(2).unbind(1)                          # (N, K) each
        self.mw = torch.stack([mw_1, mw_2], 1)                                          # (N, 2, K)
        self.mww = torch.stack([mw_1 ** 2, mw_1 * mw_2, mw_2 ** 2], 1) / self.m[:, None].clamp(min=1e-6)

    def search(self, terms, colours=None, first=None, then=slice(None)):
        """terms, see `gain_terms` -> gains (N, T) and centres (x, y), (N, T, 2), of the sprites `then`.

        The sprites `first`, by default every `step`-th, are tried everywhere. The sprites `then`, by default
        all, are tried only near the median place of the best nine of `first` in each frame.
        """
        padded, everywhere = terms
        gain = self.gain(everywhere, colours, first or self.few)
        best = gain.amax(2).sum(1).argsort(descending=True)[:9]
        centres = COARSE * places_of(gain[best].argmax(2), SIZE // SHRINK // COARSE + 1).median(0).values
        corners = centres.clamp(NEAR, SIZE // SHRINK - NEAR) - NEAR                     # (T, 2)
        side = 2 * (REACH + NEAR)
        near = [frame[:, y:y + side, x:x + side] for frame, (x, y) in zip(padded, corners.tolist())]
        gains, index = self.gain(cut_patches(torch.stack(near), 1), colours, then).max(2)
        return gains, (SHRINK * (corners + places_of(index, 2 * NEAR + 1))).double().numpy()

    def gain(self, patches, colours, chosen):
        """patches (5, K, T, M) of `gain_terms` -> gains (N, T, M) of the chosen sprites."""
        if_black, image, inside = patches.flatten(2).split((1, 3, 1))
        m, mw, mww = self.m[chosen], self.mw[chosen], self.mww[chosen]
        black_gain = m @ if_black[0]                                                    # (N, T*M)
        b = (mw.flatten(0, 1) @ image).unflatten(1, (-1, 2))                            # (3, N, 2, T*M)
        a = (mww.flatten(0, 1) @ inside[0]).unflatten(0, (-1, 3))                       # (N, 3, T*M)
        b_1, b_2, a_11, a_12, a_22 = *b.unbind(2), *a.unbind(1)
        if colours is None:
            r_11, r_22 = a_11 + RIDGE, a_22 + RIDGE
            det = r_11 * r_22 - a_12 ** 2
            c_1, c_2 = (r_22 * b_1 - a_12 * b_2) / det, (r_11 * b_2 - a_12 * b_1) / det
        else:
            c_1, c_2 = torch.tensor(colours, dtype=torch.float32).view(2, 3, 1, 1)
        colour_gain = 2 * (b_1 * c_1 + b_2 * c_2) - c_1 ** 2 * a_11 - 2 * c_1 * c_2 * a_12 - c_2 ** 2 * a_22
        return (black_gain + colour_gain.sum(0)).unflatten(1, patches.shape[2:])


def gain_terms(clip, ground):
    """clip (T, H, W, 3), ground (H, W, 3), in [0, 1] -> pictures (T, 5, H/2 + k, W/2 + k), coarse patches.

    The channels are (I - G)^2 - I^2, the gain of black; I; and ones. Zeros pad them for sprites at borders.
    """
    I, G = (F.avg_pool2d(torch.tensor(x).float().movedim(-1, -3), SHRINK) for x in (clip, ground))
    if_black = ((I - G) ** 2 - I ** 2).sum(1, keepdim=True)
    padded = F.pad(torch.cat([if_black, I, torch.ones_like(if_black)], 1), (REACH,) * 4)
    return padded, cut_patches(padded, COARSE)


def cut_patches(pictures, stride):
    """(T, 5, rows, columns) -> (5, K, T, M), the patches at every stride-th place."""
    T = len(pictures)
    patches = F.unfold(pictures.flatten(0, 1)[:, None], 2 * REACH, stride=stride)       # (T*5, K, M)
    return patches.unflatten(0, (T, 5)).permute(1, 2, 0, 3).contiguous()


def places_of(index, columns):
    """Indices of places, counted row by row -> (..., 2), the places (x, y)."""
    return torch.stack([index % columns, index // columns], -1)


@lru_cache
def all_sprites():
    """The bank of all shapes and patterns. The angles of nearly upright sprites are closer together."""
    # A plain sprite needs no entry, because any pattern in two equal colours is plain. Circles and squares
    # need angles of half a turn only, because the other half can at most swap the two colours.
    upright, turned = np.linspace(-0.36, 0.36, 7), np.arange(0.54, 5.8, 0.25)
    sprites = []
    for shape, pattern, radius in product(SHAPES, PATTERNS[1:], (15.5, 17.5, 20)):
        whole = np.pi if shape in ("circle", "square") else 2 * np.pi
        for angle in (*upright, *turned[turned < whole - UPRIGHT]):
            sprites.append((shape, pattern, radius, angle))
    return SpriteBank(sprites, step=7)


@lru_cache
def subject_sprites(name):
    """The bank of one subject's shape and pattern."""
    shape, look = SUBJECTS[name]
    return SpriteBank(product([shape], [look.pattern], (14, 16, 18, 20), np.arange(48) * np.pi / 24), step=3)


# ------------------------------------------------------------------------------------------------------------
# Measures of pixels alone


def pixel_features(clip):
    """(T, H, W, 3) uint8 -> (T, H * W * 3): each frame less the clip's mean colour, scaled to length 1."""
    frames = torch.from_numpy(clip).float()
    return F.normalize((frames - frames.mean(dim=(0, 1, 2))).flatten(1), dim=1)


def through_vae(base, pictures):
    """(N, H, W, 3) uint8 -> (N, H, W, 3) uint8, encoded and decoded by the base's VAE."""
    return base.decode(base.encode(pixels(pictures))[:, :, None])[:, 0].numpy()


def psnr(base, picture):
    """(H, W, 3) uint8 -> peak signal-to-noise ratio of the picture after the base's VAE, in dB."""
    error = picture.astype(float) - through_vae(base, picture[None])[0]
    return 10 * np.log10(255 ** 2 / np.mean(error ** 2))
