"""What a data set is drawn with: to tell whether a run may go on in a folder, or draw beside another process."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import InputError, first_line

SAMPLED_BYTES = 2**20
LONGEST_TOLD = 120
MODEL_SUFFIXES = (".json", ".txt", ".safetensors")


def fingerprint_files(root: Path, files: Iterable[Path]) -> str:
    """Return a SHA-256 of the files' names below `root`, sizes, and each one's first and last MiB.

    A fine-tuned model differs there, and gigabytes need not be read.
    """
    digest = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root).as_posix()} {size}\n".encode())
        with open(file, "rb") as content:
            digest.update(content.read(SAMPLED_BYTES))
            content.seek(max(size - SAMPLED_BYTES, 0))
            digest.update(content.read(SAMPLED_BYTES))
    return digest.hexdigest()


def fingerprint_model(model: str) -> str:
    """Return the fingerprint of a local diffusers folder, or the commit of a hub id as cached or downloaded.

    Raises:
        InputError: the hub has no such model, or cannot be reached and nothing is cached.
    """
    folder = Path(model)
    if folder.is_dir():
        return fingerprint_files(folder, (file for file in folder.glob("*/*") if file.suffix in MODEL_SUFFIXES))
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "model_index.json")).parent.name
    except Exception as error:  # the hub's client raises its own, requests' and httpx's errors, by version
        raise InputError(
            f"--model: {model} is no local folder and cannot be had from the hub ({first_line(error)}); "
            "download it once (README) or give a local diffusers folder"
        ) from error


def describe_differences(there: dict[str, Any], now: dict[str, Any]) -> str:
    """Return the options that differ, as "alpha (1.0 there, 0.5 now), seed (…)"; values only where they are short."""
    told = []
    for name, value in now.items():
        if there.get(name) != value:
            values = f" ({there.get(name)} there, {value} now)"
            told.append(name + (values if len(values) < LONGEST_TOLD else ""))
    return ", ".join(told)
