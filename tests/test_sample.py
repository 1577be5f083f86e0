"""Algorithm 1: DDIM against a closed form, where lambda switches, what equals what."""

import json

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from files import save_subject
from lora import MergedLoRA
from makers import ROOT, random_subject, run
from model import NoiseSchedule, ScheduleConfig
from sample import ddim, ddim_steps, parse_lambdas, two_step_schedule


class PointPredictor:
    """The exact noise predictor of a data set of one known point: eps = (z_t - signal * point) / noise."""

    def __init__(self, schedule, point):
        self.schedule, self.point = schedule, point

    def __call__(self, z_t, t, fps, context):
        a, scale = self.schedule.alpha_bar[t[0]], self.schedule.scale[t[0]]
        return (z_t - a.sqrt() * scale * self.point) / (1 - a).sqrt()


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_ddim_against_the_closed_form_of_a_known_point(eta, steps):
    """The exact predictor keeps the marginal: z_t = sqrt(a) * scale * point + sqrt(1 - a) * unit noise."""
    torch.manual_seed(0)
    schedule = NoiseSchedule(ScheduleConfig())
    point, eps = torch.randn(2, 1, 4, 8, 16, 16)
    noisiest = ddim_steps(schedule, steps, eta)[0][0]
    a, scale = schedule.alpha_bar[noisiest], schedule.scale[noisiest]
    context = torch.zeros(1, 77, 8)
    z_0 = ddim(
        PointPredictor(schedule, point),
        schedule,
        a.sqrt() * scale * point + (1 - a).sqrt() * eps,
        lambda: torch.randn_like(point),
        context,
        context,
        torch.tensor([8]),
        steps,
        cfg=3.0,
        eta=eta,
    )
    a, scale = schedule.alpha_bar[0], schedule.scale[0]
    rest = (z_0 - a.sqrt() * scale * point) / (1 - a).sqrt()
    if eta == 0:  # no noise but the first z's own, to the end
        assert torch.allclose(rest, eps, atol=1e-3)
    else:
        assert abs(rest.std() - 1) < 0.03 and abs((rest * eps).mean()) < (1 if steps == 1 else 0.03)


def test_fifty_steps_are_upstreams():
    schedule = NoiseSchedule(ScheduleConfig())
    t, a, scale, a_next, scale_next, sigma = zip(*ddim_steps(schedule, 50, 1.0))
    assert t == tuple(range(981, 0, -20))
    assert (
        a[1:] == a_next[:-1] and scale[1:] == scale_next[:-1] and a_next[-1] == schedule.alpha_bar[0].item()
    )
    assert min(sigma) > 0 and all(row[5] == 0 for row in ddim_steps(schedule, 50, 0.0))


def test_two_step_schedule_switches_at_K():
    assert two_step_schedule(0.4, 0.8, 5, 50) == [0.4] * 5 + [0.8] * 45
    assert two_step_schedule(0.4, 0.8, 0, 3) == [0.8] * 3 and two_step_schedule(0.4, 0.8, 3, 3) == [0.4] * 3


def sample(base, lambdas=None, subject=None, seed=0, steps=6):
    generator = torch.Generator().manual_seed(seed)
    noise = lambda: torch.randn((1, 4, 3, 4, 6), generator=generator)
    context = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(5))
    strength = MergedLoRA(base.unet, subject) if subject else None
    z_0 = ddim(
        base.unet,
        base.schedule,
        noise(),
        noise,
        context,
        0 * context,
        torch.tensor([8]),
        steps,
        3.0,
        1.0,
        strength,
        lambdas,
    )
    if strength:
        strength.set(0)
    return z_0


def test_what_equals_what(base):
    subject = random_subject(base)
    plain = sample(base)
    assert torch.equal(sample(base, [0.0] * 6, subject), plain)  # lambda 0: the base, bit for bit
    constant = sample(base, [0.8] * 6, subject)
    assert torch.equal(
        sample(base, two_step_schedule(0.8, 0.8, 2, 6), subject), constant
    )  # lambda_s = lambda_l: constant
    assert torch.equal(
        sample(base, two_step_schedule(0.4, 0.8, 0, 6), subject), constant
    )  # K = 0: lambda_l throughout
    low = sample(base, [0.4] * 6, subject)
    assert torch.equal(
        sample(base, two_step_schedule(0.4, 0.8, 6, 6), subject), low
    )  # K = steps: lambda_s throughout
    mixed = sample(base, two_step_schedule(0.4, 0.8, 2, 6), subject)
    outcomes = [plain, constant, low, mixed]
    assert all(not torch.allclose(a, b, atol=1e-3) for i, a in enumerate(outcomes) for b in outcomes[:i])
    assert torch.equal(sample(base), plain)  # nothing stays behind


