"""Tests on a real NVIDIA GPU: `uv run --group dev pytest -m cuda`. All of them are skipped if no GPU is visible."""

import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from drawing import ROOT, command, offline_environment
from dry_run import ACTIVATIONS_RESERVE, compute_drawing
from PIL import Image
from random_models import SHAPES, build
from torch.utils._python_dispatch import TorchDispatchMode

from noisecutmix import NoiseCutMixGenerator

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible; with one, run pytest -m cuda"),
]
COUNT = 16
LOOPBACK_ONLY = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
# Mean difference of a picture to the CPU's float32 picture, in grey levels. On a CPU, float16 differs by at most 0.2
# and bfloat16 by 1.5. A GPU computes float32 convolutions in TF32, which has the precision of float16.
TOLERANCES = {torch.float32: 0.5, torch.float16: 0.5, torch.bfloat16: 4.0}


def build_digits(device, dtype=torch.float16, **options):
    return NoiseCutMixGenerator(device=device, data_name="digits", dtype=dtype, **options)


def draw(generator, count=COUNT):
    """Return the pictures of the first items, of one pair of classes: (count, 32, 32, 3), 0 to 255."""
    items = [generator.plan.item(index, target=3, aug=8) for index in range(count)]
    return np.stack([np.asarray(image) for image in generator.draw(items)]).astype(int)


def differences(pictures, expected):
    """Return each picture's mean difference in grey levels."""
    return np.abs(pictures - expected).mean(axis=(1, 2, 3))


@pytest.fixture
def generator():
    """A float16 generator that has drawn once: its prompts are encoded and the CUDA libraries are initialised."""
    generator = build_digits("cuda", num_inference_steps=4)
    draw(generator)
    return generator


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_pictures_equal_those_of_the_cpu_within_rounding(dtype):
    expected = draw(build_digits("cpu", torch.float32))
    assert differences(draw(build_digits("cuda", dtype)), expected).max() <= TOLERANCES[dtype]


def test_the_host_does_not_wait_for_the_gpu_within_the_loop(generator):
    """From the first call of the UNet to that of the decoder, PyTorch raises an error at every synchronisation."""
    pipe = generator.pipe
    hooks = [
        pipe.unet.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error")),
        pipe.vae.post_quant_conv.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("default")),
    ]
    try:
        assert len(draw(generator)) == COUNT
    finally:
        torch.cuda.set_sync_debug_mode("default")
        for hook in hooks:
            hook.remove()


def test_the_host_reads_8_bit_pictures_once_and_little_else(generator):
    read = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            result = operator(*args, **(kwargs or {}))
            source = args[0] if args else None
            if isinstance(source, torch.Tensor) and source.is_cuda and not getattr(result, "is_cuda", False):
                is_copy = operator.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten._local_scalar_dense)
                read.extend([(source.dtype, source.numel())] if is_copy else [])
            return result

    with Reads():
        pictures = draw(generator)
    assert [count for dtype, count in read if dtype == torch.uint8] == [pictures.size]
    assert sum(count for dtype, count in read if dtype != torch.uint8) <= COUNT


@contextlib.contextmanager
def limited_memory(size):
    """Limit PyTorch to `size` bytes of the GPU's memory."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.mem_get_info()[1])
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def peak_of(generator, batch_size):
    """Return the peak size of all tensors while a batch is drawn, in bytes, and the pictures."""
    generator.batch_size = batch_size
    torch.cuda.reset_peak_memory_stats()
    pictures = draw(generator, batch_size)
    return torch.cuda.max_memory_allocated(), pictures


def test_out_of_memory_halves_the_batch(capsys):
    generator = build_digits("cuda", num_inference_steps=2)
    small, _ = peak_of(generator, 64)
    large, expected = peak_of(generator, 512)
    assert small < large
    with limited_memory((small + large) / 2):
        pictures = draw(generator, 512)
    assert generator.batch_size < 512
    assert "out of memory at batch size 512, continuing with 256" in capsys.readouterr().err
    assert differences(pictures, expected).max() <= TOLERANCES[torch.float16]


def read_pictures(folder):
    files = sorted((folder / "image").glob("*.png"))
    return np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)


def test_two_processes_on_one_gpu_draw_the_data_set_of_one(tmp_path):
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = offline_environment(CUDA_VISIBLE_DEVICES=gpu, **LOOPBACK_ONLY)
    arguments = ["--data_name=digits", "--device=cuda", "--num_aug=40", "--num_inference_steps=4"]
    one = command("augmentation.py", *arguments, "--output_dir=one")
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1"]
    two += ["--nproc_per_node=2", str(ROOT / "augmentation.py"), *arguments, "--output_dir=two"]
    for line in (one, two):
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    for name in ("soft_label.npy", "metadata.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    pictures, expected = read_pictures(tmp_path / "two"), read_pictures(tmp_path / "one")
    assert len(pictures) == len(expected) == 40
    assert differences(pictures, expected).max() <= TOLERANCES[torch.float16]


def test_memory_is_as_computed_by_the_dry_run_within_its_reserve(tmp_path, capsys):
    """A batch of 8 at Stable Diffusion 1.5's shapes, with random weights, loaded from files."""
    shape, dtype, batch_size = SHAPES["sd15"], torch.float16, 8
    usage = compute_drawing(shape, dtype, steps=2, resolution=shape.resolution, batch_sizes=(batch_size,))[0]
    build(tmp_path, shape)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    generator = NoiseCutMixGenerator(
        device="cuda",
        data_name=str(tmp_path / "data_set.json"),
        model=str(tmp_path / "base"),
        ckpt_path=tmp_path / "checkpoint",
        resolution=shape.resolution,
        num_inference_steps=2,
        batch_size=batch_size,
    )
    weights = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    generator.draw([generator.plan.item(index) for index in range(batch_size)])
    activations = torch.cuda.max_memory_allocated() - weights - before
    computed = max(usage.loop_bytes, usage.decoder_bytes)
    with capsys.disabled():
        print(f"\nactivations: {activations / 1e9:.2f} GB measured, {computed / 1e9:.2f} GB computed")
    assert weights == pytest.approx(usage.weights_bytes, rel=0.01)
    assert 0.9 * computed <= activations <= (1 + ACTIVATIONS_RESERVE) * computed


def test_the_benchmark_prints_its_table(tmp_path, capsys):
    """It measures the plain implementation and the scripts on this GPU, at Stable Diffusion 1.5's shapes."""
    arguments = ["--arch=sd15", "--device=cuda", "--repeats=1", "--part", "throughput", "memory"]
    done = subprocess.run(
        command("tests/measure/benchmark.py", *arguments),
        cwd=tmp_path,
        env=offline_environment(),
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert "pictures a second" in done.stdout and "peak memory of the GPU" in done.stdout
