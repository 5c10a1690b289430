"""The valid values of options, for the flags and in Python. Imports no numpy."""

import math
import numbers
from dataclasses import dataclass
from typing import Any

from .errors import InputError


@dataclass(frozen=True)
class Range:
    """The numbers from `lowest` to `highest`, both included; `kind` is int (whole numbers) or float."""

    kind: type[int] | type[float]
    lowest: float
    highest: float = math.inf

    def __str__(self) -> str:
        kind, form = ("a whole number", "") if self.kind is int else ("a number", "g")
        if math.isinf(self.highest):
            return f"{kind} of at least {self.lowest:{form}}"
        return f"{kind} from {self.lowest:{form}} to {self.highest:{form}}"

    def check(self, name: str, value: Any) -> Any:
        """Return `value` as an int or a float of Python.

        Numbers of Python and numpy are accepted; a bool, a string, an array or a tensor is not.

        Raises:
            InputError: `value` is of another kind or outside the range. The message names the parameter `name`.
        """
        number: Any = numbers.Integral if self.kind is int else numbers.Real
        if isinstance(value, number) and not isinstance(value, bool) and self.lowest <= value <= self.highest:
            return self.kind(value)
        raise InputError(f"has to be {self}, not {value!r}", name)


RANGES = {
    # outside this range, boxes do not change with alpha: each covers all, nothing, or half of the picture
    "alpha": Range(float, 1e-6, 1e6),
    "batch_size": Range(int, 1, 4096),
    "guidance_interval": Range(float, 0, 1),
    "guidance_scale": Range(float, 0, 1000),
    "num_aug": Range(int, 1, 10**8),
    "num_gen": Range(int, 1, 10**8),
    "num_inference_steps": Range(int, 1, 999),  # the scheduler cannot use one of its 1,000 timesteps twice
    "resolution": Range(int, 1, 8192),
    "seed": Range(int, 0, 2**63 - 1),
}


def check_guidance_interval(low: float, high: float) -> None:
    """Raise an InputError unless these are fractions of the denoising steps, the lower one first."""
    for fraction in (low, high):
        RANGES["guidance_interval"].check("guidance_interval", fraction)
    if low > high:
        raise InputError(f"{low} is above {high}; give the lower end first", "guidance_interval")


def check_resolution(resolution: int, factor: int) -> None:
    """Raise an InputError unless the side of a picture is a multiple of the VAE's factor, both in pixels."""
    if resolution % factor:
        raise InputError(f"has to be a multiple of {factor}, not {resolution}", "resolution")


def default_dtype(device: str) -> str:
    """Return the dtype of a model's weights where none is given."""
    return "float16" if device.startswith("cuda") else "float32"
