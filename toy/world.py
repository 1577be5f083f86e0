"""The embedded base's world: clips of one shaded sprite that moves over a textured ground, and their captions.

    python toy/world.py            # draws samples into outputs/world.png, and the subjects' photos into toy/subjects/

A sprite is plain or has a pattern of two colours, with or without a smiling face, in a named colour or any other. A
caption tells some of that and leaves the rest open. Every clip moves, whether or not its caption says so; what stands
still appears as single frames only. That is what VideoCrafter2 was trained on (moving clips and single pictures), and
it is why photos repeated into still clips are news to either base.

Shapes: T frames, H W pixels; clips (T, H, W, 3) uint8. What measures such clips is in measure.py.
"""
import colorsys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 128     # pixels, height and width
TEXTURES = 4   # different places of each ground
SPEED = 52.0   # pixels a second; at the default 8 frames a second a clip of 8 frames travels 46 pixels

SHAPES = ("circle", "square", "triangle", "star", "heart")
PATTERNS = ("plain", "striped", "spotted", "split", "ringed")  # as captions say it, but nobody says "plain"
COLOURS = {"red": (0.86, 0.16, 0.16), "yellow": (0.96, 0.80, 0.12), "green": (0.18, 0.72, 0.20),
           "blue": (0.16, 0.36, 0.90), "purple": (0.58, 0.22, 0.76), "white": (0.95, 0.95, 0.95)}
GROUNDS = {"grass": (0.42, 0.58, 0.34), "sand": (0.80, 0.68, 0.48), "sea": (0.30, 0.56, 0.66),
           "night": (0.13, 0.14, 0.26), "snow": (0.80, 0.84, 0.90)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # image coordinates: y grows downwards


@dataclass(frozen=True)
class Look:
    """How a sprite's body is painted."""
    colour: tuple                # RGB in [0, 1]
    second: tuple = None         # the pattern's RGB; None for a plain body
    pattern: str = "plain"
    face: bool = False


@dataclass(frozen=True)
class Scene:
    """One clip before it is drawn. Positions and lengths in pixels, angles in radians."""
    shape: str
    look: Look
    ground: str
    direction: str
    start: tuple = (SIZE / 2, SIZE / 2)  # the sprite's centre in the first frame
    radius: float = 32.0
    angle: float = 0.0
    fps: int = 8
    texture: int = 0                     # which of the ground's TEXTURES


# Sprites whose shape the base knows, and whose pattern in these two colours it never sees. name -> (class word, look)
SUBJECTS = {
    "ember": ("star", Look((0.98, 0.55, 0.10), (0.62, 0.08, 0.10), "split", face=True)),
    "bee": ("circle", Look((0.98, 0.80, 0.10), (0.12, 0.10, 0.10), "striped")),
    "gift": ("square", Look((0.10, 0.62, 0.60), (0.98, 0.55, 0.70), "ringed")),
    "berry": ("heart", Look((0.92, 0.16, 0.32), (1.00, 0.90, 0.55), "split")),
    "flag": ("triangle", Look((0.95, 0.95, 0.95), (0.10, 0.25, 0.65), "striped")),
}


# ---------------------------------------------------------------------------------------------------------------------
# Scenes and captions


def colour_name(rgb):
    """The name of an RGB colour, or "" where no named colour is near."""
    away = {name: np.abs(np.subtract(rgb, named)).max() for name, named in COLOURS.items()}
    name = min(away, key=away.get)
    return name if away[name] < 0.12 else ""


def held_out(shape, look, ground, direction):
    """One combination in ten is never trained on; and no look that is near a subject's."""
    for _, subject in SUBJECTS.values():
        pairs = (look.colour, subject.colour), (look.second or look.colour, subject.second)
        if look.pattern == subject.pattern and all(np.abs(np.subtract(*pair)).max() < 0.25 for pair in pairs):
            return True
    colour = [*COLOURS, ""].index(colour_name(look.colour))
    number = (SHAPES.index(shape) + colour + PATTERNS.index(look.pattern) + 3 * list(GROUNDS).index(ground)
              + 7 * list(DIRECTIONS).index(direction))
    return number % 10 == 0


def random_colour(rng):
    """Half of the time near a named colour, else of any hue."""
    if rng.random() < 0.5:
        return tuple(np.clip(np.array(COLOURS[rng.choice(list(COLOURS))]) + rng.uniform(-0.04, 0.04, 3), 0, 1))
    return colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.3, 0.95), rng.uniform(0.45, 1))


def random_look(rng):
    """A third of the looks are plain; the two colours of a pattern can be told apart."""
    colour, pattern = random_colour(rng), "plain"
    if rng.random() < 2 / 3:
        pattern = str(rng.choice(PATTERNS[1:]))
    second = random_colour(rng) if rng.random() < 0.8 else tuple(np.full(3, rng.uniform(0.05, 0.2)))  # some are black
    while np.abs(np.subtract(colour, second)).max() < 0.35:
        second = random_colour(rng)
    return Look(colour, None if pattern == "plain" else second, pattern, face=bool(rng.random() < 0.25))


