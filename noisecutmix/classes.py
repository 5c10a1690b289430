"""The data sets: their classes in label order, model and checkpoint; class names and prompts."""

import dataclasses
import os
import re
import string
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from .errors import InputError
from .files import pin_model, read_json, recorded_command

META_CLASSES = {"cub": "bird", "flower": "flower", "aircraft": "aircraft", "digits": "digit"}
DEFAULT_PROMPT = "a photo of a {name} {meta_class}"
STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
CHECKPOINTS = Path(__file__).resolve().parent.parent / "ckpts"
CLASS_NAMES = Path(__file__).resolve().parent / "class_names"
LORA_FILE, EMBEDDINGS_FILE = "pytorch_lora_weights.safetensors", "learned_embeds-steps-last.bin"  # of a checkpoint
# before the class's name in the folders of some data sets: 001.Black_footed_Albatross, n02085620-Chihuahua
FOLDER_NUMBER = re.compile(r"n?\d+[\s._-]+(?=.*[^\W\d_])")
END_PUNCTUATION = " ?!.,;:"
CLASSES_FILE, FINETUNE_FILE = "classes.json", "finetune.json"  # written by noisecutmix.finetune, beside a checkpoint


@dataclasses.dataclass(frozen=True)
class Classes:
    """Classes in label order, and the defaults for drawing them.

    `model` is a hub id or a local diffusers folder, `ckpt_path` the folder of a Diff-Mix checkpoint or None, and
    `resolution` the side of a picture in pixels.
    """

    names: tuple[str, ...]
    meta_class: str
    model: str = STABLE_DIFFUSION
    ckpt_path: Path | None = None
    resolution: int = 512


def load_classes(data_name: str) -> Classes:
    """Return one of the data sets cub, flower, aircraft and digits, or the user's own.

    The user's own is a JSON file, `{"classes": ["…", …], "meta_class": "…"}`, with at least two class names in label
    order, named as in the checkpoint; or a folder that noisecutmix.finetune wrote, whose classes.json is such a file.
    The folder also determines the base model, the resolution and the checkpoint.

    Raises:
        InputError: there is no such data set, file or folder, or it does not describe a data set.
    """
    if data_name in META_CLASSES:
        return _read_bundled(data_name)
    path = Path(os.path.expanduser(data_name))
    if path.is_dir():
        return _read_finetuned(path)
    if path.suffix.lower() == ".json":
        return _read_classes(path)
    known = ", ".join(META_CLASSES)
    others = "or give a .json file or a folder that noisecutmix.finetune wrote"
    raise InputError(f"{data_name!r} is unknown; choose one of {known}, {others}", "data_name")


