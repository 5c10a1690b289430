"""A log of a training: a CSV file with a line for each step, to be plotted while it runs."""

import contextlib
import time
from pathlib import Path
from typing import Any

from .files import atomic_file


def append(file: Path, **values: Any) -> None:
    """Append a line to a CSV file, whose first line has the names of the values."""
    with contextlib.suppress(OSError):  # a program that shows it may lock it; a full disk ends the run at its state
        _append(file, values)


def is_written(file: Path) -> bool:
    """Return whether a line was appended within the last half minute."""
    return file.exists() and time.time() - file.stat().st_mtime < 30


def _append(file: Path, values: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    with open(file, "a", encoding="utf-8", newline="") as log:
        if not log.tell():
            log.write(",".join(values) + "\n")
        cells = (f"{value:.6g}" if isinstance(value, float) else str(value) for value in values.values())
        log.write(",".join(cells) + "\n")


def cut(file: Path, steps: int) -> None:
    """Keep one line for each of the first steps, in their order: later ones are taken again."""
    with contextlib.suppress(OSError):
        _cut(file, steps)


def _cut(file: Path, steps: int) -> None:
    if not file.exists():
        return
    title, *lines = file.read_bytes().splitlines(keepends=True) or [b""]
    by_number = {int(number): line for line in lines if (number := line.partition(b",")[0]).isdigit()}
    kept = [by_number[number] for number in sorted(by_number) if number <= steps]
    with atomic_file(file) as log:
        log.write(title if kept else b"")
        log.writelines(kept)
