"""pytest's settings, and the fixtures of several test files. What they are made of is in makers.py."""
import os
import signal

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests fork, which a process that has touched a GPU cannot
import numpy as np
import pytest
import torch
from PIL import Image

from makers import write_base
from support.cli import run_script  # makers.py put the repository's root on the path
from support.files import load_base


def pytest_configure(config):
    # As in the processes that `run` starts: sums in another order differ in their last digit.
    torch.set_num_threads(1)
    # A shell starts its background jobs with Ctrl-C ignored, and what they start would ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("filterwarnings", "error")
    # FFMPEG's reader, when it is let go.
    for category in ("ResourceWarning", "pytest.PytestUnraisableExceptionWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{category}")
    # `fork` in makers.py, on Python 3.12.
    config.addinivalue_line("filterwarnings", "ignore:This process .* is multi-threaded:DeprecationWarning")


def pytest_collection_modifyitems(items):
    """The paper's equations come first, then parity with the reference, the promises, and the rest."""
    first = ("test_paper", "test_parity", "test_promise")

    def place(item):
        return next((i for i, name in enumerate(first) if item.path.name.startswith(name)), len(first))

    items.sort(key=place)   # a stable sort, so each file keeps its own order


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture()
def base(base_folder):
    return load_base(base_folder)


@pytest.fixture(scope="session")
def photos_folder(tmp_path_factory):
    """Three photos of different shapes, one of them with a caption of its own."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i, (w, h) in enumerate([(60, 40), (40, 60), (64, 64)]):
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "1.txt").write_text("V* on a table\n")
    return folder


@pytest.fixture()
def call(monkeypatch, tmp_path, capsys):
    """Runs a script's main() in this process, in tmp_path -> what it wrote to stdout and stderr.

    With `code`, the script has to end with that exit code.
    """
    def call(script, *flags, code=0):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *map(str, flags)])
        capsys.readouterr()
        if code:
            with pytest.raises(SystemExit) as end:
                run_script(script.main)
            assert end.value.code == code
        else:
            script.main()
        return capsys.readouterr()
    return call
