"""What a data set is drawn with: to tell whether a run may go on in a folder, or draw beside another process."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import InputError
from .sources import find_checkpoint_files, find_model

SAMPLED_BYTES = 2**20
LONGEST_TOLD = 120


def fingerprint_files(root: Path, files: Iterable[Path]) -> str:
    """Return a SHA-256 of the files' names below `root`, sizes, and each one's first and last MiB.

    A fine-tuned model differs there, and gigabytes need not be read.

    Raises:
        InputError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in sorted(files):
        try:
            size = file.stat().st_size
            digest.update(f"{file.relative_to(root).as_posix()} {size}\n".encode())
            with open(file, "rb") as content:
                digest.update(content.read(SAMPLED_BYTES))
                content.seek(max(size - SAMPLED_BYTES, 0))
                digest.update(content.read(SAMPLED_BYTES))
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def fingerprint_model(model: str, prefers_half: bool) -> str:
    """Return the fingerprint of the files that are loaded of a model (see `find_model`)."""
    folder, _, files = find_model(model, prefers_half)
    return fingerprint_files(folder, files)


def fingerprint_checkpoint(ckpt_path: Path) -> str:
    """Return the fingerprint of the files that are loaded of a checkpoint."""
    return fingerprint_files(ckpt_path, (file for file in find_checkpoint_files(ckpt_path) if file.exists()))


def describe_differences(there: dict[str, Any], now: dict[str, Any]) -> str:
    """Return the options that differ, as "alpha (1.0 there, 0.5 now), seed (…)"; values only where they are short."""
    told = []
    for name, value in now.items():
        if there.get(name) != value:
            values = f" ({there.get(name)} there, {value} now)"
            told.append(name + (values if len(values) < LONGEST_TOLD else ""))
    return ", ".join(told)
