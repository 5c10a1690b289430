"""How a script ends: exit status, one-line messages, signals. Imports no torch."""

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

LONGEST_ENDING = 10  # seconds from the first signal; a signal after that kills the process


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM."""


class UnfailingStream:
    """Standard output or error, on which neither a closed pipe nor a character outside the encoding is an error."""

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
        except OSError:  # discard what is in the stream's buffer, and all later output
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


class _Signals:
    """Raises Stopped on the first SIGINT or SIGTERM, and stores its number, since libraries may catch the exception."""

    def __init__(self) -> None:
        self.first: int | None = None
        self._time = 0.0

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # shells ignore SIGINT for background processes
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.first, self._time = number, time.monotonic()
            raise Stopped
        if time.monotonic() - self._time > LONGEST_ENDING:
            os._exit(128 + number)


_signals = _Signals()


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script and exit; an error that the user can fix is printed in one line, without a traceback.

    Exit status: 0 complete, 1 stopped by an error, 2 bad input, 130 Ctrl-C, 143 SIGTERM.
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
        signal.signal(number, signal.SIG_IGN)  # do not interrupt the interpreter's shutdown
    sys.stdout.flush()
    sys.stderr.flush()
    if read_number("WORLD_SIZE") > 1:
        os._exit(status)  # a normal exit would wait for the thread that waits for the network
    sys.exit(status)


def check_signals() -> None:
    """Raise Stopped if a signal has arrived: a library may have caught the first exception."""
    if _signals.first is not None:
        raise Stopped


@contextlib.contextmanager
def adding_progress(describe_progress: Callable[[], str], overwrite: bool) -> Iterator[None]:
    """Add to the message of a stop or a failure how much is done, and how to continue.

    Args:
        describe_progress: returns "7 of 20 items are done", for example; if it is empty, nothing is added.
        overwrite: this run overwrites an earlier one, so its command must not be repeated with that flag.
    """
    how_to_continue = f"the same command {'without --overwrite ' if overwrite else ''}continues"
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
            raise PeerStoppedError(f"{error}; {progress}; {how_to_continue}") from error
        if is_stop:
            raise Stopped(f"stopped: {progress}; {how_to_continue}") from error
        if isinstance(error, OSError):
            raise RunError(f"{describe_os_error(error)}; {progress}; {how_to_continue}") from error
        raise RunError(f"{error}; {progress}") from error


def describe_os_error(error: OSError) -> str:
    """Return an error of the operating system as one line, with the file's name if there is one."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)


def with_flags(message: str) -> str:
    """Replace parameters such as `resolution` or `dtype=float16` in a message by the flags of the scripts."""
    return re.sub(r"`(\w+)(=[^`]*)?`", r"--\1\2", message)


def _report(error: BaseException) -> int:
    """Print why the script ends, in one line, and return the exit status."""
    is_stop = _signals.first is not None or isinstance(error, KeyboardInterrupt)
    if is_stop and not isinstance(error, PeerStoppedError):  # another process's stop arrives as a SIGTERM, too
        has_progress = isinstance(error, Stopped) and str(error)
        say(with_flags(str(error)) if has_progress else "stopped; run the same command again")
        return 128 + (_signals.first or signal.SIGINT)
    if isinstance(error, (InputError, PeerStoppedError)):
        if read_number("LOCAL_RANK") == 0:  # all processes of a machine fail in the same way
            _print_error(str(error))
    elif isinstance(error, RunError):
        _print_error(str(error))
    elif isinstance(error, OSError):
        _print_error(describe_os_error(error))
    else:  # a bug
        traceback.print_exception(error)
    return 2 if isinstance(error, InputError) else 1


def _print_error(message: str) -> None:
    rank = f"process {read_number('RANK')}: " if read_number("RANK") else ""
    print(f"{Path(sys.argv[0]).name}: error: {rank}{' '.join(with_flags(message).split())}", file=sys.stderr)
