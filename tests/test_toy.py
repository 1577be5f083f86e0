"""The embedded base: its world is as described, its weights are trained, the README's first command works."""
import itertools
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from makers import ROOT, random_subject, run
from model import pixels
from paper.evaluate import consistency
from support.cli import BadInput, Process
from support.files import load_base
from toy import experiment, pretrain
from toy.experiment import Table, against, unseen_scenes
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


@pytest.fixture()
def drawn(monkeypatch):
    """Clips are drawn, not sampled -> scenes, and the list of all prompts that were asked for."""
    scenes, asked = unseen_scenes(6), []

    def draw(base, prompts, which, subjects=(), lambdas=None):
        asked.extend(prompts[i] for i in which)
        return np.stack([draw_clip(scenes[i]) for i in which])

    monkeypatch.setattr(experiment, "sample_clips", draw)
    return scenes, asked


def test_an_interrupted_table_continues(tmp_path, drawn, toy):
    scenes, asked = drawn
    captions = [caption(scene) for scene in scenes]
    judge = lambda i, clip: against(scenes[i], measure(clip, 8), ("direction", "shape"))
    open_table = lambda clips: Table(Namespace(clips=clips, out=tmp_path), toy, ALONE, "x")
    open_table(6).fill("one", captions, judge)
    table = open_table(6)
    table.fill("one", captions, judge)
    table.fill("two", captions, judge)
    assert asked == 2 * captions and list(table.rows) == ["one", "two"]
    one, two = table.rows["one"], table.rows["two"]
    assert two["direction"] == two["shape"] == [1.0] * 6
    assert np.allclose(one["distance"], 1, atol=0.05) and sum(one["frozen"]) == 0
    assert Image.open(tmp_path / "x.png").size == (2 * (4 * 64 + 8), 2 * (64 + 14))
    with pytest.raises(BadInput, match="other settings"):
        open_table(7)
    (tmp_path / "x.png").unlink()   # without its picture a row is made again
    open_table(6).fill("one", captions, judge)
    assert asked == 3 * captions and (tmp_path / "x.png").exists()


def test_trainings_share_the_clips_of_a_row_equally(tmp_path, drawn, base, call, capsys):
    """Two subjects take half of the clips each. The errors are over the two, not over the six clips."""
    _, asked = drawn
    learned = [(replace(random_subject(base), class_word="heart"), "berry"),
               (replace(random_subject(base), class_word="circle"), "bee")]
    table = Table(Namespace(clips=6, out=tmp_path), base, ALONE, "claim")
    row = replace(experiment.PAPER_K5, lambdas="0.4*2,0.8*2")  # the tiny base takes 4 steps
    numbers = experiment.measure_row(table, row, learned)
    assert asked[2].startswith("a V* heart") and asked[3].startswith("a V* circle")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| 6 clips per row by 2 trainings |")
    halves = np.array(numbers["likeness"]).reshape(2, 3).mean(1)
    error = abs(halves[0] - halves[1]) / 2
    assert f"{np.mean(halves):.3f} ± {error:.3f}" in lines[2]
    line, = call(experiment, "claim", "--clips", 8, code=2).err.splitlines()
    assert line.startswith("error: --clips 8: should be a multiple of 6")


