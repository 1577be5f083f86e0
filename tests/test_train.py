"""Subject learning through the command line: what is written, what is learned, and that processes agree."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import sample
import train
from data import crop, load_photos, noise_sample, still_video
from lora import MergedLoRA
from makers import fork, fork_ranks, run, torchrun, wait, write_base
from model import Tokenizer
from support.cli import Process
from support.config import TrainingDefaults
from support.files import load_base, load_subject
from train import SubjectLoss


@pytest.fixture()
def flags(base_folder, photos_folder):
    return ["--base", base_folder, "--images", photos_folder, "--class_word", "dog"]


@pytest.fixture()
def train_on(flags, tmp_path):
    """Runs train.py on `world` processes, forked ones, in tmp_path."""
    def train_on(world, *more):
        argv = ["train.py", *flags, *more]
        if world == 1:
            pids = [fork(train.main, argv, tmp_path)]
        else:
            pids = fork_ranks(world, train.main, argv, tmp_path)
        codes = [wait(pid) for pid in pids]
        assert codes == [0] * world, (tmp_path / "output").read_text()
    return train_on


def learned(folder):
    return load_file(folder / "subject.safetensors")


def assert_close(a, b):
    """The subjects of two runs differ only by the order in which their gradients were added up.

    Losses and gradient norms in log.jsonl are means over processes, so they are the same too.
    """
    one, two = learned(a), learned(b)
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=0, atol=1e-5), name
    one, two = log(a), log(b)
    assert max(one) == max(two)
    for step in one.keys() & two.keys():
        for name in ("loss", "prior_loss", "grad_norm"):
            assert one[step][name] == pytest.approx(two[step][name], rel=1e-4), (step, name)


def log(folder):
    """Step -> its line in log.jsonl."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines}


