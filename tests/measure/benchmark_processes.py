"""Measures how well processes that do not talk to each other share a data set.

benchmark.py --processes prints this table. Eight processes draw with a simulated generator, one of them three times
slower than the others. The ideal time is that of the sum of their speeds, each from its own start on; the slowest
one's last block comes on top. Then two processes draw the digits on this machine's CPU, for each way in which OpenMP's
threads may wait.
"""

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from noisecutmix import script

PROCESSES, SLOWDOWN = 8, 3
SECONDS_PER_BLOCK = 1.0  # so long that two cores suffice for eight processes; on a GPU a block takes longer
LENGTHS = (100, 400, 1600)  # blocks
BATCH_SIZE = 2
ROOT = Path(__file__).resolve().parents[2]
PICTURES = 48
DRAW = f"""
from noisecutmix import NoiseCutMixGenerator
generator = NoiseCutMixGenerator("cpu", "digits")
items = list(generator.plan.items({PICTURES}))
generator.draw(items[:8])
print("ready", flush=True)
input()
for start in range(0, {PICTURES}, 8):
    generator.draw(items[start : start + 8])
"""
BY_RANK, BY_HAND = "RANK and WORLD_SIZE", "no variables"


def measure_processes() -> str:
    """Return the table as text."""
    headings = f"{'started with':<22}{'blocks':>8}{'ideal (s)':>12}{'measured (s)':>14}{'ratio':>8}{'drawn twice':>13}"
    lines = [headings]
    for way in (BY_RANK, BY_HAND):
        for num_blocks in LENGTHS:
            seconds, ideal, drawn = draw(num_blocks, way)
            numbers = f"{num_blocks:>8}{ideal:>12.1f}{seconds:>14.1f}{seconds / ideal:>8.3f}{drawn - num_blocks:>13}"
            lines.append(f"{way:<22}{numbers}")
    return "\n".join(lines)


def measure_waiting(runs: int = 3) -> str:
    """Return the table of pictures a second, medians, by one process and by two at the same time, as text."""
    ways = {"busily, by default": {}, "passively, in the scripts": {"OMP_WAIT_POLICY": "PASSIVE"}}
    rates: dict[tuple[str, int], list[float]] = {}
    for _ in range(runs):
        for way, settings in ways.items():
            for count in (1, 2):
                rates.setdefault((way, count), []).append(draw_at_once(count, settings))
    lines = [f"{'threads wait':<28}{'one process':>14}{'two':>8}"]
    for way in ways:
        one, two = (statistics.median(rates[way, count]) for count in (1, 2))
        lines.append(f"{way:<28}{one:>14.1f}{two:>8.1f}")
    return "\n".join(lines)


def draw_at_once(count: int, settings: dict[str, str]) -> float:
    """Return the pictures a second of processes that draw at the same time, after they have started."""
    unset = ("OMP_NUM_THREADS", *script.WAIT_SETTINGS)
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"PYTHONPATH": str(ROOT), **settings}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", DRAW], env=environment, **pipes) for _ in range(count)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    start = time.perf_counter()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
    return count * PICTURES / (time.perf_counter() - start)


def draw(num_blocks: int, way: str) -> tuple[float, float, int]:
    """Return the seconds from the first start to the last end, the ideal ones, and the number of drawn blocks."""
    with tempfile.TemporaryDirectory() as folder:
        simulated = str(ROOT / "tests" / "simulated.py")
        flags = ["--data_name=digits", "--device=cpu", f"--batch_size={BATCH_SIZE}", f"--output_dir={folder}/out"]
        flags += [f"--num_aug={num_blocks * BATCH_SIZE}"]
        processes = []
        seconds_per_block = [SECONDS_PER_BLOCK * (SLOWDOWN if rank == 0 else 1) for rank in range(PROCESSES)]
        for rank, seconds in enumerate(seconds_per_block):
            variables = {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES)} if way == BY_RANK else {}
            environment = {**os.environ, **variables, "SECONDS_PER_BLOCK": str(seconds), "OMP_NUM_THREADS": "1"}
            processes.append(
                subprocess.Popen(
                    [sys.executable, simulated, *flags],
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        errors = [process.communicate()[1] for process in processes]
    ends = [re.search(r"drew (\d+) blocks from ([\d.]+) to ([\d.]+)", text) for text in errors]
    if None in ends:
        raise SystemExit(errors[ends.index(None)])
    blocks, starts, stops = zip(*(map(float, end.groups()) for end in ends if end))
    speeds = [1 / seconds for seconds in seconds_per_block]  # blocks a second
    lost = sum((start - min(starts)) * speed for start, speed in zip(starts, speeds))  # blocks, before the starts
    ideal = (num_blocks + lost) / sum(speeds) + max(seconds_per_block)
    return max(stops) - min(starts), ideal, int(sum(blocks))
