"""Fine-tuning as Diff-Mix does it: train a LoRA on the UNet's attention and one new token per class."""

import contextlib
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from torch import nn

from .. import script
from ..checkpoint import DTYPES, class_tokens, load_base_model, save_checkpoint
from ..classes import DEFAULT_PROMPT, find_repeated, normalise, without_numbers
from ..errors import InputError, RunError, quiet_libraries
from ..photos import Photos
from .folder import Recipe
from .samples import PictureLatents, Sample, plan_sample

LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
MAX_GRADIENT_NORM = 1.0  # of all LoRA weights together; larger gradients are clipped
MAX_WAIT = timedelta(hours=3)  # for another process: one of them draws previews, which takes long on a CPU
MIXED_PRECISION = {"float16": "fp16", "bfloat16": "bf16", "float32": "no"}


def create_accelerator(device: str, dtype: str) -> Accelerator:
    """Connect the processes of accelerate launch or torchrun; the device is cuda, cuda:N, mps or cpu.

    Raises:
        InputError: the device does not support the dtype, or accelerate is configured for sharding or the like.
    """
    if ":" in device:
        torch.cuda.set_device(device)
    ddp, group = DistributedDataParallelKwargs(broadcast_buffers=False), InitProcessGroupKwargs(timeout=MAX_WAIT)
    try:
        with script.ending_at_signals():
            once = GradientAccumulationPlugin(num_steps=1)  # the trainer itself accumulates
            machine = {"cpu": device == "cpu", "mixed_precision": MIXED_PRECISION[dtype]}
            accelerator = Accelerator(**machine, gradient_accumulation_plugin=once, kwargs_handlers=[ddp, group])
    except ValueError as error:
        raise InputError(f"{dtype} cannot be used on {device}: {error}", "dtype") from error
    kind = accelerator.distributed_type
    if kind not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise InputError(f"accelerate is set to {kind.value}, which is not supported; launch one process per GPU")
    return accelerator


class NotFiniteError(RunError):
    """A loss, a gradient or a weight is not finite, in all processes at once. The weights are lost."""


class TokenTable(nn.Module):
    """A frozen embedding table and trained rows for the ids from `first_id`; only these have gradients and moments."""

    def __init__(self, frozen: nn.Embedding, rows: torch.Tensor, first_id: int):
        super().__init__()
        self.frozen = frozen
        self.rows = nn.Parameter(rows)
        self.first_id = first_id

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        is_new = (ids >= self.first_id)[..., None]
        old = self.frozen(ids.clamp(max=self.first_id - 1))
        return torch.where(is_new, F.embedding((ids - self.first_id).clamp(min=0), self.rows).to(old.dtype), old)


