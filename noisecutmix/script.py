"""How a script ends: exit status, signals, one-line errors. Imports no torch."""

import builtins
import contextlib
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from . import launch
from .errors import InputError, RunError

HOW_TO_CONTINUE = "run the same command again"
# those that end a run: a closed terminal sends SIGHUP, Slurm's --signal and submitit SIGUSR1 or SIGUSR2
SIGNAL_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")  # Windows has the first two
SIGNALS = tuple(getattr(signal, name) for name in SIGNAL_NAMES if hasattr(signal, name))
# by default OpenMP's threads wait busily, so that two processes on one CPU are three times as slow as one; passively,
# they are faster than one, and one draws the digits by a tenth more slowly (tests/README.md)
WAIT_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
PACKAGE = Path(__file__).resolve().parent


class Stopped(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or another of `SIGNALS`."""


class _Signals:
    """Raises Stopped on the first of `SIGNALS`, and stores its number, since libraries may catch the exception."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.is_deferred = False
        self._time = 0.0

    def listen(self) -> None:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # shells ignore SIGINT for background processes
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.first, self._time = number, time.monotonic()
            if not self.is_deferred:
                raise Stopped
        elif time.monotonic() - self._time > 1:  # launchers send the same signal a second time, at once
            os._exit(128 + number)


_signals = _Signals()


def run(main: Callable[[], None]) -> NoReturn:
    """Run a script and exit; an error that the user can fix is printed in one line, without a traceback.

    Exit status: 0 complete, 1 stopped by an error, 2 bad input, 130 Ctrl-C, 143 SIGTERM, 128 + N for signal N.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    if not any(name in os.environ for name in WAIT_SETTINGS):  # of the user; read when torch is imported
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    for stream in (sys.stdout, sys.stderr):
        _keep_writable(stream)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about pictures that are read all the same
    sys.unraisablehook = _report_unraisable
    _signals.listen()
    status = 0
    try:
        main()
    except SystemExit as end:  # of --help
        status = int(end.code or 0)
    except BaseException as error:
        status = _report(error)
    lives_on = hasattr(builtins, "get_ipython") or "idlelib" in sys.modules  # a notebook or IDLE
    for number, handler in handlers.items():
        signal.signal(number, handler if lives_on else signal.SIG_IGN)  # do not interrupt the interpreter's shutdown
    sys.exit(status)


def is_stopping() -> bool:
    """Return whether one of `SIGNALS` has arrived."""
    return _signals.first is not None


def check_signals() -> None:
    """Raise Stopped if a signal has arrived: a library may have caught the first exception."""
    if is_stopping():
        raise Stopped


@contextlib.contextmanager
def deferring_signals() -> Iterator[None]:
    """Let the first signal interrupt nothing while the context lasts; ask for it with `is_stopping`."""
    _signals.is_deferred = True
    try:
        yield
    finally:
        _signals.is_deferred = False


@contextlib.contextmanager
def ending_at_signals() -> Iterator[None]:
    """Let a signal end the process at once while the context lasts, since no Python code runs while torch waits."""
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def ignore_signals(worker: int) -> None:
    """Let a DataLoader's worker outlive a signal that is sent to all processes, but SIGTERM, by which torch ends it."""
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)


def program_words() -> list[str]:
    """Return the words that start this program, such as ["python", "-m", "noisecutmix.finetune"]."""
    script = Path(sys.argv[0]).resolve()
    if script.name == "__main__.py" and PACKAGE in script.parents:  # started with -m
        return ["python", "-m", ".".join(script.parent.relative_to(PACKAGE.parent).parts)]
    return ["python", str(script)]


def choose_device(requested: str | None) -> str:
    """Return the device of this process, see `launch.choose_device`; say if there is no GPU."""
    device = launch.choose_device(requested)
    if requested is None and device == "cpu":
        say("no GPU seen: running on the CPU")
    return device


def say(message: str) -> None:
    """Print one line on standard error, above a progress bar; only the first process of a launch prints."""
    if launch.is_first_process():
        from tqdm import tqdm

        tqdm.write(message, file=sys.stderr)


def _keep_writable(stream: Any) -> None:
    """Let neither a letter that the terminal does not know nor a closed pipe end the run."""
    if not hasattr(stream, "reconfigure"):  # of a notebook, say
        return
    stream.reconfigure(errors="backslashreplace", line_buffering=True)
    write = stream.write

    def write_or_discard(text: str) -> int:
        try:
            return int(write(text))
        except OSError:  # discard this and all later output
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            return len(text)

    stream.write = write_or_discard


def _report_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Print what Python cannot raise, such as an error in a `__del__`, but not what a signal causes there."""
    if not is_stopping():  # else it is the signal, or an object that it left half built, such as a progress bar
        sys.__unraisablehook__(unraisable)


def _report(error: BaseException) -> int:
    """Print why the script ends, in one line, and return the exit status."""
    if is_stopping() or isinstance(error, KeyboardInterrupt):
        say(f"stopped; {HOW_TO_CONTINUE}")
        return 128 + (_signals.first or signal.SIGINT)
    if isinstance(error, InputError):
        if launch.is_first_of_machine() or not _is_stopped_within(10):
            _print_error(error.as_line())
        return 2
    if isinstance(error, OSError):
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
        _print_error(f"{reason}; {HOW_TO_CONTINUE}")
    elif isinstance(error, RunError):
        _print_error(error.as_line())
    else:  # a bug
        traceback.print_exception(error)
    return 1


def _is_stopped_within(seconds: float) -> bool:
    """Wait for a signal, and return whether one has arrived.

    The first process of a machine prints the same error. If another one ended earlier, the launcher would end the first
    one before it has printed.
    """
    end = time.monotonic() + seconds
    with deferring_signals():
        while not is_stopping() and time.monotonic() < end:
            time.sleep(0.1)
    return is_stopping()


def _print_error(message: str) -> None:
    rank = launch.rank_in_launch()
    process = f"process {rank}: " if rank else ""
    print(f"{Path(program_words()[-1]).name}: error: {process}{message}", file=sys.stderr)
