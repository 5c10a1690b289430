"""Fine-tune Stable Diffusion on a folder of pictures, a folder a class. The same command goes on after a stop.

python ckpts/finetune.py --data_dir=photos --meta_class=bird --output_dir=ckpts/mine
accelerate launch --num_processes=2 ckpts/finetune.py --data_dir=photos --meta_class=bird --output_dir=ckpts/mine
"""

import argparse
import contextlib
import dataclasses
import math
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noisecutmix import __version__, cli, script
from noisecutmix.classes import STABLE_DIFFUSION, vae_scale_factor
from noisecutmix.errors import InputError, PeerStoppedError, RunError, is_out_of_memory
from noisecutmix.launch import PEER_STOPPED, is_launched, is_main_process, say
from noisecutmix.photos import Photos, check_photos, crop_square, find_photos, open_photo
from noisecutmix.record import describe_differences, fingerprint_files, fingerprint_model
from noisecutmix.training_folder import CLASSES, PREVIEW, TrainingFolder

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image

PASSES, FEWEST_STEPS = 47, 1000  # Diff-Mix's budget for CUB: 280,000 pictures shown over 5,994
SMOOTHED_OVER = 50  # steps
MEASURED_STEPS = 20  # before the time that is left is said
PREVIEW_CLASSES, PREVIEW_DRAWN = 16, 2
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "pillow")


