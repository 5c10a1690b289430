"""How the classifiers of a comparison are trained: a recipe for all, and the rows."""

from dataclasses import dataclass
from typing import Any

MIXES = ("mixup", "cutmix")


@dataclass(frozen=True)
class Recipe:
    """All that a classifier depends on beside the pictures and the seed: flags of `noisecutmix.compare`."""

    model: str
    pretrained: bool
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    probability: float
    mix_probability: float
    image_size: int | None
    crop_scale: float
    color_jitter: float
    random_flip: bool
    dtype: str
    resize: int | None = None
    warm_up: float = 0.05


def diffmix_flags(image_size: int | None, data_name: str) -> dict[str, Any]:
    """Return the flags with which Diff-Mix trains classifiers (its train_hub.py and classification.sh).

    Args:
        image_size: 224 (also for None), 384 or 448 pixels; any other takes their ratio to the resized picture.
        data_name: "cub", "flower" or "aircraft"; any other takes the learning rate of the first two.
    """
    side = image_size or 224
    return {
        "model": "resnet50.tv_in1k",  # torchvision's first weights
        "image_size": side,
        "resize": {384: 440}.get(side, side * 8 // 7),
        "epochs": 120,
        "batch_size": 256 if side <= 224 else 128 if side <= 384 else 64,
        "learning_rate": 0.1 if data_name == "aircraft" else 0.05,
        "weight_decay": 5e-4,
        "warm_up": 0.1,
        "color_jitter": 0.0,
        "probability": 0.1,
        "mix_probability": 0.5,
    }


def read_row(row: str) -> tuple[str, str]:
    """Return what mixes the batches of a row ("mixup", "cutmix" or ""), and its augmented set ("" for none)."""
    first, _, second = row.partition("+")
    return (first, second) if first in MIXES else ("", "" if first == "none" else first)
