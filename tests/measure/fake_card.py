"""A CUDA card that is not there: models run in fake tensors, which have a shape, a type and a device but no values.

What the host does is done for real; what the card does is only followed. PyTorch checks each operator's devices and
types as it would on a GPU. `FakeCard` adds to that: it counts floating-point operations and live memory, records what
is read back to the host, and checks the type of every operand.

    with FakeCard(device) as card:
        build a model on `device`, run it once if that allocates what stays
        card.start()                        # what is live by now are the weights
        run it
    card.flops, card.weights, card.peaks
"""

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import DPMSolverMultistepScheduler
from random_models import Shape, build_components, class_names, write_data_set
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from noisecutmix import NoiseCutMixGenerator, NoiseCutMixPipeline

LONGEST_HEAD_OF_FLASH_ATTENTION = 256
READS_A_VALUE = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.equal,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten._unique2,
}


class HostRead(RuntimeError):
    """The host asked the card for a value where it should not wait for it."""


class WrongType(RuntimeError):
    """An operator on the card was given an operand of another type than the pictures are drawn in."""


def can_fake_cuda() -> bool:
    """Return whether this PyTorch fakes a CUDA device without a driver: not one built without CUDA, nor 2.6."""
    try:
        with FakeTensorMode():
            torch.empty(2, device="cuda")[:1]
    except (RuntimeError, AssertionError):
        return False
    return True


class FakeCard(TorchDispatchMode):
    """Runs what is on the card in fake tensors, as a context; what is on the CPU runs as ever.

    Args:
        device: "cuda"; or "meta", which takes its place where PyTorch cannot fake CUDA and for a backward pass, for
            which PyTorch asks the driver for a CUDA device's streams. Operators and sizes are the same.
        capacity: bytes of memory; beyond them torch.OutOfMemoryError is raised, as by a GPU. None is without end.

    Attributes:
        part: what runs at present, as `watch` names it: "text", "loop", "scheduler", "time", "decoder", or "around".
        flops: floating-point operations by part; a multiplication and an addition are two.
        live: bytes of all tensors that are on the card at present.
        weights: bytes that were live at the latest `start`.
        peaks: the most bytes live by part, since the latest `start`.
        operators: how often each operator ran on the card.
        reads: (part, type, shape) of each tensor that was copied to the host.
        uploads: likewise of each tensor that was copied to the card.
        dtype: the type that floating-point operands have to have in the loop and in the decoder; None is any.
    """

    def __init__(self, device: str = "cuda", capacity: float | None = None) -> None:
        super().__init__()
        self.device = device
        self.capacity = capacity
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.dtype: torch.dtype | None = None
        self.live = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._contexts = contextlib.ExitStack()
        self.start()

    def start(self) -> None:
        """Count from here on; what is live by now are the weights."""
        self.part = "around"
        self.weights = self.live
        self.flops: Counter[str] = Counter()
        self.peaks: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        self.reads: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
        self.uploads: list[tuple[str, torch.dtype, tuple[int, ...]]] = []

    def __enter__(self) -> "FakeCard":
        with contextlib.ExitStack() as contexts:
            contexts.enter_context(self.fake_mode)
            contexts.enter_context(
                mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", fused_attention)
            )
            super().__enter__()
            self._contexts = contexts.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._contexts.__exit__(*error)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        target = kwargs.get("device")
        is_for_card = target is not None and torch.device(target).type == self.device
        if not is_for_card and not any(isinstance(operand, FakeTensor) for operand in operands):
            with unset_fake_temporarily():
                return operator(*args, **kwargs)
        packet = operator.overloadpacket
        self.operators[packet.__name__] += 1
        if packet in READS_A_VALUE or _goes_to_host(packet, args, target):
            return self._read(packet, operands)
        if packet in (torch.ops.aten._to_copy, torch.ops.aten.copy_) and not isinstance(operands[-1], FakeTensor):
            self.uploads.append((self.part, operands[-1].dtype, tuple(operands[-1].shape)))
        self._check_types(operator, operands)
        result = operator(*args, **kwargs)
        if packet in flop_registry:
            self.flops[self.part] += flop_registry[packet](*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor) and tensor.device.type == self.device:
                self._hold(tensor.untyped_storage())
        return result

    def _read(self, packet: Any, operands: list[torch.Tensor]) -> Any:
        """Give the host ones in place of the values, outside the loop; that a picture is finite is then true."""
        source = operands[-1]
        self.reads.append((self.part, source.dtype, tuple(source.shape)))
        if self.part in ("loop", "scheduler", "time"):
            raise HostRead(f"{packet} of {source.dtype}, {tuple(source.shape)}")
        with unset_fake_temporarily():
            ones = torch.ones(source.shape, dtype=source.dtype)
            if packet is torch.ops.aten._to_copy:
                return ones
            return operands[0].copy_(ones) if packet is torch.ops.aten.copy_ else packet(ones)

    def _check_types(self, operator: Any, operands: list[torch.Tensor]) -> None:
        is_cast = operator.overloadpacket is torch.ops.aten._to_copy
        if self.dtype is None or self.part not in ("loop", "decoder") or is_cast:
            return
        for operand in operands:
            if operand.is_floating_point() and operand.ndim > 0 and operand.dtype != self.dtype:
                raise WrongType(f"{operator} in the {self.part}: {operand.dtype} of {tuple(operand.shape)}")

    def _hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage from its birth to its death."""
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()
        if self.capacity is not None and self.live + size > self.capacity:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB.")

        def release(_: object) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, release)
        self.live += size
        self.peaks[self.part] = max(self.peaks[self.part], self.live)

    def activations(self, *parts: str) -> int:
        """Return the most bytes that were live besides the weights, in some parts or in all."""
        return max(self.peaks[part] for part in parts or self.peaks) - self.weights

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def watch(self, function: Any, part: str) -> Any:
        """Return the function, counted under a part's name."""

        @functools.wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.within(part):
                return function(*args, **kwargs)

        return watched


