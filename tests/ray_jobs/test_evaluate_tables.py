"""The tables that `sgcd evaluate` prints."""

from __future__ import annotations

from pipelines.verdict import Line, summarize
from ray_jobs.evaluate import INTERVAL, before_after


def rows(**by_subject: tuple[float, float]) -> list[Line]:
    """Lines of one site from (raw, SGCD) of each subject."""
    found = [
        {"site": "A", "sequence": "T1w", "seen": True, "metric": "psnr", "method": method,
         "subject": subject, "scan_id": subject, "value": value}
        for subject, pair in by_subject.items()
        for method, value in zip(("raw", "sgcd"), pair, strict=True)
    ]  # fmt: skip
    return summarize(found).lines


def test_the_models_mean_has_its_interval_and_one_subject_has_none() -> None:
    head, _, line = before_after(rows(a=(20.0, 24.0), b=(21.0, 26.0), c=(22.0, 31.0)))
    assert head.endswith(f" {INTERVAL}")
    cells = line.split()
    assert cells[4:7] == ["3", "21.00", "27.00"]
    low, to, high = cells[7:]
    assert to == "to" and 24 <= float(low) < 27 < float(high) <= 31
    assert before_after(rows(a=(20.0, 24.0)))[-1].split()[4:] == ["1", "20.00", "24.00", "-"]
