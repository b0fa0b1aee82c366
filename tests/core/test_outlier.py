"""How unlike the training scans a scan is."""

from __future__ import annotations

import numpy as np
import pytest

from sgcd_core.style.outlier import OutlierModel


def test_a_training_scan_is_compared_with_the_others() -> None:
    rows = np.random.default_rng(0).normal(0, 1, (20, 9)).astype(np.float32)
    rows[7] += 8
    model = OutlierModel({0: rows})
    without = OutlierModel({0: np.delete(rows, 7, axis=0)})
    assert model.score(rows[7], 0) > 2
    scores = [model.score(row, 0) for row in rows]
    assert min(scores) > 0.1 and int(np.argmax(scores)) == 7
    # measured again, on another machine
    assert model.score(rows[7] + 1e-6, 0) == pytest.approx(model.score(rows[7], 0), rel=1e-3)
    assert without.score(rows[7], 0) > 2


def test_an_only_training_scan_is_like_itself_and_nothing_is_like_none() -> None:
    one = OutlierModel({0: np.zeros((1, 9), np.float32)})
    assert one.score(np.zeros(9, np.float32), 0) == 0
    assert one.score(np.zeros(9, np.float32), 1) == np.inf
