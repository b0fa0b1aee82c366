"""Training state in the lake's scratch: the same command run again goes on from it.

An object for each state, under a name that holds its digest, then `latest.json` that names the
newest two. The pointer moves only after a state was read back and its digest is right, so a reader
that finds the pointer finds whole states behind it, on a file system and on an object store alike.
"""

from __future__ import annotations

import io
import json
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from sgcd_core.errors import InputError, StorageError
from sgcd_core.io.store import Store, join, sha256_hex

log = logging.getLogger(__name__)

#: Checkpoints that stay: the newest, and the one before it for the day the newest is damaged.
KEPT = 2


@dataclass(frozen=True)
class Kept:
    """One checkpoint as the pointer names it.

    Attributes:
        step: Steps it has behind it.
        name: Of the object, in the folder of the training.
        sha256: Of the object's bytes.
    """

    step: int
    name: str
    sha256: str


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training, known by what is trained on what.

    Attributes:
        folder: Under the lake's scratch, named by the digests of settings and data.
    """

    folder: str

    def step(self) -> int:
        """Steps the newest checkpoint has behind it; 0 when there is none."""
        kept = self.kept()
        return kept[0].step if kept else 0

    def kept(self) -> list[Kept]:
        """What the pointer names, newest first."""
        try:
            body = json.loads(Store().read_bytes(self._pointer))
            return [Kept(**item) for item in body["kept"]]
        except InputError:
            return []
        except (ValueError, KeyError, TypeError):
            log.warning("event=checkpoint_pointer_damaged uri=%s action=start_anew", self._pointer)
            return []

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Keep `state` after `step` steps, and the checkpoint before it; older ones are deleted.

        Raises:
            StorageError: STORE-WRITE when the store gives back other bytes, or as it raises.
        """
        import torch

        store, before = Store(), self.kept()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        digest = sha256_hex(data)
        new = Kept(step, f"step-{step:08d}-{digest[:12]}.pt", digest)
        uri = join(self.folder, new.name)
        store.write_bytes(uri, data)
        if sha256_hex(store.read_bytes(uri)) != digest:
            raise StorageError(
                "the checkpoint that was read back is not the one that was written.",
                code="STORE-WRITE", where=uri, hint="The one before it stays in force.",
            )  # fmt: skip
        kept = [new, *(old for old in before if old.step < step)][:KEPT]
        self._point_to(kept)
        for old in before:
            if old.name not in [item.name for item in kept]:
                store.delete(join(self.folder, old.name))
        log.debug("event=checkpoint step=%d uri=%s", step, uri)

    def load(self) -> tuple[int, dict[str, Any] | None]:
        """Step and state of the newest checkpoint; (0, None) when there is none.

        Raises:
            StorageError: CHECKPOINT-DIGEST when it is damaged; `repair` falls back to another.
        """
        import torch

        kept = self.kept()
        if not kept:
            return 0, None
        data = self._sound(kept[0])
        if data is None:
            raise StorageError(
                f"the checkpoint of step {kept[0].step} is damaged.", code="CHECKPOINT-DIGEST",
                where=join(self.folder, kept[0].name),
                hint="Run the same command again: it goes on from the one before.",
            )  # fmt: skip
        # weights_only: a checkpoint may lie in a shared bucket and must not run code.
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return kept[0].step, state

    def repair(self) -> int:
        """Leave out damaged checkpoints, saying so; steps behind the newest sound one."""
        kept = self.kept()
        for number, item in enumerate(kept):
            if self._sound(item) is not None:
                if number:
                    self._point_to(kept[number:])
                return item.step
            log.warning(
                "the checkpoint of step %d is damaged; going on from %s (%s)", item.step,
                f"step {kept[number + 1].step}" if number + 1 < len(kept) else "the beginning",
                join(self.folder, item.name),
            )  # fmt: skip
        if kept:
            self._point_to([])
        return 0

    def clear(self) -> None:
        """Delete them all; the modelpack is what remains of a finished training."""
        store = Store()
        for item in list(store.list(self.folder + "/")):
            store.delete(item.uri)

    def _sound(self, item: Kept) -> bytes | None:
        """Bytes of a checkpoint, None when they are gone or not those that were written."""
        try:
            data = Store().read_bytes(join(self.folder, item.name))
        except InputError:
            return None
        return data if sha256_hex(data) == item.sha256 else None

    def _point_to(self, kept: list[Kept]) -> None:
        body = json.dumps({"kept": [asdict(item) for item in kept]})
        Store().write_bytes(self._pointer, body.encode())

    @property
    def _pointer(self) -> str:
        return join(self.folder, "latest.json")


class Writer:
    """Writes checkpoints beside the training, one at a time, each from a copy of the state.

    An error of a write is raised at the next call; the checkpoint before it stays in force.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy `state` and begin to write it; waits while the write before is under way."""
        self.wait()
        self._pending = self._pool.submit(self.checkpoints.save, step, copied(state))

    def check(self) -> None:
        """Raise what a finished write has raised; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def copied(state: Any) -> Any:
    """`state` with every tensor copied to the CPU: training may go on changing the original."""
    import torch

    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(copied(value) for value in state)
    return state