def test_train_then_sample(flags, base, base_folder, photos_folder, tmp_path):
    done = run("train.py", *flags, "--steps", 3, "--batch_size", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = f"runs/{photos_folder.name}/subject.safetensors"
    lines = done.stdout.splitlines()
    assert "tiny0" in lines[0] and "3 photos of V* dog" in lines[1] and lines[-1] == f"wrote {out}"
    subject = load_subject(tmp_path / out, base)
    assert subject.steps == 3 and subject.settings["clips_per_step"] == 2
    assert all(B.abs().sum() > 0 for _, B in subject.lora.values())
    assert len(list((tmp_path / "runs" / "prior").glob("*/*.png"))) == 2    # --num_prior of this base
    done = run("sample.py", "--base", base_folder, cwd=tmp_path)
    assert done.returncode == 0 and out in done.stdout.splitlines()[1]


# ------------------------------------------------------------------------------------------------------------
# The number of processes, and how a step's clips are shared, do not matter


def test_torchrun_with_two_processes_equals_one(flags, train_on, tmp_path):
    train_on(1, "--steps", 3, "--batch_size", 2, "--out", "one")
    done = run("train.py", *flags, "--steps", 3, "--out", "two", cwd=tmp_path, launcher=torchrun(2))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert_close(tmp_path / "one", tmp_path / "two")


def test_one_two_and_four_processes_agree(train_on, tmp_path):
    """The same four clips per step give the same subject after 20 steps, also when a run moves."""
    common = ["--steps", 20, "--preview_every", 0, "--scale_lr", "--lr", 1.25e-4]
    train_on(1, *common, "--out", "one", "--batch_size", 4)
    train_on(2, *common, "--out", "two", "--grad_accum", 2, "--grad_checkpointing")
    train_on(4, *common, "--out", "four", "--save_every", 12)
    four = tmp_path / "four" / "step-000012"
    train_on(1, *common, "--out", "moved", "--resume", four, "--batch_size", 2, "--grad_accum", 2)
    for out in ("two", "four", "moved"):
        assert_close(tmp_path / "one", tmp_path / out)


# ------------------------------------------------------------------------------------------------------------
# What is learned


def test_same_seed_same_subject(train_on, tmp_path):
    for out, seed in [("a", 0), ("b", 0), ("c", 1)]:
        train_on(1, "--steps", 2, "--alpha", 0, "--seed", seed, "--out", out)
    a, b, c = (learned(tmp_path / out) for out in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a) and not torch.equal(a["v_star"], c["v_star"])
    assert not list(tmp_path.rglob("prior"))                                # alpha 0 makes no prior


def test_a_subject_is_learned(train_on, base, photos_folder, tmp_path):
    """On noise from outside the training run, the loss on the photos falls."""
    train_on(1, "--steps", 50, "--alpha", 0, "--lr", 1e-2, "--batch_size", 2, "--out", "out",
             "--preview_every", 0)
    subject = load_subject(tmp_path / "out" / "subject.safetensors", base)
    merged = MergedLoRA(base.unet, [subject])
    photos = load_photos(photos_folder, 32, 48, "V*", "dog")
    images = torch.stack([crop(photo.image, 32, 48) for photo in photos])

    @torch.no_grad()
    def loss():
        z_0 = still_video(base.vae.encode(images), 3)
        context = base.text_encoder(Tokenizer(["V*"])(["a V* dog"]), subject.v_star).expand(3, -1, -1)
        total = 0
        for i in range(20):
            level, eps = noise_sample(i, 12345, z_0.shape)
            t = torch.full((3,), level)
            predicted = base.unet(base.schedule.add_noise(z_0, t, eps), t, torch.full((3,), 8), context)
            total += (predicted - eps).pow(2).mean().item()
        return total / 20

    before = loss()
    merged.set(1.0)
    assert loss() < 0.95 * before


@pytest.fixture()
def batches(monkeypatch):
    """The batches that SubjectLoss gets, while train.py runs in this process."""
    batches = []

    class WatchedLoss(SubjectLoss):
        def forward(self, *batch):
            batches.append(batch)
            return super().forward(*batch)

    monkeypatch.setattr(train, "SubjectLoss", WatchedLoss)
    return batches


@pytest.mark.parametrize("prior_motion", [False, True])
def test_training_has_frames_of_its_own(call, flags, batches, monkeypatch, prior_motion):
    """--frames 2 are of the subject's still videos. Previews and the generated prior keep the base's 3."""
    drawn = []

    def generate(*args, settings=None, **more):
        drawn.append(settings.frames if settings else 3)
        return sample.generate(*args, settings=settings, **more)

    monkeypatch.setattr(train, "generate", generate)
    call(train, *flags, "--frames", 2, "--steps", 1, "--out", "x", *["--prior_motion"] * prior_motion)
    (_, _, _, eps, z_0, _, _, prior_eps), = batches
    assert eps.shape[2] == 2
    assert z_0.shape[2] == prior_eps.shape[2] == (3 if prior_motion else 2)
    assert set(drawn[:-1]) == {3 if prior_motion else 1} and drawn[-1] == 3


def test_caption_dropout_empties_captions_of_both(call, flags, batches, base):
    call(train, *flags, "--caption_dropout", 1, "--steps", 1, "--preview_every", 0)
    (_, tokens, _, _, _, context, _, _), = batches
    assert torch.equal(tokens, Tokenizer()([""])) and torch.equal(context, base.encode_text([""]))


# ------------------------------------------------------------------------------------------------------------
# Bases and flags


def test_a_base_with_another_vae_factor(photos_folder, tmp_path, call):
    """A base of one's own, with latents that are 4 times smaller than pixels."""
    folder = write_base(tmp_path / "own", vae_levels=3)
    base = load_base(folder)
    assert base.config.vae.factor == 4
    common = ["--base", folder, "--out", "out"]
    call(train, *common, "--images", photos_folder, "--class_word", "dog", "--steps", 1)
    call(sample, *common, "--subject", "out/subject.safetensors", "--seed", 0)
    path, = (tmp_path / "out").glob("a-*.json")
    recorded = json.loads(path.read_text())
    assert (recorded["height"], recorded["width"]) == (32, 48)
    assert recorded["base_fingerprint"] == base.config.fingerprint


def test_the_rate_is_multiplied_by_all_clips_of_a_step(capsys):
    """With four processes, each with a subject clip and a prior clip, 3e-5 is the authors' 2.4e-4."""
    def scaled(**values):
        lr = train.scaled_lr(replace(TrainingDefaults(), **values), Process(0, 4, torch.device("cpu")))
        return pytest.approx(lr, rel=1e-9), capsys.readouterr().out.strip()

    assert scaled() == (2.4e-4, "learning rate 0.00024 = 3e-05 x 8")
    assert scaled(alpha=0) == (1.2e-4, "learning rate 0.00012 = 3e-05 x 4")
    assert scaled(batch_size=2, grad_accum=3)[0] == 4 * 2 * 3 * 2 * 3e-5
    assert scaled(scale_lr=False) == (3e-5, "learning rate 3e-05 = 3e-05 x 1")


def test_the_words_rate_is_the_same_unless_it_is_given_and_never_scaled(call, flags, monkeypatch):
    rates = []
    monkeypatch.setattr(torch.optim.AdamW, "step",
                        lambda optimizer: rates.append([group["lr"] for group in optimizer.param_groups]))
    common = [*flags, "--steps", 1, "--alpha", 0, "--batch_size", 2, "--lr", 1e-3, "--preview_every", 0]
    for more in (["--scale_lr"], ["--scale_lr", "--word_lr", 5e-4], ["--no-scale_lr", "--word_lr", 5e-4], []):
        call(train, *common, *more)
    assert rates == [[2e-3, 2e-3], [5e-4, 2e-3], [5e-4, 1e-3], [1e-3, 1e-3]]    # of V*, and of A and B


@pytest.mark.parametrize("placeholder", ["", "dog", "V *", "x" * 40])
def test_placeholders_that_cannot_work_are_refused(call, flags, placeholder):
    assert "--placeholder" in call(train, *flags, "--placeholder", placeholder, code=2).err


def test_a_deleted_prior_picture_is_made_again(call, base_folder, photos_folder, tmp_path):
    flags = ["--base", base_folder, "--images", photos_folder, "--class_word", "dog", "--steps", 1]
    call(train, *flags, "--out", "deep/first")
    prior, = (tmp_path / "deep" / "prior").iterdir()    # beside --out: nothing is in the working folder
    assert not (tmp_path / "runs").exists()
    deleted, kept = np.asarray(Image.open(prior / "0001.png")), (prior / "0000.png").stat()
    (prior / "0001.png").unlink()
    call(train, *flags, "--out", "deep/second")
    assert (prior / "0000.png").stat().st_mtime_ns == kept.st_mtime_ns
    again = np.asarray(Image.open(prior / "0001.png"))
    assert np.abs(again.astype(int) - deleted).max() <= 1
