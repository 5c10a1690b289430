"""What can go wrong in ways the user can mend: every message is one line that says what to do."""


class InputError(ValueError):
    """A flag or a file is wrong. The message names it; no data was changed."""


class RunError(RuntimeError):
    """The run cannot go on. Every finished file is whole; the message says how to continue."""


class PeerStoppedError(RunError):
    """Another process of the launch stopped, and says why itself."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device has no memory left, which torch, CUDA, its libraries and Triton each say differently."""
    told = str(error).lower()
    return any(
        words in told for words in ("out of memory", "alloc_failed", "allocation_failed", "can't allocate memory")
    )


def first_line(error: BaseException) -> str:
    """Return what an error tells, in one line; its kind where it tells nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
