"""Training state in the lake's scratch: the same command run again goes on from it.

Two objects: the state under a name of its own, then `latest.json` that names it. A reader that
finds the second always finds the first, on a file system and on an object store alike.
"""

from __future__ import annotations

import io
import json
import logging
from dataclasses import dataclass
from typing import Any

from sgcd_core.errors import InputError
from sgcd_core.io.store import Store, join

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training, known by what is trained on what.

    Attributes:
        folder: Under the lake's scratch, named by the digests of settings and data.
    """

    folder: str

    def step(self) -> int:
        """Steps the newest checkpoint has behind it; 0 when there is none."""
        return int(self._latest().get("step", 0))

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Keep `state` after `step` steps; the one before it is deleted."""
        import torch

        store, old = Store(), self._latest().get("state")
        buffer = io.BytesIO()
        torch.save(state, buffer)
        uri = join(self.folder, f"step-{step:08d}.pt")
        store.write_bytes(uri, buffer.getvalue())
        body = json.dumps({"step": step, "state": uri.rpartition("/")[2]}).encode()
        store.write_bytes(self._pointer, body)
        if old and old != uri.rpartition("/")[2]:
            store.delete(join(self.folder, old))
        log.debug("event=checkpoint step=%d uri=%s", step, uri)

    def load(self) -> tuple[int, dict[str, Any] | None]:
        """Step and state of the newest checkpoint; (0, None) when there is none."""
        import torch

        latest = self._latest()
        if not latest:
            return 0, None
        data = Store().read_bytes(join(self.folder, latest["state"]))
        # weights_only: a checkpoint may lie in a shared bucket and must not run code.
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return int(latest["step"]), state

    def clear(self) -> None:
        """Delete them all; the modelpack is what remains of a finished training."""
        store = Store()
        for item in list(store.list(self.folder + "/")):
            store.delete(item.uri)

    @property
    def _pointer(self) -> str:
        return join(self.folder, "latest.json")

    def _latest(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(Store().read_bytes(self._pointer))
        except InputError:
            return {}
        return found
