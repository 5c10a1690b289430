"""The data sets one can draw: their classes in label order, and where model and checkpoint come from."""

import difflib
import json
import re
import string
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .errors import InputError

DEFAULT_PROMPT = "a photo of a {name} {meta_class}"
STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
CHECKPOINTS = Path(__file__).resolve().parent.parent / "ckpts"
CLASS_NAMES = Path(__file__).resolve().parent / "class_names"
LORA_FILE, EMBEDDINGS_FILE = "pytorch_lora_weights.safetensors", "learned_embeds-steps-last.bin"  # of a checkpoint


@dataclass(frozen=True)
class Classes:
    """Classes in label order, and the defaults for drawing them.

    `model` is a hub id or a local diffusers folder; `ckpt_path` a Diff-Mix checkpoint's folder, None where there is no
    default; `resolution` the side of a picture in pixels.
    """

    names: tuple[str, ...]
    meta_class: str
    model: str = STABLE_DIFFUSION
    ckpt_path: Path | None = None
    resolution: int = 512


def _bundled(name: str, meta_class: str, model: str = STABLE_DIFFUSION, resolution: int = 512) -> Classes:
    names = (CLASS_NAMES / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return Classes(tuple(names), meta_class, model, CHECKPOINTS / name / "shot-1-lora-rank10", resolution)


META_CLASSES = {"cub": "bird", "flower": "flower", "aircraft": "aircraft", "digits": "digit"}


def load_classes(data_name: str) -> Classes:
    """Return the data set called cub, flower, aircraft or digits, or the one that a JSON file describes.

    The file holds `{"classes": ["…", …], "meta_class": "…"}`: at least two class names in label order, as the
    checkpoint keys them.

    Raises:
        InputError: no such data set or file, or a file that does not describe one.
    """
    if data_name == "digits":
        return _bundled("digits", META_CLASSES["digits"], str(CHECKPOINTS / "digits" / "base"), resolution=32)
    if data_name in META_CLASSES:
        return _bundled(data_name, META_CLASSES[data_name])
    if data_name.lower().endswith(".json"):
        return _read_json(Path(data_name))
    known = ", ".join(META_CLASSES)
    raise InputError(f"--data_name: {data_name!r} is unknown; choose one of {known}, or give a .json file")


def _read_json(path: Path) -> Classes:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"--data_name: {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"--data_name: {path} is not valid JSON: {error}") from error
    expected = 'expected {"classes": ["…", …], "meta_class": "…"}'
    if not isinstance(content, dict):
        raise InputError(f"--data_name: {path} holds no object; {expected}")
    names, meta_class = content.get("classes"), content.get("meta_class")
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(f'--data_name: "classes" in {path} must be a list of names; {expected}')
    if len(names) < 2:
        raise InputError(f'--data_name: "classes" in {path} needs at least two names to mix, it has {len(names)}')
    twice = find_repeated(names)
    if twice:
        raise InputError(f'--data_name: "classes" in {path} names {twice!r} twice')
    if not isinstance(meta_class, str) or not meta_class.strip():
        raise InputError(f'--data_name: "meta_class" is missing in {path}; {expected}')
    return Classes(tuple(names), meta_class)


def normalise(name: str) -> str:
    """Return a class name as names are compared: '/', '_' and runs of spaces count as one space, the ends as none."""
    return re.sub(r"[\s/_]+", " ", name).strip()


def find_repeated(names: Iterable[str]) -> str | None:
    """Return the first name that stands there twice, as names are compared."""
    seen = set()
    for name in names:
        if normalise(name) in seen:
            return name
        seen.add(normalise(name))
    return None


def check_prompt(template: str) -> None:
    """Refuse what is no template with {name} and perhaps {meta_class}.

    Raises:
        InputError: another field, none, a format after a name, or braces that do not close.
    """
    wanted = "--prompt: has to be a template with {name}, and {meta_class} if you like"
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise InputError(f"{wanted}: {error}") from error
    fields = [field for _, field, _, _ in parts if field is not None]
    unknown = [field for field in fields if field not in ("name", "meta_class")]
    if unknown:
        raise InputError(f"{wanted}, {{{unknown[0]}}} is unknown")
    if "name" not in fields:
        raise InputError(f"{wanted}, not {template!r}")
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise InputError(f"{wanted}, without a format after the name")


def vae_scale_factor(model: str) -> int:
    """Return how many pixels a side of a latent stands for: read from a local model folder, 8 for a hub id.

    Raises:
        InputError: the folder holds no readable vae/config.json.
    """
    if not Path(model).is_dir():
        return 8
    config = Path(model) / "vae" / "config.json"
    try:
        return int(2 ** (len(json.loads(config.read_text(encoding="utf-8"))["block_out_channels"]) - 1))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--model: {config} cannot be read; {model} is no diffusers model folder") from error


def find_placeholders(class_names: Iterable[str], name2placeholder: dict[str, str]) -> list[str]:
    """Return the token of each class, matching names after `normalise`.

    Raises:
        InputError: the checkpoint has no token for a class.
    """
    by_name = {normalise(name): placeholder for name, placeholder in name2placeholder.items()}
    class_names = list(class_names)
    missing = [name for name in class_names if normalise(name) not in by_name]
    if missing:
        close = difflib.get_close_matches(normalise(missing[0]), by_name, n=1)
        hint = f"; it has {close[0]!r}" if close else ""
        more = f" and {len(missing) - 1} more classes" if len(missing) > 1 else ""
        raise InputError(
            f"`ckpt_path`: the checkpoint has no token for {missing[0]!r}{more}{hint}; is it for another data set?"
        )
    return [by_name[normalise(name)] for name in class_names]
