"""Fine-tune Stable Diffusion on pictures, one folder per class. After a stop, the same command continues the run.

python ckpts/finetune.py --data_dir=photos --meta_class=bird --output_dir=ckpts/mine
accelerate launch --num_processes=2 ckpts/finetune.py --data_dir=photos --meta_class=bird --output_dir=ckpts/mine
"""

import argparse
import hashlib
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this repository's package, whichever is installed

from noisecutmix import record, script
from noisecutmix.classes import META_CLASSES, STABLE_DIFFUSION, Classes
from noisecutmix.cli import Parser, as_device, as_model, as_number, as_path, as_text, check_model
from noisecutmix.errors import InputError, RunError, is_out_of_memory
from noisecutmix.files import check_writable, write_png
from noisecutmix.photos import Photos, check_photos, find_photos
from noisecutmix.pictures import crop_square, open_photo
from noisecutmix.ranges import RANGES, Range
from noisecutmix.training_folder import TrainingFolder

if TYPE_CHECKING:
    from PIL import Image

PASSES, FEWEST_STEPS = 47, 1000  # Diff-Mix's budget for CUB: 280,000 pictures over 5,994
SMOOTHED_OVER = 50  # steps, over which the displayed loss is averaged
MEASURED_STEPS = 20  # from which the remaining time is estimated
DRAWN_PER_CLASS = 2  # pictures in the preview, beside a real one
COUNT, RATE = Range(int, 1, 10**8), Range(float, 1e-12, 1e6)
RECIPE = (  # the flags that the weights depend on, whatever the machine
    *("meta_class", "resolution", "random_flip", "random_crop", "rank", "learning_rate", "token_learning_rate"),
    *("lr_scheduler", "dtype", "seed"),
)
# the number of processes, as launchers, MPI and Slurm set it; accelerate takes the first four for a launch
PROCESS_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def create_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Fine-tune on pictures, one folder per class. After a stop, the same command continues the run."
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
    flip = "do not mirror half of the pictures at random"
    add("--no_random_flip", dest="random_flip", action="store_false", help=flip)
    crop = "crop at random, not at the centre; slower, since every step encodes its pictures"
    add("--random_crop", action="store_true", help=crop)

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=as_path, required=True, metavar="DIR", help="folder of the checkpoint")
    interval = "steps between two saved states, from which the same command continues"
    add("--checkpointing_steps", type=as_number(COUNT), default=500, metavar="N", help=interval + default)
    previews = "steps between two previews, preview_00500.png and so on (default: only one at the end)"
    add("--preview_steps", type=as_number(COUNT), metavar="N", help=previews)

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
    num_processes = count_processes()
    photos = find_photos(options.data_dir, options.examples_per_class, options.seed)
    folder = TrainingFolder(options.output_dir)
    steps = plan_steps(options, photos, num_processes)
    script.choose_device_and_dtype(options)
    listing = describe_listing(photos)
    description = {
        "model": options.model,
        "resolution": options.resolution,
        "meta_class": options.meta_class,
        "options": training_options(options, photos, check_pictures(options, photos, folder, listing)),
        "listing": listing,
        **record.describe_program(),
        "processes": num_processes,
        "device": options.device,
    }
    folder.check_usable(description["options"], steps)
    if not folder.is_complete(steps):
        train_and_draw(options, photos, folder, description)
    if script.is_first_process():
        print(f"{folder.root} is complete: {steps} steps; look at {folder.root / record.PREVIEW_FILE}, then run")
        name = folder.root.as_posix()
        print(f"python generation.py --data_name={shlex.quote(f'./{name}' if name in META_CLASSES else name)}")


def count_processes() -> int:
    """Return how many processes accelerate launch or torchrun has started together; 1 without a launch.

    Raises:
        InputError: only some of a launch's variables are there. Accelerate would wait for the other processes for ever.
    """
    signs = [name for name in PROCESS_COUNTS if os.environ.get(name, "1") != "1"]
    signs += ["LOCAL_RANK"] if "LOCAL_RANK" in os.environ else []
    if not signs:
        return 1
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        value = os.environ.get(name, "")
        if not (value if name == "MASTER_ADDR" else value.isdecimal()):
            state = f"is {value!r}" if name in os.environ else "is not set"
            raise InputError(
                f"the environment variable {signs[0]} is {os.environ[signs[0]]!r}, but {name} {state}: start several "
                f"processes with accelerate launch or torchrun, or unset {signs[0]} for one"
            )
    return int(os.environ["WORLD_SIZE"])


