"""This process among the processes of its launch (accelerate launch, torchrun): its rank, device and messages.

Imports no torch where there is one process, so that a folder that is refused is refused at once.
"""

import _thread
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta
from types import TracebackType
from typing import Any

from .errors import InputError, PeerStoppedError, RunError, first_line

LONGEST_START = 60  # seconds until all processes of a launch have met
LONGEST_SILENCE = 30  # seconds without a sign of life, after which a process counts as gone
HEARTBEAT = 1.0  # seconds between two signs of life
MAIN_PROCESS_ENDED = "process 0 of this launch, the main one, has ended"
MAIN_PROCESS_SILENT = "process 0 of this launch, the main one, does not answer"


def read_number(name: str) -> int:
    """Return a number that a launcher gives its processes, RANK, LOCAL_RANK or WORLD_SIZE; 0 where there is none."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def say(message: str) -> None:
    """Print one line on standard error, above a bar that may be there, from the main process of a launch alone."""
    if read_number("RANK") == 0:
        from tqdm import tqdm

        tqdm.write(message, file=sys.stderr)


def choose_device(requested: str | None) -> str:
    """Return the device of this process: the requested one, else cuda, mps or cpu, whichever is there first.

    The processes of a launch share "cuda": each gets a GPU of its own.

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
            say("no GPU seen: drawing on the CPU")
    elif requested == "mps" and not has_mps:
        raise InputError("`device`: mps is not there; try `device=cpu`")
    elif requested.startswith("cuda") and int(requested.partition(":")[2] or 0) >= count:
        raise InputError(f"`device`: {requested} is not there, CUDA devices seen: {count}; try `device=cpu`")
    if requested == "cuda" and read_number("WORLD_SIZE") > 1:
        return f"cuda:{read_number('LOCAL_RANK') % count}"
    return requested


