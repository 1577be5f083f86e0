"""What people do with such a project: folders as they come, logs, missing tools, two trainings at once."""
import io
import os
import shutil
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import files
import runs
import sample
import train
from cli import BadInput, Progress
from data import Photo, load_prior, subject_sample
from files import find_subjects, load_picture, save_subject, warn_of_photos
from lora import MergedLoRA
from makers import fork, random_subject, wait
from paper import protocol
from paper.baselines import CustomDiffusion
from texts import check_placeholder, check_prompts, read_caption, read_prompts
from video import labelled, read_video, write_mp4


def ramp(w, h, axis=1):
    """A picture whose grey grows along one side, from 0 to 255."""
    line = np.linspace(0, 255, (h, w)[axis])
    grey = np.broadcast_to(line if axis else line[:, None], (h, w))
    return Image.fromarray(np.repeat(grey[..., None], 3, 2).astype(np.uint8))


@pytest.fixture()
def start(base_folder, photos_folder, tmp_path):
    """Starts a short training of tmp_path/photos, in a child -> its pid."""
    shutil.copytree(photos_folder, tmp_path / "photos")

    def start(*flags, before=None, output="output"):
        argv = ["train.py", "--base", base_folder, "--class_word", "dog", "--steps", 1, "--preview_every", 0]
        argv += flags if "--images" in flags else ["--images", "photos", *flags]
        return fork(train.main, argv, tmp_path, before, output)
    return start


# ------------------------------------------------------------------------------------------------------------
# Photos and captions


@pytest.mark.parametrize("ending", [".txt", ".TXT", ".caption", ".PNG.txt"])
def test_captions_by_all_names_in_use(tmp_path, ending):
    (tmp_path / f"a{ending}").write_text("a V* dog\n")
    assert read_caption(tmp_path / "a.PNG") == "a V* dog"
    assert read_caption(tmp_path / "b.PNG") == ""


def test_the_first_lines_count_photos_and_captions(start, tmp_path):
    (tmp_path / "photos" / "2.caption").write_text("a V* dog on grass")
    (tmp_path / "photos" / "3.txt").write_text("a V* dog of a photo that was deleted")
    assert wait(start("--alpha", 0)) == 0
    lines = (tmp_path / "output").read_text().splitlines()
    assert "3 photos of V* dog, 2 with a caption" in lines[0]
    assert [line for line in lines if "3.txt" in line] == [
        "warning: photos: 3.txt: left out: no photo has this name, or it has another caption"]


def test_a_photo_that_the_frame_hardly_holds_is_named_once(tmp_path, capsys):
    sizes = {"portrait.jpg": (900, 1200), "wide.jpg": (2400, 700), "fits.jpg": (1600, 1000),
             "half.jpg": (800, 1000), "flat.jpg": (700, 300)}
    photos = [Photo(Image.new("RGB", size), "", tmp_path / name, 0) for name, size in sizes.items()]
    warn_of_photos(photos, 320, 512)
    small, cut = capsys.readouterr().err.splitlines()
    assert small.startswith(f"warning: {tmp_path}: flat.jpg: smaller than the frame of 512x320")
    assert cut.startswith(f"warning: {tmp_path}: portrait.jpg, wide.jpg: the frame of 512x320")
    assert "--height and --width" in cut


def test_many_named_photos_stay_one_line(tmp_path, capsys):
    photos = [Photo(Image.new("RGB", (9, 9)), "", tmp_path / f"{i}.png", 0) for i in range(30)]
    warn_of_photos(photos, 32, 32)
    line, = capsys.readouterr().err.splitlines()
    assert "4.png and 25 more" in line and "5.png" not in line.replace("25 more", "")


