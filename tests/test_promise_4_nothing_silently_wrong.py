"""Promise 4: what would make a result wrong is refused or reported. test_convert.py has mixtures of bases."""
import os
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from makers import fork_ranks, random_subject, wait
import data
import sample
import train
from sample import generate
from support.cli import BadInput, check_same, join_processes, pick_precision
from support.config import load_config, save_config
from support.files import load_base, load_subject, read_header, save_subject
from support.runs import prior_folder


@pytest.fixture()
def flags(base_folder, photos_folder, tmp_path):
    """Of a training of a copied base and copied photos, which a test may change."""
    shutil.copytree(base_folder, tmp_path / "base")
    shutil.copytree(photos_folder, tmp_path / "photos")
    return ["--base", "base", "--images", "photos", "--class_word", "dog", "--preview_every", 0,
            "--out", "out"]


def change_weight(folder):
    """A number in one of the larger matrices changes a little, in a file as another program writes it."""
    tensors = load_file(folder / "unet.safetensors")
    tensors["middle_block.1.block.attn2.to_q.weight"][-1, -1] *= 1.001
    save_file(tensors, folder / "unet.safetensors")


def change_config(folder, change):
    config = load_config(folder)
    change(config)
    save_config(config, folder / "config.json")


def test_bases_that_differ_in_one_weight_are_different(base, flags, tmp_path):
    """Their fingerprints, their priors; and a subject of one is refused on the other."""
    change_weight(tmp_path / "base")
    other = load_base(tmp_path / "base")
    assert other.config.fingerprint != base.config.fingerprint
    folders = {prior_folder(tmp_path / "out", one, base.config.sampling, "dog") for one in (base, other)}
    assert len(folders) == 2
    save_subject(tmp_path / "subject.safetensors", random_subject(base))
    with pytest.raises(BadInput, match="was trained on the base tiny0 .* pass that base with --base, or"):
        load_subject(tmp_path / "subject.safetensors", other)


@pytest.mark.parametrize("change", [
    lambda metadata, tensors: metadata.update(class_word="cat"),
    lambda metadata, tensors: tensors["v_star"].add_(1),
    lambda metadata, tensors: tensors.pop(next(iter(tensors))),
    lambda metadata, tensors: tensors.update(more=torch.ones(1))])
def test_a_subject_that_is_not_what_was_saved_is_refused(base, tmp_path, change):
    path = tmp_path / "subject.safetensors"
    save_subject(path, random_subject(base))
    metadata, tensors = read_header(path), load_file(path)
    change(metadata, tensors)
    save_file(tensors, path, metadata)
    with pytest.raises(BadInput, match="its content is not what was saved"):
        load_subject(path, base)


def test_what_is_shared_names_no_folder_of_its_author(flags, call, tmp_path):
    """A subject's header, a save, a video's JSON hold no path. So the same photos may lie elsewhere."""
    absolute = ["--images", tmp_path / "photos", "--base", tmp_path / "base", "--out", tmp_path / "out"]
    call(train, *flags, *absolute, "--steps", 1)
    call(sample, "--base", tmp_path / "base", "--subject", tmp_path / "out", "--out", tmp_path / "videos")
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".json", ".safetensors")
             and "base" not in path.parts]
    assert len(files) == 4 and not any(tmp_path.name.encode() in file.read_bytes() for file in files)
    shutil.move(tmp_path / "photos", tmp_path / "dogs")
    (tmp_path / "link").symlink_to("dogs")
    call(train, *flags, "--images", "link", "--steps", 2, "--resume", "out")


PHOTOS, CAPTIONS = "--images: not the photos", "--images: not the captions"
PRIOR, BASE = "--prior or --num_prior: not the prior", "--base: not the base"


def red_picture(path):
    Image.new("RGB", (60, 40), "red").save(path)


@pytest.mark.parametrize("change, more, message", [
    (lambda here: red_picture(here / "photos" / "0.png"), "", PHOTOS),
    (lambda here: os.rename(here / "photos" / "0.png", here / "photos" / "3.png"), "", PHOTOS),
    (lambda here: (here / "photos" / "1.txt").write_text("V* under a table"), "", CAPTIONS),
    (lambda here: red_picture(next(here.glob("prior/*/0001.png"))), "", PRIOR),
    (None, "--num_prior 3", PRIOR), (None, "--prior photos --num_prior 2", PRIOR),
    (lambda here: change_weight(here / "base"), "", BASE),
    (lambda here: change_config(here / "base", lambda it: setattr(it.schedule, "beta_end", 0.1)), "", BASE),
    (None, "--lr 0.5", "--lr: is 0.5"), (None, "--batch_size 3", "--batch_size times --grad_accum times"),
    (None, "--no_flip", "--no_flip: is True"), (None, "--seed 1", "--seed: is 1")])
