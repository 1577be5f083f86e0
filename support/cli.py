"""What every script does around its work: one-line errors, flags, processes, devices, signals, whole files.

Nothing to run here, and nothing of the paper. A reader of the method may skip this page.
"""
import argparse
import errno
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).parent


def end_at_once(number, frame):
    os.write(2, b"stopped\n")
    os._exit(130)


# Ctrl-C while libraries are imported, when nothing has begun. So every script imports this page first.
# Another program that imports this page, such as a notebook, keeps its own Ctrl-C.
OUR_SCRIPT = Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve().parent in (
    ROOT.resolve(), ROOT.resolve() / "paper", ROOT.resolve() / "toy")
if OUR_SCRIPT and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, end_at_once)

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from tqdm import tqdm


class BadInput(Exception):
    """A file or flag that the user has to change. Its line says which, what is wrong, and what is right."""


class Busy(BadInput):
    """A folder in which another run is writing: the one fault that waiting mends."""


def run_script(main):
    """Runs `main()`, and turns every end of it into one line on stderr at most.

    Exit codes: 2 for BadInput, the disk and too little memory; 130 for Ctrl-C; 1 for what nobody foresaw.
    --traceback shows where that happened.
    """
    show_traceback = "--traceback" in sys.argv[1:]
    sys.argv[1:] = [flag for flag in sys.argv[1:] if flag != "--traceback"]
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, so that a print would fail
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(line_buffering=True, errors="backslashreplace")
        setattr(sys, name, Unfailing(getattr(sys, name), name))
    warnings.formatwarning = lambda message, *_: f"warning: {one_line(message)}\n"
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        end_with("stopped", 130)
    except Exception as error:  # the one place for all that nobody foresaw
        if show_traceback:
            traceback.print_exc()
        line = one_line(error)
        if out_of_memory(error):
            end_with(f"error: out of memory ({line}); fewer --frames, a smaller --height and --width, "
                     f"--batch_size 1, and in training --grad_checkpointing need less", 2)
        if isinstance(error, OSError) and error.filename:
            line = f"{printable(error.filename)}: {line}"
        if disk_is_full(error):
            line = f"{line}; the disk is full, make room or name another --out"
        if isinstance(error, (BadInput, OSError)):
            end_with(f"error: {line}", 2)
        end_with(f"unexpected: {type(error).__name__}: {line}; please report, --traceback shows it", 1)
    finally:
        if OUR_SCRIPT:  # the work is over, and the libraries take their time to end
            signal.signal(signal.SIGINT, signal.SIG_IGN)


class Unfailing:
    """A standard stream that may be lost: a full disk or a closed pipe is said once, and ends no run."""

    def __init__(self, stream, name):
        self.stream, self.name, self.told = stream, name, False

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, call, *args):
        try:
            call(*args)
        except (OSError, ValueError) as error:
            if not self.told:
                self.told = True
                print(f"warning: {self.name}: not written ({one_line(error)}); the run goes on",
                      file=sys.stdout if self.name == "stderr" else sys.stderr)


def end_with(line, code):
    print(line, file=sys.stderr)
    sys.exit(code)


def out_of_memory(error):
    """Whether the device or the CPU had too little memory. PyTorch's CPU says so in its text alone."""
    too_little = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc",
                  "could not create a primitive")  # oneDNN's words for it
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        getattr(error, "errno", None) == errno.ENOMEM) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in too_little))


