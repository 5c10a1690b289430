"""Time noisecutmix.finetune's trainer beside a plain loop in Diff-Mix's order, side by side in one run.

`tests/measure/benchmark.py --finetune` prints it. Each way has a process of its own, and they take turns.

The plain loop: the VAE in every step, the whole token table trained with moments for each of its rows and the old rows
copied back, attention without scaled_dot_product_attention. Both see the same pictures and the same noise.
"""

import argparse
import gc
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import logging as diffusers_logging
from peft import LoraConfig
from PIL import Image, ImageOps
from random_models import RECIPE, SHAPES, build
from transformers.utils import logging as transformers_logging

from noisecutmix.classes import load_classes, normalise
from noisecutmix.finetune.folder import Recipe
from noisecutmix.finetune.samples import plan_sample
from noisecutmix.finetune.trainer import LORA_LAYERS, Trainer, create_accelerator
from noisecutmix.photos import find_photos
from noisecutmix.photos.opening import crop_square, open_photo

NUM_CLASSES, PICTURES_A_CLASS = 10, 2
WAYS = ("plain", "ours")


@dataclass
class Setup:
    """What both ways train: a model, a folder of pictures, and how."""

    data_dir: Path
    device: str
    model: str
    recipe: Recipe


class PlainLoop:
    """Trains in Diff-Mix's order."""

    def __init__(self, setup: Setup):
        self.setup = setup
        recipe = setup.recipe
        self.dtype = getattr(torch, recipe.dtype)
        self.photos = find_photos(setup.data_dir)
        pipe = StableDiffusionPipeline.from_pretrained(setup.model, torch_dtype=torch.float32, safety_checker=None)
        for part in (pipe.vae, pipe.unet, pipe.text_encoder):
            part.requires_grad_(False)
        pipe.vae.to(setup.device, self.dtype)
        pipe.unet.to(setup.device, self.dtype)
        config = LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, target_modules=LORA_LAYERS)
        pipe.unet.add_adapter(config)
        pipe.unet.set_attn_processor(AttnProcessor())
        rng = torch.Generator().manual_seed(recipe.seed)
        self.lora = []
        for module in pipe.unet.modules():
            if hasattr(module, "lora_A"):
                down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
                down.data = (torch.randn(down.shape, generator=rng) / recipe.rank).to(setup.device)
                up.data = torch.zeros(up.shape, device=setup.device)
                self.lora += [down, up]
        tokens = [f"<class_{label}>" for label in range(len(self.photos.class_names))]
        own_ids = [
            pipe.tokenizer(normalise(name), add_special_tokens=False).input_ids for name in self.photos.class_names
        ]
        pipe.tokenizer.add_tokens(tokens)
        pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
        pipe.text_encoder.to(setup.device)
        self.table = pipe.text_encoder.get_input_embeddings().weight.requires_grad_(True)
        new_ids = pipe.tokenizer.convert_tokens_to_ids(tokens)
        with torch.no_grad():
            for new_id, ids in zip(new_ids, own_ids):
                self.table[new_id] = self.table[ids].mean(0)
        self.old_rows = self.table.detach().clone()
        self.is_old = torch.ones(len(self.table), dtype=torch.bool)
        self.is_old[new_ids] = False
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self.lora, "lr": recipe.learning_rate},
                {"params": [self.table], "lr": recipe.token_learning_rate},
            ]
        )
        self.schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        self.pipe = pipe
        factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        self.shape = (pipe.vae.config.latent_channels, *[recipe.resolution // factor] * 2)

    def step(self, step: int) -> float:
        recipe, photos, device = self.setup.recipe, self.photos, self.setup.device
        size = recipe.effective_batch
        count, flips = len(photos.files), recipe.random_flip
        samples = [plan_sample(recipe.seed, step * size + i, count, 1000, self.shape, flips) for i in range(size)]
        images = [crop_square(open_photo(photos.files[sample.picture]), recipe.resolution) for sample in samples]
        images = [ImageOps.mirror(image) if sample.view[1] else image for image, sample in zip(images, samples)]
        pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])
        with torch.no_grad():
            posterior = self.pipe.vae.encode(pixels.to(device, self.dtype)).latent_dist
        posterior_noise = torch.stack([sample.posterior_noise for sample in samples]).to(device)
        latents = (
            posterior.mean.float() + posterior.std.float() * posterior_noise
        ) * self.pipe.vae.config.scaling_factor
        noise = torch.stack([sample.noise for sample in samples]).to(device)
        timesteps = torch.tensor([sample.timestep for sample in samples], device=device)
        noisy = self.schedule.add_noise(latents, noise, timesteps).to(self.dtype)
        captions = [f"a photo of a <class_{photos.labels[sample.picture]}> {recipe.meta_class}" for sample in samples]
        ids = self.pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.autocast(torch.device(device).type, self.dtype, enabled=self.dtype != torch.float32):
            hidden = self.pipe.text_encoder(ids.to(device))[0].to(self.dtype)
            estimate = self.pipe.unet(noisy, timesteps, encoder_hidden_states=hidden).sample
        is_noise = self.schedule.config.prediction_type == "epsilon"
        target = noise if is_noise else self.schedule.get_velocity(latents, noise, timesteps)
        loss = F.mse_loss(estimate.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.lora, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.table[self.is_old] = self.old_rows[self.is_old]
        return loss.item()


class OurLoop:
    """Trains as noisecutmix.finetune does."""

    def __init__(self, setup: Setup):
        recipe, photos = setup.recipe, find_photos(setup.data_dir)
        machine = {"batch_size": recipe.effective_batch, "accumulated": 1, "checkpoints_gradients": False}
        accelerator = create_accelerator(setup.device, recipe.dtype)
        self.trainer = Trainer(recipe, photos, accelerator, model=setup.model, **machine)
        start = time.perf_counter()
        self.trainer.latents.encode(setup.data_dir.with_suffix(".bin"), "")
        self.seconds_encoding = time.perf_counter() - start
        gc.collect()

    def step(self, step: int) -> float:
        return self.trainer.step(step)[0]


def work(way: str, setup: Setup, connection: Connection) -> None:
    """Train `count` steps as often as asked; send the seconds, losses and peak memory."""
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    loop: PlainLoop | OurLoop = PlainLoop(setup) if way == "plain" else OurLoop(setup)
    losses = [loop.step(0)]  # warm-up
    connection.send({"seconds_encoding": getattr(loop, "seconds_encoding", None)})
    while count := connection.recv():
        start = time.perf_counter()
        losses += [loop.step(len(losses) + i) for i in range(count)]
        connection.send(
            {"seconds": time.perf_counter() - start, "losses": losses, "peak_gb": peak_memory(setup.device)}
        )


def peak_memory(device: str) -> float:
    """Return the peak in GB: of the device's allocations on cuda, else of the process (Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(setup: Setup, steps: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Return, for each way, steps a second (each repeat's), the losses, the peak memory in GB, seconds of encoding."""
    context = multiprocessing.get_context("spawn")
    connections, results = {}, {}
    for way in WAYS:
        connections[way], theirs = context.Pipe()
        context.Process(target=work, args=(way, setup, theirs), daemon=True).start()
        results[way] = {"steps_per_second": [], **connections[way].recv()}  # one loads after the other
    for _ in range(repeats):
        for way in WAYS:
            connections[way].send(steps)
            answer = connections[way].recv()
            results[way]["steps_per_second"].append(steps / answer.pop("seconds"))
            results[way].update(answer)
    for connection in connections.values():
        connection.send(0)
    return results


def write_pictures(folder: Path, side: int) -> Path:
    rng = np.random.default_rng(0)
    for label in range(NUM_CLASSES):
        (folder / f"kind {label}").mkdir(parents=True)
        for number in range(PICTURES_A_CLASS):
            pixels = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"kind {label}" / f"{number}.png")
    return folder


