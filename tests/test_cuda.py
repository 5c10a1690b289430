"""The CUDA path in fake tensors of Stable Diffusion 1.5's shapes, on every machine. test_gpu.py needs a real GPU.

The fake card (tests/measure/fake_card.py) raises an error for an operand of another device or dtype than requested, and
for every read by the host within the denoising loop. So each test that draws also checks these conditions.
"""

import contextlib
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawing import ROOT
from dry_run import CARDS, compute_drawing, compute_training, describe
from fake_card import FakeCard, HostRead, WrongType, build_generator, build_pipeline, can_fake_cuda
from fake_training import cuda_autocast
from PIL import Image
from random_models import RECIPE, SHAPES, build
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from noisecutmix.finetune.trainer import Trainer, create_accelerator
from noisecutmix.photos import find_photos

BATCH = 3
STEPS = 2
DRAWN = 10  # more than the decoder decodes at once
WITHIN_ONE_PERCENT = {"rel": 0.01}
PIXELS = 512 * 512 * 3


@pytest.fixture(scope="module")
def card():
    return FakeCard("cuda" if can_fake_cuda() else "meta")


@pytest.fixture(scope="module")
def pipe(card, tmp_path_factory):
    """A float16 pipeline on the card."""
    with card:
        return build_pipeline(card, SHAPES["sd15"], tmp_path_factory.mktemp("sd15"), torch.float16)


@pytest.fixture
def generator(pipe, tmp_path):
    return build_generator(pipe, SHAPES["sd15"], tmp_path, num_inference_steps=1, batch_size=16)


@pytest.fixture
def on_card(card, pipe):
    """The card, which is active during the test, with its counters at zero."""
    card.start()
    with card:
        yield card


@pytest.fixture(scope="module")
def cost(card, pipe):
    """FLOPs of one UNet evaluation, one decoding and the encoding of one prompt, each measured separately."""
    on = {"dtype": torch.float16, "device": card.device}
    calls = {
        "evaluation": lambda: pipe.unet(torch.empty(1, 4, 64, 64, **on), 0, torch.empty(1, 77, 768, **on)),
        "decoding": lambda: pipe.vae.decode(torch.empty(1, 4, 64, 64, **on)),
        "prompt": lambda: pipe.encode_prompt("", card.device, 1, False),
    }
    costs = {}
    with card, torch.no_grad():
        for name, call in calls.items():
            card.start()
            call()
            costs[name] = sum(card.flops.values())
    return costs


@pytest.fixture(scope="module")
def drawn(card, pipe, tmp_path_factory):
    """Ten pictures, and what the card recorded while a generator drew them."""
    folder = tmp_path_factory.mktemp("drawn")
    with card:
        generator = build_generator(pipe, SHAPES["sd15"], folder, num_inference_steps=STEPS, batch_size=DRAWN)
        card.start()
        images = generator.draw(items(generator, DRAWN))
    return SimpleNamespace(
        images=images, flops=card.flops, reads=card.reads, uploads=card.uploads, operators=card.operators
    )


def items(generator, count):
    """Return items of the plan, all of one pair of classes."""
    return [generator.plan.item(index, target=0, aug=1) for index in range(count)]


def draw(pipe, card, **changes):
    """Return the final latents of a batch with encoded prompts."""
    embeds = torch.zeros(BATCH, 77, 768, dtype=card.dtype, device=card.device)
    arguments = {
        "prompt_1_embeds": embeds,
        "prompt_2_embeds": embeds,
        "negative_prompt_embeds": embeds,
        "mask": np.zeros((BATCH, 512, 512), np.uint8),
        "num_inference_steps": STEPS,
        "output_type": "latent",
        **changes,
    }
    return pipe(**arguments).images


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this PyTorch was built without CUDA")
def test_the_fake_card_is_a_cuda_device():
    """Without CUDA and with PyTorch 2.6, the tests run on a "meta" device, which has the same operators."""
    assert can_fake_cuda() or torch.__version__.startswith("2.6")


def test_a_picture_costs_three_evaluations_a_step_and_one_decoding(drawn, cost):
    evaluations, decodings = DRAWN * 3 * STEPS * cost["evaluation"], DRAWN * cost["decoding"]
    assert drawn.flops["loop"] == pytest.approx(evaluations, **WITHIN_ONE_PERCENT)
    assert drawn.flops["decoder"] == pytest.approx(decodings, **WITHIN_ONE_PERCENT)
    elsewhere = sum(drawn.flops.values()) - drawn.flops["text"] - drawn.flops["loop"] - drawn.flops["decoder"]
    assert elsewhere < 0.01 * decodings


