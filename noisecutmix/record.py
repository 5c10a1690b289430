"""The files of a data set: their names; run.json, which says how the data set is made; fingerprints of its sources."""

import argparse
import hashlib
import os
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import __version__
from .errors import InputError
from .files import read_json
from .ranges import default_dtype
from .sources import find_checkpoint_files, find_model

RUN_FILE, LABELS_FILE, METADATA_FILE, PREVIEW_FILE = "run.json", "soft_label.npy", "metadata.jsonl", "preview.png"
PREFIXES = {"image": "gen", "mask": "mask"}  # of an item's files, by folder
LEAST_DIGITS = 4
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "pillow")
LONGEST_SHOWN = 120  # characters
READ_AT_ONCE = 2**24  # bytes


def count_digits(num_items: int) -> int:
    """Return how many digits the file names of a data set have, so that they sort in row order."""
    return max(LEAST_DIGITS, len(str(num_items - 1)))


def item_file_name(part: str, num_items: int) -> str:
    """Return "image/gen_%04d.png" or "mask/mask_%04d.png", to be filled in with the item's index."""
    return f"{part}/{PREFIXES[part]}_%0{count_digits(num_items)}d.png"


def read_record(file: Path, flag: str, **kinds: type) -> dict[str, Any] | None:
    """Return the content of a JSON file, None where it is missing or empty (its creator was killed)."""
    return read_json(file, flag, **kinds) if os.path.isfile(file) and os.path.getsize(file) else None


def read_run(folder: Path, flag: str) -> dict[str, Any] | None:
    """Return the content of a data set's run.json, None if there is none. Raises InputError if it is damaged."""
    return read_record(folder / RUN_FILE, flag, num_aug=int, options=dict)


def check_same(root: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise an InputError unless a folder was made with the same options."""
    if differences := describe_differences(there, now):
        raise InputError(
            f"`output_dir`: {root} was made with another {differences}; "
            "give the same options, choose another folder, or delete this one"
        )


def data_options(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Return all options that the data depend on, as JSON values. A data set is continued only if all are the same.

    An option that came later is left out at its default, so that a data set made before it can be continued.
    """
    dtype = options.dtype or default_dtype(device)
    later = {"single_class": False}
    return {
        "seed": options.seed,
        "alpha": options.alpha,
        "guidance_scale": options.guidance_scale,
        "guidance_interval": list(options.guidance_interval),
        "num_inference_steps": options.num_inference_steps,
        "resolution": options.resolution,
        "dtype": dtype,
        "prompt": options.prompt,
        "meta_class": options.classes.meta_class,
        "class_names": list(options.classes.names),
        "model": fingerprint_model(options.model, prefers_half=dtype == "float16"),
        "checkpoint": fingerprint_checkpoint(options.ckpt_path),
        **{name: getattr(options, name) for name, default in later.items() if getattr(options, name) != default},
    }


def describe_run(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Return what run.json records of a run beside the options that the data depend on."""
    return {
        **describe_program(),
        "data_name": options.data_name,
        "model": options.model,
        "ckpt_path": str(options.ckpt_path.absolute()),
        "batch_size": options.batch_size,
        "device": device,
        "compile": options.compile,
    }


def describe_program() -> dict[str, Any]:
    """Return the command that continues this run of a script, and the versions of the program and its libraries."""
    return {
        "command": ["python", *sys.argv],
        "versions": {"noisecutmix": __version__, **{name: version(name) for name in LIBRARIES}},
    }


def describe_differences(there: dict[str, Any], now: dict[str, Any]) -> str:
    """Return the options that differ, such as "alpha (1.0 there, 0.5 now), seed (…)"; long values are left out."""
    differences = []
    for name in {**now, **there}:
        if there.get(name) != now.get(name):
            values = f" ({there.get(name)} there, {now.get(name)} now)"
            differences.append(name + (values if len(values) < LONGEST_SHOWN else ""))
    return ", ".join(differences)


def fingerprint_files(root: Path, files: Iterable[Path]) -> str:
    """Return a SHA-256 of the files' names below `root`, their sizes and their contents.

    Raises:
        InputError: a file cannot be read.
    """
    digest = hashlib.sha256()
    with tqdm(desc="reading files", unit="B", unit_scale=True, leave=False, delay=2) as bar:
        for file in sorted(files):
            try:
                name = file.relative_to(root).as_posix().encode(errors="surrogateescape")
                digest.update(name + f" {file.stat().st_size}\n".encode())
                with open(file, "rb") as content:
                    while part := content.read(READ_AT_ONCE):
                        digest.update(part)
                        bar.update(len(part))
            except OSError as error:
                raise InputError(f"{file} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def fingerprint_model(model: str, prefers_half: bool) -> str:
    """Return the fingerprint of the files of a model that `find_model` selects."""
    folder, _, files = find_model(model, prefers_half)
    return fingerprint_files(folder, files)


def fingerprint_checkpoint(ckpt_path: Path) -> str:
    """Return the fingerprint of the files of a checkpoint."""
    return fingerprint_files(ckpt_path, (file for file in find_checkpoint_files(ckpt_path) if file.exists()))
