"""Machines that are not at hand: other devices, other systems, and launches that are not whole.

Device queries are replaced, so that each kind of machine is seen from a CPU. Processes are forked children.
"""
import os
import subprocess
import sys
from argparse import Namespace
from datetime import timedelta

import psutil
import pytest
import torch
import torch.nn.functional as F

import cli
import files
import model
from cli import BadInput, Process, join_processes, launched_as, peak_memory, pick_precision, this_process
from files import Base, pick_checkpointing
from makers import ROOT, fork_ranks, wait
from model import Attention, TemporalConv

WHOLE = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
         "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def no_launch(monkeypatch):
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)


def without(*names):
    return {name: value for name, value in WHOLE.items() if name not in names}


# ------------------------------------------------------------------------------------------------------------
# Launches


@pytest.mark.parametrize("environment, expected", [
    ({}, (0, 0, 1)),
    ({"RANK": "", "WORLD_SIZE": ""}, (0, 0, 1)),
    ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 0, 1)),
    ({"MASTER_ADDR": "node", "MASTER_PORT": "1"}, (0, 0, 1)),
    (WHOLE, (1, 1, 2)),
    (WHOLE | {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}, (5, 1, 8)),
])
def test_a_launch_is_believed_if_it_is_whole(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched_as() == expected


@pytest.mark.parametrize("environment, said", [
    ({"RANK": "1"}, "RANK='1' in the environment: LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE='2' in the environment"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' in the environment"),
    ({"LOCAL_RANK": "1"}, "LOCAL_RANK='1' in the environment"),
    ({"RANK": "1", "WORLD_SIZE": "2"}, "is not set"),
    (without("LOCAL_RANK"), "LOCAL_RANK is not set"),
    (without("MASTER_PORT"), "MASTER_PORT is not set"),
    (WHOLE | {"WORLD_SIZE": "0"}, "no such launch"),
    (WHOLE | {"WORLD_SIZE": "1"}, "no such launch"),
    (WHOLE | {"RANK": "2"}, "no such launch"),
    (WHOLE | {"RANK": "0"}, "no such launch"),
    (WHOLE | {"RANK": "-1"}, "whole numbers"),
    (WHOLE | {"WORLD_SIZE": "two"}, "whole numbers"),
    (WHOLE | {"LOCAL_RANK": "1\n2"}, "whole numbers"),
])
def test_half_a_launch_is_refused(monkeypatch, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput) as refused:
        this_process()
    assert said in str(refused.value) and "unset RANK" in str(refused.value)
    assert "\n" not in str(refused.value)


def join_with(facts, device="cpu"):
    """A script that joins the other processes with its own rank's facts, and prints."""
    def main():
        rank = int(os.environ["RANK"])
        process = Process(rank, int(os.environ["WORLD_SIZE"]), torch.device(device if rank else "cpu"))
        join_processes(process, save=facts[rank])
        print("joined")
        torch.distributed.destroy_process_group()
    return main


@pytest.mark.parametrize("facts, device, said", [
    (("step-000004 0a", "none"), "cpu", "differ in their save: rank 0 has step-000004 0a, rank 1 none"),
    (("step-000004 0a", "step-000004 0b"), "cpu", "differ in their save"),
    (("none", "none"), "meta", "differ in their device: rank 0 has cpu, rank 1 meta"),
])
def test_processes_that_differ_are_refused_by_all(tmp_path, facts, device, said):
    codes = [wait(pid) for pid in fork_ranks(2, join_with(facts, device), ["join"], tmp_path)]
    assert codes == [2, 2]
    for output in ("output", "output-1"):
        text = (tmp_path / output).read_text()
        assert text.count("error:") == 1 and said in text and "Traceback" not in text


def test_processes_that_agree_are_joined(tmp_path):
    assert [wait(pid) for pid in fork_ranks(2, join_with(("none", "none")), ["join"], tmp_path)] == [0, 0]
    assert "joined" in (tmp_path / "output").read_text() and "joined" in (tmp_path / "output-1").read_text()


def test_a_process_that_never_comes_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "ARRIVAL", timedelta(seconds=2))

    def main():
        if os.environ["RANK"] == "0":
            join_processes(Process(0, 2, torch.device("cpu")))

    codes = [wait(pid) for pid in fork_ranks(2, main, ["join"], tmp_path)]
    assert codes == [2, 0]
    assert "did not come together" in (tmp_path / "output").read_text()


def test_a_slow_process_is_waited_for_longer_than_the_prior_takes():
    assert cli.PATIENCE >= timedelta(hours=12)


# ------------------------------------------------------------------------------------------------------------
# Devices


def pretend(monkeypatch, kind, count):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)


@pytest.mark.parametrize("kind, count, expected", [
    ("cpu", 0, "cpu"), ("cuda", 1, "cuda:0"), ("mps", 1, "mps:0"), ("xpu", 2, "xpu:0")])
def test_the_device_is_the_accelerator_or_the_cpu(monkeypatch, kind, count, expected):
    pretend(monkeypatch, kind, count)
    assert this_process().device == torch.device(expected)


def test_more_processes_than_devices_are_refused(monkeypatch):
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    pretend(monkeypatch, "cuda", 2)
    assert this_process() == Process(1, 2, torch.device("cuda:1"))
    pretend(monkeypatch, "cuda", 1)
    with pytest.raises(BadInput, match="--nproc_per_node: is more than the 1 cuda devices here"):
        this_process()


