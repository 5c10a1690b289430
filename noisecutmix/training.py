"""Fine-tuning as Diff-Mix does it: a LoRA on the UNet's attention and one new token a class, all else frozen.

What a step sees is a pure function of the seed and the step, so a state needs no random numbers, and the same effective
batch trains the same weights (to rounding) on any number of processes.
"""

import contextlib
import functools
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from PIL import ImageOps
from torch import nn
from tqdm import tqdm

from .checkpoint import _load_model, save_checkpoint
from .classes import DEFAULT_PROMPT, normalise
from .errors import InputError, RunError
from .photos import Photos, crop_square, open_photo

LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
LARGEST_GRADIENT = 1.0  # the norm at which the LoRA's is clipped


@dataclass(frozen=True)
class Settings:
    """How to train. `max_train_steps` decides the learning rate's schedule; `dtype` is that of the frozen weights."""

    model: str
    meta_class: str
    resolution: int
    random_crop: bool
    random_flip: bool
    rank: int
    max_train_steps: int
    train_batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    token_learning_rate: float
    lr_scheduler: str
    gradient_checkpointing: bool
    dtype: torch.dtype
    seed: int


@dataclass(frozen=True)
class Showing:
    """One picture as it is shown once: which, how it is turned and cut, and the noise that is to be found.

    `posterior_noise` and `noise` have the latents' shape (channels, height, width), float32.
    """

    index: int
    is_flipped: bool
    position: float
    timestep: int
    posterior_noise: torch.Tensor
    noise: torch.Tensor


@functools.lru_cache(maxsize=2)
def _order_of_pass(seed: int, number: int, num_pictures: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence([seed, 0, number])).permutation(num_pictures)


