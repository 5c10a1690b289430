"""Read a Diff-Mix checkpoint (UNet LoRA and learned tokens) and put it into a pipeline."""

import difflib
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from .classes import EMBEDDINGS_FILE, LORA_FILE, comparison_key, find_repeated
from .errors import InputError, first_line
from .pipeline import NoiseCutMixPipeline


def load_pipeline(
    model: str,
    ckpt_path: str | Path,
    device: str | torch.device = "cuda",
    dtype: torch.dtype | None = None,
) -> NoiseCutMixPipeline:
    """Load a Stable Diffusion model and a Diff-Mix checkpoint, ready to draw.

    The LoRA is fused into the UNet in float32, then everything is cast; no adapter stays. The scheduler is DPM-Solver++
    ending at `sigma_min`, as in the method's first implementation. There is no safety checker.

    Args:
        model: a hub id or a local diffusers folder; safetensors only.
        ckpt_path: a folder with `pytorch_lora_weights.safetensors` and `learned_embeds-steps-last.bin`.
        device: where to draw.
        dtype: None is float16 on cuda and float32 elsewhere.

    Returns:
        The pipeline; `name2placeholder` maps each class name of the checkpoint to its token.

    Raises:
        InputError: the device is not there, the model or the checkpoint cannot be read, or they do not fit each other.
    """
    device = torch.device(device)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise InputError(f"--device: {device} cannot be used: {first_line(error)}") from error
    if dtype is None:
        dtype = torch.float16 if device.type == "cuda" else torch.float32
    lora_file, embeddings_file = Path(ckpt_path) / LORA_FILE, Path(ckpt_path) / EMBEDDINGS_FILE
    for file in (lora_file, embeddings_file):
        if not file.is_file():
            raise InputError(f"--ckpt_path: {file} is missing; a Diff-Mix checkpoint has {file.name}")
    embeddings, name2placeholder = _read_embeddings(embeddings_file)

    # new weights are first drawn at random, by torch and peft, and from the global state
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # diffusers 0.42 warns of torch_dtype's new name, which 0.35 does not know
        warnings.filterwarnings("ignore", ".*torch_dtype", FutureWarning)
        pipe = _load_model(model, prefer_half=dtype == torch.float16)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, final_sigmas_type="sigma_min")
        _add_tokens(pipe, embeddings, embeddings_file)
        _fuse_lora(pipe, lora_file)
    pipe.name2placeholder = name2placeholder
    pipe.to(device, dtype)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    return pipe


def find_placeholders(class_names: Iterable[str], name2placeholder: dict[str, str]) -> list[str]:
    """Return the token of each class, matching names by `comparison_key`.

    Raises:
        InputError: the checkpoint has no token for a class.
    """
    by_key = {comparison_key(name): name for name in name2placeholder}
    class_names = list(class_names)
    missing = [name for name in class_names if comparison_key(name) not in by_key]
    if missing:
        close = difflib.get_close_matches(comparison_key(missing[0]), by_key, n=1)
        hint = f"; it has {by_key[close[0]]!r}" if close else ""
        more = f" and {len(missing) - 1} more classes" if len(missing) > 1 else ""
        raise InputError(
            f"--ckpt_path: the checkpoint has no token for {missing[0]!r}{more}{hint}; is it for another data set?"
        )
    return [name2placeholder[by_key[comparison_key(name)]] for name in class_names]