@pytest.mark.parametrize("kind, has_bfloat16, training, expected", [
    ("cpu", True, False, "float32"), ("mps", True, False, "float32"),
    ("cuda", True, False, "bfloat16"), ("cuda", True, True, "bfloat16"),
    ("cuda", False, False, "float16"), ("cuda", False, True, "float32"),     # T4, V100
    ("xpu", True, False, "bfloat16"), ("xpu", False, True, "float32")])
def test_precision_is_what_the_device_really_has(monkeypatch, kind, has_bfloat16, training, expected):
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "is_bf16_supported",
                            lambda including_emulation=True: including_emulation or has_bfloat16)
    assert pick_precision("auto", torch.device(kind), training) == expected
    assert pick_precision("float16", torch.device(kind), training) == "float16"


def test_peak_memory_is_at_least_what_is_held_and_does_not_fall():
    held = torch.ones(2**27)    # half a GB
    now, during = psutil.Process().memory_info().rss / 2**30, peak_memory()
    assert 0.5 < now - 0.1 < during < psutil.virtual_memory().total / 2**30
    del held
    assert peak_memory() > during - 0.01    # the kernel counts in batches of pages


@pytest.mark.parametrize("asked, memory_gb, expected", [
    (None, 80, False), (None, 48, False), (None, 24, True), (None, 8, True),
    (True, 80, True), (False, 8, False)])
def test_checkpointing_turns_itself_on_where_memory_is_short(monkeypatch, capsys, asked, memory_gb, expected):
    """VideoCrafter2's size, whose default training takes 34 GB."""
    config = files.BaseConfig()
    with torch.device("meta"):
        networks = {part: files.build_part(part, config) for part in files.PARTS}
    networks["unet"].bfloat16()
    base = Base(config, "meta", **networks)
    monkeypatch.setattr(files, "device_memory", lambda device: memory_gb * 2**30)
    args = Namespace(grad_checkpointing=asked)
    assert pick_checkpointing(args, base, config.training, config.sampling, rank=0) == expected
    said = capsys.readouterr().out
    assert ("--grad_checkpointing is on" in said) == (expected and asked is None)


# ------------------------------------------------------------------------------------------------------------
# What the networks do for a device


def test_attention_above_the_kernels_largest_batch_is_split(monkeypatch):
    torch.manual_seed(0)
    attention, x = Attention(16, 16, 2), torch.randn(7, 5, 16)
    whole, sizes, fused = attention(x, x), [], F.scaled_dot_product_attention

    def attend(q, k, v):
        sizes.append(len(q))
        return fused(q, k, v)

    monkeypatch.setattr(model, "CUDA_GRID", 3)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    assert torch.equal(attention(x, x), whole) and sizes == [3, 3, 1]


def test_the_temporal_convolution_equals_the_3d_one():
    torch.manual_seed(0)
    layer, x = TemporalConv(8, 4).double().eval(), torch.randn(2 * 5, 8, 3, 4, dtype=torch.float64)
    torch.nn.init.normal_(layer.convs[-1].weight)
    h = video = x.unflatten(0, (2, -1)).transpose(1, 2)
    for norm, conv in zip(layer.norms, layer.convs):
        h = F.conv3d(F.silu(norm(h)), conv.weight, conv.bias, padding=(1, 0, 0))
    expected = (video + h).transpose(1, 2).flatten(0, 1)
    assert torch.allclose(layer(x, 2), expected, rtol=0, atol=1e-12)


def test_the_vae_encodes_a_few_frames_at_a_time(base, monkeypatch):
    frames, sizes, encode = torch.rand(6, 3, 32, 48) * 2 - 1, [], base.vae.encode

    def counted(x):
        sizes.append(len(x))
        return encode(x)

    with torch.no_grad():
        whole = base.vae.encode(frames)
    monkeypatch.setattr(base.vae, "encode", counted)
    assert torch.allclose(base.encode(frames), whole, atol=1e-6) and sizes == [4, 2]


# ------------------------------------------------------------------------------------------------------------
# Systems without fcntl, resource and fork (Windows)


SCRIPTS = ("convert_ckpt.py", "paper/evaluate.py", "toy/pretrain.py", "toy/experiment.py")
ELSEWHERE = """
import os, runpy, sys
sys.modules["fcntl"] = sys.modules["resource"] = None
del os.fork
script, *flags = sys.argv[1:]
sys.argv = [script, *flags]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""


def run_elsewhere(script, *flags, cwd):
    command = [sys.executable, "-c", ELSEWHERE, str(ROOT / script), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, timeout=100)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_starts_on_other_systems(script, tmp_path):
    done = run_elsewhere(script, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_training_and_sampling_run_on_other_systems(base_folder, photos_folder, tmp_path):
    done = run_elsewhere("train.py", "--base", base_folder, "--images", photos_folder, "--class_word", "dog",
                         "--steps", 1, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_elsewhere("sample.py", "--base", base_folder, "--subject", "run/subject.safetensors",
                         "--steps", 2, "--K", 1, "--format", "gif", "--out", "videos", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "videos").glob("*.gif"))
