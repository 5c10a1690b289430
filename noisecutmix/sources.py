"""The files that a model and a checkpoint are loaded from, and their fingerprints. Imports no torch."""

import hashlib
import itertools
import re
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from .classes import EMBEDDINGS_FILE, LORA_FILE
from .errors import InputError, first_line
from .files import read_json

WITH_WEIGHTS = ("unet", "vae", "text_encoder")
LOADED = (*WITH_WEIGHTS, "tokenizer", "scheduler")
ADAPTER_FILE = "adapter_config.json"
BYTES_READ_AT_ONCE = 2**24
HUB_TIMEOUT = 20  # seconds


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

    `model` is a local diffusers folder, or a hub id, also "id@revision". The hub is asked only if its cache has no
    complete set of files. Safetensors are preferred to pickles, then the preferred precision to the other.

    Raises:
        InputError: there is no such model, it cannot be downloaded, or no precision has weights for all parts.
    """
    is_local = Path(model).is_dir()
    folder = Path(model) if is_local else _find_cached(model)
    chosen = _choose_files(_names_in(folder), prefers_half) if folder else None
    if not is_local and not chosen:
        folder = _download(model, prefers_half)
        chosen = _choose_files(_names_in(folder), prefers_half)
    if not folder or not chosen:
        raise InputError(f"{model} {_describe_lack(_names_in(folder) if folder else [])}", "model")
    variant, names = chosen
    return folder, variant, [folder / name for name in names]


def find_commit(model: str) -> str | None:
    """Return the commit of a hub model in the cache, None for a local folder."""
    folder = None if Path(model).is_dir() else _find_cached(model)
    return folder.name if folder else None


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


def _names_in(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in (*folder.glob("*.json"), *folder.glob("*/*"))]


def _choose_files(names: list[str], prefers_half: bool) -> tuple[str | None, list[str]] | None:
    """Return the variant of the weights and the files to load among a model's files, None if some are missing."""
    settings = [name for name in names if re.fullmatch(rf"({'|'.join(LOADED)})/[^/]+\.(json|txt)", name)]
    if not _has_settings(settings):
        return None
    for suffixes in (["safetensors"], ["safetensors", "bin"]):
        for variant in ("fp16", None) if prefers_half else (None, "fp16"):
            weights = [_find_weights(names, part, variant, suffixes) for part in WITH_WEIGHTS]
            if all(weights):
                return variant, [*settings, *itertools.chain(*weights)]
    return None


def _has_settings(names: list[str]) -> bool:
    needed = {"scheduler/scheduler_config.json", *(f"{part}/config.json" for part in WITH_WEIGHTS)}
    tokenizers = ({"tokenizer/tokenizer.json"}, {"tokenizer/vocab.json", "tokenizer/merges.txt"})
    return needed <= set(names) and any(tokenizer <= set(names) for tokenizer in tokenizers)


def _find_weights(names: list[str], part: str, variant: str | None, suffixes: list[str]) -> list[str]:
    """Return the files of a part's weights, one or all shards, [] if they are not complete."""
    stem = rf"{part}/[^/]*model" + (rf"\.{variant}" if variant else "")
    for suffix in suffixes:
        for shard in ("", r"-\d+-of-(\d+)"):
            found = [match for name in sorted(names) if (match := re.fullmatch(rf"{stem}{shard}\.{suffix}", name))]
            if found and (not shard or int(found[0][1]) == len(found)):
                return [match[0] for match in found]
    return []


def _describe_lack(names: list[str]) -> str:
    """Return what a model's files lack."""
    if not _has_settings(names):
        return "is not a complete diffusers model: settings of a part are missing"
    kinds = {"float32": None, "fp16": "fp16"}
    parts = []
    for part in WITH_WEIGHTS:
        there = [kind for kind in kinds if _find_weights(names, part, kinds[kind], ["safetensors", "bin"])]
        parts.append(f"{part}: {' and '.join(there) or 'none'}")
    return f"has no complete set of weights in one precision ({', '.join(parts)})"


def _find_cached(model: str) -> Path | None:
    """Return the folder of a hub model in the cache, whether complete or not; None if there is none."""
    from huggingface_hub import try_to_load_from_cache

    name, _, revision = model.partition("@")
    try:
        file = try_to_load_from_cache(name, "model_index.json", revision=revision or None)
    except ValueError:  # it is no valid name
        return None
    return Path(file).parent if isinstance(file, str) else None


def _download(model: str, prefers_half: bool) -> Path:
    """Download the files of a hub model that are missing in the cache, and return its folder there."""
    from huggingface_hub import HfApi, errors, snapshot_download

    name, _, revision = model.partition("@")
    try:
        about = HfApi().model_info(name, revision=revision or None, timeout=HUB_TIMEOUT)
        names = [file.rfilename for file in about.siblings or []]
        chosen = _choose_files(names, prefers_half)
        if not chosen:
            raise InputError(f"{model} {_describe_lack(names)}", "model")
        needed = ["model_index.json", *chosen[1]]
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=needed))
    except InputError:
        raise
    except Exception as error:  # depending on its version, huggingface_hub raises its own, requests' or httpx's errors
        if isinstance(error, errors.GatedRepoError):
            reason = f"{name} is gated: accept its conditions on its page of the hub, and set HF_TOKEN"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = f"{model} is no folder, and the hub has no {name}, or it is private: check it, or set HF_TOKEN"
        elif isinstance(error, errors.RevisionNotFoundError):
            reason = f"{name} has no revision {revision!r} on the hub"
        else:
            lack = f"{model} is no local folder, is not complete in the hub's cache, and cannot be downloaded"
            reason = f"{lack} ({first_line(error)}); download it once (README) or give a local diffusers folder"
        raise InputError(reason, "model") from error
