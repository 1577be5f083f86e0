"""The embedded base: its world is as described, its weights are trained, the README's first command works."""
import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from makers import ROOT, random_subject, run
from model import pixels
from paper.evaluate import consistency
from support.cli import BadInput, Process
from support.files import load_base, save_subject
from toy import experiment, pretrain
from toy.experiment import against, unseen_scenes
from toy.measure import likeness, measure, pixel_features, psnr
from toy.world import (COLOURS, DIRECTIONS, FRAMES, GROUNDS, PATTERNS, SHAPES, SIZE, SPEED, SUBJECTS,
                       TEXTURES, Look, Scene, caption, draw_clip, draw_photos, held_out, random_look,
                       random_scene)

ALONE = Process(0, 1, torch.device("cpu"))
BASE = ROOT / "toy" / "base"


def test_held_out_combinations_are_a_tenth_and_never_drawn():
    """All looks near a subject's are held out, but every kind of look is drawn."""
    rng = np.random.default_rng(1)
    is_held_out = lambda scene: held_out(scene.shape, scene.look, scene.ground, scene.direction)
    looks = [random_look(rng) for _ in range(20)]
    combinations = itertools.product(SHAPES, looks, GROUNDS, DIRECTIONS)
    assert 0.08 < np.mean([held_out(*combination) for combination in combinations]) < 0.15
    assert all(is_held_out(random_scene(rng, unseen=True)) for _ in range(30))
    drawn = [random_scene(rng) for _ in range(300)]
    assert not any(map(is_held_out, drawn))
    assert {scene.look.pattern for scene in drawn} == set(PATTERNS)
    assert {scene.look.face for scene in drawn} == {False, True}
    for shape, look in SUBJECTS.values():
        near = replace(look, colour=tuple(np.clip(np.array(look.colour) + 0.1, 0, 1)), face=not look.face)
        for ground, direction in itertools.product(GROUNDS, DIRECTIONS):
            assert held_out(shape, look, ground, direction) and held_out(shape, near, ground, direction)


def test_captions_name_the_look_and_drop_words():
    look = Look(COLOURS["red"], COLOURS["white"], "striped", face=True)
    scene = Scene("star", look, "sea", "left")
    assert caption(scene) == "a smiling red and white striped star moving left on the sea"
    assert caption(replace(scene, look=Look(COLOURS["red"]), direction="")) == "a red star on the sea"
    rng = np.random.default_rng(2)
    captions = {caption(scene, rng) for _ in range(20_000)}
    assert "" in captions and "a star" in captions and caption(scene) in captions
    assert len(captions) == 2 ** 5 + 1


@pytest.mark.parametrize("name", SUBJECTS)
def test_committed_photos_are_what_the_script_draws_and_like_their_subject_alone(name):
    files, photos = sorted((ROOT / "toy" / "subjects" / name).glob("*.png")), draw_photos(name)
    assert len(files) == 5
    for file, photo in zip(files, photos):
        assert np.abs(np.asarray(Image.open(file)).astype(int) - photo).max() <= 1
    assert likeness(photos[:1], name) > 0.9
    assert max(likeness(photos[:1], other) for other in SUBJECTS if other != name) < 0.5


def test_measures_know_the_answer_of_drawn_clips_and_fail_on_noise_frozen_and_shuffled_ones():
    rng, names = np.random.default_rng(3), ("shape", "ground", "direction", "pattern", "colour")
    scenes = [random_scene(rng, unseen=i % 2 == 0) for i in range(30)]
    clips = [draw_clip(scene) for scene in scenes]
    seen = [measure(clip, scene.fps) for scene, clip in zip(scenes, clips)]
    rows = [against(scene, found, names) for scene, found in zip(scenes, seen)]
    for name in names:
        assert np.mean([row[name] for row in rows]) >= 0.96, name
    assert not any(row["frozen"] or row["broken"] for row in rows)
    assert np.allclose([row["distance"] for row in rows], 1, rtol=0.05)
    assert np.mean([found.colour_drift for found in seen]) < 0.02
    assert np.mean([found.shape_drift for found in seen]) < 0.06

    noise = measure(rng.integers(0, 256, (8, 64, 64, 3)).astype(np.uint8), 8)
    assert [getattr(noise, name) for name in names] == [""] * 5 and noise.broken == 1.0
    consistent = lambda clip: consistency(pixel_features(clip))
    for scene, clip in zip(scenes[:3], clips):
        frozen = measure(clip[[3] * 8], scene.fps)
        assert frozen.frozen and frozen.direction == "" and frozen.shape == scene.shape
        out_of_order = clip[[5, 1, 7, 0, 3, 6, 2, 4]]
        shuffled = measure(out_of_order, scene.fps)
        assert shuffled.direction == "" and shuffled.ground == scene.ground
        assert consistent(out_of_order) < consistent(clip) < 0.99
        assert consistent(clip[[3] * 8]) == pytest.approx(1)


