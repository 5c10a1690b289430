"""Train the bundled demo: a tiny Stable Diffusion of handwritten digits, and a Diff-Mix checkpoint for it.

    uv run --group dev ckpts/digits/train.py --output_dir=outputs/digits_checkpoint
    uv run --group dev ckpts/digits/train.py --output_dir=outputs/digits_checkpoint --steps=30   # a quick try

    uv run --group dev ckpts/digits/train.py --output_dir=outputs/few --digits_a_class=20    # from only 200 digits
    uv run --group dev ckpts/digits/train.py --output_dir=outputs/half --only_base_of 01234   # knows five classes
    uv run --group dev ckpts/digits/train.py --write_pictures=outputs/mirrored --digits_a_class=20   # for fine-tuning

The three stages train the autoencoder, then the UNet and its text encoder, then, by noisecutmix.finetune, the rank-10
LoRA and one token per class. Everything is seeded: the same versions on the same machine train the same weights.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CLASS_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
RESOLUTION = 32
LORA_RANK = 10
ROOT = Path(__file__).resolve().parent.parent.parent
EMPTY_PROMPT_SHARE = 0.1
SHIFTS = (-2, 0, 2)  # pixels of the 32x32 picture


def load_split():
    """Return (train_images, train_labels, test_images, test_labels): 8x8 digits, values 0 to 16; 20 % are for the test.

    The generator, the classifiers and the tests all use this split, so that nothing is trained on a test digit.
    """
    digits = load_digits()
    split = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    train_images, test_images, train_labels, test_labels = split
    return train_images, train_labels, test_images, test_labels


def enlarge(images):
    """Turn (n, 8, 8) digits of 0 to 16 into (n, 32, 32) uint8 pictures (bicubic)."""
    pictures = [Image.fromarray(np.uint8(np.round(image * 255 / 16))) for image in images]
    return np.stack([np.asarray(picture.resize((RESOLUTION, RESOLUTION), Image.BICUBIC)) for picture in pictures])


def choose_digits(labels, digits_a_class, subset=0):
    """Return the indices of `digits_a_class` digits of each class; subsets do not overlap. Raises ValueError."""
    first, last = subset * digits_a_class, (subset + 1) * digits_a_class
    by_class = [np.flatnonzero(labels == label) for label in range(len(CLASS_NAMES))]
    smallest = min(map(len, by_class))
    if not 0 <= first < last <= smallest:
        raise ValueError(f"no subset {subset} of {digits_a_class} digits per class; one class has only {smallest}")
    return np.concatenate([indices[first:last] for indices in by_class])


def shift_all(pictures, labels):
    """Return each (32, 32) picture shifted in nine ways, with black at the border, and the labels."""
    margin = max(SHIFTS)
    padded = np.pad(pictures, ((0, 0), (margin, margin), (margin, margin)))
    corners = [(margin + down, margin + right) for down in SHIFTS for right in SHIFTS]
    moved = [padded[:, top : top + RESOLUTION, left : left + RESOLUTION] for top, left in corners]
    return np.concatenate(moved), np.tile(labels, len(moved))


def write_tokenizer(folder):
    """Write a byte-level CLIP tokenizer without merges: one token per character, in files that every version reads."""
    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = characters + [character + "</w>" for character in characters] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    special_tokens = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 24, "do_lower_case": True, **special_tokens}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens, indent=2), encoding="utf-8")


def build_text_encoder(tokenizer):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet():
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler():
    """The noise schedule of Stable Diffusion 1.5."""
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="linspace",  # DPM-Solver++'s default, which Stable Diffusion 1.5's file does not set
    )


def tokenize(tokenizer, prompts):
    return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def optimize(parameters, loss_of_batch, steps, learning_rate, description, after_step=None):
    """Minimise the loss with Adam; the learning rate has a short warm-up and a cosine decay to zero."""
    parameters = list(parameters)
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warmup) * 0.5 * (1 + np.cos(np.pi * step / steps)),
    )
    bar = tqdm(range(steps), desc=description, unit="step")
    for step in bar:
        loss = loss_of_batch()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if after_step is not None:
            after_step(step)
        bar.set_postfix(loss=f"{loss.item():.4f}")


def train_vae(images, steps, rng):
    """Fit the autoencoder to `images` (n, 3, 32, 32) in [-1, 1], and scale its latents to unit variance.

    Returns the autoencoder and the distribution of the images' latents, which are not scaled.
    """
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=RESOLUTION,
    )

    def loss_of_batch():
        batch = images[torch.randint(len(images), (64,), generator=rng)]
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample(generator=rng)).sample
        return F.mse_loss(decoded, batch) + F.l1_loss(decoded, batch) + 1e-5 * posterior.kl().mean()

    optimize(vae.parameters(), loss_of_batch, steps, 2e-3, "autoencoder")
    vae.eval().requires_grad_(False)
    # in parts, which takes half as long as all at once
    encoded = [vae.encode(part).latent_dist.parameters for part in images.split(64)]
    posterior = DiagonalGaussianDistribution(torch.cat(encoded))
    vae.register_to_config(scaling_factor=float(1 / posterior.sample(generator=rng).std()))
    return vae, posterior


def diffusion_loss(unet, text_encoder, scheduler, latents, input_ids, empty_ids, labels, rng):
    """The noise-estimate loss of a random batch of 64; one caption in ten is empty."""
    index = torch.randint(len(latents), (64,), generator=rng)
    ids = input_ids[labels[index]]
    is_empty = torch.rand(len(index), generator=rng) < EMPTY_PROMPT_SHARE
    ids = torch.where(is_empty[:, None], empty_ids, ids)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(index),), generator=rng)
    noise = torch.randn(latents[index].shape, generator=rng)
    noisy = scheduler.add_noise(latents[index], noise, timesteps)
    estimate = unet(noisy, timesteps, encoder_hidden_states=text_encoder(ids)[0]).sample
    return F.mse_loss(estimate, noise)


def train_base(latents, labels, tokenizer, scheduler, steps, rng):
    """Train UNet and text encoder on captions with the class names; return moving averages of both."""
    models = torch.nn.ModuleDict({"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)})
    averaged = copy.deepcopy(models).requires_grad_(False)
    input_ids = tokenize(tokenizer, [f"a photo of a {name} digit" for name in CLASS_NAMES])
    empty_ids = tokenize(tokenizer, [""])

    def loss_of_batch():
        unet, text_encoder = models["unet"], models["text_encoder"]
        return diffusion_loss(unet, text_encoder, scheduler, latents, input_ids, empty_ids, labels, rng)

    def update_average(step):
        decay = min(0.995, (1 + step) / (10 + step))
        for average, parameter in zip(averaged.parameters(), models.parameters()):
            average.lerp_(parameter.detach(), 1 - decay)

    optimize(models.parameters(), loss_of_batch, steps, 1.5e-3, "UNet", update_average)
    return averaged["unet"].eval(), averaged["text_encoder"].eval()


def save_base(folder, pipe):
    """Save in the diffusers layout, with file names and keys that transformers 4 and 5 can both read."""
    pipe.save_pretrained(folder)
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    write_tokenizer(folder / "tokenizer")
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})


def write_pictures(folder, pictures, labels):
    """Write 32x32 pictures in the layout of a user's data: PNG files, one folder per class."""
    for number, (picture, label) in enumerate(zip(pictures, labels)):
        class_folder = folder / CLASS_NAMES[label]
        class_folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(class_folder / f"{number:04d}.png")


