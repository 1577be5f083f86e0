"""The metrics against NumPy, with small random towers; what each must not see; the table of folders."""
import csv
import json
import os
import sys
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from cli import BadInput
from makers import fork_ranks, run, wait
from paper import evaluate
from paper.evaluate import Tower, consistency, cosines, load_dino, motion
from toy.world import draw_clip, random_scene
from video import read_video, save_video

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def small_tower(*_):
    """CLIP's own classes with random weights, one narrow layer each."""
    torch.manual_seed(0)
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 56, "image_size": 224}
    model = open_clip.CLIP(16, vision, {"layers": 1, "width": 32, "heads": 2})
    tokenizer = open_clip.get_tokenizer("ViT-B-32-quickgelu")
    return Tower(model, lambda model, x: model.encode_image(x), 256, MEAN, STD, tokenizer)


@pytest.fixture(scope="module")
def tower():
    return small_tower()


@pytest.fixture(scope="module")
def clip():
    return draw_clip(random_scene(np.random.default_rng(3)))


# ------------------------------------------------------------------------------------------------------------
# The metrics


def numpy_features(tower, frame):
    """(H, W, 3) -> (D,): shorter side to 256, the middle 224 x 224, colours normalised, length 1."""
    image = Image.fromarray(frame)
    scale = 256 / min(image.size)
    image = np.asarray(image.resize([int(scale * side) for side in image.size], Image.BICUBIC)) / 255
    top, left = (round((side - 224) / 2) for side in image.shape[:2])
    x = (image[top:top + 224, left:left + 224] - np.array(MEAN)) / np.array(STD)
    with torch.no_grad():
        x = tower.model.encode_image(torch.from_numpy(x).float().permute(2, 0, 1)[None])[0].double().numpy()
    return x / np.sqrt((x ** 2).sum())


def test_metrics_against_numpy(tower, clip):
    pictures = [np.random.default_rng(i).integers(0, 256, (48, 64 + i, 3), dtype=np.uint8) for i in range(3)]
    our_frames = tower.images([Image.fromarray(frame) for frame in clip])
    our_photos = tower.images([Image.fromarray(picture) for picture in pictures])
    frames = np.stack([numpy_features(tower, frame) for frame in clip])         # (T, D)
    photos = np.stack([numpy_features(tower, picture) for picture in pictures])  # (N, D)
    with torch.no_grad():
        text = tower.model.encode_text(tower.tokenizer(["a red star"]))[0].double().numpy()
    text = text / np.sqrt((text ** 2).sum())
    assert cosines(our_photos, our_frames) == pytest.approx((photos @ frames.T).mean(), abs=1e-5)
    assert cosines(tower.text("a red star"), our_frames) == pytest.approx((frames @ text).mean(), abs=1e-5)
    neighbours = (frames[1:] * frames[:-1]).sum(axis=1)
    assert consistency(our_frames) == pytest.approx(neighbours.mean(), abs=1e-5)


def test_what_each_metric_does_not_see(tower, clip):
    pictures = [Image.fromarray(frame) for frame in clip]
    features, text, photos = tower.images(pictures), tower.text("a red star"), tower.images(pictures[:3])
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(clip)))
    assert cosines(text, features[order]) == pytest.approx(cosines(text, features), abs=1e-6)
    assert cosines(photos.flip(0), features) == pytest.approx(cosines(photos, features), abs=1e-6)
    assert consistency(features[order]) < consistency(features) < 1
    assert consistency(features[:1].expand(8, -1)) == pytest.approx(1, abs=1e-6)


def test_motion_is_how_far_a_texture_was_pushed():
    texture = np.random.default_rng(0).integers(0, 256, (64, 200, 3), dtype=np.uint8)
    pushed = lambda step: np.stack([texture[:, step * t:step * t + 128] for t in range(5)])
    assert motion(pushed(0)) == 0
    for step in (1, 3, 7):  # the outermost blocks lose what leaves the picture
        assert motion(pushed(step)) == pytest.approx(100 * step / 128, rel=0.15)


@pytest.mark.parametrize("seed", range(8))
def test_motion_is_not_fooled(seed):
    """Frozen, noisy and flickering stills have at most a tenth of the motion of the clip itself."""
    rng = np.random.default_rng(seed)
    clip = draw_clip(replace(random_scene(rng), fps=8))
    still = clip[[3] * 8].astype(float)
    brightness = rng.permutation(np.linspace(0.5, 1, 8))[:, None, None, None]
    fakes = {"frozen": still, "flickering": still * brightness,
             "noisy": still + rng.normal(0, 20, still.shape), "noise": rng.integers(0, 256, clip.shape)}
    found = {name: motion(fake.clip(0, 255).astype(np.uint8)) for name, fake in fakes.items()}
    assert motion(clip) > 1 and max(found.values()) < motion(clip) / 10, found


# ------------------------------------------------------------------------------------------------------------
# The script


def write_videos(folder, subjects, clips):
    """Seed -> clip become FOLDER/star-SEED.mp4, each with sample.py's JSON. Returns the folder."""
    folder.mkdir()
    prompt = "a V* star moving left" if subjects else "a star moving left"
    for seed, video in clips.items():
        facts = {"prompt": prompt, "seed": seed, "subjects": subjects}
        save_video(folder / f"star-{seed}", video, ["mp4"], 8, facts, {})
    return folder


