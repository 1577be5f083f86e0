"""The embedded base: its world is as described, its weights are trained, the README's first command works."""
import itertools
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cli import BadInput
from files import load_base, load_subject
from makers import ROOT, random_subject, run
from model import Tokenizer, pixels
from paper.evaluate import consistency
from toy import experiment
from toy.experiment import OPPOSITE, Table, against, draw_scenes
from toy.measure import measure, pixel_features
from toy.world import (COLOURS, DIRECTIONS, GROUNDS, SHAPES, SPEED, SUBJECTS, caption, draw_clip, draw_photos,
                       held_out, random_scene)

# ------------------------------------------------------------------------------------------------------------
# The world


def test_every_clip_moves_as_its_caption_says():
    rng = np.random.default_rng(0)
    for _ in range(40):
        scene = random_scene(rng)
        clip = draw_clip(scene).astype(float)
        assert clip.shape == (8, 64, 64, 3)
        assert all(np.abs(a - b).mean() > 0.5 for a, b in zip(clip, clip[1:]))
        said = f"a {scene.colour} {scene.shape} moving {scene.direction} on the {scene.ground}"
        assert caption(scene) == said

        # The first frame, moved as far and in the direction that the scene says, is about the last frame.
        dx, dy = np.array(DIRECTIONS[scene.direction]) * round(SPEED / scene.fps * 7)
        moved = lambda dx, dy: np.abs(np.roll(clip[0], (dy, dx), (0, 1)) - clip[-1])[8:-8, 8:-8].mean()
        assert moved(dx, dy) < min(moved(-dx, -dy), moved(0, 0))


def is_held_out(scene):
    return held_out(scene.shape, scene.colour, scene.ground, scene.direction)


def test_held_out_combinations_are_a_tenth_and_never_drawn():
    combinations = itertools.product(SHAPES, COLOURS, GROUNDS, DIRECTIONS)
    share = np.mean([held_out(*combination) for combination in combinations])
    assert 0.08 < share < 0.12
    rng = np.random.default_rng(1)
    assert not any(is_held_out(random_scene(rng)) for _ in range(300))
    assert all(is_held_out(random_scene(rng, unseen=True)) for _ in range(30))


def test_captions_drop_words():
    rng = np.random.default_rng(2)
    scene = random_scene(rng)
    captions = {caption(scene, rng) for _ in range(200)}
    assert "" in captions and f"a {scene.shape}" in captions and caption(scene) in captions
    assert len(captions) == 9


@pytest.mark.parametrize("name", SUBJECTS)
def test_committed_photos_are_what_the_script_draws(name):
    files = sorted((ROOT / "toy" / "subjects" / name).glob("*.png"))
    assert len(files) == 5
    for file, photo in zip(files, draw_photos(name)):
        assert np.abs(np.asarray(Image.open(file)).astype(int) - photo).max() <= 1


# ------------------------------------------------------------------------------------------------------------
# The measures


def test_measures_know_the_answer_of_drawn_clips():
    rng = np.random.default_rng(3)
    scenes = [random_scene(rng, unseen=i % 2 == 0) for i in range(100)]
    seen = [measure(draw_clip(scene), scene.fps) for scene in scenes]
    for name in ("shape", "colour", "ground", "direction"):
        right = [getattr(found, name) == getattr(scene, name) for found, scene in zip(seen, scenes)]
        assert np.mean(right) >= 0.99, name
    assert all(found.broken == 0 and not found.frozen for found in seen)
    expected = [SPEED / scene.fps * 7 for scene in scenes]
    assert np.allclose([found.distance for found in seen], expected, rtol=0.05)


def test_measures_fail_on_noise_and_on_frozen_and_shuffled_clips():
    rng = np.random.default_rng(4)
    noise = measure(rng.integers(0, 256, (8, 64, 64, 3)).astype(np.uint8), 8)
    assert (noise.shape, noise.colour, noise.ground, noise.direction, noise.broken) == ("", "", "", "", 1.0)
    for _ in range(5):
        scene = random_scene(rng)
        clip = draw_clip(scene)
        frozen = measure(clip[[3] * 8], scene.fps)
        assert frozen.frozen and frozen.direction == "" and frozen.shape == scene.shape
        shuffled = measure(clip[[5, 1, 7, 0, 3, 6, 2, 4]], scene.fps)
        assert shuffled.direction == "" and shuffled.ground == scene.ground
        one_bad = clip.copy()
        one_bad[2] = rng.integers(0, 256, clip[2].shape)
        assert measure(one_bad, scene.fps).broken == 1 / 8


def test_consistency_of_pixels_is_one_for_a_frozen_clip():
    clip = draw_clip(random_scene(np.random.default_rng(5)))
    frozen, shuffled = clip[[3] * 8], np.random.default_rng(0).permutation(clip)
    of_frozen, of_shuffled, of_clip = (consistency(pixel_features(x)) for x in (frozen, shuffled, clip))
    assert of_frozen == pytest.approx(1) and of_shuffled < of_clip < 0.99


@pytest.fixture()
def drawn(monkeypatch):
    """Table's clips are drawn, not sampled -> scenes, and the list of all prompts that were asked for."""
    scenes, asked = draw_scenes(6), []

    def draw(base, prompts, which, subjects=(), lambdas=None):
        asked.extend(prompts[i] for i in which)
        return np.stack([draw_clip(scenes[i]) for i in which])

    monkeypatch.setattr(experiment, "sample_clips", draw)
    return scenes, asked


