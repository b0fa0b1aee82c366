"""Settings from a file at an s3:// address, as a job on a cluster names them."""

from __future__ import annotations

from typing import Any

import pytest

from sgcd_core.config import load_config
from sgcd_core.errors import ConfigError
from sgcd_core.io.store import Store

pytestmark = pytest.mark.s3


def test_a_file_of_settings_may_lie_on_s3(s3_server: Any) -> None:
    where = s3_server.uri("settings/my.yaml")
    Store().write_bytes(where, b"seed: 7\nprepare: {mm: 2.0}\n")
    config = load_config(None, where, ["seed=8"])
    assert (config.seed, config.prepare.mm) == (8, 2.0)
    Store().write_bytes(where, b"- a list")
    for address in (where, s3_server.uri("settings/other.yaml")):
        with pytest.raises(ConfigError) as caught:
            load_config(None, address)
        assert caught.value.code == "CONFIG-FILE" and address in str(caught.value)
