"""What can go wrong in ways the user can mend: every message is one line that says what to do."""


class InputError(ValueError):
    """A flag or a file is wrong. The message names it; no data was changed."""


class RunError(RuntimeError):
    """The run cannot go on. Every finished file is whole; the message says how to continue."""


class PeerStoppedError(RunError):
    """Another process of the launch stopped, and says why itself."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device has no memory left, which torch, CUDA, its libraries and Triton each say differently."""
    message = str(error).lower()
    signs = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed", "allocation_failed")
    return any(sign in message for sign in signs)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
