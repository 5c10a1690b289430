"""Measures the time per item of data sets of several sizes: to check a folder, write into it, and load from it.

benchmark.py --scale prints these tables. The pictures are noise, without a model.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from noisecutmix import AugmentedDataset
from noisecutmix.folder import OutputFolder
from noisecutmix.plan import Plan

SIZES = (1_000, 100_000, 1_000_000)
RESOLUTIONS = (64, 512)
CHECKED = 400  # items
REPEATS = 5
CLASS_NAMES = [f"class {label}" for label in range(10)]

OPEN_DATA_SET = """
import re, sys, time
from pathlib import Path
from noisecutmix import AugmentedDataset

def memory():  # private memory of this process, in MB
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(map(int, re.findall(r"Private_(?:Clean|Dirty): +([0-9]+) kB", text))) / 1024

before, start = memory(), time.perf_counter()
data_set = AugmentedDataset(sys.argv[1])
print(time.perf_counter() - start, memory() - before)
"""


def measure_scale(folder: Path | None = None) -> str:
    """Return the tables as text."""
    with tempfile.TemporaryDirectory(dir=folder) as root:
        checks = [measure_checking(Path(root) / str(resolution), resolution) for resolution in RESOLUTIONS]
        sizes = [measure_size(Path(root) / f"of_{size}", size) for size in SIZES]
    lines = [
        "checking a folder, ms per item (median of five, files in the cache)",
        f"{'':>12}{'quick':>10}{'--verify':>10}{'ratio':>8}",
    ]
    for resolution, quick, thorough in checks:
        lines.append(f"{resolution:>5}x{resolution:<6}{quick:>10.3f}{thorough:>10.3f}{thorough / quick:>7.0f}x")
    lines += [
        "",
        "one folder, by the number of items; us per item",
        f"{'items':>10}" + "".join(f"{name:>12}" for name in sizes[0][1]),
    ]
    for size, costs in sizes:
        lines.append(f"{size:>10,}" + "".join(f"{cost:>12.1f}" for cost in costs.values()))
    return "\n".join(lines)


def measure_checking(root: Path, resolution: int) -> tuple[int, float, float]:
    """Return (resolution, ms per item of the quick check, ms per item of every pixel), measured alternately."""
    folder = begin(root, CHECKED, resolution)
    rng = np.random.default_rng(0)
    for item in folder.plan.items(CHECKED):
        folder.write(item, Image.fromarray(smooth_noise(rng, resolution)))
    indices = range(CHECKED)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        for every_pixel in (False, True):
            seconds[every_pixel].append(timed(lambda: folder.find_missing(indices, every_pixel)))  # noqa: B023
    quick, thorough = (1000 * statistics.median(values) / CHECKED for values in seconds)
    return resolution, quick, thorough


def measure_size(root: Path, size: int) -> tuple[int, dict[str, float]]:
    """Return (size, microseconds per item of each operation)."""
    folder = begin(root, size, 8)
    image = Image.new("RGB", (8, 8))
    with ThreadPoolExecutor(8) as pool:
        write = timed(lambda: list(pool.map(lambda item: folder.write(item, image), folder.plan.items(size))))
    costs = {"write": write, "check": timed(lambda: folder.find_missing(range(size)))}
    costs["finish"] = timed(folder.finish)
    costs["look"] = timed(folder.is_complete)
    costs["open"], _ = open_data_set(root)
    costs["load"] = load_some(root) * size / 1000
    return size, {name: 1e6 * seconds / size for name, seconds in costs.items()}


def load_some(root: Path) -> float:
    """Return the seconds to load a thousand items in random order."""
    data_set = AugmentedDataset(root)
    indices = np.random.default_rng(0).integers(len(data_set), size=1000).tolist()
    return timed(lambda: [data_set[index] for index in indices])


def open_data_set(root: Path) -> tuple[float, float]:
    """Return (seconds, MB of private memory) that a new process needs to open a data set."""
    output = subprocess.run(
        [sys.executable, "-c", OPEN_DATA_SET, str(root)], capture_output=True, text=True, check=True
    ).stdout
    seconds, megabytes = map(float, output.split())
    return seconds, megabytes


def begin(root: Path, num_items: int, resolution: int) -> OutputFolder:
    root.mkdir()
    folder = OutputFolder(root, Plan(0, len(CLASS_NAMES), 1.0, resolution), num_items, CLASS_NAMES, {})
    folder.begin({"command": sys.argv})
    return folder


def smooth_noise(rng: np.random.Generator, side: int) -> np.ndarray:
    """Return pixels (side, side, 3) that a PNG compresses about as well as a photograph."""
    coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)).resize((side, side))
    return np.uint8(np.clip(np.asarray(coarse) + rng.normal(0, 6, (side, side, 3)), 0, 255))


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
