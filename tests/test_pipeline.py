"""The pipeline and its denoising loop, tested with a tiny random model in float32."""

import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionPipeline
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    MultiPipelineCallbacks,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
)
from PIL import Image

from noisecutmix.errors import InputError

PROMPT_1, PROMPT_2 = "a photo of a <class_0> bird", "a photo of a <class_1> bird"
# of float32 through 4 steps with guidance, relative to the range of the values
ROUNDING = 1e-5


def generators(count, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def white(level=255):
    return Image.new("L", (16, 16), level)


def left_half():
    pixels = np.zeros((16, 16), np.uint8)
    pixels[:, :8] = 255
    return Image.fromarray(pixels)


def draw(pipe, **changes):
    arguments = {
        "prompt_1": PROMPT_1,
        "prompt_2": PROMPT_2,
        "mask": left_half(),
        "num_inference_steps": 4,
        "generator": generators(1),
        "output_type": "latent",
        **changes,
    }
    return pipe(**arguments).images


def assert_same(actual, expected, tolerance=ROUNDING):
    spread = expected.max() - expected.min()
    assert (actual - expected).abs().max() <= tolerance * spread


def stock_pipeline(pipe):
    return StableDiffusionPipeline(
        pipe.vae,
        pipe.text_encoder,
        pipe.tokenizer,
        pipe.unet,
        pipe.scheduler,
        None,
        None,
        requires_safety_checker=False,
    )


@pytest.mark.parametrize(("level", "prompt"), [(255, PROMPT_1), (0, PROMPT_2)])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_a_uniform_mask_equals_stock_stable_diffusion(tiny_pipeline, level, prompt, guidance_scale):
    stock = stock_pipeline(tiny_pipeline)
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        prompt, num_inference_steps=4, guidance_scale=guidance_scale, generator=generators(1), output_type="latent"
    ).images
    actual = draw(tiny_pipeline, mask=white(level), guidance_scale=guidance_scale)
    assert_same(actual, expected)


def test_latents_agree_with_a_plain_loop(tiny_pipeline):
    """The loop calls the UNet once per noise estimate."""
    pipe = tiny_pipeline
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embeds = [pipe.encode_prompt(prompt, "cpu", 1, False)[0] for prompt in (PROMPT_1, PROMPT_2, "")]
        pipe.scheduler.set_timesteps(4)
        latents = noise * pipe.scheduler.init_noise_sigma
        smooth_mask = pipe.mask_processor.preprocess(left_half(), height=8, width=8)
        assert (smooth_mask - mask).abs().max() < 0.1  # Lanczos rings a little at the border
        for t in pipe.scheduler.timesteps:
            estimate_1, estimate_2, estimate_uncond = (
                pipe.unet(latents, t, encoder_hidden_states=embed).sample for embed in embeds
            )
            mixed = smooth_mask * estimate_1 + (1 - smooth_mask) * estimate_2
            estimate = estimate_uncond + 7.5 * (mixed - estimate_uncond)
            latents = pipe.scheduler.step(estimate, t, latents).prev_sample
    assert_same(draw(pipe), latents)


def test_swapping_prompts_and_inverting_the_mask_changes_nothing(tiny_pipeline):
    values = np.random.default_rng(0).integers(0, 256, (16, 16)).astype(np.uint8)
    mask, inverted = Image.fromarray(values), Image.fromarray(255 - values)
    first = draw(tiny_pipeline, mask=mask)
    second = draw(tiny_pipeline, prompt_1=PROMPT_2, prompt_2=PROMPT_1, mask=inverted)
    other = draw(tiny_pipeline, mask=inverted)
    swapped, inverted_alone = (second - first).abs().max(), (other - first).abs().max()
    # both resized masks are rounded to 1/255, so one is the inverse of the other within one or two levels
    assert swapped < inverted_alone / 50


