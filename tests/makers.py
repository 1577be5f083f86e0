"""What several test files make: small bases, subjects with random weights, and a way to run the scripts."""
import json
import os
import socket
import subprocess
import sys
import time
import traceback
import zlib
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # noqa: F401  AdamW imports it, which takes every forked child two seconds
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from support.cli import run_script  # noqa: E402
from support.config import BaseConfig, SamplingDefaults, TrainingDefaults, save_config  # noqa: E402
from support.files import PARTS, Subject, fingerprint  # noqa: E402
from lora import target_names  # noqa: E402
from model import TextConfig, UNetConfig, VAEConfig  # noqa: E402


def write_base(folder, seed=0, vae_levels=4):
    """A base folder with random weights, in which everything is small and no network starts at zero.

    Latents are 2 ** (vae_levels - 1) times smaller than pixels.
    """
    torch.manual_seed(seed)
    config = BaseConfig(
        name=f"tiny{seed}",
        text_encoder=TextConfig(width=32, heads=2, layers=1),
        vae=VAEConfig(channels=8, channel_mult=(1,) * vae_levels, num_res_blocks=1, norm_groups=4),
        unet=UNetConfig(channels=16, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2),
                        head_channels=8, context_dim=32, norm_groups=4),
        sampling=SamplingDefaults(frames=3, height=32, width=48, fps=8, steps=4, K=2),
        training=TrainingDefaults(rank=2, lr=1e-3, scale_lr=False, frames=3, steps=4, num_prior=2))
    states = {}
    for part in PARTS:
        network = PARTS[part](getattr(config, part))
        for p in network.parameters():  # layers that start at zero would hide what lies before them
            if not p.any():
                torch.nn.init.normal_(p, std=0.05)
        states[part] = network.state_dict()
    config.fingerprint = fingerprint((f"{part}.{name}", states[part][name])
                                     for part in PARTS for name in sorted(states[part]))
    folder.mkdir(parents=True, exist_ok=True)
    for part, state in states.items():
        save_file(state, folder / f"{part}.safetensors", {"fingerprint": config.fingerprint})
    save_config(config, folder / "config.json")
    return folder


def random_subject(base, rank=2, scale=0.3, targets="all"):
    """A subject whose numbers are random."""
    torch.manual_seed(2)
    subject = Subject("V*", "dog", base.config.name, base.config.fingerprint, 7, {"images": "photos"},
                      torch.randn(1, base.config.text_encoder.width))
    for name in target_names(base.unet, targets):
        C_out, C_in = base.unet.get_submodule(name).weight.shape
        subject.lora[name] = scale * torch.randn(rank, C_in), scale * torch.randn(C_out, rank)
    return subject


# The public VideoCrafter2 reference: a small network's weights, and all names of the official checkpoint
GOLDEN = Path(__file__).parent / "golden"
OFFICIAL = json.loads((GOLDEN / "official_keys.json").read_text())
OFFICIAL = {name: tuple(shape) for name, shape in OFFICIAL.items()}
SMALL = {"text_encoder": TextConfig(width=64, heads=4, layers=2),
         "vae": VAEConfig(channels=32, channel_mult=(1, 2, 2), num_res_blocks=1),
         "unet": UNetConfig(channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2),
                            head_channels=16, context_dim=64)}


def golden_state():
    """Official name -> weight that the golden numbers were computed with, of the networks in SMALL."""
    state = {}
    for part in json.loads((GOLDEN / "reference.json").read_text()).values():
        for key, shape in part["shapes"].items():   # the formula is the reference's own
            w = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
            if key.endswith("bias"):
                w = 0.1 * w
            elif len(shape) < 2:
                w = 1 + 0.1 * w
            else:
                w = w / np.sqrt(np.prod(shape[1:]))
            state[key] = torch.from_numpy(np.asarray(w, dtype=np.float32))
    return state


class Bomb:
    """A pickle that holds one makes a folder when it is read carelessly."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def fork(main, argv, cwd, before=None, output="output"):
    """Runs a script's main() in a child, without a new Python -> its pid. It writes to cwd/output."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        os.chdir(cwd)
        file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
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
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid):
    """-> exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.002)


def fork_ranks(world, main, argv, cwd):
    """As `fork`, but in `world` children with the environment that torchrun would give them -> their pids.

    Rank 0 writes to cwd/output, rank 1 to cwd/output-1, and so on.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pids = []
    for rank in range(world):
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        before = lambda: os.environ.update({name: str(value) for name, value in environment.items()})
        pids.append(fork(main, argv, cwd, before, f"output-{rank}" if rank else "output"))
    return pids


def run(script, *flags, cwd, launcher=()):
    """Runs a script in a process of its own -> CompletedProcess with text output."""
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=cwd, env=environment, text=True, capture_output=True, timeout=400)


def torchrun(processes):
    """The launcher for `run` that starts a script on several processes, at a free port."""
    return "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)
