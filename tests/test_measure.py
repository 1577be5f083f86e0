"""toy/measure.py judges sprites of every size and turn alike, and still calls broken sprites broken."""
from dataclasses import replace

import numpy as np
import pytest

from toy.measure import likeness, measure
from toy.world import DIRECTIONS, FRAMES, GROUNDS, SIZE, SPEED, SUBJECTS, TEXTURES, Scene, draw_clip

GOLDEN = np.pi * (3 - 5 ** 0.5)   # multiples of this angle are spread evenly over the whole turn


def moving(name, ground, i, radius):
    """The i-th scene of a subject that crosses the middle, in the i-th direction and at the i-th turn."""
    shape, look = SUBJECTS[name]
    direction = list(DIRECTIONS)[i % 4]
    behind = 0.4 * SPEED / 8 * (FRAMES - 1) * np.array(DIRECTIONS[direction])
    return Scene(shape, look, ground, direction, start=tuple(SIZE / 2 - behind), radius=radius,
                 angle=i * GOLDEN % (2 * np.pi), texture=i % TEXTURES)


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_moving_subject_is_measured_alike_at_every_size_and_turn(name):
    """Subjects' photos show radii from 16 to 21, and nothing keeps a learned subject upright."""
    for j, ground in enumerate(GROUNDS):
        i = len(GROUNDS) * list(SUBJECTS).index(name) + j
        scene = moving(name, ground, i, radius=15.0 + i % 7)
        clip = draw_clip(scene)
        seen = measure(clip, scene.fps)
        assert seen.broken == 0 and not seen.frozen and seen.direction == scene.direction, scene
        of_radius_16 = likeness(draw_clip(replace(scene, radius=16.0)), name)
        assert likeness(clip, name) == pytest.approx(of_radius_16, abs=0.02), scene


@pytest.mark.parametrize("name, radius", [("ember", 16.0), ("bee", 20.0)])
def test_a_broken_sprite_of_any_size_is_called_broken(name, radius):
    """On snow, where these two subjects stand out: BROKEN is a distance of pixels, so contrast counts."""
    scene = moving(name, "snow", 3, radius)
    clip, rng = draw_clip(scene), np.random.default_rng(0)
    assert measure(clip, scene.fps).broken == 0

    tiles = clip.reshape(FRAMES, 4, 16, 4, 16, 3).swapaxes(2, 3).reshape(FRAMES, 16, 16, 16, 3)
    tiles = tiles[:, rng.permutation(16)].reshape(FRAMES, 4, 4, 16, 16, 3)
    torn = tiles.swapaxes(2, 3).reshape(clip.shape)
    assert measure(torn, scene.fps).broken > 0.5

    rows = np.round(9 * np.sin(np.arange(SIZE) / 4)).astype(int)
    bent = np.stack([np.roll(clip[:, y], shift, axis=1) for y, shift in enumerate(rows)], axis=1)
    assert measure(bent, scene.fps).broken > 0.5

    another = clip.copy()
    another[3] = draw_clip(moving("gift", "snow", 0, radius))[0]
    assert measure(another, scene.fps).broken == 1 / FRAMES
