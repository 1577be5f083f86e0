"""The embedded base's world: 64x64 clips of one shaded sprite that moves over a textured ground; captions.

    python toy/world.py     # draws samples into outputs/world.png, the subjects' photos into toy/subjects/

Every clip moves, whether or not its caption says so. A picture that stands still appears as a single frame
only. VideoCrafter2 too was trained on moving clips and single pictures. So clips that repeat a photo are new
to both bases.

Lengths are in pixels, angles in radians, colours are RGB in [0, 1]. Image coordinates: y grows downwards.
"""
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64      # height and width
TEXTURES = 4   # different places of each ground
SPEED = 26.0   # pixels per second: in 8 frames at 8 frames per second a sprite travels 23 pixels

SHAPES = ("circle", "square", "triangle", "star", "heart")
COLOURS = {"red": (0.86, 0.16, 0.16), "yellow": (0.96, 0.80, 0.12), "green": (0.18, 0.72, 0.20),
           "blue": (0.16, 0.36, 0.90), "purple": (0.58, 0.22, 0.76), "white": (0.95, 0.95, 0.95)}
GROUNDS = {"grass": (0.42, 0.58, 0.34), "sand": (0.80, 0.68, 0.48), "sea": (0.30, 0.56, 0.66),
           "night": (0.13, 0.14, 0.26), "snow": (0.80, 0.84, 0.90)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
PATTERNS = ("plain", "stripes", "dots", "halves", "core")
WHITE, BLACK = np.array((1.0, 1.0, 1.0)), np.array((0.05, 0.05, 0.1))  # of a face


def main():
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


# ------------------------------------------------------------------------------------------------------------
# Scenes and captions


@dataclass(frozen=True)
class Look:
    """How a sprite's body is painted. The UNet's training sees plain looks only."""
    colour: tuple
    second: tuple = None         # the second colour of a pattern
    pattern: str = "plain"       # one of PATTERNS
    face: bool = False


@dataclass(frozen=True)
class Scene:
    """One clip before it is drawn."""
    shape: str
    look: Look
    ground: str
    direction: str               # empty for a sprite that stands still
    colour: str = ""             # the colour's name, for the caption; empty for a look without such a name
    start: tuple = (32.0, 32.0)  # the sprite's centre (x, y) in the first frame
    radius: float = 16.0
    angle: float = 0.0
    fps: int = 8
    texture: int = 0             # which of the ground's TEXTURES


def held_out(shape, colour, ground, direction):
    """Whether training never sees this combination: one combination in ten."""
    number = (SHAPES.index(shape) + list(COLOURS).index(colour) + 3 * list(GROUNDS).index(ground)
              + 7 * list(DIRECTIONS).index(direction))
    return number % 10 == 0


def random_scene(rng, frames=8, unseen=False):
    """numpy Generator -> Scene. With `unseen` all scenes are held-out combinations, without it none is."""
    while True:
        shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
        ground, direction = rng.choice(list(GROUNDS)), rng.choice(list(DIRECTIONS))
        if held_out(shape, colour, ground, direction) == unseen:
            break
    fps = int(rng.choice([6, 8, 8, 8, 12]))
    rgb = np.clip(np.array(COLOURS[colour]) + rng.uniform(-0.04, 0.04, 3), 0, 1)
    start = random_start(rng, direction, fps, frames)
    return Scene(shape, Look(tuple(rgb)), ground, direction, colour, start, radius=rng.uniform(15, 18),
                 angle=rng.uniform(-0.3, 0.3), fps=fps, texture=int(rng.integers(TEXTURES)))


def random_start(rng, direction, fps, frames):
    """(x, y) somewhat behind the middle: the sprite crosses the middle and heads out.

    So the first frame and the last differ, as in filmed clips. If every path were centred, a clip played
    backwards would be as likely as the clip itself. Then no network would learn the order of frames before
    it knew the captions' words.
    """
    travel = SPEED / fps * (frames - 1)
    return tuple(SIZE / 2 + rng.uniform(-5, 5, 2) - 0.3 * travel * np.array(DIRECTIONS[direction]))


def random_look(rng):
    """Any look at all, for the VAE. Like VideoCrafter2's VAE it has to code pictures new to the UNet."""
    colour, second = tuple(rng.uniform(0.05, 1, 3)), tuple(rng.uniform(0.05, 1, 3))
    return Look(colour, second, str(rng.choice(PATTERNS)), bool(rng.random() < 0.4))


def caption(scene, rng=None):
    """Scene -> "a red star moving left on the grass". With a generator words drop out, even all of them."""
    def kept(probability):
        return rng is None or rng.random() < probability

    if not kept(0.9):
        return ""
    text = "a"
    if scene.colour and kept(0.7):
        text += f" {scene.colour}"
    text += f" {scene.shape}"
    if scene.direction and kept(0.85):
        text += f" moving {scene.direction}"
    if kept(0.85):
        text += f" on the {scene.ground}"
    return text


# ------------------------------------------------------------------------------------------------------------
# Drawing. Pictures are (64, 64, 3) float in [0, 1] until the end.

Y, X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64) + 0.5  # the pixels' centres, (64, 64) each