def disk_is_full(error):
    """Whether the disk, or this user's share of it, had no room."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)


def one_line(error):
    """An error as one printable line: the system's reason without number, or a library's first line."""
    text = str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
    return printable(text if isinstance(error, BadInput) else text.splitlines()[0])


def printable(text):
    """Text from a file as one line that a terminal shows and does not obey: "\\x1b" for an escape code.

    A long text loses its middle.
    """
    text = str(text)
    if len(text) > 1000:
        text = f"{text[:500]} ... {text[-500:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
                   for c in text)


def warn(text):
    print(f"warning: {printable(text)}", file=sys.stderr)


class Progress(tqdm):
    """A progress bar on a terminal. Elsewhere, as in a log file, a plain line now and then and at the end."""
    every = 30.0    # seconds

    def __init__(self, *args, **kwargs):
        self.plain = not sys.stderr.isatty()
        self.told, self.told_n = time.monotonic(), kwargs.get("initial", 0)
        if self.plain:  # without `leave`, tqdm ends its last line with nothing of its own
            form = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
            kwargs |= {"bar_format": form, "leave": False}
        super().__init__(*args, **kwargs)

    def display(self, msg=None, pos=None):
        if not self.plain:
            return super().display(msg, pos)
        if msg is None and time.monotonic() - self.told >= self.every:
            self.tell()

    def tell(self):
        self.told, self.told_n = time.monotonic(), self.n
        named = f"{self.desc.rstrip(': ')}: " if self.desc else ""
        print(f"{named}{self}", file=self.fp, flush=True)

    def close(self):
        if self.plain and not self.disable and self.n != self.told_n:
            self.tell()
        super().close()


class FlagParser(argparse.ArgumentParser):
    MAY_BE_EMPTY = ("--negative_prompt",)

    def parse_args(self, args=None, namespace=None):
        """As argparse's. No flag may be empty, as an unset shell variable leaves it, or no text.

        A shell does not expand the ~ in --out=~/videos; this does.
        """
        args, name = sys.argv[1:] if args is None else list(args), "argument 1"
        for i, arg in enumerate(args):
            value = arg
            if arg.startswith("--"):
                name, equals, value = arg.partition("=")
                if value.startswith("~/"):
                    args[i] = f"{name}={os.path.expanduser(value)}"
                if not equals:
                    continue
            if not value.strip() and name not in self.MAY_BE_EMPTY:
                raise BadInput(f"{name}: is empty; name something, or leave {name} out")
            if not is_text(value):  # a subject could be saved under it, and not be read again
                raise BadInput(f"{name} {printable(value)}: holds control codes, or bytes that are not "
                               f"{sys.getfilesystemencoding()}; write it, or rename the file, without")
        return super().parse_args(args, namespace)

    def error(self, message):
        raise BadInput(f"{message}; --help lists all flags")


# Control codes, ends of lines and paragraphs, changes of direction, and bytes that are not UTF-8.
NO_TEXT = re.compile("[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def is_text(text):
    """Whether a name or a word is one line that a terminal shows, and that is written as UTF-8."""
    return not NO_TEXT.search(text)


def check_out(out):
    """--out is, or can become, a folder to write into. Raises BadInput."""
    nearest = next(folder for folder in (out, *out.absolute().parents) if os.path.lexists(folder))
    if not nearest.exists():
        raise BadInput(f"--out {out}: {nearest} is a link to nothing; name a folder")
    if not nearest.is_dir():
        raise BadInput(f"--out {out}: {nearest} is a file; name a folder")
    if not os.access(nearest, os.W_OK):
        raise BadInput(f"--out {out}: {nearest} may not be written to; name another folder")


# ------------------------------------------------------------------------------------------------------------
# Processes, devices, signals

LAUNCHER = ("MASTER_ADDR", "MASTER_PORT")   # with RANK, LOCAL_RANK and WORLD_SIZE, what a launch sets
ARRIVAL = timedelta(minutes=10)             # for all processes to start
PATIENCE = timedelta(hours=24)              # while one process makes the prior or a preview

most_seen = 0.0     # by peak_memory, in GB


@dataclass(frozen=True)
class Process:
    """This process among those of torchrun: number `rank` of `world`, and the device it works on."""
    rank: int
    world: int
    device: torch.device


def this_process():
    """What torchrun says in the environment; without torchrun, the only process. Raises BadInput."""
    rank, local_rank, world = launched_as()
    if not torch.accelerator.is_available():
        return Process(rank, world, torch.device("cpu"))
    accelerator, count = torch.accelerator.current_accelerator().type, torch.accelerator.device_count()
    if local_rank >= count:
        raise BadInput(f"--nproc_per_node: is more than the {count} {accelerator} devices here; "
                       f"one process needs one device")
    if count > 1:
        torch.accelerator.set_device_index(local_rank)
    return Process(rank, world, torch.device(accelerator, local_rank))


def launched_as():
    """-> rank, local rank, world size. Raises BadInput where the environment tells half of a launch.

    A container or an older shell may leave some of the variables behind. Believed, RANK=1 alone would leave
    out most of the work and save nothing.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    said = {name: os.environ[name] for name in (*alone, *LAUNCHER) if os.environ.get(name)}
    if all(said.get(name, value) == value for name, value in alone.items()):
        return 0, 0, 1
    advice = "start with torchrun, or unset RANK, LOCAL_RANK and WORLD_SIZE"
    missing = [name for name in (*alone, *LAUNCHER) if name not in said]
    named = ", ".join(f"{name}={said[name]!a}" for name in alone if name in said)
    if missing:
        raise BadInput(f"{named} in the environment: {', '.join(missing)} is not set; {advice}")
    if not all(said[name].isascii() and said[name].isdigit() for name in alone):
        raise BadInput(f"{named} in the environment: should be whole numbers from 0; {advice}")
    rank, local_rank, world = (int(said[name]) for name in alone)
    if not local_rank <= rank < world:
        raise BadInput(f"{named} in the environment: no such launch is possible; {advice}")
    return rank, local_rank, world


