"""The benchmark runs, and at sizes that VideoCrafter2 takes. What it measures is no test's business."""
import json

import pytest

import benchmark
from model import BadInput, BaseConfig


@pytest.fixture()
def call(base_folder, monkeypatch, capsys):
    def call(*flags):
        monkeypatch.setattr("sys.argv", ["benchmark.py", "--base", str(base_folder), "--quick", "--repeats", "1", *map(str, flags)])
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
    # Two calls of half the clips are as much arithmetic, but for the text's keys and values; the backward pass is more of it.
    twice, once = work["guidance in two calls, text repeated per frame"]["TFLOP"], work["UNet call with guidance"]["TFLOP"]
    assert once < twice < 2 * once < 2 * work["training step"]["TFLOP"] < 2 * work["training step, checkpointed"]["TFLOP"]


def test_a_part_of_it(call):
    out = call("--only", "decoding")
    assert "| decoding |" in out and "| matrix product |" in out and "UNet call" not in out and "ratio" not in out
    with pytest.raises(BadInput, match="--only 'nonsense'"):
        call("--only", "nonsense")


def test_profile_names_the_kinds_of_layer(call):
    before = [layer.forward for layer in benchmark.LAYERS]
    rows = dict(line.strip("| ").split(" | ", 1) for line in call("--profile").splitlines() if line.startswith("| ") and "layer" not in line)
    for layer in ("TemporalConv", "TemporalTransformer", "SpatialTransformer", "ResBlock"):
        assert float(rows[layer].split(" | ")[0]) > 0
    assert [layer.forward for layer in benchmark.LAYERS] == before


def test_the_quick_size_fits_the_unet():
    assert all(side % BaseConfig().size_multiple() == 0 for side in benchmark.QUICK)
