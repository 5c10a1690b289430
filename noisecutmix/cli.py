"""What the four commands share of their flags; the flags of the two scripts; the checks that need no torch."""

import argparse
import functools
import os
import re
import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

from .classes import DEFAULT_PROMPT, META_CLASSES, check_prompt, comparison_key, load_classes
from .errors import InputError
from .files import check_writable
from .ranges import RANGES, Range, check_guidance_interval, check_resolution
from .script import program_words
from .sources import find_checkpoint_files, read_vae_factor

PLAN_FLAGS = ("seed", "alpha", "resolution", "single_class")
# the flags that neither the plan nor the generator takes
SCRIPT_FLAGS = (
    *("output_dir", "num_gen", "num_aug", "verify", "target_class", "aug_class", "data_name", "device", "compile"),
    *("classes", "data_flags"),  # which parsing adds
)
# the flags on which no picture and no label depends, whether directly or, as the model, by the content of files
NOT_OF_DATA = ("output_dir", "num_aug", "verify", "data_name", "model", "ckpt_path", "device", "batch_size", "compile")
# the flags of the first version, which run.json always has; later ones only where they are not at their default
FIRST_OF_DATA = ("seed", "alpha", "guidance_scale", "guidance_interval", "num_inference_steps", "resolution", "prompt")


