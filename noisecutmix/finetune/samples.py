"""The training samples: the latents of each picture, encoded once, and the random choices of each sample.

A sample is one use of a picture in training. It is a pure function of the seed and of its index in the run. So a state
holds no random state, and the same effective batch trains the same weights (to rounding) on any number of processes.
"""

import functools
import math
import os
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import ImageOps
from tqdm import tqdm

from .. import script
from ..errors import InputError, RunError
from ..photos import Photos, crop_square
from ..plan import seed_sequence

ENCODED_PIXELS = 2**20  # in one call of the VAE, four pictures of 512x512: more need more memory and are not faster
READ_AHEAD = 64  # pictures, 3 MB each at 512x512
CHECKSUM_BYTES = 4

View = tuple[int, bool, float]  # index of the picture, whether it is mirrored, position of the crop


@dataclass(frozen=True)
class Sample:
    """One use of a picture in training.

    `view` is the part of the picture that is shown, `timestep` an index into the noise schedule. `posterior_noise` and
    `noise` have the latents' shape (channels, height, width), float32.
    """

    view: View
    timestep: int
    posterior_noise: torch.Tensor
    noise: torch.Tensor

    @property
    def picture(self) -> int:
        """The picture's index."""
        return self.view[0]


def plan_sample(
    seed: int, index: int, num_pictures: int, num_timesteps: int, shape: tuple[int, ...], random_flip: bool
) -> Sample:
    """Return sample `index` of the run, counted from 0. Every pass over the pictures has its own random order."""
    picture = _order_of_pass(seed, index // num_pictures, num_pictures)[index % num_pictures]
    (own_seed,) = seed_sequence(seed, 1, index).generate_state(1, np.uint64)
    rng = torch.Generator().manual_seed(int(own_seed) >> 1)  # on the CPU, so that it is the same on every device
    flip, position = torch.rand(2, generator=rng).tolist()
    timestep = int(torch.randint(num_timesteps, (), generator=rng))
    posterior_noise, noise = torch.randn((2, *shape), generator=rng)
    return Sample((int(picture), random_flip and flip < 0.5, position), timestep, posterior_noise, noise)


@functools.lru_cache(maxsize=2)
def _order_of_pass(seed: int, index: int, num_pictures: int) -> np.ndarray:
    return np.random.default_rng(seed_sequence(seed, 0, index)).permutation(num_pictures)


class PictureLatents:
    """The VAE's posteriors of the pictures: mean and standard deviation of their latents.

    Args:
        vae: the frozen VAE, on its device and in its dtype.
        photos: the pictures.
        accelerator: the processes, which share the encoding, and the device.
        resolution: the side of the training pictures in pixels.
        random_flip: whether mirror images are encoded, too.
        random_crop: whether each sample has its own crop, which is encoded when the sample is used.
        min_side: of a JPEG that is decoded at a fraction of its size, in pixels; None decodes all of it.

    Attributes:
        shape: shape of the latents of one picture, (channels, height, width).
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        photos: Photos,
        accelerator: Accelerator,
        *,
        resolution: int,
        random_flip: bool,
        random_crop: bool,
        min_side: int | None = None,
    ):
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.shape = (vae.config.latent_channels, resolution // factor, resolution // factor)
        self._vae = vae
        self._photos = photos
        self._resolution = resolution
        self._flips = (False, True) if random_flip else (False,)
        self._random_crop, self._min_side = random_crop, min_side
        self._accelerator = accelerator
        self._pool = ThreadPoolExecutor()
        self._reading: dict[View, Future[torch.Tensor]] = {}
        self._encoded: torch.Tensor | None = None

    def of(self, views: Sequence[View], upcoming: Sequence[View] = ()) -> torch.Tensor:
        """Return mean and standard deviation of the views' latents, (B, 2, channels, height, width).

        With `random_crop`, the pictures of the `upcoming` views are read while the device trains.

        Raises:
            RunError: a picture cannot be read any more, or its encoding is not finite; only with `random_crop`.
        """
        if self._encoded is not None:
            return torch.stack([self._encoded[picture, int(is_flipped)] for picture, is_flipped, _ in views])
        reading = [self._reading.get(view) or self._pool.submit(self._read, view) for view in views]
        self._reading = {view: self._pool.submit(self._read, view) for view in upcoming}
        return self._encode(views, [picture.result() for picture in reading])

    def encode(self, file: Path, made_for: str) -> None:
        """Encode all pictures into `file`, but those that an earlier run has encoded; with `random_crop` do nothing.

        For each picture, the file holds (1 or 2, 2, channels, height, width) in the VAE's dtype: the picture and its
        mirror image, mean and standard deviation; then a checksum. It is mapped into memory, so that a step reads only
        its batch.

        Args:
            file: to be written or continued.
            made_for: identifies pictures, model and options; what was encoded for others is encoded again.

        Raises:
            RunError: a picture cannot be read any more, its encoding is not finite, or the disk is full.
        """
        if self._random_crop:
            return
        row_shape, itemsize = (len(self._flips), 2, *self.shape), self._vae.dtype.itemsize
        num_pictures, row_bytes = len(self._photos.files), itemsize * math.prod(row_shape)
        size = num_pictures * (row_bytes + CHECKSUM_BYTES)
        try:
            if self._accelerator.is_main_process:
                with open(file, "ab") as content:
                    content.truncate(size)
            self._accelerator.wait_for_everyone()
            self._encode_own_share(file, row_bytes, made_for)
        except OSError as error:
            need = f"the encoded pictures need {size / 1e9:.1f} GB there"
            raise RunError(f"{file}: {error.strerror}; {need}") from error
        self._accelerator.wait_for_everyone()
        flat = torch.from_file(str(file), shared=False, size=size // itemsize, dtype=self._vae.dtype)
        self._encoded = flat.reshape(num_pictures, -1)[:, : row_bytes // itemsize].view(num_pictures, *row_shape)
        self._vae.to("cpu")  # it is not needed on the device any more

    def _encode_own_share(self, file: Path, row_bytes: int, made_for: str) -> None:
        """Encode every n-th block of pictures, for n processes, if the checksum of one of its pictures is wrong."""
        num_pictures, record_bytes = len(self._photos.files), row_bytes + CHECKSUM_BYTES
        per_block = max(1, ENCODED_PIXELS // self._resolution**2 // len(self._flips))
        blocks = [range(num_pictures)[start : start + per_block] for start in range(0, num_pictures, per_block)]
        own = blocks[self._accelerator.process_index :: self._accelerator.num_processes]
        count, is_main = sum(map(len, own)), self._accelerator.is_main_process
        bar = tqdm(total=count, desc="encoding pictures", unit="picture", disable=not is_main)

        def is_encoded(block: range) -> bool:
            content.seek(block.start * record_bytes)
            records = [content.read(record_bytes) for _ in block]
            pairs = zip(block, records)
            return all(record[row_bytes:] == _checksum(record[:row_bytes], index, made_for) for index, record in pairs)

        with open(file, "r+b") as content, bar:
            missing = [block for block in own if not is_encoded(block)]
            bar.update(count - sum(map(len, missing)))
            for block, pictures in self._read_ahead(missing):
                script.check_signals()
                views = [(picture, is_flipped, 0.5) for picture in block for is_flipped in self._flips]
                both = [pixels.flip(2) if is_flipped else pixels for pixels in pictures for is_flipped in self._flips]
                encoded = self._encode(views, both).cpu().contiguous()
                content.seek(block.start * record_bytes)
                for picture, row in zip(block, encoded.view(torch.uint8).reshape(len(block), row_bytes)):
                    values = row.numpy().tobytes()
                    content.write(values + _checksum(values, picture, made_for))
                bar.update(len(block))
            content.flush()
            os.fsync(content.fileno())

    def _read_ahead(self, blocks: Sequence[range]) -> Iterator[tuple[range, list[torch.Tensor]]]:
        """Yield each block with its pictures, which are read while the device encodes those of the blocks before."""
        reading: deque[tuple[range, list[Future[torch.Tensor]]]] = deque()
        for block in blocks:
            reading.append((block, [self._pool.submit(self._read, (picture, False, 0.5)) for picture in block]))
            if sum(len(block) for block, _ in reading) >= READ_AHEAD:
                block, pictures = reading.popleft()
                yield block, [picture.result() for picture in pictures]
        for block, pictures in reading:
            yield block, [picture.result() for picture in pictures]

    @torch.no_grad()
    def _encode(self, views: Sequence[View], pictures: list[torch.Tensor]) -> torch.Tensor:
        """Return mean and standard deviation (B, 2, channels, height, width) of pictures, which `_read` returned."""
        parts = []
        for pixels in torch.split(torch.stack(pictures), max(1, ENCODED_PIXELS // self._resolution**2)):
            posterior = self._vae.encode(pixels.to(self._accelerator.device, self._vae.dtype)).latent_dist
            parts.append(torch.stack([posterior.mean, posterior.std], dim=1))
        encoded = torch.cat(parts)
        is_finite = encoded.flatten(1).isfinite().all(1).tolist()
        if not all(is_finite):
            file = self._photos.files[views[is_finite.index(False)][0]]
            raise RunError(f"{file}: its encoding is not finite; use another output_dir and dtype=bfloat16")
        return encoded

    def _read(self, view: View) -> torch.Tensor:
        """Return a picture (3, resolution, resolution) within -1 to 1."""
        picture, is_flipped, position = view
        try:
            image = self._photos.open(picture, self._min_side)
        except InputError as error:
            raise RunError(f"{error}; it could be read when this run began") from error
        image = crop_square(image, self._resolution, position)
        image = ImageOps.mirror(image) if is_flipped else image
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def _checksum(values: bytes, picture: int, made_for: str) -> bytes:
    return zlib.crc32(values, zlib.crc32(f"{picture} {made_for}".encode())).to_bytes(CHECKSUM_BYTES, "little")
