"""A log of a training: a CSV file with a line for each step, to be plotted while it runs."""

import contextlib
from pathlib import Path
from typing import Any

from .files import write_file


def append(file: Path, **values: Any) -> None:
    """Append a line to a CSV file, whose first line has the names of the values."""
    cells = (f"{value:.6g}" if isinstance(value, float) else str(value) for value in values.values())
    line = ",".join(cells) + "\n"
    with contextlib.suppress(OSError):  # a program that shows it may lock it; a full disk ends the run at its state
        file.parent.mkdir(exist_ok=True)
        with open(file, "a", encoding="utf-8", newline="") as log:
            log.write(line if log.tell() else ",".join(values) + "\n" + line)


def tidy(file: Path) -> None:
    """Keep one whole line a step, the newest, in order: after a stop, or by a second process, steps are taken again."""
    with contextlib.suppress(OSError):
        title, *lines = file.read_bytes().splitlines(keepends=True) or [b""]
        whole = [line for line in lines if line.endswith(b"\n")]  # a kill or a full disk may leave a part of one
        by_step = {int(step): line for line in whole if (step := line.partition(b",")[0]).isdigit()}
        write_file(file, title + b"".join(by_step[step] for step in sorted(by_step)))
