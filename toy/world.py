"""The embedded base's world: 64x64 clips of one shaded sprite that moves over a textured ground, and their captions.

    python toy/world.py            # draws samples into outputs/world.png, and the subjects' photos into toy/subjects/

Every clip moves, whether or not its caption says so; what stands still appears as single frames only. That is what
VideoCrafter2 was trained on (moving clips and single pictures), and it is why photos repeated into still clips are news
to either base.
"""
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

SIZE = 64      # pixels, height and width
TEXTURES = 4   # different places of each ground
SPEED = 26.0   # pixels a second; at the default 8 frames a second a clip of 8 frames travels 23 pixels

SHAPES = ("circle", "square", "triangle", "star", "heart")
COLOURS = {"red": (0.86, 0.16, 0.16), "yellow": (0.96, 0.80, 0.12), "green": (0.18, 0.72, 0.20),
           "blue": (0.16, 0.36, 0.90), "purple": (0.58, 0.22, 0.76), "white": (0.95, 0.95, 0.95)}
GROUNDS = {"grass": (0.42, 0.58, 0.34), "sand": (0.80, 0.68, 0.48), "sea": (0.30, 0.56, 0.66),
           "night": (0.13, 0.14, 0.26), "snow": (0.80, 0.84, 0.90)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # image coordinates: y grows downwards


@dataclass(frozen=True)
class Look:
    """How a sprite's body is painted. The base's training sees plain looks only."""
    colour: tuple                # RGB in [0, 1]
    second: tuple = None         # a second RGB, where there is a pattern
    pattern: str = "plain"       # "plain", "stripes", "dots", "halves", "core"
    face: bool = False


@dataclass(frozen=True)
class Scene:
    """One clip before it is drawn. Positions and lengths in pixels, angles in radians."""
    shape: str
    look: Look
    ground: str
    direction: str
    colour: str = ""             # the colour's name, for the caption; empty for a look that has none
    start: tuple = (32.0, 32.0)  # the sprite's centre in the first frame
    radius: float = 16.0
    angle: float = 0.0
    fps: int = 8
    texture: int = 0             # which of the ground's TEXTURES


def held_out(shape, colour, ground, direction):
    """One combination in ten is never trained on."""
    number = (SHAPES.index(shape) + list(COLOURS).index(colour) + 3 * list(GROUNDS).index(ground)
              + 7 * list(DIRECTIONS).index(direction))
    return number % 10 == 0


def random_scene(rng, frames=8, unseen=False):
    """numpy Generator -> Scene; combinations held out from training only if `unseen`."""
    while True:
        shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
        ground, direction = rng.choice(list(GROUNDS)), rng.choice(list(DIRECTIONS))
        if held_out(shape, colour, ground, direction) == unseen:
            break
    fps = int(rng.choice([6, 8, 8, 8, 12]))
    rgb = np.clip(np.array(COLOURS[colour]) + rng.uniform(-0.04, 0.04, 3), 0, 1)
    return Scene(shape, Look(tuple(rgb)), ground, direction, colour, start=random_start(rng, direction, fps, frames),
                 radius=rng.uniform(15, 18), angle=rng.uniform(-0.3, 0.3), fps=fps, texture=int(rng.integers(TEXTURES)))


def random_start(rng, direction, fps, frames):
    """Somewhat behind the middle, so that a sprite crosses it and heads out.

    As in filmed clips, the first frame and the last are then not alike. Were every path centred, a clip played backwards
    would be as likely as the clip, and no network would learn the order of frames before it knew what the words mean.
    """
    travel = SPEED / fps * (frames - 1)
    return tuple(SIZE / 2 + rng.uniform(-5, 5, 2) - 0.3 * travel * np.array(DIRECTIONS[direction]))


def caption(scene, rng=None):
    """Scene -> "a red star moving left on the grass"; with a generator, words drop out at random, sometimes all of them."""
    keep = (lambda p: rng.random() < p) if rng else (lambda p: True)
    if not keep(0.9):
        return ""
    words = ["a"]
    if scene.colour and keep(0.7):
        words.append(scene.colour)
    words.append(scene.shape)
    if scene.direction and keep(0.85):
        words += ["moving", scene.direction]
    if keep(0.85):
        words += ["on the", scene.ground]
    return " ".join(words)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing. Images are (64, 64, 3) float in [0, 1] until the end.

Y, X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64) + 0.5