class Launch:
    """`rank` of `count` processes; a process alone is 0 of 1.

    They talk through a key-value store that process 0 or the launcher holds. Each one posts a sign of life every
    second, and its reason when it fails, so that all others stop soon after: their main threads get a SIGTERM, and
    leaving the context raises PeerStoppedError. Ctrl-C ends every wait.

    Raises:
        InputError: the environment describes no launch.
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
            self._talker = ThreadPoolExecutor(1)  # what waits for the network does not wait in the main thread
            try:
                self._store = self._wait_for(self._talker.submit(_connect, self.is_main), LONGEST_START + 5)
                self._gather_by("start", "here", LONGEST_START)
            except RuntimeError as error:
                where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                raise RunError(
                    f"the processes of this launch do not reach each other at {where}: {first_line(error)}; "
                    "check the address, and the output of the other processes"
                ) from error
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Say goodbye: the main process, which may hold the store, waits for the others."""
        if self.count == 1:
            return
        try:
            if error is None:
                self.wait_for_others()
            elif not self._stop_reason:
                self._left.set()  # the thread that watches is not to take this process's own word for another's
                self._ask("set", "stopped", f"process {self.rank} of this launch stopped: {first_line(error)}")
                time.sleep(2 * HEARTBEAT if self.is_main else 0)  # until the others have read it
        except RuntimeError:
            if error is None:
                raise
        finally:
            self._left.set()
        if self._stop_reason and error is not None:
            # a launcher stops all processes once one has ended: let the one that failed say why before
            time.sleep(0 if self.is_main else 3 * HEARTBEAT)
            raise PeerStoppedError(self._stop_reason) from error

    def broadcast(self, value: Any) -> Any:
        """Return the main process's `value`, which JSON can hold, in every process.

        Raises:
            PeerStoppedError: another process stopped.
        """
        if self.count == 1:
            return value
        self._num_messages += 1
        key = f"message/{self._num_messages}"
        if self.is_main:
            self._ask("set", key, json.dumps(value))
            return value
        return json.loads(self._wait_for_key(key))

    def gather(self, value: Any) -> list[Any]:
        """Return every process's `value`, which JSON can hold, by rank, in every process.

        Raises:
            PeerStoppedError: another process stopped.
        """
        if self.count == 1:
            return [value]
        self._num_messages += 1
        return self._gather_by(f"message/{self._num_messages}", value)

    def wait_for_others(self, while_waiting: Callable[[], None] = lambda: None) -> None:
        """Return, in the main process, once every other one is done; in the others at once.

        Raises:
            PeerStoppedError: another process stopped.
        """
        if self.count == 1:
            return
        self._ask("set", f"done/{self.rank}", "")
        for peer in range(1, self.count) if self.is_main else ():
            self._wait_for_key(f"done/{peer}", while_waiting=while_waiting)

    def connect_torch(self, backend: str) -> None:
        """Let the processes meet in torch.distributed, too, to exchange tensors; does nothing for a process alone."""
        if self.count > 1:
            from torch import distributed

            store = _connect(False)
            longest = timedelta(days=1)  # one may encode pictures for hours; who stops is known sooner, from the store
            distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.count, timeout=longest)

    def check_others(self) -> None:
        """Raise PeerStoppedError where another process stopped, or the store has not answered for too long."""
        if self.count > 1 and not self._stop_reason and time.monotonic() - self._last_answer > LONGEST_SILENCE:
            self._stop_reason = MAIN_PROCESS_SILENT
        if self._stop_reason:
            raise PeerStoppedError(self._stop_reason)

    def _gather_by(self, key: str, value: Any, longest: float = float("inf")) -> list[Any]:
        self._ask("set", f"{key}/{self.rank}", json.dumps(value))
        return [json.loads(self._wait_for_key(f"{key}/{rank}", longest)) for rank in range(self.count)]

    def _wait_for_key(
        self, key: str, longest: float = float("inf"), while_waiting: Callable[[], None] = lambda: None
    ) -> bytes:
        end = time.monotonic() + longest
        while not self._ask("check", [key]):
            self.check_others()
            while_waiting()
            if time.monotonic() > end:
                raise RuntimeError(f"process {key.rpartition('/')[2]} has not come within {longest:.0f} s")
            time.sleep(0.1)
        content: bytes = self._ask("get", key)
        return content

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Return the store's answer. Raises PeerStoppedError where it has gone."""
        try:
            return self._wait_for(self._talker.submit(getattr(self._store, method), *arguments), LONGEST_SILENCE)
        except PeerStoppedError:
            raise
        except RuntimeError as error:
            raise PeerStoppedError(self._stop_reason or MAIN_PROCESS_ENDED) from error

    def _wait_for(self, answer: Future[Any], longest: float) -> Any:
        for _ in range(round(longest / 0.2)):  # one long wait would be deaf to signals on Windows
            if wait([answer], timeout=0.2).done:
                return answer.result()
        raise PeerStoppedError(MAIN_PROCESS_SILENT)

    def _watch(self) -> None:
        """Show that this process lives; stop the main thread once another process stops or falls silent."""
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
                    sign = store.get(f"alive/{peer}") if store.check([f"alive/{peer}"]) else b""
                    if sign != seen[peer][0]:
                        seen[peer] = (sign, now)
                    elif now - seen[peer][1] > LONGEST_SILENCE and not store.check([f"done/{peer}"]):
                        return self._stop(
                            f"process {peer} of this launch has given no sign of life for {LONGEST_SILENCE} s"
                        )
                self._last_answer = now
        except RuntimeError:
            self._stop(MAIN_PROCESS_ENDED)

    def _stop(self, reason: str) -> None:
        if not self._left.is_set():
            self._stop_reason = reason
            _thread.interrupt_main(signal.SIGTERM)


def _read_count() -> int:
    """Return the number of processes, 1 where there is no launch.

    Raises:
        InputError: the variables by which a launcher describes a launch are incomplete.
    """
    variables = {name: os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")}
    if variables["WORLD_SIZE"] in (None, "1"):
        return 1
    wrong = [name for name in ("WORLD_SIZE", "RANK", "MASTER_PORT") if not (variables[name] or "").isdecimal()]
    wrong += [] if variables["MASTER_ADDR"] else ["MASTER_ADDR"]
    if not wrong and int(variables["RANK"] or 0) >= int(variables["WORLD_SIZE"] or 0):
        wrong = ["RANK"]
    if wrong:
        state = f"is {variables[wrong[0]]!r}" if variables[wrong[0]] is not None else "is not set"
        raise InputError(
            f"the environment variable {wrong[0]} {state}, but WORLD_SIZE is {variables['WORLD_SIZE']!r}: "
            "start several processes with accelerate launch or torchrun, or unset WORLD_SIZE for one"
        )
    return int(variables["WORLD_SIZE"] or 1)


def _connect(holds_store: bool) -> Any:
    """Return a client of the launch's store; torchrun's agent holds it where there is one."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # what a lost connection means is said by this program
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # public, and not in its __all__

    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=holds_store and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=timedelta(seconds=LONGEST_START),
        wait_for_workers=False,
    )
    return PrefixStore(f"noisecutmix/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