class Parser(argparse.ArgumentParser):
    """Raises an InputError of one line for a wrong argument, in place of printing the usage."""

    def __init__(self, **settings: Any):
        formatter = functools.partial(argparse.HelpFormatter, max_help_position=34, width=110)
        program = Path(program_words()[-1]).name  # with -m, argparse would call it __main__.py
        super().__init__(**{"prog": program, "formatter_class": formatter, "allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        if argument := re.match(r"argument --(\S+): ", message):
            raise InputError(message[argument.end() :], argument[1])
        raise InputError(re.sub(r"^unrecognized arguments: (.*)", r"\1: no such flag; see --help", message))

    def relevant(
        self, options: argparse.Namespace, irrelevant: Collection[str], always: Collection[str]
    ) -> dict[str, Any]:
        """Return the values of all flags but the irrelevant ones, as JSON values, for the record of a folder.

        So a flag that comes later cannot be forgotten. It is left out at its default, so that a folder that was begun
        before it can be continued; so its default must not change later.

        Args:
            options: what was parsed.
            irrelevant: the names of flags on which the result does not depend.
            always: the names of flags that are recorded even at their default.
        """
        names = {action.dest for action in self._actions}.difference(irrelevant, ["help"])
        values = {name: value for name, value in vars(options).items() if name in names}
        kept = [name for name, value in values.items() if name in always or value != self.get_default(name)]
        return {name: list(values[name]) if isinstance(values[name], tuple) else values[name] for name in kept}


def parse_generation(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return checked options; target_class and aug_class are labels or None. Raises InputError."""
    options = _parse(create_generation_parser(), arguments)
    names = options.classes.names
    options.target_class = _find_class("target_class", options.target_class, names)
    options.aug_class = _find_class("aug_class", options.aug_class, names)
    if options.target_class is not None and options.target_class == options.aug_class:
        raise InputError(f"{names[options.aug_class]!r} is the target class too; choose another", "aug_class")
    return options


def parse_augmentation(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return checked options; `data_flags` are the values of all that the data may depend on. Raises InputError."""
    parser = create_augmentation_parser()
    options = _parse(parser, arguments)
    options.data_flags = parser.relevant(options, NOT_OF_DATA, FIRST_OF_DATA)
    return options


def plan_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `Plan` that are flags."""
    return {name: getattr(options, name) for name in PLAN_FLAGS}


def generator_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `NoiseCutMixGenerator` that are flags: all that nothing else takes."""
    return {name: value for name, value in vars(options).items() if name not in (*PLAN_FLAGS, *SCRIPT_FLAGS)}


def create_generation_parser() -> Parser:
    parser, output = _create_parser("Draw a few NoiseCutMix pictures: gen_0000.png … and preview.png.")
    add_number(output.add_argument, "num_gen", 8, "N", "pictures to draw")
    by_name = "the boxes: its name, or its label where no name is a number (default: random)"
    output.add_argument("--target_class", metavar="CLASS", help=f"class inside {by_name}")
    output.add_argument("--aug_class", metavar="CLASS", help=f"class outside {by_name}")
    _add_shared_arguments(parser)
    return parser


def create_augmentation_parser() -> Parser:
    parser, output = _create_parser(
        "Build a data set: image/, mask/, metadata.jsonl and soft_label.npy. After a stop, the same command continues."
    )
    add_number(output.add_argument, "num_aug", 10, "N", "pictures in the data set")
    verify = "check every pixel and label of an earlier run; takes 10 ms a picture of 512x512"
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
    if not text.strip():
        raise argparse.ArgumentTypeError("is blank; give a text, or omit the flag")
    if text != text.encode(errors="ignore").decode():  # Python decodes invalid bytes as lone surrogates
        raise argparse.ArgumentTypeError(f"{text!a} is not valid text; rename or retype it in UTF-8")
    return text


def as_path(text: str) -> Path:
    path = os.path.expanduser(as_text(text))  # shells do not expand the ~ of --output_dir=~/x
    if path.startswith("~"):
        raise argparse.ArgumentTypeError(f"no home folder is known for {text}; write ./{text} if ~ is part of the name")
    return Path(path)


def as_name_or_path(text: str) -> str:
    return os.path.expanduser(as_text(text))


def as_device(text: str) -> str:
    if not re.fullmatch(r"cuda(:[0-9]{1,4})?|mps|cpu", text):
        raise argparse.ArgumentTypeError(f"has to be cuda, cuda:N, mps or cpu, not {text!r}")
    return text


def _create_parser(description: str) -> tuple[Parser, Any]:
    """Return a parser and its group of flags on the output."""
    parser = Parser(description=description)
    output = parser.add_argument_group("output")
    folder = "folder to write into (default: %(default)s)"
    output.add_argument("--output_dir", type=as_path, default="outputs", metavar="DIR", help=folder)
    return parser, output


def _add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model and classes")
    data_sets = f"{', '.join(META_CLASSES)}, a .json file of your classes, or a folder of noisecutmix.finetune"
    data_sets += " (default: %(default)s)"
    model.add_argument("--data_name", type=as_name_or_path, default="cub", metavar="NAME", help=data_sets)
    default_checkpoint = "(default: ckpts/NAME/shot-1-lora-rank10, or the folder given as --data_name)"
    model.add_argument("--ckpt_path", type=as_path, metavar="DIR", help=f"Diff-Mix checkpoint {default_checkpoint}")
    models = "hub id, id@revision or local diffusers folder (default: the data set's)"
    model.add_argument("--model", type=as_name_or_path, metavar="MODEL", help=f"base model: {models}")
    prompt_help = "template of the prompts (default: %(default)s)"
    model.add_argument("--prompt", type=as_text, default=DEFAULT_PROMPT, metavar="TEXT", help=prompt_help)

    method = parser.add_argument_group("method")
    add_number(method.add_argument, "alpha", 1.0, "A", "parameter of CutMix's Beta(alpha, alpha)")
    add_number(method.add_argument, "guidance_scale", 7.5, "W", "classifier-free guidance; up to 1 turns it off")
    interval = "approximation: apply guidance only in this part of the steps (default: 0 1)"
    settings: dict[str, Any] = {"type": as_number(RANGES["guidance_interval"]), "nargs": 2, "metavar": ("LO", "HI")}
    method.add_argument("--guidance_interval", default=(0.0, 1.0), help=interval, **settings)
    single = "draw the target class alone, with a white mask and a one-hot label: the method's baseline"
    method.add_argument("--single_class", action="store_true", help=single)
    add_number(method.add_argument, "num_inference_steps", 25, "N", "denoising steps")
    add_number(method.add_argument, "seed", 0, "S", "determines classes, boxes and noise")
    add_number(method.add_argument, "resolution", None, "PIXELS", "side of a picture (default: the data set's)")

    machine = add_machine_flags(parser, "type of the weights (default: float16 on cuda, else float32)")
    add_number(machine.add_argument, "batch_size", 8, "N", "pictures in a batch")
    machine.add_argument("--compile", action="store_true", help="compile the model first; worthwhile in long runs")


def add_machine_flags(parser: argparse.ArgumentParser, dtype_help: str) -> Any:
    """Add the flags on the device, and return their group."""
    machine = parser.add_argument_group("machine")
    devices = "cuda, cuda:N, mps or cpu (default: the first available)"
    machine.add_argument("--device", type=as_device, metavar="DEVICE", help=devices)
    machine.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help=dtype_help)
    return machine


def add_number(
    add: Any, name: str, default: float | None, metavar: str, meaning: str, valid: Range | None = None
) -> None:
    """Add the flag of a number, whose range is that of its name in `RANGES` unless `valid` gives another one."""
    meaning += "" if default is None else " (default: %(default)s)"
    add(f"--{name}", type=as_number(valid or RANGES[name]), default=default, metavar=metavar, help=meaning)


def add_source_flags(add: Any, folder: str) -> None:
    """Add the flags that say which pictures of a folder are for training, and how their classes are named."""
    split = "of a published data set, whether its validation pictures are for training, too (default: trainval)"
    add("--split", choices=("train", "trainval"), help=split)
    pictures = f"text or CSV file: path below --{folder} and class of each picture for training"
    add("--train_list", type=as_path, metavar="FILE", help=pictures)
    names = "JSON file with the class name of each folder, an object or a list"
    add("--class_names", type=as_path, metavar="FILE", help=names)


def _parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """Return checked options, with the data set's defaults filled in. Raises InputError."""
    options = parser.parse_args(arguments)
    classes = options.classes = load_classes(options.data_name)
    options.model = options.model or classes.model
    options.resolution = options.resolution or classes.resolution
    options.ckpt_path = options.ckpt_path or classes.ckpt_path
    if options.ckpt_path is None:
        raise InputError("needed with a data set of your own: the folder that Diff-Mix wrote", "ckpt_path")
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
        raise InputError(f"{model} is a single file; convert it once, and give the new folder: {command}", "model")
    if not Path(model).is_dir() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(@\w[\w./-]*)?", model):
        raise InputError(f"{model} is no folder, and no id on the hub; give one or the other", "model")
    check_resolution(resolution, read_vae_factor(model))


def _find_class(option: str, wanted: str | None, names: tuple[str, ...]) -> int | None:
    labels = {comparison_key(name): label for label, name in enumerate(names)}
    examples = f"give a name, such as {names[0]}"
    if not any(re.fullmatch(r"[-+]?[\d.,]+", name) for name in labels):  # else a number could be meant as a name
        labels |= {str(label): label for label in range(len(names))}
        examples += f", or a number from 0 to {len(names) - 1}"
    if wanted is None or comparison_key(wanted) in labels:
        return None if wanted is None else labels[comparison_key(wanted)]
    raise InputError(f"{wanted!r} is no class of the data set; {examples}", option)