def test_an_interrupted_table_goes_on(tmp_path, drawn, toy):
    scenes, asked = drawn
    captions = [caption(scene) for scene in scenes]
    judge = lambda i, clip: against(scenes[i], measure(clip, 8), ("direction", "shape"))
    Table(Namespace(clips=6, out=tmp_path), toy, "x").fill("one", captions, judge)
    table = Table(Namespace(clips=6, out=tmp_path), toy, "x")
    table.fill("one", captions, judge)
    table.fill("two", captions, judge)
    assert asked == 2 * captions and list(table.rows) == ["one", "two"]
    one, two = table.rows["one"], table.rows["two"]
    assert two["direction"] == two["shape"] == [1.0] * 6
    assert np.allclose(one["distance"], 1, atol=0.05) and sum(one["frozen"]) == 0
    assert Image.open(tmp_path / "x.png").size == (2 * 8 * 64, 2 * (64 + 14))
    with pytest.raises(BadInput, match="other settings"):
        Table(Namespace(clips=7, out=tmp_path), toy, "x")
    (tmp_path / "x.png").unlink()   # what is missing is made again
    Table(Namespace(clips=6, out=tmp_path), toy, "x").fill("one", captions, judge)
    assert asked == 3 * captions and (tmp_path / "x.png").exists()


def test_trainings_share_the_clips_of_a_row(tmp_path, drawn, base, capsys):
    """Two subjects take half of the clips each. The errors are over the two, not over the six clips."""
    _, asked = drawn
    learned = [(replace(random_subject(base), class_word="heart"), "berry"),
               (replace(random_subject(base), class_word="circle"), "bee")]
    table = Table(Namespace(clips=6, out=tmp_path), base, "claim")
    row = replace(experiment.PAPER_K5, lambdas="0.4*2,0.8*2")  # the tiny base takes 4 steps
    numbers = experiment.measure_row(table, row, learned)
    assert asked[2].startswith("a V* heart") and asked[3].startswith("a V* circle")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| 6 clips per row by 2 trainings |")
    halves = np.array(numbers["likeness"]).reshape(2, 3).mean(1)
    error = abs(halves[0] - halves[1]) / 2
    assert f"{np.mean(halves):.3f} ± {error:.3f}" in lines[2]


def test_clips_that_cannot_be_shared_are_refused(tmp_path):
    done = run("toy/experiment.py", "claim", "--clips", 8, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: --clips 8: should be a multiple of 6")


# ------------------------------------------------------------------------------------------------------------
# The committed weights


@pytest.fixture(scope="module")
def toy():
    return load_base(ROOT / "toy" / "base")


def test_base_is_small_and_has_its_subject(toy):
    assert sum(path.stat().st_size for path in (ROOT / "toy" / "base").iterdir()) <= 20e6
    subject = load_subject(ROOT / "toy" / "subject.safetensors", toy)
    assert (subject.placeholder, subject.class_word) == ("V*", "heart")


@torch.no_grad()
def test_vae_codes_the_world_and_the_subjects(toy):
    rng = np.random.default_rng(3)
    world = np.concatenate([draw_clip(random_scene(rng), 1) for _ in range(32)])
    photos = np.concatenate([draw_photos(name) for name in SUBJECTS])
    for pictures, decibels in ((world, 28), (photos, 25)):
        x = pixels(pictures)
        mse = (toy.vae.decode(toy.vae.encode(x)).clamp(-1, 1) - x).pow(2).mean()
        assert 10 * torch.log10(4 / mse) > decibels


@torch.no_grad()
def test_unet_has_learned_what_captions_say(toy):
    """Noise is predicted best with a clip's own caption.

    Another direction, ground, colour or shape in the caption makes the loss larger.
    """
    rng = np.random.default_rng(4)
    scenes = [random_scene(rng, unseen=i % 2 == 0) for i in range(24)]
    x = pixels(np.concatenate([draw_clip(scene) for scene in scenes]))
    z_0 = toy.vae.encode(x).unflatten(0, (-1, 8)).transpose(1, 2)
    t, fps = torch.full((len(scenes),), 850), torch.tensor([scene.fps for scene in scenes])
    eps = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(0))
    z_t = toy.schedule.add_noise(z_0, t, eps)

    def loss(scenes):
        context = toy.text_encoder(Tokenizer()([caption(scene) for scene in scenes]))
        return (toy.unet(z_t, t, fps, context) - eps).pow(2).mean().item()

    def loss_with_other(name, other):
        return loss([replace(scene, **{name: other[getattr(scene, name)]}) for scene in scenes])

    def next_of(words):
        words = list(words)
        return dict(zip(words, words[1:] + words[:1]))

    right = loss(scenes)
    assert loss_with_other("direction", OPPOSITE) > right
    assert loss_with_other("ground", next_of(GROUNDS)) > right
    assert loss_with_other("colour", next_of(COLOURS)) > right
    assert loss_with_other("shape", next_of(SHAPES)) > right


def test_process_finds_the_step_at_which_motion_is_decided(tmp_path):
    """By `experiment.py decided` nine tenths of the directions are decided between steps 7 and 10."""
    done = run("sample.py", "--base", ROOT / "toy" / "base", "--subject", "none", "--show_process",
               "--prompt", "a red star moving left on the sea", "--num", 2, "--seed", 0, "--format", "png",
               cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = [int(line.split()[-1]) for line in done.stdout.splitlines() if "the first step with 0.9" in line]
    assert len(steps) == 2 and 5 <= np.mean(steps) <= 12


def test_first_command_of_the_readme(tmp_path):
    done = run("sample.py", "--lambda_s", 0.4, "--lambda_l", 0.8, "--K", 5, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "toy/base (toy)" in lines[0] and "toy/subject.safetensors (V* heart" in lines[0]
    files = lines[-1].removeprefix("wrote ").split()
    assert len(files) == 3 and all((tmp_path / file).stat().st_size > 0 for file in files)
