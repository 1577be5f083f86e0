"""Folders with two writers, full disks, and numbers that are not finite: nothing that was there is lost."""
import os
import subprocess

import pytest
import torch
from safetensors.torch import save_file

from cli import BadInput, complete_or_absent, only_writer
from sample import generate


def test_a_folder_has_one_writer(tmp_path):
    with only_writer(tmp_path / "out"):
        with pytest.raises(BadInput, match="another run is writing there"), only_writer(tmp_path / "out"):
            pass
        with only_writer(tmp_path / "out", rank=1), only_writer(tmp_path / "other"):
            pass
    assert not (tmp_path / "out").exists()          # nothing was written there
    with only_writer(tmp_path / "out"):
        (tmp_path / "out" / "x").write_text("x")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]


def test_what_a_killed_writer_left_is_known_by_its_record_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in (".tmp-notes.txt", ".tmp-1-x"):
        (out / name).write_text("half")
    (out / ".writer.unfinished").write_text('".tmp-1-x"\n"../.tmp-other"\nhalf a li')
    (tmp_path / ".tmp-other").write_text("mine")
    with only_writer(out):
        assert (out / ".tmp-notes.txt").exists() and not (out / ".tmp-1-x").exists()
    assert [path.name for path in out.iterdir()] == [".tmp-notes.txt"] and (tmp_path / ".tmp-other").exists()


@pytest.fixture()
def small_disk(tmp_path):
    """A folder on a disk of 1 MB. A test without the right to mount one is left out."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount")
    yield tmp_path
    # --lazy: the disk goes at once, whatever a failed write still holds open.
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.parametrize("write", [
    lambda path: save_file({"x": torch.ones(10**6)}, path),
    lambda path: torch.save(torch.ones(10**6), path),
    lambda path: path.write_bytes(bytes(10**7))], ids=["safetensors", "torch", "bytes"])
def test_a_full_disk_leaves_the_old_file(small_disk, write):
    path = small_disk / "x.safetensors"
    path.write_bytes(b"old")
    full = "x.safetensors: not written, the disk is full"
    with pytest.raises(BadInput, match=full), complete_or_absent(path) as temporary:
        write(temporary)
    assert path.read_bytes() == b"old" and len(list(small_disk.iterdir())) == 1


def test_an_infinite_latent_is_refused(base):
    unet = base.unet
    base.unet = lambda z, t, fps, context: unet(z, t, fps, context) / (t.view(-1, 1, 1, 1, 1) > 300)
    with pytest.raises(BadInput, match="not finite"):
        generate(base, ["a dog"], [0])
