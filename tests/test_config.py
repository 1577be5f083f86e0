"""A config.json written or edited by hand: what may be left out, and how a wrong entry is named."""
import json
from dataclasses import asdict

import pytest

from cli import BadInput
from config import BaseConfig, SamplingDefaults, TrainingDefaults, load_config, save_config
from files import load_base
from makers import write_base


def write(folder, values):
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


def test_entries_left_out_take_videocrafter2s_values(tmp_path):
    assert load_config(write(tmp_path, {})) == BaseConfig()
    config = load_config(write(tmp_path, {"name": "mine", "unet": {"channels": 64}, "sampling": {"cfg": 7}}))
    assert config.name == "mine" and config.unet.channels == 64 and config.unet.channel_mult == (1, 2, 4, 4)
    assert config.sampling == SamplingDefaults(cfg=7.0) and config.training == TrainingDefaults()


def test_what_is_saved_is_what_is_loaded(tmp_path):
    config = BaseConfig(name="mine", fingerprint="0123456789abcdef", crc32=(1, 2, 3))
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config


@pytest.mark.parametrize("values, says", [
    ({"schedul": {}}, "config.json: schedul is unknown; known is schedule"),
    ({"sampling": {"lambda_z": 1}}, "config.json: sampling.lambda_z is unknown; known is lambda_"),
    ({"training": {"train_steps": 10}}, "config.json: training.train_steps is unknown; known is steps"),
    ({"unet": {"xyzzy": 1}}, "config.json: unet.xyzzy is unknown; known is channels, channel_mult, "),
    ({"unet": {"channels": 0}}, "config.json: unet.channels is 0; it should be from 1 to 4096"),
    ({"unet": {"channel_mult": [1, 65]}}, "config.json: unet.channel_mult is 65; it should be from 1 to 64"),
    ({"sampling": {"eta": 1.5}}, "config.json: sampling.eta is 1.5; it should be from 0 to 1"),
    ({"training": {"lr": -1}}, "config.json: training.lr is -1.0; it should be from 0 to 1"),
    ({"schedule": {"latent_std": -1}}, "schedule.latent_std is -1.0; it should be from 0 to 1000"),
    ({"sampling": {"K": 51}}, "config.json: sampling.K is 51; it should be at most sampling.steps, 50"),
    ({"sampling": {"steps": 50.0}}, "config.json: sampling.steps is 50.0, not int"),
    ({"name": 3}, "config.json: name is 3, not str"),
    ({"unet": {"channel_mult": 4}}, "config.json: unet.channel_mult is 4, not a list of whole numbers"),
    ({"vae": []}, "config.json: vae is not an object with entries but []"),
    ([], "config.json: its content is not an object"),
])
def test_a_wrong_entry_is_named_with_what_would_be_right(tmp_path, values, says):
    with pytest.raises(BadInput) as caught:
        load_config(write(tmp_path, values))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_base_whose_config_was_edited_still_loads(tmp_path):
    """Other defaults, and neither checksums nor a fingerprint: the base is the same base."""
    folder = write_base(tmp_path / "tiny")
    before = load_base(folder).config
    values = asdict(before) | {"name": "mine", "sampling": {"frames": 5, "height": 32, "width": 32}}
    del values["crc32"], values["fingerprint"], values["training"]
    write(folder, values)
    after = load_base(folder).config
    assert after.fingerprint == before.fingerprint and after.name == "mine"
    assert after.sampling.frames == 5 and after.training == TrainingDefaults()
