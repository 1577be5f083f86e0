"""The metrics against NumPy, with small random towers; what each must not see; the table; the protocol."""
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from makers import ROOT, Bomb, run
from paper import baselines, evaluate
from paper.evaluate import Tower, consistency, cosines, load_clip, load_dino, motion
from support.cli import BadInput
from support.video import save_video
from toy.world import draw_clip, random_scene

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
        job = {"prompt": prompt, "seed": seed, "subjects": subjects, "frames": len(video)}
        save_video(folder / f"star-{seed}", video, ["mp4"], 8, job, {})
    return folder


@pytest.fixture()
def evaluated(photos_folder, monkeypatch):
    """Runs evaluate.py with small towers -> evaluation.json's content."""
    def evaluated(out, *flags):
        monkeypatch.setattr(evaluate, "load_clip", small_tower)
        monkeypatch.setattr(evaluate, "load_dino", small_tower)
        argv = ["evaluate.py", *flags, "--images", photos_folder, "--out", out]
        monkeypatch.setattr("sys.argv", list(map(str, argv)))
        evaluate.main()
        text = (out / "evaluation.json").read_text()
        return json.loads(text, parse_constant=lambda name: pytest.fail(name))
    return evaluated


def test_the_table_of_two_folders(clip, tmp_path, evaluated, capsys):
    """A moving folder and a frozen one, with the base beside them."""
    subjects = [{"placeholder": "V*", "class_word": "star"}]
    moving = write_videos(tmp_path / "moving", subjects, {0: clip, 1: clip[::-1]})
    frozen = write_videos(tmp_path / "frozen", subjects, {0: clip[[0] * 8], 5: clip[[7] * 8]})
    base = write_videos(tmp_path / "base", [], {0: clip})
    (moving / "strange.json").write_text("[]")
    content = evaluated(tmp_path / "out", "--videos", frozen, moving, "--base_videos", base)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("on cpu in float32")
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 4 and str(frozen) in table[2] and str(moving) in table[3]

    rows = {(row["folder"], row["seed"]): row for row in content["videos"]}
    assert sorted(rows) == [(str(frozen), 0), (str(frozen), 5), (str(moving), 0), (str(moving), 1)]
    assert all(row["text"] == "a star moving left" for row in rows.values())
    of_frozen, of_moving = rows[str(frozen), 0], rows[str(moving), 0]
    assert of_frozen["T.Cons"] == pytest.approx(1, abs=1e-3) and of_frozen["motion"] == 0
    seen = motion(iio.imread(moving / "star-0.mp4", plugin="FFMPEG"))
    assert of_moving["motion"] == seen > 1
    assert of_moving["motion of base"] == pytest.approx(seen)
    assert rows[str(frozen), 5]["motion of base"] is None
    both = [rows[str(moving), seed]["CLIP-I"] for seed in (0, 1)]
    assert content["folders"][str(moving)]["CLIP-I"][0] == pytest.approx(np.mean(both))


def test_one_frame_has_no_motion_and_no_consistency(clip, tmp_path, evaluated):
    """Their cells stay empty, the report is plain JSON, and a folder that is given twice counts once."""
    videos = write_videos(tmp_path / "v", [], {0: clip[:1], 1: clip})
    content = evaluated(videos, "--videos", videos, videos)
    still, moving = content["videos"]
    assert still["T.Cons"] is None and still["motion"] is None and moving["motion"] > 1
    counts = {metric: numbers[2] for metric, numbers in content["folders"][str(videos)].items()}
    assert counts["T.Cons"] == 1 and counts["CLIP-T"] == 2


def test_videos_that_cannot_be_measured(clip, tmp_path, evaluated, capsys):
    """One of --compare is skipped with a warning. One that was cut short is reported in one line."""
    videos = write_videos(tmp_path / "v", [], {0: clip, 1: clip})
    job = json.loads((videos / "star-1.json").read_text())
    (videos / "star-1.json").write_text(json.dumps(job | {"compare": True}))
    assert [row["video"] for row in evaluated(tmp_path, "--videos", videos)["videos"]] == ["star-0.mp4"]
    assert "star-1.json: shows several videos side by side" in capsys.readouterr().err
    save_video(videos / "star-0", clip[:5], ["mp4"], 8, job | {"seed": 0}, {})
    with pytest.raises(BadInput, match="star-0.mp4: not a readable video .it has 5 of 8 frames"):
        evaluated(tmp_path, "--videos", videos)
    (videos / "star-0.mp4").write_bytes((videos / "star-0.mp4").read_bytes()[:400])
    with pytest.raises(BadInput, match="star-0.mp4: not a readable video"):
        evaluated(tmp_path, "--videos", videos)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Files with the names and shapes of the real weights of CLIP and DINO, and random values."""
    folder = tmp_path_factory.mktemp("towers")
    with torch.device("meta"):
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu"))
        dino = timm.create_model("vit_small_patch16_224", num_classes=0)
    torch.manual_seed(0)
    for name, model in (("clip", clip), ("dino", dino)):
        state = {key: (0.02 * torch.randn(x.shape)).half() for key, x in model.state_dict().items()}
        save_file(state, folder / f"{name}.safetensors")
    return folder


def test_weights_by_their_real_names(towers, tmp_path):
    """A file with the hub's names and shapes is taken. Others are refused in one line, and none is run."""
    dino = load_dino(towers / "dino.safetensors", "cpu")
    state = dino.model.state_dict()
    assert len(state) == 150 and state["patch_embed.proj.weight"].shape == (384, 3, 16, 16)
    assert state["norm.bias"].abs().sum() > 0 and state["norm.bias"].dtype == torch.float32
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    assert dino.images([picture]).norm(dim=1).item() == pytest.approx(1, abs=1e-5)
    del state["norm.bias"]
    save_file(state, tmp_path / "short.safetensors")
    torch.save(Bomb(), tmp_path / "bomb.pt")
    (tmp_path / "empty.safetensors").touch()
    for file, reason in (("short.safetensors", ".*norm.bias"), ("bomb.pt", ""), ("empty.safetensors", ""),
                         ("missing.pt", "")):
        with pytest.raises(BadInput, match=f"--dino .*{file}: not the weights{reason}") as error:
            load_dino(tmp_path / file, "cpu")
        assert "\n" not in str(error.value)
    assert not Path("exploded").exists()
    with pytest.raises(BadInput, match="--clip .*dino.safetensors: not the weights of this model"):
        load_clip(towers / "dino.safetensors", "cpu")


