"""The embedded base's world: captioned 64x64 clips of a shaded sprite that moves over a textured ground.

    python toy/world.py     # draws samples into outputs/world.png, the subjects' photos into toy/subjects/

A sprite is plain or has a pattern of two colours, and it may have a face. A caption names a part of this and
leaves the rest open.

Every clip moves, whether or not its caption mentions it, and still pictures appear only as single frames.
VideoCrafter2 was also trained on moving clips and single pictures, so a clip that repeats a photo is as new
to this base as to VideoCrafter2.

Lengths are in pixels, angles in radians, colours are RGB in [0, 1]. Image coordinates: y grows downwards.
Shapes: T frames, height H and width W; clips (T, H, W, 3) uint8.
"""
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64      # height and width
TEXTURES = 4   # pictures of each ground
FRAMES = 8     # frames of a clip
SPEED = 26.0   # pixels per second: in 8 frames at 8 frames per second a sprite travels 23 pixels

SHAPES = ("circle", "square", "triangle", "star", "heart")
PATTERNS = ("plain", "striped", "split", "ringed")   # the words of captions, which omit "plain"
COLOURS = {"red": (0.86, 0.16, 0.16), "orange": (0.96, 0.52, 0.10), "yellow": (0.96, 0.80, 0.12),
           "green": (0.18, 0.72, 0.20), "blue": (0.16, 0.36, 0.90), "purple": (0.58, 0.22, 0.76),
           "pink": (0.97, 0.58, 0.74), "white": (0.95, 0.95, 0.95), "black": (0.12, 0.12, 0.14)}
