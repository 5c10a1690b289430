"""NoiseCutMix: two prompts' noise estimates, merged under a mask at every denoising step."""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from PIL import Image

from .errors import InputError, RunError
from .ranges import RANGES, Range, check_guidance_interval

DECODED_PIXELS = 2**19  # in one call of the VAE, two pictures of 512x512: more need more memory and are hardly faster

Mask = Image.Image | np.ndarray | torch.Tensor
Prompt = str | list[str]


class NoiseCutMixPipeline(StableDiffusionPipeline):
    """Stable Diffusion with two prompts for each picture: `prompt_1` where the mask is white, `prompt_2` where black.

    The method is that of Takezaki, Bise and Matsuo, NoiseCutMix, ICCV Workshops 2025, arXiv 2509.00378. Everything but
    the denoising loop is diffusers' StableDiffusionPipeline.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "prompt_embeds", "mask"]
    # the token of each class name, and the class name of each token; only `load_pipeline` sets them
    name2placeholder: dict[str, str]
    placeholder2name: dict[str, str]
    # a callback written for StableDiffusionPipeline may read these
    _clip_skip = None
    _cross_attention_kwargs = None

    @torch.no_grad()
    def __call__(
        self,
        prompt_1: Prompt | None = None,
        prompt_2: Prompt | None = None,
        mask: Mask | list[Mask] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float = 7.5,
        negative_prompt: Prompt | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        prompt_1_embeds: torch.Tensor | None = None,
        prompt_2_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
    ) -> StableDiffusionPipelineOutput | tuple[Any, None]:
        """Draw one picture for each pair of prompts and mask.

        Args:
            prompt_1: the prompt, or list of prompts, where the mask is white.
            prompt_2: the prompt, or list of prompts, where it is black; as many as in `prompt_1`. Without it there is
                no mask, and `prompt_1` governs the whole picture, as in Stable Diffusion.
            mask: one mask for each prompt, of the picture's size: a PIL picture without transparency (its grey level;
                modes F and I: 0 to 1), or an array (height, width) of uint8 0 to 255 or float 0 to 1, also as a batch
                (B, height, width). White is 1. Values are rounded to multiples of 1/255.
            height, width: in pixels, divisible by the VAE's factor; None is the model's own.
            num_inference_steps: denoising steps, 1 to 999, or 998 where the scheduler's spacing is "leading".
            guidance_scale: of classifier-free guidance; with at most 1 there is none, and eps is the merged estimate.
            negative_prompt: replaces the empty prompt.
            num_images_per_prompt: pictures for each pair; they are neighbours in the output (a, a, b, b).
            generator: draws the initial noise, one for all pictures or a list of one for each. It draws in float32 on
                its own device, so a CPU generator gives the same noise on every device. None takes fresh entropy.
            latents: the initial noise (B, channels, height / factor, width / factor).
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end, callback_on_step_end_tensor_inputs: as in diffusers; the tensors are "latents",
                "prompt_embeds" (3B, 2B or B, tokens, width) and "mask" (B, 1, h, w). Their shapes must not change.
            guidance_interval: guide only between these fractions of the steps, 0 to 1. (0, 1) is the method; less is a
                faster approximation (Kynkäänniemi et al., 2024, arXiv 2404.07724).
            prompt_1_embeds, prompt_2_embeds, negative_prompt_embeds: encoded prompts (B, tokens, width), not texts.

        Raises:
            InputError, ValueError: an argument is wrong; the message names it.
            TypeError: prompt_1 and negative_prompt are not both texts or both lists.
            RunError: a decoded picture contains nan or infinity.
        """
        # 0. Default height and width
        sample_size = self.unet.config.sample_size
        sample_height, sample_width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        height = sample_height * self.vae_scale_factor if height is None else height
        width = sample_width * self.vae_scale_factor if width is None else width

        # 1. Check inputs
        # diffusers' own callbacks have an attribute for the tensors that they need
        tensor_names = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        self.check_steps(num_inference_steps, guidance_scale, guidance_interval)
        factor = self.vae_scale_factor
        if height % factor or width % factor:
            raise ValueError(f"`height` and `width` have to be multiples of {factor} but are {height} and {width}.")
        if (prompt_1 is None) == (prompt_1_embeds is None):
            raise ValueError("Give either `prompt_1` or `prompt_1_embeds`.")
        if prompt_2 is not None and prompt_2_embeds is not None:
            raise ValueError("Give either `prompt_2` or `prompt_2_embeds`.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("Give either `negative_prompt` or `negative_prompt_embeds`.")
        is_mixed = prompt_2 is not None or prompt_2_embeds is not None
        if is_mixed != (mask is not None):
            raise ValueError("Give `prompt_2` and `mask` together: one mask for each prompt.")

        # 2. Define call parameters
        device = self._execution_device
        self._guidance_scale = guidance_scale
        self._interrupt = False

        # 3. Encode the prompts
        prompt_embeds, uncond_embeds = self.encode_prompt(
            prompt_1, device, num_images_per_prompt, guidance_scale > 1, negative_prompt,
            prompt_embeds=prompt_1_embeds, negative_prompt_embeds=negative_prompt_embeds,
        )  # fmt: skip
        all_embeds = [prompt_embeds]
        if is_mixed:
            second = self.encode_prompt(prompt_2, device, num_images_per_prompt, False, prompt_embeds=prompt_2_embeds)
            all_embeds.append(second[0])
        if guidance_scale > 1:
            all_embeds.append(uncond_embeds)
        if len(shapes := {tuple(embeds.shape) for embeds in all_embeds}) > 1:
            wanted = "`prompt_2` and `negative_prompt` have to be as many and as wide as `prompt_1`"
            raise ValueError(f"{wanted}, but the shapes of the encoded prompts are {shapes}.")
        num_images = len(prompt_embeds)
        prompt_embeds = torch.cat(all_embeds)  # (3B, tokens, width)

        # 4. Prepare the masks: (B, 1, h, w), 1 where prompt_1 counts, smooth at the border
        latent_mask = None
        if mask is not None:
            masks = _to_mask_pictures(mask, num_images // num_images_per_prompt, height, width)
            latent_mask = self.mask_processor.preprocess(masks, height=height // factor, width=width // factor)
            latent_mask = latent_mask.repeat_interleave(num_images_per_prompt, dim=0).to(device, prompt_embeds.dtype)

        # 5. Prepare timesteps; without a begin index the scheduler would search for each step on the host
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)

        # 6. Prepare latents: (B, channels, h, w), drawn in float32 so that device and dtype do not matter
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        noise_device = generator[0].device if isinstance(generator, list) else generator.device
        latents = self.prepare_latents(
            num_images, self.unet.config.in_channels, height, width, torch.float32, noise_device, generator, latents
        ).to(device, prompt_embeds.dtype)

        # 7. Denoise; some schedulers draw noise at every step
        start, end = guidance_interval
        step_options = self.prepare_extra_step_kwargs(generator, eta=0.0)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue

                # one call for all estimates: prompt_1, prompt_2 where mixed, and the empty prompt where guided
                is_guided = self.guidance_scale > 1 and start <= i / len(timesteps) < end
                branches = 1 + is_mixed + is_guided
                latent_model_input = torch.cat([latents] * branches)  # (3B, channels, h, w)
                latent_model_input = self.scheduler.scale_model_input(latent_model_input, t)
                embeds = prompt_embeds[: branches * num_images]
                estimates = self.unet(latent_model_input, t, encoder_hidden_states=embeds, return_dict=False)[0]
                estimates = estimates.chunk(branches)  # each (B, channels, h, w)

                noise_estimate = estimates[0]
                if latent_mask is not None:
                    noise_estimate = latent_mask * estimates[0] + (1 - latent_mask) * estimates[1]
                if is_guided:
                    noise_estimate = estimates[-1] + self.guidance_scale * (noise_estimate - estimates[-1])

                latents = self.scheduler.step(noise_estimate, t, latents, **step_options, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "prompt_embeds": prompt_embeds}
                    tensors |= {} if latent_mask is None else {"mask": latent_mask}
                    chosen = {name: tensors[name] for name in tensor_names}
                    for name, tensor in (callback_on_step_end(self, i, t, chosen) or {}).items():
                        if name not in tensors or tensor.shape != tensors[name].shape:
                            rule = f"`callback_on_step_end` may change only {', '.join(tensors)}, not their shapes"
                            found = f"it returned {name} {tuple(tensor.shape)}; `guidance_interval` ends guidance early"
                            raise ValueError(f"{rule}; {found}.")
                        tensors[name] = tensor
                    latents, prompt_embeds, latent_mask = (
                        tensors["latents"], tensors["prompt_embeds"], tensors.get("mask"),
                    )  # fmt: skip
                progress_bar.update()

        # 8. Decode
        if output_type == "latent":
            images = latents
        elif output_type == "pil":  # rounded to uint8 on the device, so that less is copied to the host
            pixels = ((self._decode(latents).float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
            images = [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]
        else:
            images = self.image_processor.postprocess(self._decode(latents), output_type=output_type)

        # 9. Offload all models
        self.maybe_free_model_hooks()
        if not return_dict:
            return images, None
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=None)

    def check_steps(
        self, num_inference_steps: int, guidance_scale: float, guidance_interval: tuple[float, float]
    ) -> None:
        """Raise an InputError if the arguments of `__call__` that describe the denoising steps are wrong."""
        check_schedule(self.scheduler, num_inference_steps)
        RANGES["guidance_scale"].check("guidance_scale", guidance_scale)
        check_guidance_interval(*guidance_interval)

    @property
    def mask_processor(self) -> VaeImageProcessor:
        """Resizes a mask to the latents (Lanczos, not thresholded), values 0 to 1."""
        return VaeImageProcessor(vae_scale_factor=1, do_normalize=False, do_binarize=False, do_convert_grayscale=True)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the pictures (B, 3, height, width), -1 to 1, or raise a RunError."""
        pixels = latents[0, 0].numel() * self.vae_scale_factor**2  # of a picture
        parts = (latents / self.vae.config.scaling_factor).split(max(1, DECODED_PIXELS // pixels))
        decoded = torch.cat([self.vae.decode(part, return_dict=False)[0] for part in parts])
        if not torch.isfinite(decoded).all():
            remedy = "use dtype=bfloat16, and another folder for a data set"
            raise RunError(f"a picture is not finite in {decoded.dtype}; {remedy}")
        return decoded


def _to_mask_pictures(mask: Mask | list[Mask], batch_size: int, height: int, width: int) -> list[Image.Image]:
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
        remedy = 'give mask.getchannel("A") if its shape lies in the alpha channel, else mask.convert("RGB").'
        raise ValueError(f"`mask` of mode {mask.mode} has transparency, so its white area is not clear; {remedy}")
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


def check_schedule(scheduler: Any, num_inference_steps: int) -> None:
    """Raise an InputError if there are not so many steps, or diffusers 0.42.1 makes others, or divides by zero."""
    settings, most = scheduler.config, scheduler.config.num_train_timesteps
    is_dpm_solver = isinstance(scheduler, DPMSolverMultistepScheduler)
    if is_dpm_solver:  # divides by differences of noise levels
        most -= 1 + (settings.timestep_spacing == "leading") * settings.steps_offset  # more would repeat a level
    Range(int, 1, most).check("num_inference_steps", num_inference_steps)
    if not is_dpm_solver:
        return
    scheduler = type(scheduler).from_config(settings)
    scheduler.set_timesteps(num_inference_steps)
    if (made := len(scheduler.timesteps)) != num_inference_steps:  # with timestep_spacing "trailing"
        reason = f"{num_inference_steps} steps are {made} with the model's timestep_spacing"
        raise InputError(f"{reason} {settings.timestep_spacing!r}; take another number", "num_inference_steps")
    if settings.solver_order > 2 and (scheduler.sigmas.diff() == 0).any():  # Karras' end at sigma_min twice
        remedy = "set solver_order to 2 in scheduler/scheduler_config.json"
        raise InputError(f"the model's scheduler has solver_order 3 and sigmas that repeat; {remedy}", "model")
