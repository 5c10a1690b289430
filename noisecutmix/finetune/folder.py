"""The folder of a checkpoint: the recipe, the training states, the checkpoint. Imports torch only for states."""

import hashlib
import json
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..classes import CLASSES_FILE, EMBEDDINGS_FILE, FINETUNE_FILE, LORA_FILE, META_CLASSES
from ..errors import InputError
from ..files import atomic_file, check_same, create_file, read_record, write_file
from ..folder import PREVIEW_FILE
from ..photos import Photos, check_photos
from ..script import say
from ..sources import fingerprint_files

LATENTS_FILE, LOG_FILE = "latents.bin", "log.csv"
CHECKPOINT = (LORA_FILE, EMBEDDINGS_FILE, CLASSES_FILE)
STATE = re.compile(r"state_(\d+)\.pt")
STATES_KEPT = 2
PASSES, MIN_STEPS = 47, 1000  # Diff-Mix's budget for CUB: 280,000 pictures over 5,994


@dataclass(frozen=True)
class Recipe:
    """All that the trained weights depend on, whatever the machine. The folder of a checkpoint records it whole.

    `examples_per_class` is None for all pictures; `effective_batch` is the number of pictures in a step; `pictures` and
    `model` are fingerprints of the files; `max_train_steps` is None with a constant schedule, which does not depend on
    it; `banner` is the height in pixels of what is cut from the bottom of each picture; with
    `reduced_decoding` a JPEG file is decoded at a fraction of its size, at least twice the resolution, which earlier
    versions did not. The others are flags of the same names.
    """

    meta_class: str
    resolution: int
    random_flip: bool
    random_crop: bool
    rank: int
    learning_rate: float
    token_learning_rate: float
    lr_scheduler: str
    dtype: str
    seed: int
    examples_per_class: int | None
    effective_batch: int
    class_names: list[str]
    num_pictures: int
    pictures: str
    model: str
    max_train_steps: int | None = None
    banner: int = 0
    reduced_decoding: bool = False


