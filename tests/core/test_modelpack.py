"""A modelpack comes back as it was saved, and damage is found."""

import json
from dataclasses import replace

import pytest
import torch

from sgcd_core.config import load_config
from sgcd_core.errors import BusyError, ModelError
from sgcd_core.io.store import Store
from sgcd_core.modelpack import ModelPack, has_modelpack, load_modelpack, save_modelpack


@pytest.fixture
def pack():
    return ModelPack(
        config=load_config(settings=["seed=5"]),
        network={"b": torch.arange(6.0).view(2, 3).T, "a": torch.ones(2)},
        state={"alpha_bars": torch.linspace(1, 0, 5)},
        meta={"name": "global", "training_sites": ["A"], "scans": 12},
    )


def test_round_trip(tmp_path, pack):
    uri = str(tmp_path / "models/global/1")
    digests = save_modelpack(uri, pack)
    back = load_modelpack(uri)
    assert back.config == pack.config and back.meta == pack.meta
    assert back.global_network is None
    for key, value in pack.network.items():
        assert torch.equal(back.network[key], value)
    assert save_modelpack(uri, back) == digests
    card = (tmp_path / "models/global/1/MODEL_CARD.md").read_text()
    assert "global" in card and "Not a medical device" in card


def test_a_changed_file_is_found(tmp_path, pack):
    uri = str(tmp_path / "m")
    save_modelpack(uri, pack)
    file = tmp_path / "m/network.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ModelError, match="MODEL-DIGEST"):
        load_modelpack(uri)


def test_a_model_that_is_there_is_never_changed(tmp_path, pack):
    uri = str(tmp_path / "m")
    save_modelpack(uri, pack)
    before = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    with pytest.raises(BusyError, match="LAKE-BUSY"):
        save_modelpack(uri, replace(pack, network={"a": torch.zeros(3)}))
    assert {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()} == before


def test_of_two_writers_at_once_one_is_refused(tmp_path, pack):
    """The other's `pack.json` comes while this one's files are written."""

    class Late(Store):
        def write_bytes(self, uri, data, *, if_absent=False):
            if uri.endswith("pack.json"):
                Store().write_bytes(uri, b"{}")
            return super().write_bytes(uri, data, if_absent=if_absent)

    with pytest.raises(BusyError, match="LAKE-BUSY"):
        save_modelpack(str(tmp_path / "m"), pack, Late())
    assert (tmp_path / "m/pack.json").read_bytes() == b"{}"


def test_a_half_written_pack_is_no_pack(tmp_path, pack):
    uri = str(tmp_path / "m")
    save_modelpack(uri, pack)
    assert has_modelpack(uri)
    (tmp_path / "m/pack.json").unlink()
    assert not has_modelpack(uri)
    with pytest.raises(ModelError, match="MODEL-MISSING"):
        load_modelpack(uri)


def test_another_format_is_refused(tmp_path, pack):
    uri = str(tmp_path / "m")
    save_modelpack(uri, pack)
    file = tmp_path / "m/pack.json"
    body = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in body.items() if k != "sha256"}))
    with pytest.raises(ModelError, match="MODEL-FORMAT"):
        load_modelpack(uri)
    file.write_text(json.dumps({**body, "format": 99}))
    with pytest.raises(ModelError, match="MODEL-FORMAT"):
        load_modelpack(uri)