def random_scene(rng, frames=8, unseen=False):
    """numpy Generator -> Scene; combinations held out from training only if `unseen`."""
    while True:
        shape, look = str(rng.choice(SHAPES)), random_look(rng)
        ground, direction = str(rng.choice(list(GROUNDS))), str(rng.choice(list(DIRECTIONS)))
        if held_out(shape, look, ground, direction) == unseen:
            break
    fps = int(rng.choice([6, 8, 8, 8, 12]))
    return Scene(shape, look, ground, direction, random_start(rng, direction, fps, frames), radius=rng.uniform(30, 36),
                 angle=rng.uniform(-0.3, 0.3), fps=fps, texture=int(rng.integers(TEXTURES)))


def random_start(rng, direction, fps, frames):
    """Somewhat behind the middle, so that a sprite crosses it and heads out.

    As in filmed clips, the first frame and the last are then not alike. Were every path centred, a clip played backwards
    would be as likely as the clip, and no network would learn the order of frames before it knew what the words mean.
    """
    travel = SPEED / fps * (frames - 1)
    return tuple(SIZE / 2 + rng.uniform(-10, 10, 2) - 0.3 * travel * np.array(DIRECTIONS[direction]))


def caption(scene, rng=None):
    """Scene -> "a red striped star moving left on the grass", as far as its looks have names.

    With a generator, words are left out at random, sometimes all of them.
    """
    keep = (lambda p: rng.random() < p) if rng else (lambda p: True)
    if not keep(0.9):
        return ""
    words, colour = ["a"], colour_name(scene.look.colour)
    if scene.look.face and keep(0.5):
        words.append("smiling")
    if colour and keep(0.6):
        words.append(colour)
    if scene.look.pattern != "plain" and keep(0.5):
        words.append(scene.look.pattern)
    words.append(scene.shape)
    if scene.direction and keep(0.85):
        words += ["moving", scene.direction]
    if keep(0.85):
        words += ["on the", scene.ground]
    return " ".join(words)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing. Images are (T, H, W, 3) float in [0, 1] until the end; u and v are a sprite's own coordinates, its radius long.

Y, X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + 0.5


def smooth_noise(rng, cells):
    """cells (rows, columns) of noise, enlarged to (H, W): the fewer cells, the softer."""
    noise = Image.fromarray(rng.standard_normal(cells).astype(np.float32))
    return np.asarray(noise.resize((SIZE, SIZE), Image.BICUBIC))


@lru_cache
def draw_ground(name, texture):
    """-> (H, W, 3)"""
    rng = np.random.default_rng((list(GROUNDS).index(name), texture))
    shade = 0.035 * smooth_noise(rng, (5, 5)) + 0.05 * (Y / SIZE - 0.5)
    if name == "grass":
        shade = shade + 0.035 * smooth_noise(rng, (10, 28))
    elif name == "sand":
        shade = shade + 0.025 * np.sin(Y / 5.2 + 1.6 * smooth_noise(rng, (3, 3)) + rng.uniform(0, 6))
    elif name == "sea":
        shade = shade + 0.045 * np.sin(Y / 6.8 + 0.5 * np.sin(X / 14 + rng.uniform(0, 6)) + rng.uniform(0, 6))
    elif name == "night":
        for x, y in rng.uniform(6, SIZE - 6, (7, 2)):
            shade = shade + 0.35 * np.exp(-((X - x) ** 2 + (Y - y) ** 2) / 4.4)
    return (np.array(GROUNDS[name]) + shade[..., None]).astype(np.float32)


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


def corners(shape):
    if shape == "triangle":
        a = np.deg2rad([-90, 30, 150])
        return np.stack([0.95 * np.cos(a), 0.95 * np.sin(a) + 0.12], 1)
    if shape == "star":
        a = np.deg2rad(np.arange(10) * 36 - 90)
        r = np.where(np.arange(10) % 2, 0.46, 1.02)
        return np.stack([r * np.cos(a), r * np.sin(a) + 0.05], 1)
    a = np.linspace(0, 2 * np.pi, 32, endpoint=False)  # heart
    height = 13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a) + 2
    return np.stack([16 * np.sin(a) ** 3, -height], 1) / 17


TABLE = 2.0, 400  # distances to polygons are read from tables over [-2, 2], of so many cells


@lru_cache
def distance_table(shape):
    reach, cells = TABLE
    v, u = np.mgrid[0:cells + 1, 0:cells + 1] * (2 * reach / cells) - reach
    return polygon_distance(u, v, corners(shape)).astype(np.float32) - 0.06


