"""The two scripts' parsers and their checks. Imports no torch."""

import argparse
import contextlib
import difflib
import math
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .classes import (
    DEFAULT_PROMPT,
    EMBEDDINGS_FILE,
    LORA_FILE,
    META_CLASSES,
    Classes,
    check_prompt,
    load_classes,
    normalise,
    vae_scale_factor,
)
from .errors import InputError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): ", r"\1: ", message)
        raise InputError(re.sub(r"^unrecognized arguments: (.*)", r"\1: no such flag; see --help", message))


def create_generation_parser() -> argparse.ArgumentParser:
    parser = _create_parser("Draw a few NoiseCutMix pictures: gen_0000.png … and preview.png.")
    output = parser.add_argument_group("output")
    _add_output_dir(output)
    output.add_argument("--num_gen", type=item_count, default=8, metavar="N", help="pictures to draw")
    output.add_argument("--target_class", metavar="CLASS", help="class inside the boxes, name or number (default: any)")
    output.add_argument("--aug_class", metavar="CLASS", help="class outside the boxes, name or number (default: any)")
    _add_shared_arguments(parser)
    return parser


def create_augmentation_parser() -> argparse.ArgumentParser:
    parser = _create_parser(
        "Build a data set: image/, mask/, metadata.jsonl and soft_label.npy. The same command goes on after a stop."
    )
    output = parser.add_argument_group("output")
    _add_output_dir(output)
    output.add_argument("--num_aug", type=item_count, default=10, metavar="N", help="pictures in the data set")
    output.add_argument(
        "--overwrite", action="store_true", help="delete what an earlier run wrote there and start anew"
    )
    output.add_argument(
        "--verify", action="store_true", help="compare every pixel and label that is there, which takes long"
    )
    _add_shared_arguments(parser)
    return parser


def parse_generation(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return checked options; target_class and aug_class are labels or None. Raises InputError."""
    options = _checked(create_generation_parser().parse_args(arguments))
    names = options.classes.names
    options.target_class = _find_class("--target_class", options.target_class, names)
    options.aug_class = _find_class("--aug_class", options.aug_class, names)
    if options.target_class is not None and options.target_class == options.aug_class:
        raise InputError(f"--aug_class: {names[options.aug_class]!r} is the target class too; choose another")
    return options


def parse_augmentation(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return checked options. Raises InputError."""
    return _checked(create_augmentation_parser().parse_args(arguments))


def _create_parser(description: str) -> argparse.ArgumentParser:
    return Parser(description=description, formatter_class=_help_formatter, allow_abbrev=False)


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    return _DefaultsFormatter(prog, max_help_position=34, width=110)


class _DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if "(default: " in (action.help or ""):
            return action.help
        has_default = not any(action.default is none for none in (None, False, argparse.SUPPRESS))
        return super()._get_help_string(action) if has_default else action.help


def _add_output_dir(group: Any) -> None:
    group.add_argument("--output_dir", type=folder, default=Path("outputs"), metavar="DIR", help="folder to write into")


def _add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model and classes")
    model.add_argument(
        "--data_name", default="cub", metavar="NAME", help=f"{', '.join(META_CLASSES)}, or a .json file of your classes"
    )
    model.add_argument(
        "--ckpt_path", type=folder, metavar="DIR", help="Diff-Mix checkpoint (default: ckpts/NAME/shot-1-lora-rank10)"
    )
    model.add_argument(
        "--model",
        type=not_empty,
        metavar="MODEL",
        help="base model, hub id or local diffusers folder (default: the data set's)",
    )
    model.add_argument("--prompt", default=DEFAULT_PROMPT, metavar="TEXT", help="template of the prompts")

    method = parser.add_argument_group("method")
    method.add_argument("--alpha", type=positive_float, default=1.0, metavar="A", help="of CutMix's Beta(alpha, alpha)")
    method.add_argument(
        "--guidance_scale", type=non_negative_float, default=7.5, metavar="W", help="at most 1 turns guidance off"
    )
    method.add_argument(
        "--guidance_interval",
        type=fraction,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LO", "HI"),
        help="approximation: guide only in these fractions of the steps (default: 0 1)",
    )
    method.add_argument("--num_inference_steps", type=step_count, default=25, metavar="N", help="denoising steps")
    method.add_argument("--seed", type=seed, default=0, metavar="S", help="decides classes, boxes and noise")
    method.add_argument("--resolution", type=side, metavar="PIXELS", help="side of a picture (default: 512, digits 32)")

    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--device", type=device_name, metavar="DEVICE", help="cuda, cuda:N, mps or cpu (default: the first there is)"
    )
    machine.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="of the weights (default: float16 on cuda, else float32)",
    )
    machine.add_argument("--batch_size", type=positive_int, default=8, metavar="N", help="pictures drawn at once")
    machine.add_argument("--compile", action="store_true", help="compile the model first: pays off in long runs")


