"""What the pipeline is given: refused in one sentence where it cannot be right; masks of every kind made pictures."""

import math

import numpy as np
import torch
from PIL import Image

Mask = Image.Image | np.ndarray | torch.Tensor
Prompt = str | list[str]


def check_prompts(
    prompt_1: Prompt | None,
    prompt_2: Prompt | None,
    prompt_1_embeds: torch.Tensor | None,
    prompt_2_embeds: torch.Tensor | None,
    negative_prompt_embeds: torch.Tensor | None,
) -> None:
    for number, prompt, embeds in ((1, prompt_1, prompt_1_embeds), (2, prompt_2, prompt_2_embeds)):
        if (prompt is None) == (embeds is None):
            raise ValueError(f"Provide either `prompt_{number}` or `prompt_{number}_embeds`, not both and not none.")
        if prompt is not None and not isinstance(prompt, (str, list)):
            raise TypeError(f"`prompt_{number}` has to be a `str` or `list` but is {type(prompt)}.")
    if prompt_1 is not None and prompt_2 is not None and type(prompt_1) is not type(prompt_2):
        raise TypeError(
            f"`prompt_1` and `prompt_2` have to be of one type but are {type(prompt_1)} and {type(prompt_2)}."
        )
    size_1, size_2 = count_prompts(prompt_1, prompt_1_embeds), count_prompts(prompt_2, prompt_2_embeds)
    if size_1 != size_2 or size_1 == 0:
        raise ValueError(f"`prompt_1` and `prompt_2` have to be equally many but are {size_1} and {size_2}.")
    shapes = {
        tuple(embeds.shape)
        for embeds in (prompt_1_embeds, prompt_2_embeds, negative_prompt_embeds)
        if embeds is not None
    }
    if len(shapes) > 1 or (shapes and size_1 != min(shapes)[0]):
        raise ValueError(f"the prompts' embeds have to have one shape ({size_1}, tokens, width) but have {shapes}.")


def count_prompts(prompt: Prompt | None, embeds: torch.Tensor | None) -> int:
    if embeds is not None:
        return len(embeds)
    return len(prompt) if isinstance(prompt, list) else 1


def check_size(height: int, width: int, factor: int) -> None:
    if height < 1 or width < 1 or height % factor or width % factor:
        raise ValueError(f"`height` and `width` have to be multiples of {factor} but are {height} and {width}.")


def check_counts(num_inference_steps: int, num_images_per_prompt: int) -> None:
    if num_inference_steps < 1 or num_images_per_prompt < 1:
        raise ValueError(
            "`num_inference_steps` and `num_images_per_prompt` have to be at least 1 but are "
            f"{num_inference_steps} and {num_images_per_prompt}."
        )


def check_guidance_scale(guidance_scale: float) -> None:
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ValueError(f"`guidance_scale` has to be a number of at least 0 but is {guidance_scale}.")


def check_guidance_interval(guidance_interval: tuple[float, float]) -> None:
    if len(guidance_interval) != 2 or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
        raise ValueError(f"`guidance_interval` has to rise within 0 to 1 but is {guidance_interval}.")


def check_output_type(output_type: str) -> None:
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"`output_type` has to be pil, np, pt or latent but is {output_type!r}.")


def check_latents(latents: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if latents is not None and tuple(latents.shape) != shape:
        raise ValueError(f"`latents` has to have the shape {shape} but has {tuple(latents.shape)}.")


def to_mask_pictures(mask: Mask | list[Mask] | None, batch_size: int, height: int, width: int) -> list[Image.Image]:
    """Return one "L" picture a prompt, so that every kind of mask takes the same way to the latents.

    Raises:
        ValueError: there are not as many as prompts, or one has another shape or range.
    """
    if mask is None:
        raise ValueError("Provide `mask`: one a prompt.")
    if isinstance(mask, (np.ndarray, torch.Tensor)) and mask.ndim == 3:
        mask = list(mask)
    masks = [_to_mask_picture(one) for one in (mask if isinstance(mask, list) else [mask])]
    if len(masks) != batch_size:
        raise ValueError(f"`mask` has to hold one mask a prompt, {batch_size}, but holds {len(masks)}.")
    for one in masks:
        if one.size != (width, height):
            raise ValueError(f"`mask` has to be {width} x {height} pixels (width x height) but is {one.size}.")
    return masks


def _to_mask_picture(mask: Mask) -> Image.Image:
    if isinstance(mask, Image.Image) and not mask.mode.startswith(("F", "I")):
        return mask.convert("L")
    if isinstance(mask, torch.Tensor):
        mask = mask.detach().cpu().float() if mask.is_floating_point() else mask.cpu()  # numpy has no bfloat16
    values = np.asarray(mask)
    if values.ndim != 2:
        raise ValueError(f"`mask` has to have the shape (height, width) but has {values.shape}.")
    if values.dtype == np.uint8:
        if values.max(initial=0) == 1:
            raise ValueError("`mask` of uint8 reaches from 0 to 255 but its largest value is 1: give bool or float.")
        return Image.fromarray(values)
    values = values.astype(np.float32)
    if not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"`mask` has to lie within 0 to 1 but reaches from {values.min()} to {values.max()}.")
    return Image.fromarray(np.uint8(np.round(values * 255)))
