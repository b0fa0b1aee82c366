"""Digital traveling subjects: anatomy × subject × scanner physics, as BIDS with the truth beside.

On the fly, without files: `load_anatomy`, `random_subject`, `random_scanner`, `render_scan`.
"""

from pipelines.cohort.anatomy import Anatomy, list_anatomies, load_anatomy
from pipelines.cohort.make import CohortSummary, make_cohort
from pipelines.cohort.physics import Protocol, signal
from pipelines.cohort.render import (
    class_fractions,
    render_acquisition,
    render_scan,
    render_truth,
)
from pipelines.cohort.scanner import Scanner, random_scanner, random_sites
from pipelines.cohort.subject import Subject, random_subject

__all__ = [
    "Anatomy",
    "CohortSummary",
    "Protocol",
    "Scanner",
    "Subject",
    "class_fractions",
    "list_anatomies",
    "load_anatomy",
    "make_cohort",
    "random_scanner",
    "random_sites",
    "random_subject",
    "render_acquisition",
    "render_scan",
    "render_truth",
    "signal",
]
