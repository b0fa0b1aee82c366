"""What `sgcd harmonize` answers for before anything runs. No Ray is started."""

from __future__ import annotations

from pathlib import Path

from small_lake import make_global_model

from pipelines.catalog import Catalog
from pipelines.lake import Lake
from ray_jobs import cli


def test_bad_scans_of_sites_and_sequences_not_asked_for_get_no_row(tmp_path: Path) -> None:
    lake = Lake(str(tmp_path))
    make_global_model(lake.uri)
    catalog = Catalog(lake)
    catalog.append("scans", [
        {"scan_id": f"{site}-{sequence}", "uri": f"/{site}-{sequence}", "subject": "1",
         "site": site, "sequence": sequence, "split": "train", "status": "failed",
         "code": "SCAN-COARSE", "message": "coarse"}
        for site in "AB" for sequence in ("T1w", "T2w")
    ])  # fmt: skip

    def noted(*words: str) -> list[str]:
        assert cli.main(["harmonize", "--lake", lake.uri, "--model", "global", *words]) == 1
        return sorted(catalog.rows("results")["scan_id"].to_pylist())

    assert noted("--sites", "A", "--sequences", "T1w") == ["A-T1w"]
    assert noted("--sites", "A") == ["A-T1w", "A-T2w"]
    assert noted() == ["A-T1w", "A-T2w", "B-T1w", "B-T2w"]
