"""A training step of noisecutmix.finetune on a card that is not there: see fake_card.py."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import StableDiffusionPipeline
from fake_card import FakeCard, place
from PIL import Image
from random_models import Shape, build_components, class_names
from torch._subclasses.fake_tensor import unset_fake_temporarily

from noisecutmix.finetune.folder import Recipe
from noisecutmix.finetune.trainer import Trainer
from noisecutmix.photos import Photos

# of the operators that the models run, those that autocast runs in half precision on CUDA, and in float32
# (PyTorch's documentation of torch.amp, "CUDA Op-Specific Behavior")
CASTS_DOWN = ("linear", "conv2d")
CASTS_UP = ("layer_norm", "group_norm", "mse_loss")


@contextlib.contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """Do what torch.autocast does on CUDA; there is no autocast of a "meta" device."""
    with contextlib.ExitStack() as patches:
        for names, cast_to in ((CASTS_DOWN, dtype), (CASTS_UP, torch.float32)) if dtype != torch.float32 else ():
            for name in names:
                casting = _casting(getattr(torch.nn.functional, name), cast_to)
                patches.enter_context(mock.patch.object(torch.nn.functional, name, casting))
        yield


def _casting(function: Any, dtype: torch.dtype) -> Any:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> Any:
        return function(*map(cast, arguments), **{name: cast(value) for name, value in options.items()})

    return run


class OneCard:
    """Stands for the Accelerator of one process on the card, as far as the trainer uses it."""

    num_processes, process_index, is_main_process, scaler = 1, 0, True, None

    def __init__(self, card: FakeCard) -> None:
        self.device = torch.device(card.device)

    def prepare(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        self._placed = place(model, self.device)
        for group in optimizer.param_groups:
            group["params"] = [self._placed[parameter] for parameter in group["params"]]
        return model, optimizer

    def wait_for_everyone(self) -> None:
        pass

    @contextlib.contextmanager
    def no_sync(self, model: torch.nn.Module) -> Iterator[None]:
        yield

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: list[torch.Tensor], norm: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_([self._placed[parameter] for parameter in parameters], norm)

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return tensor


def build_trainer(card: FakeCard, shape: Shape, folder: Path, recipe: Recipe, gradient_checkpointing: bool) -> Trainer:
    """Return a trainer on the card, which is active; weights have no values. Each batch is of one grey picture."""
    picture = folder / "picture.png"
    Image.new("RGB", (recipe.resolution, recipe.resolution), "grey").save(picture)
    names, count = class_names(shape.num_classes), recipe.effective_batch
    labels = tuple(number % len(names) for number in range(count))
    photos = Photos(folder, tuple(names), (picture,) * count, labels, notes=())
    with mock.patch("noisecutmix.finetune.trainer.load_base_model", lambda *_, **__: _build_base(card, shape, folder)):
        return Trainer(
            recipe,
            photos,
            OneCard(card),
            model="random/weights",
            batch_size=recipe.effective_batch,
            accumulated=1,
            checkpoints_gradients=gradient_checkpointing,
        )


def _build_base(card: FakeCard, shape: Shape, folder: Path) -> StableDiffusionPipeline:
    """Return a model on the CPU whose memory is never written, and whose VAE knows the way to the card."""
    with unset_fake_temporarily():
        with torch.device("meta"):
            components = build_components(folder / "tokenizer", shape)
        for name in ("unet", "vae", "text_encoder"):
            components[name].to_empty(device="cpu")
        pipe = StableDiffusionPipeline(
            **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    vae = pipe.vae

    def move(device: Any) -> Any:
        place(vae, device)
        return vae

    to_dtype = pipe.to

    @functools.wraps(pipe.to)
    def to(dtype: torch.dtype) -> StableDiffusionPipeline:
        with unset_fake_temporarily():
            to_dtype(dtype)
        vae.to = move
        return pipe

    pipe.to = to
    return pipe
