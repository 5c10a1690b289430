"""run.json: the record of a data set's options and runs, and the comparison of two records."""

import argparse
import hashlib
import json
import sys
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import __version__
from .errors import InputError
from .files import atomic_file
from .sources import find_checkpoint_files, find_model

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "pillow")
SAMPLED_BYTES = 2**20
LONGEST_SHOWN = 120  # characters


def fingerprint_files(root: Path, files: Iterable[Path]) -> str:
    """Return a SHA-256 of the files' names below `root`, their sizes, and the first and last MiB of each.

    Two fine-tuned models differ there, so gigabytes need not be read.

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
    """Return the fingerprint of the files of a model that `find_model` selects."""
    folder, _, files = find_model(model, prefers_half)
    return fingerprint_files(folder, files)


def fingerprint_checkpoint(ckpt_path: Path) -> str:
    """Return the fingerprint of the files of a checkpoint."""
    return fingerprint_files(ckpt_path, (file for file in find_checkpoint_files(ckpt_path) if file.exists()))


@dataclass
class Record:
    """The content of run.json.

    Args:
        num_aug: the number of items that the folder is planned for.
        options: all options that the data depend on, as JSON values; the same for every run in a folder.
        runs: for each run the other options, the command, the machine and the versions.
        is_cleared: False while the folder may still hold items of an overwritten data set.
        identity: of the latest run, which is the only one that may write into the folder.
    """

    num_aug: int
    options: dict[str, Any]
    runs: list[dict[str, Any]]
    is_cleared: bool = True
    identity: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def read(cls, file: Path) -> "Record | None":
        """Return the record in a file, None if there is no file.

        Raises:
            InputError: the file cannot be read, or this program has not written it.
        """
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            num_aug, options, runs = content["num_aug"], content["options"], content["runs"]
            are_valid = type(num_aug) is int and num_aug > 0 and isinstance(options, dict) and isinstance(runs, list)
            if not (are_valid and runs and all(isinstance(word, str) for run in runs for word in run["command"])):
                raise ValueError
            return cls(num_aug, options, runs, content.get("is_cleared", True), content.get("identity", ""))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}; make it readable") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"`output_dir`: {file} is not from this program; choose another folder") from error

    def write(self, file: Path) -> None:
        with atomic_file(file) as content:
            content.write(json.dumps(asdict(self), indent=2, ensure_ascii=False).encode())


def describe_shape(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Return all options that the data depend on, as JSON values. A run is continued only if all are the same."""
    dtype = options.dtype or ("float16" if device.startswith("cuda") else "float32")
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
    }


def check_same_as_main(own: dict[str, Any], main: dict[str, Any]) -> None:
    """Check that this process draws the same data set as the main process: its machine may have other files.

    Args:
        own: all options that the data depend on, in this process; some may be missing.
        main: the same in the main process.

    Raises:
        InputError: an option differs.
    """
    differences = describe_differences({name: main.get(name) for name in own}, own)
    if differences:
        raise InputError(f"the main process has another {differences}; use the same command and files in all processes")


def describe_run(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Return the record of a run beside the options that the data depend on; its `command` continues the run."""
    return {
        **describe_program(),
        "data_name": options.data_name,
        "model": options.model,
        "ckpt_path": str(options.ckpt_path),
        "batch_size": options.batch_size,
        "device": device,
        "compile": options.compile,
    }


def describe_program() -> dict[str, Any]:
    """Return the command that continues this run of a script, and the versions of the program and its libraries."""
    return {
        "command": ["python", *(argument for argument in sys.argv if argument != "--overwrite")],
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
