"""Subject learning through the command line: what is written, what is learned, and that processes agree."""
import json

import pytest
import torch
from safetensors.torch import load_file

import sample
import train
from cli import BadInput
from data import crop, load_photos, noise_sample, still_video
from files import load_base, load_subject
from lora import MergedLoRA, class_embedding
from makers import fork, fork_ranks, run, torchrun, wait, write_base
from model import Tokenizer


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


@pytest.fixture()
def in_process(monkeypatch, tmp_path):
    """Runs a script in this process, in tmp_path."""
    def in_process(script, *flags):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [script.__name__, *map(str, flags)])
        script.main()
    return in_process


def learned(folder):
    return load_file(folder / "subject.safetensors")


def assert_close(a, b):
    """Two subjects' tensors agree but for the order in which their gradients were added up."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=0, atol=1e-5), name


def test_train_then_sample(flags, base, base_folder, photos_folder, tmp_path):
    done = run("train.py", *flags, "--steps", 3, "--batch_size", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = f"runs/{photos_folder.name}/subject.safetensors"
    lines = done.stdout.splitlines()
    assert "tiny0" in lines[0] and "3 photos of V* dog" in lines[0] and lines[-1] == f"wrote {out}"
    subject = load_subject(tmp_path / out, base)
    assert subject.steps == 3 and subject.settings["clips_a_step"] == 2
    assert all(B.abs().sum() > 0 for _, B in subject.updates.values())
    assert len(list((tmp_path / "runs" / "prior").glob("*/*.png"))) == 2    # --num_prior of this base
    done = run("sample.py", "--base", base_folder, cwd=tmp_path)
    assert done.returncode == 0 and out in done.stdout.splitlines()[0]


# ------------------------------------------------------------------------------------------------------------
# The number of processes, and how a step's clips are shared, do not count


def test_torchrun_with_two_processes_equals_one(flags, train_on, tmp_path):
    train_on(1, "--steps", 6, "--batch_size", 2, "--out", "one")
    done = run("train.py", *flags, "--steps", 6, "--out", "two", cwd=tmp_path, launcher=torchrun(2))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert_close(learned(tmp_path / "one"), learned(tmp_path / "two"))


def test_one_two_and_four_processes_agree(train_on, tmp_path):
    """The same four clips per step give the same subject after 10 steps."""
    common = ["--steps", 10, "--preview_every", 0]
    train_on(1, *common, "--out", "one", "--batch_size", 4)
    train_on(2, *common, "--out", "two", "--batch_size", 1, "--grad_accum", 2, "--grad_checkpointing")
    train_on(4, *common, "--out", "four", "--batch_size", 1)
    one = learned(tmp_path / "one")
    assert_close(one, learned(tmp_path / "two"))
    assert_close(one, learned(tmp_path / "four"))


CUSTOM_DIFFUSION = ["--method", "custom_diffusion", "--lr", 1e-3]
DREAMVIDEO = ["--method", "dreamvideo", "--lr", 1e-3, "--word_lr", 1e-3, "--word_steps", 3]


@pytest.mark.parametrize("method", [CUSTOM_DIFFUSION, DREAMVIDEO], ids=lambda method: method[1])
def test_the_other_methods_agree_and_resume_on_any_number(train_on, tmp_path, method):
    """A run begins on two processes, moves to one as DreamVideo's second stage begins, and ends on two."""
    common = [*method, "--alpha", 0.5, "--preview_every", 0]
    train_on(1, *common, "--steps", 6, "--batch_size", 2, "--out", "one")
    train_on(2, *common, "--steps", 3, "--out", "moved")
    train_on(1, *common, "--steps", 5, "--batch_size", 2, "--resume", "moved")
    train_on(2, *common, "--steps", 6, "--resume", "moved")
    assert_close(learned(tmp_path / "one"), learned(tmp_path / "moved"))


