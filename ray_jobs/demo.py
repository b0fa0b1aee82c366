"""`sgcd demo`: the whole path on a small digital cohort, each step a command a user would type."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ray_jobs.context import quoted
from ray_jobs.outcome import Outcome
from ray_jobs.session import session
from ray_jobs.steps import step
from sgcd_core.errors import SgcdError


def run(args: Any) -> Outcome:
    """Cohort, index, prepare, train, suggest-target, tune, harmonize, evaluate, report."""
    started = time.monotonic()
    cohort, lake = os.path.join(args.out, "cohort"), os.path.join(args.out, "lake")
    words = ["--lake", lake]
    with session():  # one Ray for all steps; each would start its own otherwise
        step(
            args.json, "cohort", cohort, "--subjects", str(args.subjects),
            "--sites", str(args.sites), "--traveling", str(args.traveling),
            "--mm", str(args.mm), "--seed", str(args.seed),
        )  # fmt: skip
        step(args.json, "index", cohort, *words)
        with _reported_if_it_fails(args.json, words):
            step(args.json, "prepare", *words)
            step(
                args.json, "train", *words, "--init", "box",
                "--set", f"global_stage.steps={args.train_steps}",
            )  # fmt: skip
            suggested = step(args.json, "suggest-target", *words)
            target = str(suggested.data["target"])
            tuned = step(
                args.json, "tune", *words, "--target", target,
                "--set", f"target_stage.steps={args.tune_steps}",
                "--set", f"target_stage.encoder={args.encoder}",
            )  # fmt: skip
            model = ["--model", str(tuned.data["model"])]
            harmonized = step(args.json, "harmonize", *words, *model)
            evaluated = step(args.json, "evaluate", *words, *model, "--methods", "all")
            reported = step(args.json, "report", *words, *model)
    seconds = time.monotonic() - started
    lines = ["", f"Traveling subjects, against their own scan at {target}:", ""]
    lines += [*evaluated.data.get("table", []), "", *evaluated.data.get("verdict", [])]
    lines += ["", f"report: {reported.data['report']}"]
    data = {
        "target": target, "seconds": round(seconds, 1), "report": reported.data["report"],
        "rows": evaluated.data.get("rows", []), "counts": harmonized.data.get("counts", {}),
    }  # fmt: skip
    text = f"demo done in {seconds / 60:.1f} minutes; the lake is {lake}"
    ask = "SELECT site, sequence, status, count(*) FROM results GROUP BY ALL"
    follow = f'sgcd query "{ask}" --lake {quoted(lake)}'
    code = max(harmonized.exit_code, evaluated.exit_code)
    return Outcome(text, next=follow, exit_code=code, lines=lines, data=data)


@contextmanager
def _reported_if_it_fails(json: bool, words: list[str]) -> Iterator[None]:
    """A report of what there is, and of what went wrong, when a step cannot go on."""
    try:
        yield
    except SgcdError:
        with suppress(SgcdError):  # what stopped the step is what the user must hear of
            step(json, "report", *words)
        raise
