"""What every script does around its work: one-line errors, flags, processes, devices, signals, whole files.

Nothing to run here, and nothing of the paper. A reader of the method may skip this page.
"""
import argparse
import fcntl
import os
import resource
import shutil
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent


class BadInput(Exception):
    """A file or flag that the user has to change. Its line says which, what is wrong, and what is right."""


def run_script(main):
    """Runs `main()`. BadInput or a fault of the disk becomes one line on stderr, exit code 2; Ctrl-C, 130."""
    sys.stdout.reconfigure(line_buffering=True)
    try:
        main()
    except (BadInput, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def one_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class FlagParser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message}; --help lists all flags")


def check_out(out):
    """--out is, or can become, a folder to write into. Raises BadInput."""
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise BadInput(f"--out {out}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK):
        raise BadInput(f"--out {out}: {nearest} may not be written to; name another folder")


# ------------------------------------------------------------------------------------------------------------
# Processes, devices, signals


@dataclass(frozen=True)
class Process:
    """This process among those of torchrun: number `rank` of `world`, and the device it works on."""
    rank: int
    world: int
    device: torch.device


def this_process():
    """What torchrun says in the environment; without torchrun, the only process. Raises BadInput."""
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if not torch.cuda.is_available():
        return Process(rank, world, torch.device("cpu"))
    if local_rank >= torch.cuda.device_count():
        raise BadInput(f"--nproc_per_node: is more than the {torch.cuda.device_count()} GPUs here; "
                       f"one process needs one GPU")
    torch.cuda.set_device(local_rank)
    return Process(rank, world, torch.device("cuda", local_rank))


def pick_precision(precision, device):
    """What "auto" means here: bfloat16 on a GPU that has it, else float32."""
    if precision != "auto":
        return precision
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def as_on_rank_0(value, world):
    """Rank 0's value, on every process: a random seed, or what another process may find written already."""
    box = [value]
    if world > 1:
        dist.init_process_group("gloo")
        dist.broadcast_object_list(box)
        dist.destroy_process_group()
    return box[0]


def peak_memory():
    """The most memory that this process has held so far, in GB: the GPU's where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@contextmanager
def stop_signals():
    """Gives a list that fills when SIGTERM or Ctrl-C comes. A second Ctrl-C ends the script at once."""
    came = []

    def note(number, frame):
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------
# Files that appear whole or not at all, in a folder with one writer


@contextmanager
def complete_or_absent(path):
    """Gives a temporary path in the same folder, which takes the place of `path` when the block ends
    without error.

    So a reader finds the old file or the new one, never half of one, even if the process is killed. The
    block may make a folder instead, where none was. Raises BadInput if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except Exception:  # every library reports a full disk in its own way
        if shutil.disk_usage(path.parent).free < 2**20:
            advice = "make room, or name another --out"
            raise BadInput(f"{path}: not written, the disk is full; {advice}") from None
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


@contextmanager
def only_writer(folder, rank=0, unfinished=(".tmp-*",)):
    """Holds `folder` for this run until the block ends, and removes what a killed run left unfinished there.

    Of a run's processes only rank 0 does so. Raises BadInput if another run writes there.
    """
    if rank > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{folder}: another run is writing there; wait for it, "
                           f"or name another folder") from None
        for pattern in unfinished:
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield
    finally:
        os.close(handle)
