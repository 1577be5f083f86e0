"""What every script does around its work: one-line errors, processes and devices, signals, whole files.

Nothing to run here, and nothing of the paper. A reader of the method may skip this page.
"""
import argparse
import errno
import os
import re
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
    """A mistake that the user can mend. Its message names the file or flag, and the remedy."""


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP arrived. Like Ctrl-C, it ends the script where it is."""


def run_script(main):
    """Runs `main()`. A mistake of the user becomes one line on stderr and exit code 2.

    A stop signal ends the process by that signal, so that the exit code reports it (130, 143 or 129). Any
    other error shows Python's traceback: in code that is meant to be changed, the traceback is the help.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's streams cannot be reconfigured
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    warnings.formatwarning = lambda message, *_: f"warning: {one_line(message)}\n"
    for number in stop_numbers() - {signal.SIGINT}:
        signal.signal(number, raise_stopped)
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except KeyboardInterrupt as stop:
        with suppress(OSError):  # after SIGHUP the terminal is gone
            print("stopped", file=sys.stderr)
        number = stop.args[0] if isinstance(stop, Stopped) else signal.SIGINT
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    except Exception as error:
        message = one_line(error)
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename}: {message}"
        # For a CPU, only the text of PyTorch's error shows that there was too little memory.
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in message:
            message = (f"out of memory ({message}); fewer --frames, a smaller --height and --width, "
                       f"--batch_size 1, and in training --grad_checkpointing need less")
        elif not isinstance(error, (BadInput, OSError)):
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def stop_numbers():
    """The signals that ask a script to stop. One that is ignored, as SIGHUP is under nohup, stays ignored."""
    numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}    # not on Windows
    return {number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN}


def raise_stopped(number, frame):
    raise Stopped(number)


def one_line(error):
    """The first line of an error's message, without an error number."""
    text = str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
    return text if isinstance(error, BadInput) else text.splitlines()[0]


def warn(text):
    """Prints a warning, once for all processes."""
    with suppress(OSError):  # a terminal that is gone must not end a run
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"warning: {text}", file=sys.stderr)


class Progress(tqdm):
    """A progress bar on a terminal. Elsewhere, as in a log file, a line every 30 seconds and at the end."""
    every = 30.0

    def __init__(self, *args, **kwargs):
        self.plain, self.last_shown = not sys.stderr.isatty(), kwargs.get("initial", 0)
        if self.plain:
            kwargs |= {"bar_format": "{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
                       "mininterval": self.every, "leave": False}
        super().__init__(*args, **kwargs)

    def display(self, msg=None, pos=None):
        if not self.plain:
            super().display(msg, pos)
        elif msg is None and self.n > self.last_shown:
            self.last_shown = self.n
            print(f"{self.desc.removesuffix(': ')}: {self}", file=self.fp, flush=True)

    def close(self):
        if self.plain and not self.disable:
            self.display()
        super().close()


class FlagParser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message}; --help lists all flags")


def check_out(out):
    """--out is a folder, or can become one, that may be written to. Raises BadInput."""
    nearest = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
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


def join_processes():
    """Connects this process to the others that torchrun started. Without torchrun it works alone.

    Raises BadInput if this machine has fewer devices than processes.
    """
    if not dist.is_torchelastic_launched():
        if os.environ.get("RANK"):  # a container or an older shell may have left it behind
            rank = os.environ["RANK"]
            print(f"RANK={rank} is set, but torchrun did not start this process; it works alone")
        return Process(0, 1, pick_device(0))
    device = pick_device(int(os.environ["LOCAL_RANK"]))
    # While one process draws a preview, the others wait.
    dist.init_process_group(timeout=timedelta(hours=24), device_id=device if device.type == "cuda" else None)
    return Process(dist.get_rank(), dist.get_world_size(), device)


def pick_device(local_rank):
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind, number = torch.accelerator.current_accelerator().type, torch.accelerator.device_count()
    if local_rank >= number:
        raise BadInput(f"--nproc_per_node: is more than the {number} {kind} devices here; "
                       f"one process needs one device")
    if number > 1:
        torch.accelerator.set_device_index(local_rank)
    return torch.device(kind, local_rank)