def smooth_noise(rng, cells):
    """cells (rows, columns) of noise, enlarged to (64, 64). Fewer cells give softer noise."""
    noise = Image.fromarray(rng.standard_normal(cells).astype(np.float32))
    return np.asarray(noise.resize((SIZE, SIZE), Image.BICUBIC))


@lru_cache
def draw_ground(name, texture):
    """-> (64, 64, 3), the same for the same name and texture."""
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
    """Signed distance of the points (u, v) to a polygon with corners (N, 2), negative inside."""
    nearest, inside = np.full(u.shape, np.inf), np.zeros(u.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0)):
        ex, ey = bx - ax, by - ay
        along = np.clip(((u - ax) * ex + (v - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (u - ax - along * ex) ** 2 + (v - ay - along * ey) ** 2)
        if ay != by:
            inside ^= ((ay > v) != (by > v)) & (u < ax + (v - ay) * ex / ey)
    return np.where(inside, -1, 1) * np.sqrt(nearest)


def triangle_corners():
    a = np.deg2rad([-90, 30, 150])
    return np.stack([0.95 * np.cos(a), 0.95 * np.sin(a) + 0.12], axis=1)


def star_corners():
    a = np.deg2rad(np.arange(10) * 36 - 90)
    r = np.where(np.arange(10) % 2, 0.46, 1.02)
    return np.stack([r * np.cos(a), r * np.sin(a) + 0.05], axis=1)


def heart_corners():
    a = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    height = 13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)
    return np.stack([16 * np.sin(a) ** 3, -height - 2], axis=1) / 17


CORNERS = {"triangle": triangle_corners(), "star": star_corners(), "heart": heart_corners()}


def shape_distance(shape, u, v):
    """Signed distance of the points (u, v) to a shape's outline, all in units of the shape's radius."""
    if shape == "circle":
        return np.hypot(u, v) - 0.9
    if shape == "square":
        outside_u, outside_v = np.abs(u) - 0.62, np.abs(v) - 0.62
        to_corner = np.hypot(np.maximum(outside_u, 0), np.maximum(outside_v, 0))
        return to_corner + np.minimum(np.maximum(outside_u, outside_v), 0) - 0.16
    return polygon_distance(u, v, CORNERS[shape]) - 0.06


def paint(look, u, v, radius):
    """The body's colour (64, 64, 3) at the points (u, v), which are in units of the radius."""
    def soft(distance):
        """1 where the distance is positive, with a soft edge one pixel wide."""
        return np.clip(distance * radius + 0.5, 0, 1)

    if look.pattern == "stripes":
        second = soft(np.abs((u * 1.25 + 0.25) % 1 - 0.5) - 0.25)
    elif look.pattern == "dots":
        second = soft(0.24 - np.hypot((u + 0.35) % 0.7 - 0.35, (v + 0.35) % 0.7 - 0.35))
    elif look.pattern == "halves":
        second = soft(v - 0.05)
    elif look.pattern == "core":
        second = soft(0.45 - np.hypot(u, v))
    else:
        second = np.zeros_like(u)
    body = np.array(look.colour) + second[..., None] * (np.array(look.second or look.colour) - look.colour)
    if look.face:
        for eye in (-0.27, 0.27):
            body = body + soft(0.22 - np.hypot(u - eye, v + 0.12))[..., None] * (WHITE - body)
            body = body + soft(0.12 - np.hypot(u - eye, v + 0.10))[..., None] * (BLACK - body)
        mouth = soft(0.09 - np.abs(np.hypot(u, v - 0.14) - 0.28)) * (v > 0.22)
        body = body + mouth[..., None] * (BLACK - body)
    return body


def sprite_layers(scene, centre):
    """The sprite at `centre` (x, y): shadow (64, 64) and cover (64, 64) in [0, 1], and body (64, 64, 3).

    The body has a dark rim. Light comes from the upper left.
    """
    cx, cy = centre
    c, s = math.cos(scene.angle), math.sin(scene.angle)
    u = ((X - cx) * c + (Y - cy) * s) / scene.radius
    v = ((Y - cy) * c - (X - cx) * s) / scene.radius
    distance = shape_distance(scene.shape, u, v)
    shadow = np.exp(-(((X - cx - 2) / scene.radius) ** 2 + ((Y - cy - 3) / scene.radius) ** 2) * 1.1)
    to_light = np.hypot(X - cx + 0.4 * scene.radius, Y - cy + 0.45 * scene.radius)
    light = 1.02 - 0.22 * to_light / scene.radius
    rim = np.clip((distance + 0.10) * scene.radius + 0.5, 0, 1)
    body = paint(scene.look, u, v, scene.radius) * (light * (1 - 0.45 * rim))[..., None]
    return shadow, np.clip(0.5 - distance * scene.radius, 0, 1), body


def draw_sprite(picture, scene, centre):
    """The sprite and its soft shadow over a picture (64, 64, 3) -> (64, 64, 3)."""
    shadow, cover, body = sprite_layers(scene, centre)
    picture = picture * (1 - 0.25 * shadow[..., None])
    return picture + cover[..., None] * (body - picture)


def draw_clip(scene, frames=8, first=0):
    """Scene -> T = `frames` frames (T, 64, 64, 3) uint8, from frame number `first` on."""
    ground = draw_ground(scene.ground, scene.texture)
    step = np.array(DIRECTIONS.get(scene.direction, (0, 0))) * SPEED / scene.fps
    centres = [np.array(scene.start) + i * step for i in range(first, first + frames)]
    clip = [draw_sprite(ground, scene, centre) for centre in centres]
    return (np.clip(clip, 0, 1) * 255).round().astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------
# Subjects: sprites of a known shape, with a look that the base has never seen. name -> (class word, look)

SUBJECTS = {
    "ember": ("star", Look((0.98, 0.55, 0.10), (0.62, 0.08, 0.10), "halves", face=True)),
    "bee": ("circle", Look((0.98, 0.80, 0.10), (0.12, 0.10, 0.10), "stripes")),
    "gift": ("square", Look((0.10, 0.62, 0.60), (0.98, 0.55, 0.70), "core")),
    "berry": ("heart", Look((0.92, 0.16, 0.32), (1.00, 0.90, 0.55), "halves")),
    "flag": ("triangle", Look((0.95, 0.95, 0.95), (0.10, 0.25, 0.65), "stripes")),
}


def draw_photos(name, count=5):
    """N = `count` photos (N, 64, 64, 3) uint8 of a subject that stands still, on several grounds."""
    shape, look = SUBJECTS[name]
    rng = np.random.default_rng([ord(letter) for letter in name])
    grounds = rng.permutation(list(GROUNDS))
    photos = []
    for i in range(count):
        ground, start = str(grounds[i % len(grounds)]), tuple(rng.uniform(27, 37, 2))
        scene = Scene(shape, look, ground, direction="", start=start, radius=rng.uniform(16, 21),
                      angle=rng.uniform(-0.35, 0.35), texture=int(rng.integers(TEXTURES)))
        photos.append(draw_clip(scene, frames=1))
    return np.concatenate(photos)


if __name__ == "__main__":
    main()
