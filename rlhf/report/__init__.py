"""One self-contained page about a run: what was trained, how it went, and what the model now says.

    path = write(Path("runs/think-fusion-digits"))     # runs/think-fusion-digits/report.html

Works at any moment of a run: what is missing is left out or shown as not yet there.
"""

from __future__ import annotations

from pathlib import Path

from rlhf.report.page import render
from rlhf.report.run import ReportError, read

__all__ = ["ReportError", "write"]


def write(run_folder: Path) -> Path:
    """Write `report.html` into the run folder and return its path.

    Raises ReportError if the folder is no run or one of its files is broken; the message names it.
    """
    page = render(read(run_folder))
    path = run_folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path
