"""How fast photos are read: this version, an earlier one, and timm's own loader with the same transforms, side by side.

uv run --all-extras --group dev tests/measure/benchmark_photos.py --before=/path/to/an/earlier/checkout

Photos are drawn with the spectrum of natural pictures (amplitudes that fall with the frequency) and saved as a camera
does. The runs alternate, and medians are shown. Each run is a process of its own.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"12 megapixels": (4000, 3000, 96), "500x375": (500, 375, 384)}  # width, height, number of photos
WORKERS, PASSES, CLASSES, TIMED = 2, 3, 4, 48
TRANSFORM = (
    "from timm.data import create_transform; transform = create_transform((3, 224, 224), is_training=True, "
    "scale=(0.08, 1.0), hflip=0.5, color_jitter=0.4)"
)
# each defines `loader`, which gives the pictures of several passes or of one
OURS = f"""{TRANSFORM}
from pathlib import Path
from noisecutmix.compare import items
from noisecutmix.photos import find_photos
items.KEPT_PIXELS = 0  # in a large set, hardly any picture is kept
photos = find_photos(Path({{photos!r}}))
{{reduce}}
pictures = items.RealPictures(photos, transform, {{passes}})
batches = items.draw_batches(len(photos.files), {{passes}}, 8, 0)
loader = [torch.utils.data.DataLoader(pictures, batch_sampler=batches, num_workers={{workers}})]"""
REDUCE = """from noisecutmix.compare.copies import reduce_photos
photos = reduce_photos(photos, [str(i) for i in range(len(photos.files))], Path({copies!r}), 792)"""
TIMM = """from timm.data import create_dataset, create_loader
loader = {passes} * [create_loader(create_dataset("", {photos!r}, is_training=True), (3, 224, 224), 8, is_training=True,
    scale=(0.08, 1.0), hflip=0.5, color_jitter=0.4, use_prefetcher=False, num_workers={workers})]"""
TIME = """
import itertools
batches = iter(itertools.chain.from_iterable(loader))
first = {first}
while first > 0:  # the first pass
    first -= len(next(batches)[0])
start, count = time.perf_counter(), 0
while count < {timed}:
    count += len(next(batches)[0])
print(1000 * (time.perf_counter() - start) / count)"""
# with a classifier that costs next to nothing, as a small one does on a GPU
COMPARE = """
import runpy, sys, torch
from timm.models import register_model
from timm.data import IMAGENET_DEFAULT_MEAN as mean, IMAGENET_DEFAULT_STD as std
class Cheap(torch.nn.Sequential):
    pretrained_cfg = {"input_size": (3, 224, 224), "mean": mean, "std": std, "interpolation": "bicubic"}
@register_model
def cheap(pretrained=False, num_classes=2, **_):
    return Cheap(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, num_classes))
cheap.__module__ = "timm.models.cheap"
sys.argv[0] = "noisecutmix.compare"
try:
    runpy.run_module("noisecutmix.compare", run_name="__main__", alter_sys=True)
finally:
    import resource
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    print(max(resource.getrusage(one).ru_maxrss for one in whose) / 1024)"""


def draw_photo(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Return a picture whose amplitudes fall with the frequency, as those of natural pictures do; grey for the most."""
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequencies[0, 0] = 1
    planes = []
    for _ in range(3):
        spectrum = np.fft.rfft2(rng.standard_normal((height, width), dtype=np.float32)) / frequencies
        plane = np.fft.irfft2(spectrum, (height, width))
        planes.append(plane / plane.std())
    brightness, first, second = planes
    channels = [brightness + 0.3 * first, brightness, brightness + 0.3 * second]
    pixels = 128 + 45 * np.stack(channels, 2) + rng.normal(0, 2, (height, width, 1))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def write_photos(folder: Path, width: int, height: int, count: int) -> None:
    rng = np.random.default_rng(0)
    drawn = [np.asarray(draw_photo(width, height, rng)) for _ in range(4)]
    for number in tqdm(range(count), f"writing photos of {width}x{height}", unit="photo"):
        shifted = np.roll(drawn[number % 4], rng.integers(0, height, 2), axis=(0, 1))  # their edges fit together
        place = folder / ("train" if number % 4 else "test") / f"class {number // 4 % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shifted).save(place / f"{number}.jpg", quality=92)


