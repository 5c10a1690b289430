"""Fine-tune Stable Diffusion on pictures, one folder per class. After a stop, the same command continues the run.

python ckpts/finetune.py --data_dir=photos --meta_class=bird --output_dir=ckpts/mine
accelerate launch --num_processes=2 ckpts/finetune.py --data_dir=photos --meta_class=bird --output_dir=ckpts/mine
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noisecutmix import script
from noisecutmix.classes import STABLE_DIFFUSION
from noisecutmix.cli import Parser, as_device, as_model, as_number, as_path, as_text, check_model, check_text
from noisecutmix.errors import InputError, PeerStoppedError, RunError, is_out_of_memory
from noisecutmix.files import check_writable, write_png
from noisecutmix.launch import HEARTBEAT, Launch, choose_device, say
from noisecutmix.photos import Photos, check_photos, crop_square, find_photos, open_photo
from noisecutmix.ranges import RANGES, Range
from noisecutmix.record import check_same_as_main, describe_program, fingerprint_files, fingerprint_model
from noisecutmix.training_folder import PREVIEW_FILE, TrainingFolder

if TYPE_CHECKING:
    from accelerate import Accelerator
    from PIL import Image

PASSES, FEWEST_STEPS = 47, 1000  # Diff-Mix's budget for CUB: 280,000 pictures shown over 5,994
SMOOTHED_OVER = 50  # steps, over which the displayed loss is averaged
MEASURED_STEPS = 20  # from which the remaining time is estimated
DRAWN_PER_CLASS = 2  # pictures in the preview, beside a real one
COUNT, RATE = Range(int, 1, 10**8), Range(float, 1e-12, 1e6)


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Fine-tune on pictures, one folder per class. After a stop, the same command continues the run.",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=34, width=110),
        allow_abbrev=False,
    )
    default = " (default: %(default)s)"
    add = parser.add_argument_group("pictures").add_argument
    add("--data_dir", type=as_path, required=True, metavar="DIR", help="folder with one folder of pictures per class")
    add("--meta_class", type=as_text, required=True, metavar="WORD", help="word for all classes, such as bird")
    add(
        "--examples_per_class",
        type=as_number(COUNT),
        metavar="N",
        help="pictures per class, chosen by the seed (default: all)",
    )
    side = "side of the square training pictures"
    add("--resolution", type=as_number(RANGES["resolution"]), default=512, metavar="PIXELS", help=side + default)
    add("--random_flip", action="store_true", help="mirror half of the pictures at random")
    crop = "crop at random, not at the centre; slower, since every step encodes its pictures"
    add("--random_crop", action="store_true", help=crop)

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=as_path, required=True, metavar="DIR", help="folder of the checkpoint")
    add("--overwrite", action="store_true", help="delete the files of an earlier run there and start again")
    interval = "steps between two saved states, from which the same command continues"
    add("--checkpointing_steps", type=as_number(COUNT), default=500, metavar="N", help=interval + default)

    add = parser.add_argument_group("training").add_argument
    model = "base model: hub id, id@revision or local folder"
    add("--model", type=as_model, default=STABLE_DIFFUSION, metavar="MODEL", help=model + default)
    add("--rank", type=as_number(Range(int, 1, 1024)), default=10, metavar="R", help="rank of the LoRA" + default)
    budget = f"training steps (default: {PASSES} passes over the pictures, at least {FEWEST_STEPS} steps)"
    add("--max_train_steps", type=as_number(COUNT), metavar="N", help=budget)
    batch = "pictures in a batch"
    add("--train_batch_size", type=as_number(RANGES["batch_size"]), default=8, metavar="N", help=batch + default)
    batches = "batches in a training step"
    add("--gradient_accumulation_steps", type=as_number(COUNT), default=1, metavar="N", help=batches + default)
    add("--learning_rate", type=as_number(RATE), default=5e-5, metavar="LR", help="learning rate of the LoRA" + default)
    tokens = "learning rate of the class tokens"
    add("--token_learning_rate", type=as_number(RATE), default=5e-5, metavar="LR", help=tokens + default)
    schedule = "schedule of the learning rates; only a constant one allows more steps after a finished run"
    add("--lr_scheduler", choices=("constant", "linear", "cosine"), default="constant", help=schedule + default)
    add("--seed", type=as_number(RANGES["seed"]), default=0, metavar="S", help="seed of all random choices" + default)

    add = parser.add_argument_group("machine").add_argument
    add("--device", type=as_device, metavar="DEVICE", help="cuda, cuda:N, mps or cpu (default: the first available)")
    frozen = "type of the frozen weights (default: float16 on cuda, else float32); trained weights are float32"
    add("--dtype", choices=("float16", "bfloat16", "float32"), help=frozen)
    add("--gradient_checkpointing", action="store_true", help="use less memory, but more time")
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return checked options. Raises InputError."""
    arguments = sys.argv[1:] if arguments is None else arguments
    check_text(arguments)
    options = create_parser().parse_args(arguments)
    check_model(options.model, options.resolution)
    if Path(options.model).is_dir():
        options.model = str(Path(options.model).resolve())
    options.meta_class = options.meta_class.strip()
    if not options.meta_class:
        raise InputError("--meta_class: is blank; give a word for all classes, such as bird")
    output_dir, data_dir = options.output_dir.resolve(), options.data_dir.resolve()
    if data_dir in (output_dir, *output_dir.parents):
        raise InputError(
            f"--output_dir: {options.output_dir} lies in --data_dir, where each folder is a class; choose another"
        )
    check_writable(options.output_dir)
    return options


