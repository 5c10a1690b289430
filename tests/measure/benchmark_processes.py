"""Measures how well processes that do not talk to each other share a data set.

benchmark.py --processes prints this table. Eight processes draw with a simulated generator, one of them three times
slower than the others. The ideal time is that of the sum of their speeds, each from its own start on; the slowest
one's last block comes on top.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PROCESSES, SLOWDOWN = 8, 3
SECONDS_PER_BLOCK = 1.0  # so long that two cores suffice for eight processes; on a GPU a block takes longer
LENGTHS = (100, 400, 1600)  # blocks
BATCH_SIZE = 2
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


def draw(num_blocks: int, way: str) -> tuple[float, float, int]:
    """Return the seconds from the first start to the last end, the ideal ones, and the number of drawn blocks."""
    with tempfile.TemporaryDirectory() as folder:
        script = str(Path(__file__).resolve().parent.parent / "simulated.py")
        flags = ["--data_name=digits", "--device=cpu", f"--batch_size={BATCH_SIZE}", f"--output_dir={folder}/out"]
        flags += [f"--num_aug={num_blocks * BATCH_SIZE}"]
        processes = []
        seconds_per_block = [SECONDS_PER_BLOCK * (SLOWDOWN if rank == 0 else 1) for rank in range(PROCESSES)]
        for rank, seconds in enumerate(seconds_per_block):
            variables = {"RANK": str(rank), "WORLD_SIZE": str(PROCESSES)} if way == BY_RANK else {}
            environment = {**os.environ, **variables, "SECONDS_PER_BLOCK": str(seconds), "OMP_NUM_THREADS": "1"}
            processes.append(
                subprocess.Popen(
                    [sys.executable, script, *flags],
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