def create_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        description="Fine-tune on a folder of pictures, a folder a class. The same command goes on after a stop.",
        formatter_class=cli._help_formatter,
        allow_abbrev=False,
    )
    data = parser.add_argument_group("pictures")
    data.add_argument("--data_dir", type=cli.folder, required=True, metavar="DIR", help="holds one folder a class")
    data.add_argument("--meta_class", type=cli.not_empty, required=True, metavar="WORD", help="what all are: bird")
    data.add_argument("--examples_per_class", type=cli.positive_int, metavar="N", help="drawn at random (default: all)")
    data.add_argument(
        "--resolution", type=cli.side, default=512, metavar="PIXELS", help="side of the square trained on"
    )
    data.add_argument("--random_flip", action="store_true", help="show mirror images half of the time")
    data.add_argument(
        "--random_crop", action="store_true", help="cut anywhere, not in the middle: encodes in every step, slower"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", type=cli.folder, required=True, metavar="DIR", help="folder of the checkpoint")
    output.add_argument("--overwrite", action="store_true", help="delete what an earlier run wrote there, start anew")
    output.add_argument("--checkpointing_steps", type=cli.positive_int, default=500, metavar="N", help="between states")

    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--model", type=cli.not_empty, default=STABLE_DIFFUSION, metavar="MODEL", help="hub id or local folder")
    add("--rank", type=cli.positive_int, default=10, metavar="R", help="of the LoRA")
    budget = f"(default: {PASSES} passes over the pictures, at least {FEWEST_STEPS} steps)"
    add("--max_train_steps", type=cli.positive_int, metavar="N", help=budget)
    add("--train_batch_size", type=cli.positive_int, default=8, metavar="N", help="pictures in a batch")
    add("--gradient_accumulation_steps", type=cli.positive_int, default=1, metavar="N", help="batches in a step")
    add("--learning_rate", type=cli.positive_float, default=5e-5, metavar="LR", help="of the LoRA")
    add("--token_learning_rate", type=cli.positive_float, default=5e-5, metavar="LR", help="of the classes' tokens")
    falling = "how the rates fall to zero; only a constant one lets a finished run go on to more steps"
    add("--lr_scheduler", choices=("constant", "linear", "cosine"), default="constant", help=falling)
    add("--seed", type=cli.seed, default=0, metavar="S", help="decides all that is drawn")

    machine = parser.add_argument_group("machine")
    add = machine.add_argument
    add(
        "--device",
        type=cli.device_name,
        metavar="DEVICE",
        help="cuda, cuda:N, mps or cpu (default: the first there is)",
    )
    frozen = "of the frozen weights (default: float16 on cuda, else float32); what is trained is float32"
    add("--dtype", choices=("float16", "bfloat16", "float32"), help=frozen)
    add("--gradient_checkpointing", action="store_true", help="less memory, and slower")
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return checked options. Raises InputError."""
    options = create_parser().parse_args(arguments)
    cli._check_model(options.model)
    if Path(options.model).is_dir():
        options.model = str(Path(options.model).resolve())
    factor = vae_scale_factor(options.model)
    if options.resolution % factor:
        raise InputError(f"--resolution: has to be a multiple of {factor}, not {options.resolution}")
    options.meta_class = options.meta_class.strip()
    if not options.meta_class:
        raise InputError("--meta_class: is blank; give a word for what all classes are, such as bird")
    output_dir, data_dir = options.output_dir.resolve(), options.data_dir.resolve()
    if data_dir in (output_dir, *output_dir.parents):
        raise InputError(f"--output_dir: {options.output_dir} lies in --data_dir, whose folders are classes; move it")
    cli._check_output_dir(options.output_dir)
    if is_launched() and ":" in (options.device or ""):
        raise InputError("--device: the processes of a launch share cuda; leave the number out")
    return options


def main() -> None:
    options = parse()
    photos = find_photos(options.data_dir, options.examples_per_class, options.seed)
    if not is_launched():
        check_photos(photos)  # before torch is imported
    options.device = script.choose_device(options.device)
    options.dtype = options.dtype or ("float16" if options.device.startswith("cuda") else "float32")
    if options.dtype == "float16" and not options.device.startswith("cuda"):
        raise InputError(f"--dtype: float16 needs cuda; use --dtype=bfloat16 or float32 on {options.device}")
    steps = plan_steps(options, photos)

    folder = TrainingFolder(options.output_dir)
    try:
        with naming_progress(folder, steps, options.overwrite):
            # in a launch first of all, so that the others learn when the main process refuses
            accelerator = start_accelerate(options) if is_launched() else None
            if is_launched() and is_main_process():
                check_photos(photos)
            shaping = options_that_shape_the_training(options, photos, steps)
            if is_main_process():
                folder.take(shaping, steps, options.overwrite)
            if accelerator or not (folder.steps == steps and folder.has_preview()):
                train_and_draw(options, photos, steps, folder, shaping, accelerator or start_accelerate(options))
    finally:
        folder.close()
    if is_main_process():
        print(f"{options.output_dir} is complete: {steps} steps; look at {options.output_dir / PREVIEW}, then")
        print(f"python generation.py --data_name={options.output_dir}")


def plan_steps(options: argparse.Namespace, photos: Photos) -> int:
    """Return how many steps to train, and say what is trained on."""
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    effective = options.train_batch_size * options.gradient_accumulation_steps * num_processes
    steps: int = options.max_train_steps or max(FEWEST_STEPS, math.ceil(PASSES * len(photos.files) / effective))
    for note in photos.notes:
        say(note)
    passes = steps * effective / len(photos.files)
    say(
        f"{len(photos.class_names)} classes, {len(photos.files)} pictures; {steps} steps of {effective} pictures "
        f"({options.train_batch_size} in a batch x {options.gradient_accumulation_steps} accumulated x {num_processes} "
        f"processes): {passes:.1f} passes"
    )
    return steps


def options_that_shape_the_training(options: argparse.Namespace, photos: Photos, steps: int) -> dict[str, Any]:
    """Return what the weights depend on, as JSON values: a run may go on only where all of it is the same."""
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    names = ("meta_class", "resolution", "random_flip", "random_crop", "examples_per_class", "rank", "learning_rate")
    shaping = {
        name: getattr(options, name) for name in (*names, "token_learning_rate", "lr_scheduler", "dtype", "seed")
    }
    shaping["effective_batch"] = options.train_batch_size * options.gradient_accumulation_steps * num_processes
    if options.lr_scheduler != "constant":
        shaping["max_train_steps"] = steps
    shaping["class_names"] = list(photos.class_names)
    shaping["num_pictures"] = len(photos.files)
    if is_main_process():
        shaping["pictures"] = fingerprint_files(photos.root, photos.files)
        shaping["model"] = fingerprint_model(options.model)
    return shaping


def start_accelerate(options: argparse.Namespace) -> "Accelerator":
    """Join the processes of the launch, without the libraries' chatter."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    from noisecutmix.training import create_accelerator

    return create_accelerator(options.device, options.dtype)


def train_and_draw(
    options: argparse.Namespace,
    photos: Photos,
    steps: int,
    folder: TrainingFolder,
    shaping: dict[str, Any],
    accelerator: "Accelerator",
) -> None:
    """Train what is missing, write the checkpoint, draw the preview."""
    from accelerate.utils import broadcast_object_list
    from torch import distributed

    try:
        is_main = accelerator.is_main_process
        of_main: list[Any] = [shaping, folder.steps == steps] if is_main else [None, None]
        expected, is_trained = broadcast_object_list(of_main)
        differences = describe_differences(expected, shaping)
        if differences:
            raise InputError(f"the main process has another {differences}; give all the same command and files")
        if not is_trained:
            train(options, photos, accelerator, folder, steps)
        if is_main:
            accelerator.free_memory()
            draw_preview(options, photos, folder)
    except RuntimeError as error:
        if isinstance(error, RunError):
            raise
        if is_out_of_memory(error):
            raise RunError(
                f"out of memory with --train_batch_size={options.train_batch_size}; halve it and double "
                "--gradient_accumulation_steps, which trains the same, or give --gradient_checkpointing"
            ) from error
        if is_launched() and ("gloo" in str(error) or isinstance(error, distributed.DistError)):
            raise PeerStoppedError(PEER_STOPPED) from error
        raise


def train(
    options: argparse.Namespace, photos: Photos, accelerator: "Accelerator", folder: TrainingFolder, steps: int
) -> None:
    """Train from the newest state on, write states on the way, and the checkpoint at the end."""
    from accelerate.utils import broadcast_object_list
    from tqdm import tqdm

    from noisecutmix.training import Settings, Trainer

    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)}
    settings = Settings(**{**values, "max_train_steps": steps})
    trainer = Trainer(settings, photos, accelerator)  # before anything is written: the model may be wrong
    is_main = accelerator.is_main_process
    first, state = 0, {}  # type: int, dict[str, Any]
    if is_main:
        base = {"model": options.model, "resolution": options.resolution, "meta_class": options.meta_class}
        folder.begin(base, describe_run(options, accelerator))
        first, state = folder.find_state()
    (first,) = broadcast_object_list([first])
    if first:
        state = state or folder.read_state(first)
        trainer.load_state(state)
        say(f"going on after step {first}")
    losses: list[float] = state.get("losses", [])
    trainer.posteriors.encode(folder.posteriors_file)

    start = time.monotonic()
    with tqdm(total=steps, initial=first, unit="step", disable=not is_main, smoothing=0.05) as bar:
        for step in range(first, steps):
            loss = trainer.step(step)
            if not math.isfinite(loss):
                message = f"the loss of step {step + 1} is not finite; use --dtype=bfloat16 or lower learning rates"
                raise RunError(message) if is_main else PeerStoppedError(PEER_STOPPED)
            losses.append(float(f"{loss:.6g}"))
            done = step + 1
            if is_main and (done % options.checkpointing_steps == 0 or done == steps):
                folder.write_state(done, {**trainer.state(), "losses": losses})
            bar.update()
            recent = losses[-SMOOTHED_OVER:]
            pictures = trainer.effective_batch * (bar.format_dict["rate"] or 0)
            bar.set_postfix_str(f"loss {sum(recent) / len(recent):.4f}, {pictures:.1f} pictures/s", refresh=False)
            if done - first == MEASURED_STEPS:
                seconds = (time.monotonic() - start) / MEASURED_STEPS * (steps - done)
                say(f"{steps - done} steps to go, about {timedelta(seconds=round(seconds))} h")
    if is_main:
        trainer.save(folder.root)
        del trainer  # and with it the map of the encoded pictures, which Windows would not delete
        classes = {"classes": list(photos.class_names), "meta_class": settings.meta_class}
        folder.finish(steps, losses, classes)