def test_25_steps_cost_62_teraflop_a_picture(cost):
    assert (3 * 25 * cost["evaluation"] + cost["decoding"]) / 1e12 == pytest.approx(62.8, **WITHIN_ONE_PERCENT)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_operand_is_of_the_type_asked_for(tmp_path, card, dtype):
    """The other tests draw in float16."""
    with FakeCard(card.device) as other:
        pipe = build_pipeline(other, SHAPES["sd15"], tmp_path, dtype)
        generator = build_generator(pipe, SHAPES["sd15"], tmp_path, num_inference_steps=STEPS)
        assert len(generator.draw(items(generator, BATCH))) == BATCH


def test_each_prompt_is_encoded_once_and_kept(generator, on_card, cost):
    generator.draw(items(generator, BATCH))
    assert on_card.flops["text"] == pytest.approx(3 * cost["prompt"], **WITHIN_ONE_PERCENT)  # target, aug, empty
    generator.draw(items(generator, BATCH))
    assert on_card.flops["text"] == pytest.approx(3 * cost["prompt"], **WITHIN_ONE_PERCENT)


def test_noise_and_mask_are_made_on_the_cpu_and_moved_once_before_the_loop(drawn):
    moved = [shape for _, dtype, shape in drawn.uploads if dtype.is_floating_point]
    assert sorted(moved) == [(DRAWN, 1, 64, 64), (DRAWN, 4, 64, 64)]
    assert {part for part, _, _ in drawn.uploads} <= {"text", "around"}
    assert not {name for name in drawn.operators if "rand" in name or name in ("normal_", "uniform_", "bernoulli_")}


def test_the_host_reads_8_bit_pictures_once_and_little_else(drawn):
    """Besides the pixels, the host reads one flag per picture: whether it is finite."""
    assert [image.size for image in drawn.images] == [(512, 512)] * DRAWN
    pixels = [shape for _, dtype, shape in drawn.reads if dtype == torch.uint8]
    assert [np.prod(shape) for shape in pixels] == [DRAWN * PIXELS]
    flags = [np.prod(shape) for _, dtype, shape in drawn.reads if dtype != torch.uint8]
    assert sum(flags) <= DRAWN


def test_decoding_in_parts_takes_no_more_memory_for_more_pictures(generator, on_card):
    decoding = []
    for count in (4, 12):
        on_card.start()
        generator.draw(items(generator, count))
        decoding.append(on_card.activations("decoder", "around"))
    assert decoding[1] < 1.05 * decoding[0]


# ------------------------------------------------------------------------------------- the card finds errors


def test_a_read_within_the_loop_is_found(pipe, on_card):
    with pytest.raises(HostRead, match="float16"):
        draw(pipe, on_card, callback_on_step_end=lambda *given: given[3]["latents"].max().item() or {})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda mask: mask.float(), WrongType, r"float32 of \(3, 1, 64, 64\)"),
        (lambda mask: torch.zeros(BATCH, 1, 64, 64, dtype=torch.float16), RuntimeError, "device"),
    ],
)
def test_a_wrong_mask_is_found(pipe, on_card, change, error, message):
    options = {"callback_on_step_end_tensor_inputs": ["mask"]}
    with pytest.raises(error, match=message):
        draw(pipe, on_card, callback_on_step_end=lambda *given: {"mask": change(given[3]["mask"])}, **options)


# -------------------------------------------------------------------------------------------- the card's counters


def test_live_memory_is_counted_from_allocation_to_release():
    with FakeCard("meta", capacity=10_000) as card:
        first = torch.zeros(1000, device="meta")
        view = first[:500].view(5, 100)
        second = first + 1
        assert card.live == 8000
        del first, second
        assert card.live == 4000  # the view keeps its storage
        del view
        assert card.live == 0
        assert card.activations() == 8000
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(1000, 3, device="meta")


