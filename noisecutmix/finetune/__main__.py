"""Fine-tune Stable Diffusion on pictures, one folder per class. After a stop, the same command continues the run.

python -m noisecutmix.finetune --data_dir=photos --meta_class=bird --output_dir=ckpts/mine
accelerate launch --num_processes=2 -m noisecutmix.finetune --data_dir=photos --meta_class=bird --output_dir=ckpts/mine
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from .. import cli, launch, script
from ..classes import STABLE_DIFFUSION
from ..cli import Parser, add_machine_flags, add_number, add_source_flags, as_name_or_path, as_path
from ..errors import InputError, RunError, is_out_of_memory
from ..files import append_to_log, check_writable, describe_differences, describe_program, pin_model, tidy_log
from ..folder import PREVIEW_FILE
from ..photos import Photos, Source, find_photos
from ..plan import seed_record
from ..ranges import RANGES, Range
from ..sources import find_commit, fingerprint_model
from .folder import MIN_STEPS, PASSES, Recipe, TrainingFolder, check_pictures, count_steps, describe_listing

SMOOTHED_OVER = 50  # steps, over which the displayed loss is averaged
RECIPE = [field.name for field in dataclasses.fields(Recipe)]
COUNT, RATE = Range(int, 1, 10**8), Range(float, 1e-12, 1e6)
# the flags on which no weight depends, whether directly or, as the model, by the content of files
NOT_OF_WEIGHTS = (
    *("data_dir", "train_list", "split", "class_names", "output_dir", "checkpointing_steps", "preview_steps", "model"),
    *("max_train_steps", "device", "train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
)


def create_parser() -> Parser:
    parser = Parser(description="Fine-tune on pictures, one folder per class. The same command continues after a stop.")
    default = " (default: %(default)s)"
    add = parser.add_argument_group("pictures").add_argument
    layout = "one folder of pictures per class, or CUB-200-2011, Flowers-102 or Aircraft as published"
    add("--data_dir", type=as_path, required=True, metavar="DIR", help=layout)
    add_source_flags(add, "data_dir")
    add("--meta_class", type=cli.as_text, required=True, metavar="WORD", help="word for all classes, such as bird")
    add_number(add, "examples_per_class", None, "N", "pictures per class, chosen by the seed (default: all)", COUNT)
    add_number(add, "resolution", 512, "PIXELS", "side of the square training pictures")
    flip = "do not mirror half of the pictures at random"
    add("--no_random_flip", dest="random_flip", action="store_false", help=flip)
    crop = "crop at random, not at the centre; slower, since every step encodes its pictures"
    add("--random_crop", action="store_true", help=crop)

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", type=as_path, required=True, metavar="DIR", help="folder of the checkpoint")
    interval = "steps between two saved states, from which the same command continues"
    add_number(add, "checkpointing_steps", 500, "N", interval, COUNT)
    previews = "steps between two previews, preview_00500.png and so on (default: only one at the end)"
    add_number(add, "preview_steps", None, "N", previews, COUNT)

    add = parser.add_argument_group("training").add_argument
    model = "base model: hub id, id@revision or local folder"
    add("--model", type=as_name_or_path, default=STABLE_DIFFUSION, metavar="MODEL", help=model + default)
    add_number(add, "rank", 10, "R", "rank of the LoRA", Range(int, 1, 1024))
    budget = f"training steps (default: {PASSES} passes over the pictures, at least {MIN_STEPS} steps)"
    add_number(add, "max_train_steps", None, "N", budget, COUNT)
    add_number(add, "train_batch_size", 8, "N", "pictures in a batch", RANGES["batch_size"])
    add_number(add, "gradient_accumulation_steps", 1, "N", "batches a step", COUNT)
    add_number(add, "learning_rate", 5e-5, "LR", "learning rate of the LoRA", RATE)
    add_number(add, "token_learning_rate", 5e-5, "LR", "learning rate of the class tokens", RATE)
    schedule = "schedule of the learning rates; only a constant one allows more steps after a finished run"
    add("--lr_scheduler", choices=("constant", "linear", "cosine"), default="constant", help=schedule + default)
    add_number(add, "seed", 0, "S", "seed of all random choices")

    frozen = "type of the frozen weights (default: float16 on cuda, else float32); trained weights are float32"
    machine = add_machine_flags(parser, frozen)
    machine.add_argument("--gradient_checkpointing", action="store_true", help="use less memory, but more time")
    return parser


def parse(parser: Parser, arguments: list[str] | None = None) -> argparse.Namespace:
    """Return checked options. Raises InputError."""
    options = parser.parse_args(arguments)
    options.meta_class = options.meta_class.strip()
    cli.check_model(options.model, options.resolution)
    output_dir, data_dir = options.output_dir.resolve(), options.data_dir.resolve()
    if data_dir in (output_dir, *output_dir.parents):
        raise InputError(f"{options.output_dir} lies in --data_dir, where each folder is a class", "output_dir")
    check_writable(options.output_dir)
    return options


def main() -> None:
    parser = create_parser()
    options = parse(parser)

    # What is trained, and how long
    num_processes = launch.count_group()
    sources = Source(options.split, options.train_list, options.class_names)
    photos = find_photos(options.data_dir, options.examples_per_class, options.seed, source=sources)
    folder = TrainingFolder(options.output_dir)
    effective_batch = options.train_batch_size * options.gradient_accumulation_steps * num_processes
    steps = count_steps(len(photos.files), effective_batch, options.max_train_steps)
    names = photos.class_names
    for note in photos.notes:
        script.say(note)
    script.say(
        f"{len(names)} classes ({names[0]!r} to {names[-1]!r}), {len(photos.files)} pictures; "
        f"{steps} steps of {effective_batch} pictures ({options.train_batch_size} in a batch x "
        f"{options.gradient_accumulation_steps} accumulated x {num_processes} processes): "
        f"{steps * effective_batch / len(photos.files):.1f} passes"
    )

    # All that the weights depend on
    device = script.choose_device(options.device)
    dtype = launch.choose_training_dtype(device, options.dtype)
    listing = describe_listing(photos)
    command = script.program_words()
    if num_processes > 1:
        command = ["accelerate", "launch", "--multi_gpu", f"--num_processes={num_processes}", *command[1:]]
    given = str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model
    model = pin_model(given, folder.record)
    dependencies = {
        **parser.relevant(options, NOT_OF_WEIGHTS, RECIPE),
        **seed_record(options.seed),
        "dtype": dtype,
        "effective_batch": effective_batch,
        **({} if options.lr_scheduler == "constant" else {"max_train_steps": steps}),
        "class_names": list(photos.class_names),
        "num_pictures": len(photos.files),
        **({"banner": photos.banner} if photos.banner else {}),
        **({"reduced_decoding": True} if folder.reduces_decoding else {}),
        "pictures": check_pictures(photos, options.resolution, folder, listing),
        "model": fingerprint_model(model, prefers_half=dtype == "float16"),
    }
    description = {
        "model": given,
        "model_commit": find_commit(model),
        "resolution": options.resolution,
        "meta_class": options.meta_class,
        "options": dependencies,
        "listing": listing,
        **describe_program(command),
        "processes": num_processes,
        "device": device,
    }

    # Train what is missing
    folder.check_usable(dependencies, steps, options.train_batch_size * num_processes)
    if not folder.is_complete(steps):
        train_and_draw(options, photos, folder, description, steps)
    if launch.is_first_process():
        print(f"{folder.root} is complete: {steps} steps; look at {folder.root / PREVIEW_FILE}, then run")
        print(f"python generation.py --data_name={folder.data_name}")


def train_and_draw(
    options: argparse.Namespace, photos: Photos, folder: TrainingFolder, description: dict[str, Any], steps: int
) -> None:
    """Train the remaining steps, write the checkpoint, draw the preview."""
    script.say("loading the libraries and the model")
    from accelerate.utils import broadcast_object_list, gather_object

    from .preview import draw_preview
    from .trainer import NotFiniteError, create_accelerator

    dependencies = description["options"]
    model = pin_model(description["model"], description)
    drawing = {"model": model, "device": description["device"], "batch_size": options.train_batch_size}
    recipe = Recipe(**{name: dependencies[name] for name in RECIPE if name in dependencies})

    # Connect the processes, and see that they train the same
    accelerator = create_accelerator(description["device"], recipe.dtype)
    if accelerator.num_processes != description["processes"]:
        raise InputError("several processes need cuda or cpu; start one process for another device", "device")
    for others in gather_object([dependencies]):  # another machine may have other files
        if differences := describe_differences(others, dependencies):
            raise InputError(f"the processes have another {differences}; use the same command and files in all of them")

    # Train and draw
    try:
        if broadcast_object_list([folder.checkpoint_steps < steps])[0]:  # needs training
            train(options, recipe, photos, folder, description, accelerator, steps, drawing)
        if accelerator.is_main_process:
            accelerator.free_memory()
            folder.latents_file.unlink(missing_ok=True)
            draw_preview(folder.root / PREVIEW_FILE, recipe, photos, **drawing)
        accelerator.wait_for_everyone()
        accelerator.end_training()  # without it, a process may abort at its end
    except NotFiniteError:
        if accelerator.is_main_process:
            raise
        raise SystemExit(1) from None  # the main process prints the same message
    except (RuntimeError, RunError) as error:
        if is_out_of_memory(error):
            halve = "halve it and double --gradient_accumulation_steps, which gives the same weights"
            reason = f"out of memory with --train_batch_size={options.train_batch_size}"
            raise RunError(f"{reason}; {halve}, or use --gradient_checkpointing") from error
        raise


def train(
    options: argparse.Namespace,
    recipe: Recipe,
    photos: Photos,
    folder: TrainingFolder,
    description: dict[str, Any],
    accelerator: Any,
    steps: int,
    drawing: dict[str, Any],
) -> None:
    """Train from the newest state; write a state and the checkpoint at each interval and at the end."""
    from accelerate.utils import broadcast_object_list
    from tqdm import tqdm

    from .preview import draw_preview
    from .trainer import Trainer

    # The model, before anything is written: it may be refused
    trainer = Trainer(
        recipe,
        photos,
        accelerator,
        model=drawing["model"],
        batch_size=options.train_batch_size,
        accumulated=options.gradient_accumulation_steps,
        checkpoints_gradients=options.gradient_checkpointing,
    )

    # The newest state
    is_main, first = accelerator.is_main_process, 0
    state: dict[str, Any] = {}
    if is_main:
        folder.begin(description)
        first, state = folder.find_state()
        tidy_log(folder.log_file)
    (first,) = broadcast_object_list([first])
    if first:
        state = state or folder.read_state(first)
        trainer.load_state(state)
        script.say(f"continuing after step {first}")
    losses: list[float] = state.get("losses", [])
    classes = {"classes": list(photos.class_names), "meta_class": recipe.meta_class}
    if is_main and first and folder.checkpoint_steps != first:  # stopped between the state and the checkpoint
        folder.write_checkpoint(first, losses, classes, trainer.save)

    # The latents of all pictures
    trainer.latents.encode(folder.latents_file, json.dumps(description["options"]))

    with (
        tqdm(total=steps, initial=first, unit="step", disable=not is_main, smoothing=0.05) as bar,
        script.deferring_signals(),  # the first one ends the run after a step, with a state
    ):
        for step in range(first, steps):
            # A preview where one is due
            preview = f"preview_{step:05d}.png"
            is_due = options.preview_steps and step and step % options.preview_steps == 0
            if is_main and is_due and not (folder.root / preview).exists():
                draw_preview(folder.root / preview, recipe, photos, **drawing)

            # A step
            loss, is_stopping = trainer.step(step, script.is_stopping())
            losses.append(float(f"{loss:.6g}"))
            done = step + 1
            if is_main:
                append_to_log(folder.log_file, step=done, loss=loss, **trainer.learning_rates())

            # A state and the checkpoint where they are due
            is_interval = done % options.checkpointing_steps == 0 or done % (options.preview_steps or steps) == 0
            if is_main and (is_interval or is_stopping or done == steps):
                tidy_log(folder.log_file)
                folder.write_state(done, {**trainer.state(), "losses": losses})
                folder.write_checkpoint(done, losses, classes, trainer.save)
            if is_stopping:
                script.say(f"step {done} is saved; look: python generation.py --data_name={folder.data_name}")
                accelerator.wait_for_everyone()  # for the state: a launcher ends the others once one has ended
                raise script.Stopped

            # Progress
            bar.update()
            recent = losses[-SMOOTHED_OVER:]
            pictures = recipe.effective_batch * (bar.format_dict["rate"] or 0)
            bar.set_postfix_str(f"loss {sum(recent) / len(recent):.4f}, {pictures:.1f} pictures/s", refresh=False)


if __name__ == "__main__":
    script.run(main)
