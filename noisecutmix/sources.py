"""The files that a model and a checkpoint are loaded from, and their fingerprints. Imports no torch."""

import contextlib
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from .classes import EMBEDDINGS_FILE, LORA_FILE
from .errors import InputError, first_line
from .files import read_json

WITH_WEIGHTS = ("unet", "vae", "text_encoder")
LOADED = (*WITH_WEIGHTS, "tokenizer", "scheduler")
ADAPTER_FILE = "adapter_config.json"
BYTES_READ_AT_ONCE = 2**24


def find_checkpoint_files(ckpt_path: Path) -> tuple[Path, Path, Path]:
    """Return a checkpoint's LoRA, its embeddings, and the LoRA's settings as peft writes them, which may be missing.

    Raises:
        InputError: there is no such folder, or the LoRA or the embeddings are missing or cannot be read.
    """
    hint = "download or train a Diff-Mix checkpoint (README), or give its folder as ckpt_path"
    lora, pickled = ckpt_path / LORA_FILE, (ckpt_path / LORA_FILE).with_suffix(".bin")
    lora = pickled if pickled.exists() and not lora.exists() else lora
    for file in (lora, ckpt_path / EMBEDDINGS_FILE):
        if not file.is_file():
            raise InputError(f"{ckpt_path} has no {file.name}; {hint}", "ckpt_path")
    return lora, ckpt_path / EMBEDDINGS_FILE, ckpt_path / ADAPTER_FILE


def find_model(model: str, prefers_half: bool) -> tuple[Path, str | None, list[Path]]:
    """Return a model's local folder, the variant of its weights ("fp16" or None), and the files to load.

    `model` is a local diffusers folder, or a hub id, also "id@revision", whose files are downloaded if they are not in
    the hub's cache. Safetensors are preferred to pickles, then the preferred precision to the other.

    Raises:
        InputError: there is no such model, it cannot be downloaded, or no precision has weights for all parts.
    """
    settings = [f"{part}/*.{suffix}" for part in LOADED for suffix in ("json", "txt")]
    for suffixes in (["safetensors"], ["safetensors", "bin"]):
        for variant in ("fp16", None) if prefers_half else (None, "fp16"):
            stem = "*model.fp16" if variant else "*model"
            names = [f"{stem}{shard}.{suffix}" for suffix in suffixes for shard in ("", "-*-of-*")]
            needed = ["model_index.json", *settings, *(f"{part}/{name}" for part in WITH_WEIGHTS for name in names)]
            for folder in [Path(model)] if Path(model).is_dir() else _copies_of_hub_model(model, needed):
                weights = [_find_first(folder / part, names) for part in WITH_WEIGHTS]
                others = [file for pattern in settings for file in folder.glob(pattern)]
                if all(weights) and {"tokenizer", "scheduler"} <= {file.parent.name for file in others}:
                    return folder, variant, list(itertools.chain(others, *weights))
    raise InputError(f"{model} has no complete set of weights for {', '.join(WITH_WEIGHTS)}", "model")


def read_vae_factor(model: str) -> int:
    """Return the side of a picture divided by the side of its latents: from a local folder, or 8 for a hub id.

    Raises:
        InputError: the folder holds no readable vae/config.json.
    """
    if not Path(model).is_dir():
        return 8
    config = read_json(Path(model) / "vae" / "config.json", "model", block_out_channels=list)
    return 1 << max(0, len(config["block_out_channels"]) - 1)  # each block but the last halves the sides


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
                    while part := content.read(BYTES_READ_AT_ONCE):
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


def _find_first(folder: Path, patterns: list[str]) -> list[Path]:
    """Return the files of the first pattern that matches any."""
    return next(filter(None, (sorted(folder.glob(pattern)) for pattern in patterns)), [])


def _copies_of_hub_model(model: str, patterns: list[str]) -> Iterator[Path]:
    """Yield the model's folder in the cache, if it is there; then the folder after a download of the missing files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, _, revision = model.partition("@")
    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            yield Path(snapshot_download(name, revision=revision or None, local_files_only=True))
        yield Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # depending on its version, huggingface_hub raises its own, requests' or httpx's errors
        raise InputError(
            f"{model} is no local folder and cannot be downloaded from the hub ({first_line(error)}); "
            "download it once (README) or give a local diffusers folder",
            "model",
        ) from error