class TrainingFolder:
    """The folder of a checkpoint, during and after the training.

    `finetune.json` records the options of the training, and how many steps the checkpoint has. Every file but the
    latents is written atomically, so it is whole or missing. The checkpoint is written with every state; classes.json
    comes last, so where it is there, the other files belong together.

    Args:
        root: the folder.

    Attributes:
        record: the content of finetune.json, {} if there is none.

    Raises:
        InputError: the folder was made by another program or an earlier version.
    """

    def __init__(self, root: Path):
        self.root = root
        self.latents_file, self.log_file, self._record_file = root / LATENTS_FILE, root / LOG_FILE, root / FINETUNE_FILE
        self.record = self._read_record()

    def check_usable(self, options: dict[str, Any], max_train_steps: int, in_a_batch: int) -> None:
        """Check that a training with these options can begin or continue here.

        Args:
            options: what the weights depend on, as JSON values.
            max_train_steps: the number of steps to train.
            in_a_batch: the number of pictures that all processes together have in a batch.

        Raises:
            InputError: an earlier run had other options, or has trained more steps.
        """
        there = self.record.get("options", {}).get("effective_batch", options["effective_batch"])
        if there != options["effective_batch"]:
            remedy = f"give {there // in_a_batch}" if there % in_a_batch == 0 else "use another --train_batch_size"
            reason = f"{self.root} has {there} pictures in a step, and all processes have {in_a_batch} in a batch now"
            raise InputError(f"{reason}; {remedy}, or another folder", "gradient_accumulation_steps")
        self._check_options(options)
        steps = max([self.checkpoint_steps, *(step for step, _ in self._states())])
        if steps > max_train_steps:
            remedy = "ask for at least as many, or choose another folder"
            raise InputError(f"{self.root} has {steps} steps already; {remedy}", "max_train_steps")

    def begin(self, record: dict[str, Any]) -> None:
        """Create the folder and finetune.json, or keep what an earlier run has recorded.

        Args:
            record: JSON values, with `model`, `resolution` and `options`. If there is a record, its own values are kept
                but for `listing` and the command.

        Raises:
            InputError: another run has just begun here, with other options.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        create_file(self._record_file, _encode({**record, "steps": 0, "losses": []}))
        newest = {name: record[name] for name in ("listing", "command", "working_directory")}
        self.record = {**self._read_record(), **newest}
        self._check_options(record["options"])

    @property
    def data_name(self) -> str:
        """The folder as a --data_name, quoted for a shell."""
        name = self.root.as_posix()
        return shlex.quote(f"./{name}" if name in META_CLASSES else name)

    @property
    def reduces_decoding(self) -> bool:
        """Whether large JPEG files are decoded at a fraction of their size: where no earlier version began the run."""
        return bool(self.record["options"].get("reduced_decoding")) if self.record else True

    @property
    def checkpoint_steps(self) -> int:
        """The number of steps that the checkpoint has, 0 if there is none."""
        is_there = all((self.root / name).is_file() for name in CHECKPOINT)
        return int(self.record.get("steps", 0)) if is_there else 0

    def is_complete(self, steps: int) -> bool:
        """Return whether the checkpoint has so many steps and its preview is drawn."""
        return self.checkpoint_steps == steps and (self.root / PREVIEW_FILE).is_file()

    def find_state(self) -> tuple[int, dict[str, Any]]:
        """Return (step, state) of the newest undamaged state, (0, {}) if there is none."""
        for step, file in sorted(self._states(), reverse=True):
            try:
                return step, self.read_state(step)
            except Exception as error:  # a damaged pickle raises errors of many types
                say(f"{file} is damaged and not used ({type(error).__name__})")
        return 0, {}

    def read_state(self, step: int) -> dict[str, Any]:
        """Return the state of a step, which the main process has found with `find_state`."""
        import torch

        state: dict[str, Any] = torch.load(self._state_file(step), map_location="cpu", weights_only=True)
        return state

    def write_state(self, step: int, state: dict[str, Any]) -> None:
        """Write a state and delete all but the last two."""
        import torch

        with atomic_file(self._state_file(step)) as file:
            torch.save(state, file)
        for _, old in sorted(self._states())[:-STATES_KEPT]:
            old.unlink(missing_ok=True)

    def write_checkpoint(
        self, step: int, losses: list[float], classes: dict[str, Any], write_weights: Callable[[Path], None]
    ) -> None:
        """Write the checkpoint of a step: the weights, the losses so far, and the content of classes.json."""
        (self.root / CLASSES_FILE).unlink(missing_ok=True)
        (self.root / PREVIEW_FILE).unlink(missing_ok=True)
        write_weights(self.root)
        self.record = {**self.record, "steps": step, "losses": losses}
        for file, content in ((self._record_file, _encode(self.record)), (self.root / CLASSES_FILE, _encode(classes))):
            write_file(file, content)

    def _check_options(self, options: dict[str, Any]) -> None:
        if self.record:
            check_same(self.root, self.record["options"], options)

    def _state_file(self, step: int) -> Path:
        return self.root / f"state_{step:08d}.pt"

    def _states(self) -> list[tuple[int, Path]]:
        found = ((STATE.fullmatch(file.name), file) for file in self.root.glob("state_*.pt"))
        return [(int(match[1]), file) for match, file in found if match]

    def _read_record(self) -> dict[str, Any]:
        """Return the content of finetune.json, {} if there is none. Raises InputError as the constructor does."""
        record = read_record(self._record_file, "output_dir", options=dict, steps=int, losses=list, listing=str)
        for file in (self.root / name for name in CHECKPOINT):
            if record is None and file.exists():
                raise InputError(f"{file} is not from this program; choose another folder", "output_dir")
        return record or {}


def count_steps(num_pictures: int, effective_batch: int, requested: int | None) -> int:
    """Return the number of training steps: those that are requested, or Diff-Mix's budget."""
    return requested or max(MIN_STEPS, math.ceil(PASSES * num_pictures / effective_batch))


def describe_listing(photos: Photos) -> str:
    """Return a hash of the pictures' names, sizes and times of change: if it is the same, so are the pictures."""
    digest = hashlib.sha256()
    for file in photos.files:
        status = file.stat()
        name = file.relative_to(photos.root).as_posix()
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def check_pictures(photos: Photos, resolution: int, folder: TrainingFolder, listing: str) -> str:
    """Return the fingerprint of the pictures, after a check of each one unless an earlier run has checked them."""
    if folder.record.get("listing") == listing:
        return str(folder.record["options"].get("pictures"))
    for note in check_photos(photos.files, photos.labels, resolution):
        say(note)
    return fingerprint_files(photos.root, photos.files)


def _encode(content: dict[str, Any]) -> bytes:
    """Return JSON with one value a line, so all losses on one."""
    lines = (f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in content.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode(errors="backslashreplace")  # names may not be valid text
