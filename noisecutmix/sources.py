"""The files that a model and a checkpoint are loaded from. Imports no torch."""

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from .classes import EMBEDDINGS_FILE, LORA_FILE
from .errors import InputError, first_line

WITH_WEIGHTS = ("unet", "vae", "text_encoder")
LOADED = (*WITH_WEIGHTS, "tokenizer", "scheduler")
ADAPTER_FILE = "adapter_config.json"


def find_checkpoint_files(ckpt_path: Path) -> tuple[Path, Path, Path]:
    """Return a checkpoint's LoRA, its embeddings, and the LoRA's settings as peft writes them, which may be missing.

    Raises:
        InputError: LoRA or embeddings are missing or cannot be read.
    """
    lora, pickled = ckpt_path / LORA_FILE, (ckpt_path / LORA_FILE).with_suffix(".bin")
    lora = pickled if pickled.exists() and not lora.exists() else lora
    for file in (lora, ckpt_path / EMBEDDINGS_FILE):
        try:
            open(file, "rb").close()
        except FileNotFoundError:
            raise InputError(f"`ckpt_path`: {file} is missing; a Diff-Mix checkpoint has {file.name}") from None
        except OSError as error:
            raise InputError(f"`ckpt_path`: {file} cannot be read: {error.strerror}") from error
    return lora, ckpt_path / EMBEDDINGS_FILE, ckpt_path / ADAPTER_FILE


def find_model(model: str, prefers_half: bool) -> tuple[Path, str | None, list[Path]]:
    """Return a model's local folder, the variant of its weights ("fp16" or None), and the files that are loaded.

    `model` is a local diffusers folder, or a hub id, also "id@revision": its files are taken from the hub's cache where
    they are, and downloaded otherwise. Safetensors come before pickles, the preferred precision before the other.

    Raises:
        InputError: there is no such model, it cannot be reached, or it has no weights of one precision.
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
    raise InputError(f"`model`: {model} has no complete set of weights for {', '.join(WITH_WEIGHTS)}")


def _find_first(folder: Path, patterns: list[str]) -> list[Path]:
    """Return the files of the first pattern that matches any."""
    return next(filter(None, (sorted(folder.glob(pattern)) for pattern in patterns)), [])


def _copies_of_hub_model(model: str, patterns: list[str]) -> Iterator[Path]:
    """Yield the model's folder as it is cached, then, for who asks on, with the files downloaded that it lacks."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, _, revision = model.partition("@")
    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            yield Path(snapshot_download(name, revision=revision or None, local_files_only=True))
        yield Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises its own, requests' and httpx's errors, by version
        raise InputError(
            f"`model`: {model} is no local folder and cannot be had from the hub ({first_line(error)}); "
            "download it once (README) or give a local diffusers folder"
        ) from error
