"""A step's batch over two processes, or in parts: the losses, record and weights of one process."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.multiprocessing as mp
from test_stages import batch, config, looks, trained
from torch.nn.parallel import DistributedDataParallel

from sgcd_core.batch import split_batch
from sgcd_core.config import load_config
from sgcd_core.errors import ConfigError
from sgcd_core.global_stage import GlobalStage
from sgcd_core.style.encoder import load_encoder
from sgcd_core.target_stage import TargetStage

STEPS = 3
# As in the ranks: another order of adding up is not what is tested.
pytestmark = pytest.mark.usefixtures("one_thread")

CHAIN = [
    "target_sampler.t_start=35", "target_sampler.t_reverse=25", "target_sampler.steps=2",
    "target_sampler.invert_steps=2", "target_sampler.start=inversion",
    "target_sampler.kind=anchored", "target_stage.backprop=chain", "target_stage.style_every=1",
    "target_stage.learning_rate=0.0001",  # differences of rounding grow with each step's size
]  # fmt: skip
#: Several optimizer steps in one.
LAST_TWO = [
    "target_sampler.steps=3", "target_stage.last_k=2", "target_stage.style_every=1",
    "target_stage.learning_rate=0.0001",
]  # fmt: skip
#: Name → stage, settings.
CASES = {
    "global": (1, []),
    "global, record first": (1, ["record.order=update_then_compare"]),
    "target": (2, ["target_stage.style_every=2", "target_stage.learning_rate=0.0001"]),
    "target, whole chain": (2, CHAIN),
    "target, last two steps": (2, LAST_TWO),
}


def global_batches():
    """Four scans a step, two of each contrast and sequence."""
    sequences = ["T1w", "T2w", "T2w", "T1w"]
    return [batch((0.5, 2.0, 0.5, 2.0), 10 * i, sequences) for i in range(STEPS)]


def part_of(whole, rank, world):
    return {name: tensor[rank::world] for name, tensor in whole.items()}


@functools.cache
def run(case, rank=0, world=1, accumulate=1):
    """Losses of every step, and the state at the end."""
    number, settings = CASES[case]
    name = "global_stage" if number == 1 else "target_stage"
    cfg = config(*settings, f"{name}.accumulate={accumulate}")
    stage = GlobalStage(cfg, STEPS) if number == 1 else target_stage(cfg)
    # A fresh look filter's first gradients are rounding errors, which Adam makes whole steps of.
    generator = torch.Generator().manual_seed(5)
    last = stage.network.look_filter.perceptron[-1].weight
    torch.nn.init.normal_(last, std=0.005, generator=generator)
    stage.network.look_filter.requires_grad_(True)
    if world > 1:
        stage.wrap(DistributedDataParallel)
    losses = []
    for i, whole in enumerate(global_batches()):
        part = part_of(whole, rank, world)
        if number == 1:
            losses.append(stage.step(part))
        else:
            own = batch((0.5,) * 4, 100 + 10 * i, ["T2w", "T1w", "T1w", "T2w"])
            losses.append(stage.step(part, part_of(own, rank, world)))
    return losses, stage.state_dict()


def target_stage(cfg):
    _, _, pack = trained(cfg, 2)
    stage = TargetStage(pack, cfg, "A", load_encoder("statistics"), looks(0.5, 0.5))
    stage.measure_target([batch((0.5, 0.5), 200, ["T1w", "T2w"])])
    return stage


def _rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    found = {(case, 1): run(case, rank, 2) for case in CASES}
    found |= {(case, 2): run(case, rank, 2, accumulate=2) for case in ("global", "target")}
    torch.save(found, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(_rank, args=(str(folder),), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def same_losses(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert set(one) == set(other)
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), name


def same_record(ours, theirs):
    values = (state["record"]["values"] for state in (ours, theirs))
    torch.testing.assert_close(*values, atol=1e-5, rtol=0)


def mean_over(ranks, key):
    rows = zip(*(rank[key][0] for rank in ranks), strict=True)
    return [{name: sum(r[name] for r in row) / len(row) for name in row[0]} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(ranks, case):
    losses, state = run(case)
    same_losses(mean_over(ranks, (case, 1)), losses)
    if "record" in state:
        same_record(ranks[0][case, 1][1], state)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_all_ranks_hold_the_same_weights_and_the_same_record(ranks, case):
    one, two = (rank[case, 1][1] for rank in ranks)
    for name, value in one["network"].items():
        assert torch.equal(value, two["network"][name]), name
    if "record" in one:
        assert torch.equal(one["record"]["values"], two["record"]["values"])
        assert one["record"]["updates"].tolist() == [STEPS, STEPS]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["global", "target"])
def test_two_processes_that_accumulate_train_as_one(ranks, case):
    same_losses(mean_over(ranks, (case, 2)), run(case)[0])


@pytest.mark.parametrize("case", [name for name in CASES if name != "target, last two steps"])
def test_a_batch_in_parts_gives_the_losses_of_the_whole(case):
    whole, state = run(case)
    losses, parted = run(case, accumulate=3)  # of 1, 1 and 2 scans
    same_losses(losses, whole)
    if "record" in state:
        same_record(parted, state)


def test_parts_cover_the_batch_in_order():
    whole = global_batches()[0]
    for parts, sizes in ((1, [4]), (3, [1, 1, 2]), (9, [1, 1, 1, 1])):
        split = split_batch(whole, parts)
        assert [len(p["seed"]) for p in split] == sizes
        assert torch.equal(torch.cat([p["image"] for p in split]), whole["image"])


def test_parts_and_several_steps_at_once_do_not_go_together():
    with pytest.raises(ConfigError, match="accumulate"):
        load_config(settings=["target_stage.accumulate=2", "target_stage.last_k=2"])
