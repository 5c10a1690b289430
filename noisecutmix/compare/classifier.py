"""Training a timm model on real and augmented pictures, the same on any machine for the same recipe and seed."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch.utils.data import DataLoader, Dataset

from .. import script
from ..datasets import MixedDataset
from ..errors import InputError, RunError, first_line, is_out_of_memory
from ..files import atomic_file
from ..photos import Photos
from ..plan import seed_sequence
from .items import RealPictures, SeededItems, derive_seed, draw_batches, keep_global_state, mix_batch, seed_global_state
from .recipe import Recipe

with warnings.catch_warnings():  # older versions of timm use what newer ones of torch deprecate
    warnings.simplefilter("ignore")
    import timm
    from timm.data import create_transform, resolve_data_config
    from timm.optim import create_optimizer_v2
    from timm.scheduler.cosine_lr import CosineLRScheduler
    from torchvision import transforms

LABEL_SMOOTHING = 0.1
MOMENTUM = 0.9
PADDING = 8  # pixels around a resized picture, before a random crop, as in Diff-Mix
NOT_FINITE = "use a lower learning_rate or dtype=bfloat16 in another folder"
STATE_SECONDS = 600  # between two states of a training


class Classifier:
    """A timm model for `num_classes` classes; `seed` determines all that is random.

    Raises:
        InputError: timm has no such model, or its pretrained weights cannot be loaded.
    """

    def __init__(self, recipe: Recipe, num_classes: int, seed: int, device: str, num_workers: int):
        check_model(recipe.model)
        logging.getLogger("timm").setLevel(logging.ERROR)
        self.recipe, self.num_classes, self.seed = recipe, num_classes, seed
        self.device, self.num_workers = device, num_workers
        self.arguments: dict[str, Any] = {"model_name": recipe.model, "num_classes": num_classes}
        try:
            config = timm.get_pretrained_cfg(recipe.model)
            if recipe.image_size and config and config.fixed_input_size:
                self.arguments["img_size"] = recipe.image_size
            with keep_global_state():
                seed_global_state(seed)
                model = timm.create_model(**self.arguments, pretrained=recipe.pretrained)
        except Exception as error:  # of timm, the hub and the network
            remedy = "; give --no_pretrained, or copy its weights into the hub's cache" if recipe.pretrained else ""
            raise InputError(f"{recipe.model} cannot be created: {first_line(error)}{remedy}", "model") from error
        self.model = model.to(self.device, memory_format=torch.channels_last)  # faster convolutions
        size = {"input_size": (3, recipe.image_size, recipe.image_size)} if recipe.image_size else {}
        self.data_config: dict[str, Any] = resolve_data_config(size, model=model)
        if recipe.resize:  # timm scales the test's pictures to floor(side / crop_pct)
            share = self.data_config["input_size"][1] / (recipe.resize + 0.5)
            self.data_config |= {"crop_mode": "squash", "crop_pct": share}

    def steps(self, num_pictures: int) -> int:
        """Return the number of training steps with so many real pictures."""
        return max(int(self.recipe.epochs) * num_pictures // int(self.recipe.batch_size), 1)

    def shorter_side(self) -> int:
        """Return the shorter side in pixels that a photo needs, so that nothing a crop could show is lost."""
        side = int(self.data_config["input_size"][1])
        train = self.recipe.resize or side / math.sqrt(self.recipe.crop_scale)  # the smallest crop
        return math.ceil(max(train, side / float(self.data_config["crop_pct"])))  # of the training, and of the test

    def try_batch(self) -> None:
        """Raise an InputError if the model cannot train on batches of this size."""
        size, recipe = self.data_config["input_size"], self.recipe
        try:
            with torch.no_grad(), keep_global_state(self.device), self._autocast():
                self.model.train()(torch.zeros(recipe.batch_size, *size, device=self.device))
        except (RuntimeError, ValueError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            reason = f"cannot train on {recipe.batch_size} pictures of {size[2]}x{size[1]}: {first_line(error)}"
            raise InputError(f"{recipe.model} {reason}; change image_size or batch_size", "model") from error

    def train(
        self,
        photos: Photos,
        augmented: Callable[[Any], Dataset[Any]] | None,
        mix: str,
        state_file: Path,
        after_step: Callable[[int, float, float], None],
    ) -> None:
        """Train. Order, crops and flips are the same for every `augmented` and `mix`.

        The state is written every ten minutes, at a signal and at the end; a training that has one continues.

        Args:
            photos: the real pictures.
            augmented: a function from a transform to the augmented pictures; None for real pictures only.
            mix: what mixes a batch, with probability `mix_probability`: "mixup", "cutmix", or "" for neither.
            state_file: the state, which the caller deletes once it needs the training no more.
            after_step: called with the number of steps so far, the loss and the learning rate.

        Raises:
            RunError: the loss is not finite.
            Stopped: a signal has arrived.
        """
        recipe, device, num_pictures = self.recipe, self.device, len(photos.files)

        # Pictures: each real one may be replaced by an augmented one
        transform = self._training_transform()
        real = RealPictures(photos, transform, recipe.epochs)
        mixed = MixedDataset(
            real,  # type: ignore[arg-type]  # torch's data sets need no common base
            augmented(transform) if augmented else real,  # type: ignore[arg-type]
            recipe.probability if augmented else 0.0,
            seed=derive_seed(self.seed, 0),
        )
        batches = draw_batches(num_pictures, recipe.epochs, recipe.batch_size, derive_seed(self.seed, 2))

        # Optimiser and schedule
        steps, mix_rng = self.steps(num_pictures), np.random.default_rng(seed_sequence(self.seed, 3))
        rates = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay, "momentum": MOMENTUM}
        optimizer = create_optimizer_v2(self.model, opt="sgd", **rates)
        warm_up = {"warmup_t": math.ceil(recipe.warm_up * steps), "warmup_lr_init": 0.0}
        schedule = CosineLRScheduler(optimizer, steps + 1, t_in_epochs=False, **warm_up)
        scaler = torch.amp.GradScaler(enabled=recipe.dtype == "float16")

        # The state of an earlier start
        parts = {"model": self.model, "optimizer": optimizer, "scaler": scaler}
        first, written = _read_state(state_file, parts, mix_rng), time.monotonic()

        # Steps
        items, left = SeededItems(mixed, derive_seed(self.seed, 1)), itertools.islice(batches, first, None)
        self.model.train()
        with keep_global_state(device), script.deferring_signals():
            for step, (pictures, labels) in enumerate(self._loader(items, batch_sampler=left), first):
                seed_global_state(derive_seed(self.seed, 4, step), device)  # for dropout
                pictures = pictures.to(device, memory_format=torch.channels_last)
                labels = (1 - LABEL_SMOOTHING) * labels.to(device) + LABEL_SMOOTHING / self.num_classes
                if mix and mix_rng.random() < recipe.mix_probability:
                    pictures, labels = mix_batch(mix, pictures, labels, mix_rng)
                schedule.step_update(step + 1)
                with self._autocast():
                    loss = F.cross_entropy(self.model(pictures), labels)
                optimizer.zero_grad()
                scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                scaler.step(optimizer)
                scaler.update()
                value = loss.item()
                if not math.isfinite(value):
                    raise RunError(f"the loss of step {step + 1} is not finite; {NOT_FINITE}")
                after_step(step + 1, value, optimizer.param_groups[0]["lr"])
                is_due = step + 1 == steps or time.monotonic() - written > STATE_SECONDS
                if script.is_stopping() or is_due:
                    _write_state(state_file, step + 1, parts, mix_rng)
                    written = time.monotonic()
                script.check_signals()
        script.check_signals()  # of one that came after the last step

    @torch.no_grad()
    def predict(self, items: Callable[[Any], Any]) -> np.ndarray:
        """Return the probabilities (pictures, classes) of `items(transform)`; raise RunError unless they are finite."""
        self.model.eval()
        transform = create_transform(**self.data_config, is_training=False)
        probabilities = []
        for pictures, _ in self._loader(items(transform), batch_size=self.recipe.batch_size):
            with self._autocast():
                logits = self.model(pictures.to(self.device))
            probabilities.append(logits.float().softmax(1).cpu().numpy())
        if not all(np.isfinite(part).all() for part in probabilities):
            raise RunError(f"the predictions are not finite; {NOT_FINITE}")
        return np.concatenate(probabilities)

    def to_safetensors(self, class_names: Sequence[str]) -> bytes:
        """Return a safetensors file: the weights; as metadata, JSON texts for timm's create_model and transform."""
        metadata = {"model": self.arguments, "transform": self.data_config, "class_names": list(class_names)}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        return save(tensors, {name: json.dumps(value, ensure_ascii=False) for name, value in metadata.items()})

    def _training_transform(self) -> Any:
        recipe, side = self.recipe, self.data_config["input_size"][1]
        if not recipe.resize:
            return create_transform(
                **self.data_config,
                is_training=True,
                scale=(recipe.crop_scale, 1.0),
                hflip=0.5 if recipe.random_flip else 0.0,
                color_jitter=recipe.color_jitter,
            )
        if side > recipe.resize:
            raise InputError(f"{recipe.resize} pixels are fewer than the {side} of {recipe.model}", "resize")
        steps = [
            transforms.Resize((recipe.resize, recipe.resize)),
            transforms.RandomCrop(side, padding=PADDING),
            transforms.RandomHorizontalFlip(0.5 if recipe.random_flip else 0.0),
            transforms.ColorJitter(*[recipe.color_jitter] * 3),
            transforms.ToTensor(),
            transforms.Normalize(self.data_config["mean"], self.data_config["std"]),
        ]
        return transforms.Compose(steps)

    def _loader(self, items: Any, **batches: Any) -> DataLoader[Any]:
        return DataLoader(
            items,
            **batches,
            num_workers=self.num_workers,
            worker_init_fn=script.ignore_signals,
            pin_memory=self.device.startswith("cuda"),
            generator=torch.Generator(),
        )

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.recipe.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.device).type, getattr(torch, self.recipe.dtype))


