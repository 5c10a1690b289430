"""Models with random weights, in the shapes that the benchmark and the dry run use. Nothing is downloaded."""

import json
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from noisecutmix.classes import EMBEDDINGS_FILE, LORA_FILE
from noisecutmix.finetune.folder import Recipe

RECIPE = Recipe(
    meta_class="thing",
    resolution=32,
    random_flip=True,
    random_crop=False,
    rank=10,
    learning_rate=5e-5,
    token_learning_rate=5e-5,
    lr_scheduler="constant",
    dtype="float32",
    seed=0,
    examples_per_class=None,
    effective_batch=4,
    class_names=[],
    num_pictures=4,
    pictures="",
    model="",
)
DIGITS = Path(__file__).resolve().parent.parent.parent / "ckpts" / "digits"
LORA_RANK = 10


@dataclass(frozen=True)
class Shape:
    """A model to build with random weights: configurations of the components, and the number of learned classes."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoder: dict[str, Any]
    num_classes: int
    resolution: int


SHAPES = {
    "tiny": Shape(
        unet={
            "sample_size": 16,
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        },
        vae={"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32},
        text_encoder={
            "vocab_size": 514,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 24,
        },
        num_classes=10,
        resolution=32,
    ),
    "sd15": Shape(
        unet={
            "sample_size": 64,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        vae={
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "latent_channels": 4,
            "sample_size": 512,
        },
        text_encoder={
            "vocab_size": 49408,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 77,
        },
        num_classes=200,
        resolution=512,
    ),
}


def build(folder: Path, shape: Shape) -> None:
    """Write base/ with random half-precision weights, checkpoint/ in Diff-Mix's format, and data_set.json."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        components = build_components(folder / "base" / "tokenizer", shape)
        write_checkpoint(folder / "checkpoint", components["unet"], shape)
    base = StableDiffusionPipeline(
        **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    base.to(torch.float16).save_pretrained(folder / "base")
    write_data_set(folder / "data_set.json", shape)


def build_components(tokenizer_folder: Path, shape: Shape) -> dict[str, Any]:
    """Return the components of Stable Diffusion on torch's default device; write the tokenizer to the folder."""
    trainer = runpy.run_path(str(DIGITS / "train.py"))
    tokenizer = build_tokenizer(tokenizer_folder, trainer["write_tokenizer"], shape)
    special_ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    blocks = len(shape.vae["block_out_channels"])
    return {
        "unet": UNet2DConditionModel(**shape.unet),
        "vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            **shape.vae,
        ),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**shape.text_encoder, **special_ids)),
        "tokenizer": tokenizer,
        "scheduler": trainer["build_scheduler"](),
    }


def write_data_set(file: Path, shape: Shape) -> None:
    content = {"classes": class_names(shape.num_classes), "meta_class": "thing"}
    file.write_text(json.dumps(content), encoding="utf-8")


def build_tokenizer(folder: Path, write_tokenizer: Callable[[Path], None], shape: Shape) -> CLIPTokenizer:
    """The demo's byte-level tokenizer, filled up to the size of the text encoder, so that a new token enlarges it."""
    write_tokenizer(folder)
    vocabulary_file, config_file = folder / "vocab.json", folder / "tokenizer_config.json"
    *characters, start, end = json.loads(vocabulary_file.read_text(encoding="utf-8"))
    missing = shape.text_encoder["vocab_size"] - len(characters) - 2
    tokens = [*characters, *(f"filler{number}" for number in range(missing)), start, end]
    vocabulary_file.write_text(json.dumps({token: index for index, token in enumerate(tokens)}), encoding="utf-8")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["model_max_length"] = shape.text_encoder["max_position_embeddings"]
    config_file.write_text(json.dumps(config), encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    if len(tokenizer) != shape.text_encoder["vocab_size"]:
        raise RuntimeError(f"the tokenizer has {len(tokenizer)} tokens, not {shape.text_encoder['vocab_size']}")
    return tokenizer


def write_checkpoint(folder: Path, unet: UNet2DConditionModel, shape: Shape) -> None:
    """Write a LoRA on all attention layers, with Diff-Mix's key names, and one learned token per class."""
    lora = {}
    for name, layer in unet.named_modules():
        attention, _, projection = name.removesuffix(".0").rpartition(".")
        if projection in ("to_q", "to_k", "to_v", "to_out") and isinstance(layer, torch.nn.Linear):
            key = f"{attention}.processor.{projection}_lora"
            lora[f"{key}.down.weight"] = torch.randn(LORA_RANK, layer.in_features) / LORA_RANK
            lora[f"{key}.up.weight"] = torch.randn(layer.out_features, LORA_RANK) * 0.01
    names = class_names(shape.num_classes)
    placeholders = [f"<class_{label}>" for label in range(shape.num_classes)]
    learned = {name: torch.randn(shape.text_encoder["hidden_size"]) * 0.02 for name in placeholders}
    folder.mkdir()
    save_file(lora, folder / LORA_FILE)
    pickled = {
        "learned_embeds_dict": learned,
        "name2placeholder": dict(zip(names, placeholders)),
        "placeholder2name": dict(zip(placeholders, names)),
    }
    torch.save(pickled, folder / EMBEDDINGS_FILE)


def class_names(count: int) -> list[str]:
    return [f"kind {label}" for label in range(count)]
