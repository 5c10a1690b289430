"""The training samples: the latents of each picture, encoded once, and the random choices of each sample.

A showing is one sample: one use of a picture in training. It is a pure function of the seed and its number. So a state
holds no random state, and the same effective batch trains the same weights (to rounding) on any number of processes.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import ImageOps
from tqdm import tqdm

from .errors import InputError, RunError
from .photos import Photos, crop_square, open_photo


@dataclass(frozen=True)
class Showing:
    """One training sample: the picture's index, whether it is mirrored, its crop position, timestep and noise.

    `posterior_noise` and `noise` have the latents' shape (channels, height, width), float32.
    """

    index: int
    is_flipped: bool
    position: float
    timestep: int
    posterior_noise: torch.Tensor
    noise: torch.Tensor


def plan_showing(
    seed: int, number: int, num_pictures: int, num_timesteps: int, shape: tuple[int, ...], random_flip: bool
) -> Showing:
    """Return the run's `number`-th showing. Every pass over the pictures has its own random order."""
    index = _order_of_pass(seed, number // num_pictures, num_pictures)[number % num_pictures]
    (own_seed,) = np.random.SeedSequence([seed, 1, number]).generate_state(1, np.uint64)
    rng = torch.Generator().manual_seed(int(own_seed) >> 1)  # on the CPU, so that it is the same on every device
    flip, position = torch.rand(2, generator=rng).tolist()
    timestep = int(torch.randint(num_timesteps, (), generator=rng))
    posterior_noise, noise = torch.randn((2, *shape), generator=rng)
    return Showing(int(index), random_flip and flip < 0.5, position, timestep, posterior_noise, noise)


@functools.lru_cache(maxsize=2)
def _order_of_pass(seed: int, number: int, num_pictures: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence([seed, 0, number])).permutation(num_pictures)


class Posteriors:
    """The VAE's posteriors of the pictures: mean and standard deviation of their latents.

    Args:
        vae: the frozen VAE, on its device and in its dtype.
        photos: the pictures.
        resolution: side of the pictures in pixels, a multiple of the VAE's factor.
        random_flip: whether mirror images are encoded, too.
        random_crop: whether each showing has its own crop, which is encoded when the showing is used.
        batch_size: number of pictures encoded at once.
        accelerator: the processes, which share the encoding, and the device.

    Attributes:
        shape: shape of the latents of one picture, (channels, height, width).
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        photos: Photos,
        resolution: int,
        random_flip: bool,
        random_crop: bool,
        batch_size: int,
        accelerator: Accelerator,
    ):
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.shape = (vae.config.latent_channels, resolution // factor, resolution // factor)
        self._vae = vae
        self._photos = photos
        self._resolution = resolution
        self._flips = (False, True) if random_flip else (False,)
        self._random_crop = random_crop
        self._batch_size = batch_size
        self._accelerator = accelerator
        self._pool = ThreadPoolExecutor()
        self._encoded: torch.Tensor | None = None

    def of(self, showings: Sequence[Showing]) -> torch.Tensor:
        """Return mean and standard deviation of each showing's latents, (B, 2, channels, height, width).

        Raises:
            RunError: a picture cannot be read any more, or its encoding is not finite; only with `random_crop`.
        """
        if self._encoded is None:
            return self._encode([(showing.index, showing.is_flipped, showing.position) for showing in showings])
        return torch.stack([self._encoded[showing.index, int(showing.is_flipped)] for showing in showings])

    def encode(self, file: Path) -> None:
        """Encode all pictures into `file`, or use the file that exists; with `random_crop` do nothing.

        The file holds (pictures, 1 or 2, 2, channels, height, width) in the VAE's dtype: the picture and its mirror
        image, mean and standard deviation. It is mapped into memory, so that a step reads only its batch.

        Raises:
            RunError: a picture cannot be read any more, its encoding is not finite, or the disk is full.
        """
        if self._random_crop:
            return
        shape = (len(self._photos.files), len(self._flips), 2, *self.shape)
        if not file.exists():
            size = self._vae.dtype.itemsize * int(np.prod(shape[1:]))
            part = file.with_suffix(".part")
            with _naming(part, size * len(self._photos.files)):
                if self._accelerator.is_main_process:
                    part.write_bytes(b"")
                self._accelerator.wait_for_everyone()
                self._write_own_share(part, size)
                self._accelerator.wait_for_everyone()
                if self._accelerator.is_main_process:
                    part.replace(file)
        self._accelerator.wait_for_everyone()
        flat = torch.from_file(str(file), shared=False, size=int(np.prod(shape)), dtype=self._vae.dtype)
        self._encoded = flat.reshape(shape)
        self._vae.to("cpu")  # it is not needed on the device any more

    def _write_own_share(self, part: Path, size: int) -> None:
        """Write this process's pictures, every n-th for n processes, at their offsets; each takes `size` bytes."""
        own = range(self._accelerator.process_index, len(self._photos.files), self._accelerator.num_processes)
        is_main = self._accelerator.is_main_process
        with (
            open(part, "r+b") as content,
            tqdm(total=len(own), desc="encoding pictures", unit="picture", disable=not is_main) as bar,
        ):
            for start in range(0, len(own), self._batch_size):
                indices = own[start : start + self._batch_size]
                encoded = self._encode([(index, is_flipped, 0.5) for index in indices for is_flipped in self._flips])
                rows = encoded.cpu().contiguous().view(torch.uint8).reshape(len(indices), size)
                for index, row in zip(indices, rows):
                    content.seek(index * size)
                    content.write(row.numpy().tobytes())
                bar.update(len(indices))

    @torch.no_grad()
    def _encode(self, views: Sequence[tuple[int, bool, float]]) -> torch.Tensor:
        """Return mean and standard deviation (B, 2, channels, height, width) of views (index, is_flipped, position)."""
        pixels = torch.stack(list(self._pool.map(self._read, views)))
        posterior = self._vae.encode(pixels.to(self._accelerator.device, self._vae.dtype)).latent_dist
        encoded = torch.stack([posterior.mean, posterior.std], dim=1)
        is_finite = encoded.flatten(1).isfinite().all(1).tolist()
        if not all(is_finite):
            file = self._photos.files[views[is_finite.index(False)][0]]
            raise RunError(f"{file}: its encoding is not finite (float16 overflows); use `dtype=bfloat16`")
        return encoded

    def _read(self, view: tuple[int, bool, float]) -> torch.Tensor:
        """Return a picture (3, resolution, resolution) within -1 to 1."""
        index, is_flipped, position = view
        try:
            image = open_photo(self._photos.files[index])
        except InputError as error:
            raise RunError(f"{error}; it could be read when this run began") from error
        image = crop_square(image, self._resolution, position)
        image = ImageOps.mirror(image) if is_flipped else image
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


@contextlib.contextmanager
def _naming(file: Path, size: int) -> Iterator[None]:
    """Raise an operating system's error as a RunError that names the file and its full size."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{file}: {error.strerror}; the encoded pictures need {size / 1e9:.1f} GB there") from error