def plan_showing(
    seed: int, number: int, num_pictures: int, num_timesteps: int, shape: tuple[int, ...], random_flip: bool
) -> Showing:
    """Return the run's `number`-th showing: every pass over the pictures has an order of its own."""
    index = _order_of_pass(seed, number // num_pictures, num_pictures)[number % num_pictures]
    (own_seed,) = np.random.SeedSequence([seed, 1, number]).generate_state(1, np.uint64)
    rng = torch.Generator().manual_seed(int(own_seed) >> 1)  # on the CPU: the same on every device
    flip, position = torch.rand(2, generator=rng).tolist()
    timestep = int(torch.randint(num_timesteps, (), generator=rng))
    noises = torch.randn((2, *shape), generator=rng)
    return Showing(int(index), random_flip and flip < 0.5, position, timestep, noises[0], noises[1])


class TokenTable(nn.Module):
    """A frozen token table with trained rows behind it, so that gradients and moments exist for those rows alone."""

    def __init__(self, frozen: nn.Embedding, rows: torch.Tensor):
        super().__init__()
        self.frozen = frozen
        self.rows = nn.Parameter(rows)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        own = ids - self.frozen.num_embeddings
        old = self.frozen(ids.clamp(max=self.frozen.num_embeddings - 1))
        return torch.where((own >= 0)[..., None], F.embedding(own.clamp(min=0), self.rows).to(old.dtype), old)


class NoiseEstimator(nn.Module):
    """Text encoder and UNet as one module: token ids and noisy latents in, the UNet's estimate out."""

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
        settings: how to train.
        photos: what to train on.
        accelerator: the processes, the device and the mixed precision.

    Attributes:
        effective_batch: pictures a step, over all processes and accumulated gradients.
        lora: (down, up) of each attention layer, as `save_checkpoint` takes it.
        rows: the new tokens' embeddings (num_classes, width).

    Raises:
        InputError: the model cannot be loaded, or does not take the captions.
    """

    def __init__(self, settings: Settings, photos: Photos, accelerator: Accelerator):
        self.settings = settings
        self.photos = photos
        self._accelerator = accelerator
        per_process = settings.train_batch_size * settings.gradient_accumulation_steps
        self.effective_batch = per_process * accelerator.num_processes
        rng = torch.Generator().manual_seed(settings.seed)
        # peft draws first weights, which are drawn anew below
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # diffusers 0.42 warns of torch_dtype's new name, which 0.35 does not know
            warnings.filterwarnings("ignore", ".*torch_dtype", FutureWarning)
            pipe = _load_model(settings.model, prefer_half=settings.dtype == torch.float16)
            pipe.to(settings.dtype)
            self._schedule = DDPMScheduler.from_config(pipe.scheduler.config)
            if self._schedule.config.prediction_type not in ("epsilon", "v_prediction"):
                raise InputError(f"`model`: {settings.model} predicts neither noise nor velocity")
            for part in (pipe.vae, pipe.text_encoder, pipe.unet):
                part.requires_grad_(False)
            config = LoraConfig(r=settings.rank, lora_alpha=settings.rank, target_modules=LORA_LAYERS)
            pipe.unet.add_adapter(config)
        self.rows = self._add_tokens(pipe.tokenizer, pipe.text_encoder)
        self.lora = self._draw_lora(pipe.unet, rng)
        pipe.unet.train()
        if settings.gradient_checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        self._vae: AutoencoderKL = pipe.vae.to(accelerator.device)
        self._posteriors: torch.Tensor | None = None
        factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        self._shape = (pipe.vae.config.latent_channels, *[settings.resolution // factor] * 2)
        self._pool = ThreadPoolExecutor()

        self._lora_weights = [half for halves in self.lora.values() for half in halves]
        groups = [
            {"params": self._lora_weights, "lr": settings.learning_rate},
            {"params": [self.rows], "lr": settings.token_learning_rate},
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
        self._rates = [settings.learning_rate, settings.token_learning_rate]
        total = settings.max_train_steps
        rates = get_scheduler(settings.lr_scheduler, optimizer, num_warmup_steps=0, num_training_steps=total)
        self._rate_factor = rates.lr_lambdas[0]  # of the step alone, so that a state need not hold it
        self._model, self._optimizer = accelerator.prepare(NoiseEstimator(pipe.unet, pipe.text_encoder), optimizer)

    def encode_photos(self, file: Path) -> None:
        """Encode every picture, and with `random_flip` its mirror image, into `file`, unless it is there already.

        It holds the posterior's mean and deviation, (pictures, 1 or 2, 2, channels, height, width) in the dtype, and is
        mapped into memory, so a step reads its batch alone. With `random_crop` there is nothing to encode beforehand:
        each step encodes its own crops.

        Raises:
            RunError: a picture cannot be read any more, or its encoding is not finite.
        """
        if self.settings.random_crop:
            return
        flips = (False, True) if self.settings.random_flip else (False,)
        shape = (len(self.photos.files), len(flips), 2, *self._shape)
        process, count = self._accelerator.process_index, self._accelerator.num_processes
        is_main = self._accelerator.is_main_process
        if not file.exists():
            part = file.with_suffix(".part")
            size = self.settings.dtype.itemsize * int(np.prod(shape[1:]))
            with _naming_the_file(part, size * shape[0]):
                if is_main:
                    part.write_bytes(b"")
                self._accelerator.wait_for_everyone()
                own = range(process, shape[0], count)
                with (
                    open(part, "r+b") as content,
                    tqdm(total=len(own), desc="encoding pictures", unit="picture", disable=not is_main) as bar,
                ):
                    for start in range(0, len(own), self.settings.train_batch_size):
                        indices = own[start : start + self.settings.train_batch_size]
                        showings = [(index, is_flipped, 0.5) for index in indices for is_flipped in flips]
                        encoded = self._encode(showings).cpu().contiguous().view(torch.uint8)
                        for index, posterior in zip(indices, encoded.reshape(len(indices), size)):
                            content.seek(index * size)
                            content.write(posterior.numpy().tobytes())
                        bar.update(len(indices))
                self._accelerator.wait_for_everyone()
                if is_main:
                    part.replace(file)
        self._accelerator.wait_for_everyone()
        flat = torch.from_file(str(file), shared=False, size=int(np.prod(shape)), dtype=self.settings.dtype)
        self._posteriors = flat.reshape(shape)
        self._vae.to("cpu")

    def step(self, step: int) -> float:
        """Train one step, counted from 0; return its loss, the mean over all processes."""
        settings = self.settings
        for group, rate in zip(self._optimizer.param_groups, self._rates):
            group["lr"] = rate * self._rate_factor(step)
        accumulated = settings.gradient_accumulation_steps
        mean_loss = torch.zeros((), device=self._accelerator.device)
        for part in range(accumulated):
            place = part * self._accelerator.num_processes + self._accelerator.process_index
            first = step * self.effective_batch + place * settings.train_batch_size
            is_last = part == accumulated - 1
            waits = contextlib.nullcontext() if is_last else self._accelerator.no_sync(self._model)
            with waits:
                loss = self._loss(range(first, first + settings.train_batch_size)) / accumulated
                self._accelerator.backward(loss)
            mean_loss += loss.detach()
        self._accelerator.clip_grad_norm_(self._lora_weights, LARGEST_GRADIENT)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(self._accelerator.reduce(mean_loss, "mean"))

    def state(self) -> dict[str, Any]:
        """Return all that training changes, as `load_state` takes it."""
        scaler = self._accelerator.scaler
        return {
            "lora": {name: [half.detach().cpu() for half in halves] for name, halves in self.lora.items()},
            "rows": self.rows.detach().cpu(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, halves in self.lora.items():
                for half, saved in zip(halves, state["lora"][name]):
                    half.copy_(saved)
            self.rows.copy_(state["rows"])
        self._optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] is not None and self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])

    def save(self, folder: Path) -> None:
        """Write the checkpoint."""
        save_checkpoint(folder, self.lora, self.rows, self.photos.class_names)

    def _add_tokens(self, tokenizer: Any, text_encoder: Any) -> nn.Parameter:
        """Give each class a token that starts as the mean of its name's own tokens; set `self._ids` of the captions."""
        names, table = self.photos.class_names, text_encoder.get_input_embeddings()
        own_ids = [tokenizer(normalise(name), add_special_tokens=False).input_ids for name in names]
        rows = torch.stack([table.weight[ids].float().mean(0) for ids in own_ids])
        placeholders = [f"<class_{label}>" for label in range(len(names))]
        known = set(placeholders) & tokenizer.get_vocab().keys()
        if known:
            raise InputError(f"`model`: its tokenizer already has the token {min(known)}; give a model without it")
        tokenizer.add_tokens(placeholders)
        new_ids = torch.tensor(tokenizer.convert_tokens_to_ids(placeholders))
        # behind the table's end, which may lie beyond the tokenizer's
        captions = [DEFAULT_PROMPT.format(name=name, meta_class=self.settings.meta_class) for name in placeholders]
        if len(tokenizer(captions[-1]).input_ids) > tokenizer.model_max_length:
            raise InputError(f"`meta_class`: is too long for the {tokenizer.model_max_length} tokens the model reads")
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        self._ids = torch.where(torch.isin(ids, new_ids), ids - new_ids[0] + table.num_embeddings, ids)
        token_table = TokenTable(table, rows)
        text_encoder.set_input_embeddings(token_table)
        return token_table.rows

    def _draw_lora(self, unet: Any, rng: torch.Generator) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Draw down from a normal distribution of deviation 1 / rank, set up to zero; both in float32."""
        lora = {}
        for name, module in unet.named_modules():
            if hasattr(module, "lora_A"):
                down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
                down.data = torch.randn(down.shape, generator=rng) / self.settings.rank
                up.data = torch.zeros(up.shape)
                lora[name] = (down, up)
        return lora

    def _loss(self, numbers: Sequence[int]) -> torch.Tensor:
        device, settings = self._accelerator.device, self.settings
        num_timesteps = self._schedule.config.num_train_timesteps
        showings = [
            plan_showing(
                settings.seed, number, len(self.photos.files), num_timesteps, self._shape, settings.random_flip
            )
            for number in numbers
        ]
        mean, deviation = self._find_posteriors(showings).to(device).float().unbind(1)
        posterior_noise = torch.stack([showing.posterior_noise for showing in showings]).to(device)
        noise = torch.stack([showing.noise for showing in showings]).to(device)
        timesteps = torch.tensor([showing.timestep for showing in showings], device=device)
        ids = self._ids[[self.photos.labels[showing.index] for showing in showings]].to(device)
        latents = (mean + deviation * posterior_noise) * self._vae.config.scaling_factor
        noisy = self._schedule.add_noise(latents, noise, timesteps)
        is_velocity = self._schedule.config.prediction_type == "v_prediction"
        target = self._schedule.get_velocity(latents, noise, timesteps) if is_velocity else noise
        estimate = self._model(noisy.to(settings.dtype), timesteps, ids)
        return F.mse_loss(estimate.float(), target)

    def _find_posteriors(self, showings: Sequence[Showing]) -> torch.Tensor:
        """Return mean and deviation of the showings' latents, (B, 2, channels, height, width)."""
        if self._posteriors is None:
            return self._encode([(showing.index, showing.is_flipped, showing.position) for showing in showings])
        return torch.stack([self._posteriors[showing.index, int(showing.is_flipped)] for showing in showings])

    @torch.no_grad()
    def _encode(self, views: Sequence[tuple[int, bool, float]]) -> torch.Tensor:
        """Return the posteriors (B, 2, channels, height, width) of pictures given as (index, is_flipped, position)."""
        pixels = torch.stack(list(self._pool.map(self._read_photo, views)))
        posterior = self._vae.encode(pixels.to(self._accelerator.device, self.settings.dtype)).latent_dist
        encoded = torch.stack([posterior.mean, posterior.std], dim=1)
        is_finite = encoded.flatten(1).isfinite().all(1).tolist()
        if not all(is_finite):
            file = self.photos.files[views[is_finite.index(False)][0]]
            raise RunError(f"{file}: its encoding is not finite (float16 overflows); use `dtype=bfloat16`")
        return encoded

    def _read_photo(self, view: tuple[int, bool, float]) -> torch.Tensor:
        """Return a picture (3, resolution, resolution) within -1 to 1."""
        index, is_flipped, position = view
        try:
            image = open_photo(self.photos.files[index])
        except InputError as error:
            raise RunError(f"{error}; it was whole when this run began") from error
        image = crop_square(image, self.settings.resolution, position)
        image = ImageOps.mirror(image) if is_flipped else image
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1


@contextlib.contextmanager
def _naming_the_file(file: Path, size: int) -> Any:
    try:
        yield
    except OSError as error:
        raise RunError(f"{file}: {error.strerror}; the encoded pictures take {size / 1e9:.1f} GB there") from error