def describe_run(options: argparse.Namespace, accelerator: "Accelerator") -> dict[str, Any]:
    """Return what is worth knowing of a run beside what shapes the training; `command` goes on with it."""
    return {
        "command": ["python", *(argument for argument in sys.argv if argument != "--overwrite")],
        "train_batch_size": options.train_batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "versions": {"noisecutmix": __version__, **{name: version(name) for name in LIBRARIES}},
    }


def draw_preview(options: argparse.Namespace, photos: Photos, folder: TrainingFolder) -> None:
    """Write preview.png: of up to 16 classes a real picture and two drawn ones, by the checkpoint as it was written."""
    import torch

    from noisecutmix import NoiseCutMixGenerator
    from noisecutmix.files import write_png
    from noisecutmix.plan import Item
    from noisecutmix.preview import draw_comparison

    side = options.resolution
    generator = NoiseCutMixGenerator(
        device=options.device,
        data_name=str(folder.root / CLASSES),
        ckpt_path=folder.root,
        model=options.model,
        resolution=side,
        dtype=getattr(torch, options.dtype),
        batch_size=options.train_batch_size,
    )
    names = photos.class_names[:PREVIEW_CLASSES]
    whole = (0, 0, side, side)
    items = [
        Item(number, number // PREVIEW_DRAWN, 0, whole, 1.0, options.seed + number, side)
        for number in range(PREVIEW_DRAWN * len(names))
    ]
    drawn: list[Image.Image] = []
    for start in range(0, len(items), options.train_batch_size):
        drawn += generator.draw(items[start : start + options.train_batch_size])
    rows = []
    for label, name in enumerate(names):
        real = crop_square(open_photo(photos.files[photos.labels.index(label)]), side)
        rows.append((name, [real, *drawn[PREVIEW_DRAWN * label : PREVIEW_DRAWN * (label + 1)]]))
    write_png(folder.root / PREVIEW, draw_comparison(rows))


@contextlib.contextmanager
def naming_progress(folder: TrainingFolder, steps: int, overwrite: bool) -> Iterator[None]:
    """Add to a stop's or a failure's message which state is kept and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, OSError, RunError) as error:
        if not folder.has_begun:
            raise
        how = "the same command without --overwrite" if overwrite else "the same command"
        kept = f"the state of step {folder.count_steps()} of {steps} is kept; {how} goes on"
        if isinstance(error, KeyboardInterrupt):
            raise type(error)(f"stopped: {kept}") from error
        if isinstance(error, OSError):
            raise RunError(f"{script.describe(error)}; {kept}") from error
        raise type(error)(f"{error}; {kept}") from error


if __name__ == "__main__":
    script.run(main)
