"""The folder of a comparison: its recipe, its jobs, and the predictions of each classifier.

A job is a row and the number of a seed. Any number of processes work on the jobs at once. Each takes one that nobody
has finished or begun, and a finished job is a file that appears whole.
"""

import contextlib
import io
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files, launch, script
from ..errors import InputError, RunError
from ..files import atomic_file, create_file, describe_program, read_record, write_file, write_png
from ..photos import Photos
from .copies import reduce_photos
from .recipe import Recipe, read_row
from .sets import AugmentedSet, write_table

if TYPE_CHECKING:
    import numpy as np

    from .classifier import Classifier

OPTIONS_FILE, TEST_PICTURES_FILE, COPIES = "classify.json", "test_pictures.csv", "copies"
MIN_ACCURACY = 50  # percent, below which a classifier cannot be the reference for augmented pictures
LOOKED_AFTER = 20  # steps, after which a process looks whether another one has finished its job

Job = tuple[str, int]
REFERENCE: Job = ("none", 0)  # its classifier measures the loss of the augmented pictures


class AlreadyTrained(Exception):
    """Another process has finished the same classifier."""


@dataclass
class Comparison:
    """The folder of a comparison: classify.json, the predictions of each job, and what the first classifiers leave.

    Args:
        root: the folder.
        recipe: how the classifiers are trained.
        dependencies: all that the predictions depend on beside row and seed, as JSON values.
        train, test: the pictures for training and for the test.
        hashes: SHA-256 of each picture for training, and of each one for the test.
        sets: the augmented data sets by their name.
        rows: the ways to train.
        seeds: the number of classifiers of each row.
        seed: of all random choices.
        keep: the share of each augmented set that is used.
        saves_weights: whether the first classifier of each row is kept.
        keeps_copies: whether the reduced copies of large photos are kept.
        device, num_workers: where to train, and how many processes read pictures.
    """

    root: Path
    recipe: Recipe
    dependencies: dict[str, Any]
    train: Photos
    test: Photos
    hashes: tuple[Sequence[str], Sequence[str]]
    sets: dict[str, AugmentedSet]
    rows: Sequence[str]
    seeds: int
    seed: int
    keep: float
    saves_weights: bool
    keeps_copies: bool
    device: str
    num_workers: int

    def __post_init__(self) -> None:
        self.dependencies = json.loads(json.dumps(self.dependencies))
        self.jobs: list[Job] = [(row, seed) for seed in range(self.seeds) for row in self.rows]
        if self.keep < 1 and self.sets and REFERENCE not in self.jobs:
            self.jobs.insert(0, REFERENCE)
        self._is_new = False

    def check_usable(self) -> bool:
        """Return whether the comparison is new. Raises InputError if the folder holds one with other options."""
        there = read_record(self.root / OPTIONS_FILE, "output_dir", options=dict)
        if there is None or "reduced_photos" in there["options"]:
            self.dependencies["reduced_photos"] = True
        if there is None:
            if (self.root / "results").exists():
                raise InputError(f"{self.root} has results without {OPTIONS_FILE}; choose another folder", "output_dir")
            return True
        files.check_same(self.root, there["options"], self.dependencies)
        return False

    def result_file(self, job: Job) -> Path:
        return self.root / "results" / f"predictions_{job[0]}_seed{job[1]}.npy"

    def state_file(self, job: Job) -> Path:
        return self.root / "states" / f"{job[0]}_seed{job[1]}.pt"

    def weights_file(self, row: str) -> Path:
        return self.root / "weights" / f"{row}.safetensors"

    def losses_file(self, name: str) -> Path:
        return self.root / f"losses_{name}.npy"

    def is_done(self, job: Job) -> bool:
        """Return whether a job's result is there, and what else its classifier has to leave."""
        if not self.result_file(job).exists():
            return False
        needed = [self.weights_file(job[0])] if self.saves_weights and job[1] == 0 else []
        if job == REFERENCE and self.read_top1(job) >= MIN_ACCURACY:
            needed += map(self.losses_file, self.sets)
        return all(file.exists() for file in needed)

    def train_missing(self) -> None:
        """Train all classifiers that have no result yet, but those that other processes finish first."""
        if all(map(self.is_done, self.jobs)):
            return
        from tqdm import tqdm

        # Refuse a wrong model before anything is written
        classifier = self._create_classifier()
        classifier.try_batch()

        # Begin or continue the folder
        self.root.mkdir(parents=True, exist_ok=True)
        content = {"options": self.dependencies, **describe_program(script.program_words())}
        self._is_new = create_file(self.root / OPTIONS_FILE, json.dumps(content, indent=2).encode())
        self.check_usable()
        (self.root / "results").mkdir(exist_ok=True)
        if not (self.root / TEST_PICTURES_FILE).exists():
            write_table(self.root / TEST_PICTURES_FILE, self.test)

        # Decode large photos once, unless an earlier version began the comparison with whole ones
        if self.dependencies.get("reduced_photos"):
            side, folder, (train_hashes, test_hashes) = classifier.shorter_side(), self.root / COPIES, self.hashes
            self.train = reduce_photos(self.train, train_hashes, folder, side)
            self.test = reduce_photos(self.test, test_hashes, folder, side)

        # Train
        steps = classifier.steps(len(self.train.files))
        with tqdm(unit="step", smoothing=0.05, disable=not launch.is_first_process()) as bar:
            while job := self._choose_job():
                bar.total = bar.n + steps * sum(not self.is_done(other) for other in self.jobs)
                bar.set_description(f"{job[0]}, seed {job[1]}")
                try:
                    self._train(job, bar)
                except AlreadyTrained:
                    continue
                except FileNotFoundError:
                    if not self.is_done(job):  # else another process was first, and has cleared the folder
                        raise
                    continue
                script.say(f"{job[0]}, seed {job[1]}: {self.read_top1(job):.1f} % test accuracy")

    def clear(self) -> None:
        """Delete what is needed only until all classifiers are trained and reported."""
        for job in self.jobs:  # others, of commands with more rows or seeds, may be in work
            for left in (*self._files_of_begun(job), self.state_file(job)):  # of killed processes, or of late ones
                with contextlib.suppress(OSError):
                    left.unlink()
        with contextlib.suppress(OSError):  # it holds the states of others
            (self.root / "states").rmdir()
        is_in_work = (self.root / "states").exists() or any((self.root / "results").glob(".*.tmp"))
        if not (self.keeps_copies or is_in_work):
            shutil.rmtree(self.root / COPIES, ignore_errors=True)

    def _create_classifier(self, seed: int = 0) -> "Classifier":
        from .classifier import Classifier

        return Classifier(self.recipe, len(self.train.class_names), seed, self.device, self.num_workers)

    def _choose_job(self) -> Job | None:
        """Return a job that is not done, one that as few other processes as possible have begun; None at the end."""
        ready = [job for job in self.jobs if not self.is_done(job) and not self._waits_for_losses(job)]
        if not ready:
            return None
        begun = {job: len(self._files_of_begun(job)) for job in ready}
        free = [job for job in ready if begun[job] == min(begun.values())]
        stopped = [job for job in free if self.state_file(job).exists()]
        rank, count = launch.rank_and_count()
        if count == 1 and stopped:
            return random.Random().choice(stopped)
        free = stopped + [job for job in free if job not in stopped]
        place = rank / count if count > 1 else 0 if self._is_new else random.Random().random()
        return free[int(place * len(free))]

    def _files_of_begun(self, job: Job) -> list[Path]:
        """Return the temporary files of the processes that have begun a job, and may have been killed."""
        return list((self.root / "results").glob(f".{self.result_file(job).name}.*"))

    def _waits_for_losses(self, job: Job) -> bool:
        _, name = read_row(job[0])
        return bool(name) and self.keep < 1 and not self.losses_file(name).exists()

    def _train(self, job: Job, bar: Any) -> None:
        """Train the classifier of a row and seed, and write its result. Raises AlreadyTrained."""
        import numpy as np

        from .items import RealPictures, choose_augmented, derive_seed

        row, number = job
        mix, name = read_row(row)
        classifier, state_file = self._create_classifier(derive_seed(self.seed, number)), self.state_file(job)
        log_file, taken = self.root / "logs" / f"{row}_seed{number}.csv", 0
        files.tidy_log(log_file)

        def after_step(step: int, loss: float, learning_rate: float) -> None:
            nonlocal taken
            taken += 1
            if taken == 1:
                bar.total -= step - 1  # of an earlier start
            epoch = step * self.recipe.batch_size / len(self.train.files)
            files.append_to_log(log_file, step=step, epoch=f"{epoch:.3f}", loss=loss, learning_rate=learning_rate)
            bar.update()
            pictures = self.recipe.batch_size * (bar.format_dict["rate"] or 0)
            bar.set_postfix_str(f"loss {loss:.3f}, {pictures:.0f} pictures/s", refresh=False)
            if taken % LOOKED_AFTER == 0 and self.is_done(job):
                raise AlreadyTrained

        with atomic_file(self.result_file(job)) as file:  # its temporary name tells the others that the job has begun
            chosen = partial(choose_augmented, self.sets[name].pictures, self.find_kept(name)) if name else None
            classifier.train(self.train, chosen, mix, state_file, after_step)
            files.tidy_log(log_file)
            probabilities = classifier.predict(lambda transform: RealPictures(self.test, transform))
            predictions = probabilities.astype(np.float16)
            rounded = np.flatnonzero(predictions.argmax(1) != probabilities.argmax(1))  # two classes became equal
            highest = np.nextafter(predictions[rounded].max(1), np.float16(2))
            predictions[rounded, probabilities[rounded].argmax(1)] = highest
            if job == REFERENCE:
                self._measure_losses(classifier, 100 * float((predictions.argmax(1) == self.test.labels).mean()))
            if self.saves_weights and number == 0:
                self.weights_file(row).parent.mkdir(exist_ok=True)
                write_file(self.weights_file(row), classifier.to_safetensors(self.train.class_names))
            np.save(file, predictions)
        state_file.unlink(missing_ok=True)

    def _measure_losses(self, classifier: "Classifier", top1: float) -> None:
        """Write the cross-entropy of the prediction to the label of each augmented picture; draw the highest ones."""
        import numpy as np

        from .figures import draw_highest_losses
        from .items import choose_augmented

        if top1 < MIN_ACCURACY:
            if self.keep < 1:
                raise RunError(f"{describe_weak_reference(top1)}; use another folder, without --keep")
            return
        for name, chosen in self.sets.items():
            items = partial(choose_augmented, chosen.pictures, range(len(chosen.pictures)))
            probabilities, labels = classifier.predict(items), chosen.pictures.soft_labels
            losses = -(labels * np.log(np.maximum(probabilities, 1e-12))).sum(1)
            content = io.BytesIO()
            np.save(content, losses.astype(np.float32))
            create_file(self.losses_file(name), content.getvalue())  # never replaced: the kept pictures depend on it
            grid = draw_highest_losses(chosen.pictures, losses, probabilities, self.train.class_names)
            write_png(self.root / f"highest_loss_{name}.png", grid)

    def find_kept(self, name: str) -> "Sequence[int]":
        """Return the items of an augmented set that are used: with --keep, those with the lowest losses."""
        import numpy as np

        count = len(self.sets[name].pictures)
        if self.keep == 1:
            return range(count)
        best = np.argsort(np.load(self.losses_file(name), allow_pickle=False), kind="stable")
        return sorted(best[: max(round(self.keep * count), 1)].tolist())

    def read_predicted(self, job: Job) -> "np.ndarray":
        """Return (pictures,), the class that a job's classifier predicts for each test picture."""
        import numpy as np

        predicted: np.ndarray = np.load(self.result_file(job), allow_pickle=False).argmax(1)
        return predicted

    def read_top1(self, job: Job) -> float:
        """Return the test accuracy of a job's classifier, in percent."""
        return 100 * float((self.read_predicted(job) == self.test.labels).mean())


def describe_weak_reference(top1: float) -> str:
    return f"Row none has a test accuracy of {top1:.0f} %, too little to tell which augmented pictures are wrong"
