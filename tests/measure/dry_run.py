"""What drawing and fine-tuning cost a GPU, computed without one: operations, memory, and bounds that follow from them.

`tests/measure/benchmark.py --arch sd15 --device cuda --dry_run` prints it, for fine-tuning with `--finetune`. Nothing
in it is measured.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from fake_card import FakeCard, build_generator, build_pipeline, can_fake_cuda
from fake_training import build_trainer, cuda_autocast
from random_models import RECIPE, Shape

GIGABYTE = 10**9
TERAFLOP = 10**12
BATCH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)
TRAIN_BATCH_SIZES = (2, 4, 8, 16, 32)
CARDS = (8, 12, 16, 24, 80)  # GB of memory
# what a card needs besides live tensors: the CUDA context and the libraries' code; then, in proportion to the
# activations, copies and workspaces inside the kernels, and what the allocator rounds up or cannot use again
FIXED_RESERVE = GIGABYTE
ACTIVATIONS_RESERVE = 0.5
# TFLOP/s of the tensor cores: dense, float16 operands, added up in float32, as PyTorch does
TENSOR_PEAKS = {
    "H100 SXM": (989, "NVIDIA H100 Tensor Core GPU Datasheet: 1,979 with sparsity, half of it without"),
    "A100": (312, "NVIDIA A100 Tensor Core GPU Datasheet"),
    "RTX 4090": (165.2, "NVIDIA Ada GPU Architecture, whitepaper, appendix A: FP16 Tensor with FP32 Accumulate"),
}
SHARES_OF_PEAK = (1.0, 0.4)


@dataclass(frozen=True)
class Usage:
    """What a batch costs: floating-point operations a picture, and bytes of live tensors besides the weights.

    loop, decoder: the denoising loop's and the decoding's, to 8-bit pictures.
    """

    batch_size: int
    loop_flops: float
    decoder_flops: float
    weights_bytes: int
    loop_bytes: int
    decoder_bytes: int

    @property
    def teraflops(self) -> float:
        return (self.loop_flops + self.decoder_flops) / TERAFLOP

    def fits(self, card: int) -> bool:
        """Return whether a card of so many GB has room for it and for the reserve."""
        return needed_bytes(self.weights_bytes, max(self.loop_bytes, self.decoder_bytes)) <= card * GIGABYTE


@dataclass(frozen=True)
class TrainingUsage:
    """What a training step costs: floating-point operations a picture, and bytes of live tensors.

    weights_bytes: UNet, text encoder, what is trained and its moments; the VAE has left the card by then.
    step_bytes: what a step needs beside them.
    encoding_bytes: what encoding a batch needs beforehand, with the VAE's weights; nothing else comes on top but the
        weights.
    """

    batch_size: int
    gradient_checkpointing: bool
    flops: float
    weights_bytes: int
    step_bytes: int
    encoding_bytes: int

    def fits(self, card: int) -> bool:
        """Return whether a card of so many GB has room for it and for the reserve."""
        return needed_bytes(self.weights_bytes, max(self.step_bytes, self.encoding_bytes)) <= card * GIGABYTE


def needed_bytes(weights: int, activations: int) -> float:
    """Return the memory that a card should have, with the reserve."""
    return FIXED_RESERVE + weights + (1 + ACTIVATIONS_RESERVE) * activations


def compute_drawing(
    shape: Shape, dtype: torch.dtype, steps: int, resolution: int, batch_sizes: Sequence[int] = BATCH_SIZES
) -> list[Usage]:
    """Draw a batch of each size on a fake card, as augmentation.py does."""
    usages: list[Usage] = []
    card = FakeCard("cuda" if can_fake_cuda() else "meta")
    with tempfile.TemporaryDirectory() as folder, card:
        options = {"num_inference_steps": steps, "resolution": resolution, "batch_size": max(batch_sizes)}
        pipe = build_pipeline(card, shape, Path(folder), dtype)
        generator = build_generator(pipe, shape, Path(folder), **options)
        weights_bytes = card.weights
        for batch_size in batch_sizes:
            card.start()
            generator.draw(list(generator.plan.items(batch_size)))
            usages.append(
                Usage(
                    batch_size,
                    card.flops["loop"] / batch_size,
                    card.flops["decoder"] / batch_size,
                    weights_bytes,
                    card.activations("loop"),
                    card.activations("decoder", "around"),
                )
            )
    return usages


def compute_training(
    shape: Shape, dtype: str, resolution: int, batch_sizes: Sequence[int] = TRAIN_BATCH_SIZES
) -> list[TrainingUsage]:
    """Train a step of each batch size on a fake card, as noisecutmix.finetune does, with and without checkpointing."""
    usages = []
    for gradient_checkpointing in (False, True):
        for batch_size in batch_sizes:
            recipe = replace(RECIPE, resolution=resolution, effective_batch=batch_size, dtype=dtype)
            # on a "meta" device: for a backward pass on CUDA, PyTorch needs a driver
            with tempfile.TemporaryDirectory() as folder, FakeCard("meta") as card:
                trainer = build_trainer(card, shape, Path(folder), recipe, gradient_checkpointing)
                trainer.latents.encode(Path(folder) / "latents.bin", "")
                most_while_encoding = max(card.peaks.values())
                card.start()
                with cuda_autocast(getattr(torch, dtype)):
                    trainer.step(0)
                usages.append(
                    TrainingUsage(
                        batch_size,
                        gradient_checkpointing,
                        sum(card.flops.values()) / batch_size,
                        card.live,  # with the optimizer's moments, which the step has made
                        card.activations(),
                        most_while_encoding - card.live,
                    )
                )
    return usages


def describe_training(usages: list[TrainingUsage]) -> str:
    """Return the tables."""
    ways = {"off": False, "on": True}
    by_way = {
        name: [usage for usage in usages if usage.gradient_checkpointing == is_on] for name, is_on in ways.items()
    }
    lines = [
        "Computed with fake tensors; nothing here is measured.",
        "",
        f"weights, moments and gradients of what is trained: {usages[-1].weights_bytes / GIGABYTE:.2f} GB",
        "live tensors besides, at most:",
        "",
        *align(
            ["--train_batch_size", "--gradient_checkpointing", "TFLOP a picture", "step (GB)", "encoding (GB)"],
            *(
                [str(usage.batch_size), name, f"{usage.flops / TERAFLOP:.2f}"]
                + [f"{size / GIGABYTE:.2f}" for size in (usage.step_bytes, usage.encoding_bytes)]
                for name, own in by_way.items()
                for usage in own
            ),
        ),
        "",
        "Largest --train_batch_size by card, with the same reserve as for drawing:",
        "",
        *align(
            ["--gradient_checkpointing", *(f"{card} GB" for card in CARDS)],
            *(
                [name, *(str(max((u.batch_size for u in own if u.fits(card)), default="none")) for card in CARDS)]
                for name, own in by_way.items()
            ),
        ),
    ]
    return "\n".join(lines)


def describe(usages: list[Usage], dtype: torch.dtype) -> str:
    """Return the tables, and the bounds for types that the tensor cores' peaks are given for."""
    last = usages[-1]
    by_card = [largest_batch(usages, card) for card in CARDS]
    lines = [
        "Computed with fake tensors; nothing here is measured.",
        "",
        f"a picture: {last.teraflops:.1f} TFLOP, {last.loop_flops / TERAFLOP:.2f} in the loop and "
        f"{last.decoder_flops / TERAFLOP:.2f} in the decoder",
        f"weights: {last.weights_bytes / GIGABYTE:.2f} GB",
        "live tensors besides the weights, at most; the decoder takes pictures of 512x512 two by two:",
        "",
        *align(
            ["batch", "TFLOP a picture", "loop (GB)", "decoder (GB)"],
            *(
                [str(usage.batch_size), f"{usage.teraflops:.2f}"]
                + [f"{size / GIGABYTE:.2f}" for size in (usage.loop_bytes, usage.decoder_bytes)]
                for usage in usages
            ),
        ),
        "",
        f"Largest batch by card: {FIXED_RESERVE / GIGABYTE:.0f} GB is left for the CUDA context and the libraries, and "
        f"{ACTIVATIONS_RESERVE:.0%} of the live tensors",
        "(the larger of loop and decoder) for copies and workspaces inside the kernels and what the allocator cannot "
        "use:",
        "",
        *align(["memory", *(f"{card} GB" for card in CARDS)], ["--batch_size", *by_card]),
    ]
    if dtype != torch.float32:
        lines += ["", "Bounds in pictures a second, from the tensor cores' dense float16 peak:", ""]
        lines += align(
            ["", "TFLOP/s", *(f"at {share:.0%}" for share in SHARES_OF_PEAK), "figure from"],
            *(
                [name, f"{peak:g}", *(f"{share * peak / last.teraflops:.1f}" for share in SHARES_OF_PEAK), source]
                for name, (peak, source) in TENSOR_PEAKS.items()
            ),
        )
    return "\n".join(lines)


def largest_batch(usages: list[Usage], card: int) -> str:
    """Return the largest batch that fits, "none" where none fits."""
    return str(max((usage.batch_size for usage in usages if usage.fits(card)), default="none"))


def align(*rows: list[str]) -> list[str]:
    """Return the rows as lines with columns of one width each."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