def join_processes(process, backend=None, **facts):
    """Connects torchrun's processes, if their kinds of device and their `facts` agree. Raises BadInput.

    Without the comparison, nodes that share no folder and find different saves would wait for each other.
    """
    if process.world == 1:
        return
    facts = {"device": process.device.type, **facts}
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=ARRIVAL))
        store.set(f"facts of {rank}", json.dumps(facts))
        found = [json.loads(store.get(f"facts of {other}")) for other in range(world)]
        store.set(f"seen by {rank}", "yes")
        for other in range(world if rank == 0 else 0):  # rank 0 may hold the store, and leaves last
            store.get(f"seen by {other}")
    except (RuntimeError, ValueError) as error:
        raise BadInput(f"the {process.world} processes did not come together within "
                       f"{ARRIVAL.seconds // 60} minutes ({one_line(error)}); see what the others say, "
                       f"and --nnodes, --node_rank and --master_addr of torchrun") from None
    for other in range(world):
        for name, value in found[0].items():
            if found[other][name] != value:
                raise BadInput(f"the processes differ in their {name}: rank 0 has {value}, rank {other} "
                               f"{found[other][name]}; give every node the same")
    device = None  # gloo takes none
    if backend is None:
        backend = dist.get_default_backend_for_device(process.device)
        device = process.device if process.device.type == "cuda" else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE,
                            device_id=device)


def leave_processes(process):
    """Waits for all processes, and ends their connection."""
    if process.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def as_on_rank_0(value, process):
    """Rank 0's value, on every process: a random seed, or what another process may find written already."""
    box = [value]
    if process.world > 1:
        dist.broadcast_object_list(box)
    return box[0]


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


def device_memory(device):
    """All memory that `device` has, in bytes: on a CPU, the machine's."""
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if hasattr(os, "sysconf"):  # Linux, macOS
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    import psutil
    return psutil.virtual_memory().total


def peak_memory():
    """The most memory that this process has held so far, in GB: the GPU's where there is one.

    Where the system keeps no peak (macOS), the most that was seen when this was asked.
    """
    global most_seen
    if torch.cuda.is_available() or torch.xpu.is_available():
        return torch.get_device_module().max_memory_allocated() / 2**30
    if torch.backends.mps.is_available():
        return torch.mps.driver_allocated_memory() / 2**30
    status = Path("/proc/self/status")  # Linux
    if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(peak[1]) / 2**20
    import psutil
    memory = psutil.Process().memory_info()
    most_seen = max(most_seen, getattr(memory, "peak_wset", memory.rss) / 2**30)
    return most_seen


@contextmanager
def stop_signals(process):
    """Gives a question that all processes ask together: has SIGTERM or Ctrl-C come to any of them?

    A second Ctrl-C ends the script at once. A second SIGTERM does not: a scheduler may send one, and
    torchrun another.
    """
    came = []

    def note(number, frame):
        if number == signal.SIGINT and number in came:
            raise KeyboardInterrupt
        came.append(number)

    def asked_to_stop():
        if process.world == 1:
            return bool(came)
        wishes = torch.tensor(len(came), device=process.device)
        dist.all_reduce(wishes)
        return bool(wishes)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked_to_stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------
# Files from elsewhere


