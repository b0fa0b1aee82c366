"""Losses against plain NumPy versions of the equations."""

import numpy as np
import pytest
import torch

from sgcd_core.losses import (
    gradient_loss,
    masked_mean,
    prediction_loss,
    smoothed,
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


def test_an_error_at_one_face_of_a_window_is_not_seen_at_the_other():
    error = torch.zeros(1, 1, 12, 12, 12)
    error[:, :, 0] = 1
    for mask in (None, torch.ones_like(error).bool()):
        spread = smoothed(error, mask, 2.0)[0, 0]
        assert spread[-1].abs().max() < 1e-6 < spread[0].min() and spread[0].min() > 0.2
    both = error.clone()
    both[:, :, -1] = -1
    assert prediction_loss(both, 0 * both, None, "l1", 2.0) > 1.9 * prediction_loss(
        error, 0 * error, None, "l1", 2.0
    )