def plan_steps(options: argparse.Namespace, photos: Photos, num_processes: int) -> int:
    """Return the number of training steps; print the size of the data set and of the training."""
    options.effective_batch = options.train_batch_size * options.gradient_accumulation_steps * num_processes
    budget = max(FEWEST_STEPS, math.ceil(PASSES * len(photos.files) / options.effective_batch))
    steps = options.max_train_steps = options.max_train_steps or budget
    for note in photos.notes:
        script.say(note)
    names = photos.class_names
    script.say(
        f"{len(names)} classes ({names[0]!r} to {names[-1]!r}), {len(photos.files)} pictures; "
        f"{steps} steps of {options.effective_batch} pictures ({options.train_batch_size} in a batch x "
        f"{options.gradient_accumulation_steps} accumulated x {num_processes} processes): "
        f"{steps * options.effective_batch / len(photos.files):.1f} passes"
    )
    return steps


def describe_listing(photos: Photos) -> str:
    """Return a hash of the pictures' names, sizes and times of change: if it is the same, so are the pictures."""
    digest = hashlib.sha256()
    for file in photos.files:
        status = file.stat()
        name = file.relative_to(photos.root).as_posix()
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def check_pictures(options: argparse.Namespace, photos: Photos, folder: TrainingFolder, listing: str) -> str:
    """Return the fingerprint of the pictures, after a check of each one unless an earlier run has checked them."""
    if folder.record.get("listing") == listing:
        return str(folder.record["options"].get("pictures"))
    for note in check_photos(photos, options.resolution):
        script.say(note)
    return record.fingerprint_files(photos.root, photos.files)


def training_options(options: argparse.Namespace, photos: Photos, pictures: str) -> dict[str, Any]:
    """Return what the weights depend on, as JSON values. A run is continued only if all of them are the same."""
    return {
        **{name: getattr(options, name) for name in RECIPE},
        "examples_per_class": options.examples_per_class,
        "effective_batch": options.effective_batch,
        **({} if options.lr_scheduler == "constant" else {"max_train_steps": options.max_train_steps}),
        "class_names": list(photos.class_names),
        "num_pictures": len(photos.files),
        "pictures": pictures,
        "model": record.fingerprint_model(options.model, prefers_half=options.dtype == "float16"),
    }


def train_and_draw(
    options: argparse.Namespace, photos: Photos, folder: TrainingFolder, description: dict[str, Any]
) -> None:
    """Train the remaining steps, write the checkpoint, draw the preview."""
    from accelerate.utils import broadcast_object_list, gather_object

    from noisecutmix.training import create_accelerator

    accelerator = create_accelerator(options.device, options.dtype)
    if accelerator.num_processes != description["processes"]:
        raise InputError("`device`: several processes need cuda or cpu; start one process for another device")
    for others in gather_object([description["options"]]):  # another machine may have other files
        differences = record.describe_differences(others, description["options"])
        if differences:
            raise InputError(f"the processes have another {differences}; use the same command and files in all of them")
    try:
        (needs_training,) = broadcast_object_list([folder.checkpoint_steps < options.max_train_steps])
        if needs_training:
            train(options, photos, folder, description, accelerator)
        if accelerator.is_main_process:
            accelerator.free_memory()
            folder.latents_file.unlink(missing_ok=True)
            draw_preview(options, photos, folder, record.PREVIEW_FILE)
        accelerator.wait_for_everyone()
        accelerator.end_training()  # without it, a process may abort at its end
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise RunError(
                f"out of memory with --train_batch_size={options.train_batch_size}; halve it and double "
                "--gradient_accumulation_steps, which gives the same weights, or use --gradient_checkpointing"
            ) from error
        raise