def test_prompts_of_other_programs_and_long_negative_prompts_are_named(tmp_path, capsys):
    (tmp_path / "p").write_text("a V* dog --n low quality --w 512\na V* dog - running\n# a V* dog --n x\n")
    assert len(read_prompts(tmp_path / "p")) == 2
    warning, = capsys.readouterr().err.splitlines()
    assert "'a V* dog --n low quality --w 512' holds flags" in warning
    check_prompts(["bad " * 80], [], "--negative_prompt")
    assert "--negative_prompt: only 75 tokens are read" in capsys.readouterr().err
    with pytest.raises(BadInput, match="does not begin with #"):
        check_placeholder("#dog")


@pytest.mark.parametrize("make_sample", [None, CustomDiffusion.make_sample])
def test_no_flip_never_mirrors(make_sample):
    photos = [Photo(ramp(48, 32), "", None, 0)]
    grows = {}
    for flip in (True, False):
        frames = [subject_sample(photos, i, 0, 32, 48, 8, "V* dog", make_sample, flip)[0] for i in range(60)]
        # Of a photo that lies small on grey, the frame's columns are those that are not grey.
        ends = [frame[0][:, frame[0].abs().amax(0) > 0][:, [0, -1]].mean(0) for frame in frames]
        grows[flip] = sum(bool(first < last) for first, last in ends)
    assert grows[False] == 60 and 15 < grows[True] < 45


def test_no_flip_on_the_command_line(start, tmp_path):
    def no_mirror():
        def refuse(image):
            raise ValueError("mirrored")
        data.ImageOps.mirror = refuse

    flags = ["--alpha", 0, "--batch_size", 8, "--out", "run"]
    assert wait(start(*flags, before=no_mirror)) == 1
    assert "mirrored" in (tmp_path / "output").read_text()
    assert wait(start(*flags, "--no_flip", before=no_mirror)) == 0
    assert wait(start("--alpha", 0, "--batch_size", 8, "--resume", "run", "--steps", 2)) == 2
    assert "--no_flip: is False, and was True" in (tmp_path / "output").read_text()


@pytest.mark.parametrize("axis", [0, 1])
def test_prior_crops_lie_along_all_of_the_longer_side(tmp_path, axis):
    for i in range(40):
        ramp(*((256, 32) if axis else (32, 256)), axis).save(tmp_path / f"{i}.png")
    means = [video.mean().item() for video, *_ in load_prior(tmp_path, 40, 1, 32, 32)]
    assert min(means) < -0.75 and max(means) > 0.75  # centred crops all have 0; the ends have -0.87 and 0.87
    assert means == [video.mean().item() for video, *_ in load_prior(tmp_path, 40, 1, 32, 32)]


def test_a_prior_video_keeps_its_crop_and_a_picture_that_fits_is_whole(tmp_path):
    write_mp4(tmp_path / "a.mp4", np.stack([np.asarray(ramp(256, 32))] * 3), 8, quality=10)
    ramp(48, 32).save(tmp_path / "b.png")
    (still, *_), = load_prior(tmp_path, 1, 3, 32, 32)
    assert still.shape == (3, 3, 32, 32) and (still - still[:1]).abs().max() < 0.05
    (tmp_path / "a.mp4").unlink()
    (whole, *_), = load_prior(tmp_path, 1, 3, 32, 48)
    assert torch.equal(whole[0], data.pixels(ramp(48, 32)))


@pytest.mark.parametrize("size", [(12_000, 9_000), (16_320, 12_240)])
def test_phone_photos_are_scaled_down_while_they_are_decoded(tmp_path, monkeypatch, size):
    Image.new("L", size, 200).save(tmp_path / "phone.jpg", quality=50)
    decoded = []
    real = files.in_srgb

    def note(image, profile):
        decoded.append(image)
        return real(image, profile)

    monkeypatch.setattr(files, "in_srgb", note)
    image = load_picture(tmp_path / "phone.jpg", 512)
    assert min(image.size) == 1024 and image.getpixel((9, 9)) == (200, 200, 200)
    assert decoded[0].width <= size[0] / 4