def _goes_to_host(packet: Any, args: Any, target: Any) -> bool:
    if packet is torch.ops.aten._to_copy:
        return target is not None and torch.device(target).type == "cpu"
    return packet is torch.ops.aten.copy_ and not isinstance(args[0], FakeTensor)


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Choose the kernel as PyTorch does on a GPU: FlashAttention where it takes the operands, else memory-efficient.

    Without a GPU, PyTorch would write out every score.
    """
    aten = torch.ops.aten
    is_half = query.dtype in (torch.float16, torch.bfloat16)
    if is_half and attn_mask is None and query.shape[-1] <= LONGEST_HEAD_OF_FLASH_ATTENTION:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    needs_gradient = torch.is_grad_enabled() and any(operand.requires_grad for operand in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs_gradient, dropout_p, is_causal, scale=scale
    )[0]


def build_pipeline(card: FakeCard, shape: Shape, folder: Path, dtype: torch.dtype) -> NoiseCutMixPipeline:
    """Return a pipeline on the card, which is active, as `load_pipeline` leaves one; weights have no values.

    The card knows what runs by then, and checks the types.
    """
    placeholders = {name: f"<class_{label}>" for label, name in enumerate(class_names(shape.num_classes))}
    with unset_fake_temporarily(), torch.device("meta"):
        components = build_components(folder / "tokenizer", shape)
        components["tokenizer"].add_tokens(list(placeholders.values()))
        components["text_encoder"].resize_token_embeddings(len(components["tokenizer"]), mean_resizing=False)
    scheduler = DPMSolverMultistepScheduler.from_config(components["scheduler"].config, final_sigmas_type="sigma_min")
    for name in ("unet", "vae", "text_encoder"):
        components[name].eval().requires_grad_(False)
        place(components[name], card.device, dtype, channels_last=name != "text_encoder")
    pipe = NoiseCutMixPipeline(
        **{**components, "scheduler": scheduler},
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.name2placeholder = placeholders
    watch_pipeline(card, pipe)
    card.dtype = dtype
    card.start()
    return pipe


def build_generator(pipe: NoiseCutMixPipeline, shape: Shape, folder: Path, **options: Any) -> NoiseCutMixGenerator:
    """Return a generator that draws with the pipeline in place of a loaded one."""
    write_data_set(folder / "data_set.json", shape)
    replaced = {
        "find_checkpoint_files": lambda *_: None,
        "load_sampler": lambda *_: pipe.scheduler,
        "load_pipeline": lambda *_: pipe,
    }
    with mock.patch.multiple("noisecutmix.generator", **replaced):
        return NoiseCutMixGenerator(
            device=pipe.device.type,
            data_name=str(folder / "data_set.json"),
            model="random/weights",
            ckpt_path=folder,
            dtype=pipe.dtype,
            **{"resolution": shape.resolution, **options},
        )


def place(
    module: torch.nn.Module, device: str, dtype: torch.dtype | None = None, channels_last: bool = False
) -> dict[torch.Tensor, torch.Tensor]:
    """Put a module's weights on the card, in another type where one is given; `Module.to` refuses fake ones.

    Returns the new weights by the old ones.
    """
    placed: dict[torch.Tensor, torch.Tensor] = {}
    for child in module.modules():
        for name, tensor in [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]:
            layout = torch.channels_last if channels_last and tensor.ndim == 4 else torch.contiguous_format
            placed_dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            new = torch.empty(tensor.shape, dtype=placed_dtype, device=device, memory_format=layout)
            if name in child._parameters:
                child._parameters[name] = new = torch.nn.Parameter(new, tensor.requires_grad)
            else:
                child._buffers[name] = new
            placed[tensor] = new
    return placed


def watch_pipeline(card: FakeCard, pipe: NoiseCutMixPipeline) -> None:
    """Tell the card what runs: the loop lasts from the UNet's first call to the decoder's."""

    def enter(part: str) -> Any:
        def set_part(*_: Any) -> None:
            card.part = part

        return set_part

    pipe.text_encoder.register_forward_pre_hook(enter("text"))
    pipe.text_encoder.register_forward_hook(enter("around"))
    pipe.unet.register_forward_pre_hook(enter("loop"))
    pipe.unet.time_proj.register_forward_pre_hook(enter("time"))  # sine and cosine, in float32 by diffusers' design
    pipe.unet.time_proj.register_forward_hook(enter("loop"))
    pipe.vae.post_quant_conv.register_forward_pre_hook(enter("decoder"))
    pipe.vae.decoder.register_forward_hook(enter("around"))
    pipe.scheduler.step = card.watch(pipe.scheduler.step, "scheduler")  # in float32 by diffusers' design