def finetune(base, pictures, output_dir, steps, seed):
    """Run noisecutmix.finetune as a user does."""
    arguments = {
        "model": base,
        "data_dir": pictures,
        "meta_class": "digit",
        "output_dir": output_dir,
        "resolution": RESOLUTION,
        "rank": LORA_RANK,
        "max_train_steps": steps,
        "train_batch_size": 64,
        "learning_rate": 2e-3,
        "token_learning_rate": 2e-3,
        "lr_scheduler": "cosine",
        "seed": seed,
        "device": "cpu",
    }
    flags = [f"--{name}={value}" for name, value in arguments.items()]
    command = [sys.executable, "-m", "noisecutmix.finetune", *flags, "--no_random_flip"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})


def main():
    parser = argparse.ArgumentParser(description="Train the bundled digits demo (about 20 minutes on two cores).")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/digits_checkpoint"))
    parser.add_argument("--steps", type=int, default=3000, help="UNet steps; the other stages scale with them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--digits_a_class", type=int, metavar="N", help="train on N digits per class, also shifted")
    parser.add_argument("--subset", type=int, default=0, metavar="K", help="number of the subset of these digits")
    parser.add_argument("--only_base_of", metavar="DIGITS", help="train a base model on these digits, also shifted")
    parser.add_argument(
        "--write_pictures", type=Path, metavar="DIR", help="only write mirrored digits: train/ and test/"
    )
    args = parser.parse_args()
    folder = args.write_pictures
    if folder and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        parser.exit(2, f"train.py: error: --write_pictures: {folder} is not an empty folder; choose another\n")

    images, labels, test_images, test_labels = load_split()
    if args.digits_a_class:
        try:
            chosen = choose_digits(labels, args.digits_a_class, args.subset)
        except ValueError as error:
            parser.error(f"--digits_a_class: {error}")
        test_images = np.concatenate([test_images, np.delete(images, chosen, axis=0)])
        test_labels = np.concatenate([test_labels, np.delete(labels, chosen)])
        images, labels = images[chosen], labels[chosen]
    if args.only_base_of:
        chosen = np.isin(labels, [int(digit) for digit in args.only_base_of])
        images, labels = images[chosen], labels[chosen]
    pictures = enlarge(images)
    if args.write_pictures:
        write_pictures(folder / "train", pictures[:, :, ::-1], labels)
        write_pictures(folder / "test", enlarge(test_images)[:, :, ::-1], test_labels)
        print(f"wrote {folder}")
        return
    if args.digits_a_class or args.only_base_of:
        pictures, labels = shift_all(pictures, labels)
    pixels = torch.from_numpy(pictures).float() / 127.5 - 1
    pixels = pixels[:, None].repeat(1, 3, 1, 1)  # (n, 3, 32, 32)
    rng = torch.Generator().manual_seed(args.seed)

    with torch.random.fork_rng():
        torch.manual_seed(args.seed)  # the layers' initial weights
        vae, posterior = train_vae(pixels, max(1, args.steps // 5), rng)
        latents = posterior.sample(generator=rng) * vae.config.scaling_factor  # (n, 4, 16, 16)

        write_tokenizer(args.output_dir / "base" / "tokenizer")
        tokenizer = CLIPTokenizer.from_pretrained(args.output_dir / "base" / "tokenizer")
        scheduler = build_scheduler()
        unet, text_encoder = train_base(latents, torch.from_numpy(labels), tokenizer, scheduler, args.steps, rng)
        pipe = StableDiffusionPipeline(
            vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
        )
        save_base(args.output_dir / "base", pipe)
    if args.only_base_of:
        print(f"wrote {args.output_dir / 'base'}")
        return
    with tempfile.TemporaryDirectory() as data_dir:
        write_pictures(Path(data_dir), pictures, labels)
        checkpoint = args.output_dir / f"shot-1-lora-rank{LORA_RANK}"
        finetune(args.output_dir / "base", data_dir, checkpoint, max(1, args.steps * 4 // 15), args.seed)
    print(f"wrote {args.output_dir}")


if __name__ == "__main__":
    main()