def test_weights_change_only_at_the_switch(base, monkeypatch):
    subject, seen, merges = random_subject(base), [], []
    name = next(iter(subject.updates))
    W, (A, B) = base.unet.get_submodule(name).weight, subject.updates[name]
    W_0, forward, real_set = W.clone(), base.unet.forward, MergedLoRA.set

    def watched(*args):
        seen.append(((W - W_0) / (B @ A)).median().item())
        return forward(*args)

    def counted(self, lam):
        merges.append(lam) if lam != self.lam else None
        real_set(self, lam)

    monkeypatch.setattr(base.unet, "forward", watched)
    monkeypatch.setattr(MergedLoRA, "set", counted)
    sample(base, two_step_schedule(0.4, 0.8, 2, 6), subject)
    assert np.allclose(seen, [0.4, 0.4, 0.8, 0.8, 0.8, 0.8], atol=1e-3)
    assert merges == [0.4, 0.8, 0]


# ------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture()
def call(monkeypatch, tmp_path, capsys):
    """Runs sample.py in this process, in tmp_path -> what it wrote to stdout and stderr."""
    import sample as script
    from cli import run_script

    def call(*flags, code=0):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", ["sample.py", *map(str, flags)])
        capsys.readouterr()
        if code:
            with pytest.raises(SystemExit) as caught:
                run_script(script.main)
            assert caught.value.code == code
        else:
            script.main()
        return capsys.readouterr()

    return call


