"""The pipeline's prompts and masks: prompts are checked and counted, masks of every kind become grey pictures."""

import numpy as np
import torch
from PIL import Image

Mask = Image.Image | np.ndarray | torch.Tensor
Prompt = str | list[str]


def count_prompts(prompts: dict[str, Prompt | None], embeds: dict[str, torch.Tensor | None]) -> int:
    """Return the number of prompts in each of "prompt_1", "prompt_2" and "negative_prompt" (which may be missing).

    Args:
        prompts: by parameter, in this order.
        embeds: encoded prompts, by the same names; each prompt has to be in one of the two.

    Raises:
        TypeError, ValueError: a prompt is missing, given twice or of a wrong type, or they do not fit each other.
    """
    counts = {}
    for name, prompt in prompts.items():
        texts = prompt if isinstance(prompt, list) else [] if prompt is None else [prompt]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"`{name}` has to be a `str` or a `list` of `str` but is {prompt!r}.")
        if not isinstance(embeds[name], torch.Tensor | None):
            raise TypeError(f"`{name}_embeds` has to be a tensor but is {type(embeds[name])}.")
        times_given = (prompt is not None) + (embeds[name] is not None)
        if times_given > 1 or (times_given == 0 and name != "negative_prompt"):
            raise ValueError(f"Give either `{name}` or `{name}_embeds`, and only one of the two.")
        counts[name] = len(texts if (embed := embeds[name]) is None else embed)
    types = [type(prompts[name]) for name in ("prompt_1", "prompt_2") if prompts[name] is not None]
    if len(set(types)) > 1:
        raise TypeError(f"`prompt_1` and `prompt_2` have to be of one type but are {types[0]} and {types[1]}.")
    batch_size, other, negative = counts.values()
    if batch_size != other or batch_size == 0:
        raise ValueError(f"`prompt_1` and `prompt_2` have to be equally many but are {batch_size} and {other}.")
    if negative != batch_size and prompts["negative_prompt"] is not None:
        raise ValueError(f"`negative_prompt` has to hold {batch_size}, one for each prompt, but holds {negative}.")
    shapes = {tuple(embed.shape) for embed in embeds.values() if embed is not None}
    if len(shapes) > 1 or (shapes and batch_size != min(shapes)[0]):
        raise ValueError(f"the prompts' embeds have to have one shape ({batch_size}, tokens, width) but have {shapes}.")
    return batch_size


def to_mask_pictures(mask: Mask | list[Mask] | None, batch_size: int, height: int, width: int) -> list[Image.Image]:
    """Return one "L" picture for each prompt, so that every kind of mask is resized to the latents in the same way.

    Raises:
        TypeError, ValueError: there are not as many masks as prompts, or one has a wrong type, mode, shape or range.
    """
    if mask is None:
        raise ValueError("Give `mask`: one for each prompt.")
    if isinstance(mask, (np.ndarray, torch.Tensor)) and mask.ndim == 3:
        mask = list(mask)
    masks = mask if isinstance(mask, list) else [mask]
    if len(masks) != batch_size:
        raise ValueError(f"`mask` has to hold {batch_size}, one for each prompt, but holds {len(masks)}.")
    return [_to_mask_picture(one, height, width) for one in masks]


def _to_mask_picture(mask: Mask, height: int, width: int) -> Image.Image:
    if not isinstance(mask, (Image.Image, np.ndarray, torch.Tensor)):
        raise TypeError(f"`mask` has to be a PIL image, an array or a tensor but is {type(mask)}.")
    if isinstance(mask, Image.Image):
        if mask.size != (width, height):
            raise ValueError(f"`mask` has to be {width} x {height} pixels (width x height) but is {mask.size}.")
        if mask.has_transparency_data and not _is_opaque(mask):
            raise ValueError(
                f"`mask` of mode {mask.mode} is transparent in places, so its white area is not clear; "
                'give mask.getchannel("A") if its shape lies in the alpha channel, else mask.convert("RGB").'
            )
        if not _holds_numbers(mask):
            try:
                return mask.convert("L")
            except ValueError as error:
                raise ValueError(
                    f"`mask` of mode {mask.mode} cannot be turned into grey; give it as mode L."
                ) from error
    if isinstance(mask, torch.Tensor):
        mask = mask.detach().cpu().float() if mask.is_floating_point() else mask.cpu()  # numpy has no bfloat16
    values = np.asarray(mask)
    if values.shape != (height, width):
        raise ValueError(f"`mask` has to have the shape (height, width) = {height, width} but has {values.shape}.")
    if values.dtype.kind not in "biuf":
        raise ValueError(f"`mask` has to hold real numbers but holds {values.dtype}.")
    if values.dtype == np.uint8:
        if values.max() == 1:
            raise ValueError("`mask` of uint8 has a range of 0 to 255 but its largest value is 1: give bool or float.")
        return Image.fromarray(values)
    values = values.astype(np.float32)
    if not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"`mask` has to lie within 0 to 1 but reaches from {values.min()} to {values.max()}.")
    return Image.fromarray(np.uint8(np.round(values * 255)))


def _holds_numbers(picture: Image.Image) -> bool:
    """Return whether a picture's values are numbers (F, I, I;16 and similar modes), not levels of 0 to 255."""
    return picture.mode.startswith(("F", "I"))


def _is_opaque(picture: Image.Image) -> bool:
    if _holds_numbers(picture) or picture.mode == "La":  # Pillow cannot convert their transparency
        return False
    return picture.convert("RGBA").getchannel("A").getextrema() == (255, 255)
