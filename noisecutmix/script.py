"""How a script ends: its exit status, its one-line messages, its signals. Imports no torch."""

import contextlib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from .errors import InputError, PeerStoppedError, RunError
from .launch import read_number, say

LONGEST_ENDING = 10  # seconds; a later signal ends a process that is still busy with ending


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM."""


class UnfailingStream:
    """Standard output or error. A reader that has gone, or letters that the encoding lacks, never fail a run."""

    def __init__(self, stream: Any):
        self._stream = stream
        stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._unfailing(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._unfailing(self._stream.flush)

    def _unfailing(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError:  # what waits in the stream's buffer, and all that follows, goes nowhere
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


class _Signals:
    """The first SIGINT or SIGTERM raises Stopped. It is remembered, since libraries may turn that into other errors."""

    def __init__(self) -> None:
        self.first: int | None = None
        self._time = 0.0

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell starts a process in the background
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.first, self._time = number, time.monotonic()
            raise Stopped
        if time.monotonic() - self._time > LONGEST_ENDING:
            os._exit(128 + number)


_signals = _Signals()


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script: one line and an exit status in place of a traceback where the user can mend it.

    0: done. 2: bad input. 1: the run could not go on. 130 and 143: Ctrl-C and SIGTERM.
    """
    sys.stdout, sys.stderr = UnfailingStream(sys.stdout), UnfailingStream(sys.stderr)
    _signals.listen()
    status = 0
    try:
        main()
    except SystemExit as end:  # of --help
        status = int(end.code or 0)
    except BaseException as error:
        status = _report(error)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # Python's own ending is not to be interrupted
    sys.stdout.flush()
    sys.stderr.flush()
    if read_number("WORLD_SIZE") > 1:
        os._exit(status)  # a thread that waits for the network would hold up the others' end
    sys.exit(status)


def check_signals() -> None:
    """Raise Stopped where a signal arrived and a library has swallowed the exception."""
    if _signals.first is not None:
        raise Stopped


@contextlib.contextmanager
def adding_progress(describe_progress: Callable[[], str], how_to_go_on: str) -> Iterator[None]:
    """Add to a stop's or a failure's message how far the run has come, and how it goes on.

    Args:
        describe_progress: "7 of 20 items are done"; empty where nothing has begun, then nothing is added.
        how_to_go_on: "the same command goes on".
    """
    try:
        yield
    except BaseException as error:
        is_stop = _signals.first is not None or isinstance(error, KeyboardInterrupt)
        if not (is_stop or isinstance(error, (OSError, RunError))):
            raise
        try:
            progress = describe_progress()
        except OSError as failure:
            progress = describe_os_error(failure)
        if not progress:
            raise
        if isinstance(error, PeerStoppedError):
            raise PeerStoppedError(f"{error}; {progress}; {how_to_go_on}") from error
        if is_stop:
            raise Stopped(f"stopped: {progress}; {how_to_go_on}") from error
        if isinstance(error, OSError):
            raise RunError(f"{describe_os_error(error)}; {progress}; {how_to_go_on}") from error
        raise RunError(f"{error}; {progress}") from error


def describe_os_error(error: OSError) -> str:
    """Return an operating system's error as one line that names the file."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)


def with_flags(message: str) -> str:
    """Return a message of the package, which speaks of `resolution` or `dtype=float16`, with the scripts' flags."""
    return re.sub(r"`(\w+)(=[^`]*)?`", r"--\1\2", message)


def _report(error: BaseException) -> int:
    """Print one line that says why the script ends, and return the exit status."""
    is_first_on_machine = read_number("LOCAL_RANK") == 0
    if isinstance(error, PeerStoppedError):
        if is_first_on_machine:
            _print_error(str(error))
        return 1
    if _signals.first is not None or isinstance(error, KeyboardInterrupt):
        has_progress = isinstance(error, Stopped) and str(error)
        say(with_flags(str(error)) if has_progress else "stopped; run the same command again")
        return 128 + (_signals.first or signal.SIGINT)
    if isinstance(error, InputError):
        if is_first_on_machine:
            _print_error(str(error))
        return 2
    if isinstance(error, RunError):
        _print_error(str(error))
    elif isinstance(error, OSError):
        _print_error(describe_os_error(error))
    else:  # a fault of the program
        traceback.print_exception(error)
    return 1


def _print_error(message: str) -> None:
    rank = f"process {read_number('RANK')}: " if read_number("RANK") else ""
    print(f"{Path(sys.argv[0]).name}: error: {rank}{' '.join(with_flags(message).split())}", file=sys.stderr)
