"""The embedded base: its world is as described, its weights are trained, and the first command of the README works on it."""
import json
import shutil
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample
import train
from conftest import ROOT, fork, run, wait
from lora import load_subject
from model import BadInput, Tokenizer, load_base
from toy import experiment
from toy.experiment import OPPOSITE, Table, against, draw_scenes, train_subjects
from toy.world import (COLOURS, DIRECTIONS, GROUNDS, SHAPES, SPEED, SUBJECTS, caption, draw_clip, draw_photos, held_out, measure,
                       random_scene)


def test_every_clip_moves_as_its_caption_says():
    rng = np.random.default_rng(0)
    for _ in range(40):
        scene = random_scene(rng)
        clip = draw_clip(scene).astype(float)
        assert clip.shape == (8, 64, 64, 3) and all(np.abs(a - b).mean() > 0.5 for a, b in zip(clip, clip[1:]))
        assert caption(scene) == f"a {scene.colour} {scene.shape} moving {scene.direction} on the {scene.ground}"
        # Moving the first frame by the whole way, in the direction asked, gives about the last one where
        # the sprite is.
        way = np.array(DIRECTIONS[scene.direction]) * round(SPEED / scene.fps * 7)
        differs = lambda dx, dy: np.abs(np.roll(clip[0], (dy, dx), (0, 1)) - clip[-1])[8:-8, 8:-8].mean()
        assert differs(*way) < min(differs(*-way), differs(0, 0))


def test_held_out_combinations_are_a_tenth_and_never_drawn():
    combinations = [(s, c, g, d) for s in SHAPES for c in COLOURS for g in GROUNDS for d in DIRECTIONS]
    share = np.mean([held_out(*x) for x in combinations])
    assert 0.08 < share < 0.12
    rng = np.random.default_rng(1)
    scenes = [random_scene(rng) for _ in range(300)]
    assert not any(held_out(s.shape, s.colour, s.ground, s.direction) for s in scenes)
    scenes = [random_scene(rng, unseen=True) for _ in range(30)]
    assert all(held_out(s.shape, s.colour, s.ground, s.direction) for s in scenes)


def test_captions_drop_words():
    rng = np.random.default_rng(2)
    scene = random_scene(rng)
    captions = {caption(scene, rng) for _ in range(200)}
    assert "" in captions and f"a {scene.shape}" in captions and caption(scene) in captions and len(captions) == 9


def test_measures_know_the_answer_of_drawn_clips():
    rng = np.random.default_rng(3)
    scenes = [random_scene(rng, unseen=i % 2 == 0) for i in range(100)]
    seen = [measure(draw_clip(scene), scene.fps) for scene in scenes]
    for name in ("shape", "colour", "ground", "direction"):
        assert np.mean([getattr(m, name) == getattr(scene, name) for m, scene in zip(seen, scenes)]) >= 0.99, name
    assert all(m.broken == 0 and not m.frozen for m in seen)
    assert np.allclose([m.distance for m in seen], [SPEED / scene.fps * 7 for scene in scenes], rtol=0.05)


def test_measures_fail_on_noise_and_on_frozen_and_shuffled_clips():
    rng = np.random.default_rng(4)
    noise = measure(rng.integers(0, 256, (8, 64, 64, 3)).astype(np.uint8), 8)
    assert (noise.shape, noise.colour, noise.ground, noise.direction, noise.broken) == ("", "", "", "", 1.0)
    for _ in range(5):
        scene = random_scene(rng)
        clip = draw_clip(scene)
        frozen, shuffled = measure(clip[[3] * 8], scene.fps), measure(clip[[5, 1, 7, 0, 3, 6, 2, 4]], scene.fps)
        assert frozen.frozen and frozen.direction == "" and frozen.shape == scene.shape
        assert shuffled.direction == "" and shuffled.ground == scene.ground
        one_bad = clip.copy()
        one_bad[2] = rng.integers(0, 256, clip[2].shape)
        assert measure(one_bad, scene.fps).broken == 1 / 8

def test_consistency_of_pixels_is_one_for_a_frozen_clip():
    clip = draw_clip(random_scene(np.random.default_rng(5)))
    of = lambda clip: evaluate.consistency(experiment.pixel_features(clip))
    assert of(clip[[3] * 8]) == pytest.approx(1) and of(np.random.default_rng(0).permutation(clip)) < of(clip) < 0.99


