"""How fast photos are read: this version, an earlier one, and timm's own loader with the same transforms, side by side.

uv run --all-extras --group dev tests/measure/benchmark_photos.py --before=/path/to/an/earlier/checkout

Photos are drawn with the spectrum of natural pictures (amplitudes that fall with the frequency) and saved as a camera
does. The runs alternate, and medians are shown. Each run is a process of its own.
"""

import argparse
import json
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
sys.path.insert(0, str(ROOT / "ckpts" / "digits"))
import train as digits  # noqa: E402 (the script of the demo lies in no package)

SIZES = {"12 megapixels": (4000, 3000, 96), "500x375": (500, 375, 384)}  # width, height, number of photos
WORKERS, PASSES, CLASSES, TIMED = (0, 1, 2), 3, 4, 48
MEGAPIXELS = next(iter(SIZES))
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


def time_reading(root: Path, code: str, **values: str | int) -> float:
    """Return milliseconds per picture after the first pass."""
    code = ("import time; import torch\n" + code + TIME).replace("{reduce}", str(values.pop("reduce", "")))
    first = len(list(Path(str(values["photos"])).rglob("*.jpg")))
    for name, value in {"passes": PASSES, "first": first, "timed": 2 * TIMED, **values}.items():
        code = code.replace(f"{{{name}!r}}", repr(value)).replace(f"{{{name}}}", str(value))
    return float(run(root, "-c", code)[0])


def time_comparison(root: Path, photos: Path, output_dir: Path, workers: int) -> tuple[float, float]:
    """Return the seconds of a comparison of three rows, two seeds and five epochs, and peak memory in MB of a process.

    The classifier averages the picture in 16 parts, so that the photos alone decide how long it takes.
    """
    flags = [f"--train_dir={photos / 'train'}", f"--test_dir={photos / 'test'}", f"--output_dir={output_dir}"]
    flags += ["--rows", "none", "cutmix", "mixup", "--seeds=2", "--epochs=5", f"--num_workers={workers}"]
    flags += ["--model=cheap", "--no_pretrained", "--image_size=224", "--batch_size=8", "--device=cpu"]
    output, seconds = run(root, "-c", COMPARE, *flags)
    return seconds, float(output.split()[-1])


def measure_speed(size: str, folder: Path, options: argparse.Namespace) -> None:
    """Print the table of one size of photos by the number of processes that read."""
    photos = folder / size
    write_photos(photos, *SIZES[size])
    train, copies = str(photos / "train"), str(folder / "copies")
    print(f"\n{size}, {SIZES[size][2]} photos: ms per picture after the first pass; seconds of the comparison; its MB")
    print("| processes that read | before | now | timm | before | now | before | now |\n" + 8 * "|---" + "|")
    for workers in options.workers:
        reading: dict[str, list[float]] = {"before": [], "now": [], "timm": []}
        whole: dict[str, list[tuple[float, float]]] = {"before": [], "now": []}
        same = {"photos": train, "workers": workers}
        for _ in range(options.runs):
            reading["before"].append(time_reading(options.before, OURS, **same))
            reading["now"].append(time_reading(ROOT, OURS, **same, reduce=REDUCE, copies=copies))
            reading["timm"].append(time_reading(ROOT, TIMM, **same))
        for number in range(options.comparisons):
            for version, root in (("before", options.before), ("now", ROOT)):
                output_dir = folder / f"{version} {size} {workers} {number}"
                whole[version].append(time_comparison(root, photos, output_dir, workers))
        cells = [f"{statistics.median(values):.1f}" for values in reading.values()]
        cells += [f"{statistics.median(seconds for seconds, _ in values):.0f}" for values in whole.values() if values]
        cells += [f"{max(megabytes for _, megabytes in values):.0f}" for values in whole.values() if values]
        print(f"| {workers} |", " | ".join(cells), "|", flush=True)


def measure_memory(folder: Path) -> None:
    """Print the largest process's memory in comparisons of more and more photos."""
    for count in (48, 96, 192):
        photos = folder / f"{count} photos"
        write_photos(photos, *SIZES[MEGAPIXELS][:2], count)
        seconds, megabytes = time_comparison(ROOT, photos, folder / f"comparison of {count}", 2)
        print(f"{count} photos of {MEGAPIXELS}: at most {megabytes:.0f} MB in a process, {seconds:.0f} s", flush=True)


def measure_accuracy(folder: Path, before: Path, seeds: int) -> None:
    """Print the accuracy on digits as large photos: read whole by the version before, and from copies by this one."""
    images, labels, test_images, test_labels = digits.load_split()
    chosen = digits.choose_digits(labels, 10)
    for part, pictures, classes in (("train", images[chosen], labels[chosen]), ("test", test_images, test_labels)):
        large = np.kron(digits.enlarge(pictures), np.ones((1, 12, 12))).astype(np.uint8)  # 384x384
        for number, (pixels, label) in enumerate(zip(large, classes)):
            place = folder / part / digits.CLASS_NAMES[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{number}.jpg", quality=92)
    flags = [f"--train_dir={folder / 'train'}", f"--test_dir={folder / 'test'}", f"--seeds={seeds}", "--epochs=60"]
    flags += ["--rows", "none", "cutmix", "--model=test_resnet", "--no_pretrained", "--image_size=32"]
    flags += ["--crop_scale=0.6", "--no_random_flip", "--num_workers=0", "--device=cpu"]
    top1 = []
    for version, root in (("before", before), ("now", ROOT)):
        run(root, "-m", "noisecutmix.compare", *flags, f"--output_dir={folder / version}")
        results = json.loads((folder / version / "results.json").read_text(encoding="utf-8"))["rows"]
        top1.append(np.array([results[row]["top1"] for row in ("none", "cutmix")]))
    difference = top1[1] - top1[0]
    error = difference.std(1, ddof=1) / seeds**0.5
    for row, whole, copies, mean, one in zip(
        ("none", "cutmix"), *(each.mean(1) for each in (*top1, difference)), error
    ):
        print(f"{row}: {whole:.2f} % with whole photos, {copies:.2f} with copies ({mean:+.2f} ± {one:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="checkout of an earlier version")
    parser.add_argument("--runs", type=int, default=3, help="runs of each median of the reading")
    parser.add_argument("--comparisons", type=int, default=1, help="runs of each median of the comparison")
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--workers", nargs="+", type=int, default=list(WORKERS), help="numbers of processes that read")
    parser.add_argument("--memory", action="store_true", help="also the memory of a comparison of more and more photos")
    parser.add_argument("--accuracy", type=int, default=0, metavar="SEEDS", help="also the accuracy with copies")
    options = parser.parse_args()
    print(", ".join(f"{name} {metadata.version(name)}" for name in ("pillow", "torch", "timm")))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in options.sizes:
            measure_speed(size, folder, options)
        if options.memory:
            measure_memory(folder)
        if options.accuracy:
            measure_accuracy(folder / "digits", options.before, options.accuracy)


if __name__ == "__main__":
    main()
