"""Silence the libraries' warnings and progress bars where they do not help the user."""

import contextlib
import logging
import warnings
from collections.abc import Iterator


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