def test_a_run_is_started_once_and_without_torchruns_environment(tmp_path, monkeypatch, toy):
    """A training and a longer one share a run. What is done is not started again, and the rest is resumed."""
    started = []

    def run_command(command, env):
        started.append((command, env))
        flags = dict(zip(command, command[1:]))
        for steps in range(5, int(flags["--steps"]) + 1, 5):
            save = Path(flags.get("--out") or flags["--resume"]) / f"step-{steps:06d}"
            save.mkdir(parents=True, exist_ok=True)
            (save / "subject.safetensors").touch()
            (save / "state.pt").touch()
        return Namespace(returncode=0)

    monkeypatch.setattr(experiment.subprocess, "run", run_command)
    monkeypatch.setattr(experiment, "load_subject", lambda path, base: path.parent.name)
    of_torchrun = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_PORT"}
    for name in of_torchrun:
        monkeypatch.setenv(name, "1")
    args = Namespace(out=tmp_path, base=BASE, steps=5)
    learn = lambda *trainings: experiment.learn(args, toy, ALONE, trainings, seeds=(0,))

    default, longer = experiment.DEFAULT, experiment.LONGER
    assert learn(default)[default] == [("step-000005", name) for name in experiment.NAMES]
    assert learn(default, longer)[longer] == [("step-000010", name) for name in experiment.NAMES]
    learn(longer, default)
    assert ["--resume" in command for command, _ in started] == [False] * 3 + [True] * 3
    assert not of_torchrun & started[0][1].keys()


def test_the_recipes_decision(capsys):
    """A change is accepted if direction loses at most 0.05 on average, and no subject more than 0.15."""
    lost = {"accepted": (0.1, 0.0, 0.02), "bad for one": (0.16, 0.0, -0.1), "bad for all": (0.06, 0.06, 0.06)}
    numbers = {name: {"direction": 0.7 - np.repeat(by_subject, 8), "likeness": np.full(24, 0.7)}
               for name, by_subject in {"default": (0, 0, 0), **lost}.items()}
    experiment.print_differences(numbers)
    *_, good, bad_for_one, bad_for_all = capsys.readouterr().out.splitlines()
    assert good.startswith("| accepted | -0.040 ± ") and good.endswith("| yes |")
    assert bad_for_one.endswith("| no |") and bad_for_all.endswith("| no |")


def test_pretraining_from_start_to_end(tmp_path, call):
    """One stage, and then the command for all of them. The base has the committed one's numbers."""
    sizes = ["--vae_steps", 2, "--clips", 16, "--image_steps", 1, "--clip_steps", 1]
    for flags in (["--stage", "vae"], []):
        call(pretrain, "--out", "out", *sizes, *flags)
    folder = tmp_path / "out" / "base"
    load_base(folder)
    config, committed = (json.loads((folder / "config.json").read_text()) for folder in (folder, BASE))
    for own in (config, committed):
        del own["fingerprint"], own["vae"]["latent_factor"]
    assert config == committed


def test_a_stopped_stage_continues_as_if_it_had_not_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain.Run, "SAVE_EVERY", 2)

    def new_run(folder, steps):
        network = torch.nn.Linear(3, 3)
        return pretrain.Run("x", folder, ALONE, network, lr=0.1, scales={network: 1}, steps=steps)

    def train(folder, *stops):
        for start, stop in enumerate(stops):
            torch.manual_seed(start)    # a later start's random weights must not count
            stage = new_run(folder, steps=6)
            while stage.step < stop:
                x = torch.randn(4, 3, generator=torch.Generator().manual_seed(stage.step))
                stage.optimize(stage.model(x).pow(2).mean(), {})
        return torch.load(folder / "x.pt")["average"]["module.weight"]

    assert torch.equal(train(tmp_path / "a", 6), train(tmp_path / "b", 4, 6))
    with pytest.raises(BadInput, match="of a run of 6 steps"):
        new_run(tmp_path / "a", steps=7)


@pytest.mark.parametrize("stage, name", [("all", "config.json"), ("export", "vae.safetensors")])
def test_pretraining_keeps_another_models_files(tmp_path, call, stage, name):
    (tmp_path / name).write_text('{"name": "videocrafter2"}')
    error = call(pretrain, "--base", tmp_path, "--out", "out", "--stage", stage, code=2).err
    assert error == f"error: --base {tmp_path}: {name} in it is another model's; name another folder\n"
    assert (tmp_path / name).read_text() == '{"name": "videocrafter2"}' and not (tmp_path / "out").exists()


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