def prepare(options: argparse.Namespace, folder: Path) -> Setup:
    """Write pictures, and a model with random weights where the demo's is not asked for."""
    if options.arch == "digits":
        model, resolution = load_classes("digits").model, 32
    else:
        build(folder, SHAPES[options.arch])
        model, resolution = str(folder / "base"), SHAPES[options.arch].resolution
    resolution = options.resolution or resolution
    dtype = options.dtype or ("float16" if options.device == "cuda" else "float32")
    size = options.batch_size
    recipe = replace(RECIPE, resolution=resolution, random_flip=False, dtype=dtype, effective_batch=size)
    return Setup(write_pictures(folder / "pictures", resolution), options.device, model, recipe)


def table(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    plain, ours = (results[way] for way in WAYS)
    yield "| | plain | ours | ratio |"
    yield "|---|---|---|---|"
    medians = [statistics.median(way["steps_per_second"]) for way in (plain, ours)]
    cells = [
        f"{median:.3g} ({min(way['steps_per_second']):.3g} to {max(way['steps_per_second']):.3g})"
        for median, way in zip(medians, (plain, ours))
    ]
    yield f"| steps a second | {cells[0]} | {cells[1]} | {medians[1] / medians[0]:.2f} |"
    peaks = plain["peak_gb"], ours["peak_gb"]
    yield f"| peak memory (GB) | {peaks[0]:.2f} | {peaks[1]:.2f} | {peaks[1] / peaks[0]:.2f} |"
    yield f"| encoding beforehand (s) | | {ours['seconds_encoding']:.1f} | |"
    differences = [abs(own / other - 1) for own, other in zip(ours["losses"], plain["losses"])]
    yield f"\nlargest relative difference of the losses: {max(differences):.1e}"


def measure_finetune(options: argparse.Namespace) -> None:
    """Print the table for benchmark.py's options."""
    with tempfile.TemporaryDirectory() as folder:
        setup = prepare(options, Path(folder))
        results = measure(setup, options.steps, options.repeats)
    recipe = setup.recipe
    print(
        f"{options.arch} on {setup.device}, {recipe.dtype}: batch {recipe.effective_batch} of "
        f"{recipe.resolution}x{recipe.resolution}, {options.repeats} times {options.steps} steps; "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads\n"
    )
    print("\n".join(table(results)))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2), encoding="utf-8")