def main() -> None:
    options = parse()
    photos = find_photos(options.data_dir, options.examples_per_class, options.seed)
    launch = Launch()
    steps = plan_steps(options, photos, launch)

    folder = TrainingFolder(options.output_dir)
    with script.adding_progress(lambda: folder.describe_progress(steps), options.overwrite), launch:
        if launch.is_main:
            check_photos(photos)
        choose_device_and_dtype(options)
        shape = describe_shape(options, photos, steps, launch)
        check_same_as_main(shape, launch.broadcast(shape))
        with folder.held(shape, steps, options.overwrite) if launch.is_main else contextlib.nullcontext():
            if not launch.broadcast(launch.is_main and folder.steps == steps and folder.has_preview()):
                train_and_draw(options, photos, steps, folder, launch)
    if launch.is_main:
        print(f"{options.output_dir} is complete: {steps} steps; look at {options.output_dir / PREVIEW_FILE}, then run")
        print(f"python generation.py --data_name={options.output_dir}")


def plan_steps(options: argparse.Namespace, photos: Photos, launch: Launch) -> int:
    """Return the number of training steps; print the size of the data set and of the training."""
    options.effective_batch = options.train_batch_size * options.gradient_accumulation_steps * launch.count
    budget = max(FEWEST_STEPS, math.ceil(PASSES * len(photos.files) / options.effective_batch))
    steps: int = options.max_train_steps or budget
    for note in photos.notes:
        say(note)
    say(
        f"{len(photos.class_names)} classes, {len(photos.files)} pictures; {steps} steps of {options.effective_batch} "
        f"pictures ({options.train_batch_size} in a batch x {options.gradient_accumulation_steps} accumulated x "
        f"{launch.count} processes): {steps * options.effective_batch / len(photos.files):.1f} passes"
    )
    return steps


def choose_device_and_dtype(options: argparse.Namespace) -> None:
    options.device = choose_device(options.device)
    options.dtype = options.dtype or ("float16" if options.device.startswith("cuda") else "float32")
    if options.dtype == "float16" and not options.device.startswith("cuda"):
        raise InputError(f"--dtype: float16 needs cuda; use --dtype=bfloat16 or float32 on {options.device}")


def describe_shape(options: argparse.Namespace, photos: Photos, steps: int, launch: Launch) -> dict[str, Any]:
    """Return what the weights depend on, as JSON values. A run is continued only if all of them are the same."""
    names = "meta_class resolution random_flip random_crop examples_per_class rank learning_rate token_learning_rate"
    shape = {name: getattr(options, name) for name in (*names.split(), "lr_scheduler", "dtype", "seed")}
    shape["effective_batch"] = options.effective_batch
    if options.lr_scheduler != "constant":
        shape["max_train_steps"] = steps
    shape["class_names"] = list(photos.class_names)
    shape["num_pictures"] = len(photos.files)
    if launch.is_main:
        shape["pictures"] = fingerprint_files(photos.root, photos.files)
        shape["model"] = fingerprint_model(options.model, prefers_half=options.dtype == "float16")
    return shape


def train_and_draw(
    options: argparse.Namespace, photos: Photos, steps: int, folder: TrainingFolder, launch: Launch
) -> None:
    """Train the remaining steps, write the checkpoint, draw the preview."""
    from noisecutmix.training import create_accelerator

    accelerator = create_accelerator(options.device, options.dtype, launch)
    try:
        if not launch.broadcast(launch.is_main and folder.steps == steps):
            train(options, photos, steps, folder, launch, accelerator)
        if launch.is_main:
            accelerator.free_memory()
            draw_preview(options, photos, folder)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise RunError(
                f"out of memory with --train_batch_size={options.train_batch_size}; halve it and double "
                "--gradient_accumulation_steps, which gives the same weights, or use --gradient_checkpointing"
            ) from error
        if launch.count > 1 and not isinstance(error, RunError):  # the connection to another process may be lost
            time.sleep(3 * HEARTBEAT)
            launch.check_others()
        raise