def run(root: Path, *arguments: str) -> tuple[str, float]:
    """Run Python with the package of a checkout; return its output and its seconds."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    command = [sys.executable, *arguments]  # the working directory comes first among the places of packages
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout, time.perf_counter() - start


def time_reading(root: Path, code: str, **values: str) -> float:
    """Return milliseconds per picture after the first pass."""
    code = ("import time; import torch\n" + code + TIME).replace("{reduce}", values.pop("reduce", ""))
    first = len(list(Path(values["photos"]).rglob("*.jpg")))
    for name, value in {"workers": WORKERS, "passes": PASSES, "first": first, "timed": 2 * TIMED, **values}.items():
        code = code.replace(f"{{{name}!r}}", repr(value)).replace(f"{{{name}}}", str(value))
    return float(run(root, "-c", code)[0])


def time_comparison(root: Path, photos: Path, output_dir: Path) -> tuple[float, float]:
    """Return the seconds of a comparison of three rows, two seeds and five epochs, and peak memory in MB of a process.

    The classifier averages the picture in 16 parts, so that the photos alone decide how long it takes.
    """
    flags = [f"--train_dir={photos / 'train'}", f"--test_dir={photos / 'test'}", f"--output_dir={output_dir}"]
    flags += ["--rows", "none", "cutmix", "mixup", "--seeds=2", "--epochs=5", f"--num_workers={WORKERS}"]
    flags += ["--model=cheap", "--no_pretrained", "--image_size=224", "--batch_size=8", "--device=cpu"]
    output, seconds = run(root, "-c", COMPARE, *flags)
    return seconds, float(output.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="checkout of an earlier version")
    parser.add_argument("--runs", type=int, default=3, help="runs of each median of the reading")
    parser.add_argument("--comparisons", type=int, default=1, help="runs of each median of the comparison")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("pillow", "torch", "timm"))
    for name in options.sizes:
        photos = folder / name
        write_photos(photos, *SIZES[name])
        train, copies = str(photos / "train"), str(folder / "copies")
        reading: dict[str, list[float]] = {"before": [], "now": [], "timm": []}
        whole: dict[str, list[tuple[float, float]]] = {"before": [], "now": []}
        for _ in range(options.runs):
            reading["before"].append(time_reading(options.before, OURS, photos=train))
            reading["now"].append(time_reading(ROOT, OURS, photos=train, reduce=REDUCE, copies=copies))
            reading["timm"].append(time_reading(ROOT, TIMM, photos=train))
        for number in range(options.comparisons):
            for version, root in (("before", options.before), ("now", ROOT)):
                whole[version].append(time_comparison(root, photos, folder / f"{version} {name} {number}"))
        medians = {version: statistics.median(values) for version, values in reading.items()}
        seconds = {version: statistics.median(one for one, _ in values) for version, values in whole.items()}
        memory = {version: max(one for _, one in values) for version, values in whole.items()}
        print(f"\n{name}, {SIZES[name][2]} photos, {WORKERS} processes that read; {versions}")
        print("| | before | now | timm |\n|---|---|---|---|")
        print("| ms per picture after the first pass |", " | ".join(f"{ms:.1f}" for ms in medians.values()), "|")
        print(f"| seconds of the comparison | {seconds['before']:.1f} | {seconds['now']:.1f} | |")
        print(f"| MB of the largest process | {memory['before']:.0f} | {memory['now']:.0f} | |")
        print(
            f"now reads {medians['before'] / medians['now']:.1f} times as fast as before, "
            f"{medians['timm'] / medians['now']:.1f} times as fast as timm; "
            f"the comparison is {seconds['before'] / seconds['now']:.1f} times as fast as before"
        )


if __name__ == "__main__":
    main()
