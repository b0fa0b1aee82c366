"""Errors a user can act on: each has a stable code, an exit code and advice.

Never put text from a header, a sidecar or a file's content in a message: it may identify a
patient. URIs, shapes, labels the user typed and numbers are fine.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

#: Name and password in an address.
_LOGIN = re.compile(r"(?<=://)[^/\s]*@")
#: Code of a scan whose file holds other bytes now: no scan of the lake's any more.
REPLACED = "SCAN-REPLACED"
#: Every code this project may print. The value is what the code means, for the reference pages.
CODES: dict[str, str] = {
    # scans: what `sgcd check` and the results table say
    "SCAN-MISSING": "There is no object at this address.",
    REPLACED: "The file at this address was repaired or replaced; its scan is another now.",
    "SCAN-CHANGED": "The object is not the one that was indexed.",
    "SCAN-UNREADABLE": "The object is not a NIfTI-1 or NIfTI-2 image.",
    "SCAN-TRUNCATED": "The image holds fewer voxels than its header says.",
    "SCAN-CORRUPT": "The compressed stream is damaged (CRC or length mismatch).",
    "SCAN-TOO-BIG": "The image inflates to more bytes than the limit allows.",
    "SCAN-NOT-3D": "The image is not one 3D volume.",
    "SCAN-DTYPE": "The voxel type cannot hold an MRI intensity (complex, RGB, …).",
    "SCAN-AFFINE": "The affine is missing, not finite or singular: left and right are unknown.",
    "SCAN-ORIENTATION": "sform and qform disagree about left and right.",
    "SCAN-VOXEL-SIZE": "A voxel side is zero, negative or outside 0.2 to 10 mm.",
    "SCAN-COARSE": "A voxel side is too long for harmonization in 3D.",
    "SCAN-COVERAGE": "The field of view is too small to hold a brain.",
    "SCAN-NONFINITE": "More than a few voxels are NaN or infinite.",
    "SCAN-EMPTY": "The image is constant or has too few distinct values.",
    "SCAN-SEQUENCE": "The sequence is not T1w or T2w, unknown to the model, or not what is seen.",
    "SCAN-NO-BRAIN": "Brain extraction found no plausible brain (volume out of range).",
    "SCAN-STRIP-ENDED": "Brain extraction was ended before its end: time or memory ran out.",
    "SCAN-NEEDS-STRIPPING": "A whole head, and no brain extraction tool is installed.",
    "SCAN-REGISTRATION": "The scan could not be aligned with the template.",
    "SCAN-NO-SITE": "No site is known for this scan, or its name is too long.",
    "SCAN-DUPLICATE": "The same bytes are listed under another name.",
    "SCAN-SPLIT": "Other scans of this subject are not of the split test, so it is not scored.",
    "SCAN-FAILED": "Harmonizing this scan failed in an unexpected way.",
    "SCAN-DEADLINE": "Working on this scan took longer than it may (--scan-deadline).",
    "SCAN-QUARANTINED": "This scan ended its worker three times and is set aside.",
    # lesion masks
    "LESION-UNREADABLE": "The scan's lesion mask is damaged or not an image.",
    "LESION-GRID": "The lesion mask lies on another grid than the scan.",
    "LESION-TOO-BIG": "The lesion mask leaves too little of the brain to carry a correction from.",
    # guards: why a result is `flagged`
    "FLAG-ANATOMY": "Edges of the output differ too much from the input's.",
    "FLAG-VOLUMES": "Tissue volumes drifted too far.",
    "FLAG-UNLIKE-TRAINING": "The scan is unlike every scan the model was trained on.",
    # storage
    "STORE-UNREACHABLE": "The store does not answer.",
    "STORE-DENIED": "The store refuses these credentials, or the object is archived.",
    "STORE-EXPIRED": "The credentials have expired and could not be renewed.",
    "STORE-DIGEST": "An object is not what was written: its length or digest differs.",
    "STORE-ADDRESS": "The address is not a local path, file:// or s3://bucket/key.",
    "STORE-EMPTY": "No scan lies under this address.",
    "STORE-WRITE": "Writing to the store failed.",
    "LAKE-MISSING": "There is no lake at this address.",
    "LAKE-EMPTY": "The lake holds no scan that fits the request.",
    "LAKE-BUSY": "Another job does the same work on this lake at the moment.",
    "TABLE-SCHEMA": "A table of the catalog has an unexpected schema.",
    "TABLE-VERSION": "The table has no such version, or its files were removed since.",
    # queries
    "QUERY-INVALID": "The statement names something unknown, or is not SQL.",
    "QUERY-REFUSED": "The statement does something else than read the catalog's tables.",
    "QUERY-LIMIT": "The query needs more time, memory or rows than it may use.",
    # data sets
    "BIDS-INVALID": "The BIDS tree lacks what is needed to read it.",
    "MANIFEST-COLUMN": "The CSV manifest lacks a column or holds an unknown value.",
    # models
    "MODEL-MISSING": "There is no such model in the lake.",
    "MODEL-DIGEST": "A file of the model differs from its recorded digest.",
    "MODEL-FORMAT": "The model was written by an incompatible version.",
    "MODEL-ALIAS": "An alias of a model cannot be moved, or not be relied on.",
    "MODEL-GRID": "The scans were prepared on another grid than the model's.",
    "TARGET-UNKNOWN": "The lake has no such site.",
    "TARGET-FEW": "The target site has too few scans to learn its look from.",
    "TARGET-SEQUENCE": "The target site has no scan of a sequence that is to be harmonized.",
    "ENCODER-WEIGHTS": "The style encoder's weights are not at hand.",
    "TRAIN-DIVERGED": "The loss is not finite.",
    "TRAIN-RANKS": "The workers of a training hold different states.",
    "CHECKPOINT-DIGEST": "A training checkpoint differs from its recorded digest.",
    # programs of others
    "SEGMENTER-FAILED": "The external segmentation program failed, or wrote no usable labels.",
    # configuration and use
    "CONFIG-KEY": "A setting does not exist.",
    "CONFIG-VALUE": "A setting has a value that is not allowed.",
    "CONFIG-FILE": "The configuration file cannot be read.",
    "USAGE": "The command line is not complete.",
    "CLUSTER": "The Ray cluster cannot run this.",
    "INTERNAL": "A fault of this program.",
}


def without_login(text: str) -> str:
    """`text` with `scheme://host` in place of `scheme://name:password@host`."""
    return _LOGIN.sub("", text)


class SgcdError(Exception):
    """What went wrong, where, and what to do. Logins in addresses are left out.

    Attributes:
        code: Stable code, a key of `CODES`.
        message: What was found and what was expected.
        where: URI, setting or table the error is about, if any.
        hint: What the user can do about it, if anything is known.
    """

    exit_code: ClassVar[int] = 70
    default_code: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        where: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.code = code or self.default_code
        if self.code not in CODES:
            raise KeyError(f"error code {self.code!r} is not listed in sgcd_core.errors.CODES")
        self.message = without_login(message)
        self.where = where and without_login(where)
        self.hint = hint and without_login(hint)
        super().__init__(str(self))

    @property
    def sentence(self) -> str:
        """Message and advice without code and place: for a row that has a column for each."""
        return f"{self.message} {self.hint}" if self.hint else self.message

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f" {self.hint}" if self.hint else ""
        return f"[{self.code}] {place}{self.message}{advice}"

    def __reduce__(self) -> tuple[Any, ...]:
        # Ray pickles exceptions across processes; keyword-only arguments need help.
        return (_rebuild, (type(self), self.message, self.code, self.where, self.hint))


def _rebuild(
    kind: type[SgcdError], message: str, code: str, where: str | None, hint: str | None
) -> SgcdError:
    return kind(message, code=code, where=where, hint=hint)


class InputError(SgcdError):
    """A scan or a data set cannot be used. Exit code 65."""

    exit_code = 65
    default_code = "SCAN-UNREADABLE"


class StorageError(SgcdError):
    """A store, lake or cluster is out of reach. Exit code 69."""

    exit_code = 69
    default_code = "STORE-UNREACHABLE"


class BusyError(SgcdError):
    """Another job does this work now; the same command later goes on. Exit code 75."""

    exit_code = 75
    default_code = "LAKE-BUSY"


class ModelError(SgcdError):
    """A model is missing, damaged or does not fit. Exit code 65."""

    exit_code = 65
    default_code = "MODEL-MISSING"


class ConfigError(SgcdError):
    """A setting is wrong. Exit code 78."""

    exit_code = 78
    default_code = "CONFIG-VALUE"


class UsageError(SgcdError):
    """The command line is wrong. Exit code 2."""

    exit_code = 2
    default_code = "USAGE"
