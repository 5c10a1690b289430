"""What the user reads: errors that can be fixed, each in one line that says what to do, and no chatter of libraries."""

import contextlib
import logging
import warnings
from collections.abc import Iterator


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


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence diffusers, transformers, peft and torch while the context lasts, then restore every setting."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    hub_shows_bars = not are_progress_bars_disabled()  # transformers switches them, too
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for library in libraries:
                library.set_verbosity(logging.CRITICAL)
                library.disable_progress_bar()
            yield
        finally:
            for library, (verbosity, shows_bars) in zip(libraries, before):
                library.set_verbosity(verbosity)
                if shows_bars:
                    library.enable_progress_bar()
            (enable_progress_bars if hub_shows_bars else disable_progress_bars)()
