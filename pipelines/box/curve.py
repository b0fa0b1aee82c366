"""The learning curve of a box: L_N in training and on sites and heads never trained on."""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.figures import COLOURS, MUTED, as_png, new_figure, plain_axes


def learning_curve(losses: Path, title: str, held_out: str = "never trained on") -> bytes:
    """A PNG of the lines that `train_network` writes, one a stretch of steps.

    Args:
        losses: `losses.jsonl`.
        title: Above the axes.
        held_out: What the error that is not trained on is of.
    """
    rows = [json.loads(line) for line in losses.read_text().splitlines()]
    steps = [row["step"] for row in rows]
    figure = new_figure(5.6, 3.2)
    axes = figure.subplots()
    axes.plot(steps, [row["noise"] for row in rows], color=MUTED, lw=1, label="trained on")
    held = [(row["step"], row["held_out"]) for row in rows if "held_out" in row]
    if held:
        axes.plot(*zip(*held, strict=True), color=COLOURS["after"], lw=1.8,
                  label=held_out)  # fmt: skip
    axes.set_xlabel("steps", fontsize=8)
    axes.set_ylabel("mean L_N, network scale", fontsize=8)
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7, frameon=False)
    plain_axes(axes)
    return as_png(figure)
