"""Before work begins, within seconds: is there room for it, and may every node do it?

Work that does not fit would wait for ever or die half way, so it is refused with the number that
is needed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.lake_check import Finding, check_lake
from sgcd_core.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from sgcd_core.config import SgcdConfig

log = logging.getLogger(__name__)

#: Seconds that all of it may take, and the least that is left for the nodes to answer in; those
#: that do not are named, not refused.
PREFLIGHT_SECONDS, NODE_SECONDS = 4.8, 1.5
#: Nodes that are asked, at most.
MOST_NODES = 16
#: What Ray needs for its object store at least.
MIN_OBJECT_STORE = 80e6
#: Peak memory of a worker that harmonized a scan of 176x256x256 with a small network, measured:
#: Python and its libraries are half of it, carrying the correction to the scan most of the rest.
WORKER_BYTES = 1.6e9
#: float32 feature maps of the network's first level that are held at once, at the least.
MAPS = {"prepare": 0, "harmonize": 3, "train": 10, "tune": 10}
#: Sets of volumes in Ray's object store in training: one in use, two ahead, one being written.
SETS_AHEAD = 4


@dataclass(frozen=True)
class Need:
    """What some work needs at the same time.

    Attributes:
        workers: Processes that must run together.
        cpus: CPUs of each.
        gpus: GPUs of each.
        memory: Bytes of main memory of each; those on a GPU are not counted.
        feeding: CPUs besides, for the tasks that feed the workers.
        object_store: Bytes of Ray's shared memory on a node.
    """

    workers: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    memory: float = 0.0
    feeding: float = 0.0
    object_store: float = 0.0


def need_of(
    command: str, config: SgcdConfig, workers: int | None = None, gpus: float = 0.0
) -> Need:
    """What `prepare`, `harmonize`, `train` or `tune` needs with these settings, at the least.

    `gpus` is what each worker takes of a GPU.
    """
    batch = {
        "train": config.global_stage.batch_size, "tune": config.target_stage.batch_size
    }.get(command, 1)  # fmt: skip
    count = workers or 1
    voxels = float(math.prod(config.prepare.shape))
    held = voxels
    if command == "train" and config.global_stage.crop is not None:
        held = float(math.prod(config.global_stage.crop))
    values = held / config.network.patch**3 * config.network.channels[0] * batch / count
    # On a GPU the maps are not in main memory.
    maps = 0.0 if gpus else 4.0 * MAPS[command] * values
    roles = {"train": 1, "tune": 2}.get(command, 0)
    volumes = 5.0 * voxels * batch * roles  # float32 image, uint8 mask
    return Need(
        workers=count, gpus=float(gpus), memory=WORKER_BYTES + maps,
        feeding={"train": 0.25, "tune": 0.25}.get(command, 0.0),
        object_store=max(MIN_OBJECT_STORE, SETS_AHEAD * volumes),
    )  # fmt: skip


def require_room(ray: Any, need: Need) -> None:
    """Refuse work that the cluster has no place for, now or after growing.

    Raises:
        StorageError: CLUSTER, with what is needed and what there is.
    """
    for finding in room_findings(ray, need):
        if finding.answer == "fail":
            raise StorageError(finding.found, code=finding.code)


def room_findings(ray: Any, need: Need) -> list[Finding]:
    """CPUs, GPUs, memory and object store of the cluster against what is needed.

    What an autoscaler may add counts as room: it adds nodes when work waits for them.
    """
    now = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    found = findings_of(now, need)
    if any(finding.answer == "fail" for finding in found) and (grown := growth()):
        found = findings_of(grown, need)
    return found


def findings_of(nodes: list[dict[str, float]], need: Need) -> list[Finding]:
    """The same for nodes of these resources, as Ray names them."""
    total = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    cpus = need.workers * need.cpus + need.feeding
    gpus = need.workers * need.gpus
    found = [_compare("cpus", cpus, total["CPU"], "CPUs")]
    found.append(_compare("gpus", gpus, total["GPU"], "GPUs"))
    fit = sum(_fitting(node, need) for node in nodes)
    each = f"{need.memory / 1e9:.1f} GB"
    if fit >= need.workers:
        found.append(Finding("memory", "ok", f"room for {fit} workers of {each}"))
    elif all(finding.answer == "ok" for finding in found):
        best = max((node.get("memory", 0.0) for node in nodes), default=0.0)
        text = (
            f"needs {each} of memory for each of {need.workers} workers, beside their CPUs and "
            f"GPUs; the cluster has room for {fit} such, its largest node {best / 1e9:.1f} GB in "
            "all. Ask for fewer --workers, or larger nodes."
        )
        found.append(Finding("memory", "fail", text, "CLUSTER"))
    store = max((node.get("object_store_memory", 0.0) for node in nodes), default=0.0)
    # An autoscaler does not say how much its nodes will have.
    if store >= need.object_store or not store:
        found.append(Finding("object store", "ok", f"{store / 1e9:.2f} GB on the largest node"))
    else:
        text = (
            f"needs an object store of {need.object_store / 1e9:.2f} GB on a node, the largest has "
            f"{store / 1e9:.2f} GB. Start Ray with --object-store-memory="
            f"{need.object_store:.0f}, or use a smaller batch_size."
        )
        found.append(Finding("object store", "fail", text, "CLUSTER"))
    return found


def _compare(check: str, need: float, have: float, unit: str) -> Finding:
    if have >= need:
        return Finding(check, "ok", f"{have:g} {unit}, {need:g} needed")
    text = (
        f"needs {need:g} {unit} at once, the cluster has {have:g}. Ask for fewer --workers, or add "
        "nodes; of a cluster that grows by itself say in SGCD_CLUSTER_MAX how far."
    )
    return Finding(check, "fail", text, "CLUSTER")


def _fitting(node: dict[str, float], need: Need) -> int:
    """How many of the workers one node can hold."""
    parts = [
        int(node.get(name, 0.0) / amount + 1e-9)
        for name, amount in (("CPU", need.cpus), ("GPU", need.gpus), ("memory", need.memory))
        if amount > 0
    ]
    return min(parts, default=need.workers)


def growth() -> list[dict[str, float]]:
    """Resources of all nodes the cluster may have when it has grown; none when nobody said.

    Ray does not tell how far its autoscaler may go, so whoever sets up the cluster does, in
    SGCD_CLUSTER_MAX: [{"nodes": 16, "CPU": 8, "GPU": 1, "memory": 32e9}, …].

    Raises:
        ConfigError: It cannot be read.
    """
    text = os.environ.get("SGCD_CLUSTER_MAX", "")
    if not text:
        return []
    try:
        groups = [{name: float(n) for name, n in group.items()} for group in json.loads(text)]
        return [group for group in groups for _ in range(int(group.pop("nodes")))]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            'must be as [{"nodes": 16, "CPU": 8, "GPU": 1, "memory": 32e9}].',
            where="SGCD_CLUSTER_MAX",
        ) from error


def node_findings(
    ray: Any, lake: str | None, *, seconds: float = PREFLIGHT_SECONDS
) -> list[Finding]:
    """Each node's program, clock and access to the lake; at most `seconds` long."""
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]][:MOST_NODES]
    task = ray.remote(num_cpus=0, max_retries=0)(on_node)
    asked = {}
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[task.options(scheduling_strategy=here).remote(lake, seconds + 1)] = node[
            "NodeManagerAddress"
        ]
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=seconds)
    found: list[Finding] = []
    for reference in ready:
        address = asked[reference]
        try:
            said = ray.get(reference)
        except (RayError, ImportError) as error:
            text = (
                f"node {address} cannot run this program ({type(error).__name__}). Its image must "
                "hold the same version."
            )
            found.append(Finding("nodes", "fail", text, "CLUSTER"))
            continue
        found += [
            Finding(f.check, f.answer, f"node {address}: {f.found}", f.code)
            for f in said["lake"]
            if f.answer == "fail"
        ]
        if said["version"] != versions():
            text = (
                f"node {address} has {_words(said['version'])}, here is {_words(versions())}. Use "
                "one image for all."
            )
            found.append(Finding("nodes", "fail", text, "CLUSTER"))
    if late:
        names = ", ".join(sorted(asked[reference] for reference in late))
        text = f"no answer within {seconds:.1f} s from {names}; the work may still run there"
        found.append(Finding("nodes", "warn", text))
    if not found:
        found.append(Finding("nodes", "ok", f"{len(ready)} nodes answer, same versions"))
    return found


def require_nodes(ray: Any, lake: str | None, began: float) -> None:
    """Refuse a cluster whose nodes have another program or no access to the lake.

    Args:
        ray: The connected module.
        lake: Address.
        began: When the preflight did (`time.monotonic`).

    Raises:
        StorageError: With the code and sentence of the first failure.
    """
    left = max(NODE_SECONDS, PREFLIGHT_SECONDS - (time.monotonic() - began))
    for finding in node_findings(ray, lake, seconds=left):
        if finding.answer == "fail":
            raise StorageError(finding.found, code=finding.code)
        if finding.answer == "warn":
            log.warning("%s: %s", finding.check, finding.found)


def on_node(lake: str | None, seconds: float) -> dict[str, Any]:
    """What one node says of itself; runs there.

    `seconds` is more than the node is waited for: one whose store is slow is late, not refused.
    """
    found = check_lake(lake, seconds=seconds) if lake else []
    return {"version": versions(), "lake": found}


def versions() -> dict[str, str]:
    """What must be the same everywhere."""
    from ray_jobs.parser import program_version

    return {
        "sgcd-lake": program_version(),
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
    }


def _words(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