def test_the_merged_estimate_is_eps_1_inside_and_eps_2_outside(tiny_pipeline, monkeypatch):
    """The estimate of this UNet is known: a constant that is the first number of the prompt's embedding."""
    merged = []

    def known_unet(sample, timestep, encoder_hidden_states, return_dict):
        return (encoder_hidden_states[:, :1, :1, None].expand_as(sample).clone(),)

    def record(noise_estimate, timestep, sample, return_dict):
        merged.append(noise_estimate)
        return (sample,)

    monkeypatch.setattr(tiny_pipeline.unet, "forward", known_unet)
    monkeypatch.setattr(tiny_pipeline.scheduler, "step", record)
    embeds = [torch.full((1, 24, 32), value) for value in (3.0, 5.0, 1.0)]
    hard_mask = torch.zeros(1, 1, 8, 8)
    hard_mask[..., :4] = 1
    tiny_pipeline(
        mask=left_half(),
        prompt_1_embeds=embeds[0],
        prompt_2_embeds=embeds[1],
        negative_prompt_embeds=embeds[2],
        guidance_scale=2.0,
        num_inference_steps=2,
        generator=generators(1),
        output_type="latent",
        callback_on_step_end=lambda *_: {"mask": hard_mask},
    )
    smooth, hard = merged
    # eps = 1 + 2 * (eps_prompt - 1); Lanczos reaches three latents to each side of the border
    assert (smooth[..., 0] == 1 + 2 * (3 - 1)).all()
    assert (smooth[..., 7] == 1 + 2 * (5 - 1)).all()
    assert (hard[..., :4] == 1 + 2 * (3 - 1)).all()
    assert (hard[..., 4:] == 1 + 2 * (5 - 1)).all()


def test_without_guidance_the_empty_prompt_is_not_run(tiny_pipeline, monkeypatch):
    batches = []
    forward = tiny_pipeline.unet.forward

    def record(sample, *rest, **named):
        batches.append(len(sample))
        return forward(sample, *rest, **named)

    monkeypatch.setattr(tiny_pipeline.unet, "forward", record)
    draw(tiny_pipeline, guidance_scale=1.0)
    assert batches == [2] * 4
    batches.clear()
    draw(tiny_pipeline, guidance_scale=7.5)
    assert batches == [3] * 4
    batches.clear()
    draw(tiny_pipeline, guidance_interval=(0.25, 0.75))
    assert batches == [2, 3, 3, 2]


def test_a_picture_is_the_same_in_any_batch(tiny_pipeline):
    masks = [left_half(), white(), white(0), left_half().rotate(90)] * 2
    pairs = [(PROMPT_1, PROMPT_2), (PROMPT_2, PROMPT_1)] * 4

    def draw_in_batches(size):
        parts = []
        for start in range(0, 8, size):
            part = slice(start, start + size)
            first, second = (list(prompts) for prompts in zip(*pairs[part]))
            chosen = generators(8)[part]
            parts.append(draw(tiny_pipeline, prompt_1=first, prompt_2=second, mask=masks[part], generator=chosen))
        return torch.cat(parts)

    alone = draw_in_batches(1)
    for size in (3, 8):
        assert_same(draw_in_batches(size), alone)
    assert torch.equal(draw_in_batches(3), draw_in_batches(3))


def test_noise_does_not_depend_on_the_dtype(tiny_pipeline):
    """The noise is drawn in float32 and then cast, so bfloat16 starts from the same noise as float32."""

    def initial_noise():
        seen = []
        forward = tiny_pipeline.unet.forward

        def record(sample, *rest, **named):
            seen.append(sample[0].float())
            return forward(sample, *rest, **named)

        tiny_pipeline.unet.forward = record
        draw(tiny_pipeline, num_inference_steps=1)
        tiny_pipeline.unet.forward = forward
        return seen[0]

    expected = initial_noise()
    tiny_pipeline.to(torch.bfloat16)
    assert torch.equal(initial_noise(), expected.bfloat16().float())


def test_images_of_one_prompt_are_adjacent_and_share_its_mask(tiny_pipeline):
    together = draw(
        tiny_pipeline,
        prompt_1=[PROMPT_1, PROMPT_2],
        prompt_2=[PROMPT_2, PROMPT_1],
        mask=[white(), left_half()],
        num_images_per_prompt=2,
        generator=generators(4),
    )
    second_of_first = draw(tiny_pipeline, mask=white(), generator=generators(1, seed=1))
    first_of_second = draw(tiny_pipeline, prompt_1=PROMPT_2, prompt_2=PROMPT_1, generator=generators(1, seed=2))
    assert_same(together[1:2], second_of_first)
    assert_same(together[2:3], first_of_second)