def smooth_noise(rng, cells):
    """cells (rows, columns) of noise, enlarged to (64, 64): the fewer cells, the softer."""
    return np.asarray(Image.fromarray(rng.standard_normal(cells).astype(np.float32)).resize((SIZE, SIZE), Image.BICUBIC))


@lru_cache
def draw_ground(name, texture):
    rng = np.random.default_rng((list(GROUNDS).index(name), texture))
    shade = 0.035 * smooth_noise(rng, (5, 5)) + 0.05 * (Y / SIZE - 0.5)
    if name == "grass":
        shade = shade + 0.035 * smooth_noise(rng, (10, 28))
    elif name == "sand":
        shade = shade + 0.025 * np.sin(Y / 2.6 + 1.6 * smooth_noise(rng, (3, 3)) + rng.uniform(0, 6))
    elif name == "sea":
        shade = shade + 0.045 * np.sin(Y / 3.4 + 0.5 * np.sin(X / 7 + rng.uniform(0, 6)) + rng.uniform(0, 6))
    elif name == "night":
        for x, y in rng.uniform(3, SIZE - 3, (7, 2)):
            shade = shade + 0.35 * np.exp(-((X - x) ** 2 + (Y - y) ** 2) / 1.1)
    return np.array(GROUNDS[name]) + shade[..., None]