def check_regular(path):
    """Raises OSError where there is a pipe or a device, which could be read for ever, or a folder."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))


@contextmanager
def quiet_libraries():
    """Keeps off the terminal what C libraries say of a damaged file. What we say of it comes after."""
    try:
        terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # stderr is closed
        yield
        return
    sys.stderr.flush()
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


def read_bytes(path, count=-1):
    """The first `count` bytes of a file, or all. Raises OSError."""
    check_regular(path)
    with open(path, "rb") as f:
        return f.read(count)


def read_text(path, limit=10**6):
    """A text file, with BOM or without. Raises ValueError (over `limit` bytes, not UTF-8 text) or OSError."""
    content = read_bytes(path, limit + 1)
    if len(content) > limit:
        raise ValueError(f"it is larger than {limit:,} bytes")
    if b"\0" in content:
        raise ValueError("it is binary")
    return content.decode("utf-8-sig")


def read_json(path, limit=10**7):
    """A JSON file's content. Raises ValueError, also where it is nested for ever, or OSError."""
    try:
        return json.loads(read_text(path, limit))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


# ------------------------------------------------------------------------------------------------------------
# Files that appear whole or not at all, in a folder with one writer


@contextmanager
def complete_or_absent(path):
    """Gives a temporary path in the same folder, which takes the place of `path` when the block ends well.

    So a reader finds the old file or the new one, never half of one, even after a kill. The block may make a
    folder instead, where none was. Raises BadInput if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_for(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except Exception as error:  # every library reports a full disk in its own way
        if disk_is_full(error) or shutil.disk_usage(path.parent).free < 2**20:
            advice = "make room, or name another --out"
            raise BadInput(f"{path}: not written, the disk is full; {advice}") from None
        if temporary.name in str(error):  # which is no name that a user knows
            line = one_line(error).replace(str(temporary), str(path))
            raise BadInput(line if str(path) in line else f"{path}: not written ({line})") from error
        raise
    finally:
        remove(temporary)


def remove(path):
    """A file, a folder or a link that this program made, or nothing. What a link points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


LOCK, RECORD = ".writer.lock", ".writer.unfinished"     # in a folder while a run writes there


def temporary_for(path):
    """A free path beside `path`, noted in the record of the writer of its folder, or of the folder above."""
    temporary, number = path.with_name(f".tmp-{os.getpid()}-{path.name}"), 1
    while os.path.lexists(temporary):  # someone's, or left by a killed process of the same number
        number += 1
        temporary = path.with_name(f".tmp-{os.getpid()}-{number}-{path.name}")
    for folder in temporary.absolute().parents[:2]:
        if (folder / RECORD).is_file() and not (folder / RECORD).is_symlink():
            try:
                with open(folder / RECORD, "a", encoding="utf-8") as record:
                    record.write(json.dumps(str(temporary.absolute().relative_to(folder))) + "\n")
            except OSError as error:  # that of a write does not say where
                raise BadInput(f"{path}: not written ({one_line(error)}); make room, or name another --out"
                               ) from None
            break
    return temporary


def unfinished(folder):
    """The paths that the record of a writer of `folder` names. A name that leads elsewhere is passed over."""
    record, found = folder / RECORD, []
    if record.is_symlink() or not record.is_file():
        return found
    for line in record.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            path = folder / json.loads(line)
        except (ValueError, TypeError):  # killed while it was written
            continue
        inside = path.parent.resolve() in (folder.resolve(), folder.resolve() / path.parent.name)
        if inside and path.name.startswith(".tmp-"):
            found.append(path)
    return found


@contextmanager
def only_writer(folder, rank=0):
    """Holds `folder` for this run until the block ends, and removes what a killed run left unfinished there.

    Of a run's processes only rank 0 does so. What is unfinished is known by the writer's record, not by its
    name. Raises Busy if another run writes there.
    """
    if rank > 0:
        yield
        return
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise Busy(f"{folder}: another run is writing there; wait for it, or name another folder") from None
    try:
        for path in unfinished(folder):
            remove(path)
        (folder / RECORD).unlink(missing_ok=True)  # the link, where it is one, and not what it points to
        (folder / RECORD).write_text("")
        yield
    finally:
        (folder / RECORD).unlink(missing_ok=True)
        try:
            (folder / LOCK).unlink(missing_ok=True)     # filelock tries again where a lock's file is gone
        except OSError:  # Windows keeps a file that is open
            pass
        lock.release()
        if made and not any(folder.iterdir()):
            folder.rmdir()
