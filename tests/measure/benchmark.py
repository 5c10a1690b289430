"""Time the scripts' way of drawing beside a plain one, which works in the order of the method's first implementation.

Run by hand; it downloads nothing. The claims on two CPU cores, then a GPU's table:

    uv run --group dev tests/measure/benchmark.py --arch sd15 --device cpu --part startup
    uv run --group dev tests/measure/benchmark.py --arch digits --device cpu --part throughput
    uv run --group dev tests/measure/benchmark.py --arch digits --device cpu --part writer
    uv run --group dev tests/measure/benchmark.py --arch sd15 --device cpu --dtype bfloat16 --resolution 256 --steps 2 \
--batch_size 1 --num_images 2 --part throughput memory
    uv run --group dev tests/measure/benchmark.py --arch sd15 --device cuda --batch_size 16 --compile \
--part throughput memory

and what a GPU's costs are bound to be, computed without one:

    uv run --group dev tests/measure/benchmark.py --arch sd15 --device cuda --dry_run

noisecutmix.finetune's trainer beside a plain loop (see benchmark_finetune.py), and what it costs a GPU:

    uv run --group dev tests/measure/benchmark.py --finetune --arch digits --device cpu --batch_size 32
    uv run --group dev tests/measure/benchmark.py --finetune --arch sd15 --device cpu --resolution 256 --batch_size 1 \
--steps 2
    uv run --group dev tests/measure/benchmark.py --finetune --arch sd15 --device cuda --dry_run

and what a data set costs by its size, and how well processes share one:

    uv run --group dev tests/measure/benchmark.py --scale
    uv run --group dev tests/measure/benchmark.py --processes

The plain way: a resize per token, LoRA adapters left unfused, contiguous memory, prompts encoded again each batch,
float pictures on the CPU, PNG at level 6 between the batches; never compiled. Both ways draw the same items.
"""

import argparse
import contextlib
import gc
import hashlib
import json
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
import transformers
from benchmark_finetune import measure_finetune
from benchmark_processes import measure_processes, measure_waiting
from diffusers import DPMSolverMultistepScheduler
from diffusers.utils import logging as diffusers_logging
from dry_run import compute_drawing, compute_training, describe, describe_training
from PIL import Image
from random_models import SHAPES, build
from safetensors.torch import load_file
from scale import measure_scale
from transformers.utils import logging as transformers_logging

from noisecutmix import NoiseCutMixGenerator, NoiseCutMixPipeline, load_pipeline
from noisecutmix.classes import DEFAULT_PROMPT, EMBEDDINGS_FILE, LORA_FILE, load_classes
from noisecutmix.cli import as_number
from noisecutmix.folder import OutputFolder, item_file_name
from noisecutmix.plan import Item, Plan
from noisecutmix.ranges import Range

