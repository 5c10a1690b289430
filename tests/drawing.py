"""A tiny random Stable Diffusion and Diff-Mix checkpoints for it, written as files; the bundled digits; the scripts."""

import contextlib
import copy
import dataclasses
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import clean_environment  # noqa: F401
import numpy as np
import psutil
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from random_models import SHAPES, build_components
from safetensors.torch import save_file

from noisecutmix.checkpoint import load_pipeline
from noisecutmix.errors import InputError, RunError

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "ckpts" / "digits"
CLASS_NAMES = ["red kite", "blue jay", "grey heron"]
TINY_WIDTH = 32
RANK = 10
MAX_WAIT = 300  # seconds, since the machine may be busy with other work


def load_module(path):
    """Import a script by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_tiny_components(tokenizer_folder):
    """Return the components of a tiny random Stable Diffusion: pictures of 16x16, a VAE of factor 2."""
    tiny = SHAPES["tiny"]
    sides = {"unet": {**tiny.unet, "sample_size": 8}, "vae": {**tiny.vae, "sample_size": 16}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_components(tokenizer_folder, dataclasses.replace(tiny, **sides))


def random_lora(unet, rank=RANK, scale=0.3, seed=1):
    """Return {attention layer: (down, up)} for every attention projection of the UNet."""
    rng = torch.Generator().manual_seed(seed)
    layers = {}
    for name, module in unet.named_modules():
        if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")):
            down = scale * torch.randn(rank, module.in_features, generator=rng)
            up = scale * torch.randn(module.out_features, rank, generator=rng)
            layers[name] = (down, up)
    return layers


def in_old_keys(layers):
    """Return a LoRA's state dict with the key names of Diff-Mix, without a prefix."""
    state_dict = {}
    for name, (down, up) in layers.items():
        attention, layer = name.removesuffix(".0").rsplit(".", 1)
        state_dict[f"{attention}.processor.{layer}_lora.down.weight"] = down
        state_dict[f"{attention}.processor.{layer}_lora.up.weight"] = up
    return state_dict


def write_embeddings(folder, class_names=CLASS_NAMES, width=TINY_WIDTH, **changes):
    rng = torch.Generator().manual_seed(2)
    placeholders = {name: f"<class_{label}>" for label, name in enumerate(class_names)}
    content = {
        "learned_embeds_dict": {token: torch.randn(width, generator=rng) for token in placeholders.values()},
        "name2placeholder": placeholders,
        "placeholder2name": {token: name for name, token in placeholders.items()},
        **changes,
    }
    torch.save(content, folder / "learned_embeds-steps-last.bin")


def write_checkpoint(folder, lora_state_dict, **embeddings):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(lora_state_dict, folder / "pytorch_lora_weights.safetensors")
    write_embeddings(folder, **embeddings)
    return folder


