"""Soft histogram and record against plain NumPy; order, weights, workers."""

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from sgcd_core.config import RecordConfig
from sgcd_core.style.histogram import CHUNK, redistributed, soft_histogram, wasserstein
from sgcd_core.style.record import Record, statistics_of

CONFIG = RecordConfig(bins=20, bandwidth=0.05)


def numpy_histogram(x, bins, sigma):
    centers = np.linspace(0, 1, bins)
    weights = np.exp(-0.5 * ((x[:, None] - centers) / sigma) ** 2)
    return weights.sum(0) / (weights.sum() + 1e-8)


def batch(count=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(count, 1, 6, 6, 6, generator=generator)
    mask = torch.rand(image.shape, generator=generator) > 0.3
    return image, mask


def test_histogram_equals_numpy_beyond_one_chunk():
    x = torch.rand(CHUNK + 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(
        soft_histogram(x, 30, 0.03).numpy(), numpy_histogram(x.numpy(), 30, 0.03), rtol=1e-6
    )


def test_histogram_gradient_is_exact():
    x = torch.rand(50, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: soft_histogram(v, 12, 0.08), (x,))


def test_wasserstein_of_shifted_spikes_is_the_shift():
    a, b = torch.zeros(101), torch.zeros(101)
    a[20], b[50] = 1, 1
    assert float(wasserstein(a, b)) == pytest.approx(30 / 101)


def test_background_does_not_count():
    image, mask = batch()
    changed = torch.where(mask, image, torch.full_like(image, 7.0))
    torch.testing.assert_close(
        statistics_of(image, mask, CONFIG), statistics_of(changed, mask, CONFIG)
    )


def test_update_follows_eq_7():
    record = Record(2, CONFIG)
    one, two = statistics_of(*batch(1, 0), CONFIG), statistics_of(*batch(1, 1), CONFIG)
    label, weight = torch.tensor([1]), torch.ones(1)
    record.update(one, label, weight)
    torch.testing.assert_close(record.values[1], one[0])
    record.update(two, label, weight)
    torch.testing.assert_close(record.values[1], 0.95 * one[0] + 0.05 * two[0])
    assert record.updates.tolist() == [0, 2]


def test_comparing_first_sees_the_whole_distance_and_updating_first_only_the_decay_s_share():
    first = statistics_of(*batch(1, 0), CONFIG)
    image, mask = batch(1, 1)
    second = statistics_of(image**2, mask, CONFIG)
    second[:, -2:] = first[:, -2:]  # the histogram's distance alone, which is linear
    label, weight = torch.tensor([0]), torch.ones(1)
    record = Record(1, RecordConfig(bins=20, bandwidth=0.05, decay=0.2))
    record.update(first, label, weight)
    before = float(record.loss(second, label, weight))
    record.update(second, label, weight)
    assert float(record.loss(second, label, weight)) / before == pytest.approx(0.2, rel=1e-4)


def test_the_record_is_no_path_for_gradients_but_the_estimate_is():
    image, mask = batch(1)
    image.requires_grad_(True)
    record = Record(1, CONFIG)
    record.update(statistics_of(*batch(1, 9), CONFIG), torch.tensor([0]), torch.ones(1))
    statistics = statistics_of(image, mask, CONFIG)
    loss = record.loss(statistics, torch.tensor([0]), torch.ones(1))
    record.update(statistics, torch.tensor([0]), torch.ones(1))
    loss.backward()
    assert float(image.grad.abs().sum()) > 0
    assert not record.values.requires_grad


def test_a_sequence_without_a_record_costs_nothing():
    record = Record(2, CONFIG)
    stats = statistics_of(*batch(1), CONFIG)
    assert float(record.loss(stats, torch.tensor([1]), torch.ones(1))) == 0


def test_state_survives():
    record = Record(2, CONFIG)
    record.update(statistics_of(*batch(), CONFIG), torch.tensor([0, 1]), torch.tensor([1.0, 0.5]))
    other = Record(2, CONFIG)
    other.load_state_dict(record.state_dict())
    assert torch.equal(other.values, record.values) and torch.equal(other.updates, record.updates)


def _worker(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    record = Record(2, CONFIG)
    for step in range(3):
        image, mask = batch(4, step)
        # rank 0 holds three scans of the first sequence, rank 1 one of the second
        rows = slice(0, 3) if rank == 0 else slice(3, 4)
        labels = torch.tensor([0, 0, 0, 1])[rows]
        weight = torch.tensor([1.0, 0.5, 0.1, 1.0])[rows]
        record.update(statistics_of(image[rows], mask[rows], CONFIG), labels, weight)
    torch.save(record.state_dict(), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_workers_hold_the_record_of_one(tmp_path):
    mp.start_processes(_worker, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    alone = Record(2, CONFIG)
    for step in range(3):
        image, mask = batch(4, step)
        alone.update(
            statistics_of(image, mask, CONFIG),
            torch.tensor([0, 0, 0, 1]),
            torch.tensor([1.0, 0.5, 0.1, 1.0]),
        )
    for rank in range(2):
        state = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        torch.testing.assert_close(state["values"], alone.values, atol=1e-6, rtol=0)
        assert torch.equal(state["updates"], alone.updates)


def test_a_redistributed_image_has_the_other_s_distribution_and_its_own_order():
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((2, 1, 12, 12, 12), generator=generator)
    like = torch.rand(image.shape, generator=generator) ** 3 - 0.2
    mask = torch.rand(image.shape, generator=generator) > 0.3
    out = redistributed(image, like, mask)
    assert torch.equal(out[~mask], image[~mask])
    for made, wanted, own, inside in zip(out, like, image, mask, strict=True):
        made, wanted, order = made[inside], wanted[inside], own[inside].argsort()
        assert (made[order].diff() >= 0).all()
        levels = np.linspace(0, 1, 101)
        difference = np.quantile(made, levels) - np.quantile(wanted, levels)
        assert np.abs(difference).max() < 0.01
    alike = redistributed(like, like, mask)
    torch.testing.assert_close(alike, like, atol=1e-5, rtol=0)


def test_flat_and_tiny_images_are_redistributed_too():
    flat, mask = torch.full((1, 1, 2, 2, 2), 0.5), torch.ones((1, 1, 2, 2, 2), dtype=torch.bool)
    like = torch.linspace(0, 1, 8).reshape(flat.shape)
    assert redistributed(flat, like, mask).unique().numel() == 1
    one = mask.clone().zero_()
    one[0, 0, 0, 0, 0] = True
    assert redistributed(flat, like, one)[one] == like[one]
    assert torch.equal(redistributed(flat, like, mask.clone().zero_()), flat)


def test_many_voxels_of_one_value_are_redistributed_to_the_middle_of_what_they_span():
    mask = torch.ones(1, 1, 10, 10, 10, dtype=torch.bool)
    values = torch.linspace(0, 1, 1000)
    image = values.clone()
    image[:100], image[-100:] = image[99], image[-100]
    out = redistributed(image.view(mask.shape), values.view(mask.shape), mask).flatten()
    assert float(out[0]) == pytest.approx(0.05, abs=0.005)
    assert float(out[-1]) == pytest.approx(0.95, abs=0.005)
    torch.testing.assert_close(out[200:800], values[200:800], atol=5e-3, rtol=0)
    assert (out.diff() >= 0).all()
