"""A config.json written or edited by hand: which entries may be missing, and how a wrong one is refused."""
import json

import pytest

from support.cli import BadInput
from support.config import BaseConfig, SamplingDefaults, TrainingDefaults, load_config, save_config


def write(folder, values):
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_missing_entries_have_videocrafter2s_values(tmp_path):
    assert load_config(write(tmp_path, {})) == BaseConfig()
    config = load_config(write(tmp_path, {"name": "mine", "unet": {"channels": 64}, "sampling": {"cfg": 7}}))
    assert config.name == "mine" and config.unet.channels == 64 and config.unet.channel_mult == (1, 2, 4, 4)
    assert config.sampling == SamplingDefaults(cfg=7.0) and config.training == TrainingDefaults()


def test_only_the_differences_are_saved_and_loaded_again(tmp_path):
    """So a base that was converted once follows later defaults."""
    config = BaseConfig(name="mine", fingerprint="0123456789abcdef", latent_std=1.5)
    config.training.lr, config.unet.channel_mult = 0.002, (1, 2)
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path) == config
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "name": "mine", "fingerprint": "0123456789abcdef", "latent_std": 1.5,
        "unet": {"channel_mult": [1, 2]}, "training": {"lr": 0.002}}
    save_config(BaseConfig(), tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text()) == {"name": "videocrafter2"}


@pytest.mark.parametrize("values, entry", [
    ({"schedul": {}}, "schedul"), ({"sampling": {"lambda_z": 1}}, "lambda_z"), ({"vae": []}, "list"),
    ([], "not a base's config")])
def test_a_wrong_entry_is_refused_in_one_line(tmp_path, values, entry):
    with pytest.raises(BadInput, match=entry) as caught:
        load_config(write(tmp_path, values))
    assert "config.json" in str(caught.value) and "\n" not in str(caught.value)
