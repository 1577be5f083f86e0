"""Small bases with random weights, and a way to run the scripts as a person would."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from model import (PARTS, BaseConfig, Defaults, TextConfig, UNetConfig, VAEConfig, build_part, fingerprint, load_base, run_script,  # noqa: E402
                   save_config)


def pytest_configure(config):
    torch.set_num_threads(1)  # as in the processes that `run` starts: sums in another order differ in their last digit
    config.addinivalue_line("filterwarnings", "error")
    for category in ("ResourceWarning", "pytest.PytestUnraisableExceptionWarning"):  # FFMPEG's reader, when it is let go
        config.addinivalue_line("filterwarnings", f"ignore::{category}")
    config.addinivalue_line("filterwarnings", "ignore:This process .* is multi-threaded:DeprecationWarning")  # `fork` below, Python 3.12


def write_base(folder, seed=0):
    """A base folder with random weights, none of them zero, in which everything is small."""
    torch.manual_seed(seed)
    config = BaseConfig(
        name=f"tiny{seed}", text=TextConfig(width=32, heads=2, layers=1),
        vae=VAEConfig(channels=8, channel_mult=(1, 1, 1, 1), num_res_blocks=1, norm_groups=4),
        unet=UNetConfig(channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2), head_channels=8,
                        context_dim=32, norm_groups=4),
        defaults=Defaults(frames=3, height=32, width=48, fps=8, steps=4, K=2, rank=2, lr=1e-3, train_steps=4, num_prior=2))
    states = {}
    for part in PARTS:
        network = build_part(part, config)
        for p in network.parameters():  # layers that start at zero would hide what lies before them
            if not p.any():
                torch.nn.init.normal_(p, std=0.05)
        states[part] = network.state_dict()
    config.fingerprint = fingerprint(states)
    folder.mkdir(parents=True)
    for part, state in states.items():
        save_file(state, folder / f"{part}.safetensors")
    save_config(config, folder / "config.json")
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture()
def base(base_folder):
    return load_base(base_folder)


@pytest.fixture(scope="session")
def photos_folder(tmp_path_factory):
    """Three photos of different shapes, one of them with a caption of its own."""
    import numpy as np
    from PIL import Image
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i, (w, h) in enumerate([(60, 40), (40, 60), (64, 64)]):
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "1.txt").write_text("V* on a table\n")
    return folder


def fork(main, argv, cwd, before=None):
    """Runs a script's main() in a child, which spares the start-up -> its pid. Its output goes to cwd/output."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        os.chdir(cwd)
        file = os.open("output", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.argv = list(map(str, argv))
        if before:
            before()
        run_script(main)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid):
    """-> exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(script, *flags, cwd, launcher=()):
    """Runs a script in a process of its own -> CompletedProcess with text output."""
    return subprocess.run([sys.executable, *launcher, str(ROOT / script), *map(str, flags)], cwd=cwd, text=True,
                          capture_output=True, timeout=400, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