@pytest.mark.slow
def test_a_training_step_costs_what_a_real_one_does(tmp_path):
    build(tmp_path, SHAPES["tiny"])
    for label in range(2):
        (tmp_path / "photos" / str(label)).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "photos" / str(label) / "0.png")
    machine = {"batch_size": 4, "accumulated": 1, "checkpoints_gradients": False}
    accelerator = create_accelerator("cpu", "float32")
    trainer = Trainer(RECIPE, find_photos(tmp_path / "photos"), accelerator, model=str(tmp_path / "base"), **machine)
    trainer.latents.encode(tmp_path / "latents.bin", "")
    aten = torch.ops.aten
    attention = {  # PyTorch 2.6 does not count these
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
            *shapes[:4]
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        trainer.step(0)
    usage, usage_with = compute_training(SHAPES["tiny"], "float32", 32, batch_sizes=(4,))
    assert usage.flops == pytest.approx(counter.get_total_flops() / 4, **WITHIN_ONE_PERCENT)
    assert usage.step_bytes > 1.5 * usage_with.step_bytes
    assert 1.2 * usage.flops < usage_with.flops < 1.4 * usage.flops  # forward and backward, then forward again
    # nothing but the LoRA and the tokens has moments
    frozen = sum(weight.numel() * 4 for model in ("unet", "text_encoder") for weight in load_weights(tmp_path, model))
    trained = trainer.rows.numel() + sum(half.numel() for halves in trainer.lora.values() for half in halves)
    assert usage.weights_bytes == pytest.approx(frozen + 3 * 4 * trained, **WITHIN_ONE_PERCENT)


def load_weights(folder, model):
    (file,) = (folder / "base" / model).glob("*.safetensors")
    return load_file(file).values()


@pytest.mark.slow
def test_training_in_half_precision_takes_less_memory():
    whole, half = (compute_training(SHAPES["tiny"], dtype, 32, (8,))[0] for dtype in ("float32", "float16"))
    assert half.flops == whole.flops
    assert half.weights_bytes < 0.75 * whole.weights_bytes  # what is trained stays in float32
    assert 0.5 * whole.step_bytes < half.step_bytes < whole.step_bytes  # normalisation runs in float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_operators_run_in_the_types_of_autocast_on_cuda(dtype):
    """Checked where PyTorch fakes a CUDA device; the trainer's backward pass needs the stand-in."""
    if not can_fake_cuda():
        pytest.skip("this PyTorch does not fake CUDA")
    functional = torch.nn.functional

    def run(device):
        pictures, rows = torch.ones(2, 4, 8, 8, device=device), torch.ones(2, 8, device=device)
        kernel, matrix = torch.ones(4, 4, 3, 3, device=device), torch.ones(8, 8, device=device)
        halves = pictures.to(dtype), rows.to(dtype)
        results = [functional.conv2d(pictures, kernel), functional.linear(rows, matrix)]
        results += [functional.group_norm(halves[0], 2), functional.layer_norm(halves[1], (8,))]
        results += [functional.mse_loss(halves[1], halves[1]), functional.silu(halves[1]), functional.gelu(rows)]
        return [result.dtype for result in results]

    with FakeCard("cuda"), autocast_without_a_driver(dtype):
        expected = run("cuda")
    with FakeCard("meta"), cuda_autocast(dtype):
        assert run("meta") == expected
    assert {dtype, torch.float32} == set(expected)


@contextlib.contextmanager
def autocast_without_a_driver(dtype):
    """Switch on what torch.autocast("cuda") switches on; it does nothing where there is no GPU."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)


def test_the_dry_run_prints_a_row_for_each_batch():
    usages = compute_drawing(SHAPES["tiny"], torch.float16, steps=1, resolution=32, batch_sizes=(1, 4))
    text = describe(usages, torch.float16)
    assert re.search(r"^1 +0\.00 ", text, re.MULTILINE) and re.search(r"^4 +0\.00 ", text, re.MULTILINE)
    assert "H100 SXM" in text and "nothing here is measured" in text
    assert "H100 SXM" not in describe(usages, torch.float32)


def sizes_in_readme(heading):
    """Return {GB of a card: batch size} of a row in a README's tables."""
    readme = "".join(
        (ROOT / file).read_text(encoding="utf-8") for file in ("README.md", "noisecutmix/finetune/README.md")
    )
    (row,) = re.findall(rf"^\| {re.escape(heading)} \|((?: \d+ \|){{5}})$", readme, flags=re.MULTILINE)
    return dict(zip(CARDS, map(int, re.findall(r"\d+", row))))


@pytest.mark.slow
def test_the_batch_sizes_for_drawing_in_the_readme_fit():
    sizes = sizes_in_readme("`--batch_size`")
    for usage in compute_drawing(SHAPES["sd15"], torch.float16, steps=2, resolution=512, batch_sizes=(16, 32)):
        assert {card: usage.fits(card) for card in CARDS} == {card: usage.batch_size <= sizes[card] for card in CARDS}


@pytest.mark.slow
def test_the_batch_sizes_for_fine_tuning_in_the_readme_fit():
    rows = {False: sizes_in_readme("`--train_batch_size`"), True: sizes_in_readme("with `--gradient_checkpointing`")}
    for usage in compute_training(SHAPES["sd15"], "float16", 512, batch_sizes=(8,)):
        for size in (2, 4, 8, 16, 32):  # a step's tensors have one row a picture
            scaled = replace(usage, step_bytes=usage.step_bytes * size // 8)
            sizes = rows[usage.gradient_checkpointing]
            assert {card: scaled.fits(card) for card in CARDS} == {card: size <= sizes[card] for card in CARDS}
