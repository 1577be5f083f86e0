"""The metrics against NumPy, with small random towers; the table; the protocol."""
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from makers import ROOT, Bomb
from paper import baselines, evaluate
from paper.evaluate import Tower, consistency, cosines, motion
from support.video import save_video
from toy.world import draw_clip, random_scene

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def small_tower(path=None, device="cpu"):
    """CLIP's own classes with random weights, one narrow layer each."""
    torch.manual_seed(0)
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 56, "image_size": 224}
    model = open_clip.CLIP(16, vision, {"layers": 1, "width": 32, "heads": 2})
    tokenizer = open_clip.get_tokenizer("ViT-B-32-quickgelu")
    return Tower(model, model.encode_image, device, 256, MEAN, STD, tokenizer)


@pytest.fixture(scope="module")
def clip():
    return draw_clip(random_scene(np.random.default_rng(3)))


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


def test_metrics_against_numpy(clip):
    tower = small_tower()
    pictures = [np.random.default_rng(i).integers(0, 256, (48, 64 + i, 3), dtype=np.uint8) for i in range(3)]
    both = clip, pictures
    our_frames, our_photos = (tower.images([Image.fromarray(x) for x in images]) for images in both)
    frames, photos = (np.stack([numpy_features(tower, x) for x in images]) for images in both)
    with torch.no_grad():
        text = tower.model.encode_text(tower.tokenizer(["a red star"]))[0].double().numpy()
    text = text / np.sqrt((text ** 2).sum())
    assert cosines(our_photos, our_frames) == pytest.approx((photos @ frames.T).mean(), abs=1e-5)
    assert cosines(tower.text("a red star"), our_frames) == pytest.approx((frames @ text).mean(), abs=1e-5)
    neighbours = (frames[1:] * frames[:-1]).sum(axis=1)
    assert consistency(our_frames) == pytest.approx(neighbours.mean(), abs=1e-5)


