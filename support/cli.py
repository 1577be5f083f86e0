"""What every script needs around its work: one-line errors, processes, devices, signals and atomic files."""
import argparse
import errno
import os
import shutil
import signal
import sys
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from tqdm import tqdm

ROOT = Path(__file__).parent.parent


class BadInput(Exception):
    """A mistake that the user can correct. Its message names the file or flag, and the remedy."""


def run_script(main):
    """Runs `main()`. A user's mistake becomes one line on stderr and exit code 2.

    A signal that stopped a training ends the process, so that the exit code reports it (130, 143 or 129). Any
    other error shows Python's traceback, because it helps whoever changes this code.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's streams cannot be reconfigured
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    warnings.formatwarning = lambda message, *_: f"warning: {one_line(message)}\n"
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt as stop:
        with suppress(OSError):  # after SIGHUP the terminal is gone
            print("stopped", file=sys.stderr)
        number = stop.args[0] if stop.args else signal.SIGINT
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    except Exception as error:
        message = one_line(error)
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {message}"
        # On a CPU, PyTorch raises a RuntimeError, whose text alone shows that memory ran out.
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in message:
            message = (f"out of memory ({message}); use fewer --frames, a smaller --height and --width, "
                       f"--batch_size 1, or in training --grad_checkpointing")
        elif not isinstance(error, (BadInput, OSError)):
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def one_line(error):
    """The first line of an error's message, without the system's error number."""
    text = str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
    return text if isinstance(error, BadInput) else text.splitlines()[0]


def warn(text):
    """Prints a warning, once for all processes."""
    with suppress(OSError):  # a terminal that is gone must not end a run
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"warning: {text}", file=sys.stderr)


def progress_bar(*args, **kwargs):
    """A progress bar on a terminal. Elsewhere, as in a log file, a line every 30 seconds and at the end."""
    if not sys.stderr.isatty():
        kwargs |= {"bar_format": "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n",
                   "mininterval": 30, "maxinterval": 30}
    return tqdm(*args, **kwargs)


class FlagParser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message}; --help lists all flags")


def check_out(out):
    """Raises BadInput unless --out is a folder, or can become one, in which files may be written."""
    nearest = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise BadInput(f"--out {out}: {nearest} is a file, or you may not write to it; name another folder")


# ------------------------------------------------------------------------------------------------------------
# Processes, devices, signals


@dataclass(frozen=True)
class Process:
    """This process among those of torchrun: number `rank` of `world`, and the device it works on."""
    rank: int
    world: int
    device: torch.device


def join_processes():
    """Connects this process to the others that torchrun started. Without torchrun it works alone.

    Raises BadInput if this machine has fewer devices than processes.
    """
    if not dist.is_torchelastic_launched():
        rank = os.environ.get("RANK")   # a container, or an earlier command in this shell
        if rank:
            print(f"RANK={rank} is set, but torchrun did not start this process; it works alone")
        return Process(0, 1, pick_device(0))
    device = pick_device(int(os.environ["LOCAL_RANK"]))
    # The others wait while one process draws a preview, so PyTorch's 30 minutes may be too short.
    dist.init_process_group(timeout=timedelta(hours=24), device_id=device if device.type == "cuda" else None)
    return Process(dist.get_rank(), dist.get_world_size(), device)


def pick_device(local_rank):
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind, number = torch.accelerator.current_accelerator().type, torch.accelerator.device_count()
    if local_rank >= number:
        raise BadInput(f"--nproc_per_node: is more than the {number} {kind} devices of this machine")
    if number > 1:
        torch.accelerator.set_device_index(local_rank)
    return torch.device(kind, local_rank)


def of_all_processes(value, process):
    """The `value` of every process, as a list."""
    values = [value] * process.world
    if process.world > 1:
        dist.all_gather_object(values, value)
    return values


def check_same(process, **values):
    """Raises BadInput if the processes' values differ, as where nodes have other files under one name."""
    for rank, others in enumerate(of_all_processes(values, process)):
        for name, value in values.items():
            if others[name] != value:
                raise BadInput(f"the processes differ in their {name}: rank {process.rank} has {value}, rank "
                               f"{rank} has {others[name]}; give every node the same")