class NoiseEstimator(nn.Module):
    """Text encoder and UNet as one module: estimates the noise from noisy latents, timesteps and token ids."""

    def __init__(self, unet: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        estimate: torch.Tensor = self.unet(noisy, timesteps, encoder_hidden_states=self.text_encoder(ids)[0]).sample
        return estimate


class Trainer:
    """The model under training, and its steps.

    Args:
        recipe: what the weights depend on.
        photos: the training pictures.
        accelerator: the processes, the device and the mixed precision.
        model: the base model, a local folder or a hub id.
        batch_size: the number of pictures in a batch of one process.
        accumulated: the number of batches of a process in a step.
        checkpoints_gradients: save memory by computing activations twice.

    Attributes:
        lora: (down, up) of each attention layer, in the form that `save_checkpoint` takes.
        latents: the pictures' latents.

    Raises:
        InputError: the model cannot be loaded, or its text encoder cannot read the captions.
    """

    def __init__(
        self,
        recipe: Recipe,
        photos: Photos,
        accelerator: Accelerator,
        *,
        model: str,
        batch_size: int,
        accumulated: int,
        checkpoints_gradients: bool,
    ):
        self.recipe, self.photos, self._accelerator = recipe, photos, accelerator
        self._batch_size, self._accumulated = batch_size, accumulated
        self._dtype: torch.dtype = DTYPES[recipe.dtype]

        # The frozen model, with a LoRA and new tokens; peft draws initial weights, which _draw_lora replaces
        with quiet_libraries(), torch.random.fork_rng(devices=[]):
            pipe = load_base_model(model, prefers_half=self._dtype == torch.float16)
            if not isinstance(pipe.vae, AutoencoderKL):
                kind = type(pipe.vae).__name__
                raise InputError(f"{model} has an {kind}, which only draws; take one with an AutoencoderKL", "model")
            pipe.to(self._dtype)
            for part in (pipe.vae, pipe.text_encoder, pipe.unet):
                part.requires_grad_(False)
            pipe.unet.add_adapter(LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, target_modules=LORA_LAYERS))
            self._token_table = self._add_tokens(pipe.tokenizer, pipe.text_encoder)
        self.lora = self._draw_lora(pipe.unet)
        pipe.unet.train()
        if checkpoints_gradients:
            pipe.unet.enable_gradient_checkpointing()

        # The noise schedule
        self._schedule = DDPMScheduler.from_config(pipe.scheduler.config)
        if self._schedule.config.prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(f"{model} estimates neither noise nor velocity; choose another", "model")

        # The optimiser: two groups of weights with their own learning rates
        self._lora_weights = [half for halves in self.lora.values() for half in halves]
        self._rates = (recipe.learning_rate, recipe.token_learning_rate)
        groups = [{"params": part, "lr": rate} for part, rate in zip((self._lora_weights, [self.rows]), self._rates)]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
        steps = recipe.max_train_steps
        schedule = get_scheduler(recipe.lr_scheduler, optimizer, num_warmup_steps=0, num_training_steps=steps)
        self._rate_factor = schedule.lr_lambdas[0]  # a function of the step alone, so a state does not hold it
        self._model, self._optimizer = accelerator.prepare(NoiseEstimator(pipe.unet, pipe.text_encoder), optimizer)

        # The pictures' latents
        self._scaling_factor: float = pipe.vae.config.scaling_factor
        self.latents = PictureLatents(
            pipe.vae.to(accelerator.device),
            photos,
            accelerator,
            resolution=recipe.resolution,
            random_flip=recipe.random_flip,
            random_crop=recipe.random_crop,
            min_side=2 * recipe.resolution if recipe.reduced_decoding else None,
        )

    @property
    def rows(self) -> nn.Parameter:
        """The new tokens' embeddings (num_classes, width); another object on another device."""
        return self._token_table.rows

    def step(self, step: int, wants_stop: bool = False) -> tuple[float, bool]:
        """Train one step, counted from 0.

        Returns:
            The loss, the mean over all processes; and whether any process wants to stop.

        Raises:
            NotFiniteError: the loss or, without a loss scaler, a gradient is not finite.
        """
        for group, rate in zip(self._optimizer.param_groups, self._rates):
            group["lr"] = rate * self._rate_factor(step)
        count = self._accumulated
        mean_loss = torch.zeros((), device=self._accelerator.device)
        for part in range(count):
            is_last = part == count - 1  # average the processes' gradients once per step
            with contextlib.nullcontext() if is_last else self._accelerator.no_sync(self._model):
                loss = self._loss(step * count + part) / count
                self._accelerator.backward(loss)
            mean_loss += loss.detach()
        lora_norm = self._accelerator.clip_grad_norm_(self._lora_weights, MAX_GRADIENT_NORM)
        gradient_norm = lora_norm + torch.linalg.vector_norm(self.rows.grad)
        self._optimizer.step()
        self._optimizer.zero_grad()
        report = torch.stack([mean_loss, gradient_norm, torch.full_like(mean_loss, wants_stop)])
        mean, gradient, stopping = self._accelerator.reduce(report, "mean").tolist()
        if not math.isfinite(mean) or (self._accelerator.scaler is None and not math.isfinite(gradient)):
            raise self._not_finite(f"the {'gradient' if math.isfinite(mean) else 'loss'} of step {step + 1}")
        return mean, stopping > 0

    def learning_rates(self) -> dict[str, float]:
        """Return the learning rates of the last step."""
        lora, tokens = (float(group["lr"]) for group in self._optimizer.param_groups)
        return {"learning_rate": lora, "token_learning_rate": tokens}

    def state(self) -> dict[str, Any]:
        """Return everything that training changes, for `load_state`. Raises NotFiniteError."""
        scaler = self._accelerator.scaler
        moments = [tensor for values in self._optimizer.state.values() for tensor in values.values()]
        if not all(bool(tensor.isfinite().all()) for tensor in (*self._lora_weights, self.rows, *moments)):
            raise self._not_finite("a trained weight")
        return {
            "lora": {name: [half.detach().cpu() for half in halves] for name, halves in self.lora.items()},
            "rows": self.rows.detach().cpu(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        """Restore a state of a run with the same recipe."""
        for name, halves in self.lora.items():
            for half, saved in zip(halves, state["lora"][name]):
                half.copy_(saved)
        self.rows.copy_(state["rows"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])

    def save(self, folder: Path) -> None:
        """Write the checkpoint."""
        save_checkpoint(folder, self.lora, self.rows, self.photos.class_names)

    def _not_finite(self, what: str) -> NotFiniteError:
        precision = " or dtype=bfloat16" if self._dtype == torch.float16 else ""
        return NotFiniteError(f"{what} is not finite; use another output_dir and lower learning rates{precision}")

    def _add_tokens(self, tokenizer: Any, text_encoder: Any) -> TokenTable:
        """Add a token per class, initialised as the mean of the tokens of its name; set the captions' ids."""
        names, table = self.photos.class_names, text_encoder.get_input_embeddings()
        placeholders = class_tokens(len(names))
        if known := tokenizer.get_vocab().keys() & placeholders:
            raise InputError(f"its tokenizer already has the token {min(known)}; choose another model", "model")
        words = without_numbers(names)
        words = list(names) if find_repeated(words) else words
        own_ids = [tokenizer(normalise(word), add_special_tokens=False).input_ids for word in words]
        rows = torch.stack([table.weight[ids].float().mean(0) for ids in own_ids])
        tokenizer.add_tokens(placeholders)
        captions = [DEFAULT_PROMPT.format(name=name, meta_class=self.recipe.meta_class) for name in placeholders]
        if len(tokenizer(captions[-1]).input_ids) > tokenizer.model_max_length:
            raise InputError(f"is too long; the model reads {tokenizer.model_max_length} tokens", "meta_class")
        self._ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        token_table = TokenTable(table, rows, tokenizer.convert_tokens_to_ids(placeholders[0]))
        text_encoder.set_input_embeddings(token_table)
        return token_table

    def _draw_lora(self, unet: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Draw `down` from a normal distribution of standard deviation 1 / rank; set `up` to zero; both in float32."""
        rng = torch.Generator().manual_seed(self.recipe.seed)
        lora = {}
        for name, module in unet.named_modules():
            if hasattr(module, "lora_A"):
                down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
                down.data = torch.randn(down.shape, generator=rng) / self.recipe.rank
                up.data = torch.zeros(up.shape)
                lora[name] = (down, up)
        return lora

    def _plan(self, batch: int) -> list[Sample]:
        """Return this process's samples of a batch; the accumulated batches of all steps are counted from 0."""
        recipe, num_pictures = self.recipe, len(self.photos.files)
        num_timesteps, size = self._schedule.config.num_train_timesteps, self._batch_size
        first = (batch * self._accelerator.num_processes + self._accelerator.process_index) * size
        return [
            plan_sample(recipe.seed, index, num_pictures, num_timesteps, self.latents.shape, recipe.random_flip)
            for index in range(first, first + size)
        ]

    def _loss(self, batch: int) -> torch.Tensor:
        """Return the mean squared error of the estimate for this process's samples of a batch."""
        device, schedule, samples = self._accelerator.device, self._schedule, self._plan(batch)
        upcoming = self._plan(batch + 1) if self.recipe.random_crop else []
        encoded = self.latents.of([sample.view for sample in samples], [sample.view for sample in upcoming])
        mean, deviation = encoded.to(device, torch.float32).unbind(1)
        posterior_noise = torch.stack([sample.posterior_noise for sample in samples]).to(device)
        noise = torch.stack([sample.noise for sample in samples]).to(device)
        timesteps = torch.tensor([sample.timestep for sample in samples], device=device)
        ids = self._ids[[self.photos.labels[sample.picture] for sample in samples]].to(device)
        latents = (mean + deviation * posterior_noise) * self._scaling_factor
        noisy = schedule.add_noise(latents, noise, timesteps)
        is_velocity = schedule.config.prediction_type == "v_prediction"
        target = schedule.get_velocity(latents, noise, timesteps) if is_velocity else noise
        estimate = self._model(noisy.to(self._dtype), timesteps, ids)
        return F.mse_loss(estimate.float(), target)
