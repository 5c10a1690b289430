"""Training a timm model on real and augmented pictures, the same on any machine for the same settings and seed."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import logging
import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from torch.utils.data import DataLoader

from .datasets import AugmentedDataset, MixedDataset
from .errors import InputError, RunError, first_line, is_out_of_memory
from .photos import Photos
from .pictures import open_photo
from .plan import area_ratio, sample_box, seed_sequence

with warnings.catch_warnings():  # older versions of timm use what newer ones of torch deprecate
    warnings.simplefilter("ignore")
    import timm
    from timm.data import create_transform, resolve_data_config
    from timm.optim import create_optimizer_v2
    from timm.scheduler.cosine_lr import CosineLRScheduler

LABEL_SMOOTHING = 0.1
MOMENTUM = 0.9
WARM_UP = 0.05  # share of the steps
KEPT_PIXELS = 2**26  # of photos that are decoded only once, in each process that reads them: 200 MB
NOT_FINITE = "use a lower `learning_rate` or `dtype=bfloat16` in another folder"
ALPHA = 1.0  # of MixUp's and CutMix's Beta distribution

Transform = Callable[[Any], torch.Tensor]


class RealPictures:
    """Photos as (picture, class); item i is picture i % n, so that every item of a training has an index of its own."""

    def __init__(self, photos: Photos, transform: Transform, epochs: int = 1):
        self.class_names = list(photos.class_names)
        self._photos, self._transform, self._epochs = photos, transform, epochs
        self._kept: dict[int, Image.Image] = {}
        self._room = KEPT_PIXELS

    def __len__(self) -> int:
        return self._epochs * len(self._photos.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        index %= len(self._photos.files)
        picture = self._kept.get(index) or open_photo(self._photos.files[index])
        if index not in self._kept and (size := picture.width * picture.height) <= self._room:
            self._kept[index] = picture
            self._room -= size
        return self._transform(picture), self._photos.labels[index]


class AugmentedPictures:
    """The items `indices` of an augmented data set as (picture, soft label)."""

    def __init__(self, pictures: AugmentedDataset, indices: Sequence[int], transform: Transform):
        self.class_names = pictures.class_names
        self._pictures, self._indices, self._transform = pictures, indices, transform

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        picture, label = self._pictures[self._indices[index]]
        return self._transform(picture), label


class SeededItems:
    """Items whose random crops and flips depend on the seed and the index only, whichever process reads them."""

    def __init__(self, items: MixedDataset, seed: int):
        self._items, self._seed = items, seed

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        seed_global_state(derive_seed(self._seed, index))
        return self._items[index]


class Classifier:
    """A timm model for `num_classes` classes; `options` are ckpts/classify.py's flags, `seed` that of all randomness.

    Raises:
        InputError: timm has no such model, or its pretrained weights cannot be loaded.
    """

    def __init__(self, options: argparse.Namespace, num_classes: int, seed: int = 0):
        check_model(options.model)
        logging.getLogger("timm").setLevel(logging.ERROR)
        self.options, self.num_classes, self.seed = options, num_classes, seed
        self.arguments: dict[str, Any] = {"model_name": options.model, "num_classes": num_classes}
        try:
            config = timm.get_pretrained_cfg(options.model)
            if options.image_size and config and config.fixed_input_size:
                self.arguments["img_size"] = options.image_size
            with keeping_global_state():
                seed_global_state(seed)
                model = timm.create_model(**self.arguments, pretrained=options.pretrained)
        except Exception as error:  # of timm, the hub and the network
            remedy = "; give --no_pretrained, or copy its weights into the hub's cache" if options.pretrained else ""
            raise InputError(f"`model`: {options.model} cannot be created: {first_line(error)}{remedy}") from error
        self.model = model.to(options.device, memory_format=torch.channels_last)  # faster convolutions
        size = {"input_size": (3, options.image_size, options.image_size)} if options.image_size else {}
        self.data_config: dict[str, Any] = resolve_data_config(size, model=model)

    def steps(self, num_pictures: int) -> int:
        """Return the number of training steps with so many real pictures."""
        return max(int(self.options.epochs) * num_pictures // int(self.options.batch_size), 1)

    def try_batch(self) -> None:
        """Raise an InputError if the model cannot train on batches of this size."""
        size, options = self.data_config["input_size"], self.options
        try:
            with torch.no_grad(), keeping_global_state(options.device), self._autocast():
                self.model.train()(torch.zeros(options.batch_size, *size, device=options.device))
        except (RuntimeError, ValueError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            reason = f"cannot train on {options.batch_size} pictures of {size[2]}x{size[1]}: {first_line(error)}"
            raise InputError(f"`model`: {options.model} {reason}; change `image_size` or `batch_size`") from error

    def train(
        self,
        photos: Photos,
        augmented: Callable[[Any], AugmentedPictures] | None,
        mix: str,
        after_step: Callable[[float], None],
    ) -> None:
        """Train. Order, crops and flips are the same for every `augmented` and `mix`.

        Args:
            photos: the real pictures.
            augmented: a function from a transform to the augmented pictures; None for real pictures only.
            mix: what mixes a batch, with probability `mix_probability`: "mixup", "cutmix", or "" for neither.
            after_step: called with the loss.

        Raises:
            RunError: the loss is not finite.
        """
        options, device, num_pictures = self.options, self.options.device, len(photos.files)
        transform = create_transform(
            **self.data_config,
            is_training=True,
            scale=(options.crop_scale, 1.0),
            hflip=0.5 if options.random_flip else 0.0,
            color_jitter=options.color_jitter,
        )
        real = RealPictures(photos, transform, options.epochs)
        mixed = MixedDataset(
            real,  # type: ignore[arg-type]  # torch's data sets need no common base
            augmented(transform) if augmented else real,  # type: ignore[arg-type]
            options.probability if augmented else 0.0,
            seed=derive_seed(self.seed, 0),
        )
        loader = self._loader(
            SeededItems(mixed, derive_seed(self.seed, 1)),
            batch_sampler=draw_batches(num_pictures, options.epochs, options.batch_size, derive_seed(self.seed, 2)),
        )
        steps, mix_rng = self.steps(num_pictures), np.random.default_rng(seed_sequence(self.seed, 3))
        optimizer = create_optimizer_v2(
            self.model, opt="sgd", lr=options.learning_rate, weight_decay=options.weight_decay, momentum=MOMENTUM
        )
        schedule = CosineLRScheduler(
            optimizer, steps + 1, warmup_t=math.ceil(WARM_UP * steps), warmup_lr_init=0.0, t_in_epochs=False
        )
        scaler = torch.amp.GradScaler(enabled=options.dtype == "float16")
        self.model.train()
        with keeping_global_state(device):
            for step, (pictures, labels) in enumerate(loader):
                seed_global_state(derive_seed(self.seed, 4, step), device)  # for dropout
                pictures = pictures.to(device, memory_format=torch.channels_last)
                labels = (1 - LABEL_SMOOTHING) * labels.to(device) + LABEL_SMOOTHING / self.num_classes
                if mix and mix_rng.random() < options.mix_probability:
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
                after_step(value)

    @torch.no_grad()
    def predict(self, items: Callable[[Any], Any]) -> np.ndarray:
        """Return the probabilities (pictures, classes) of `items(transform)`; raise RunError unless they are finite."""
        self.model.eval()
        transform = create_transform(**self.data_config, is_training=False)
        probabilities = []
        for pictures, _ in self._loader(items(transform), batch_size=self.options.batch_size):
            with self._autocast():
                logits = self.model(pictures.to(self.options.device))
            probabilities.append(logits.float().softmax(1).cpu().numpy())
        if not all(np.isfinite(part).all() for part in probabilities):
            raise RunError(f"the predictions are not finite; {NOT_FINITE}")
        return np.concatenate(probabilities)

    def to_safetensors(self, class_names: Sequence[str]) -> bytes:
        """Return a safetensors file: the weights; as metadata, JSON texts for timm's create_model and transform."""
        metadata = {"model": self.arguments, "transform": self.data_config, "class_names": list(class_names)}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        return save(tensors, {name: json.dumps(value, ensure_ascii=False) for name, value in metadata.items()})

    def _loader(self, items: Any, **batches: Any) -> DataLoader[Any]:
        workers, is_cuda = self.options.num_workers, self.options.device.startswith("cuda")
        return DataLoader(items, **batches, num_workers=workers, pin_memory=is_cuda, generator=torch.Generator())

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.options.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.options.device).type, getattr(torch, self.options.dtype))


