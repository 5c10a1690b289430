"""The items of a classifier's training and test, their order, and the seeds of what is random in them."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Subset

from ..datasets import AugmentedDataset, MixedDataset
from ..photos import Photos
from ..plan import area_ratio, sample_cutmix_box, seed_sequence

KEPT_PIXELS = 2**26  # of photos that are decoded only once, in each process that reads them: 200 MB
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
        picture = self._kept.get(index) or self._photos.open(index)
        if index not in self._kept and (size := picture.width * picture.height) <= self._room:
            self._kept[index] = picture
            self._room -= size
        return self._transform(picture), self._photos.labels[index]


def choose_augmented(pictures: AugmentedDataset, indices: Sequence[int], transform: Transform) -> Subset[Any]:
    """Return items of an augmented data set as (picture, soft label), with a transform of their own."""
    own = copy.copy(pictures)
    own.transform = transform
    return Subset(own, indices)


class SeededItems:
    """Items whose random crops and flips depend on the seed and the index only, whichever process reads them."""

    def __init__(self, items: MixedDataset, seed: int):
        self._items, self._seed = items, seed

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        seed_global_state(derive_seed(self._seed, index))
        return self._items[index]


def draw_batches(num_pictures: int, epochs: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Yield batches of indices: epoch e has the indices from e * n in random order. An incomplete end is left out."""
    rng = np.random.default_rng(seed)
    waiting: list[int] = []
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
        left, top, right, bottom = box = sample_cutmix_box(height, width, ALPHA, rng)
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
def keep_global_state(device: str = "cpu") -> Iterator[None]:
    """Restore the state of Python's and torch's global generators at the end."""
    state = random.getstate()
    try:
        with torch.random.fork_rng([torch.device(device)] if device.startswith("cuda") else []):
            yield
    finally:
        random.setstate(state)