def moving(name, ground, i, radius):
    """The i-th scene of a subject that crosses the middle, in the i-th direction and at the i-th turn."""
    shape, look = SUBJECTS[name]
    direction = list(DIRECTIONS)[i % 4]
    start = SIZE / 2 - 0.4 * SPEED / 8 * (FRAMES - 1) * np.array(DIRECTIONS[direction])
    turn = i * np.pi * (3 - 5 ** 0.5) % (2 * np.pi)     # multiples of the golden angle are spread evenly
    return Scene(shape, look, ground, direction, tuple(start), radius, turn, texture=i % TEXTURES)


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_moving_subject_is_measured_alike_at_every_size_and_turn(name):
    """Subjects' photos show radii from 16 to 21, and nothing keeps a learned subject upright."""
    for j, ground in enumerate(GROUNDS):
        i = len(GROUNDS) * list(SUBJECTS).index(name) + j
        scene = moving(name, ground, i, radius=15.0 + i % 7)
        clip = draw_clip(scene)
        measures = measure(clip, scene.fps)
        assert measures.broken == 0 and not measures.frozen and measures.direction == scene.direction, scene
        of_radius_16 = likeness(draw_clip(replace(scene, radius=16.0)), name)
        assert likeness(clip, name) == pytest.approx(of_radius_16, abs=0.02), scene


@pytest.mark.parametrize("name, radius", [("ember", 16.0), ("bee", 20.0)])
def test_broken_sprites_of_every_size_are_found(name, radius):
    """On snow, where these two subjects stand out: BROKEN is a distance of pixels, so contrast counts."""
    clip = draw_clip(moving(name, "snow", 3, radius))
    rows = np.round(9 * np.sin(np.arange(SIZE) / 4)).astype(int)
    bent = np.stack([np.roll(clip[:, y], shift, axis=1) for y, shift in enumerate(rows)], axis=1)
    assert measure(bent, 8).broken > 0.5
    one_bad = clip.copy()
    one_bad[3] = draw_clip(moving("gift", "snow", 0, radius))[0]
    assert measure(one_bad, 8).broken == 1 / FRAMES


def test_drift_is_seen_where_there_is_some():
    """A sprite that changes its colour, or its shape, from frame to frame."""
    scene = Scene("circle", Look(COLOURS["red"]), "snow", "right", start=(25.0, 32.0))
    coloured = [replace(scene, look=Look(colour)) for colour in list(COLOURS.values())[:8]]
    shaped = [replace(scene, shape=shape) for shape in (*SHAPES, *SHAPES)[:8]]
    for scenes, drift, least in ((coloured, "colour_drift", 0.1), (shaped, "shape_drift", 0.15)):
        clip = np.concatenate([draw_clip(scene, 1, first=t) for t, scene in enumerate(scenes)])
        assert getattr(measure(clip, 8), drift) > least


def test_subjects_share_the_clips_of_a_row_equally(tmp_path, base, base_folder, call, monkeypatch):
    """Two subjects make half of the clips each. The errors are over the two, not over the six clips."""
    drawn, asked = unseen_scenes(6), []     # clips are drawn, not sampled

    def draw(base, prompts, numbers, subjects=(), lambdas=None):
        asked.extend(prompts[n] for n in numbers)
        return np.stack([draw_clip(drawn[n]) for n in numbers])

    monkeypatch.setattr(experiment, "sample_clips", draw)
    subject = random_subject(base)
    flags = ["--base", base_folder, "--subject", "berry", "bee", "--lambdas", "base", "0.4*2,0.8*2"]
    for name, class_word in (("berry", "heart"), ("bee", "circle")):
        own = replace(subject, class_word=class_word, settings={"images": name})
        save_subject(tmp_path / name / "subject.safetensors", own)
    lines = call(experiment, "claim", *flags, "--clips", 6).out.splitlines()
    assert [words.split()[1] for words in asked] == ["heart"] * 3 + ["circle"] * 3 + ["V*"] * 6
    assert asked[8].startswith("a V* heart moving") and asked[9].startswith("a V* circle moving")
    assert lines[0].startswith("| 6 clips per row by 2 trainings | direction |")
    like = [float(number) for number in re.findall(r"0.8\*2: .* likeness (\S+),", "\n".join(lines))]
    mean, error = map(float, re.search(r"(\S+) ± (\S+) \| \S+ ± \S+ \|$", lines[3]).groups())
    assert mean == pytest.approx(np.mean(like), abs=2e-3)
    assert error == pytest.approx(abs(like[0] - like[1]) / 2, abs=2e-3)
    assert Image.open(tmp_path / "outputs/experiment/claim.png").size == (2 * (4 * 64 + 8), 2 * (64 + 14))
    error, = call(experiment, "claim", *flags, "--clips", 7, code=2).err.splitlines()
    assert error.startswith("error: --clips 7: should be a multiple of 2")


