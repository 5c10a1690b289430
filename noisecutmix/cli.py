"""The flags of the two scripts, and all checks of them that need no torch."""

import argparse
import functools
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .classes import DEFAULT_PROMPT, META_CLASSES, check_prompt, comparison_key, load_classes
from .errors import InputError
from .files import check_writable
from .ranges import RANGES, Range, check_guidance_interval, check_resolution
from .sources import find_checkpoint_files, read_vae_factor


class Parser(argparse.ArgumentParser):
    """Raises an InputError of one line for a wrong argument, in place of printing the usage."""

    def __init__(self, **settings: Any):
        formatter = functools.partial(argparse.HelpFormatter, max_help_position=34, width=110)
        super().__init__(**{"formatter_class": formatter, "allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): ", r"\1: ", message)
        raise InputError(re.sub(r"^unrecognized arguments: (.*)", r"\1: no such flag; see --help", message))


def parse_generation(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return checked options; target_class and aug_class are labels or None. Raises InputError."""
    options = _parse(create_generation_parser(), arguments)
    names = options.classes.names
    options.target_class = _find_class("--target_class", options.target_class, names)
    options.aug_class = _find_class("--aug_class", options.aug_class, names)
    if options.target_class is not None and options.target_class == options.aug_class:
        raise InputError(f"--aug_class: {names[options.aug_class]!r} is the target class too; choose another")
    return options


def parse_augmentation(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return checked options. Raises InputError."""
    return _parse(create_augmentation_parser(), arguments)


def create_generation_parser() -> argparse.ArgumentParser:
    parser, output = _create_parser("Draw a few NoiseCutMix pictures: gen_0000.png … and preview.png.")
    _add_number(output, "num_gen", 8, "N", "pictures to draw")
    by_name = "the boxes: its name, or its label where no name is a number (default: random)"
    output.add_argument("--target_class", metavar="CLASS", help=f"class inside {by_name}")
    output.add_argument("--aug_class", metavar="CLASS", help=f"class outside {by_name}")
    _add_shared_arguments(parser)
    return parser


def create_augmentation_parser() -> argparse.ArgumentParser:
    parser, output = _create_parser(
        "Build a data set: image/, mask/, metadata.jsonl and soft_label.npy. After a stop, the same command continues."
    )
    _add_number(output, "num_aug", 10, "N", "pictures in the data set")
    verify = "check every pixel and label of an earlier run, which takes long"
    output.add_argument("--verify", action="store_true", help=verify)
    _add_shared_arguments(parser)
    return parser


def as_number(valid: Range) -> Callable[[str], Any]:
    """Return a function that converts an argument to a number in the range, as a `type` for argparse."""

    def read(text: str) -> Any:
        try:
            return valid.check("", valid.kind(text))
        except (ValueError, InputError):
            raise argparse.ArgumentTypeError(f"has to be {valid}, not {text!r}") from None

    return read


def as_text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty; omit the flag for its default")
    if text != text.encode(errors="ignore").decode():  # Python decodes invalid bytes as lone surrogates
        raise argparse.ArgumentTypeError(f"{text!a} is not valid text; rename or retype it in UTF-8")
    return text


def as_path(text: str) -> Path:
    path = os.path.expanduser(as_text(text))  # shells do not expand the ~ of --output_dir=~/x
    if path.startswith("~"):
        raise argparse.ArgumentTypeError(f"no home folder is known for {text}; write ./{text} if ~ is part of the name")
    return Path(path)


def as_model(text: str) -> str:
    return os.path.expanduser(as_text(text))


def as_device(text: str) -> str:
    if not re.fullmatch(r"cuda(:[0-9]{1,4})?|mps|cpu", text):
        raise argparse.ArgumentTypeError(f"has to be cuda, cuda:N, mps or cpu, not {text!r}")
    return text


positive_int = as_number(RANGES["num_aug"])  # for the scripts in tests/


def _create_parser(description: str) -> tuple[Parser, Any]:
    """Return a parser and its group of flags on the output."""
    parser = Parser(description=description)
    output = parser.add_argument_group("output")
    folder = "folder to write into (default: %(default)s)"
    output.add_argument("--output_dir", type=as_path, default="outputs", metavar="DIR", help=folder)
    return parser, output


def _add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model and classes")
    data_sets = f"{', '.join(META_CLASSES)}, a .json file of your classes, or a folder that ckpts/finetune.py wrote"
    model.add_argument(
        "--data_name", type=as_text, default="cub", metavar="NAME", help=f"{data_sets} (default: %(default)s)"
    )
    default_checkpoint = "(default: ckpts/NAME/shot-1-lora-rank10, or the folder given as --data_name)"
    model.add_argument("--ckpt_path", type=as_path, metavar="DIR", help=f"Diff-Mix checkpoint {default_checkpoint}")
    models = "hub id, id@revision or local diffusers folder (default: the data set's)"
    model.add_argument("--model", type=as_model, metavar="MODEL", help=f"base model: {models}")
    prompt_help = "template of the prompts (default: %(default)s)"
    model.add_argument("--prompt", type=as_text, default=DEFAULT_PROMPT, metavar="TEXT", help=prompt_help)

    method = parser.add_argument_group("method")
    _add_number(method, "alpha", 1.0, "A", "parameter of CutMix's Beta(alpha, alpha)")
    _add_number(method, "guidance_scale", 7.5, "W", "classifier-free guidance; a value up to 1 turns it off")
    method.add_argument(
        "--guidance_interval",
        type=as_number(RANGES["guidance_interval"]),
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LO", "HI"),
        help="approximation: apply guidance only in this part of the steps (default: 0 1)",
    )
    single = "draw the target class alone, with a white mask and a one-hot label: the method's baseline"
    method.add_argument("--single_class", action="store_true", help=single)
    _add_number(method, "num_inference_steps", 25, "N", "denoising steps")
    _add_number(method, "seed", 0, "S", "determines classes, boxes and noise")
    _add_number(method, "resolution", None, "PIXELS", "side of a picture (default: the data set's)")

    machine = parser.add_argument_group("machine")
    devices = "cuda, cuda:N, mps or cpu (default: the first available)"
    machine.add_argument("--device", type=as_device, metavar="DEVICE", help=devices)
    dtypes = ("float16", "bfloat16", "float32")
    machine.add_argument("--dtype", choices=dtypes, help="type of the weights (default: float16 on cuda, else float32)")
    _add_number(machine, "batch_size", 8, "N", "pictures in a batch")
    machine.add_argument("--compile", action="store_true", help="compile the model first; worthwhile in long runs")


def _add_number(group: Any, name: str, default: float | None, metavar: str, meaning: str) -> None:
    meaning += "" if default is None else " (default: %(default)s)"
    group.add_argument(f"--{name}", type=as_number(RANGES[name]), default=default, metavar=metavar, help=meaning)


def _parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Return checked options, with the data set's defaults filled in. Raises InputError."""
    options = parser.parse_args(arguments)
    classes = options.classes = load_classes(options.data_name)
    options.model = options.model or classes.model
    options.resolution = options.resolution or classes.resolution
    options.ckpt_path = options.ckpt_path or classes.ckpt_path
    if options.ckpt_path is None:
        raise InputError("--ckpt_path: needed with a data set of your own: the folder that Diff-Mix wrote")
    find_checkpoint_files(options.ckpt_path)
    check_model(options.model, options.resolution)
    check_prompt(options.prompt)
    check_guidance_interval(*options.guidance_interval)
    check_writable(options.output_dir)
    return options


def check_model(model: str, resolution: int) -> None:
    """Check that a model is a folder or may be a hub id, and accepts the resolution. Raises InputError."""
    if Path(model).is_file():
        folder = Path(model).stem
        convert = f"StableDiffusionPipeline.from_single_file({model!r}).save_pretrained({folder!r})"
        command = shlex.join(["python", "-c", f"from diffusers import StableDiffusionPipeline; {convert}"])
        raise InputError(f"--model: {model} is a single file; convert it once, and give the new folder: {command}")
    if not Path(model).is_dir() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(@\w[\w./-]*)?", model):
        raise InputError(f"--model: {model} is no folder, and no id on the hub; give one or the other")
    check_resolution(resolution, read_vae_factor(model))


def _find_class(flag: str, wanted: str | None, names: tuple[str, ...]) -> int | None:
    labels = {comparison_key(name): label for label, name in enumerate(names)}
    examples = f"give a name, such as {names[0]}"
    if not any(re.fullmatch(r"[-+]?[\d.,]+", name) for name in labels):  # else a number could be meant as a name
        labels |= {str(label): label for label in range(len(names))}
        examples += f", or a number from 0 to {len(names) - 1}"
    if wanted is None or comparison_key(wanted) in labels:
        return None if wanted is None else labels[comparison_key(wanted)]
    raise InputError(f"{flag}: {wanted!r} is no class of the data set; {examples}")
