"""MONAI's U-Net without the libraries that MONAI merely may use.

`import monai` loads every part of MONAI, and with its optional parts MLflow, torchvision (and with
it PyTorch's compiler), pandas, matplotlib, scikit-learn and more: on two cores 11 seconds instead
of 3, in every command and every worker. MONAI is built to do without them, so they are hidden from
it while it is imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

#: Optional libraries of MONAI that take long and that no part of MONAI used here needs.
HIDDEN = frozenset(
    ("ignite", "matplotlib", "mlflow", "pandas", "skimage", "sklearn", "tensorboard",
     "tensorboardX", "torchvision", "transformers")
)  # fmt: skip


class _Hide(importlib.abc.MetaPathFinder):
    """Finds none of `HIDDEN` for the thread that made it; other threads import as ever."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if threading.get_ident() == self._thread and name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"{name} is hidden while MONAI is imported", name=name)
        return None


def diffusion_unet() -> Any:
    """The class `monai.networks.nets.DiffusionModelUNet`.

    A program that uses other parts of MONAI as well, such as its MLflow handler, imports `monai`
    before this is called and gets MONAI whole.
    """
    if "monai" not in sys.modules:
        hide = _Hide()
        sys.meta_path.insert(0, hide)
        try:
            import monai  # noqa: F401
        finally:
            sys.meta_path.remove(hide)
    from monai.networks.nets import DiffusionModelUNet

    return DiffusionModelUNet