def test_losses_and_gradient_are_means_over_processes(train_on, tmp_path):
    """log.jsonl holds the same numbers, whatever the number of processes."""
    for world in (1, 2):
        each = 2 // world
        train_on(world, "--steps", 3, "--batch_size", each, "--preview_every", 0, "--out", f"on-{world}")
    one, two = ((tmp_path / out / "log.jsonl").read_text().splitlines() for out in ("on-1", "on-2"))
    assert len(one) == len(two) == 3
    for a, b in zip(map(json.loads, one), map(json.loads, two)):
        for name in ("loss", "prior_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


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
    train_on(1, "--steps", 100, "--alpha", 0, "--lr", 1e-2, "--batch_size", 2, "--out", "out")
    subject = load_subject(tmp_path / "out" / "subject.safetensors", base)
    merged = MergedLoRA(base.unet, subject)
    frames = torch.stack([crop(photo.image, 32, 48) for photo in load_photos(photos_folder, 48)])

    @torch.no_grad()
    def loss():
        z_0 = still_video(base.vae.encode(frames), 3)
        context = base.text_encoder(Tokenizer(["V*"])(["a V* dog"]), subject.v_star).expand(3, -1, -1)
        total = 0
        for i in range(20):
            level, eps = noise_sample(i, 12345, z_0.shape, 1000)
            t = torch.full((3,), level)
            predicted = base.unet(base.schedule.add_noise(z_0, t, eps), t, torch.full((3,), 8), context)
            total += (predicted - eps).pow(2).mean().item()
        return total / 20

    before = loss()
    merged.set(1.0)
    assert loss() < 0.95 * before


def test_a_base_without_fingerprint_and_of_another_vae_factor(photos_folder, tmp_path, in_process):
    """A base of one's own: config.json says nothing of the weights, and latents are 4 times smaller."""
    folder = write_base(tmp_path / "own", vae_levels=3)
    values = json.loads((folder / "config.json").read_text())
    del values["fingerprint"], values["crc32"]
    (folder / "config.json").write_text(json.dumps(values))
    base = load_base(folder)
    assert base.config.vae.factor == 4
    in_process(train, "--base", folder, "--images", photos_folder, "--class_word", "dog", "--steps", 1,
               "--out", "out")
    in_process(sample, "--base", folder, "--subject", "out/subject.safetensors", "--seed", 0)
    path, = (tmp_path / "outputs").glob("*.json")
    facts = json.loads(path.read_text())
    assert (facts["height"], facts["width"]) == (32, 48)
    assert facts["base_fingerprint"] == base.config.fingerprint != ""


# ------------------------------------------------------------------------------------------------------------
# The two methods that the paper compares with


def test_dreamvideo_learns_the_word_and_then_the_adapters(flags, base, base_folder, tmp_path, in_process):
    common = [*flags, "--method", "dreamvideo", "--lr", 0.01, "--word_lr", 0.02, "--word_steps", 2,
              "--save_every", 1, "--keep_last", 9]
    in_process(train, *common, "--steps", 4, "--out", "x")
    saves = [load_subject(path, base) for path in sorted((tmp_path / "x").glob("step-*/*.safetensors"))]
    words = [class_embedding(base.text_encoder, "dog"), *(subject.v_star for subject in saves)]
    word_moved = [not torch.equal(a, b) for a, b in zip(words, words[1:])]
    adapters_moved = []
    for subject in saves:
        adapters_moved.append(any(up_bias.abs().sum() > 0 for *_, up_bias in subject.updates.values()))
    assert word_moved == [True, True, False, False] and adapters_moved == [False, False, True, True]

    # Across the change, and back from a save.
    in_process(train, *common, "--steps", 3, "--out", "y")
    in_process(train, *common, "--steps", 4, "--resume", "y")
    a, b = learned(tmp_path / "x"), learned(tmp_path / "y")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not list(tmp_path.rglob("prior"))                                # its prior loss has weight 0
    in_process(sample, "--base", base_folder, "--subject", "x/subject.safetensors", "--lambdas", "1*4")
    assert list((tmp_path / "outputs").glob("*.mp4"))


def test_custom_diffusion_starts_from_a_rare_word(flags, base, base_folder, tmp_path, in_process):
    in_process(train, *flags, "--method", "custom_diffusion", "--lr", 1e-6, "--steps", 1, "--out", "x")
    subject = load_subject(tmp_path / "x" / "subject.safetensors", base)
    assert torch.allclose(subject.v_star[0], base.text_encoder.token_embedding.weight[42170], atol=1e-5)
    assert all(name.endswith((".attn2.to_k", ".attn2.to_v")) for name in subject.updates)
    assert all(delta.abs().sum() > 0 for delta, in subject.updates.values())
    assert list((tmp_path / "prior").glob("*/*.png"))                       # its prior loss has weight 1
    in_process(sample, "--base", base_folder, "--subject", "x/subject.safetensors")
    assert list((tmp_path / "outputs").glob("*.mp4"))


# ------------------------------------------------------------------------------------------------------------
# Flags


def test_published_settings_are_the_defaults_and_flags_go_first(flags, monkeypatch):
    def parsed(*more):
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, [*flags, *more])])
        return train.parse_args()

    assert parsed().lr is None                                              # the base's own
    args = parsed("--method", "dreamvideo")
    assert (args.lr, args.steps, args.word_lr, args.word_steps, args.alpha) == (1e-5, 4000, 1e-4, 3000, 0)
    args = parsed("--method", "custom_diffusion", "--lr", 1e-4)
    assert (args.lr, args.alpha, args.word_steps) == (1e-4, 1, None)
    for more in (["--targets", "cross", "--method", "dreamvideo"], ["--word_steps", 10]):
        with pytest.raises(BadInput, match=f"{more[0]}.*--method"):
            parsed(*more)


@pytest.mark.parametrize("script, names", [
    (train, "base images class_word placeholder prior num_prior alpha rank lr weight_decay steps batch_size "
            "frames height width precision grad_checkpointing seed out save_every"),
    (sample, "base subject prompt lambda_s lambda_l K steps cfg eta fps save_fps frames height width seed "
             "num precision out")])
def test_help_names_every_setting(in_process, capsys, script, names):
    with pytest.raises(SystemExit) as end:
        in_process(script, "--help")
    text = capsys.readouterr().out
    assert end.value.code == 0
    for name in names.split():
        assert f"--{name} " in text or f"--{name}\n" in text, name
