"""The paper's protocol: each training is made once, and every method and prompt is asked for."""
import json
import shutil
from argparse import Namespace

import pytest

import sample
import train
from cli import BadInput
from makers import fork, wait
from paper import evaluate, protocol

SCRIPTS = {"train.py": train, "sample.py": sample, "evaluate.py": evaluate}


def test_subjects_are_trained_once_and_finished(base_folder, photos_folder, tmp_path, monkeypatch):
    args, commands = Namespace(out=tmp_path, base=base_folder), []

    def command_in_a_fork(command, env):
        commands.append(command)
        return Namespace(returncode=wait(fork(train.main, command[1:], tmp_path)))

    monkeypatch.setattr(protocol.subprocess, "run", command_in_a_fork)
    flags = {"images": photos_folder, "class_word": "dog", "alpha": 0}
    for steps, commands_so_far in ((2, 1), (2, 1), (3, 2)):
        folder = protocol.train_subjects(args, {"long": flags | {"steps": steps}})["long"]
        assert len(commands) == commands_so_far
    assert [path.name for path in sorted(folder.glob("step-*"))] == ["step-000002", "step-000003"]
    assert len((folder / "log.jsonl").read_text().splitlines()) == 3
    with pytest.raises(BadInput, match="training wrong"):
        protocol.train_subjects(args, {"wrong": flags | {"steps": 1, "images": tmp_path / "none"}})


@pytest.fixture()
def asked(base_folder, photos_folder, tmp_path, monkeypatch, capsys):
    """Runs the protocol on a dog and a clock, without its commands -> script -> the flags that it understood.

    "table" is what the protocol printed. In place of evaluate.py, row number i gets CLIP-T 0.1 * i.
    """
    for name in ("dog2", "clock"):
        shutil.copytree(photos_folder, tmp_path / "photos" / name)
    asked = {"train.py": [], "sample.py": [], "evaluate.py": []}

    def understand(what, python, script, *flags, environment=None):
        monkeypatch.setattr("sys.argv", [script.name, *map(str, flags)])
        args = SCRIPTS[script.name].parse_args()
        asked[script.name].append(args)
        if script.name == "evaluate.py":
            videos = []
            for i, folder in enumerate(args.videos):
                videos.append({"folder": str(folder), "video": "x", "text": "a", "seed": 0, "CLIP-T": 0.1 * i,
                               "motion of base": None})
            (args.out / "evaluation.json").write_text(json.dumps({"videos": videos}))

    monkeypatch.setattr(protocol, "command", understand)
    flags = ["--base", base_folder, "--subjects", tmp_path / "photos", "--out", tmp_path / "out"]
    monkeypatch.setattr("sys.argv", ["protocol.py", *map(str, flags)])
    protocol.main()
    asked["table"] = capsys.readouterr().out.splitlines()
    return asked


def test_every_method_is_trained_at_its_published_settings(asked):
    trained = asked["train.py"]
    facts = [(args.class_word, args.method, args.targets, args.steps, args.word_steps) for args in trained]
    assert facts[:6] == [
        ("clock", "custom_diffusion", "all", 500, None),
        ("clock", "custom_diffusion", "all", 1000, None),
        ("clock", "dreamvideo", "all", 4000, 3000),
        ("clock", "dreamvideo", "all", 8000, 6000),
        ("clock", "customcrafter", "cross", 4, None),
        ("clock", "customcrafter", "all", 4, None)]
    assert len(trained) == 12 and trained[6].class_word == "dog"


def test_every_row_is_sampled_at_its_schedule(asked):
    sampled = asked["sample.py"]
    full, constant = "1*50", "0.8*50"
    schedules = ["", full, full, full, full, constant, constant, "0.4*5,0.8*45"]
    assert [args.lambdas for args in sampled] == 2 * schedules
    assert len(asked["evaluate.py"]) == 2


def test_an_animal_and_an_object_have_their_prompts(asked, tmp_path):
    for name, says in (("clock", "a V* clock turning"), ("dog2", "a V* dog running")):
        lines = (tmp_path / "out" / name / "prompts.txt").read_text().splitlines()
        prompts = [line for line in lines if not line.startswith("#")]
        assert len(prompts) == 10 and any(line.startswith(says) for line in prompts)
        assert all("V*" in line for line in prompts)


def test_the_table_has_means_over_subjects(asked):
    table = asked["table"]
    assert table[1] == "| 2 clips per row | CLIP-T |"
    assert table[-1].startswith("| the same, 0.4 then 0.8") and "0.700 ± 0.000" in table[-1]


@pytest.mark.parametrize("flags, says", [
    (["--subjects", "none"], "--subjects none: should hold a folder of photos"),
    ([], "--subjects")])
def test_refusals(base_folder, tmp_path, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["protocol.py", "--base", str(base_folder), *flags])
    with pytest.raises(BadInput, match=says):
        protocol.main()