def test_motion_is_how_far_a_texture_was_pushed():
    texture = np.random.default_rng(0).integers(0, 256, (64, 200, 3), dtype=np.uint8)
    pushed = lambda step: np.stack([texture[:, step * t:step * t + 128] for t in range(5)])
    assert motion(pushed(0)) == motion(pushed(3) // 100) == 0   # the second is below 2 grey levels
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


def write_videos(folder, subjects, clips):
    """Seed -> clip become FOLDER/star-SEED.mp4, each with sample.py's JSON. Returns the folder."""
    folder.mkdir()
    prompt = "a V* star moving left" if subjects else "a star moving left"
    for seed, video in clips.items():
        job = {"prompt": prompt, "seed": seed, "subjects": subjects, "frames": len(video), "compare": False}
        save_video(folder / f"star-{seed}", video, ["mp4"], 8, job, {})
    return folder


def test_the_table_of_two_folders(clip, photos_folder, tmp_path, call, monkeypatch):
    """A moving folder, and a frozen one of the base, which is given twice and counts once."""
    monkeypatch.setattr(evaluate, "load_clip", small_tower)
    monkeypatch.setattr(evaluate, "load_dino", small_tower)
    subjects = [{"placeholder": "V*", "class_word": "star"}]
    moving = write_videos(tmp_path / "moving", subjects, {0: clip, 1: clip[::-1]})
    frozen = write_videos(tmp_path / "frozen", [], {0: clip[[0] * 8], 5: clip[:1]})
    (moving / "strange.json").write_text("[]")
    job = {"prompt": "a star", "seed": 0, "subjects": [], "compare": True}
    save_video(moving / "wide", clip, ["mp4"], 8, job, {})
    printed = call(evaluate, "--videos", frozen, moving, frozen, "--images", photos_folder,
                   "--out", tmp_path / "out")
    assert "wide.json: shows several videos side by side" in printed.err
    table = [line for line in printed.out.splitlines() if line.startswith("|")]
    assert len(table) == 4 and str(frozen) in table[2] and str(moving) in table[3]

    content = json.loads((tmp_path / "out" / "evaluation.json").read_text(), parse_constant=pytest.fail)
    rows = {(row["folder"], row["seed"]): row for row in content["videos"]}
    assert list(rows) == [(str(frozen), 0), (str(frozen), 5), (str(moving), 0), (str(moving), 1)]
    assert all(row["text"] == "a star moving left" for row in rows.values())
    of_frozen, of_one_frame, of_moving, of_backwards = rows.values()
    assert of_frozen["T.Cons"] == pytest.approx(1, abs=1e-3) and of_frozen["motion"] == 0
    assert of_one_frame["T.Cons"] is of_one_frame["motion"] is None
    assert of_moving["motion"] == motion(iio.imread(moving / "star-0.mp4", plugin="FFMPEG")) > 1
    values = [of_moving["CLIP-I"], of_backwards["CLIP-I"]]
    assert f"{np.mean(values):.3f} ± {np.std(values) / 2 ** 0.5:.3f}" in table[3]


def test_refusals(clip, photos_folder, tmp_path, call, monkeypatch):
    """Each is one line, and nothing in a file is run."""
    def refused(*flags):
        *_, line = call(evaluate, "--images", photos_folder, "--videos", *flags, code=2).err.splitlines()
        return line     # the last one, after the progress bar's

    videos = write_videos(tmp_path / "videos", [], {0: clip})
    assert "missing: has no video" in refused("missing")
    assert f"{tmp_path}: has no video with its JSON" in refused(videos, tmp_path)
    assert "--images" in refused(videos, "--images", "missing")
    (videos / "star-0.mp4").rename("star-0.mp4")
    assert "star-0.mp4: no such file; sample it again with --format mp4" in refused(videos)
    Path("star-0.mp4").rename(videos / "star-0.mp4")
    save_file({"norm.weight": torch.ones(384)}, "short.safetensors")
    assert "--clip short.safetensors: not the weights" in refused(videos, "--clip", "short.safetensors")
    monkeypatch.setattr(evaluate, "load_clip", small_tower)
    torch.save(Bomb(), "bomb.pt")
    assert "--dino bomb.pt: not the weights" in refused(videos, "--dino", "bomb.pt")
    assert not Path("exploded").exists()
    monkeypatch.setattr(evaluate, "load_dino", small_tower)
    save_video(videos / "star-0", clip[:5], ["mp4"], 8, json.loads((videos / "star-0.json").read_text()), {})
    assert "star-0.mp4: not a readable video (it has 5 of 8 frames" in refused(videos)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nothing")
    assert "--videos: needs ffmpeg" in refused(videos)


def test_the_protocol(base_folder, photos_folder, tmp_path, monkeypatch, call):
    """The README's block, on two prompts: one training is continued, one is new, one has been finished.

    bash hands each of its `python` commands to this process, and waits. The files of CLIP and DINO have the
    real weights' names and shapes, and random values.
    """
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "paper" / "prompts", "paper/prompts")
    for path in Path("paper/prompts").iterdir():
        lines = path.read_text().splitlines()
        prompts = [line for line in lines if not line.startswith("#")]
        assert len(prompts) == 10 and all("a V* {class word} " in prompt for prompt in prompts)
        path.write_text("\n".join(lines[:3]))
    name = "pet_dog 1 \N{SNOWMAN}"
    photos = shutil.copytree(photos_folder, Path("photos") / name)
    (photos / "CLASS").write_text("dog\n")
    call(baselines, "dreamvideo", "--base", base_folder, "--images", photos, "--class_word", "dog",
         "--steps", 1, "--word_steps", 1, "--out", f"runs/paper/{name} dreamvideo")

    with torch.device("meta"):
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu"))
        dino = timm.create_model("vit_small_patch16_224", num_classes=0)
    for tower, model in (("clip", clip), ("dino", dino)):
        state = {key: (0.02 * torch.randn(x.shape)).half() for key, x in model.state_dict().items()}
        save_file(state, f"{tower}.safetensors")

    readme = (ROOT / "paper" / "README.md").read_text()
    block = re.search(r"## Protocol\n+```sh\n(.*?)```", readme, re.DOTALL)[1]
    block = re.sub(r"^[A-Z_]+=.*\n", "", block, flags=re.MULTILINE)
    python = "python() { local IFS=$'\t'; echo \"$*\"; read -r; }\n"
    variables = {"BASE": str(base_folder), "STEPS": "2", "PHOTOS": "photos", "TRAIN": "python",
                 "METHODS": "dreamvideo constant dreamvideo", "DREAMVIDEO": "--steps 2 --word_steps 1",
                 "TOWERS": "--clip clip.safetensors --dino dino.safetensors"}
    printed = ""
    with subprocess.Popen(["bash", "-c", python + block], env=os.environ | variables, encoding="utf-8",
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as bash:
        for command in bash.stdout:
            script, *flags = command.rstrip("\n").split("\t")
            printed += call(import_module(script.removesuffix(".py").replace("/", ".")), *flags).out
            bash.stdin.write("\n")
            bash.stdin.flush()
    assert bash.returncode == 0

    for method in ("dreamvideo", "customcrafter"):
        assert len(Path(f"runs/paper/{name} {method}/log.jsonl").read_text().splitlines()) == 2
    assert printed.count("wrote nothing") == 1
    content = json.loads(Path(f"outputs/paper/{name}/evaluation.json").read_text())
    rows = {(Path(row["folder"]).name, row["text"]): row for row in content["videos"]}
    texts = "a dog running across a meadow", "a dog swimming in a lake"
    assert set(rows) == {(method, text) for method in ("dreamvideo", "constant") for text in texts}
    for row in rows.values():
        assert -1 < row["CLIP-T"] < 1 and -1 < row["DINO-I"] < 1
