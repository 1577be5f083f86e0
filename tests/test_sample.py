"""Sampling: upstream's steps, what equals what, the command line. test_paper.py has Algorithm 1 itself."""
import json
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import sample as script
from lora import MergedLoRA
from makers import ROOT, fork_ranks, random_subject, wait
from model import NoiseSchedule, ScheduleConfig
from sample import ddim, ddim_steps, parse_lambdas, two_step_schedule
from support.files import save_subject


def test_fifty_steps_are_upstreams():
    schedule = NoiseSchedule(ScheduleConfig())
    t, a, scale, a_next, scale_next, sigma = zip(*ddim_steps(schedule, 50, 1.0))
    assert t == tuple(range(981, 0, -20))
    assert a[1:] == a_next[:-1] and scale[1:] == scale_next[:-1]
    assert a_next[-1] == schedule.alpha_bar[0].item()
    assert min(sigma) > 0
    *_, sigma = zip(*ddim_steps(schedule, 50, 0.0))
    assert set(sigma) == {0.0}


def sample(base, lambdas=None, subject=None, seed=0, steps=6):
    """The UNet's weights as they are without a subject, else with lambdas[i] at step i -> z_0."""
    generator = torch.Generator().manual_seed(seed)
    noise = lambda: torch.randn((1, 4, 3, 4, 6), generator=generator)
    context = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(5))
    lora = MergedLoRA(base.unet, [subject]) if subject else None
    fps = torch.tensor([8])
    z_0 = ddim(base.unet, base.schedule, noise(), noise, context, 0 * context, fps, steps, 3.0, 1.0, lora,
               lambdas)
    if lora:
        lora.set(0)
    return z_0


def test_what_equals_what(base):
    subject = random_subject(base)
    scheduled = lambda *schedule: sample(base, two_step_schedule(*schedule, 6), subject)
    plain = sample(base)
    assert torch.equal(sample(base, [0.0] * 6, subject), plain)         # lambda 0: the base, bit for bit
    high, low = sample(base, [0.8] * 6, subject), sample(base, [0.4] * 6, subject)
    assert torch.equal(scheduled(0.8, 0.8, 2), high)                    # lambda_s = lambda_l: constant
    assert torch.equal(scheduled(0.4, 0.8, 0), high)                    # K = 0: lambda_l throughout
    assert torch.equal(scheduled(0.4, 0.8, 6), low)                     # K = steps: lambda_s throughout
    outcomes = [plain, high, low, scheduled(0.4, 0.8, 2)]
    for i, a in enumerate(outcomes):
        assert all(not torch.allclose(a, b, atol=1e-3) for b in outcomes[:i])
    assert torch.equal(sample(base), plain)                             # nothing stays behind


def test_weights_are_written_only_at_the_switch(base, monkeypatch):
    """Six steps merge twice: at the first step, and at step K. Once more puts the base back."""
    merges, real_set = [], MergedLoRA.set

    def counted(self, lam):
        if lam != self.lam:
            merges.append(lam)
        real_set(self, lam)

    monkeypatch.setattr(MergedLoRA, "set", counted)
    sample(base, two_step_schedule(0.4, 0.8, 2, 6), random_subject(base))
    assert merges == [0.4, 0.8, 0]


def test_lambda_schedules():
    assert parse_lambdas("0.4*5,0.8*45", 50) == two_step_schedule(0.4, 0.8, 5, 50)
    assert parse_lambdas("0*1, 0.4>0.8*5 ,1*1", 7) == [0, 0.4, 0.5, 0.6, 0.7, 0.8, 1]


# ------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture()
def dog(base, base_folder, tmp_path):
    """A subject in tmp_path/dog.safetensors -> flags that sample it with seed 0."""
    save_subject(tmp_path / "dog.safetensors", random_subject(base))
    return ["--base", base_folder, "--subject", "dog.safetensors", "--seed", 0]


def visible(folder):
    """The names of a folder's files, without the hidden lock."""
    return sorted(path.name for path in folder.glob("[!.]*"))


