"""Errors that the user can fix: each message is one line that says what to do."""


class _UserError(Exception):
    """An error that the user can fix.

    Args:
        message: one line that says what is wrong and what to do.
        option: the parameter, and flag of the scripts, that it is about, if any.
    """

    def __init__(self, message: str, option: str = ""):
        super().__init__(message, option)
        self.message, self.option = message, option

    def __str__(self) -> str:
        return f"{self.option}: {self.message}" if self.option else self.message

    def as_line(self) -> str:
        """Return the message as a script prints it, with the flag."""
        return " ".join(f"--{self}".split() if self.option else self.message.split())


class InputError(_UserError):
    """A flag or a file is wrong; no data was changed."""


class RunError(_UserError):
    """The run cannot continue. Every finished file is whole."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device is out of memory; torch, CUDA, its libraries and Triton have different messages."""
    message = str(error).lower()
    signs = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed", "allocation_failed")
    return any(sign in message for sign in signs)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