def shape_distance(shape, u, v):
    """Signed distance to a shape's outline, in units of its radius."""
    if shape == "circle":
        return np.hypot(u, v) - 0.9
    if shape == "square":
        qu, qv = np.abs(u) - 0.62, np.abs(v) - 0.62
        return np.hypot(np.maximum(qu, 0), np.maximum(qv, 0)) + np.minimum(np.maximum(qu, qv), 0) - 0.16
    reach, cells = TABLE
    x, y = (np.clip((w + reach) * (cells / (2 * reach)), 0, cells - 1e-3) for w in (u, v))
    i, j = y.astype(np.int32), x.astype(np.int32)
    x, y, table = x - j, y - i, distance_table(shape)
    above = table[i, j] * (1 - x) + table[i, j + 1] * x
    return above * (1 - y) + (table[i + 1, j] * (1 - x) + table[i + 1, j + 1] * x) * y


def soft_edge(distance, radius):
    """1 where distance > 0, 0 elsewhere, with an edge one pixel wide."""
    return np.clip(distance * radius + 0.5, 0, 1)


def pattern_cover(pattern, u, v, radius):
    """Where the second colour is: 0 to 1 at the points (u, v)."""
    if pattern == "striped":
        return soft_edge(np.abs((u * 1.25 + 0.25) % 1 - 0.5) - 0.25, radius)
    if pattern == "spotted":
        return soft_edge(0.24 - np.hypot((u + 0.35) % 0.7 - 0.35, (v + 0.35) % 0.7 - 0.35), radius)
    if pattern == "split":
        return soft_edge(v - 0.05, radius)
    if pattern == "ringed":
        return soft_edge(0.45 - np.hypot(u, v), radius)
    return np.zeros_like(u)


def face_parts(u, v, radius):
    """Eyes and mouth: pairs of a cover, 0 to 1 at the points (u, v), and its colour; later parts lie over earlier ones."""
    white, black = (1.0, 1.0, 1.0), (0.05, 0.05, 0.1)
    for eye in (-0.27, 0.27):
        yield soft_edge(0.22 - np.hypot(u - eye, v + 0.12), radius), white
        yield soft_edge(0.12 - np.hypot(u - eye, v + 0.10), radius), black
    yield soft_edge(0.09 - np.abs(np.hypot(u, v - 0.14) - 0.28), radius) * (v > 0.22), black


def paint(look, u, v, radius):
    """The body's colour at the points (u, v) -> (..., 3)."""
    body = np.broadcast_to(np.float32(look.colour), (*u.shape, 3))
    parts = [(pattern_cover(look.pattern, u, v, radius), look.second)] if look.second else []
    if look.face:
        parts += face_parts(u, v, radius)
    for cover, colour in parts:
        body = body + cover[..., None] * (np.float32(colour) - body)
    return body


def sprite_geometry(shape, radius, angle, centres):
    """Centres (T, 2) -> own coordinates u, v, and shadow, cover, light, each (T, H, W); all but u and v in [0, 1].

    A body is lit from the upper left and has a dark rim.
    """
    cx, cy = np.float32(centres).T[:, :, None, None]
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    x, y = (X - cx) / np.float32(radius), (Y - cy) / np.float32(radius)
    u, v = x * c + y * s, y * c - x * s
    distance = shape_distance(shape, u, v)
    shadow = np.exp(-((x - 0.12) ** 2 + (y - 0.19) ** 2) * 1.1)
    light = 1.02 - 0.22 * np.hypot(x + 0.4, y + 0.45)
    light = light * (1 - 0.45 * soft_edge(distance + 0.10, radius))
    return u, v, shadow, soft_edge(-distance, radius), light


def draw_sprite(image, scene, centres):
    """The sprite and its soft shadow at centres (T, 2) over an image (H, W, 3) -> (T, H, W, 3) float."""
    u, v, shadow, cover, light = sprite_geometry(scene.shape, scene.radius, scene.angle, centres)
    body = paint(scene.look, u, v, scene.radius) * light[..., None]
    image = image * (1 - 0.25 * shadow[..., None])
    return image + cover[..., None] * (body - image)


def centres_of(scene, frames, first=0):
    """A scene -> the sprite's centre in every frame, (T, 2). Without a direction the sprite stays where it starts."""
    step = np.array(DIRECTIONS.get(scene.direction, (0, 0))) * SPEED / scene.fps
    return np.array(scene.start) + np.arange(first, first + frames)[:, None] * step


def draw_clip(scene, frames=8, first=0):
    """Scene -> (T, H, W, 3) uint8, from frame number `first` on."""
    clip = draw_sprite(draw_ground(scene.ground, scene.texture), scene, centres_of(scene, frames, first))
    return (np.clip(clip, 0, 1) * 255).round().astype(np.uint8)


def draw_photos(name, count=5):
    """A subject's photos, (N, H, W, 3) uint8: standing still, on several grounds, in several poses and sizes."""
    shape, look = SUBJECTS[name]
    rng = np.random.default_rng([ord(c) for c in name])
    grounds = rng.permutation(list(GROUNDS))
    return np.concatenate([draw_clip(Scene(
        shape, look, str(grounds[i % len(grounds)]), "", start=tuple(rng.uniform(54, 74, 2)), radius=rng.uniform(32, 42),
        angle=rng.uniform(-0.35, 0.35), texture=int(rng.integers(TEXTURES))), 1) for i in range(count)])


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