def test_every_kind_of_mask_gives_the_same_picture(tiny_pipeline):
    expected = draw(tiny_pipeline)
    pixels = np.asarray(left_half())
    shares = pixels / 255.0
    tensor = torch.from_numpy(shares)
    picture = Image.fromarray(shares.astype(np.float32))
    for mask in (pixels, shares, tensor, tensor.bfloat16(), picture, pixels[None], [pixels]):
        assert torch.equal(draw(tiny_pipeline, mask=mask), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_a_mask_is_read_by_grey_level_in_every_mode(tiny_pipeline, mode):
    mask = left_half().convert("RGB" if mode in ("HSV", "YCbCr", "CMYK") else mode)
    assert torch.equal(draw(tiny_pipeline, mask=mask.convert(mode)), draw(tiny_pipeline))


def transparent_masks():
    """Yield white pictures with a transparent half, in each form that Pillow supports, and an opaque one."""
    yield white().convert("RGBA")
    for mode in ("RGBA", "LA", "PA"):
        picture = white().convert(mode)
        picture.putalpha(left_half())
        yield picture
        if mode != "PA":
            yield picture.convert(mode[:-1] + "a")  # premultiplied
    palette = Image.fromarray(np.asarray(left_half()) // 255, "P")
    palette.putpalette([255] * 6)
    palette.info["transparency"] = b"\x00\xff"
    yield palette
    for mode, transparent in (("L", 0), ("1", 0), ("RGB", (0, 0, 0)), ("I", 0), ("I;16", 0), ("F", 0)):
        picture = left_half().point(lambda level: level > 0).convert(mode) if mode[0] in "IF" else left_half()
        picture = picture.convert(mode)
        picture.info["transparency"] = transparent
        yield picture


@pytest.mark.parametrize("mask", transparent_masks(), ids=lambda mask: mask.mode)
def test_a_mask_with_transparency_is_refused(tiny_pipeline, mask):
    with pytest.raises(ValueError, match=r'`mask` of mode \S+ has transparency.*getchannel\("A"\)'):
        draw(tiny_pipeline, mask=mask)


@pytest.mark.parametrize(("guidance_scale", "branches"), [(7.5, 2), (1.0, 1)])
def test_one_prompt_alone_is_stable_diffusion_and_needs_one_estimate_less(tiny_pipeline, guidance_scale, branches):
    sizes = []
    handle = tiny_pipeline.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    alone = draw(tiny_pipeline, prompt_2=None, mask=None, guidance_scale=guidance_scale)
    handle.remove()
    assert sizes == [branches] * 4
    assert_same(alone, draw(tiny_pipeline, mask=white(), guidance_scale=guidance_scale))


def test_output_types_agree(tiny_pipeline):
    picture = draw(tiny_pipeline, output_type="pil")[0]
    array = draw(tiny_pipeline, output_type="np")[0]
    tensor = draw(tiny_pipeline, output_type="pt")[0]
    assert picture.size == (16, 16)
    assert np.array_equal(np.asarray(picture), np.round(array * 255).astype(np.uint8))
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), array)
    as_tuple = tiny_pipeline(PROMPT_1, PROMPT_2, left_half(), num_inference_steps=1, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple[0]) == 1


def test_callback_sees_and_changes_the_latents(tiny_pipeline):
    steps = []

    def zero_at_the_end(pipe, step, timestep, tensors):
        steps.append(step)
        return {"latents": tensors["latents"] * (step < 3)}

    latents = draw(tiny_pipeline, callback_on_step_end=zero_at_the_end)
    assert steps == [0, 1, 2, 3]
    assert (latents == 0).all()


def test_callback_ends_guidance_as_the_interval_does(tiny_pipeline):
    def unguide(pipe, step, timestep, tensors):
        pipe._guidance_scale = 0.0 if step == 1 else pipe._guidance_scale
        return {}

    expected = draw(tiny_pipeline, guidance_interval=(0.0, 0.5))
    assert torch.equal(draw(tiny_pipeline, callback_on_step_end=unguide), expected)


def test_diffusers_callbacks_get_the_tensors_that_they_ask_for(tiny_pipeline):
    expected = draw(tiny_pipeline)
    for callback in (IPAdapterScaleCutoffCallback(0.5), SDCFGCutoffCallback(1.0)):  # cutoff after the last step
        for one in (callback, MultiPipelineCallbacks([callback])):
            assert torch.equal(draw(tiny_pipeline, callback_on_step_end=one), expected)


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (SDCFGCutoffCallback(0.5), r"returned prompt_embeds \(1, .*`guidance_interval` ends"),
        (MultiPipelineCallbacks([SDCFGCutoffCallback(0.0)]), r"returned prompt_embeds \(1, .*`guidance_interval` ends"),
        (SDXLCFGCutoffCallback(0.5), "add_text_embeds"),
        (lambda *_: {"latents": torch.zeros(1, 4, 1, 1)}, r"returned latents \(1, 4, 1, 1\)"),
        (lambda *_: {"negative_prompt_embeds": torch.zeros(1, 24, 32)}, "returned negative_prompt_embeds"),
    ],
)
def test_a_callback_that_does_not_fit_is_named(tiny_pipeline, callback, message):
    with pytest.raises((ValueError, KeyError), match=message):
        draw(tiny_pipeline, callback_on_step_end=callback)