def _read_bundled(name: str) -> Classes:
    names = (CLASS_NAMES / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    classes = Classes(tuple(names), META_CLASSES[name], ckpt_path=CHECKPOINTS / name / "shot-1-lora-rank10")
    if name == "digits":
        return dataclasses.replace(classes, model=str(CHECKPOINTS / "digits" / "base"), resolution=32)
    return classes


def _read_finetuned(folder: Path) -> Classes:
    if not (folder / FINETUNE_FILE).is_file():
        raise InputError(f"{folder} has no {FINETUNE_FILE}; give a folder that noisecutmix.finetune wrote", "data_name")
    settings = read_json(folder / FINETUNE_FILE, "data_name", model=str, resolution=int)
    if not (folder / CLASSES_FILE).is_file():
        command = recorded_command(settings)
        raise InputError(f"the training in {folder} has no checkpoint yet; continue it with: {command}", "data_name")
    classes = _read_classes(folder / CLASSES_FILE)
    model = pin_model(settings["model"], settings)
    return dataclasses.replace(classes, model=model, resolution=settings["resolution"], ckpt_path=folder)


def _read_classes(path: Path) -> Classes:
    content = read_json(path, "data_name", classes=list, meta_class=str)
    names, meta_class = content["classes"], content["meta_class"]
    if len(names) < 2 or not all(map(_is_text, [*names, meta_class])):
        raise InputError(f'{path} needs at least two names in "classes", and a word in "meta_class"', "data_name")
    if repeated := find_repeated(names):
        raise InputError(f"{path} names {repeated!r} twice; case is ignored, '/' and '_' are spaces", "data_name")
    return Classes(tuple(names), meta_class)


def _is_text(value: object) -> bool:
    """Return whether a JSON value is a string that is not blank and can be encoded, so holds no lone surrogate."""
    return isinstance(value, str) and bool(value.strip()) and value == value.encode(errors="ignore").decode()


def normalise(name: str) -> str:
    """Return a class name with one space for each sequence of spaces, '/' and '_', and none at the ends."""
    return re.sub(r"[\s/_]+", " ", name).strip()


def comparison_key(name: str) -> str:
    """Return a key that is equal for two class names that count as the same.

    They may differ in case, in what `normalise` changes, and in the Unicode composition of a letter (the Unicode
    Standard, section 3.13, definition D145: canonical caseless match).
    """
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", normalise(name)).casefold())


def find_repeated(names: Iterable[str]) -> str | None:
    """Return the first name that counts as the same as an earlier one, or None."""
    seen = set()
    for name in names:
        key = comparison_key(name)
        if key in seen:
            return name
        seen.add(key)
    return None


def without_numbers(class_names: Sequence[str]) -> list[str]:
    """Return the names without the numbers that folders of known data sets begin with, unless a name has none."""
    names = [FOLDER_NUMBER.sub("", name, count=1) for name in class_names if FOLDER_NUMBER.match(name)]
    return list(class_names) if len(names) < len(class_names) else names


def match_classes(
    wanted: Sequence[str],
    names: Sequence[str],
    wanted_in: str,
    names_in: str,
    may_have_more: bool = False,
    option: str = "",
) -> list[int]:
    """Return the place of each wanted class among the names of another source, which have to be the same classes.

    Names are compared by `comparison_key`; else also without punctuation at the end; else also without the numbers that
    all names of one source begin with, or with equal numbers on both sides.

    Args:
        wanted, names: the class names of the two sources, in their own orders.
        wanted_in, names_in: what the messages call the sources.
        may_have_more: whether there may be names that are not wanted.
        option: the parameter that the messages name.

    Raises:
        InputError: a class is in one source only, or two names of a source count as the same.
    """
    for source, originals in ((wanted_in, wanted), (names_in, names)):
        if wrong := [name for name in originals if not isinstance(name, str)]:
            raise InputError(f"{source}: class names have to be texts, not {wrong[0]!r}", option)
    pairs = [(here, there) for here in _spellings(wanted) for there in _spellings(names)]
    fitting = [(here, there) for here, there in pairs[:-1] if here.keys() <= there.keys()]
    if not may_have_more:
        fitting = [(here, there) for here, there in fitting if here.keys() == there.keys()]
    here, there = next((pair for pair in fitting if not any(map(_find_pair, pair))), (fitting or pairs)[0])
    for keys, originals, source in ((here, wanted, wanted_in), (there, names, names_in)):
        if places := _find_pair(keys):
            first, second = (originals[place] for place in places)
            raise InputError(f"{source}: the classes {first!r} and {second!r} count as the same; rename one", option)
    both = ((here, there, wanted, wanted_in, names_in), (there, here, names, names_in, wanted_in))
    for keys, others, originals, source, other_source in both[:1] if may_have_more else both:
        for key, (place,) in keys.items():
            if key not in others:
                lack = f"{other_source} has no class {originals[place]!r}, which is in {source}; both need the same"
                raise InputError(lack, option)
    return [there[key][0] for key in here]


def _spellings(names: Sequence[str]) -> list[dict[str, list[int]]]:
    """Return the places of the names, by the names in the forms in which `match_classes` compares them."""
    keys = [comparison_key(name) for name in names]
    bare = [comparison_key(name).rstrip(END_PUNCTUATION) for name in without_numbers(names)]
    numbers = [re.sub(r"\D.*", "", key.removeprefix("n")).lstrip("0") for key in keys]
    forms = (
        keys,
        [key.rstrip(END_PUNCTUATION) for key in keys],
        [f"{number} {key}" for number, key in zip(numbers, bare)],  # 001.rose is 1 rose
        bare,  # last, since without numbers on both sides 1.rose would be 2.rose
    )
    spellings = []
    for form in forms:
        places: dict[str, list[int]] = {}
        for place, key in enumerate(form):
            places.setdefault(key, []).append(place)
        spellings.append(places)
    return spellings


def _find_pair(keys: dict[str, list[int]]) -> list[int] | None:
    """Return the places of two names that count as the same, if there are any."""
    return next((places[:2] for places in keys.values() if len(places) > 1), None)


def check_prompt(template: str) -> None:
    """Raise an InputError unless a prompt is a template with {name} and, optionally, {meta_class}."""
    name, meta_class = ("name", "", None), ("meta_class", "", None)  # without a format, which could cut a token
    try:
        fields = {field[1:] for field in string.Formatter().parse(template) if field[1] is not None}
    except ValueError:  # an open brace
        fields = set()
    if name not in fields or not fields <= {name, meta_class}:
        wanted = "has to be a template with {name} and, optionally, {meta_class}"
        raise InputError(f"{wanted}, not {template!r}", "prompt")


def find_placeholders(class_names: Iterable[str], name2placeholder: dict[str, str]) -> list[str]:
    """Return the token of each class; names are compared by `comparison_key`.

    Raises:
        InputError: the checkpoint has no token for a class.
    """
    by_key = {comparison_key(name): placeholder for name, placeholder in name2placeholder.items()}
    keys = {name: comparison_key(name) for name in class_names}
    if missing := [name for name, key in keys.items() if key not in by_key]:
        what = repr(missing[0]) + (f" and {len(missing) - 1} more classes" if len(missing) > 1 else "")
        raise InputError(f"the checkpoint has no token for {what}; is it for another data set?", "ckpt_path")
    return [by_key[key] for key in keys.values()]