PARTS = ("startup", "throughput", "writer", "memory")
LOCAL_PATHS = ("data_name", "model", "ckpt_path")
WRITER_ROUNDS = 3  # times as many pictures for the slow disk, so more than the writer lets wait
TERAFLOP_PER_EVALUATION = 0.803  # of Stable Diffusion 1.5's UNet, one picture of 512x512
PEAK_TERAFLOPS = {  # dense, 16 bit, 32-bit accumulation; the first name found in the device's counts
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "T4": 65,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


@dataclass(frozen=True)
class Setup:
    """What is drawn with, and how."""

    arch: str
    data_name: str
    model: str
    ckpt_path: str
    device: str
    dtype: str
    resolution: int
    steps: int
    batch_size: int
    num_images: int
    compile: bool


# ------------------------------------------------------------------------------------------------------ the two ways


def load_plain_pipeline(setup: Setup, resizes_each_token: bool) -> NoiseCutMixPipeline:
    """Load base model and checkpoint the plain way; without `resizes_each_token` the result is the same, sooner."""
    dtype = getattr(torch, setup.dtype)
    pipe = NoiseCutMixPipeline.from_pretrained(
        setup.model, torch_dtype=dtype, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, final_sigmas_type="sigma_min")
    checkpoint = torch.load(Path(setup.ckpt_path) / EMBEDDINGS_FILE, weights_only=True)
    embeddings = checkpoint["learned_embeds_dict"]
    if not resizes_each_token:
        pipe.tokenizer.add_tokens(list(embeddings))
        pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    for token, embedding in embeddings.items():
        if resizes_each_token:
            pipe.tokenizer.add_tokens(token)
            pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
        token_id = pipe.tokenizer.convert_tokens_to_ids(token)
        pipe.text_encoder.get_input_embeddings().weight.data[token_id] = embedding.to(dtype)
    pipe.unet.load_lora_adapter(load_file(Path(setup.ckpt_path) / LORA_FILE), prefix=None)
    pipe.name2placeholder = checkpoint["name2placeholder"]
    return pipe.to(setup.device, dtype)


class PlainWay:
    """Draws and writes in the order of the method's first implementation."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.pipe = load_plain_pipeline(setup, resizes_each_token=False)
        self.pipe.set_progress_bar_config(disable=True)
        classes = load_classes(setup.data_name)
        placeholders = [self.pipe.name2placeholder[name] for name in classes.names]
        self.prompts = [DEFAULT_PROMPT.format(name=name, meta_class=classes.meta_class) for name in placeholders]

    def run(self, items: list[Item], folder: OutputFolder) -> None:
        for batch in split(items, self.setup.batch_size):
            for item, image in zip(batch, self._draw(batch)):
                item.mask().save(picture_path(folder, "mask", item), compress_level=6)
                image.save(picture_path(folder, "image", item), compress_level=6)

    def _draw(self, batch: list[Item]) -> list[Image.Image]:
        side = self.setup.resolution
        pictures = self.pipe(
            prompt_1=[self.prompts[item.target] for item in batch],
            prompt_2=[self.prompts[item.aug] for item in batch],
            mask=[item.mask() for item in batch],
            height=side,
            width=side,
            num_inference_steps=self.setup.steps,
            generator=[torch.Generator().manual_seed(item.noise_seed) for item in batch],
            output_type="pt",
        ).images  # (B, 3, side, side), 0 to 1
        pixels = pictures.cpu().permute(0, 2, 3, 1).float().numpy()
        return [Image.fromarray((picture * 255).round().astype("uint8")) for picture in pixels]


class ScriptsWay:
    """Draws and writes as augmentation.py does. Encoded prompts stay kept between runs, as within a long one."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.generator = NoiseCutMixGenerator(
            device=setup.device,
            data_name=setup.data_name,
            ckpt_path=setup.ckpt_path,
            model=setup.model,
            num_inference_steps=setup.steps,
            resolution=setup.resolution,
            dtype=getattr(torch, setup.dtype),
            batch_size=setup.batch_size,
        )
        self.pipe = self.generator.pipe
        self.seconds_drawing = 0.0  # of the latest run, to its last picture in the writer's hands
        self.seconds_waiting = 0.0  # of these, until the writer took the pictures
        if setup.compile:
            start = time.perf_counter()
            self.generator.compile()
            print(f"compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr)

    def run(self, items: list[Item], folder: OutputFolder, write: Callable[..., None] | None = None) -> None:
        start = time.perf_counter()
        self.seconds_waiting = 0.0
        writing: Iterator[None] = iter(())
        with ThreadPoolExecutor(8) as pool:
            for batch in split(items, self.setup.batch_size):
                images = self.generator.draw(batch)
                drawn = time.perf_counter()
                list(writing)
                writing = pool.map(write or folder.write, batch, images)
                self.seconds_waiting += time.perf_counter() - drawn
            self.seconds_drawing = time.perf_counter() - start
            list(writing)


def picture_path(folder: OutputFolder, part: str, item: Item) -> Path:
    return folder.root / (item_file_name(part, folder.num_items) % item.index)


def split(items: list[Item], size: int) -> list[list[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


@contextlib.contextmanager
def planned_folder(setup: Setup, num_images: int) -> Iterator[tuple[list[Item], OutputFolder]]:
    """The plan's items, the same each time, and a fresh folder for them that is gone afterwards."""
    names = load_classes(setup.data_name).names
    plan = Plan(0, len(names), 1.0, setup.resolution)
    with tempfile.TemporaryDirectory() as root:
        folder = OutputFolder(Path(root), plan, num_images, names, {})
        folder.begin({"command": sys.argv})
        yield list(plan.items(num_images)), folder


# --------------------------------------------------------------------------------------------------------- measuring


@dataclass
class Row:
    """One measure of two ways, a value a repeat; pairs of one repeat ran next to each other."""

    name: str
    reference: list[float]
    measured: list[float]

    @property
    def ratio(self) -> float:
        """The median of the pairs' ratios, so that a machine that slows down for a while does not matter."""
        return statistics.median(second / first for first, second in zip(self.reference, self.measured))


class ModelTimer:
    """Adds up the time in UNet and VAE: on a GPU between events in its own queue, so that nothing waits for it."""

    def __init__(self, pipe: NoiseCutMixPipeline):
        self._is_cuda = pipe.device.type == "cuda"
        self._spans: list[tuple[str, int, Any, Any]] = []
        # torch calls a module through this attribute; hooks and a new forward would be compiled with the rest
        unet = pipe.unet
        unet._compiled_call_impl = self._timed("unet", unet._compiled_call_impl or unet._call_impl)
        pipe.vae.decode = self._timed("vae", pipe.vae.decode)

    def take(self) -> tuple[float, float, int]:
        """Return seconds in the UNet, seconds in the VAE and the number of UNet evaluations; start again from zero."""
        if self._is_cuda:
            torch.cuda.synchronize()
        seconds = {"unet": 0.0, "vae": 0.0}
        evaluations = 0
        for name, count, start, end in self._spans:
            seconds[name] += start.elapsed_time(end) / 1000 if self._is_cuda else end - start
            evaluations += count if name == "unet" else 0
        self._spans.clear()
        return seconds["unet"], seconds["vae"], evaluations

    def _mark(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start = self._mark()
            result = function(*arguments, **options)
            self._spans.append((name, len(arguments[0]), start, self._mark()))
            return result

        return call


def in_turn(repeats: int) -> Iterator[int]:
    """Yield 0, 1, 1, 0, 0, 1 …: each way once a repeat, first and second by turns."""
    for repeat in range(repeats):
        yield from (0, 1) if repeat % 2 == 0 else (1, 0)


def measure_startup(setup: Setup, repeats: int) -> Row:
    """Time from checkpoint to a pipeline that is ready to draw; reading the base model, the same for both, left out."""
    dtype = getattr(torch, setup.dtype)
    ways: list[Callable[[], Any]] = [
        lambda: load_plain_pipeline(setup, resizes_each_token=True),
        lambda: load_pipeline(setup.model, setup.ckpt_path, setup.device, dtype),
    ]
    read_base_model = NoiseCutMixPipeline.from_pretrained
    seconds_reading = 0.0

    def timed_read(*arguments: Any, **options: Any) -> Any:
        nonlocal seconds_reading
        start = time.perf_counter()
        try:
            return read_base_model(*arguments, **options)
        finally:
            seconds_reading += time.perf_counter() - start

    torch.zeros(1, device=setup.device)  # a device's own start is neither way's
    seconds: list[list[float]] = [[], []]
    with mock.patch.object(NoiseCutMixPipeline, "from_pretrained", timed_read):
        for number in in_turn(repeats):
            seconds_reading = 0.0
            start = time.perf_counter()
            pipe = ways[number]()
            if setup.device == "cuda":
                torch.cuda.synchronize()
            seconds[number].append(time.perf_counter() - start - seconds_reading)
            del pipe
            gc.collect()
    return Row("start-up: checkpoint into pipeline (s)", *seconds)


def measure_throughput(setup: Setup, repeats: int) -> tuple[list[Row], dict[str, Any]]:
    """Draw and write the same items both ways in turn; return the rows and how alike the pictures are."""
    scripts = ScriptsWay(setup)  # first: its loading, in float32, takes the most memory
    ways = PlainWay(setup), scripts
    timers = [ModelTimer(way.pipe) for way in ways]
    pictures = []
    for way in ways:  # the first run warms up and shows what is drawn
        with planned_folder(setup, setup.num_images) as (items, folder):
            way.run(items, folder)
            pictures.append(np.stack([np.asarray(Image.open(picture_path(folder, "image", item))) for item in items]))

    names = ["pictures a second", "wall time outside UNet and VAE (%)", "time per UNet evaluation (ms)"]
    values: dict[str, list[list[float]]] = {name: [[], []] for name in names}
    for number in in_turn(repeats):
        with planned_folder(setup, setup.num_images) as (items, folder):
            timers[number].take()
            start = time.perf_counter()
            ways[number].run(items, folder)
            wall = time.perf_counter() - start
        unet, vae, evaluations = timers[number].take()
        measured = (setup.num_images / wall, 100 * (1 - (unet + vae) / wall), 1000 * unet / evaluations)
        for name, value in zip(names, measured):
            values[name][number].append(value)
    rows = [Row(name, *values[name]) for name in names]
    if setup.arch == "sd15" and setup.device == "cuda" and setup.resolution == 512:
        rows += rate_evaluations(setup, rows[-1])
    return rows, compare(*pictures)


def rate_evaluations(setup: Setup, milliseconds: Row) -> list[Row]:
    """Turn the time of Stable Diffusion 1.5's UNet evaluations into TFLOP/s and the share of the GPU's peak."""
    rates = [
        [1000 * TERAFLOP_PER_EVALUATION / value for value in values]
        for values in (milliseconds.reference, milliseconds.measured)
    ]
    rows = [Row("UNet TFLOP/s", *rates)]
    device_name = torch.cuda.get_device_name()
    peak = next((peak for name, peak in PEAK_TERAFLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)
    if peak is not None and setup.dtype != "float32":
        shares = [[100 * rate / peak for rate in way] for way in rates]
        rows.append(Row(f"UNet share of {peak} TFLOP/s, the peak (%)", *shares))
    return rows


def compare(plain: np.ndarray, scripts: np.ndarray) -> dict[str, Any]:
    difference = np.abs(plain.astype(int) - scripts)
    return {
        "plain_sha256": hashlib.sha256(plain.tobytes()).hexdigest(),
        "scripts_sha256": hashlib.sha256(scripts.tobytes()).hexdigest(),
        "largest_difference": int(difference.max()),
        "equal_values_percent": float(100 * (difference == 0).mean()),
    }


def measure_writer(setup: Setup, repeats: int) -> list[Row]:
    """Draw with an ordinary disk and with one so slow that each picture takes half a batch's time to write.

    More pictures are drawn than may wait, so a writer that falls behind would stop the drawing. The slow disk's last
    half batch comes after the drawing, once a run: it is in the row "written", not in "drawn".
    """
    scripts = ScriptsWay(setup)
    num_images = WRITER_ROUNDS * setup.num_images

    def draw(seconds_asleep: float) -> tuple[float, float, float]:
        with planned_folder(setup, num_images) as (items, folder):

            def write(item: Item, image: Image.Image) -> None:
                time.sleep(seconds_asleep)
                folder.write(item, image)

            start = time.perf_counter()
            scripts.run(items, folder, write)
            seconds = time.perf_counter() - start
        drawing, waiting = scripts.seconds_drawing, scripts.seconds_waiting
        return num_images / drawing, num_images / seconds, 100 * waiting / drawing

    draw(0.0)  # warms up
    ordinary, slow = [], []
    for _ in range(repeats):
        ordinary.append(draw(0.0))
        pictures_a_second = ordinary[-1][0]
        slow.append(draw(setup.batch_size / pictures_a_second / 2))
    names = ["pictures a second, drawn", "pictures a second, written", "drawing waits for the writer (%)"]
    return [Row(name, list(one), list(two)) for name, one, two in zip(names, zip(*ordinary), zip(*slow))]


def measure_memory(setup: Setup, repeats: int) -> Row:
    """Load and draw a batch, each way in a process of its own."""
    peaks: list[list[float]] = [[], []]
    for number in in_turn(repeats):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            peaks[number].append(pool.submit(draw_and_weigh, (PlainWay, ScriptsWay)[number], setup).result())
    return Row("peak memory of the GPU (GB)" if setup.device == "cuda" else "peak memory of a process (GB)", *peaks)


def draw_and_weigh(way: type[PlainWay] | type[ScriptsWay], setup: Setup) -> float:
    silence_libraries()
    with planned_folder(setup, setup.batch_size) as (items, folder):
        way(setup).run(items, folder)
    return torch.cuda.max_memory_allocated() / 1e9 if setup.device == "cuda" else process_peak()


def process_peak() -> float:
    """Return the most memory that this process held, in GB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the process that started this one
        peaks = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(peaks[0]) * 1024 / 1e9
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def silence_libraries() -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


# ---------------------------------------------------------------------------------------------------------- the table


def table(headings: list[str], rows: list[Row]) -> str:
    lines = [headings]
    for row in rows:
        ratio = f"{row.ratio:.3g}" if row.ratio > 0.5 else f"{row.ratio:.3g} (1/{1 / row.ratio:.3g})"
        lines.append([row.name, summary(row.reference), summary(row.measured), ratio])
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
    return "\n".join([padded[0], "-" * (sum(widths) + 2 * len(widths) - 2), *padded[1:]])


def summary(values: list[float]) -> str:
    """Median and range."""
    median = f"{statistics.median(values):.4g}"
    return median if len(values) == 1 else f"{median} ({min(values):.4g} to {max(values):.4g})"


positive_int = as_number(Range(int, 1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time the scripts' way of drawing beside a plain one.")
    parser.add_argument("--arch", choices=("digits", "tiny", "sd15"), default="digits", help="default: digits")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if it is there")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="default: as the scripts'")
    parser.add_argument("--batch_size", type=positive_int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--num_images", type=positive_int, metavar="N", help="default: 64, of sd15 two batches")
    parser.add_argument("--steps", type=positive_int, default=25, metavar="N", help="to draw or train, default: 25")
    parser.add_argument("--resolution", type=positive_int, metavar="PIXELS", help="default: 32, of sd15 512")
    parser.add_argument("--compile", action="store_true", help="compile the scripts' way, not the plain one")
    parser.add_argument("--repeats", type=positive_int, default=5, metavar="N", help="default: 5; fewer only to try")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="what to measure, default: all")
    parser.add_argument("--dry_run", action="store_true", help="compute a GPU's costs without one; measures nothing")
    parser.add_argument("--finetune", action="store_true", help="measure noisecutmix.finetune's trainer instead")
    parser.add_argument("--processes", action="store_true", help="how well eight processes share a data set")
    parser.add_argument("--scale", action="store_true", help="what a data set costs by its size, up to a million items")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value there too")
    options = parser.parse_args()
    if options.dry_run:
        if options.arch not in SHAPES or options.device != "cuda":
            parser.error("--dry_run: give --device cuda and --arch sd15 or tiny")
        unused = ("batch_size", "num_images", "compile", "repeats", "part", *(["steps"] if options.finetune else []))
        refuse(parser, options, "--dry_run", unused)
        return options
    if options.finetune:
        refuse(parser, options, "--finetune", ("num_images", "compile", "part", "scale"))
    has_cuda = torch.cuda.is_available()
    options.device = options.device or ("cuda" if has_cuda else "cpu")
    if options.device == "cuda" and not has_cuda:
        parser.error("--device: torch sees no CUDA device; try --device cpu")
    return options


def refuse(parser: argparse.ArgumentParser, options: argparse.Namespace, flag: str, names: Iterable[str]) -> None:
    """End with an error if an option is set that a flag would ignore."""
    for name in names:
        if getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name}: means nothing to {flag}")


def prepare(options: argparse.Namespace, folder: Path) -> Setup:
    """Build what is to be drawn with, if it is not the bundled demo."""
    shape = SHAPES.get(options.arch)
    if shape is None:
        demo = load_classes("digits")
        data_name, model, ckpt_path, resolution = "digits", demo.model, str(demo.ckpt_path), demo.resolution
    else:
        build(folder, shape)
        data_name, model, ckpt_path = (str(folder / name) for name in ("data_set.json", "base", "checkpoint"))
        resolution = shape.resolution
    return Setup(
        arch=options.arch,
        data_name=data_name,
        model=model,
        ckpt_path=ckpt_path,
        device=options.device,
        dtype=options.dtype or ("float16" if options.device == "cuda" else "float32"),
        resolution=options.resolution or resolution,
        steps=options.steps,
        batch_size=options.batch_size,
        num_images=options.num_images or (2 * options.batch_size if options.arch == "sd15" else 64),
        compile=options.compile,
    )


def dry_run(options: argparse.Namespace) -> None:
    shape, dtype = SHAPES[options.arch], options.dtype or "float16"
    resolution = options.resolution or shape.resolution
    usages: list[Any]
    if options.finetune:
        usages = compute_training(shape, dtype, resolution)
        text, steps = describe_training(usages), "fine-tuning"
    else:
        usages = compute_drawing(shape, getattr(torch, dtype), options.steps, resolution)
        text, steps = describe(usages, getattr(torch, dtype)), f"{options.steps} steps"
    setup = f"{options.arch}, {dtype}, {steps}, {resolution}x{resolution}"
    print(f"{setup}; torch {torch.__version__}, diffusers {diffusers.__version__}")
    print(text)
    if options.json:
        options.json.write_text(json.dumps([asdict(usage) for usage in usages], indent=2), encoding="utf-8")


def main() -> None:
    options = parse()
    silence_libraries()
    if options.dry_run:
        return dry_run(options)
    if options.scale:
        return print(measure_scale())
    if options.processes:
        return print(measure_processes(), measure_waiting(), sep="\n\n")
    if options.finetune:
        return measure_finetune(options)
    rows: list[Row] = []
    writer_rows: list[Row] = []
    measured: list[Row]
    pictures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        setup = prepare(options, Path(folder))
        for part in [part for part in PARTS if part in options.part]:
            print(f"measuring {part} …", file=sys.stderr)
            if part == "startup":
                measured = [measure_startup(setup, options.repeats)]
            elif part == "throughput":
                measured, pictures = measure_throughput(setup, options.repeats)
            elif part == "writer":
                measured = writer_rows = measure_writer(setup, options.repeats)
            else:
                measured = [measure_memory(setup, options.repeats)]
            for row in measured:  # at once, so that a run that is cut off has told what it knows
                print(f"  {row.name}: {summary(row.reference)}, {summary(row.measured)}", file=sys.stderr)
            rows += measured if part != "writer" else []
            gc.collect()
            if setup.device == "cuda":
                torch.cuda.empty_cache()  # what is measured next, in a process of its own, needs it

    threads = f"CPU with {torch.get_num_threads()} threads"
    device = torch.cuda.get_device_name() if setup.device == "cuda" else threads
    print(
        f"{setup.arch} on {device}, {setup.dtype}{', compiled' if setup.compile else ''}: {setup.num_images} pictures "
        f"of {setup.resolution}x{setup.resolution}, batch {setup.batch_size}, {setup.steps} steps; median (range) of "
        f"{options.repeats}; torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"transformers {transformers.__version__}\n"
    )
    if rows:
        print(table(["", "plain", "scripts", "ratio to plain"], rows) + "\n")
    if writer_rows:
        print(table(["", "ordinary disk", "slow disk", "ratio to ordinary"], writer_rows) + "\n")
    if pictures:
        print(f"pictures, plain:   sha256 {pictures['plain_sha256']}")
        print(f"pictures, scripts: sha256 {pictures['scripts_sha256']}")
        print(
            f"largest difference: {pictures['largest_difference']} of 255 grey levels; "
            f"{pictures['equal_values_percent']:.2f} % of the values are equal"
        )
    print(f"peak memory of the benchmark's own process: {process_peak():.2f} GB")
    if options.json:
        content = {
            "device_name": device,
            "setup": {name: value for name, value in asdict(setup).items() if name not in LOCAL_PATHS},
            "rows": [{**asdict(row), "ratio": row.ratio} for row in rows + writer_rows],
            "pictures": pictures,
            "process_peak_gb": process_peak(),
        }
        options.json.write_text(json.dumps(content, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