def polygon_distance(u, v, corners):
    """Signed distance of the points (u, v) to a polygon, negative inside."""
    nearest, inside = np.full(u.shape, np.inf), np.zeros(u.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0)):
        ex, ey = bx - ax, by - ay
        along = np.clip(((u - ax) * ex + (v - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (u - ax - along * ex) ** 2 + (v - ay - along * ey) ** 2)
        if ay != by:
            inside ^= ((ay > v) != (by > v)) & (u < ax + (v - ay) * ex / ey)
    return np.where(inside, -1, 1) * np.sqrt(nearest)


def _corners(shape):
    if shape == "triangle":
        a = np.deg2rad([-90, 30, 150])
        return np.stack([0.95 * np.cos(a), 0.95 * np.sin(a) + 0.12], 1)
    if shape == "star":
        a = np.deg2rad(np.arange(10) * 36 - 90)
        r = np.where(np.arange(10) % 2, 0.46, 1.02)
        return np.stack([r * np.cos(a), r * np.sin(a) + 0.05], 1)
    a = np.linspace(0, 2 * np.pi, 32, endpoint=False)  # heart
    return np.stack([16 * np.sin(a) ** 3, -(13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)) - 2], 1) / 17


CORNERS = {shape: _corners(shape) for shape in ("triangle", "star", "heart")}


def shape_distance(shape, u, v):
    """Signed distance to a shape's outline, in units of its radius."""
    if shape == "circle":
        return np.hypot(u, v) - 0.9
    if shape == "square":
        qu, qv = np.abs(u) - 0.62, np.abs(v) - 0.62
        return np.hypot(np.maximum(qu, 0), np.maximum(qv, 0)) + np.minimum(np.maximum(qu, qv), 0) - 0.16
    return polygon_distance(u, v, CORNERS[shape]) - 0.06


def paint(look, u, v, radius):
    """The body's colour at the points (u, v) -> (64, 64, 3)."""
    def edge(d):  # 1 where d > 0, with a soft edge one pixel wide
        return np.clip(d * radius + 0.5, 0, 1)

    if look.pattern == "stripes":
        second = edge(np.abs((u * 1.25 + 0.25) % 1 - 0.5) - 0.25)
    elif look.pattern == "dots":
        second = edge(0.24 - np.hypot((u + 0.35) % 0.7 - 0.35, (v + 0.35) % 0.7 - 0.35))
    elif look.pattern == "halves":
        second = edge(v - 0.05)
    elif look.pattern == "core":
        second = edge(0.45 - np.hypot(u, v))
    else:
        second = np.zeros_like(u)
    body = np.array(look.colour) + second[..., None] * (np.array(look.second or look.colour) - look.colour)
    if look.face:
        for eye in (-0.27, 0.27):
            body = body + edge(0.22 - np.hypot(u - eye, v + 0.12))[..., None] * (np.array((1.0, 1.0, 1.0)) - body)
            body = body + edge(0.12 - np.hypot(u - eye, v + 0.10))[..., None] * (np.array((0.05, 0.05, 0.1)) - body)
        mouth = edge(0.09 - np.abs(np.hypot(u, v - 0.14) - 0.28)) * (v > 0.22)
        body = body + mouth[..., None] * (np.array((0.05, 0.05, 0.1)) - body)
    return body


def sprite_layers(scene, centre):
    """What a sprite adds to a picture: shadow (64, 64), cover (64, 64), both in [0, 1], and body (64, 64, 3).

    The body has a dark rim and is lit from the upper left.
    """
    cx, cy = centre
    c, s = math.cos(scene.angle), math.sin(scene.angle)
    u, v = ((X - cx) * c + (Y - cy) * s) / scene.radius, ((Y - cy) * c - (X - cx) * s) / scene.radius
    distance = shape_distance(scene.shape, u, v)
    shadow = np.exp(-(((X - cx - 2) / scene.radius) ** 2 + ((Y - cy - 3) / scene.radius) ** 2) * 1.1)
    light = 1.02 - 0.22 * np.hypot(X - cx + 0.4 * scene.radius, Y - cy + 0.45 * scene.radius) / scene.radius
    rim = np.clip((distance + 0.10) * scene.radius + 0.5, 0, 1)
    body = paint(scene.look, u, v, scene.radius) * (light * (1 - 0.45 * rim))[..., None]
    return shadow, np.clip(0.5 - distance * scene.radius, 0, 1), body


def draw_sprite(image, scene, centre):
    """The sprite and its soft shadow over an image (64, 64, 3)."""
    shadow, cover, body = sprite_layers(scene, centre)
    image = image * (1 - 0.25 * shadow[..., None])
    return image + cover[..., None] * (body - image)


def draw_clip(scene, frames=8, first=0):
    """Scene -> (T, 64, 64, 3) uint8, from frame number `first` on. Without a direction the sprite stays where it starts."""
    ground = draw_ground(scene.ground, scene.texture)
    step = np.array(DIRECTIONS.get(scene.direction, (0, 0))) * SPEED / scene.fps
    clip = [draw_sprite(ground, scene, np.array(scene.start) + i * step) for i in range(first, first + frames)]
    return (np.clip(clip, 0, 1) * 255).round().astype(np.uint8)


def random_look(rng):
    """Any look at all, for the VAE, which like the real one has to code pictures that the UNet never saw."""
    rgb = lambda: tuple(rng.uniform(0.05, 1, 3))
    return Look(rgb(), rgb(), str(rng.choice(["plain", "stripes", "dots", "halves", "core"])), bool(rng.random() < 0.4))


# ---------------------------------------------------------------------------------------------------------------------
# Subjects: sprites of a known shape with a look that the base has never seen. name -> (class word, look)

SUBJECTS = {
    "ember": ("star", Look((0.98, 0.55, 0.10), (0.62, 0.08, 0.10), "halves", face=True)),
    "bee": ("circle", Look((0.98, 0.80, 0.10), (0.12, 0.10, 0.10), "stripes", face=False)),
    "gift": ("square", Look((0.10, 0.62, 0.60), (0.98, 0.55, 0.70), "core")),
    "berry": ("heart", Look((0.92, 0.16, 0.32), (1.00, 0.90, 0.55), "halves")),
    "flag": ("triangle", Look((0.95, 0.95, 0.95), (0.10, 0.25, 0.65), "stripes")),
}


def draw_photos(name, count=5):
    """A subject's photos, (N, 64, 64, 3) uint8: standing still, on several grounds, in several poses and sizes."""
    shape, look = SUBJECTS[name]
    rng = np.random.default_rng([ord(c) for c in name])
    grounds = rng.permutation(list(GROUNDS))
    return np.concatenate([draw_clip(Scene(
        shape, look, str(grounds[i % len(grounds)]), "", start=tuple(rng.uniform(27, 37, 2)), radius=rng.uniform(16, 21),
        angle=rng.uniform(-0.35, 0.35), texture=int(rng.integers(TEXTURES))), 1) for i in range(count)])

# ---------------------------------------------------------------------------------------------------------------------
# Measuring clips from their pixels, by finding the drawing that explains them best.
#
# The ground is the painted one that most pixels agree with. Then every sprite of a bank (shape, colour, angle, size) is
# tried at every position of every frame; what it explains is how much nearer to the pixels it is than the bare ground:
#     gain(p) = sum_x m(x - p) [ (I(x) - G(x))^2 - (I(x) - S(x - p))^2 ]
# with image I, ground G, sprite S and its cover m. Written out, these are correlations, so FFTs do all positions at once.


@dataclass(frozen=True)
class Measured:
    """What a clip shows. A name is empty where the clip shows none."""
    shape: str
    colour: str
    ground: str
    direction: str
    distance: float     # pixels travelled from the first frame to the last, along a straight line fitted to the track
    frozen: bool        # travelled less than a quarter of what the world's sprites travel
    broken: float       # share of frames that no drawing comes near: PSNR of the best one below BROKEN
    track: np.ndarray   # (T, 2), the sprite's centre (x, y) in pixels


BROKEN = 17.0     # dB
STRAIGHT = 3.0    # pixels, root mean square, that a track may be off its straight line
REACH = 16        # half pixels; so far from the middle may a sprite's centre lie, which is up to the edge


class SpriteBank:
    """Sprites to look for: scenes whose place does not matter. Half resolution keeps the search fast."""

    def __init__(self, scenes):
        self.scenes = scenes
        layers = [sprite_layers(scene, (SIZE / 2, SIZE / 2)) for scene in scenes]
        m = torch.tensor(np.stack([cover for _, cover, _ in layers]), dtype=torch.float32)[:, None]
        body = torch.tensor(np.stack([body for _, _, body in layers]), dtype=torch.float32).permute(0, 3, 1, 2)
        m, body = F.avg_pool2d(m, 2), F.avg_pool2d(m * body, 2) / F.avg_pool2d(m, 2).clamp(min=1e-6)
        # gain = m * A + 2 (m S) * I - (m S^2) * 1, with * a correlation and A = (I - G)^2 - I^2
        terms = torch.cat([m, 2 * m * body, -m * (body ** 2).sum(1, keepdim=True)], dim=1)
        terms = torch.roll(F.pad(terms, (0, REACH, 0, REACH)), (-REACH, -REACH), dims=(2, 3))
        self.terms = torch.fft.rfft2(terms).conj()                                                  # (N, 5, 48, 25)

    def search(self, clip, ground):
        """clip (T, 64, 64, 3), ground (64, 64, 3) -> gains (N, T), track (N, T, 2) of every sprite's best centres."""
        image, bare = (F.avg_pool2d(torch.tensor(x, dtype=torch.float32).permute(0, 3, 1, 2), 2) for x in (clip, ground[None]))
        a = ((image - bare) ** 2 - image ** 2).sum(1, keepdim=True)
        frames = torch.fft.rfft2(F.pad(torch.cat([a, image, torch.ones_like(a)], dim=1), (0, REACH, 0, REACH)))
        gain = torch.fft.irfft2(torch.einsum("ncyx,tcyx->ntyx", self.terms, frames))[:, :, :2 * REACH + 1, :2 * REACH + 1]
        best, where = gain.flatten(2).max(2)
        y, x = where // (2 * REACH + 1), where % (2 * REACH + 1)
        track = torch.stack([x + vertex(gain, y, x, 3), y + vertex(gain, y, x, 2)], -1)
        return best, SIZE / 2 + 2 * (track - REACH)


def vertex(gain, y, x, axis):
    """Where the parabola through a maximum and its two neighbours on an axis peaks, relative to the maximum."""
    n, t = torch.meshgrid(*map(torch.arange, y.shape), indexing="ij")
    at = [n, t, y, x]
    left, right = list(at), list(at)
    left[axis], right[axis] = (at[axis] - 1).clamp(min=0), (at[axis] + 1).clamp(max=gain.shape[axis] - 1)
    left, middle, right = (gain[tuple(index)] for index in (left, at, right))
    return (0.5 * (left - right) / (left - 2 * middle + right).clamp(max=-1e-6)).clamp(-0.5, 0.5)


@lru_cache
def plain_sprites():
    """The bank of every shape and colour of the world."""
    return SpriteBank([Scene(shape, Look(rgb), "", "", colour, radius=radius, angle=angle)
                       for shape in SHAPES for colour, rgb in COLOURS.items()
                       for radius in (14.5, 16.5, 18.5) for angle in (-0.26, -0.13, 0, 0.13, 0.26)])


@lru_cache
def subject_sprites(name):
    """The bank of one subject's true look, at several sizes and turns."""
    shape, look = SUBJECTS[name]
    return SpriteBank([Scene(shape, look, "", "", radius=radius, angle=angle) for radius in (13, 15, 17, 19, 21)
                       for angle in (-0.45, -0.3, -0.15, 0, 0.15, 0.3, 0.45)])


@lru_cache
def class_or_subject(name):
    """The bank of what may be in a customised clip: the subject, or any plain sprite of its class."""
    shape = SUBJECTS[name][0]
    return SpriteBank([s for s in plain_sprites().scenes if s.shape == shape] + subject_sprites(name).scenes)


def likeness(clip, name):
    """How much of what sets the subject off from the bare ground a clip shows: 1 for its true look, about 0 for none of it.

    clip (T, 64, 64, 3) uint8. Every frame counts by its best match over place, size and turn; a look as far from the
    subject as the ground is scores 0, and so does a farther one.
    """
    bank, clip = subject_sprites(name), clip / 255
    _, ground = find_ground(clip)
    gains, tracks = bank.search(clip, ground)
    scores = []
    for t, best in enumerate(gains.argmax(0).tolist()):
        _, cover, body = sprite_layers(bank.scenes[best], tracks[best, t].tolist())
        off, bare = ((cover[..., None] * (picture - body) ** 2).sum() for picture in (clip[t], ground))
        scores.append(max(0.0, 1 - off / bare))
    return float(np.mean(scores))


def find_ground(clip):
    """clip (T, 64, 64, 3) in [0, 1] -> (name, painted ground (64, 64, 3)); the name is empty if few pixels agree with any."""
    candidates = [(name, draw_ground(name, texture)) for name in GROUNDS for texture in range(TEXTURES)]
    off = [np.median(np.abs(clip - ground).mean(-1)) for _, ground in candidates]
    name, ground = candidates[int(np.argmin(off))]
    return (name if min(off) < 0.08 else ""), ground


def measure(clip, fps, bank=None):
    """clip (T, 64, 64, 3) uint8 -> Measured. `bank` is what may be in it, by default the world's plain sprites."""
    bank, clip = bank or plain_sprites(), clip / 255
    name, ground = find_ground(clip)
    gains, tracks = bank.search(clip, ground)
    best = int(gains.sum(1).argmax())
    scene, track = bank.scenes[best], tracks[best].numpy().astype(np.float64)
    drawn = np.stack([draw_sprite(ground, scene, centre) for centre in track])
    broken = -10 * np.log10(((drawn - clip) ** 2).mean(axis=(1, 2, 3))) < BROKEN
    time = np.arange(len(clip)) - (len(clip) - 1) / 2
    slope = (time[:, None] * track).sum(0) / (time ** 2).sum()
    off_line = np.sqrt(((track - track.mean(0) - time[:, None] * slope) ** 2).sum(1).mean())
    distance = float(np.hypot(*slope) * (len(clip) - 1))
    frozen = distance < 0.25 * SPEED / fps * (len(clip) - 1)
    direction = max(DIRECTIONS, key=lambda d: slope @ DIRECTIONS[d])
    seen = broken.mean() < 0.5
    return Measured(shape=scene.shape if seen else "", colour=scene.colour if seen else "", ground=name,
                    direction=direction if seen and not frozen and off_line < STRAIGHT else "", distance=distance,
                    frozen=bool(frozen), broken=float(broken.mean()), track=track)


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    rows = [np.concatenate(draw_clip(random_scene(rng)), axis=1) for _ in range(12)]
    out = Path("outputs/world.png")
    out.parent.mkdir(exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(out)
    print(out)
    for name in SUBJECTS:
        folder = Path(__file__).parent / "subjects" / name
        folder.mkdir(parents=True, exist_ok=True)
        for i, photo in enumerate(draw_photos(name)):
            Image.fromarray(photo).save(folder / f"{i:02d}.png")
        print(folder)
