"""Numbers that a caller gives: a wrong type or range is refused by the parameter's name."""

import math
from numbers import Integral, Real
from typing import TypeGuard

from .errors import InputError


def is_whole_number(value: object) -> TypeGuard[int]:
    """Return whether `value` is an integer, Python's or numpy's; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_whole_number(name: str, value: object, least: int, most: float = math.inf) -> None:
    """Refuse everything but an integer from `least` to `most`.

    Raises:
        InputError: the message names the parameter and its value.
    """
    if not is_whole_number(value) or not least <= value <= most:
        raise InputError(f"`{name}`: has to be a whole number {_describe_range(least, most)}, not {value!r}")


def check_number(name: str, value: object, least: float, most: float = math.inf) -> None:
    """Refuse everything but a finite real number from `least` to `most`.

    Raises:
        InputError: the message names the parameter and its value.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not least <= value <= most:  # type: ignore[arg-type, operator]
        raise InputError(f"`{name}`: has to be a number {_describe_range(least, most)}, not {value!r}")


def _describe_range(least: float, most: float) -> str:
    return f"of at least {least}" if most == math.inf else f"from {least} to {most}"