def test_command_line(base, base_folder, tmp_path, call):
    save_subject(tmp_path / "runs" / "dog" / "subject.safetensors", random_subject(base))
    flags = ["--base", base_folder, "--lambda_s", 0.4, "--lambda_l", 0.8, "--K", 2, "--seed", 3]
    first = run("sample.py", *flags, "--num", 2, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert "tiny0" in lines[0] and "runs/dog/subject.safetensors" in lines[0]  # found without being named
    stem = "a-v-dog-running-on-the-grass"
    names = [f"{stem}-{seed}.{end}" for seed in (3, 4) for end in ("gif", "mp4", "json")]
    assert lines[-1] == "wrote " + " ".join(f"outputs/{n}" for n in names)
    assert sorted(p.name for p in (tmp_path / "outputs").iterdir()) == sorted(names)
    video, gif = (iio.imread(tmp_path / "outputs" / f"{stem}-3.{end}") for end in ("mp4", "gif"))
    assert video.shape == gif.shape == (3, 32, 48, 3)
    facts = json.loads((tmp_path / "outputs" / f"{stem}-3.json").read_text())
    assert (
        facts["seed"] == 3
        and facts["lambda_s"] == 0.4
        and facts["K"] == 2
        and facts["base_fingerprint"] == base.config.fingerprint
    )

    # The same command again makes only what is missing; another setting overwrites nothing; a seed gives
    # the same video.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "outputs").iterdir()}
    again = call(*flags, "--num", 3)
    assert (
        "2 of 3 videos were there already" in again.out and again.out.splitlines()[-1].count(".json") == 1
    )
    call(*flags, "--save_fps", 9)
    assert np.array_equal(
        iio.imread(tmp_path / "outputs" / f"{stem}-3.gif"),
        iio.imread(tmp_path / "outputs" / f"{stem}-3-2.gif"),
    )
    assert all(p.stat().st_mtime_ns == time for p, time in before.items())


def test_lambda_schedules():
    assert parse_lambdas("0.4*5,0.8*45", 50) == two_step_schedule(0.4, 0.8, 5, 50)
    assert parse_lambdas("0*1, 0.4>0.8*5 ,1*1", 7) == [0, 0.4, 0.5, 0.6, 0.7, 0.8, 1]


def test_schedule_flag_equals_the_three(base, base_folder, tmp_path, call):
    save_subject(tmp_path / "dog.safetensors", random_subject(base))
    flags = ["--base", base_folder, "--subject", "dog.safetensors", "--seed", 0, "--format", "png", "--out"]
    call(*flags, "a", "--lambda_s", 0.4, "--lambda_l", 0.8, "--K", 1)
    call(*flags, "b", "--lambdas", "0.4*1,0.8*3")
    call(*flags, "c", "--lambdas", "0.4*2,0.8*2")
    a, b, c = (iio.imread(next((tmp_path / out).glob("*.png"))) for out in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_compare_and_process(base, base_folder, tmp_path, call):
    save_subject(tmp_path / "dog.safetensors", random_subject(base))
    flags = ["--base", base_folder, "--subject", "dog.safetensors", "--seed", 0, "--format", "png", "gif"]
    call(
        *flags,
        "--out",
        "both",
        "--prompt",
        "a V* dog",
        "--compare",
        "--show_process",
        "--lambda_s",
        0.4,
        "--lambda_l",
        0.8,
        "--K",
        2,
    )
    names = sorted(p.name for p in (tmp_path / "both").iterdir())
    assert names == [f"a-v-dog-0{end}" for end in ("-frames.png", "-process.png", ".gif", ".json", ".png")]
    video = iio.imread(tmp_path / "both" / "a-v-dog-0.gif")
    assert video.shape == (3, 3 * 32 + 14, 3 * 144, 3)
    frames = iio.imread(tmp_path / "both" / "a-v-dog-0-frames.png")
    assert frames.shape[1] == 3 * 144 and frames.shape[0] % 3 == 0


def test_prompts_file_and_shared_work(base, base_folder, tmp_path, call):
    save_subject(tmp_path / "dog.safetensors", random_subject(base))
    (tmp_path / "prompts.txt").write_bytes(
        "\ufeff# two prompts\r\na V* dog on the grass\r\n\r\na V* dog ../../etc\r\n".encode()
    )
    flags = [
        "--base",
        base_folder,
        "--subject",
        "dog.safetensors",
        "--prompts",
        "prompts.txt",
        "--num_videos",
        3,
        "--batch_size",
        2,
        "--format",
        "png",
        "--out",
    ]
    call(*flags, "one", "--seed", 7)
    done = run(
        "sample.py",
        *flags,
        "two",
        "--seed",
        7,
        cwd=tmp_path,
        launcher=("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29541"),
    )
    assert done.returncode == 0, done.stderr
    one, two = ({p.name: p for p in (tmp_path / out).glob("*.png")} for out in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == 6 and "001-a-v-dog-etc-9.png" in one
    assert all(one[name].read_bytes() == two[name].read_bytes() for name in one)


def test_the_base_alone_is_asked_what_its_subjects_are(base_folder, tmp_path, call):
    call("--base", base_folder, "--subject", "none", "--prompt", "a V* dog on the grass", "--seed", 3)
    facts = json.loads((tmp_path / "outputs" / "a-dog-on-the-grass-3.json").read_text())
    assert facts["prompt"] == "a dog on the grass" and facts["subjects"] == []


def test_several_subjects(base, base_folder, tmp_path, call):
    """Both updates and both words: at zero strength of the updates, both words still count."""
    from dataclasses import replace

    dog, cat = random_subject(base), replace(random_subject(base), placeholder="<cat>", class_word="cat")
    save_subject(tmp_path / "dog.safetensors", dog)
    save_subject(tmp_path / "cat.safetensors", cat)
    both = MergedLoRA(base.unet, dog, cat)
    name = next(iter(dog.updates))
    W = base.unet.get_submodule(name).weight
    W_0, update = W.clone(), sum(B @ A for A, B in (dog.updates[name], cat.updates[name]))
    both.set(0.5)
    assert torch.allclose(W, W_0 + 0.5 * update, atol=1e-6)
    both.set(0)
    assert torch.equal(W, W_0)
    flags = ["--base", base_folder, "--subject", "dog.safetensors", "--seed", 0, "--format", "png"]
    call(*flags, "--subject", "cat.safetensors", "--out", "both")
    facts = json.loads(next((tmp_path / "both").glob("*.json")).read_text())
    assert (
        facts["prompt"] == "a V* dog and a <cat> cat running on the grass" and len(facts["subjects"]) == 2
    )
    assert "share the placeholder V*" in call(*flags, "--subject", "dog.safetensors", code=2).err


def test_long_and_poor_prompts(base, base_folder, tmp_path, call):
    save_subject(tmp_path / "dog.safetensors", random_subject(base))
    flags = [
        "--base",
        base_folder,
        "--subject",
        "dog.safetensors",
        "--seed",
        0,
        "--format",
        "png",
        "--prompt",
    ]
    err = call(*flags, "a V* dog " + "on " * 80 + "grass").err
    assert "dropped" in err and "grass" in err
    assert "V* comes after the 75 tokens" in call(*flags, "on " * 80 + "V* dog", code=2).err
    assert "V* is not in it" in call(*flags, "a dog").err
    call(*flags, "a V* dog", "--negative_prompt", "blurred", "--out", "negative")
    call(*flags, "a V* dog", "--out", "plain")
    a, b = (iio.imread(next((tmp_path / out).glob("*.png"))) for out in ("negative", "plain"))
    assert not np.array_equal(a, b)


def test_from_a_notebook(base, base_folder, tmp_path):
    save_subject(tmp_path / "dog.safetensors", random_subject(base))
    code = (
        readme_block("From a notebook")
        .replace("toy/base", str(base_folder))
        .replace("toy/subject.safetensors", str(tmp_path / "dog.safetensors"))
    )
    names = {}
    exec(code, names)
    assert names["video"].shape == (1, 3, 32, 48, 3) and names["video"].dtype == torch.uint8


def readme_block(heading):
    """The first python block of the README's section."""
    return (
        (ROOT / "README.md").read_text().split(f"## {heading}")[1].split("```python\n")[1].split("```")[0]
    )