def main_with_small_towers():
    evaluate.load_clip = evaluate.load_dino = small_tower
    sys.stderr = open(os.devnull, "w")  # no progress bar among the lines
    evaluate.main()


def printed_table(processes, flags, cwd):
    """evaluate.py on so many processes -> the lines of its table."""
    pids = fork_ranks(processes, main_with_small_towers, ["evaluate.py", *flags], cwd)
    assert [wait(pid) for pid in pids] == processes * [0]
    return [line for line in (cwd / "output").read_text().splitlines() if line.startswith("|")]


def test_the_table_of_two_folders(clip, photos_folder, tmp_path):
    """A moving folder and a frozen one, the base beside them. Two processes find what one process does."""
    subjects = [{"placeholder": "V*", "class_word": "star"}]
    moving = write_videos(tmp_path / "moving", subjects, {0: clip, 1: clip[::-1]})
    frozen = write_videos(tmp_path / "frozen", subjects, {0: clip[[0] * 8], 5: clip[[7] * 8]})
    base = write_videos(tmp_path / "base", [], {0: clip})
    (moving / "strange.json").write_text("[]")
    out = tmp_path / "out"
    flags = ["--videos", moving, frozen, "--images", photos_folder, "--base_videos", base, "--out", out]
    table = printed_table(1, flags, tmp_path)
    alone = (out / "evaluation.json").read_bytes()
    assert printed_table(2, flags, tmp_path) == table
    assert (out / "evaluation.json").read_bytes() == alone
    assert len(table) == 4 and str(frozen) in table[2] and str(moving) in table[3]

    report = json.loads(alone)
    rows = {(row["folder"], row["seed"]): row for row in report["videos"]}
    assert sorted(rows) == [(str(frozen), 0), (str(frozen), 5), (str(moving), 0), (str(moving), 1)]
    assert all(row["text"] == "a star moving left" for row in rows.values())
    of_frozen, of_moving = rows[str(frozen), 0], rows[str(moving), 0]
    assert of_frozen["T.Cons"] == pytest.approx(1, abs=1e-3) and of_frozen["motion"] == 0
    seen = motion(read_video(moving / "star-0.mp4"))
    assert of_moving["motion"] == seen > 1
    assert of_moving["motion of base"] == pytest.approx(seen)
    assert rows[str(frozen), 5]["motion of base"] is None
    both = [rows[str(moving), seed]["CLIP-I"] for seed in (0, 1)]
    assert report["folders"][str(moving)]["CLIP-I"][0] == pytest.approx(np.mean(both))
    with open(out / "evaluation.csv", newline="") as f:
        in_csv = [float(row["CLIP-T"]) for row in csv.DictReader(f)]
    assert in_csv == [row["CLIP-T"] for row in report["videos"]]


def test_dino_weights_by_their_real_names(tmp_path):
    """A file with the hub's names and shapes is taken. A file with a tensor missing is refused."""
    torch.manual_seed(0)
    state = timm.create_model("vit_small_patch16_224", num_classes=0).state_dict()
    assert len(state) == 150 and state["patch_embed.proj.weight"].shape == (384, 3, 16, 16)
    save_file(state, tmp_path / "model.safetensors")
    dino = load_dino(tmp_path / "model.safetensors", "cpu")
    assert torch.equal(dino.model.blocks[11].mlp.fc2.weight, state["blocks.11.mlp.fc2.weight"])
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    assert dino.images([picture]).norm(dim=1).item() == pytest.approx(1, abs=1e-5)
    del state["norm.bias"]
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(BadInput, match="short.safetensors.*norm.bias"):
        load_dino(tmp_path / "short.safetensors", "cpu")


def test_refusals(tmp_path, photos_folder, clip, monkeypatch):
    videos = write_videos(tmp_path / "v", [], {0: clip})
    refusals = [
        (["--videos", tmp_path / "none"], "none: no such folder"),
        (["--videos", tmp_path], "no video with its JSON"),
        (["--videos", videos, "--clip", tmp_path / "x.pt"], "--clip .*x.pt: not readable")]
    for flags, says in refusals:
        argv = ["evaluate.py", *flags, "--images", photos_folder]
        monkeypatch.setattr("sys.argv", list(map(str, argv)))
        with pytest.raises(BadInput, match=says):
            evaluate.main()
    done = run("paper/evaluate.py", "--videos", videos, "--images", tmp_path / "none", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--images" in done.stderr, done.stderr


def test_one_frame_has_no_motion_and_no_consistency(tower, clip, tmp_path, photos_folder, monkeypatch):
    """Their cells stay empty, the report is plain JSON, and a folder that is given twice counts once."""
    videos = write_videos(tmp_path / "v", [], {0: clip[:1], 1: clip})
    monkeypatch.setattr(evaluate, "load_clip", small_tower)
    monkeypatch.setattr(evaluate, "load_dino", small_tower)
    flags = ["--videos", videos, videos, "--images", photos_folder]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, flags)])
    evaluate.main()
    text = (videos / "evaluation.json").read_text()
    report = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    still, moving = report["videos"]
    assert still["T.Cons"] is None and still["motion"] is None and moving["motion"] > 1
    counts = {metric: numbers[2] for metric, numbers in report["folders"][str(videos)].items()}
    assert counts["T.Cons"] == 1 and counts["CLIP-T"] == 2
