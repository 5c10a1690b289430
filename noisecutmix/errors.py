"""Errors that the user can fix: each message is one line that says what to do."""


class InputError(Exception):
    """A flag or a file is wrong. The message names it; no data was changed."""


class RunError(Exception):
    """The run cannot continue. Every finished file is whole; the message says what to do."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device is out of memory; torch, CUDA, its libraries and Triton have different messages."""
    message = str(error).lower()
    signs = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed", "allocation_failed")
    return any(sign in message for sign in signs)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