@pytest.mark.parametrize(("spacing", "most"), [("linspace", 999), ("leading", 998)])
def test_the_number_of_steps_is_limited_by_the_schedule(tiny_pipeline, monkeypatch, spacing, most):
    scheduler = tiny_pipeline.scheduler
    tiny_pipeline.scheduler = scheduler.from_config(scheduler.config, timestep_spacing=spacing)
    monkeypatch.setattr(tiny_pipeline.unet, "forward", lambda sample, *_, **__: (sample / 2,))
    assert draw(tiny_pipeline, num_inference_steps=most).isfinite().all()
    with pytest.raises(InputError, match=f"num_inference_steps: .* from 1 to {most}, not {most + 1}"):
        draw(tiny_pipeline, num_inference_steps=most + 1)


def test_no_global_random_state_is_read_or_changed(tiny_pipeline):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    with_fresh_noise = draw(tiny_pipeline, generator=None)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert not torch.equal(draw(tiny_pipeline, generator=None), with_fresh_noise)


def test_a_scheduler_that_draws_noise_takes_it_from_the_generator(tiny_pipeline):
    tiny_pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(tiny_pipeline.scheduler.config)
    before = torch.random.get_rng_state()
    first = draw(tiny_pipeline)
    assert torch.equal(draw(tiny_pipeline), first)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompt_1": None}, ValueError, "prompt_1"),
        ({"prompt_2": None}, ValueError, "prompt_2"),
        ({"mask": None}, ValueError, "mask"),
        ({"prompt_1": [PROMPT_1] * 2, "prompt_2": [PROMPT_2]}, ValueError, "as many and as wide as"),
        ({"prompt_2": [PROMPT_2] * 2}, ValueError, "as many and as wide as"),
        ({"prompt_2": None, "prompt_2_embeds": torch.zeros(2, 24, 32)}, ValueError, "as many and as wide as"),
        (
            {"prompt_1": [PROMPT_1] * 2, "prompt_2": [PROMPT_2] * 2, "negative_prompt": "x"},
            TypeError,
            "negative_prompt",
        ),
        ({"prompt_1_embeds": torch.zeros(1, 24, 32)}, ValueError, "prompt_1_embeds"),
        ({"negative_prompt": "", "negative_prompt_embeds": torch.zeros(1, 24, 32)}, ValueError, "`negative_prompt`"),
        ({"negative_prompt": ["a", "b"]}, TypeError, "negative_prompt"),
        ({"negative_prompt_embeds": torch.zeros(2, 24, 32)}, ValueError, "as many and as wide as"),
        ({"mask": [left_half()] * 2}, ValueError, "`mask` has to hold 1, one for each prompt, but holds 2"),
        ({"mask": Image.new("L", (8, 16))}, ValueError, "(16, 16)"),
        ({"mask": np.zeros((0, 0))}, ValueError, "(16, 16)"),
        ({"mask": np.zeros((0, 16, 16))}, ValueError, "`mask` has to hold 1, one for each prompt"),
        ({"mask": np.zeros((2, 16, 16, 3))}, ValueError, "shape"),
        ({"mask": np.full((16, 16), 1.5)}, ValueError, "within 0 to 1"),
        ({"mask": np.full((16, 16), np.nan)}, ValueError, "within 0 to 1"),
        ({"mask": Image.new("I", (16, 16), 99_999)}, ValueError, "within 0 to 1"),
        ({"mask": np.eye(16, dtype=np.uint8)}, ValueError, "largest value is 1"),
        ({"height": 15}, ValueError, "multiples of 2"),
        ({"guidance_scale": float("nan")}, InputError, "guidance_scale"),
        ({"guidance_scale": -1.0}, InputError, "guidance_scale"),
        ({"num_inference_steps": 0}, InputError, "num_inference_steps"),
        ({"guidance_interval": (0.8, 0.2)}, InputError, "guidance_interval"),
        ({"guidance_interval": (0.0, 1.5)}, InputError, "guidance_interval"),
    ],
)
def test_wrong_inputs_are_named(tiny_pipeline, changes, error, message):
    with pytest.raises(error, match=message):
        draw(tiny_pipeline, **changes)
