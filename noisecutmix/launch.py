"""The processes of one launch (accelerate launch, torchrun): rank, device, and messages between them.

Imports torch only where it is needed, so that bad input is refused at once.
"""

import _thread
import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from types import TracebackType
from typing import Any

from .errors import InputError, PeerStoppedError, RunError, first_line

LONGEST_START = 60  # seconds until all processes of a launch have met
LONGEST_SILENCE = 30  # seconds without a heartbeat, after which a process counts as lost
HEARTBEAT = 1.0  # seconds between two heartbeats
MAIN_PROCESS_ENDED = "process 0 of this launch, the main one, has ended"
MAIN_PROCESS_SILENT = "process 0 of this launch, the main one, does not answer"


def read_number(name: str) -> int:
    """Return the environment variable RANK, LOCAL_RANK or WORLD_SIZE, which a launcher sets; 0 if it is not set."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def say(message: str) -> None:
    """Print one line on standard error, above a progress bar; only the main process of a launch prints."""
    if read_number("RANK") == 0:
        from tqdm import tqdm

        tqdm.write(message, file=sys.stderr)


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
    if requested == "cuda" and read_number("WORLD_SIZE") > 1:
        return f"cuda:{read_number('LOCAL_RANK') % count}"
    return requested


class Launch:
    """This process among the processes of a launch: `rank` of `count`; without a launcher, rank 0 of 1.

    As a context manager, it connects the processes through a key-value store in process 0 or in the launcher. Each
    process writes a heartbeat every second, and the reason if it fails. All others then stop: their main threads get a
    SIGTERM, and leaving the context raises PeerStoppedError. Ctrl-C interrupts every wait.

    Raises:
        InputError: the environment variables do not describe a launch.
        RunError: the processes do not reach each other within a minute.
    """

    def __init__(self) -> None:
        self.count = _read_count()
        self.rank = read_number("RANK")
        self._stop_reason = ""
        self._num_messages = 0
        self._left = threading.Event()
        self._last_answer = float("inf")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> "Launch":
        if self.count > 1:
            self._network = ThreadPoolExecutor(1)  # so that signals can interrupt the main thread
            try:
                self._store = self._wait_for(self._network.submit(_connect, self.is_main), LONGEST_START + 5)
                self.gather("here", LONGEST_START)
            except RuntimeError as error:
                where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                raise RunError(
                    f"the processes of this launch do not reach each other at {where}: {first_line(error)}; "
                    "check the address, and the output of the other processes"
                ) from error
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Tell the others how this process ends; the main process, which may hold the store, waits for them."""
        if self.count == 1:
            return
        try:
            if error is None:
                self.wait_for_others()
            elif not self._stop_reason:
                self._left.set()  # so that this process does not take its own message for another's
                self._ask("set", "stopped", f"process {self.rank} of this launch stopped: {first_line(error)}")
                time.sleep(2 * HEARTBEAT if self.is_main else 0)  # until the others have read it
        except RuntimeError:
            if error is None:
                raise
        finally:
            self._left.set()
        if self._stop_reason and error is not None:
            # a launcher kills all processes once one has ended: the one that failed has to print its reason first
            time.sleep(0 if self.is_main else 3 * HEARTBEAT)
            raise PeerStoppedError(self._stop_reason) from error

    def broadcast(self, value: Any) -> Any:
        """Return the main process's `value`, a JSON value, in every process; as in `gather`, all processes wait.

        Raises:
            PeerStoppedError: another process stopped.
        """
        return self.gather(value)[0]

    def gather(self, value: Any, longest: float = float("inf")) -> list[Any]:
        """Return the `value` of every process, a JSON value, in the order of ranks, in every process.

        Args:
            value: this process's own.
            longest: seconds to wait for each of the others.

        Raises:
            PeerStoppedError: another process stopped.
            RuntimeError: another process did not come in time.
        """
        if self.count == 1:
            return [value]
        self._num_messages += 1
        key = f"message/{self._num_messages}"
        self._ask("set", f"{key}/{self.rank}", json.dumps(value))
        return [json.loads(self._wait_for_key(f"{key}/{rank}", longest)) for rank in range(self.count)]

    def wait_for_others(self) -> None:
        """Return, in the main process, once every other one is done; in the others at once.

        Raises:
            PeerStoppedError: another process stopped.
        """
        if self.count == 1:
            return
        self._ask("set", f"done/{self.rank}", "")
        for peer in range(1, self.count) if self.is_main else ():
            self._wait_for_key(f"done/{peer}")

    def connect_torch(self, backend: str) -> None:
        """Connect the processes in torch.distributed, too, to exchange tensors; without a launch, do nothing."""
        if self.count > 1:
            from torch import distributed

            store = _connect(False)
            longest = timedelta(days=1)  # encoding may take hours; a process that stops is noticed in this class
            distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.count, timeout=longest)

    def check_others(self) -> None:
        """Raise PeerStoppedError if another process stopped, or the store has not answered for too long."""
        if not self._stop_reason and time.monotonic() - self._last_answer > LONGEST_SILENCE:
            self._stop_reason = MAIN_PROCESS_SILENT
        if self._stop_reason:
            raise PeerStoppedError(self._stop_reason)

    def _wait_for_key(self, key: str, longest: float = float("inf")) -> Any:
        end = time.monotonic() + longest
        while not self._ask("check", [key]):
            self.check_others()
            if time.monotonic() > end:
                raise RuntimeError(f"process {key.rpartition('/')[2]} has not connected within {longest:.0f} s")
            time.sleep(0.1)
        return self._ask("get", key)

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Return the result of one of the store's methods, or raise PeerStoppedError if the store is lost."""
        try:
            return self._wait_for(self._network.submit(getattr(self._store, method), *arguments), LONGEST_SILENCE)
        except PeerStoppedError:
            raise
        except RuntimeError as error:
            raise PeerStoppedError(self._stop_reason or MAIN_PROCESS_ENDED) from error

    def _wait_for(self, answer: Future[Any], longest: float) -> Any:
        for _ in range(round(longest / 0.2)):  # on Windows, no signal interrupts a single long wait
            if wait([answer], timeout=0.2).done:
                return answer.result()
        raise PeerStoppedError(MAIN_PROCESS_SILENT)

    def _watch(self) -> None:
        """Write this process's heartbeat; stop the main thread once another process stops or is lost."""
        self._last_answer = started = time.monotonic()
        peers = range(1, self.count) if self.is_main else (0,)
        seen = dict.fromkeys(peers, (b"", started))
        try:
            store = _connect(False)
            while not self._left.wait(HEARTBEAT):
                now = time.monotonic()
                store.set(f"alive/{self.rank}", str(now))
                if store.check(["stopped"]):
                    return self._stop(store.get("stopped").decode())
                for peer in peers:
                    heartbeat = store.get(f"alive/{peer}") if store.check([f"alive/{peer}"]) else b""
                    if heartbeat != seen[peer][0]:
                        seen[peer] = (heartbeat, now)
                    elif now - seen[peer][1] > LONGEST_SILENCE and not store.check([f"done/{peer}"]):
                        return self._stop(f"process {peer} of this launch has not answered for {LONGEST_SILENCE} s")
                self._last_answer = now
        except RuntimeError:
            self._stop(MAIN_PROCESS_ENDED)

    def _stop(self, reason: str) -> None:
        if not self._left.is_set():
            self._stop_reason = reason
            _thread.interrupt_main(signal.SIGTERM)


