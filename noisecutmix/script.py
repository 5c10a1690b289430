"""How a script ends, and its place among the processes that were started with it. Imports no torch."""

import argparse
import contextlib
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from .errors import InputError, RunError
from .ranges import default_dtype

HOW_TO_CONTINUE = "run the same command again to continue"
# the first variable that is set counts: of accelerate and torchrun, of Open MPI, of Slurm
RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
COUNT = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM."""


class _Signals:
    """Raises Stopped on the first SIGINT or SIGTERM, and stores its number, since libraries may catch the exception."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.is_deferred = False
        self._time = 0.0

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
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

    Exit status: 0 complete, 1 stopped by an error, 2 bad input, 130 Ctrl-C, 143 SIGTERM.
    """
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
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # do not interrupt the interpreter's shutdown
    sys.exit(status)


def is_stopping() -> bool:
    """Return whether Ctrl-C or SIGTERM has arrived."""
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


def rank_and_count() -> tuple[int, int]:
    """Return this process's number, from 0, among the processes that were started together, and their number.

    They are read from the variables of launchers, and of Slurm's job arrays. A process without them is 0 of 1.
    """
    count = max(_read_number(COUNT, 1), 1)
    rank = _read_number(RANK, 0) % count
    tasks = max(_read_number(["SLURM_ARRAY_TASK_COUNT"], 1), 1)
    task = _read_number(["SLURM_ARRAY_TASK_ID"], 0) - _read_number(["SLURM_ARRAY_TASK_MIN"], 0)
    return task % tasks * count + rank, tasks * count


def say(message: str) -> None:
    """Print one line on standard error, above a progress bar; only the first process of a launch prints."""
    if is_first_process():
        from tqdm import tqdm

        tqdm.write(message, file=sys.stderr)


def is_first_process() -> bool:
    """Return whether this process prints: the first of its launch, or of its task in a job array."""
    return _read_number(RANK, 0) % max(_read_number(COUNT, 1), 1) == 0


def choose_device(requested: str | None) -> str:
    """Return the device of this process: the requested one; with None the first available of cuda, mps and cpu.

    With "cuda", each process of a launch gets its own GPU.

    Raises:
        InputError: the requested device is not there.
    """
    if requested == "cpu":
        return requested
    import torch

    count, has_mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if requested is None:
        requested = "cuda" if count else "mps" if has_mps else "cpu"
        if requested == "cpu":
            say("no GPU seen: running on the CPU")
    elif requested == "mps" and not has_mps:
        raise InputError("`device`: mps is not there; try `device=cpu`")
    elif requested.startswith("cuda") and int(requested.partition(":")[2] or 0) >= count:
        raise InputError(f"`device`: {requested} is not there, CUDA devices seen: {count}; try `device=cpu`")
    if requested == "cuda" and _read_number(COUNT, 1) > 1:
        return f"cuda:{_read_number(LOCAL_RANK, 0) % count}"
    return requested


def choose_device_and_dtype(options: argparse.Namespace) -> None:
    """Set `device` and `dtype` of a training. Raises InputError if they are not there or do not fit each other."""
    options.device = choose_device(options.device)
    options.dtype = options.dtype or default_dtype(options.device)
    if options.dtype == "float16" and not options.device.startswith("cuda"):
        raise InputError(f"`dtype`: float16 needs cuda; use `dtype=bfloat16` or float32 on {options.device}")


def with_flags(message: str) -> str:
    """Replace parameters such as `resolution` or `dtype=float16` in a message by the flags of the scripts."""
    return re.sub(r"`(\w+)(=[^`]*)?`", r"--\1\2", message)


def _read_number(names: "list[str] | tuple[str, ...]", default: int) -> int:
    text = next((os.environ[name] for name in names if name in os.environ), "")
    return int(text) if text.isdecimal() else default


def _keep_writable(stream: Any) -> None:
    """Let neither a letter that the terminal does not know nor a closed pipe end the run."""
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
    """Print what Python cannot raise, such as an error in a `__del__`, but not a signal that arrives there."""
    if not isinstance(unraisable.exc_value, Stopped):
        sys.__unraisablehook__(unraisable)


def _report(error: BaseException) -> int:
    """Print why the script ends, in one line, and return the exit status."""
    if is_stopping() or isinstance(error, KeyboardInterrupt):
        say(f"stopped; {HOW_TO_CONTINUE}")
        return 128 + (_signals.first or signal.SIGINT)
    if isinstance(error, InputError):
        if _read_number(LOCAL_RANK, 0) == 0 or _read_number(COUNT, 1) == 1 or not _is_stopped_within(10):
            _print_error(str(error))
        return 2
    if isinstance(error, OSError):
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
        _print_error(f"{reason}; {HOW_TO_CONTINUE}")
    elif isinstance(error, RunError):
        _print_error(str(error))
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
    rank = _read_number(RANK, 0)
    process = f"process {rank}: " if rank else ""
    print(f"{Path(sys.argv[0]).name}: error: {process}{' '.join(with_flags(message).split())}", file=sys.stderr)