def test_pretraining_from_start_to_end(tmp_path, call, monkeypatch):
    """The base has the committed one's numbers. The same command continues, and keeps a finished base."""
    for name, number in {"VAE_STEPS": 2, "CLIPS": 16, "IMAGE_STEPS": 1, "CLIP_STEPS": 1}.items():
        monkeypatch.setattr(pretrain, name, number)
    folder = tmp_path / "out" / "base"
    assert call(pretrain, "--out", "out").out.startswith("wrote out/base")
    load_base(folder)
    written = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert call(pretrain, "--out", "out").out == "out/base exists already and is kept\n"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == written
    config, committed = (json.loads((folder / "config.json").read_text()) for folder in (folder, BASE))
    for own in (config, committed):
        del own["fingerprint"], own["vae"]["latent_factor"]
    assert config == committed


def test_a_stopped_stage_continues_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain.Run, "SAVE_EVERY", 2)

    def new_run(folder, steps):
        network = torch.nn.Linear(3, 3)
        return pretrain.Run(folder / "x.pt", network, lr=0.1, scales={network: 1}, steps=steps)

    def train(folder, *stops):
        for start, stop in enumerate(stops):
            torch.manual_seed(start)    # a later start's random weights must not count
            stage = new_run(folder, steps=6)
            while stage.step < stop:
                x = torch.randn(4, 3, generator=torch.Generator().manual_seed(stage.step))
                stage.optimize(stage.network(x).pow(2).mean())
        return torch.load(folder / "x.pt")["average"]["module.weight"]

    assert torch.equal(train(tmp_path / "a", 6), train(tmp_path / "b", 4, 6))
    with pytest.raises(BadInput, match="a run of 6 steps"):
        new_run(tmp_path / "a", steps=7)


@pytest.fixture(scope="module")
def toy():
    return load_base(BASE)


@torch.no_grad()
def test_the_vae_codes_world_and_subjects_and_the_unet_has_learned_what_captions_say(toy):
    """Another direction, ground, shape, colour or pattern in a clip's caption makes the loss larger."""
    rng = np.random.default_rng(4)
    scenes = [random_scene(rng, unseen=i % 2 == 0) for i in range(24)]
    clips = np.concatenate([draw_clip(scene) for scene in scenes])
    photos = np.concatenate([draw_photos(name) for name in SUBJECTS])
    for pictures, decibels in ((clips[::8], 30), (photos, 28)):
        assert np.mean([psnr(toy, picture) for picture in pictures]) > decibels
    z_0 = toy.encode(pixels(clips)).unflatten(0, (-1, 8)).transpose(1, 2)
    t, fps = torch.full((len(scenes),), 930), torch.tensor([scene.fps for scene in scenes])
    eps = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(0))
    z_t = toy.schedule.add_noise(z_0, t, eps)

    def loss(captions):
        return (toy.unet(z_t, t, fps, toy.encode_text(captions)) - eps).pow(2).mean().item()

    captions = [caption(scene) for scene in scenes]
    right = loss(captions)
    for words in map(list, (DIRECTIONS, GROUNDS, SHAPES, COLOURS, PATTERNS[1:])):
        other = dict(zip(words, words[1:] + words[:1]))
        assert loss([" ".join(other.get(word, word) for word in text.split()) for text in captions]) > right


def test_first_command_of_the_readme(tmp_path):
    done = run("sample.py", "--lambda_s", 0.4, "--lambda_l", 0.8, "--K", 5, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "toy/base (toy)" in done.stdout and "toy/subject.safetensors (V* heart" in done.stdout
    files = done.stdout.splitlines()[-1].removeprefix("wrote ").split()
    assert len(files) == 3 and all((tmp_path / file).stat().st_size > 0 for file in files)