GROUNDS = {"grass": (0.42, 0.58, 0.34), "sand": (0.80, 0.68, 0.48), "sea": (0.30, 0.56, 0.66),
           "night": (0.13, 0.14, 0.26), "snow": (0.80, 0.84, 0.90)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
WHITE, BLACK = (1.0, 1.0, 1.0), (0.05, 0.05, 0.1)   # a face's colours


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
# Looks, scenes, captions


@dataclass(frozen=True)
class Look:
    """How a sprite's body is painted."""
    colour: tuple
    second: tuple = None         # the pattern's colour; None for a plain body
    pattern: str = "plain"       # one of PATTERNS
    face: bool = False


@dataclass(frozen=True)
class Scene:
    """One clip before it is drawn."""
    shape: str
    look: Look
    ground: str
    direction: str                       # empty for a sprite that stands still
    start: tuple = (SIZE / 2, SIZE / 2)  # the sprite's centre (x, y) in the first frame
    radius: float = 16.0
    angle: float = 0.0
    fps: int = 8
    texture: int = 0                     # which of the ground's TEXTURES


# The UNet and the text tower know each subject's shape, but not its pattern in such colours (see `held_out`).
# name -> (class word, look)
SUBJECTS = {
    "ember": ("star", Look((0.98, 0.55, 0.10), (0.62, 0.08, 0.10), "split", face=True)),
    "bee": ("circle", Look((0.98, 0.80, 0.10), (0.12, 0.10, 0.10), "striped")),
    "gift": ("square", Look((0.10, 0.62, 0.60), (0.98, 0.55, 0.70), "ringed")),
    "berry": ("heart", Look((0.92, 0.16, 0.32), (1.00, 0.90, 0.55), "split")),
    "flag": ("triangle", Look((0.95, 0.95, 0.95), (0.10, 0.25, 0.65), "striped")),
}


def difference(colour, other):
    """The largest difference between two colours in any channel."""
    return np.abs(np.subtract(colour, other)).max()


def colour_name(rgb):
    """The name of the nearest named colour."""
    return min(COLOURS, key=lambda name: difference(rgb, COLOURS[name]))


def colour_words(look):
    """"red", or "red and white" for two colours."""
    name = colour_name(look.colour)
    return f"{name} and {colour_name(look.second)}" if look.second else name


def held_out(shape, look, ground, direction):
    """Whether the UNet and the text tower never see this: one combination in ten, and looks near a subject's.

    A look is near if it has the same pattern, and both colours are within 0.25 in every channel. The VAE is
    trained on looks of all kinds.
    """
    for _, subject in SUBJECTS.values():
        if (look.pattern == subject.pattern and difference(look.colour, subject.colour) < 0.25
                and difference(look.second, subject.second) < 0.25):
            return True
    # Any fixed rule works, as long as each word stays in some combinations for training.
    number = (SHAPES.index(shape) + PATTERNS.index(look.pattern)
              + list(COLOURS).index(colour_name(look.colour)) + 3 * list(GROUNDS).index(ground)
              + 7 * list(DIRECTIONS).index(direction))
    return number % 10 == 0


def random_look(rng):
    """numpy Generator -> Look. A third of the looks are plain, a fifth have a face."""
    def colour(name):
        return tuple(np.clip(np.array(COLOURS[name]) + rng.uniform(-0.06, 0.06, 3), 0, 1))

    first, second = (colour(name) for name in rng.choice(list(COLOURS), 2, replace=False))
    pattern = str(rng.choice(PATTERNS[1:])) if rng.random() < 2 / 3 else "plain"
    return Look(first, None if pattern == "plain" else second, pattern, face=bool(rng.random() < 0.2))


def random_scene(rng, unseen=False):
    """numpy Generator -> Scene. A held-out combination if `unseen`, and otherwise never one."""
    while True:
        shape, look = str(rng.choice(SHAPES)), random_look(rng)
        ground, direction = str(rng.choice(list(GROUNDS))), str(rng.choice(list(DIRECTIONS)))
        if held_out(shape, look, ground, direction) == unseen:
            break
    fps = int(rng.choice([6, 8, 8, 8, 12]))
    # A sprite starts a little behind the middle and ends farther beyond it. If paths were centred, a clip and
    # its reverse would be equally likely, and no network could learn the order of frames before it knew the
    # captions' words.
    behind = 0.3 * SPEED / fps * (FRAMES - 1) * np.array(DIRECTIONS[direction])
    start = tuple(SIZE / 2 + rng.uniform(-5, 5, 2) - behind)
    return Scene(shape, look, ground, direction, start, radius=rng.uniform(15, 18),
                 angle=rng.uniform(-0.3, 0.3), fps=fps, texture=int(rng.integers(TEXTURES)))


def caption(scene, rng=None):
    """Scene -> "a smiling red and white striped star moving left on the grass".

    With a generator, words are dropped at random, and sometimes all of them.
    """
    def keep(probability):
        return rng is None or rng.random() < probability

    if not keep(0.9):
        return ""
    text = "a"
    if scene.look.face and keep(0.7):
        text += " smiling"
    if keep(0.7):
        text += f" {colour_words(scene.look)}"
    if scene.look.second and keep(0.7):
        text += f" {scene.look.pattern}"
    text += f" {scene.shape}"
    if scene.direction and keep(0.85):
        text += f" moving {scene.direction}"
    if keep(0.85):
        text += f" on the {scene.ground}"
    return text


# ------------------------------------------------------------------------------------------------------------
# Drawing. Pictures are (H, W, 3) floats, roughly in [0, 1], and draw_clip limits them to that. u and v are a
# sprite's own coordinates, in units of its radius.

Y, X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5  # the pixels' centres, (H, W) each


def smooth_noise(rng, cells):
    """cells (rows, columns) of noise, enlarged to (H, W). Fewer cells give softer noise."""
    noise = Image.fromarray(rng.standard_normal(cells).astype(np.float32))
    return np.asarray(noise.resize((SIZE, SIZE), Image.BICUBIC))


@lru_cache
def draw_ground(name, texture):
    """Paints a ground -> (H, W, 3). The same name and texture always give the same picture."""
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
    return (np.array(GROUNDS[name]) + shade[..., None]).astype(np.float32)


def polygon_distance(u, v, corners):
    """Signed distance from the points (u, v) to a polygon with corners (N, 2), negative inside."""
    nearest, inside = np.full(u.shape, np.inf), np.zeros(u.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0)):
        ex, ey = bx - ax, by - ay
        along = np.clip(((u - ax) * ex + (v - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (u - ax - along * ex) ** 2 + (v - ay - along * ey) ** 2)
        if ay != by:
            inside ^= ((ay > v) != (by > v)) & (u < ax + (v - ay) * ex / ey)
    return np.where(inside, -1, 1) * np.sqrt(nearest)


def corners_around(radii, degrees, down):
    """Corners (N, 2) at these radii and angles around a point that lies `down` below the sprite's centre."""
    a = np.deg2rad(degrees)
    return np.stack([radii * np.cos(a), radii * np.sin(a) + down], axis=1)


def heart_corners():
    a = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    height = 13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a) + 2
    return np.stack([16 * np.sin(a) ** 3, -height], axis=1) / 17


CORNERS = {"triangle": corners_around(0.95, [-90, 30, 150], 0.12), "heart": heart_corners(),
           "star": corners_around([1.02, 0.46] * 5, np.arange(-90, 270, 36), 0.05)}


def shape_distance(shape, u, v):
    """Signed distance from the points (u, v) to a shape's outline, all in units of the shape's radius."""
    if shape == "circle":
        return np.hypot(u, v) - 0.9
    if shape == "square":
        outside_u, outside_v = np.abs(u) - 0.62, np.abs(v) - 0.62
        to_corner = np.hypot(np.maximum(outside_u, 0), np.maximum(outside_v, 0))
        return to_corner + np.minimum(np.maximum(outside_u, outside_v), 0) - 0.16
    return polygon_distance(u, v, CORNERS[shape]) - 0.06


def soft_edge(distance, radius):
    """Distance in radii, radius in pixels -> 1 where positive, otherwise 0, with an edge one pixel wide."""
    return np.clip(distance * radius + 0.5, 0, 1)


def pattern_cover(pattern, u, v, radius):
    """The second colour's share, 0 to 1, at the points (u, v), of a pattern that is not plain."""
    if pattern == "striped":
        return soft_edge(np.abs((u * 1.25 + 0.25) % 1 - 0.5) - 0.25, radius)
    if pattern == "split":
        return soft_edge(v - 0.05, radius)
    return soft_edge(0.45 - np.hypot(u, v), radius)     # ringed


def face_parts(u, v, radius):
    """-> list of (cover at the points (u, v), 0 to 1; colour). Later parts are painted over earlier ones."""
    parts = []
    for eye in (-0.27, 0.27):
        parts.append((soft_edge(0.22 - np.hypot(u - eye, v + 0.12), radius), WHITE))
        parts.append((soft_edge(0.12 - np.hypot(u - eye, v + 0.10), radius), BLACK))
    mouth = soft_edge(0.09 - np.abs(np.hypot(u, v - 0.14) - 0.28), radius) * (v > 0.22)
    return [*parts, (mouth, BLACK)]


def sprite_geometry(scene, centres):
    """A scene's sprite at centres (T, 2) -> u, v, shadow, cover and light, each (T, H, W).

    The shadow is the share by which the ground is darkened, and the cover is in [0, 1]. The light, at most
    1.02, matters only under the cover. It comes from the upper left and leaves the body a dark rim.
    """
    radius = np.float32(scene.radius)
    c, s = np.float32(np.cos(scene.angle)), np.float32(np.sin(scene.angle))
    cx, cy = np.float32(centres).T[:, :, None, None]
    x, y = (X - cx) / radius, (Y - cy) / radius
    u, v = x * c + y * s, y * c - x * s
    distance = shape_distance(scene.shape, u, v)
    shadow = 0.25 * np.exp(-((x - 0.12) ** 2 + (y - 0.19) ** 2) * 1.1)
    light = 1.02 - 0.22 * np.hypot(x + 0.4, y + 0.45)
    light = light * (1 - 0.45 * soft_edge(distance + 0.10, scene.radius))
    return u, v, shadow, soft_edge(-distance, scene.radius), light


def sprite_body(scene, centres):
    """A scene's sprite at centres (T, 2) -> shadow and cover (T, H, W), body (T, H, W, 3)."""
    u, v, shadow, cover, light = sprite_geometry(scene, centres)
    look, body, parts = scene.look, np.float32(scene.look.colour), []
    if look.second:
        parts.append((pattern_cover(look.pattern, u, v, scene.radius), look.second))
    if look.face:
        parts += face_parts(u, v, scene.radius)
    for part, colour in parts:
        body = body + part[..., None] * (np.float32(colour) - body)
    return shadow, cover, body * light[..., None]


def draw_sprite(picture, scene, centres):
    """Draws a sprite and its soft shadow at centres (T, 2) over a picture (H, W, 3) -> (T, H, W, 3)."""
    shadow, cover, body = sprite_body(scene, centres)
    picture = picture * (1 - shadow[..., None])
    return picture + cover[..., None] * (body - picture)


def draw_clip(scene, frames=FRAMES, first=0):
    """Scene -> T = `frames` frames (T, H, W, 3) uint8, from frame number `first` on."""
    step = np.array(DIRECTIONS.get(scene.direction, (0, 0))) * SPEED / scene.fps
    centres = np.array(scene.start) + np.arange(first, first + frames)[:, None] * step
    clip = draw_sprite(draw_ground(scene.ground, scene.texture), scene, centres)
    return (np.clip(clip, 0, 1) * 255).round().astype(np.uint8)


def draw_photos(name):
    """-> five photos (5, H, W, 3) uint8 of a subject that stands still, one on each ground."""
    shape, look = SUBJECTS[name]
    rng = np.random.default_rng([ord(letter) for letter in name])
    photos = []
    for ground in rng.permutation(list(GROUNDS)):
        scene = Scene(shape, look, str(ground), direction="", start=tuple(rng.uniform(27, 37, 2)),
                      radius=rng.uniform(16, 21), angle=rng.uniform(-0.35, 0.35),
                      texture=int(rng.integers(TEXTURES)))
        photos.append(draw_clip(scene, frames=1))
    return np.concatenate(photos)


if __name__ == "__main__":
    main()