def test_a_linked_folder_names_the_run_as_typed(tmp_path, monkeypatch):
    (tmp_path / "IMG_2041").mkdir()
    (tmp_path / "rex").symlink_to("IMG_2041")
    monkeypatch.chdir(tmp_path)
    here = tmp_path.name
    typed = {"rex": "rex", "rex/": "rex", "./IMG_2041": "IMG_2041", "rex/..": here, ".": here}
    for images, name in typed.items():
        assert runs.default_run(images) == runs.Path("runs") / name


# ------------------------------------------------------------------------------------------------------------
# What is there already


def test_a_deleted_prior_picture_is_made_again(start, tmp_path):
    assert wait(start("--out", "deep/first")) == 0
    prior, = (tmp_path / "deep" / "prior").iterdir()  # beside --out: nothing of it is in the working folder
    assert not (tmp_path / "runs").exists()
    deleted, kept = np.asarray(Image.open(prior / "0001.png")), (prior / "0000.png").stat()
    (prior / "0001.png").unlink()
    (prior / "prior.json").unlink()
    assert wait(start("--out", "deep/second")) == 0
    assert sorted(path.name for path in prior.iterdir()) == ["0000.png", "0001.png", "prior.json"]
    assert (prior / "0000.png").stat().st_mtime_ns == kept.st_mtime_ns
    again = np.asarray(Image.open(prior / "0001.png"))  # alone in its batch, so up to rounding
    assert np.abs(again.astype(int) - deleted).max() <= 1


@pytest.mark.parametrize("refused, place", [("", "exp"), ("exp", "exp/dog"), ("exp/prior", "exp/dog")])
def test_the_prior_lies_beside_out_or_in_it(base, tmp_path, monkeypatch, refused, place):
    """root may write everywhere, so what may not be written to is made up."""
    (tmp_path / "exp" / "prior").mkdir(parents=True)
    access = os.access
    refuses = tmp_path / refused if refused else None
    monkeypatch.setattr(os, "access", lambda path, mode: path != refuses and access(path, mode))
    if refused == "exp":
        (tmp_path / "exp" / "prior").rmdir()
    folder, _ = runs.prior_folder(tmp_path / "exp" / "dog", base, base.config.sampling, "dog")
    assert folder.parent == tmp_path / place / "prior"


def test_a_working_folder_that_is_read_only_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(BadInput, match=f"--out runs/dog: {tmp_path} may not be written to"):
        runs.pick_run(None, "", runs.Path("runs/dog"), [])