def test_an_interrupted_table_goes_on(tmp_path, monkeypatch, toy):
    scenes, asked = draw_scenes(6), []

    def drawn(base, prompts, which):
        asked.extend(prompts[i] for i in which)
        return np.stack([draw_clip(scenes[i]) for i in which])

    monkeypatch.setattr(experiment, "sample_clips", drawn)
    judge = lambda i, clip: against(scenes[i], measure(clip, 8), ("direction", "shape"))
    args = Namespace(clips=6, out=tmp_path, rank=0, world=1)
    Table(args, toy, "x").fill("one", [caption(s) for s in scenes], judge)
    table = Table(args, toy, "x")
    table.fill("one", [caption(s) for s in scenes], judge)
    table.fill("two", [caption(s) for s in scenes], judge)
    assert asked == 2 * [caption(s) for s in scenes] and list(table.rows) == ["one", "two"]
    assert table.rows["two"]["direction"] == table.rows["two"]["shape"] == [1.0] * 6
    assert np.allclose(table.rows["one"]["distance"], 1, atol=0.05) and sum(table.rows["one"]["frozen"]) == 0
    assert Image.open(tmp_path / "x.png").size == (2 * 8 * 64, 2 * (64 + 14))
    with pytest.raises(BadInput, match="other settings"):
        Table(Namespace(clips=7, out=tmp_path, rank=0, world=1), toy, "x")


def test_runs_are_trained_once_and_finished(base_folder, photos_folder, tmp_path, monkeypatch):
    args, runs = Namespace(out=tmp_path, base=base_folder, rank=0, world=1), []

    def command_in_a_fork(argv, env):
        runs.append(argv)
        return Namespace(returncode=wait(fork(train.main, argv[1:], tmp_path)))

    monkeypatch.setattr(experiment.subprocess, "run", command_in_a_fork)
    for steps, trained in ((2, 1), (2, 1), (3, 2)):
        folder = train_subjects(args, {"long": ["--steps", steps, "--images", photos_folder, "--class_word", "dog", "--alpha", 0]})["long"]
        assert len(runs) == trained
    assert [path.name for path in sorted(folder.glob("step-*"))] == ["step-000002", "step-000003"]
    assert len((folder / "log.jsonl").read_text().splitlines()) == 3
    with pytest.raises(BadInput, match="training wrong"):
        train_subjects(args, {"wrong": ["--steps", 1, "--images", tmp_path / "none", "--class_word", "dog"]})


def test_the_papers_protocol_asks_for_every_method_and_prompt(base_folder, photos_folder, tmp_path, monkeypatch, capsys):
    """Its commands are ones that the scripts understand; its table has the means over subjects of what evaluate.py wrote."""
    for name in ("dog2", "clock"):
        shutil.copytree(photos_folder, tmp_path / "photos" / name)
    asked = []

    def understood(what, python, script, *flags, environment=None):
        monkeypatch.setattr("sys.argv", [script.name, *map(str, flags)])
        args = {"train.py": train, "sample.py": sample, "evaluate.py": evaluate}[script.name].parse_args()
        asked.append(args)
        if script.name == "evaluate.py":
            videos = [{"folder": str(folder), "video": "x", "text": "a", "seed": 0, "CLIP-T": 0.1 * i, "motion of base": None}
                      for i, folder in enumerate(args.videos)]
            (args.out / "evaluation.json").write_text(json.dumps({"videos": videos}))

    monkeypatch.setattr(experiment, "command", understood)
    monkeypatch.setattr("sys.argv", ["experiment.py", "--base", str(base_folder), "--subjects", str(tmp_path / "photos"), "--out", str(tmp_path / "out")])
    experiment.main()
    trained, sampled = [a for a in asked if hasattr(a, "class_word")], [a for a in asked if hasattr(a, "lambdas")]
    assert [(a.class_word, a.method, a.targets, a.train_steps, a.word_steps) for a in trained[:6]] == [
        ("clock", "custom_diffusion", "all", 500, None), ("clock", "custom_diffusion", "all", 1000, None),
        ("clock", "dreamvideo", "all", 4000, 3000), ("clock", "dreamvideo", "all", 8000, 6000),
        ("clock", "customcrafter", "cross", 4, None), ("clock", "customcrafter", "all", 4, None)]
    assert [a.lambdas for a in sampled[:8]] == ["", *4 * ["1*50"], "0.8*50", "0.8*50", experiment.PAPER] and len(sampled) == 16
    assert len(trained) == 12 and trained[6].class_word == "dog" and len(asked) == 30
    for name, says in (("clock", "a V* clock turning"), ("dog2", "a V* dog running")):
        prompts = [line for line in (tmp_path / "out" / name / "prompts.txt").read_text().splitlines() if line[0] != "#"]
        assert len(prompts) == 10 and any(line.startswith(says) for line in prompts) and all("V*" in line for line in prompts)
    table = capsys.readouterr().out.splitlines()
    assert table[1] == "| 2 clips a row | CLIP-T |" and table[-1].startswith("| the same, 0.4 then 0.8") and "0.700 ± 0.000" in table[-1]