def check_model(name: str) -> None:
    """Raise an InputError if timm knows no model of this name."""
    if ":" not in name and not timm.is_model(name):  # a colon is in names of the hub
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists all of them"
        raise InputError(f"`model`: timm has no {name!r}; {hint}")


def draw_batches(num_pictures: int, epochs: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of indices: epoch e has the indices from e * n in random order. An incomplete end is left out."""
    rng, waiting = np.random.default_rng(seed), []  # type: np.random.Generator, list[int]
    for epoch in range(epochs):
        waiting += (epoch * num_pictures + rng.permutation(num_pictures)).tolist()
        while len(waiting) >= batch_size:
            yield waiting[:batch_size]
            del waiting[:batch_size]
    if epochs * num_pictures < batch_size:
        yield waiting


def mix_batch(
    mix: str, pictures: torch.Tensor, labels: torch.Tensor, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix every picture (B, 3, h, w) and soft label (B, num_classes) of a batch with another one's.

    MixUp blends them (Zhang et al., ICLR 2018), CutMix pastes a box (Yun et al., ICCV 2019). timm's own takes no soft
    labels and draws from numpy's global state.
    """
    order = torch.from_numpy(rng.permutation(len(pictures))).to(pictures.device)
    if mix == "mixup":
        share = 1 - rng.beta(ALPHA, ALPHA)
        pictures = torch.lerp(pictures, pictures[order], share)
    else:
        height, width = pictures.shape[-2:]
        left, top, right, bottom = box = sample_box(height, width, ALPHA, rng)
        share = area_ratio(box, height, width)
        pictures = pictures.clone()
        pictures[:, :, top:bottom, left:right] = pictures[order, :, top:bottom, left:right]
    return pictures, torch.lerp(labels, labels[order], share)


def derive_seed(seed: int, *numbers: int) -> int:
    """Return a seed of 63 bits that is a function of a seed and numbers (see `seed_sequence`)."""
    return int(seed_sequence(seed, *numbers).generate_state(1, np.uint64)[0]) >> 1


def seed_global_state(seed: int, device: str = "cpu") -> None:
    """Seed Python's and torch's global generators, from which timm's layers and transforms draw."""
    random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed is slow, and remembers every call for a GPU
    if device.startswith("cuda"):
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device == "mps":
        torch.mps.manual_seed(seed)


@contextlib.contextmanager
def keeping_global_state(device: str = "cpu") -> Iterator[None]:
    """Restore the state of Python's and torch's global generators at the end."""
    state = random.getstate()
    try:
        with torch.random.fork_rng([torch.device(device)] if device.startswith("cuda") else []):
            yield
    finally:
        random.setstate(state)