def of_all_processes(value, process):
    """The `value` of every process, as a list."""
    values = [value]
    if process.world > 1:
        values = [None] * process.world
        dist.all_gather_object(values, value)
    return values


def check_same(process, **values):
    """Every process has the same values. Raises BadInput: nodes may see other files under the same names."""
    for rank, theirs in enumerate(of_all_processes(values, process)):
        for name, value in values.items():
            if theirs[name] != value:
                raise BadInput(f"the processes differ in their {name}: rank {process.rank} has {value}, rank "
                               f"{rank} has {theirs[name]}; give every node the same")


def mean_over_processes(x, process):
    if process.world > 1:
        dist.all_reduce(x)
    return x / process.world


def wait_for_all(process):
    if process.world > 1:
        dist.barrier()


def pick_precision(precision, device, training=False):
    """What "auto" means here: bfloat16 on a device that has it, else float16 to sample and float32 to train.

    Emulated bfloat16 does not count: it is slower than float32. Training without a scaled loss would lose its
    small gradients in float16. Apple's devices take float32.
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
    """Yields a function, called by all processes, that returns True once any of them got a stop signal.

    The block can then save. After it, the processes wait for each other, and that signal ends them all. A
    second Ctrl-C ends the script at once. A second SIGTERM does not, because a scheduler may send one and
    torchrun another.
    """
    received, agreed = [], []

    def note(number, frame):
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    def asked_to_stop():
        number = torch.tensor(received[0] if received else 0, device=process.device)
        if process.world > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)
        if number:
            agreed.append(int(number))
        return bool(number)

    before = {number: signal.signal(number, note) for number in stop_numbers()}
    try:
        yield asked_to_stop
        wait_for_all(process)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if agreed:
        raise Stopped(agreed[0])


# ------------------------------------------------------------------------------------------------------------
# Files that appear whole or not at all, in a folder with one writer


@contextmanager
def atomic_write(path):
    """Yields a temporary path in the same folder, which replaces `path` if the block ends without an error.

    So a reader finds the old file or the new one, never half of one, even after a kill or a power cut. The
    block may make a folder instead, where there was none. Raises BadInput if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        yield temporary
        make_durable(temporary)
        os.replace(temporary, path)
    except Exception as error:
        # PyTorch and safetensors report a full disk by errors of their own.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or shutil.disk_usage(path.parent).free < 2**20:
            raise BadInput(f"{path}: the disk is full; make room, or name another --out") from None
        if isinstance(error, BadInput):
            raise BadInput(str(error).replace(str(temporary), str(path))) from None
        raise
    finally:
        remove(temporary)


def make_durable(path):
    """Flushes a file, or a folder's files, to the disk, with the permissions that the umask asks for."""
    umask = os.umask(0)
    os.umask(umask)
    for file in path.iterdir() if path.is_dir() else [path]:
        file.chmod(0o666 & ~umask)  # safetensors writes files that only their owner may read
        with open(file, "rb+") as f:
            os.fsync(f.fileno())


def remove(path):
    """Removes a file or a folder, or nothing."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def lock_folder(folder, wait=False):
    """Lets only this run write into `folder` until the block ends. Removes a killed run's temporary files.

    Raises BadInput if another run is writing there, or waits for it to end. On a file system without locks a
    warning replaces the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ".writer.lock"
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        remedy = f"if none is, as after a kill on another machine, delete {file}"
        if not wait:
            raise BadInput(f"{folder}: another run is writing there; wait for it, or name another folder; "
                           f"{remedy}") from None
        print(f"{folder}: another run is writing there; waiting for it; {remedy}")
        lock.acquire()
    except (OSError, NotImplementedError) as error:
        warn(f"{file}: this file system has no locks ({one_line(error)}); start no other run in that folder")
    try:
        for path in folder.glob(".tmp-*") if lock.is_locked else []:
            if re.fullmatch(r"\.tmp-\d+-.+", path.name):
                with suppress(OSError):     # another process may still read it
                    remove(path)
        yield
    finally:
        lock.release()


def leave_processes(process):
    wait_for_all(process)


def of_rank_0(value, process):
    return of_all_processes(value, process)[0]