def _write_state(file: Path, step: int, parts: dict[str, Any], mix_rng: np.random.Generator) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    file.parent.mkdir(exist_ok=True)
    with atomic_file(file) as opened:
        torch.save({**state, "step": step, "mix_rng": json.dumps(mix_rng.bit_generator.state)}, opened)


def _read_state(file: Path, parts: dict[str, Any], mix_rng: np.random.Generator) -> int:
    """Restore a state, and return its number of steps; 0 if there is none, or it is damaged."""
    if not file.exists():
        return 0
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises errors of many types
        script.say(f"{file} is damaged and not used ({type(error).__name__})")
        return 0
    for name, part in parts.items():
        part.load_state_dict(state[name])
    mix_rng.bit_generator.state = json.loads(state["mix_rng"])
    return int(state["step"])


def check_model(name: str) -> None:
    """Raise an InputError if timm knows no model of this name."""
    if ":" not in name and not timm.is_model(name):  # a colon is in names of the hub
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists all of them"
        raise InputError(f"timm has no {name!r}; {hint}", "model")


def explain_loading(weights: Path, picture: Path) -> str:
    """Return the lines of Python that name the class of a picture by the weights of a classifier."""
    return f"""\
import json; import timm; from PIL import Image; from safetensors.torch import safe_open, load_file
about = {{key: json.loads(text) for key, text in safe_open({str(weights)!r}, "pt").metadata().items()}}
model = timm.create_model(**about["model"]).eval(); model.load_state_dict(load_file({str(weights)!r}))
picture = timm.data.create_transform(**about["transform"])(Image.open({str(picture)!r}).convert("RGB"))
print(about["class_names"][int(model(picture[None]).argmax())])"""