def test_the_protocol_makes_a_deleted_subject_again(start, tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "long"
    assert wait(start("--alpha", 0, "--out", folder)) == 0
    before = (folder / "subject.safetensors").read_bytes()
    (folder / "subject.safetensors").unlink()
    asked = []
    monkeypatch.setattr(protocol, "command", lambda *words, **more: asked.append(words[-2:]))
    protocol.train_subjects(Namespace(out=tmp_path, base=None), {"long": {"steps": 1}})
    assert asked == [("--resume", folder)]
    assert wait(start("--alpha", 0, "--resume", folder)) == 0
    assert (folder / "subject.safetensors").read_bytes() == before
    protocol.train_subjects(Namespace(out=tmp_path, base=None), {"long": {"steps": 1}})
    assert len(asked) == 1


def test_previews_are_sorted_as_numbers(tmp_path):
    for step, grey in ((1_000_000, 250), (999_999, 0)):
        runs.save_preview(tmp_path, step, np.full((1, 4, 32, 32, 3), grey, np.uint8), "")
    rows = np.asarray(Image.open(tmp_path / "preview.png").convert("L"))
    assert rows[len(rows) // 2 - 10, 9] == 0 and rows[-10, 9] == 250


def test_a_newer_subject_that_is_not_taken_is_named(base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    right, other, broken = (tmp_path / "runs" / name / "subject.safetensors"
                            for name in ("exp1/dog", "exp2/dog", "cat"))
    save_subject(right, random_subject(base))
    assert find_subjects([], base.config.fingerprint) == [right.relative_to(tmp_path)]  # however deep
    assert capsys.readouterr().err == ""
    subject = random_subject(base)
    subject.base_fingerprint = "another"
    save_subject(other, subject)
    os.utime(right, (1, 1))
    os.utime(other, (2, 2))
    assert find_subjects([], base.config.fingerprint) == [right.relative_to(tmp_path)]
    said = "runs/exp2/dog/subject.safetensors is newer, but of another base, so runs/exp1/dog/"
    assert said in capsys.readouterr().err
    broken.parent.mkdir()
    broken.write_bytes(b"not a subject")
    find_subjects([], base.config.fingerprint)
    assert "runs/cat/subject.safetensors is newer, but not readable" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# Two at once


def test_the_second_training_of_a_class_waits_for_the_prior_and_uses_it(start, tmp_path):
    shutil.copytree(tmp_path / "photos", tmp_path / "others")

    def slow():
        save = train.save_prior_clip
        train.save_prior_clip = lambda *args: (time.sleep(1), save(*args))

    def makes_none():
        train.generate = lambda *args, **more: 1 / 0

    first = start(before=slow)
    end = time.time() + 60
    while not list(tmp_path.glob("runs/prior/*/.writer.lock")):
        assert time.time() < end
        time.sleep(0.01)
    second = start("--images", "others", before=makes_none, output="output-2")
    assert wait(first) == 0 and wait(second) == 0
    assert "another run makes this prior; waiting" in (tmp_path / "output-2").read_text()
    assert (tmp_path / "runs" / "others" / "subject.safetensors").exists()


# ------------------------------------------------------------------------------------------------------------
# No ffmpeg


BROKEN = "#!/bin/sh\ncase \"$*\" in *-version*) exit 0;; esac\nexit 1\n"     # starts, and writes no video


def test_a_missing_ffmpeg_is_found_before_sampling(base_folder, tmp_path):
    def nothing():
        os.environ["IMAGEIO_FFMPEG_EXE"] = "/nothing"
        sample.load_base = lambda *args: pytest.fail("sampled")

    argv = ["sample.py", "--base", base_folder, "--subject", "none", "--prompt", "a dog"]
    assert wait(fork(sample.main, argv, tmp_path, nothing)) == 2
    line, = (tmp_path / "output").read_text().splitlines()
    assert line.startswith("error: --format mp4: needs ffmpeg") and "--format gif" in line
    assert "unset IMAGEIO_FFMPEG_EXE" in line and not (tmp_path / "outputs").exists()


def test_moving_priors_need_ffmpeg_before_they_are_made(start, tmp_path):
    nothing = lambda: os.environ.update(IMAGEIO_FFMPEG_EXE="/nothing")
    assert wait(start("--prior_motion", before=nothing)) == 2
    assert "error: --prior_motion: needs ffmpeg" in (tmp_path / "output").read_text()
    assert not (tmp_path / "runs").exists()


def test_an_mp4_that_fails_is_one_line_and_the_gif_stays(base_folder, tmp_path):
    (tmp_path / "ffmpeg").write_text(BROKEN)
    (tmp_path / "ffmpeg").chmod(0o755)
    broken = lambda: os.environ.update(IMAGEIO_FFMPEG_EXE=str(tmp_path / "ffmpeg"))
    argv = ["sample.py", "--base", base_folder, "--subject", "none", "--prompt", "a dog", "--seed", 1]
    assert wait(fork(sample.main, argv, tmp_path, broken)) == 2
    error = (tmp_path / "output").read_text().splitlines()[-1]
    assert "mp4: ffmpeg did not write all 3 frames" in error and "--format gif" in error
    assert error.startswith("error: outputs/") and ".tmp-" not in error
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["a-dog-1.gif"]


def test_a_video_is_not_blamed_for_a_missing_ffmpeg(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    write_mp4(path, np.zeros((2, 32, 32, 3), np.uint8), 8, quality=8)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nothing")
    with pytest.raises(BadInput, match="a.mp4: needs ffmpeg"):
        read_video(path)


# ------------------------------------------------------------------------------------------------------------
# Logs and labels


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_plain_lines_where_there_is_no_terminal(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(Progress, "every", 0.05)
    with Progress(desc="train", unit="step", total=4, file=stream) as bar:
        for _ in range(4):
            time.sleep(0.11)
            bar.set_postfix(loss="0.5", refresh=False)
            bar.update()
    lines = stream.getvalue().splitlines()
    assert "\r" not in stream.getvalue() and 2 <= len(lines) <= 5 and "" not in lines
    assert all(line.startswith("train: ") for line in lines)
    assert lines[-1].startswith("train: 4/4 [") and "loss=0.5" in lines[-1]


def test_progress_is_rare_and_ends_with_the_last_number(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    assert list(Progress(range(1000), desc="prior", file=stream)) == list(range(1000))
    list(Progress([], desc="nothing", file=stream))
    line, = stream.getvalue().splitlines()
    assert line.startswith("prior: 1000/1000 [")


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    list(Progress(range(3), desc="prior", file=stream))
    assert "\rprior: 100%" in stream.getvalue()


def test_a_log_has_no_carriage_return(start, tmp_path):
    assert wait(start()) == 0
    text = (tmp_path / "output").read_bytes()
    assert b"\r" not in text and b"train: 1/1 [" in text


def test_labels_show_letters_that_the_font_has():
    image = [Image.new("RGB", (96, 64))]
    cases = [("step 5: a V* собака", "step 5: a V* "), ("café naïve", "cafe naive"), ("犬", "")]
    for label, shown in cases:
        assert labelled(image, label).tobytes() == labelled(image, shown).tobytes()
    assert labelled(image, "a").tobytes() != labelled(image, "").tobytes()


# ------------------------------------------------------------------------------------------------------------
# Other programs


def test_a_subjects_file_is_pefts_after_the_readmes_renaming(base, tmp_path):
    """PEFT wraps a model as base_model.model, and adds (alpha / rank) B A to a layer's weight."""
    subject = random_subject(base)
    save_subject(tmp_path / "subject.safetensors", subject)
    tensors = load_file(tmp_path / "subject.safetensors")
    del tensors["v_star"]
    tensors = {f"base_model.model.{name.removeprefix('unet.')}": x for name, x in tensors.items()}
    layers = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    wrapped = torch.nn.ModuleDict({"base_model": torch.nn.ModuleDict({"model": base.unet})})
    ours = MergedLoRA(base.unet, subject)
    ours.set(1.0)
    expected = {layer: wrapped.get_submodule(layer).weight.clone() for layer in layers}
    ours.set(0)
    assert len(layers) == len(subject.updates) and 2 * len(layers) == len(tensors)
    for layer in layers:
        linear = wrapped.get_submodule(layer)
        update = tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"]
        assert torch.allclose(linear.weight + update, expected[layer], atol=1e-6)
        assert not torch.allclose(linear.weight, expected[layer], atol=1e-3)


def test_an_out_that_holds_another_run_is_no_branch(start, tmp_path, monkeypatch):
    for name in ("a", "b"):
        assert wait(start("--alpha", 0, "--out", name)) == 0
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="--out b: holds another run"):
        runs.pick_run(runs.Path("b"), "a", runs.Path("runs/dog"), [])


def test_a_node_with_a_part_of_the_prior_is_refused(tmp_path):
    """Two nodes that share no folder make a half each."""
    with pytest.raises(BadInput, match="has 1 of the prior's 2 files"):
        with runs.prior_writer(tmp_path / "prior", {"class_word": "dog"}, 1, 2):
            (tmp_path / "prior").mkdir()
            ramp(48, 32).save(tmp_path / "prior" / "0001.png")
