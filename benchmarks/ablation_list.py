"""Every row of the ablations: what is changed over the preset, and which row it is set beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sgcd_core.config import SgcdConfig, load_config
from sgcd_core.diffusion.schedule import Schedule
from sgcd_core.harmonizer import start_matters

#: The grid of evaluations: timesteps t_0 that noise is added to, and evaluations from there.
STARTS = (100, 180, 400, 999)
STEPS = (1, 2, 4, 8, 16)
#: The grid of inversions: t_0 as above, T_f evaluations up and T_r down; the last are the paper's.
WALKS = ((2, 2), (2, 8), (8, 2), (8, 8), (35, 25))


@dataclass(frozen=True)
class Ablation:
    """One row.

    Attributes:
        name: For `--only`, and of the file of its result.
        title: For the table.
        settings: `key=value`, for training and use.
        sampling: `key=value`, for use alone: the model is the one of `settings`.
        start: `box`, or `scratch` where the weights in the box do not fit the settings or were
            trained for an output or an input of another meaning.
        stage2: Whether Stage 2 follows.
        at_target: Without Stage 2: whether the target's look is asked for, not the common one.
        network: False for rows without one that is trained here.
        against: Name of the row that differs in just this; None for the rows others refer to.
        group: `variant`, or the grid it belongs to, which is scored on fewer scans.
    """

    name: str
    title: str
    settings: tuple[str, ...] = ()
    sampling: tuple[str, ...] = ()
    start: Literal["box", "scratch"] = "box"
    stage2: bool = True
    at_target: bool = False
    network: bool = True
    against: str | None = "full"
    group: Literal["variant", "evaluations", "inversion"] = "variant"

    def trained_config(self, preset: str, base: Sequence[str] = ()) -> SgcdConfig:
        """Settings of training; `base` are those of every row."""
        return load_config(preset, settings=(*base, *self.settings))

    def config(self, preset: str, base: Sequence[str] = ()) -> SgcdConfig:
        """Settings of use."""
        return load_config(preset, settings=(*base, *self.settings, *self.sampling))


def _both(*settings: str) -> tuple[str, ...]:
    """The same settings for the samplers of both stages."""
    return tuple(f"{name}.{item}" for name in ("global_sampler", "target_sampler")
                 for item in settings)  # fmt: skip


_LOW = _both("t_start=180", "steps=4")
#: t_0 and the way down as preset `paper` has them, with fewer evaluations.
_PAPER_WALK = (
    "target_sampler.start=inversion", "target_sampler.t_start=34", "target_sampler.t_reverse=24",
    "target_sampler.invert_steps=7", "target_sampler.steps=5",
)  # fmt: skip
_EPSILON = ("network.prediction=epsilon",)

VARIANTS: tuple[Ablation, ...] = (
    Ablation("raw", "the raw scan", network=False, against=None),
    Ablation("matched", "matched to the target's look, no network", network=False, against="raw"),
    Ablation("filtered", "the box's look filter on top, no U-Net", network=False,
             against="matched"),
    Ablation("full", "**all of it**", against=None),
    Ablation("no-stage2", "without Stage 2: to the common look", stage2=False),
    Ablation("stage1-at-target", "Stage 1's network asked for the target's look, not tuned",
             stage2=False, at_target=True),
    Ablation("no-record", "without the record", ("global_stage.weight_record=0",)),
    Ablation("record-as-printed", "record updated, then compared (Alg. 1 as printed)",
             ("record.order=update_then_compare",)),
    Ablation("encoder-statistics", "style encoder `statistics` for `mri-dino`",
             ("target_stage.encoder=statistics",)),
    Ablation("no-target-denoising", "Stage 2 without target denoising: style losses alone",
             ("target_stage.target_denoising=0",)),
    Ablation("denoising-alone", "Stage 2 by target denoising alone: no L_S, L_R, anatomy term",
             ("target_stage.weight_style=0", "target_stage.weight_reconstruction=0",
              "target_stage.weight_anatomy=0")),
    Ablation("match-histogram", "condition matched rank for rank, no composition model",
             ("condition.match=histogram",)),
    Ablation("network-distribution", "distribution as the network draws it",
             sampling=_both("distribution=network")),
    Ablation("inversion", "target reached by DDIM inversion from t_0 = 34, T_f = 7, T_r = 5",
             _PAPER_WALK),
    Ablation("anchored", "the same, DDIM anchored at I' (Eqs. 10–11 as printed)",
             (*_PAPER_WALK, "target_sampler.kind=anchored"), against="inversion"),
    Ablation("scratch", "**all of it**, from fresh weights", start="scratch", against=None),
    Ablation("scratch-no-record", "without the record", ("global_stage.weight_record=0",),
             start="scratch", against="scratch"),
    Ablation("scratch-no-gradient", "without the gradient condition, L_G and the anatomy term",
             ("condition.gradient_channel=false", "global_stage.weight_gradient=0",
              "target_stage.weight_anatomy=0"), start="scratch", against="scratch"),
    Ablation("scratch-no-augmentation", "without contrast augmentation",
             ("condition.contrast_augmentation=false",), start="scratch", against="scratch"),
    Ablation("scratch-no-matching", "condition not matched to any look",
             ("condition.match=none",), start="scratch", against="scratch"),
    Ablation("scratch-no-look-filter", "without the look filter",
             ("network.look_filter_radius=0",), start="scratch", against="scratch"),
    Ablation("scratch-x0", "prediction of x̂0, no residual", ("network.prediction=x0",),
             start="scratch", against="scratch-no-look-filter"),
    Ablation("scratch-no-content", "without the content channel (x̂0, no curve, no filter)",
             ("condition.content_channel=false", "network.prediction=x0",
              "network.curve_knots=0", "network.filter_radius=0"),
             start="scratch", against="scratch-x0"),
    Ablation("scratch-v", "prediction of v", ("network.prediction=v",),
             start="scratch", against="scratch-no-look-filter"),
    Ablation("scratch-epsilon", "prediction of ε", _EPSILON, start="scratch",
             against="scratch-no-look-filter"),
    Ablation("scratch-epsilon-low", "prediction of ε, 4 evaluations from t_0 = 180", _EPSILON,
             _LOW, start="scratch", against="scratch-epsilon"),
    Ablation("scratch-epsilon-flat", "the same, L_G and L_E unweighted over t",
             (*_EPSILON, "global_stage.x0_weight=flat"), _LOW, start="scratch",
             against="scratch-epsilon-low"),
)  # fmt: skip

EVALUATIONS: tuple[Ablation, ...] = tuple(
    Ablation(
        f"evaluations-t{t}-n{n}", f"t_0 = {t}, {n} evaluations",
        sampling=(f"target_sampler.t_start={t}", f"target_sampler.steps={n}"),
        group="evaluations",
    )
    for t in STARTS for n in STEPS
)  # fmt: skip

INVERSIONS: tuple[Ablation, ...] = tuple(
    Ablation(
        f"inversion-t{t}-f{up}-r{down}", f"t_0 = {t}, T_f = {up}, T_r = {down}",
        sampling=("target_sampler.start=inversion", f"target_sampler.t_start={t}",
                  f"target_sampler.invert_steps={up}", f"target_sampler.steps={down}"),
        group="inversion",
    )
    for t in STARTS for up, down in WALKS
)  # fmt: skip

ABLATIONS: dict[str, Ablation] = {a.name: a for a in (*VARIANTS, *EVALUATIONS, *INVERSIONS)}


def evaluations(ablation: Ablation, config: SgcdConfig) -> int:
    """Network evaluations of one harmonized scan: Stage 1 where it is seen in the result, and the
    way up and down of Stage 2.
    """
    if not ablation.network:
        return 0
    first, sampler = config.global_sampler.steps, config.target_sampler
    if not ablation.stage2:
        return first
    count = sampler.steps + (sampler.invert_steps if sampler.start == "inversion" else 0)
    return count + first * start_matters(Schedule.from_config(config.schedule), sampler)