@pytest.mark.parametrize("name", SUBJECTS)
def test_committed_photos_are_what_the_script_draws(name):
    files = sorted((ROOT / "toy" / "subjects" / name).glob("*.png"))
    assert len(files) == 5
    for file, photo in zip(files, draw_photos(name)):
        assert np.abs(np.asarray(Image.open(file)).astype(int) - photo).max() <= 1


@pytest.fixture(scope="module")
def toy():
    return load_base(ROOT / "toy" / "base")


def test_base_is_small_and_has_its_subject(toy):
    assert sum(p.stat().st_size for p in (ROOT / "toy" / "base").iterdir()) <= 20e6
    subject = load_subject(ROOT / "toy" / "subject.safetensors", toy)
    assert (subject.placeholder, subject.class_word) == ("V*", "heart")


@torch.no_grad()
def test_vae_codes_the_world_and_the_subjects(toy):
    rng = np.random.default_rng(3)
    world = np.concatenate([draw_clip(random_scene(rng), 1) for _ in range(32)])
    for pictures, decibels in [(world, 28), (np.concatenate([draw_photos(n) for n in SUBJECTS]), 25)]:
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
        mse = (toy.vae.decode(toy.vae.encode(x)).clamp(-1, 1) - x).pow(2).mean()
        assert 10 * torch.log10(4 / mse) > decibels


@torch.no_grad()
def test_unet_has_learned_what_captions_say(toy):
    """Noise is predicted better with a clip's own caption than with another direction, ground, colour or shape in it."""
    rng = np.random.default_rng(4)
    scenes = [random_scene(rng, unseen=i % 2 == 0) for i in range(24)]
    x = torch.from_numpy(np.concatenate([draw_clip(s) for s in scenes])).permute(0, 3, 1, 2) / 127.5 - 1
    z_0 = toy.vae.encode(x).unflatten(0, (-1, 8)).transpose(1, 2)
    t = torch.full((len(scenes),), 850)
    eps = torch.randn(z_0.shape, generator=torch.Generator().manual_seed(0))
    z_t, fps = toy.schedule.add_noise(z_0, t, eps), torch.tensor([s.fps for s in scenes])

    def loss(scenes):
        context = toy.text_encoder(Tokenizer()([caption(s) for s in scenes]))
        return (toy.unet(z_t, t, fps, context) - eps).pow(2).mean().item()

    right = loss(scenes)
    other = lambda words, word: words[(words.index(word) + 1) % len(words)]
    assert loss([replace(s, direction=OPPOSITE[s.direction]) for s in scenes]) > right
    assert loss([replace(s, ground=other(list(GROUNDS), s.ground)) for s in scenes]) > right
    assert loss([replace(s, colour=other(list(COLOURS), s.colour)) for s in scenes]) > right
    assert loss([replace(s, shape=other(SHAPES, s.shape)) for s in scenes]) > right


def test_first_command_of_the_readme(tmp_path):
    done = run("sample.py", "--lambda_s", 0.4, "--lambda_l", 0.8, "--K", 5, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "toy/base (toy)" in lines[0] and "toy/subject.safetensors (V* heart" in lines[0]
    files = lines[-1].removeprefix("wrote ").split()
    assert len(files) == 3 and all((tmp_path / f).stat().st_size > 0 for f in files)
