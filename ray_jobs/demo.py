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
from ray_jobs.settings import settings_words
from ray_jobs.steps import step
from sgcd_core.config import load_config, merge, parse_pairs, read_settings
from sgcd_core.errors import SgcdError

#: The demo's own settings, where neither an option nor the user's settings say otherwise.
USUAL: dict[str, object] = {
    "global_stage.steps": 40, "target_stage.steps": 16, "target_stage.encoder": "mri-dino",
}  # fmt: skip
#: In words of steps, what an earlier one tells.
TARGET, MODEL = "SITE", "target-SITE"


def commands(args: Any) -> list[list[str]]:
    """Words of each step. `TARGET` and `MODEL` stand for what only `suggest-target` tells."""
    cohort, lake = os.path.join(args.out, "cohort"), ["--lake", os.path.join(args.out, "lake")]
    users = merge(read_settings(args.config) if args.config else {}, parse_pairs(args.settings))
    settings = settings_words(args)

    def own(part: str, **options: object) -> list[str]:
        """Settings of a stage: what an option says, else the user's, else the demo's own."""
        words: list[str] = []
        for name, option in options.items():
            if option is not None or name not in users.get(part, {}):
                value = USUAL[f"{part}.{name}"] if option is None else option
                words += ["--set", f"{part}.{name}={value}"]
        return words

    box = [] if settings else ["--init", "box"]
    return [
        ["cohort", cohort, "--subjects", str(args.subjects), "--sites", str(args.sites),
         "--traveling", str(args.traveling), "--mm", str(args.mm), "--seed", str(args.seed)],
        ["index", cohort, *lake, *settings],
        ["prepare", *lake, *settings],
        ["train", *lake, *box, *settings, *own("global_stage", steps=args.train_steps)],
        ["suggest-target", *lake],
        ["tune", *lake, "--target", TARGET, *settings,
         *own("target_stage", steps=args.tune_steps, encoder=args.encoder)],
        ["harmonize", *lake, "--model", MODEL],
        ["evaluate", *lake, "--model", MODEL, "--methods", "all"],
        ["report", *lake, "--model", MODEL],
    ]  # fmt: skip


def run(args: Any) -> Outcome:
    """Cohort, index, prepare, train, suggest-target, tune, harmonize, evaluate, report."""
    load_config(args.preset, args.config, args.settings)  # a wrong setting is said before any work
    steps = commands(args)
    if args.dry_run:
        lines = [" ".join(map(quoted, ["sgcd", *words])) for words in steps]
        return Outcome(f"would run these {len(steps)} commands", lines=lines, data={"steps": steps})
    started = time.monotonic()
    lake = os.path.join(args.out, "lake")
    ends: dict[str, Outcome] = {}
    known: dict[str, str] = {}
    with session():  # one Ray for all steps; each would start its own otherwise
        for words in steps:
            words = [known.get(word, word) for word in words]
            with _reported_if_it_fails(args.json, lake, words[0]):
                ends[words[0]] = ended = step(args.json, *words)
            if words[0] == "suggest-target":
                known[TARGET] = str(ended.data["target"])
            if words[0] == "tune":
                known[MODEL] = str(ended.data["model"])
    harmonized, evaluated, target = ends["harmonize"], ends["evaluate"], known[TARGET]
    reported = ends["report"]
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
def _reported_if_it_fails(json: bool, lake: str, command: str) -> Iterator[None]:
    """A report of what there is, and of what went wrong, when a step cannot go on."""
    try:
        yield
    except SgcdError:
        if command not in ("cohort", "index", "report"):
            with suppress(SgcdError):  # what stopped the step is what the user must hear of
                step(json, "report", "--lake", lake)
        raise