def _load_model(model: str, prefer_half: bool) -> NoiseCutMixPipeline:
    """Load in float32, from the half-precision files where those are wanted or are all there is."""
    error: Exception | None = None
    for variant in ("fp16", None) if prefer_half else (None, "fp16"):
        try:
            pipe: NoiseCutMixPipeline = NoiseCutMixPipeline.from_pretrained(
                model,
                variant=variant,
                torch_dtype=torch.float32,
                use_safetensors=True,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
            return pipe
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as failure:
            if variant is None:  # of the two failures this one tells what is wrong with the model
                error = failure
    assert error is not None
    raise InputError(f"--model: {model} cannot be loaded: {first_line(error)}") from error


def _read_embeddings(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return (embedding by token, token by class name); only tensors and plain containers are unpickled."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a pickle's protocol, for one
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle fails in many ways, and each means the same
        raise InputError(f"--ckpt_path: {file} is no pickle of tensors alone, it was not loaded") from error
    if not isinstance(content, dict):
        raise InputError(f"--ckpt_path: {file} holds no dictionary; Diff-Mix writes learned_embeds_dict into it")
    embeddings, name2placeholder = content.get("learned_embeds_dict"), content.get("name2placeholder")
    if not isinstance(embeddings, dict) or not isinstance(name2placeholder, dict) or not embeddings:
        raise InputError(f"--ckpt_path: {file} lacks learned_embeds_dict or name2placeholder")
    for name, placeholder in name2placeholder.items():
        if not isinstance(name, str) or not isinstance(placeholder, str) or placeholder not in embeddings:
            raise InputError(f"--ckpt_path: {file} has no embedding {placeholder!r} for class {name!r}")
    if find_repeated(name2placeholder):
        raise InputError(f"--ckpt_path: {file}: two class names differ in spaces, '/', '_' and case alone")
    if len(set(name2placeholder.values())) < len(name2placeholder):
        raise InputError(f"--ckpt_path: {file}: two classes share a token")
    for placeholder, embedding in embeddings.items():
        if not isinstance(placeholder, str) or not placeholder.strip() or not isinstance(embedding, torch.Tensor):
            raise InputError(f"--ckpt_path: {file}: the embedding {placeholder!r} is no tensor under a name")
        if not torch.isfinite(embedding).all():
            raise InputError(f"--ckpt_path: {file}: the embedding {placeholder} is not finite")
    return embeddings, name2placeholder


def _add_tokens(pipe: NoiseCutMixPipeline, embeddings: dict[str, torch.Tensor], file: Path) -> None:
    """Add all learned tokens at once: one resize a token takes minutes for 200 classes."""
    text_encoder, tokenizer = pipe.text_encoder, pipe.tokenizer
    width = text_encoder.get_input_embeddings().embedding_dim
    for placeholder, embedding in embeddings.items():
        if embedding.shape != (width,):
            shape = tuple(embedding.shape)
            raise InputError(f"--ckpt_path: {file}: {placeholder} has shape {shape}, the text encoder takes ({width},)")
    known = embeddings.keys() & tokenizer.get_vocab().keys()
    if known:
        raise InputError(f"--ckpt_path: {file}: the tokenizer already has the token {min(known)}")
    tokenizer.add_tokens(list(embeddings))
    if len(tokenizer) > text_encoder.get_input_embeddings().num_embeddings:
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    weight = text_encoder.get_input_embeddings().weight
    ids = tokenizer.convert_tokens_to_ids(list(embeddings))
    with torch.no_grad():
        weight[ids] = torch.stack(list(embeddings.values())).to(weight.dtype)


def _fuse_lora(pipe: NoiseCutMixPipeline, file: Path) -> None:
    """Add the LoRA to the UNet's weights: each tensor of the file must have a place and fit it."""
    unet = pipe.unet
    try:
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if not name.endswith(".alpha")]  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise InputError(f"--ckpt_path: {file} is no safetensors file: {first_line(error)}") from error
    try:
        lora, network_alphas, metadata = pipe.lora_state_dict(
            str(file.parent),
            weight_name=file.name,
            unet_config=unet.config,
            local_files_only=True,
            use_safetensors=True,
            return_lora_metadata=True,
        )
    except (RuntimeError, ValueError, KeyError, IndexError) as error:
        raise InputError(f"--ckpt_path: {file} holds no LoRA that diffusers reads: {first_line(error)}") from error
    # what peft itself saves names the adapter and the model around the UNet
    lora = {re.sub(r"\.default(?=\.weight$)", "", name.removeprefix("base_model.model.")): lora[name] for name in lora}
    if not any(name.startswith(("unet.", "text_encoder.")) for name in lora):
        lora = {f"unet.{name}": tensor for name, tensor in lora.items()}  # Diff-Mix's keys have no prefix
    lora = {name: tensor.float() for name, tensor in lora.items()}
    places = _find_places(unet, lora, file)
    try:
        pipe.load_lora_into_unet(lora, network_alphas, unet, metadata=metadata)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"--ckpt_path: {file} does not fit the base model: {first_line(error)}") from error
    placed = get_peft_model_state_dict(unet, adapter_name=unet.active_adapters()[0])
    is_in_place = [place in places and torch.equal(tensor, lora[places[place]]) for place, tensor in placed.items()]
    if not len(names) == len(places) == sum(is_in_place) == len(placed):
        raise InputError(
            f"--ckpt_path: {file}: its {len(names)} LoRA tensors do not fill the {len(placed)} places in the UNet"
        )
    unet.fuse_lora()
    unet.unload_lora()


def _find_places(unet: torch.nn.Module, lora: dict[str, torch.Tensor], file: Path) -> dict[str, str]:
    """Return the LoRA's names by their places in the UNet, as peft writes them."""
    converted: dict[str, str] = convert_unet_state_dict_to_peft({name.removeprefix("unet."): name for name in lora})
    modules = dict(unet.named_modules())
    if not converted:
        raise InputError(f"--ckpt_path: {file} holds no LoRA tensor")
    for place, name in converted.items():
        module_name, found, direction = place.partition(".lora_")
        weight = getattr(modules.get(module_name), "weight", None)
        if not found or weight is None:
            own_name = name.removeprefix("unet.")
            raise InputError(
                f"--ckpt_path: {file}: nothing in the UNet takes {own_name}; a LoRA of another base model?"
            )
        # down (A) is (rank, in, …), up (B) is (out, rank, …)
        axis, side = (1, "in") if direction.startswith("A") else (0, "out")
        if lora[name].ndim != weight.ndim or lora[name].shape[axis] != weight.shape[axis]:
            shape, expected = tuple(lora[name].shape), weight.shape[axis]
            raise InputError(
                f"--ckpt_path: {file}: {name} has shape {shape}, the UNet's layer is {expected} wide ({side}); "
                "a LoRA of another base model?"
            )
        if not torch.isfinite(lora[name]).all():
            raise InputError(f"--ckpt_path: {file}: {name} is not finite")
        other = converted.get(f"{module_name}.lora_{'B' if axis else 'A'}.weight")
        rank = lora[name].shape[1 - axis]
        if not rank or (other and rank != lora[other].shape[axis]):
            raise InputError(f"--ckpt_path: {file}: {name} has rank {rank}, which does not fit its other half")
    return converted
