"""torchvision's operators, where its wheel cannot load them.

torchvision 0.28.0 from PyPI is a CUDA build. Beside CPU torch 2.13 importing it raises "operator torchvision::nms does
not exist", and every transformers image import with it, unless the operators are declared before.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

OPERATORS = ("torchvision::nms", "torchvision::qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _Before:
    """An import hook that finds nothing itself: it declares the operators on torchvision's first import."""

    def find_spec(
        self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            define(Path(str(getattr(find_spec(name), "origin", ""))).parent)
        return None


def declare_on_import() -> None:
    """Have `define` run when torchvision is first imported in this process. Costs nothing where it never is."""
    if "torchvision" not in sys.modules and not any(isinstance(finder, _Before) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Before())


def define(folder: Path) -> None:
    """Declare what the C++ extension in torchvision's `folder` does not define; nothing where it loads."""
    import torch

    for extension in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            continue
    known = set(torch._C._dispatch_get_all_op_names())
    for name in OPERATORS:
        if name not in known:
            torch.library.define(name, SCHEMA)
