"""The benchmark runs, and at sizes that VideoCrafter2 takes. What it measures is no test's business."""
import json

import pytest

import benchmark
from cli import BadInput
from config import BaseConfig


@pytest.fixture()
def call(base_folder, monkeypatch, capsys):
    def call(*flags):
        argv = ["benchmark.py", "--base", base_folder, "--quick", "--repeats", 1, *flags]
        monkeypatch.setattr("sys.argv", list(map(str, argv)))
        benchmark.main()
        return capsys.readouterr().out
    return call


def test_both_tables(call, tmp_path):
    out = call("--json", tmp_path / "x.json")
    found = json.loads((tmp_path / "x.json").read_text())
    assert all(f"| {label} |" in out for label in (*benchmark.SHOWN, *found["ratios"]))
    assert found["ratios"].keys() == benchmark.RATIOS.keys() - {"--compile"}
    work = found["work"]
    assert all(row["seconds"] > 0 for row in work.values())
    # Two calls of half the clips do the same arithmetic, and the text's keys and values again for every
    # frame.
    once = work["UNet call with guidance"]["TFLOP"]
    twice = work["guidance in two calls, text repeated per frame"]["TFLOP"]
    assert once < twice < 2 * once
    # A training step has a backward pass as well; with checkpointing, a second forward pass.
    assert once < work["training step"]["TFLOP"] < work["training step, checkpointed"]["TFLOP"]


def test_a_part_of_it(call):
    out = call("--only", "decoding")
    assert "| decoding |" in out and "| matrix product |" in out
    assert "UNet call" not in out and "ratio" not in out
    with pytest.raises(BadInput, match="--only 'nonsense'"):
        call("--only", "nonsense")


def test_profile_names_the_kinds_of_layer(call):
    before = [layer.forward for layer in benchmark.LAYERS]
    table = {}
    for line in call("--profile").splitlines():
        if line.startswith("| ") and "layer" not in line:
            layer, products, copies, rest = line.strip("| ").split(" | ")
            table[layer] = float(products)
    for layer in ("TemporalConv", "TemporalTransformer", "SpatialTransformer", "ResBlock"):
        assert table[layer] > 0
    assert [layer.forward for layer in benchmark.LAYERS] == before


def test_the_quick_size_fits_the_unet():
    assert all(side % BaseConfig().size_multiple() == 0 for side in benchmark.QUICK)