def train(
    options: argparse.Namespace, photos: Photos, folder: TrainingFolder, description: dict[str, Any], accelerator: Any
) -> None:
    """Train from the newest state; write a state and the checkpoint at each interval and at the end."""
    from accelerate.utils import broadcast_object_list
    from tqdm import tqdm

    from noisecutmix.training import Trainer

    trainer = Trainer(options, photos, accelerator)  # before anything is written: it may refuse the model
    is_main = accelerator.is_main_process
    first, state, steps = 0, {}, options.max_train_steps  # type: int, dict[str, Any], int
    if is_main:
        folder.begin(description)
        first, state = folder.find_state()
    (first,) = broadcast_object_list([first])
    if first:
        state = state or folder.read_state(first)
        trainer.load_state(state)
        script.say(f"continuing after step {first}")
    losses: list[float] = state.get("losses", [])
    classes = {"classes": list(photos.class_names), "meta_class": options.meta_class}
    if is_main and first and folder.checkpoint_steps != first:  # stopped between the state and the checkpoint
        folder.write_checkpoint(first, losses, classes, trainer.save)
    trainer.latents.encode(folder.latents_file, json.dumps(description["options"]))

    start = time.monotonic()
    with (
        tqdm(total=steps, initial=first, unit="step", disable=not is_main, smoothing=0.05) as bar,
        script.deferring_signals(),  # the first one ends the run after a step, with a state
    ):
        for step in range(first, steps):
            preview = f"preview_{step:05d}.png"
            is_due = options.preview_steps and step and step % options.preview_steps == 0
            if is_main and is_due and not (folder.root / preview).exists():
                draw_preview(options, photos, folder, preview)
            loss, is_stopping = trainer.step(step, script.is_stopping())
            losses.append(float(f"{loss:.6g}"))
            done = step + 1
            is_interval = done % options.checkpointing_steps == 0 or done % (options.preview_steps or steps) == 0
            if is_main and (is_interval or is_stopping or done == steps):
                folder.write_state(done, {**trainer.state(), "losses": losses})
                folder.write_checkpoint(done, losses, classes, trainer.save)
            if is_stopping:
                accelerator.wait_for_everyone()  # for the state: a launcher ends the others once one has ended
                raise script.Stopped
            bar.update()
            recent = losses[-SMOOTHED_OVER:]
            pictures = options.effective_batch * (bar.format_dict["rate"] or 0)
            bar.set_postfix_str(f"loss {sum(recent) / len(recent):.4f}, {pictures:.1f} pictures/s", refresh=False)
            if done - first == MEASURED_STEPS:
                minutes = (time.monotonic() - start) / MEASURED_STEPS * (steps - done) / 60
                duration = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.0f} hours"
                script.say(f"{steps - done} steps remain, about {duration}")


def draw_preview(options: argparse.Namespace, photos: Photos, folder: TrainingFolder, file_name: str) -> None:
    """Write a preview: for up to 16 classes, a real picture and two drawn with the checkpoint that was written.

    The noise is the same in every preview. After a signal, nothing is written.
    """
    from noisecutmix import NoiseCutMixGenerator
    from noisecutmix.plan import Item
    from noisecutmix.preview import MOST_PICTURES, draw_comparison

    side, size = options.resolution, min(options.train_batch_size, MOST_PICTURES)
    classes = Classes(photos.class_names, options.meta_class, options.model, folder.root, side)
    generator = NoiseCutMixGenerator(options.device, classes, dtype=options.dtype, batch_size=size)
    names = photos.class_names[:MOST_PICTURES]
    items = [
        Item(index, index // DRAWN_PER_CLASS, 0, (0, 0, side, side), 1.0, options.seed + index, side)
        for index in range(DRAWN_PER_CLASS * len(names))
    ]
    drawn: list[Image.Image] = []
    for start in range(0, len(items), size):
        if script.is_stopping():
            return
        drawn += generator.draw(items[start : start + size])
    rows = []
    for label, name in enumerate(names):
        real = crop_square(open_photo(photos.files[photos.labels.index(label)]), side)
        rows.append((name, [real, *drawn[DRAWN_PER_CLASS * label : DRAWN_PER_CLASS * (label + 1)]]))
    write_png(folder.root / file_name, draw_comparison(rows))


if __name__ == "__main__":
    script.run(main)
