"""Losses against plain NumPy versions of the equations."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from sgcd_core.losses import (
    gradient_loss,
    masked_mean,
    prediction_loss,
    similarity_loss,
    style_direction_loss,
    style_reconstruction_loss,
)


def volumes():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 1, 5, 6, 7, generator=generator)
    b = torch.rand(a.shape, generator=generator)
    return a, b, torch.rand(a.shape, generator=generator) > 0.4


def test_prediction_loss_is_the_mean_error_inside_the_mask():
    a, b, mask = volumes()
    for kind, error in (("l2", (a - b) ** 2), ("l1", (a - b).abs())):
        expected = [error[i][mask[i]].mean().item() for i in range(2)]
        np.testing.assert_allclose(prediction_loss(a, b, mask, kind).numpy(), expected, rtol=1e-5)
        whole = [error[i].mean().item() for i in range(2)]
        np.testing.assert_allclose(prediction_loss(a, b, None, kind).numpy(), whole, rtol=1e-5)


def test_similarity_loss_is_the_windows_of_structural_similarity():
    before, reference, mask = volumes()
    error = 0.1 * (before - reference)
    found = similarity_loss(error, before, reference, mask).numpy()

    def windowed(volume):
        return ndimage.uniform_filter(volume, 5, mode="constant")

    for n in range(2):
        inside = mask[n, 0].numpy()
        rows = [np.where(inside, x[n, 0].double(), 0) for x in (error, before, reference)]
        means = [windowed(x) for x in rows]
        spread = [windowed(x**2) - m**2 for x, m in zip(rows, means, strict=True)]
        lost = means[0] ** 2 / (means[1] ** 2 + means[2] ** 2 + 1e-4)
        lost += spread[0] / (spread[1] + spread[2] + 9e-4)
        assert found[n] == pytest.approx(lost[inside].mean(), rel=1e-4)


def test_similarity_loss_counts_an_error_most_where_it_is_dark_and_even():
    mask = torch.ones(1, 1, 12, 12, 12, dtype=torch.bool)
    image, error = torch.full(mask.shape, 0.8), torch.full(mask.shape, 0.02)
    bright = similarity_loss(error, image, image, mask)
    assert float(similarity_loss(error, image / 8, image / 8, mask)) > 20 * float(bright)
    assert float(similarity_loss(torch.zeros_like(error), image, image, mask)) == 0


def test_an_empty_mask_gives_zero_and_not_nan():
    a, b, mask = volumes()
    assert masked_mean((a - b).abs(), torch.zeros_like(mask)).tolist() == [0, 0]


def test_gradient_loss_is_blind_to_a_change_of_gain_and_sees_a_moved_edge():
    a, _, _ = volumes()
    mask = torch.ones_like(a, dtype=torch.bool)
    assert float(gradient_loss(0.5 * a, a, mask).max()) < 1e-8
    assert float(gradient_loss(a.roll(1, 2), a, mask).min()) > 0.1


def test_style_losses_equal_the_equations():
    rng = np.random.default_rng(1)
    s, t = rng.standard_normal((2, 3, 8))
    cosine = (s * t).sum(1) / np.linalg.norm(s, axis=1) / np.linalg.norm(t, axis=1)
    expected = np.abs(t - s).sum(1) + 1 - cosine
    got = style_direction_loss(torch.from_numpy(s), torch.from_numpy(t)).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    got = style_reconstruction_loss(torch.from_numpy(s), torch.from_numpy(t)).numpy()
    np.testing.assert_allclose(got, np.abs(t - s).sum(1), rtol=1e-6)


def test_a_zero_direction_has_a_finite_gradient():
    moved = torch.zeros(1, 8, requires_grad=True)
    loss = style_direction_loss(moved, torch.ones(1, 8)).sum()
    loss.backward()
    assert float(loss) == pytest.approx(9.0)
    assert torch.isfinite(moved.grad).all()