def _read_count() -> int:
    """Return the number of processes, 1 without a launch.

    Raises:
        InputError: a variable that a launcher sets is missing or wrong.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size == "1":
        return 1
    is_valid = {
        "WORLD_SIZE": world_size.isdecimal(),
        "RANK": os.environ.get("RANK", "").isdecimal() and read_number("RANK") < read_number("WORLD_SIZE"),
        "MASTER_ADDR": bool(os.environ.get("MASTER_ADDR")),
        "MASTER_PORT": os.environ.get("MASTER_PORT", "").isdecimal(),
    }
    for name, valid in is_valid.items():
        if not valid:
            state = f"is {os.environ[name]!r}" if name in os.environ else "is not set"
            raise InputError(
                f"the environment variable {name} {state}, but WORLD_SIZE is {world_size!r}: "
                "start several processes with accelerate launch or torchrun, or unset WORLD_SIZE for one"
            )
    return int(world_size)


def _connect(holds_store: bool) -> Any:
    """Return a client of the launch's store, after creating the store if `holds_store` and torchrun holds none."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # this package reports a lost connection itself
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, and not in its __all__

    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=holds_store and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=timedelta(seconds=LONGEST_START),
        wait_for_workers=False,
    )
    return PrefixStore(f"noisecutmix/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
