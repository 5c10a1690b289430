"""The pipeline's prompts and masks: prompts are checked and counted, masks of every kind become grey pictures."""

import numpy as np
import torch
from PIL import Image

Mask = Image.Image | np.ndarray | torch.Tensor
Prompt = str | list[str]


def count_prompts(prompts: dict[str, Prompt | None], embeds: dict[str, torch.Tensor | None]) -> int:
    """Return the number of prompts in "prompt_1".

    Args:
        prompts: by parameter; all but "prompt_1" may be missing, the others have to be equally many.
        embeds: encoded prompts (B, tokens, width), by the same names, in place of prompts.

    Raises:
        ValueError: a prompt is missing or given twice, or they do not fit each other.
    """
    counts = {}
    for name, prompt in prompts.items():
        embed = embeds[name]
        if prompt is not None and embed is not None:
            raise ValueError(f"Give either `{name}` or `{name}_embeds`, and only one of the two.")
        texts = prompt if isinstance(prompt, list) else [] if prompt is None else [prompt]
        counts[name] = len(texts if embed is None else embed)
    batch_size = counts.pop("prompt_1")
    if not batch_size:
        raise ValueError("Give `prompt_1` or `prompt_1_embeds`.")
    for name, count in counts.items():
        if count != batch_size and (prompts[name] is not None or embeds[name] is not None):
            raise ValueError(f"`{name}` has to hold {batch_size}, as many as `prompt_1`, but holds {count}.")
    shapes = {tuple(embed.shape) for embed in embeds.values() if embed is not None}
    if len(shapes) > 1:
        raise ValueError(f"the prompts' embeds have to have one shape ({batch_size}, tokens, width) but have {shapes}.")
    return batch_size


def to_mask_pictures(mask: Mask | list[Mask], batch_size: int, height: int, width: int) -> list[Image.Image]:
    """Return one "L" picture for each prompt, so that every kind of mask is resized to the latents in the same way.

    Raises:
        ValueError: there are not as many masks as prompts, or one is transparent or has a wrong shape or range.
    """
    masks = list(mask) if isinstance(mask, (np.ndarray, torch.Tensor)) and mask.ndim == 3 else mask
    masks = masks if isinstance(masks, list) else [masks]
    if len(masks) != batch_size:
        raise ValueError(f"`mask` has to hold {batch_size}, one for each prompt, but holds {len(masks)}.")
    return [_to_mask_picture(one, height, width) for one in masks]


def _to_mask_picture(mask: Mask, height: int, width: int) -> Image.Image:
    if isinstance(mask, Image.Image) and mask.has_transparency_data:
        raise ValueError(
            f"`mask` of mode {mask.mode} has transparency, so its white area is not clear; "
            'give mask.getchannel("A") if its shape lies in the alpha channel, else mask.convert("RGB").'
        )
    if isinstance(mask, torch.Tensor):
        mask = mask.detach().cpu().float() if mask.is_floating_point() else mask.cpu()  # numpy has no bfloat16
    holds_levels = isinstance(mask, Image.Image) and not mask.mode.startswith(("F", "I"))  # F, I and I;16 hold numbers
    values = np.asarray(mask.convert("L") if isinstance(mask, Image.Image) and holds_levels else mask)
    if values.shape != (height, width):
        raise ValueError(f"`mask` has to have the shape (height, width) = {height, width} but has {values.shape}.")
    if values.dtype == np.uint8:
        if not holds_levels and values.max() == 1:
            raise ValueError("`mask` of uint8 has a range of 0 to 255 but its largest value is 1: give bool or float.")
        return Image.fromarray(values)
    values = values.astype(np.float32)
    if not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"`mask` has to lie within 0 to 1 but reaches from {values.min()} to {values.max()}.")
    return Image.fromarray(np.uint8(np.round(values * 255)))