def write_photos(folder, class_names=CLASS_NAMES, count=3):
    """Write pictures of noise, `count` a class, 24 pixels wide and at least 20 high."""
    rng = np.random.default_rng(0)
    for name in class_names:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 255, (20 + number, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def tiny_components(tmp_path_factory):
    return build_tiny_components(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_model(tiny_components, tmp_path_factory):
    """A local diffusers folder."""
    folder = tmp_path_factory.mktemp("tiny") / "base"
    pipe = StableDiffusionPipeline(
        **tiny_components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_lora(tiny_components):
    return random_lora(tiny_components["unet"])


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_lora, tmp_path_factory):
    """A Diff-Mix checkpoint of three classes for the tiny model."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), in_old_keys(tiny_lora))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A JSON data set of the tiny checkpoint's classes."""
    path = tmp_path_factory.mktemp("data") / "birds.json"
    path.write_text(json.dumps({"classes": CLASS_NAMES, "meta_class": "bird"}), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def loaded_pipeline(tiny_model, tiny_checkpoint):
    pipe = load_pipeline(str(tiny_model), tiny_checkpoint, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def tiny_pipeline(loaded_pipeline):
    """A copy for each test, which may change it."""
    return copy.deepcopy(loaded_pipeline)


@pytest.fixture(scope="session")
def tiny_arguments(tiny_model, tiny_checkpoint, tiny_data):
    """The flags with which either script quickly draws 16x16 pictures with the tiny model."""
    return [
        f"--data_name={tiny_data}",
        f"--model={tiny_model}",
        f"--ckpt_path={tiny_checkpoint}",
        "--resolution=16",
        "--num_inference_steps=2",
        "--device=cpu",
    ]


@contextlib.contextmanager
def as_command_line(script, *arguments, folder):
    """Yield the script's main(), to be run in this process: a new process would take seconds to start."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        generator = "noisecutmix.generator"  # simulated.py replaces it
        patch.setitem(sys.modules, generator, importlib.import_module(generator))
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(path_of(script)), *map(str, arguments)])
        try:
            yield naming_flags(main_of(script))
        finally:
            signal.signal(signal.SIGTERM, handler)


def path_of(script):
    """Return the file of a script, or of a command that is started with -m."""
    return ROOT / (script if script.endswith(".py") else f"{script.replace('.', '/')}/__main__.py")


def main_of(script):
    """Return the main() of a script or a command."""
    if script.endswith(".py"):
        return load_module(ROOT / script).main
    return importlib.import_module(f"{script}.__main__").main


def naming_flags(main):
    """Return a main() whose errors name flags, as the script prints them."""

    def run():
        try:
            main()
        except (InputError, RunError) as error:
            raise type(error)(error.as_line()) from error

    return run


def files_of(folder):
    """Return {name: content} of the files of a data set, without what a killed process left behind."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "run.json" and path.suffix != ".tmp"
    }


@pytest.fixture
def start(tmp_path):
    """Start a command in the background; at the end, kill every process that is still running."""
    processes = []

    def start_one(arguments, **environment):
        process = subprocess.Popen(
            arguments,
            cwd=tmp_path,
            env=offline_environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start_one
    for process in processes:
        if process.poll() is None:
            for running in (*psutil.Process(process.pid).children(recursive=True), process):
                running.kill()


def wait_until(condition, process):
    end = time.monotonic() + MAX_WAIT
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"nothing in {MAX_WAIT} s"
        time.sleep(0.01)


def wait_for_images(folder, count, process):
    wait_until(lambda: len(list((folder / "image").glob("gen_*.png"))) >= count, process)


def run_to_the_end(tmp_path, arguments, num_aug, *more, script="tests/simulated.py"):
    """Build a data set; without a script, augmentation.py draws with the simulated generator."""
    arguments = [*arguments, f"--num_aug={num_aug}", "--output_dir=out", *more]
    with as_command_line(script, *arguments, folder=tmp_path) as main:
        main()


@pytest.fixture(scope="session")
def whole(tmp_path_factory, tiny_arguments):
    """A complete data set of twenty items, drawn by the simulated generator without an interruption."""
    folder = tmp_path_factory.mktemp("whole")
    run_to_the_end(folder, tiny_arguments, 20)
    return folder / "out"


@pytest.fixture(scope="session")
def drawn(tmp_path_factory, tiny_arguments):
    """A complete data set of twenty items, drawn by the tiny model without an interruption."""
    folder = tmp_path_factory.mktemp("drawn")
    run_to_the_end(folder, tiny_arguments, 20, script="augmentation.py")
    return folder / "out"


@pytest.fixture
def out(whole, tmp_path):
    """A copy of `whole`."""
    return shutil.copytree(whole, tmp_path / "out")


def command(script, *arguments):
    start = [str(ROOT / script)] if str(script).endswith(".py") else ["-m", script]
    return [sys.executable, *start, *map(str, arguments)]


def offline_environment(**changes):
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1", "PYTHONPATH": str(ROOT), **changes}


@pytest.fixture
def run_script(tmp_path):
    """Run a script as a user does, in an empty working directory; return the completed process."""

    def run(script, *arguments, timeout=240, environment=None, **options):
        return subprocess.run(
            command(script, *arguments),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=timeout,
            cwd=tmp_path,
            env=offline_environment(**(environment or {})),
            **options,
        )

    return run