def train(
    options: argparse.Namespace,
    photos: Photos,
    steps: int,
    folder: TrainingFolder,
    launch: Launch,
    accelerator: "Accelerator",
) -> None:
    """Train from the newest state, write a state at each interval, and write the checkpoint at the end."""
    from tqdm import tqdm

    from noisecutmix.training import Settings, Trainer

    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)}
    settings = Settings(**{**values, "max_train_steps": steps})
    trainer = Trainer(settings, photos, accelerator)  # before anything is written: it may refuse the model
    first, state = 0, {}  # type: int, dict[str, Any]
    if launch.is_main:
        base = {"model": options.model, "resolution": options.resolution, "meta_class": options.meta_class}
        folder.begin(base, describe_run(options, launch))
        first, state = folder.find_state()
    first = launch.broadcast(first)
    if first:
        state = state or folder.read_state(first)
        trainer.load_state(state)
        say(f"continuing after step {first}")
    losses: list[float] = state.get("losses", [])
    trainer.posteriors.encode(folder.posteriors_file)

    start = time.monotonic()
    with tqdm(total=steps, initial=first, unit="step", disable=not launch.is_main, smoothing=0.05) as bar:
        for step in range(first, steps):
            script.check_signals()
            launch.check_others()
            loss = trainer.step(step)
            if not math.isfinite(loss):
                message = f"the loss of step {step + 1} is not finite; use --dtype=bfloat16 or lower learning rates"
                raise RunError(message) if launch.is_main else PeerStoppedError(message)
            losses.append(float(f"{loss:.6g}"))
            done = step + 1
            if launch.is_main and (done % options.checkpointing_steps == 0 or done == steps):
                folder.write_state(done, {**trainer.state(), "losses": losses})
            bar.update()
            recent = losses[-SMOOTHED_OVER:]
            pictures = trainer.effective_batch * (bar.format_dict["rate"] or 0)
            bar.set_postfix_str(f"loss {sum(recent) / len(recent):.4f}, {pictures:.1f} pictures/s", refresh=False)
            if done - first == MEASURED_STEPS:
                seconds = (time.monotonic() - start) / MEASURED_STEPS * (steps - done)
                say(f"{steps - done} steps remain, about {timedelta(seconds=round(seconds))} hours")
    if launch.is_main:
        trainer.save(folder.root)
        del trainer  # it maps the encoded pictures into memory; Windows does not delete a mapped file
        classes = {"classes": list(photos.class_names), "meta_class": settings.meta_class}
        folder.finish(steps, losses, classes)


def describe_run(options: argparse.Namespace, launch: Launch) -> dict[str, Any]:
    """Return the record of this run, beside what the weights depend on; its `command` continues the run."""
    return {
        **describe_program(),
        "train_batch_size": options.train_batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "processes": launch.count,
        "device": options.device,
    }


def draw_preview(options: argparse.Namespace, photos: Photos, folder: TrainingFolder) -> None:
    """Write preview.png: for up to 16 classes, a real picture and two drawn with the checkpoint that was written."""
    from noisecutmix import NoiseCutMixGenerator
    from noisecutmix.plan import Item
    from noisecutmix.preview import MOST_PICTURES, draw_comparison

    side, size = options.resolution, min(options.train_batch_size, MOST_PICTURES)
    data_name = str(folder.root)
    generator = NoiseCutMixGenerator(options.device, data_name, dtype=options.dtype, batch_size=size)
    names = photos.class_names[:MOST_PICTURES]
    items = [
        Item(number, number // DRAWN_PER_CLASS, 0, (0, 0, side, side), 1.0, options.seed + number, side)
        for number in range(DRAWN_PER_CLASS * len(names))
    ]
    drawn: list[Image.Image] = []
    for start in range(0, len(items), size):
        drawn += generator.draw(items[start : start + size])
    rows = []
    for label, name in enumerate(names):
        real = crop_square(open_photo(photos.files[photos.labels.index(label)]), side)
        rows.append((name, [real, *drawn[DRAWN_PER_CLASS * label : DRAWN_PER_CLASS * (label + 1)]]))
    write_png(folder.root / PREVIEW_FILE, draw_comparison(rows))


if __name__ == "__main__":
    script.run(main)
