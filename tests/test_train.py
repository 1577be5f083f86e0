"""Subject learning through the command line: what is written, what is learned; processes agree."""

import pytest
import torch
from safetensors.torch import load_file

import sample
import train
from cli import BadInput
from files import load_base, load_subject
from lora import class_embedding
from makers import fork, run, wait


def flags(base_folder, photos_folder, *more):
    return ["--base", base_folder, "--images", photos_folder, "--class_word", "dog", *more]


def test_train_then_sample(base_folder, photos_folder, tmp_path):
    done = run(
        "train.py", *flags(base_folder, photos_folder, "--steps", 3, "--batch_size", 2), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    out = f"runs/{photos_folder.name}/subject.safetensors"
    lines = done.stdout.splitlines()
    assert "tiny0" in lines[0] and "3 photos of V* dog" in lines[0] and lines[-1] == f"wrote {out}"
    base = load_base(base_folder)
    subject = load_subject(tmp_path / out, base)
    assert subject.steps == 3 and subject.settings["clips_a_step"] == 2
    assert all(B.abs().sum() > 0 for _, B in subject.updates.values())
    assert len(list((tmp_path / "runs" / "prior").glob("*/*.png"))) == 2  # --num_prior of this base
    done = run("sample.py", "--base", base_folder, cwd=tmp_path)
    assert done.returncode == 0 and out in done.stdout.splitlines()[0]


def torchrun(processes, *flags, cwd):
    done = run(
        "train.py",
        *flags,
        cwd=cwd,
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    return done


def assert_same_subject(folder, name, other):
    a, b = (load_file(folder / out / "subject.safetensors") for out in (name, other))
    assert a.keys() == b.keys()
    for tensor in a:
        assert torch.allclose(a[tensor], b[tensor], atol=1e-5), tensor


def test_one_two_and_four_processes_agree(base_folder, photos_folder, tmp_path):
    """The same four clips per step, however they are shared, give the same subject after 20 steps."""
    common = flags(base_folder, photos_folder, "--steps", 20, "--out")
    assert wait(fork(train.main, ["train.py", *common, "one", "--batch_size", 4], tmp_path)) == 0
    torchrun(4, *common, "four", "--batch_size", 1, cwd=tmp_path)
    torchrun(2, *common, "two", "--batch_size", 1, "--grad_accum", 2, "--grad_checkpointing", cwd=tmp_path)
    assert_same_subject(tmp_path, "one", "four")
    assert_same_subject(tmp_path, "one", "two")


def test_dreamvideos_stages_on_two_processes(base_folder, photos_folder, tmp_path):
    """Both stages, begun on two processes and ended on one, equal those on one."""
    common = flags(
        base_folder,
        photos_folder,
        "--method",
        "dreamvideo",
        "--word_steps",
        3,
        "--lr",
        1e-3,
        "--word_lr",
        1e-3,
    )
    assert (
        wait(
            fork(
                train.main, ["train.py", *common, "--steps", 8, "--batch_size", 2, "--out", "one"], tmp_path
            )
        )
        == 0
    )
    torchrun(2, *common, "--steps", 5, "--batch_size", 1, "--out", "two", cwd=tmp_path)
    resumed = ["train.py", *common, "--steps", 8, "--batch_size", 2, "--resume", "two"]
    assert wait(fork(train.main, resumed, tmp_path)) == 0, (tmp_path / "output").read_text()
    assert_same_subject(tmp_path, "one", "two")


def test_same_seed_same_subject(base_folder, photos_folder, tmp_path):
    for out, seed in [("a", 0), ("b", 0), ("c", 1)]:
        settings = flags(
            base_folder, photos_folder, "--steps", 2, "--alpha", 0, "--seed", seed, "--out", out
        )
        assert wait(fork(train.main, ["train.py", *settings], tmp_path)) == 0, (
            tmp_path / "output"
        ).read_text()
    a, b, c = (load_file(tmp_path / out / "subject.safetensors") for out in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a) and not torch.equal(a["v_star"], c["v_star"])
    assert not (tmp_path / "runs").exists()  # alpha 0 makes no prior


def test_a_subject_is_learned(base_folder, photos_folder, tmp_path):
    """On noise from outside the training run, the loss on the photos falls."""
    from data import crop, load_photos, noise_sample, still_video
    from lora import MergedLoRA
    from model import Tokenizer

    settings = flags(
        base_folder,
        photos_folder,
        "--steps",
        150,
        "--alpha",
        0,
        "--lr",
        1e-2,
        "--batch_size",
        2,
        "--out",
        "out",
    )
    assert wait(fork(train.main, ["train.py", *settings], tmp_path)) == 0, (tmp_path / "output").read_text()
    base = load_base(base_folder)
    subject = load_subject(tmp_path / "out" / "subject.safetensors", base)
    strength = MergedLoRA(base.unet, subject)

    @torch.no_grad()
    def loss():
        z_0 = torch.cat(
            [
                still_video(base.vae.encode(crop(p.image, 32, 48)[None]), 3)
                for p in load_photos(photos_folder, 48)
            ]
        )
        context = base.text_encoder(Tokenizer(["V*"])(["a V* dog"]), subject.v_star).expand(3, -1, -1)
        total = 0
        for i in range(20):
            t, eps = noise_sample(i, 12345, z_0.shape, 1000)
            t = torch.full((3,), t)
            total += (
                (base.unet(base.schedule.add_noise(z_0, t, eps), t, torch.full((3,), 8), context) - eps)
                .pow(2)
                .mean()
                .item()
            )
        return total / 20

    before = loss()
    strength.set(1.0)
    assert loss() < 0.95 * before


def test_help_names_every_setting(monkeypatch, tmp_path, capsys):
    for script, names in {
        train: "base images class_word placeholder prior num_prior alpha rank lr weight_decay steps "
        "batch_size frames height width precision grad_checkpointing seed out save_every",
        sample: "base subject prompt lambda_s lambda_l K steps cfg eta fps save_fps frames height width "
            "seed num precision out",
    }.items():
        with pytest.raises(SystemExit) as end:
            in_process(script, monkeypatch, tmp_path, "--help")
        text = capsys.readouterr().out
        assert end.value.code == 0 and all(
            f"--{name} " in text or f"--{name}\n" in text for name in names.split()
        ), script


def in_process(module, monkeypatch, folder, *flags):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", [module.__name__, *map(str, flags)])
    module.main()


def test_dreamvideo_learns_the_word_and_then_the_adapters(
    base_folder, photos_folder, tmp_path, monkeypatch
):
    common = flags(
        base_folder,
        photos_folder,
        "--method",
        "dreamvideo",
        "--lr",
        0.01,
        "--word_lr",
        0.02,
        "--word_steps",
        2,
        "--save_every",
        1,
        "--keep_last",
        9,
    )
    in_process(train, monkeypatch, tmp_path, *common, "--steps", 4, "--out", "x")
    base = load_base(base_folder)
    saves = [load_subject(path, base) for path in sorted((tmp_path / "x").glob("step-*/*.safetensors"))]
    words = [class_embedding(base.text_encoder, "dog"), *(s.v_star for s in saves)]
    moved = [not torch.equal(a, b) for a, b in zip(words, words[1:])]
    learned = [any(x[3].abs().sum() > 0 for x in s.updates.values()) for s in saves]
    assert moved == [True, True, False, False] and learned == [False, False, True, True]
    in_process(
        train, monkeypatch, tmp_path, *common, "--steps", 3, "--out", "y"
    )  # across the change, and back from a save
    in_process(train, monkeypatch, tmp_path, *common, "--steps", 4, "--resume", "y")
    a, b = (load_file(tmp_path / out / "subject.safetensors") for out in "xy")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not (tmp_path / "runs").exists()  # no prior
    in_process(
        sample,
        monkeypatch,
        tmp_path,
        "--base",
        base_folder,
        "--subject",
        "x/subject.safetensors",
        "--lambdas",
        "1*4",
    )
    assert list((tmp_path / "outputs").glob("*.mp4"))


def test_custom_diffusion_starts_from_a_rare_word(base_folder, photos_folder, tmp_path, monkeypatch):
    common = flags(base_folder, photos_folder, "--method", "custom_diffusion", "--lr", 1e-6, "--steps", 1)
    in_process(train, monkeypatch, tmp_path, *common, "--out", "x")
    base = load_base(base_folder)
    subject = load_subject(tmp_path / "x" / "subject.safetensors", base)
    assert torch.allclose(subject.v_star[0], base.text_encoder.token_embedding.weight[42170], atol=1e-5)
    assert all(delta.abs().sum() > 0 for (delta,) in subject.updates.values())
    assert list((tmp_path / "prior").glob("*/*.png"))  # its prior loss has weight 1
    in_process(sample, monkeypatch, tmp_path, "--base", base_folder, "--subject", "x/subject.safetensors")
    assert list((tmp_path / "outputs").glob("*.mp4"))


def test_published_settings_are_the_defaults_and_flags_go_first(base_folder, photos_folder, monkeypatch):
    def parsed(*more):
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, flags(base_folder, photos_folder, *more))])
        return train.parse_args()

    assert parsed().lr is None  # the base's own
    args = parsed("--method", "dreamvideo")
    assert (args.lr, args.steps, args.word_lr, args.word_steps, args.alpha) == (1e-5, 4000, 1e-4, 3000, 0)
    args = parsed("--method", "custom_diffusion", "--lr", 1e-4)
    assert (args.lr, args.alpha, args.word_steps) == (1e-4, 1, None)
    for more in (["--targets", "cross", "--method", "dreamvideo"], ["--word_steps", 10]):
        with pytest.raises(BadInput, match=f"{more[0]}.*--method"):
            parsed(*more)
