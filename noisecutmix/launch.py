"""The processes of one launch (accelerate launch, torchrun), which share the work of a data set.

Imports no torch where there is one process, so that a folder that is refused is refused at once.
"""

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from .errors import PeerStoppedError, RunError, first_line

LONGEST_WAIT = timedelta(days=365)
PEER_STOPPED = "another process of this launch stopped"


def is_launched() -> bool:
    """Return whether this is one process of several."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def is_main_process() -> bool:
    """Return whether this is the process of a launch that prints; alone it is."""
    return int(os.environ.get("RANK", 0)) == 0


def say(message: str) -> None:
    """Print one line on standard error, above a bar that may be there, from one process of a launch."""
    if is_main_process():
        from tqdm import tqdm

        tqdm.write(message, file=sys.stderr)


class Processes:
    """This process's place in the launch: `rank` of `count`, one process alone being 0 of 1.

    They talk over gloo, on the CPU, and only at the start and the end of a run: the pictures are independent.

    Raises:
        RunError: the processes do not reach each other.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        if self.count > 1:
            from torch import distributed

            try:
                distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
            except RuntimeError as error:
                reason = first_line(error)
                raise RunError(f"the processes of this launch do not reach each other: {reason}") from error

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def own_device(self, device: str) -> str:
        """Return this process's own GPU where the launch shares "cuda", else `device` as it is."""
        if device == "cuda" and self.count > 1:
            import torch

            return f"cuda:{int(os.environ.get('LOCAL_RANK', self.rank)) % torch.cuda.device_count()}"
        return device

    def broadcast(self, value: Any) -> Any:
        """Return process 0's `value` in every process.

        Raises:
            PeerStoppedError: another process stopped.
        """
        if self.count == 1:
            return value
        from torch import distributed

        values = [value]
        try:
            distributed.broadcast_object_list(values)
        except RuntimeError as error:
            raise PeerStoppedError(PEER_STOPPED) from error
        return values[0]

    def wait(self, while_waiting: Callable[[], None] = lambda: None) -> None:
        """Return once every process is here, calling `while_waiting` twice a second.

        Raises:
            PeerStoppedError: another process stopped.
        """
        if self.count == 1:
            return
        from torch import distributed

        try:
            arrived = distributed.barrier(async_op=True)
            while not arrived.is_completed():
                while_waiting()
                time.sleep(0.5)
            arrived.wait()
        except RuntimeError as error:
            raise PeerStoppedError(PEER_STOPPED) from error
