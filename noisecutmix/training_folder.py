"""The folder of a checkpoint: its record, the training states, the checkpoint. Imports torch only for states."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .classes import CLASSES_FILE, EMBEDDINGS_FILE, FINETUNE_FILE, LORA_FILE
from .errors import InputError
from .files import atomic_file, hold_folder
from .launch import say
from .record import describe_differences

PREVIEW_FILE, POSTERIORS_FILE = "preview.png", "pictures.bin"
CHECKPOINT = (LORA_FILE, EMBEDDINGS_FILE, CLASSES_FILE)
STATE = re.compile(r"state_(\d+)\.pt")
STATES_KEPT = 2
WRITTEN = re.compile(
    rf"{STATE.pattern}|pictures\.(bin|part)|" + "|".join(map(re.escape, (*CHECKPOINT, FINETUNE_FILE, PREVIEW_FILE)))
)
TEMPORARY = re.compile(rf"\.({WRITTEN.pattern})\.[0-9a-f]{{32}}\.tmp")


class TrainingFolder:
    """The folder of a checkpoint, during and after the training.

    `finetune.json` records the options of the training and how many steps the checkpoint has. A state is a single file
    that is written atomically, so it is complete or missing.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path):
        self.root = root
        self.posteriors_file = root / POSTERIORS_FILE
        self.has_begun = False

    @contextlib.contextmanager
    def held(self, options: dict[str, Any], max_train_steps: int, overwrite: bool) -> Iterator[None]:
        """Lock the folder, and create it if it is missing; delete a new folder in which nothing was written.

        Args:
            options: what the weights depend on, as JSON values; must equal the options of an earlier run here.
            max_train_steps: the number of steps to train, at least as many as the folder has.
            overwrite: whether an earlier run's files will be deleted, so that its options do not matter.

        Raises:
            InputError: another run holds the folder, or it was made with other options or by another program.
        """
        self._read_record(options, max_train_steps, overwrite)
        with hold_folder(self.root):
            self._record = self._read_record(options, max_train_steps, overwrite)  # another run may have changed it
            self._options = options
            self._overwrite = overwrite
            yield

    def begin(self, content: dict[str, Any], run: dict[str, Any]) -> None:
        """Delete temporary files, with `overwrite` all files of an earlier run, and write finetune.json.

        Args:
            content: the first entries of finetune.json, as JSON values; they include `model` and `resolution`.
            run: the record of this run, as JSON values; its `command` continues the run.
        """
        self.has_begun = True
        for entry in list(os.scandir(self.root)):
            if TEMPORARY.fullmatch(entry.name) or (self._overwrite and WRITTEN.fullmatch(entry.name)):
                os.unlink(entry)
        runs = self._record.get("runs", [])
        steps, losses = self.steps, self._record.get("losses", [])
        self._record = {**content, "options": self._options, "runs": [*runs, *([run] if run not in runs else [])]}
        self._write_record(steps, losses)

    @property
    def steps(self) -> int:
        """The number of steps of the finished checkpoint, 0 if there is none."""
        is_there = all((self.root / name).is_file() for name in CHECKPOINT)
        return int(self._record.get("steps", 0)) if is_there else 0

    def find_state(self) -> tuple[int, dict[str, Any]]:
        """Return (step, state) of the newest undamaged state, (0, {}) if there is none."""
        import torch

        for step, file in sorted(self._states(), reverse=True):
            try:
                state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
                return step, state
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
            old.unlink()

    def describe_progress(self, max_train_steps: int) -> str:
        """Return which state is kept, or an empty string if this run has not begun."""
        return f"the state of step {self._newest()} of {max_train_steps} is kept" if self.has_begun else ""

    def finish(self, steps: int, losses: list[float], classes: dict[str, Any]) -> None:
        """Record that the checkpoint, which is written already, is finished and has so many steps."""
        with atomic_file(self.root / CLASSES_FILE) as file:
            file.write(json.dumps(classes, indent=2, ensure_ascii=False).encode())
        (self.root / PREVIEW_FILE).unlink(missing_ok=True)
        self._write_record(steps, losses)
        self.posteriors_file.unlink(missing_ok=True)

    def has_preview(self) -> bool:
        return (self.root / PREVIEW_FILE).is_file()

    def _state_file(self, step: int) -> Path:
        return self.root / f"state_{step:08d}.pt"

    def _states(self) -> list[tuple[int, Path]]:
        if not self.root.is_dir():
            return []
        found = ((STATE.fullmatch(file.name), file) for file in self.root.iterdir())
        return [(int(match[1]), file) for match, file in found if match]

    def _newest(self) -> int:
        return max((step for step, _ in self._states()), default=0)

    def _write_record(self, steps: int, losses: list[float]) -> None:
        """Write finetune.json with indentation, but all losses on one line."""
        content = json.dumps({**self._record, "steps": steps, "losses": None}, indent=2, ensure_ascii=False)
        self._record.update(steps=steps, losses=losses)
        with atomic_file(self.root / FINETUNE_FILE) as file:
            file.write(content.replace('"losses": null', f'"losses": {json.dumps(losses)}').encode())

    def _read_record(self, options: dict[str, Any], max_train_steps: int, overwrite: bool) -> dict[str, Any]:
        """Return the content of an earlier finetune.json, {} if there is none. Raises InputError as `held` does."""
        file = self.root / FINETUNE_FILE
        if not file.exists():
            foreign = [name for name in CHECKPOINT if (self.root / name).exists()]
            if foreign:
                raise InputError(
                    f"`output_dir`: {self.root / foreign[0]} is not from this program; choose another folder"
                )
            return {}
        try:
            earlier: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            steps, earlier_options = int(earlier["steps"]), dict(earlier["options"])
            list(earlier["runs"]), list(earlier["losses"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"`output_dir`: {file} is not from this program; choose another folder") from error
        if overwrite:
            return {}
        differences = describe_differences(earlier_options, options)
        if differences:
            raise InputError(
                f"`output_dir`: {self.root} was made with another {differences}; "
                "give the same options, another folder, or `overwrite`"
            )
        if max(steps, self._newest()) > max_train_steps:
            raise InputError(
                f"`max_train_steps`: {self.root} has {max(steps, self._newest())} steps already; "
                "ask for at least as many, or give another folder"
            )
        return earlier
