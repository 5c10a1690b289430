"""How a script runs: its device and generator, its messages and its exit status. Imports no torch before it must."""

import argparse
import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import InputError, PeerStoppedError, RunError
from .launch import is_launched, is_main_process, say

if TYPE_CHECKING:
    from .folder import OutputFolder


class Terminated(KeyboardInterrupt):
    """SIGTERM: stop as for Ctrl-C, with that signal's exit status."""


def fail(message: str, status: int) -> NoReturn:
    """Say in one line what is wrong, and exit. Bad input is said once a machine, a failure by the process it hit."""
    rank = "" if is_main_process() else f"process {os.environ['RANK']}: "
    if not rank or status != 2 or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"{Path(sys.argv[0]).name}: error: {rank}{' '.join(message.split())}", file=sys.stderr)
    leave(status)


def leave(status: int) -> NoReturn:
    """Exit; from a launch at once, since gloo's threads may abort while Python ends."""
    if is_launched():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def run(main: Callable[[], None]) -> None:
    """Run a script: one line and an exit status in place of a traceback where the user can mend it.

    2: bad input. 1: the run could not go on. 130 and 143: Ctrl-C and SIGTERM.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        main()
        leave(0)
    except InputError as error:
        fail(str(error), 2)
    except PeerStoppedError as error:
        say(str(error))
        leave(1)
    except RunError as error:
        fail(str(error), 1)
    except OSError as error:
        fail(describe(error), 1)
    except KeyboardInterrupt as interrupt:
        say(str(interrupt) or "stopped; run the same command again")
        leave(143 if isinstance(interrupt, Terminated) else 130)
    except Exception:  # a fault of the program: all that Python would tell, too
        traceback.print_exc()
        leave(1)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def describe(error: OSError) -> str:
    """Return an operating system's error as one line that names the file."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)


@contextlib.contextmanager
def telling_progress(folder: "OutputFolder", overwrite: bool) -> Iterator[None]:
    """Add to a stop's or a failure's message how many items are done and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, OSError, RunError) as error:
        if overwrite and not folder.has_begun:
            raise  # what is in the folder is the earlier run's
        progress = _progress(folder)
        how = "the same command without --overwrite goes on" if overwrite else "the same command goes on"
        if isinstance(error, KeyboardInterrupt):
            raise type(error)(f"stopped: {progress}; {how}") from error
        if isinstance(error, OSError):
            raise RunError(f"{describe(error)}; {progress}; {how}") from error
        if isinstance(error, PeerStoppedError):
            raise PeerStoppedError(f"{error}; {progress}; {how}") from error
        raise RunError(f"{error}; {progress}") from error


def _progress(folder: "OutputFolder") -> str:
    try:
        return f"{folder.count_done()} of {folder.num_items} items are done"
    except OSError:
        return f"{folder.root} cannot be read"


def choose_device(requested: str | None) -> str:
    """Return the device to draw on: the requested one, else cuda, mps or cpu, whichever is there first.

    Raises:
        InputError: the requested device is not there.
    """
    if requested is None:
        import torch

        if torch.cuda.is_available():
            return "cuda"
        if torch.backends.mps.is_available():
            return "mps"
        say("no GPU seen: drawing on the CPU")
        return "cpu"
    if requested == "mps" and not _has_mps():
        raise InputError("--device: mps is not there; try --device=cpu")
    if requested.startswith("cuda"):
        number = int(requested.partition(":")[2] or 0)
        for count_devices in (_count_devices_by_driver, _count_devices_by_torch):  # the quick one first
            count = count_devices()
            if number >= count:
                raise InputError(f"--device: {requested} is not there, CUDA devices seen: {count}; try --device=cpu")
    return requested


def _has_mps() -> bool:
    if sys.platform != "darwin":
        return False
    import torch

    return torch.backends.mps.is_available()


def _count_devices_by_driver() -> int:
    """Ask NVIDIA's driver, which answers in milliseconds where importing torch takes seconds."""
    try:
        driver = ctypes.CDLL("nvcuda" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        # one of AMD's, which torch calls cuda too, or a driver that only torch's own paths lead to
        may_be_there = sys.platform != "linux" or any(Path(file).exists() for file in ("/dev/kfd", "/dev/nvidiactl"))
        return _count_devices_by_torch() if may_be_there else 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) == 0:
        driver.cuDeviceGetCount(ctypes.byref(count))
    return count.value


def _count_devices_by_torch() -> int:
    import torch

    return torch.cuda.device_count()


def make_output_dir(path: Path) -> None:
    """Make a folder where there is none.

    Raises:
        InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir: {path} cannot be made: {error.strerror}") from error


def options_that_shape_the_data(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Return what a data set depends on, as JSON values: a run may go on only where all of it is the same."""
    from .record import fingerprint_checkpoint, fingerprint_model

    return {
        "seed": options.seed,
        "alpha": options.alpha,
        "guidance_scale": options.guidance_scale,
        "guidance_interval": list(options.guidance_interval),
        "num_inference_steps": options.num_inference_steps,
        "resolution": options.resolution,
        "dtype": _dtype_name(options, device),
        "prompt": options.prompt,
        "meta_class": options.classes.meta_class,
        "class_names": list(options.classes.names),
        "model": fingerprint_model(options.model, prefers_half=_dtype_name(options, device) == "float16"),
        "checkpoint": fingerprint_checkpoint(options.ckpt_path),
    }


def compare_with_main_process(own: dict[str, Any], main: dict[str, Any]) -> None:
    """Refuse to draw other pictures than the main process of the launch, on a machine with other files, say.

    Raises:
        InputError: an option differs.
    """
    from .record import describe_differences

    differences = describe_differences(main, own)
    if differences:
        raise InputError(f"the main process has another {differences}; give all the same command and files")


def describe_run(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Return what is worth knowing of a run beside what shapes the data; `command` goes on with it."""
    return {
        "command": ["python", *(argument for argument in sys.argv if argument != "--overwrite")],
        "data_name": options.data_name,
        "model": options.model,
        "ckpt_path": str(options.ckpt_path),
        "batch_size": options.batch_size,
        "device": device,
        "compile": options.compile,
    }


def _dtype_name(options: argparse.Namespace, device: str) -> str:
    return options.dtype or ("float16" if device.startswith("cuda") else "float32")
