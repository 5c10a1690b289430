"""Draw the items of a plan with a data set's fine-tuned model."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .checkpoint import load_pipeline, load_sampler
from .classes import DEFAULT_PROMPT, Classes, check_prompt, find_placeholders, find_repeated, load_classes
from .errors import InputError, RunError, first_line, is_out_of_memory, quiet_libraries
from .pipeline import check_schedule
from .plan import Item, Plan
from .ranges import RANGES, Range, check_resolution
from .script import say
from .sources import find_checkpoint_files

Labels = Sequence[int] | np.ndarray | torch.Tensor


class NoiseCutMixGenerator:
    """Draws pictures of a data set's class pairs with its fine-tuned model.

    Args:
        device: where to draw, "cuda", "mps" or "cpu".
        data_name: cub, flower, aircraft, digits, a JSON file or a folder (see `load_classes`), or a `Classes` object.
        ckpt_path: the folder of a Diff-Mix checkpoint; None is the data set's own.
        guidance_scale, guidance_interval: see `NoiseCutMixPipeline`.
        num_inference_steps: denoising steps, at least 1 and fewer than the timesteps of the model's noise schedule.
        alpha: both parameters of CutMix's Beta distribution, above 0.
        class_names, meta_class: replace the data set's.
        model: a hub id, also "id@revision", or a local diffusers folder; None is the data set's own.
        resolution: side of a picture in pixels, a multiple of the VAE's factor; None is the data set's own.
        dtype: float16, bfloat16 or float32, as a torch.dtype or its name; None is float16 on cuda, else float32.
        prompt: a template with {name} and optionally {meta_class}.
        seed: the plan's seed; item i depends on the seed and i.
        batch_size: pictures drawn at once; halved when the device runs out of memory.
        plan: the items to draw; it replaces `seed`, `alpha` and `resolution`. With its `single_class`, the aug class is
            not drawn at all, and the mask is ignored.

    Attributes: `class_names`, `meta_class` and `num_classes` of the data set, the pipeline `pipe`, and the `plan`.

    Raises:
        InputError: an argument is wrong; the message names it.
        RunError: the device has too little memory for the model.
    """

    def __init__(
        self,
        device: str | torch.device = "cuda",
        data_name: str | Path | Classes = "cub",
        ckpt_path: str | Path | None = None,
        guidance_scale: float = 7.5,
        num_inference_steps: int = 25,
        alpha: float = 1.0,
        class_names: Sequence[str] | None = None,
        meta_class: str | None = None,
        model: str | Path | None = None,
        resolution: int | None = None,
        dtype: torch.dtype | str | None = None,
        prompt: str = DEFAULT_PROMPT,
        seed: int = 0,
        batch_size: int = 8,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        plan: Plan | None = None,
    ):
        self.batch_size = RANGES["batch_size"].check("batch_size", batch_size)
        check_prompt(prompt)
        classes = data_name if isinstance(data_name, Classes) else load_classes(str(data_name))
        self.class_names = list(classes.names if class_names is None else class_names)
        if find_repeated(self.class_names):
            raise InputError(f"{find_repeated(self.class_names)!r} occurs twice", "class_names")
        self.meta_class = classes.meta_class if meta_class is None else meta_class
        self.num_classes = len(self.class_names)
        resolution = classes.resolution if resolution is None else resolution
        self.plan = Plan(seed, self.num_classes, alpha, resolution) if plan is None else plan
        if self.plan.num_classes != self.num_classes:
            raise InputError(f"is for {self.plan.num_classes} classes, the data set has {self.num_classes}", "plan")
        ckpt_path = classes.ckpt_path if ckpt_path is None else ckpt_path
        if ckpt_path is None:
            raise InputError("a data set of your own needs the folder of its Diff-Mix checkpoint", "ckpt_path")

        model = str(classes.model if model is None else model)
        find_checkpoint_files(Path(ckpt_path))  # before a model is downloaded
        check_schedule(load_sampler(model, dtype, str(device)), num_inference_steps)  # before the weights are loaded
        try:
            self.pipe = load_pipeline(model, ckpt_path, device, dtype)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise RunError(f"out of memory on {device} while loading the model; do others use it?") from error
            raise
        self.pipe.set_progress_bar_config(disable=True)
        check_resolution(self.plan.resolution, self.pipe.vae_scale_factor)
        self.pipe.check_steps(num_inference_steps, guidance_scale, guidance_interval)
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.guidance_interval = guidance_interval
        placeholders = find_placeholders(self.class_names, self.pipe.name2placeholder)
        self._prompts = [prompt.format(name=name, meta_class=self.meta_class) for name in placeholders]
        with quiet_libraries():
            longest = max(len(ids) for ids in self.pipe.tokenizer(self._prompts).input_ids)
        if longest > (limit := self.pipe.tokenizer.model_max_length):
            reason = f"{{name}} or the text after it lies beyond the {limit} tokens that the model reads"
            raise InputError(f"{reason}; shorten the template by {longest - limit} tokens", "prompt")
        self._embeds: dict[str, torch.Tensor] = {}
        self._next_index, self._pads_batches = 0, False

    def __call__(
        self,
        target_labels: Labels,
        resolution: int | None = None,
        return_mask: bool = False,
        aug_labels: Labels | None = None,
    ) -> tuple[Any, ...]:
        """Draw one picture for each target label, mixed with another class.

        Each call takes the plan's next items: new boxes, new noise, new aug classes.

        Args:
            target_labels: the classes inside the boxes, whole numbers from 0 to num_classes - 1: a list, an array or a
                tensor of one dimension.
            resolution: side of a picture in pixels; None is the plan's.
            return_mask: also return the masks.
            aug_labels: the classes outside the boxes; None draws them from the other classes.

        Returns:
            (images, labels) or (images, labels, masks): lists of RGB pictures, float32 arrays (num_classes,), and "L"
            pictures of 0 and 255.

        Raises:
            InputError: a label is not a whole number or out of range, target and aug class are the same, or
                `resolution` is not a multiple of the VAE's factor.
            RunError: the device is out of memory at batch size 1, or a picture is not finite.
        """
        targets = self._as_labels("target_labels", target_labels)
        augs = [None] * len(targets) if aug_labels is None else self._as_labels("aug_labels", aug_labels)
        if len(augs) != len(targets):
            raise InputError(f"has to hold {len(targets)} labels, not {len(augs)}", "aug_labels")
        plan = self.plan if resolution is None else replace(self.plan, resolution=resolution)
        check_resolution(plan.resolution, self.pipe.vae_scale_factor)
        items = [plan.item(self._next_index + i, *pair) for i, pair in enumerate(zip(targets, augs))]
        images = self.draw(items)
        self._next_index += len(items)
        labels = [item.soft_label(self.num_classes) for item in items]
        if not return_mask:
            return images, labels
        return images, labels, [item.mask() for item in items]

    def draw(self, items: Sequence[Item]) -> list[Image.Image]:
        """Return the items' pictures, RGB, in order.

        When the device is out of memory, the batch size is halved permanently and the batch is tried again.

        Raises:
            InputError: the items have several resolutions.
            RunError: the device is out of memory at batch size 1, or a picture is not finite.
        """
        if len({item.resolution for item in items}) > 1:
            raise InputError("have to be of one resolution; use one call for each resolution", "items")
        images: list[Image.Image] = []
        while len(images) < len(items):
            batch = items[len(images) : len(images) + self.batch_size]
            size = self.batch_size if self._pads_batches else len(batch)
            try:
                images += self._draw_batch(batch)
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    remedy = "use a smaller resolution, dtype=float16 or a larger device"
                    raise RunError(f"out of memory at batch size 1; {remedy}") from error
            # outside the handler, where the memory of the failed attempt is free
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self._pads_batches:
                torch.compiler.reset()  # drop the code for the old size: torch limits how often it compiles
            self.batch_size = size // 2
            say(f"out of memory at batch size {size}, continuing with {self.batch_size}")
        return images

    def compile(self) -> None:
        """Compile UNet and VAE decoder by drawing a batch, and print the seconds; later batches are padded to its size.

        Raises:
            RunError: PyTorch cannot compile here, or the device is out of memory at batch size 1.
        """
        self.pipe.unet.compile(mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)
        self.pipe.vae.decoder.compile(mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)
        self._pads_batches, start = True, time.perf_counter()
        try:
            self.draw([self.plan.item(0)])
        except RunError:
            raise
        except RuntimeError as error:  # the base of torch's compilation errors, whose messages can have 10 kB
            raise RunError(f"{first_line(error)[:300]}; without it the run is only slower", "compile") from error
        say(f"compiled in {time.perf_counter() - start:.0f} s")

    def _as_labels(self, name: str, labels: Labels) -> list[int]:
        valid = Range(int, 0, self.num_classes - 1)
        return [valid.check(name, x.item() if isinstance(x, torch.Tensor) else x) for x in labels]

    def _draw_batch(self, items: Sequence[Item]) -> list[Image.Image]:
        batch = list(items)
        if self._pads_batches:
            batch += [batch[-1]] * (self.batch_size - len(batch))
        is_mixed = not self.plan.single_class
        images: list[Image.Image] = self.pipe(
            mask=[item.mask() for item in batch] if is_mixed else None,
            height=batch[0].resolution,
            width=batch[0].resolution,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            guidance_interval=self.guidance_interval,
            generator=[torch.Generator().manual_seed(item.noise_seed) for item in batch],
            prompt_1_embeds=self._encode([self._prompts[item.target] for item in batch]),
            prompt_2_embeds=self._encode([self._prompts[item.aug] for item in batch]) if is_mixed else None,
            negative_prompt_embeds=self._encode([""] * len(batch)),
            return_dict=False,
        )[0]
        return images[: len(items)]

    def _encode(self, prompts: list[str]) -> torch.Tensor:
        """Return the prompts' embeddings (B, tokens, width); each different prompt is encoded only once."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._embeds:
                with torch.no_grad():
                    self._embeds[prompt] = self.pipe.encode_prompt(prompt, self.pipe.device, 1, False)[0]
        return torch.cat([self._embeds[prompt] for prompt in prompts])