def mean_over_processes(x, process):
    if process.world > 1:
        dist.all_reduce(x)
    return x / process.world


def wait_for_all(process):
    if process.world > 1:
        dist.barrier()


def pick_precision(precision, device, training=False):
    """Resolves "auto": bfloat16 on a GPU that has it, otherwise float16 to sample and float32 to train.

    CPUs and Apple's devices use float32. Emulated bfloat16 does not count, because it is slower than float32.
    Training avoids float16, in which small gradients vanish unless the loss is scaled.
    """
    if precision != "auto":
        return precision
    if device.type not in ("cuda", "xpu"):
        return "float32"
    if torch.get_device_module(device).is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float32" if training else "float16"


@contextmanager
def stop_signals(process):
    """Yields a function, called by all processes, that returns the stop signal that any of them got, or 0.

    The block can then save. After it, the processes wait for each other, and the signal ends them all. A
    second Ctrl-C ends the script at once, but a second SIGTERM does not, because a scheduler may send one and
    torchrun another.
    """
    received = []

    def note(number, frame):
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt(number)
        received.append(number)

    def asked_to_stop():
        number = torch.tensor(max(received, default=0), device=process.device)
        if process.world > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    kinds = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}      # not on Windows
    before = {kind: signal.signal(kind, note) for kind in kinds
              if signal.getsignal(kind) is not signal.SIG_IGN}      # as SIGHUP is under nohup
    try:
        yield asked_to_stop
        number = asked_to_stop()    # here the processes wait for each other
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    if number:
        raise KeyboardInterrupt(number)


# ------------------------------------------------------------------------------------------------------------
# Files that appear whole or not at all, in a folder that one run writes into


@contextmanager
def atomic_write(path):
    """Yields a temporary path in the same folder, which replaces `path` if the block ends without an error.

    So a reader finds the old file or the new one, never half of one, even after a kill or a power cut. The
    block may also make a folder, if nothing exists at `path`. Raises BadInput if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        make_durable(temporary)
        os.replace(temporary, path)
    except Exception as error:
        # PyTorch and safetensors raise errors without an errno if the disk is full.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        if full or shutil.disk_usage(path.parent).free < 2**20:
            raise BadInput(f"{path}: the disk is full; make room, or name another --out") from None
        raise
    finally:
        remove(temporary)


def make_durable(path):
    """Flushes a file, or a folder's files, to the disk, and gives it the permissions of the umask."""
    umask = os.umask(0)
    os.umask(umask)
    for file in path.iterdir() if path.is_dir() else [path]:
        file.chmod(0o666 & ~umask)  # safetensors writes files that only their owner may read
        with open(file, "rb+") as f:
            os.fsync(f.fileno())


def remove(path):
    """Removes a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def lock_folder(folder, rank=0, wait=False):
    """Lets only this run write into `folder` until the block ends. Removes a killed run's temporary files.

    If another run is writing there, waits for its end if `wait`, and raises BadInput otherwise. Rank 0 holds
    the lock for all processes. On a file system without locks, a warning replaces the lock.
    """
    if rank > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ".writer.lock"
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        remedy = f"if that run was killed on another machine, delete {file}"
        if not wait:
            raise BadInput(f"{folder}: another run is writing there; wait for it, or name another folder; "
                           f"{remedy}") from None
        print(f"{folder}: another run is writing there; waiting for it; {remedy}")
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        warn(f"{file}: this file system has no locks ({one_line(error)}); start no other run in that folder")
    try:
        for path in folder.glob(".tmp-[0-9]*-*") if lock.is_locked else []:
            with suppress(OSError):     # another process may still read it
                remove(path)
        yield
    finally:
        lock.release()