def _number(kind: Callable[[str], Any], is_valid: Callable[[Any], bool], wanted: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        with contextlib.suppress(ValueError, OverflowError):
            value = kind(text)
            if math.isfinite(value) and is_valid(value):
                return value
        raise argparse.ArgumentTypeError(f"has to be {wanted}, not {text!r}")

    return read


def _whole_number(least: int, most: int) -> Callable[[str], int]:
    return _number(int, lambda value: least <= value <= most, f"a whole number from {least} to {most}")


item_count = _whole_number(1, 10**8)
side = _whole_number(1, 8192)
step_count = _whole_number(1, 999)  # the noise schedule has 1,000 timesteps, and the scheduler takes no one twice
seed = _whole_number(0, 2**63 - 1)
positive_int = _number(int, lambda value: value > 0, "a whole number above 0")
positive_float = _number(float, lambda value: value > 0, "a number above 0")
non_negative_float = _number(float, lambda value: value >= 0, "a number of at least 0")
fraction = _number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def device_name(text: str) -> str:
    if not re.fullmatch(r"cuda(:\d+)?|mps|cpu", text):
        raise argparse.ArgumentTypeError(f"has to be cuda, cuda:N, mps or cpu, not {text!r}")
    return text


def not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty; leave the flag out for its default")
    return text


def folder(text: str) -> Path:
    return Path(not_empty(text))


def _checked(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in the data set's defaults and check what can be checked without torch."""
    classes: Classes = load_classes(options.data_name)
    options.classes = classes
    options.model = options.model or classes.model
    options.resolution = options.resolution or classes.resolution
    options.ckpt_path = options.ckpt_path or classes.ckpt_path
    if options.ckpt_path is None:
        raise InputError("--ckpt_path: needed with a data set of your own: the folder that Diff-Mix wrote")
    _check_checkpoint(options.ckpt_path)
    _check_model(options.model)
    check_prompt(options.prompt)
    factor = vae_scale_factor(options.model)
    if options.resolution % factor:
        raise InputError(f"--resolution: has to be a multiple of {factor}, not {options.resolution}")
    low, high = options.guidance_interval
    if low > high:
        raise InputError(f"--guidance_interval: {low} is above {high}; give the lower end first")
    _check_output_dir(options.output_dir)
    return options


def _check_checkpoint(path: Path) -> None:
    hint = "download or train a Diff-Mix checkpoint (README) or give its folder with --ckpt_path"
    if not path.exists():
        raise InputError(f"--ckpt_path: {path} does not exist; {hint}")
    if not path.is_dir():
        raise InputError(f"--ckpt_path: {path} is a file; give the folder that holds it")
    for name in (LORA_FILE, EMBEDDINGS_FILE):
        if not (path / name).is_file():
            raise InputError(f"--ckpt_path: {path} has no {name}; {hint}")


def _check_model(model: str) -> None:
    if not Path(model).is_dir() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
        raise InputError(f"--model: {model} is no folder, and no id on the hub; give one or the other")


def _check_output_dir(path: Path) -> None:
    try:
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    except OSError as error:
        raise InputError(f"--output_dir: {path} cannot be used: {error.strerror}") from error
    if not existing.is_dir():
        raise InputError(f"--output_dir: {existing} is a file; choose a folder")
    try:
        tempfile.TemporaryDirectory(dir=existing).cleanup()  # os.access says yes to root, and on Windows
    except OSError as error:
        raise InputError(f"--output_dir: {existing} is not writable: {error.strerror}; choose another") from error


def _find_class(flag: str, wanted: str | None, names: tuple[str, ...]) -> int | None:
    if wanted is None:
        return None
    by_name = {normalise(name).lower(): label for label, name in enumerate(names)}
    key = normalise(wanted).lower()
    if key in by_name:
        return by_name[key]
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    close = [names[by_name[match]] for match in difflib.get_close_matches(key, by_name, n=3)]
    hint = f"did you mean {', '.join(close)}?" if close else f"give a name or a number from 0 to {len(names) - 1}"
    raise InputError(f"{flag}: {wanted!r} is no class of the data set; {hint}")