def pngs(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def picture(folder):
    """The one PNG file in a folder."""
    content, = pngs(folder).values()
    return iio.imread(content)


def test_command_line(base, base_folder, tmp_path, call):
    save_subject(tmp_path / "runs" / "dog" / "subject.safetensors", random_subject(base))
    flags = ["--base", base_folder, "--lambda_s", 0.4, "--lambda_l", 0.8, "--K", 2, "--seed", 3]
    lines = call(script, *flags, "--num", 2).out.splitlines()
    assert "tiny0" in lines[0] and "runs/dog/subject.safetensors" in lines[1]   # found without being named
    out, stem, names = tmp_path / "outputs", "a-v-dog-running-on-the-grass", []
    for seed in (3, 4):
        names += [f"{stem}-{seed}.gif", f"{stem}-{seed}.mp4", f"{stem}-{seed}.json"]
    assert lines[-1] == "wrote " + " ".join(f"outputs/{name}" for name in names)
    assert visible(out) == sorted(names)
    for ending in ("mp4", "gif"):
        assert iio.imread(out / f"{stem}-3.{ending}").shape == (3, 32, 48, 3)
    recorded = json.loads((out / f"{stem}-3.json").read_text())
    assert recorded["seed"] == 3 and recorded["lambda_s"] == 0.4 and recorded["K"] == 2
    assert recorded["base_fingerprint"] == base.config.fingerprint

    # The same command again makes only what is missing. Another setting overwrites nothing.
    before = {path: path.stat().st_mtime_ns for path in out.glob("[!.]*")}
    again = call(script, *flags, "--num", 3)
    assert "2 of 3 videos were there already" in again.out
    assert again.out.splitlines()[-1].count(".json") == 1
    call(script, *flags, "--save_fps", 9)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    # A seed gives the same video.
    assert np.array_equal(iio.imread(out / f"{stem}-3.gif"), iio.imread(out / f"{stem}-3-2.gif"))


def test_schedule_flag_equals_the_three(dog, tmp_path, call):
    flags = [*dog, "--format", "png", "--out"]
    call(script, *flags, "a", "--lambda_s", 0.4, "--lambda_l", 0.8, "--K", 1)
    call(script, *flags, "b", "--lambdas", "0.4*1,0.8*3")
    call(script, *flags, "c", "--lambdas", "0.4*2,0.8*2")
    a, b, c = (picture(tmp_path / out) for out in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_compare_and_process(dog, tmp_path, call):
    call(script, *dog, "--format", "png", "gif", "--out", "both", "--prompt", "a V* dog", "--compare",
         "--show_process", "--lambda_s", 0.4, "--lambda_l", 0.8, "--K", 2)
    endings = ("-frames.png", "-process.png", ".gif", ".json", ".png")
    assert visible(tmp_path / "both") == [f"a-v-dog-0{ending}" for ending in endings]
    video = iio.imread(tmp_path / "both" / "a-v-dog-0.gif")
    assert video.shape == (3, 3 * 32 + 14, 3 * 144, 3)
    frames = iio.imread(tmp_path / "both" / "a-v-dog-0-frames.png")
    assert frames.shape[1] == 3 * 144 and frames.shape[0] % 3 == 0


def test_prompts_file_and_shared_work(dog, tmp_path, call):
    """Six videos in three batches: two processes write the same files as one, byte for byte."""
    prompts = "\ufeff# two prompts\r\na V* dog on the grass\r\n\r\na V* dog ../../etc\r\n"
    (tmp_path / "prompts.txt").write_bytes(prompts.encode())
    flags = [*dog, "--prompts", "prompts.txt", "--num_videos", 3, "--batch_size", 2, "--format", "png"]
    call(script, *flags, "--out", "one")
    pids = fork_ranks(2, script.main, ["sample.py", *flags, "--out", "two"], tmp_path)
    assert [wait(pid) for pid in pids] == [0, 0], (tmp_path / "output").read_text()
    one, two = (pngs(tmp_path / out) for out in ("one", "two"))
    assert len(one) == 6 and "001-a-v-dog-etc-2.png" in one
    assert one == two


def test_the_base_alone_is_asked_what_its_subjects_are(base_folder, tmp_path, call):
    call(script, "--base", base_folder, "--subject", "none", "--prompt", "a V* dog on the grass", "--seed", 3)
    recorded = json.loads((tmp_path / "outputs" / "a-dog-on-the-grass-3.json").read_text())
    assert recorded["prompt"] == "a dog on the grass" and recorded["subjects"] == []


def test_several_subjects(base, dog, tmp_path, call):
    """Both updates and both words count."""
    subject = random_subject(base)
    cat = replace(subject, placeholder="<cat>", class_word="cat")
    save_subject(tmp_path / "cat.safetensors", cat)
    both = MergedLoRA(base.unet, [subject, cat])
    name, (A, B) = next(iter(subject.lora.items()))
    W = base.unet.get_submodule(name).weight
    W_0 = W.clone()
    both.set(0.5)
    assert torch.allclose(W, W_0 + 0.5 * (B @ A + B @ A), atol=1e-6)
    both.set(0)
    assert torch.equal(W, W_0)

    call(script, *dog, "--format", "png", "--subject", "cat.safetensors", "--out", "both")
    recorded = json.loads(next((tmp_path / "both").glob("*.json")).read_text())
    assert recorded["prompt"] == "a V* dog and a <cat> cat running on the grass"
    assert len(recorded["subjects"]) == 2


def test_long_and_poor_prompts(dog, tmp_path, call):
    flags = [*dog, "--format", "png", "--prompt"]
    warning = call(script, *flags, "a V* dog " + "on " * 80 + "grass").err
    assert "dropped" in warning and "grass" in warning
    assert "V* comes after the 75 tokens" in call(script, *flags, "on " * 80 + "V* dog", code=2).err
    assert "lacks V*" in call(script, *flags, "a dog").err
    negative = ["--negative_prompt", "blurred " * 80, "--out", "negative"]
    assert "--negative_prompt: only 75 tokens are read" in call(script, *flags, "a V* dog", *negative).err
    call(script, *flags, "a V* dog", "--out", "plain")
    assert not np.array_equal(picture(tmp_path / "negative"), picture(tmp_path / "plain"))


def test_from_a_notebook(base_folder, dog, tmp_path):
    """The README's code runs as it is printed, on the tiny base."""
    section = (ROOT / "README.md").read_text().split("## From a notebook")[1]
    code = section.split("```python\n")[1].split("```")[0].replace("toy/base", str(base_folder))
    names = {}
    exec(code.replace("toy/subject.safetensors", str(tmp_path / "dog.safetensors")), names)
    assert names["video"].shape == (1, 3, 32, 48, 3) and names["video"].dtype == torch.uint8