def test_refusals(tmp_path, photos_folder, clip, monkeypatch):
    videos = write_videos(tmp_path / "v", [], {0: clip})
    refusals = [
        (["--videos", tmp_path / "none"], "none: has no video"),
        (["--videos", videos, tmp_path], "has no video with its JSON"),
        (["--videos", videos, "--clip", tmp_path / "x.pt"], "--clip .*x.pt: not the weights")]
    for flags, reason in refusals:
        argv = ["evaluate.py", *flags, "--images", photos_folder]
        monkeypatch.setattr("sys.argv", list(map(str, argv)))
        with pytest.raises(BadInput, match=reason):
            evaluate.main()
    done = run("paper/evaluate.py", "--videos", videos, "--images", tmp_path / "none", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--images" in done.stderr, done.stderr


# ------------------------------------------------------------------------------------------------------------
# The protocol in paper/README.md


def test_prompts_of_the_protocol():
    for name in ("animals", "objects"):
        lines = (ROOT / "paper" / "prompts" / f"{name}.txt").read_text().splitlines()
        prompts = [line for line in lines if not line.startswith("#")]
        assert len(prompts) == 10 and all("a V* {class word} " in prompt for prompt in prompts)


def test_the_protocol(base_folder, photos_folder, towers, tmp_path, monkeypatch):
    """Its block of shell, on two prompts: one training is continued, one is new, one has been finished."""
    monkeypatch.chdir(tmp_path)
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in ("support", "toy"):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(ROOT / "paper", tmp_path / "paper")
    animals = tmp_path / "paper" / "prompts" / "animals.txt"
    animals.write_text("".join(animals.read_text().splitlines(keepends=True)[:3]))
    name = "pet_dog 1 \N{SNOWMAN}"
    photos = shutil.copytree(photos_folder, tmp_path / "photos" / name)
    (photos / "CLASS").write_text("dog\n")

    begun = ["dreamvideo", "--base", base_folder, "--images", photos, "--class_word", "dog", "--steps", 1,
             "--word_steps", 1, "--out", f"runs/paper/{name} dreamvideo"]
    monkeypatch.setattr("sys.argv", ["baselines.py", *map(str, begun)])
    baselines.main()
    readme = (ROOT / "paper" / "README.md").read_text()
    block = re.search(r"## Protocol\n+```sh\n(.*?)```", readme, re.DOTALL)[1]
    script = re.sub(r"^[A-Z_]+=.*\n", "", block, flags=re.MULTILINE)
    variables = {"BASE": base_folder, "STEPS": 2, "PHOTOS": "photos", "TRAIN": "python",
                 "METHODS": "dreamvideo constant dreamvideo", "DREAMVIDEO": "--steps 2 --word_steps 1",
                 "TOWERS": f"--clip {towers / 'clip.safetensors'} --dino {towers / 'dino.safetensors'}",
                 "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": 1}
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    done = subprocess.run(["bash", "-c", script], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr

    for method in ("dreamvideo", "customcrafter"):
        assert len(Path(f"runs/paper/{name} {method}/log.jsonl").read_text().splitlines()) == 2
    assert done.stdout.count("wrote nothing") == 1
    content = json.loads(Path(f"outputs/paper/{name}/evaluation.json").read_text())
    rows = {(Path(row["folder"]).name, row["text"]): row for row in content["videos"]}
    texts = "a dog running across a meadow", "a dog swimming in a lake"
    assert set(rows) == {(method, text) for method in ("dreamvideo", "constant") for text in texts}
    assert all(row["subjects"] == "dog" and -1 < row["CLIP-T"] < 1 for row in rows.values())