def test_a_resumed_training_is_the_one_that_was_saved(flags, call, tmp_path, change, more, message):
    call(train, *flags, "--steps", 1)
    if change:
        change(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    errors = call(train, *flags, "--steps", 2, "--resume", "out", *more.split(), code=2).err.splitlines()
    error, = [line for line in errors if line.startswith("error: ")]
    assert message in error and "out/step-000001 was trained with" in error
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_latest_is_the_newest_run_of_these_photos(flags, call, tmp_path):
    """Neither a longer name, nor one that reads as a pattern, nor a link leads to another's run."""
    flags, names = [*flags[:-2], "--alpha", 0], ("dog", "dog-2024", "dog [1]", "dog-2")
    (tmp_path / names[-1]).symlink_to("IMG_2041")
    for n, name in enumerate(names):
        (tmp_path / name).resolve().mkdir()
        Image.new("RGB", (48, 32), (50 * n, 0, 0)).save(tmp_path / name / "a.png")
        call(train, *flags, "--images", name, "--steps", 1)
    for name in names:
        lines = call(train, *flags, "--images", name, "--steps", 2, "--resume", "latest").out.splitlines()
        assert lines[-1] == f"wrote runs/{name}/subject.safetensors"


def test_a_gradient_that_is_not_finite_stops_and_keeps_the_last_save(flags, call, tmp_path, monkeypatch):
    real, calls = data.noise_sample, []

    def noise(*args):
        calls.append(args)
        t, eps = real(*args)
        return t, eps * float("nan") if len(calls) > 3 else eps

    monkeypatch.setattr(data, "noise_sample", noise)
    error = call(train, *flags, "--alpha", 0, "--steps", 9, "--save_every", 2, code=2).err
    assert error.count("error: --lr: the gradient is not finite at step 4") == 1
    subject = load_subject(tmp_path / "out" / "subject.safetensors", load_base(tmp_path / "base"))
    assert subject.steps == 2 and all(x.isfinite().all() for x in subject.tensors().values())


def test_a_latent_that_is_not_finite_is_no_video(base):
    unet = base.unet
    base.unet = lambda z, t, fps, context: unet(z, t, fps, context) / (t.view(-1, 1, 1, 1, 1) > 300)
    with pytest.raises(BadInput, match="--precision: the latent is not finite"):
        generate(base, ["a dog"], [0])


def test_the_first_lines_name_base_device_precision_photos_and_prior(flags, call, tmp_path, monkeypatch):
    """And a RANK that a container or an older shell has left in the environment."""
    monkeypatch.setenv("RANK", "1")
    rank, base, subject, prior, *_ = call(train, *flags, "--steps", 1).out.splitlines()
    assert rank == "RANK=1 is set, but torchrun did not start this process; it works alone"
    assert base == "base base (tiny0) on cpu in float32"
    assert subject == "subject photos: 3 photos of V* dog, 1 with a caption"
    assert prior.startswith("prior prior/tiny0-dog-") and prior.endswith(": 2 pictures or clips of a dog")
    lines = call(sample, *flags[:2], "--subject", "out", "--seed", 1, "--format", "gif").out.splitlines()
    assert lines[:2] == [rank, base] and "out/subject.safetensors (V* dog, 1 steps), seed 1" in lines[2]

    change_config(tmp_path / "base", lambda config: setattr(config, "name", "videocrafter2"))
    for script, more in ((train, [*flags, "--resume", "out", "--steps", 2]), (sample, ["--subject", "out"])):
        assert call(script, "--base", "base", *more).err.count("warning: VideoCrafter2 takes hours") == 1


def test_processes_that_see_different_saves_are_refused_by_all(tmp_path):
    def main():
        process = join_processes()
        check_same(process, save=("step-000004 0a", "step-000004 0b")[process.rank])

    assert [wait(pid) for pid in fork_ranks(2, main, ["join"], tmp_path)] == [2, 2]
    for output in ("output", "output-1"):
        assert (tmp_path / output).read_text().startswith("error: the processes differ in their save: rank ")


def test_nodes_with_parts_of_the_prior_are_refused(flags, tmp_path):
    """Two nodes that share no folder make a part of the pictures each."""
    def main():
        os.mkdir(os.environ["RANK"])
        os.chdir(os.environ["RANK"])
        train.main()

    argv = ["train.py", *flags, "--base", tmp_path / "base", "--images", tmp_path / "photos",
            "--num_prior", 9]
    assert [wait(pid) for pid in fork_ranks(2, main, argv, tmp_path)] == [2, 2]
    assert "error: the processes differ in their prior: rank 0" in (tmp_path / "output").read_text()


@pytest.mark.parametrize("machine, device, to_sample, to_train", [
    (("cpu", 0, True), "cpu", "float32", "float32"), (("mps", 1, True), "mps:0", "float32", "float32"),
    (("cuda", 1, True), "cuda:0", "bfloat16", "bfloat16"),
    (("xpu", 2, True), "xpu:0", "bfloat16", "bfloat16"),
    (("cuda", 1, False), "cuda:0", "float16", "float32")])  # T4 and V100 emulate bfloat16
def test_device_and_precision_are_what_the_machine_has(monkeypatch, machine, device, to_sample, to_train):
    kind, number, has_bfloat16 = machine
    for name, value in {"is_available": number > 0, "device_count": number, "set_device_index": None,
                        "current_accelerator": torch.device(kind)}.items():
        monkeypatch.setattr(torch.accelerator, name, lambda *args, value=value: value)
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "is_bf16_supported",
                            lambda including_emulation=True: including_emulation or has_bfloat16)
    picked = join_processes().device
    assert picked == torch.device(device)
    assert [pick_precision("auto", picked, training) for training in (False, True)] == [to_sample, to_train]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("LOCAL_RANK", "2")
    if number:
        with pytest.raises(BadInput, match=f"--nproc_per_node: is more than the {number} {kind} devices"):
            join_processes()
