"""Planned items in, pictures out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .checkpoint import find_placeholders, load_pipeline
from .checks import check_number
from .classes import DEFAULT_PROMPT, check_prompt, find_repeated, load_classes, vae_scale_factor
from .cutmix import draw_mask
from .errors import InputError, RunError, is_out_of_memory
from .launch import say
from .pipeline import NonFiniteImageError
from .plan import Item, Plan


class NoiseCutMixGenerator:
    """Draws pictures of a data set's class pairs with its fine-tuned model.

    Args:
        device: where to draw, "cuda", "mps" or "cpu".
        data_name: cub, flower, aircraft, digits, or a JSON file (see `load_classes`).
        ckpt_path: a Diff-Mix checkpoint's folder; None is the data set's own.
        guidance_scale, num_inference_steps, guidance_interval: see `NoiseCutMixPipeline`.
        alpha: of CutMix's Beta distribution, above 0.
        class_names, meta_class: in place of the data set's.
        model: a hub id or a local diffusers folder; None is the data set's own.
        resolution: the pictures' side in pixels; None is the data set's own.
        dtype: None is float16 on cuda and float32 elsewhere.
        prompt: a template with {name} and {meta_class}.
        seed: the plan's seed; item i is a function of it and i.
        batch_size: pictures drawn at once; halved when the device runs out of memory.

    Attributes:
        class_names, meta_class, num_classes: the data set's.
        pipe: the NoiseCutMixPipeline.
        plan: the Plan that items come from.

    Raises:
        InputError: the data set, the model, the checkpoint or the prompt is wrong.
        ValueError: another argument is out of its range.
    """

    def __init__(
        self,
        device: str = "cuda",
        data_name: str = "cub",
        ckpt_path: str | Path | None = None,
        guidance_scale: float = 7.5,
        num_inference_steps: int = 25,
        alpha: float = 1.0,
        class_names: Sequence[str] | None = None,
        meta_class: str | None = None,
        model: str | None = None,
        resolution: int | None = None,
        dtype: torch.dtype | None = None,
        prompt: str = DEFAULT_PROMPT,
        seed: int = 0,
        batch_size: int = 8,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ):
        if batch_size < 1:
            raise ValueError(f"`batch_size` has to be at least 1 but is {batch_size}.")
        check_number("guidance_scale", guidance_scale, 0)
        check_prompt(prompt)
        classes = load_classes(data_name)
        self.class_names = list(classes.names if class_names is None else class_names)
        if find_repeated(self.class_names):
            raise ValueError(f"`class_names` has {find_repeated(self.class_names)!r} twice.")
        self.meta_class = meta_class or classes.meta_class
        self.num_classes = len(self.class_names)
        self.guidance_scale = guidance_scale
        self.num_inference_steps = num_inference_steps
        self.guidance_interval = guidance_interval
        self.batch_size = batch_size
        self.plan = Plan(seed, self.num_classes, alpha, classes.resolution if resolution is None else resolution)
        model = model or classes.model
        ckpt_path = ckpt_path or classes.ckpt_path
        if ckpt_path is None:
            raise InputError("--ckpt_path: a data set of one's own needs its Diff-Mix checkpoint's folder")
        if self.plan.resolution % vae_scale_factor(model):
            raise InputError(f"--resolution: has to be a multiple of {vae_scale_factor(model)}")

        self.pipe = load_pipeline(model, ckpt_path, device, dtype)
        self.pipe.set_progress_bar_config(disable=True)
        placeholders = find_placeholders(self.class_names, self.pipe.name2placeholder)
        self._prompts = [prompt.format(name=name, meta_class=self.meta_class) for name in placeholders]
        self._check_prompts_keep(placeholders)
        self._embeds: dict[str, torch.Tensor] = {}
        self._next_index = 0
        self._pads_batches = False

    def __call__(
        self,
        target_labels: Sequence[int],
        resolution: int | None = None,
        return_mask: bool = False,
        aug_labels: Sequence[int] | None = None,
    ) -> tuple[Any, ...]:
        """Draw one picture a target label, each mixed with another class.

        Repeated calls go on in the plan: new boxes, new noise, new aug classes.

        Args:
            target_labels: the classes inside the boxes, 0 to num_classes - 1.
            resolution: the pictures' side in pixels; None is the generator's.
            return_mask: also return the masks.
            aug_labels: the classes outside the boxes; None draws them among the others.

        Returns:
            (images, labels) or (images, labels, masks): lists of RGB pictures, float32 arrays (num_classes,), and "L"
            pictures of 0 and 255.

        Raises:
            ValueError: a label is out of range, or target and aug class are the same.
            RunError: the device is out of memory at batch size 1, or a picture is not finite.
        """
        augs: Sequence[int | None] = [None] * len(target_labels) if aug_labels is None else aug_labels
        if len(augs) != len(target_labels):
            raise ValueError(f"`aug_labels` has to have {len(target_labels)} entries but has {len(augs)}.")
        for label in (*target_labels, *augs):
            if label is not None and not 0 <= label < self.num_classes:
                raise ValueError(f"labels have to lie within 0 to {self.num_classes - 1} but one is {label}.")
        resolution = self.plan.resolution if resolution is None else resolution
        plan = Plan(self.plan.seed, self.num_classes, self.plan.alpha, resolution)
        items = [plan.item(self._next_index + i, *pair) for i, pair in enumerate(zip(target_labels, augs))]
        images = self.draw(items)
        self._next_index += len(items)
        labels = [item.soft_label(self.num_classes) for item in items]
        if not return_mask:
            return images, labels
        return images, labels, [draw_mask(item.box, plan.resolution, plan.resolution) for item in items]

    def draw(self, items: Sequence[Item]) -> list[Image.Image]:
        """Return the items' pictures, RGB, in order.

        Out of memory, the batch is halved (and stays so) and tried again.

        Raises:
            RunError: out of memory at batch size 1, or a picture that is not finite.
        """
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
                    raise RunError(
                        "out of memory at batch size 1; use --resolution or --dtype=float16, or a larger device"
                    ) from error
            # outside the handler, so that the failed try's memory is free
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self._pads_batches:
                torch.compiler.reset()  # no more code for the old size, and none that counts towards torch's limit
            self.batch_size = size // 2
            say(f"out of memory at batch size {size}, going on with {self.batch_size}")
        return images

    def compile(self) -> None:
        """Compile UNet and VAE decoder by drawing a batch; later ones are padded, so that none compiles again."""
        self.pipe.unet.compile(mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)
        self.pipe.vae.decoder.compile(mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)
        self._pads_batches = True
        self.draw([self.plan.item(0)])

    def _check_prompts_keep(self, placeholders: list[str]) -> None:
        """A prompt beyond the tokenizer's limit is cut: the class must not be what is lost."""
        tokenizer = self.pipe.tokenizer
        for prompt, placeholder in zip(self._prompts, placeholders):
            if tokenizer.convert_tokens_to_ids(placeholder) not in tokenizer(prompt, truncation=True).input_ids:
                raise InputError(
                    f"--prompt: {{name}} is missing or lies beyond the {tokenizer.model_max_length} tokens that the "
                    "model reads; shorten the text before it"
                )

    def _draw_batch(self, items: Sequence[Item]) -> list[Image.Image]:
        batch = list(items)
        resolution = batch[0].resolution
        if self._pads_batches:
            batch += [batch[-1]] * (self.batch_size - len(batch))
        try:
            images: list[Image.Image] = self.pipe(
                mask=[draw_mask(item.box, resolution, resolution) for item in batch],
                height=resolution,
                width=resolution,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                guidance_interval=self.guidance_interval,
                generator=[torch.Generator().manual_seed(item.noise_seed) for item in batch],
                prompt_1_embeds=self._encode([self._prompts[item.target] for item in batch]),
                prompt_2_embeds=self._encode([self._prompts[item.aug] for item in batch]),
                negative_prompt_embeds=self._encode([""] * len(batch)),
                return_dict=False,
            )[0]
        except NonFiniteImageError as error:
            numbers = ", ".join(dict.fromkeys(str(batch[index].index) for index in error.indices))
            raise RunError(
                f"item {numbers}: the picture is not finite (float16 overflows); "
                "use --dtype=bfloat16, with --overwrite in a begun folder"
            ) from error
        return images[: len(items)]

    def _encode(self, prompts: list[str]) -> torch.Tensor:
        """Return the prompts' embeddings (B, tokens, width); each prompt is encoded once, on first use."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._embeds:
                with torch.no_grad():
                    self._embeds[prompt] = self.pipe.encode_prompt(prompt, self.pipe.device, 1, False)[0]
        return torch.cat([self._embeds[prompt] for prompt in prompts])
