"""What Stage 2 computes once for each scan with the frozen network, and keeps."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sgcd_core.errors import InputError
from sgcd_core.io.store import Store, join

log = logging.getLogger(__name__)


class Inversions:
    """Tensors by key, computed when they are first asked for and kept in a store.

    Workers may share a folder: what two of them compute for one key is the same.

    Args:
        folder: Where they lie; None keeps nothing.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder

    def get(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What is kept under `key`, else what `compute` returns, on the CPU in float32."""
        if self._folder is None:
            return compute()
        store, uri = Store(), join(self._folder, f"{key}.safetensors")
        try:
            return load(store.read_bytes(uri))
        except InputError:
            pass  # not there yet
        except SafetensorError:
            log.warning("event=inversion_damaged uri=%s action=compute", uri)
        made = {name: tensor.float().cpu().contiguous() for name, tensor in compute().items()}
        store.write_bytes(uri, save(made))
        return made


def content_key(*tensors: Tensor) -> str:
    """64 hex digits that depend on the values of `tensors` alone."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
