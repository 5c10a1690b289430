"""How the classifiers of a comparison are trained: a recipe for all, and the rows."""

from dataclasses import dataclass

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


def read_row(row: str) -> tuple[str, str]:
    """Return what mixes the batches of a row ("mixup", "cutmix" or ""), and its augmented set ("" for none)."""
    first, _, second = row.partition("+")
    return (first, second) if first in MIXES else ("", "" if first == "none" else first)
