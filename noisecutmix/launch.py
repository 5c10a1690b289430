"""The place of this process among those that were started with it, and its device. Imports torch only for a device.

Launchers tell it in environment variables. Of each list below, the first variable that is set counts.
"""

import os

from .errors import InputError
from .ranges import default_dtype

# of accelerate and torchrun, of Open MPI, of Slurm
RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
COUNT = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")
# of the tasks of a job array of Slurm
ARRAY_COUNT, ARRAY_INDEX, ARRAY_FIRST = "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN"
# the number of processes; accelerate takes the first four for a launch
GROUP_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
GROUP = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what processes need to find each other


def rank_and_count() -> tuple[int, int]:
    """Return this process's number, from 0, among the processes that were started together, and their number.

    They are read from the variables of launchers, and of Slurm's job arrays. A process without them is 0 of 1.
    """
    count = max(_read_number(COUNT, 1), 1)
    rank = _read_number(RANK, 0) % count
    tasks = max(_read_number([ARRAY_COUNT], 1), 1)
    task = _read_number([ARRAY_INDEX], 0) - _read_number([ARRAY_FIRST], 0)
    return task % tasks * count + rank, tasks * count


def rank_in_launch() -> int:
    """Return this process's number among those of its launch, or of its task in a job array."""
    return _read_number(RANK, 0) % max(_read_number(COUNT, 1), 1)


def is_first_process() -> bool:
    """Return whether this process prints: the first of its launch, or of its task in a job array."""
    return rank_in_launch() == 0


def is_first_of_machine() -> bool:
    """Return whether no other process of the launch on this machine comes before this one."""
    return _read_number(LOCAL_RANK, 0) == 0 or _read_number(COUNT, 1) == 1


def count_group() -> int:
    """Return how many processes accelerate launch or torchrun has started together; 1 without a launch.

    Raises:
        InputError: only some of a launch's variables are there. Accelerate would wait for the other processes for ever.
    """
    signs = [name for name in GROUP_SIZES if os.environ.get(name, "1") != "1"]
    signs += ["LOCAL_RANK"] if "LOCAL_RANK" in os.environ else []
    if not signs:
        return 1
    for name in GROUP:
        value = os.environ.get(name, "")
        if not (value if name == "MASTER_ADDR" else value.isdecimal()):
            state = f"is {value!r}" if name in os.environ else "is not set"
            found = f"the environment variable {signs[0]} is {os.environ[signs[0]]!r}, but {name} {state}"
            remedy = f"start several processes with accelerate launch or torchrun, or unset {signs[0]} for one"
            raise InputError(f"{found}: {remedy}")
    return int(os.environ["WORLD_SIZE"])


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
    elif requested == "mps" and not has_mps:
        raise InputError("mps is not there; try --device=cpu", "device")
    elif requested.startswith("cuda") and int(requested.partition(":")[2] or 0) >= count:
        raise InputError(f"{requested} is not there, CUDA devices seen: {count}; try --device=cpu", "device")
    if requested == "cuda" and _read_number(COUNT, 1) > 1:
        return f"cuda:{_read_number(LOCAL_RANK, 0) % count}"
    return requested


def choose_training_dtype(device: str, requested: str | None) -> str:
    """Return the dtype of a training; None is the device's default. Raises InputError if they do not fit."""
    dtype = requested or default_dtype(device)
    if dtype == "float16" and not device.startswith("cuda"):
        raise InputError(f"float16 needs cuda; use bfloat16 or float32 on {device}", "dtype")
    return dtype


def _read_number(names: "list[str] | tuple[str, ...]", default: int) -> int:
    text = next((os.environ[name] for name in names if name in os.environ), "")
    return int(text) if text.isdecimal() else default
