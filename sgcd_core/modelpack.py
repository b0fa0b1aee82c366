"""A model and everything a run needs with it, in one folder: weights, record, recipe, digests.

Layout: `network.safetensors`, `global_network.safetensors` (target models: the frozen Stage 1
network), `state.safetensors` (record, schedule, outlier model), `config.yaml`, `MODEL_CARD.md`
and, written last, `pack.json` with the metadata and the SHA-256 of every file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import yaml
from torch import Tensor

from sgcd_core.config import SgcdConfig, parse_config
from sgcd_core.errors import BusyError, InputError, ModelError, StorageError
from sgcd_core.io.store import Store, join, sha256_hex
from sgcd_core.model_card import model_card

FORMAT = 7
_PACK = "pack.json"


@dataclass
class ModelPack:
    """What a trained model consists of.

    Attributes:
        config: The resolved settings it was trained with.
        network: Weights of the denoiser.
        state: Record (`record.*`), schedule (`alpha_bars`), outlier model (`outliers.*`), looks
            (`looks.common`, `looks.target`), how many people each was measured on
            (`subjects.common`, `subjects.target`) and composition model (`composition.*`).
        global_network: Frozen Stage 1 weights beside a target model's, else None.
        meta: name, kind (`global` or `target`), target, training_sites, sequences, scans,
            data_digest, parent, code_version and whatever the trainer adds; `model_card` shows
            steps, init, box, losses, figures, stage1, subjects, ages and site_scans.
    """

    config: SgcdConfig
    network: dict[str, Tensor]
    state: dict[str, Tensor]
    global_network: dict[str, Tensor] | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def weights_digest(self) -> str:
        """SHA-256 over the network's weights alone."""
        from safetensors.torch import save

        return sha256_hex(save(_flat(self.network)))


def _flat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU copies in key order, as safetensors wants them."""
    return {key: tensors[key].detach().cpu().contiguous().clone() for key in sorted(tensors)}


def save_modelpack(uri: str, pack: ModelPack, store: Store | None = None) -> dict[str, str]:
    """Write `pack` under `uri`; its presence is complete once `pack.json` is there.

    A model that is there is never changed; saving the very same one again does nothing.

    Returns:
        SHA-256 of each file.

    Raises:
        BusyError: LAKE-BUSY, another model was written here; none of its files was touched,
            unless both were written at the same moment.
    """
    from safetensors.torch import save

    store = store or Store()
    files = {
        "network.safetensors": save(_flat(pack.network)),
        "state.safetensors": save(_flat(pack.state)),
        "config.yaml": yaml.safe_dump(
            pack.config.model_dump(mode="json"), sort_keys=False
        ).encode(),
        "MODEL_CARD.md": model_card(pack).encode(),
    }
    if pack.global_network is not None:
        files["global_network.safetensors"] = save(_flat(pack.global_network))
    digests = {name: sha256_hex(data) for name, data in files.items()}
    body = {"format": FORMAT, "meta": pack.meta, "sha256": digests}
    last = json.dumps(body, indent=2, sort_keys=True).encode()
    try:
        for name, data in files.items():
            if has_modelpack(uri, store):
                raise FileExistsError
            store.write_bytes(join(uri, name), data)
        store.write_bytes(join(uri, _PACK), last, if_absent=True)
    except FileExistsError:
        if store.read_bytes(join(uri, _PACK), max_bytes=10_000_000) != last:
            raise BusyError(
                "another model was written here meanwhile, and a model never changes.", where=uri,
                hint="Run the same command again: it makes a version of its own if it has to.",
            ) from None  # fmt: skip
    return digests


def has_modelpack(uri: str, store: Store | None = None) -> bool:
    """Whether a complete modelpack lies under `uri`."""
    return (store or Store()).exists(join(uri, _PACK))


def checked_files(uri: str, store: Store | None = None) -> dict[str, bytes]:
    """Every file of a complete modelpack, each checked against its digest; `pack.json` last.

    Raises:
        ModelError: MODEL-MISSING, MODEL-FORMAT or MODEL-DIGEST.
    """
    store = store or Store()
    try:
        data = store.read_bytes(join(uri, _PACK), max_bytes=10_000_000)
        body = json.loads(data)
    except InputError as error:
        raise ModelError(
            "there is no model here.", code="MODEL-MISSING", where=uri,
            hint="Train one with `sgcd train` or `sgcd tune`, or name another with --model.",
        ) from error  # fmt: skip
    except ValueError as error:
        raise ModelError(f"{_PACK} is not JSON.", code="MODEL-FORMAT", where=uri) from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        have = body.get("format") if isinstance(body, dict) else None
        raise ModelError(
            f"has format {have}, this version reads {FORMAT}.", code="MODEL-FORMAT", where=uri,
        )  # fmt: skip
    if not isinstance(body.get("sha256"), dict):
        raise ModelError(
            f"{_PACK} names no files.", code="MODEL-FORMAT", where=uri,
            hint="Restore it, or train again.",
        )  # fmt: skip
    files = {}
    for name, digest in body["sha256"].items():
        try:
            files[name] = store.read_bytes(join(uri, name), sha256=digest)
        except InputError as error:
            raise ModelError(
                f"{name} is missing.", code="MODEL-DIGEST", where=uri,
                hint="Restore the file, or train again.",
            ) from error  # fmt: skip
        except StorageError as error:
            if error.code != "STORE-DIGEST":
                raise
            raise ModelError(
                f"{name} does not match its recorded SHA-256.", code="MODEL-DIGEST", where=uri,
                hint="The file was changed or damaged; train again or restore it.",
            ) from error  # fmt: skip
    return files | {_PACK: data}


def load_modelpack(uri: str, store: Store | None = None) -> ModelPack:
    """Read a modelpack and check every file against its digest.

    Raises:
        ModelError: MODEL-MISSING, MODEL-FORMAT or MODEL-DIGEST.
    """
    from safetensors.torch import load

    files = checked_files(uri, store)
    parent = files.get("global_network.safetensors")
    return ModelPack(
        config=parse_config(yaml.safe_load(files["config.yaml"])),
        network=load(files["network.safetensors"]),
        state=load(files["state.safetensors"]),
        global_network=load(parent) if parent is not None else None,
        meta=json.loads(files[_PACK])["meta"],
    )
