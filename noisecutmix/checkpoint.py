"""Read and write Diff-Mix checkpoints: a UNet LoRA and learned tokens."""

import io
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from .classes import EMBEDDINGS_FILE, LORA_FILE, find_repeated, normalise
from .errors import InputError, first_line, is_out_of_memory, quiet_libraries
from .files import write_file
from .lora import Tensors, fuse_lora, is_finite, load_pickle, read_lora, refusal
from .ranges import default_dtype
from .sources import WITH_WEIGHTS, find_checkpoint_files, find_model

with quiet_libraries():  # transformers warns of missing packages that are not needed here
    import diffusers
    import transformers
    from diffusers import DPMSolverMultistepScheduler

    from .pipeline import NoiseCutMixPipeline

EMBEDDINGS_CONTENT = ("learned_embeds_dict", "name2placeholder")
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
# left over in text encoders that are right: the rest of a whole CLIP, and the last layers where config.json skips them
REST_OF_CLIP = re.compile(r"(vision_model|visual_projection|text_projection|logit_scale)\b")
CLIP_LAYER = re.compile(r"(text_model\.)?encoder\.layers\.\d+(?=\.)")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def load_pipeline(
    model: str, ckpt_path: str | Path, device: str | torch.device = "cuda", dtype: torch.dtype | str | None = None
) -> NoiseCutMixPipeline:
    """Load a Stable Diffusion model and a Diff-Mix checkpoint, ready to draw.

    The LoRA is fused into the UNet in float32, then all weights are cast; no adapter is left. The scheduler is
    DPM-Solver++ ending at `sigma_min`, as in the method's original implementation. There is no safety checker.

    Args:
        model: a local diffusers folder or a hub id, also "id@revision". Safetensors are preferred; `.bin` files are
            also read, with `weights_only=True`.
        ckpt_path: a folder with `learned_embeds-steps-last.bin` and `pytorch_lora_weights.safetensors` (or `.bin`). An
            `adapter_config.json` beside them, as peft writes it, gives the LoRA's strength.
        device: where to draw.
        dtype: float16, bfloat16 or float32, as a torch.dtype or its name; None is float16 on cuda, else float32.

    Returns:
        The pipeline. Its `name2placeholder` maps class names, with spaces for '/' and '_', to tokens;
        `placeholder2name` maps tokens to class names.

    Raises:
        InputError: model or checkpoint cannot be read, or they do not fit each other.
    """
    dtype = default_dtype(str(device)) if dtype is None else dtype
    dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in DTYPES.values():
        raise InputError(f"has to be {', '.join(DTYPES)} or None, not {dtype!r}", "dtype")
    lora_file, embeddings_file, settings_file = find_checkpoint_files(Path(ckpt_path))
    # torch and peft fill new weights with random numbers, from the global generator
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        embeddings, name2placeholder = _read_embeddings(embeddings_file)
        lora, settings = read_lora(lora_file, settings_file)
        pipe = load_base_model(str(model), prefers_half=dtype == torch.float16)
        pipe.scheduler = _create_sampler(pipe.scheduler)
        _add_tokens(pipe, embeddings, embeddings_file)
        fuse_lora(pipe.unet, lora, settings, lora_file)
        pipe.to(device, dtype)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)
    pipe.name2placeholder = {normalise(name): placeholder for name, placeholder in name2placeholder.items()}
    pipe.placeholder2name = {placeholder: name for name, placeholder in pipe.name2placeholder.items()}
    return pipe


def load_base_model(model: str, prefers_half: bool) -> NoiseCutMixPipeline:
    """Load a Stable Diffusion model (see `load_pipeline`) in float32, on the CPU.

    The libraries may print warnings, and use the global random state.

    Raises:
        InputError: the model cannot be read, or is not a plain Stable Diffusion model (but SDXL or inpainting, say).
    """
    folder, variant, _ = find_model(model, prefers_half)
    scheduler = _load_scheduler(model, folder)
    try:
        parts = {"scheduler": scheduler, **{part: _load_part(folder, part, variant) for part in WITH_WEIGHTS}}
        pipe: NoiseCutMixPipeline = NoiseCutMixPipeline.from_pretrained(
            folder, **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, pickle.PickleError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{model} cannot be loaded: {first_line(error)}", "model") from error
    unet, channels = pipe.unet.config, pipe.vae.config.latent_channels
    taken = (unet.in_channels, unet.out_channels, unet.cross_attention_dim)
    others = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim", "time_cond_proj_dim")
    has_clip = isinstance(pipe.text_encoder, transformers.CLIPTextModel)  # with a projection, it gives one vector
    fits = has_clip and taken == (channels, channels, pipe.text_encoder.config.hidden_size)
    if not fits or any(map(unet.get, others)):
        raise InputError(f"{model} is not a plain Stable Diffusion model, such as 1.5 or 2.1", "model")
    # without it, a tokenizer would pad captions to no length or to any
    positions = pipe.text_encoder.config.max_position_embeddings
    pipe.tokenizer.model_max_length = min(pipe.tokenizer.model_max_length, positions)
    return pipe


def load_sampler(model: str, dtype: torch.dtype | str | None, device: str) -> DPMSolverMultistepScheduler:
    """Return the scheduler that `load_pipeline` gives a model, without its weights. Raises InputError."""
    prefers_half = (default_dtype(device) if dtype is None else dtype) in ("float16", torch.float16)
    with quiet_libraries():
        return _create_sampler(_load_scheduler(model, find_model(model, prefers_half)[0]))


def _create_sampler(scheduler: Any) -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler.from_config(scheduler.config, final_sigmas_type="sigma_min")


def _load_scheduler(model: str, folder: Path) -> Any:
    """Return a model's own scheduler. Raises InputError."""
    try:
        _, name = NoiseCutMixPipeline.load_config(folder).get("scheduler") or ("", "")
        scheduler = getattr(diffusers, str(name)).from_pretrained(folder / "scheduler")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{model} cannot be loaded: {first_line(error)}", "model") from error
    _check_scheduler(model, scheduler)
    return scheduler


def _check_scheduler(model: str, scheduler: Any) -> None:
    """Raise an InputError if the UNet was trained for another kind of schedule: it would be drawn wrongly."""
    name, settings = type(scheduler).__name__, scheduler.config
    is_other = name.startswith(("FlowMatch", "EDM", "LCM", "TCD")) or settings.get("use_flow_sigmas")
    if is_other or settings.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction", "sample"):
        raise InputError(f"{model} is a flow-matching, EDM or distilled model ({name}), not Stable Diffusion", "model")
    if settings.get("variance_type") in ("learned", "learned_range"):
        kind = settings["variance_type"]
        raise InputError(f"{model} has a scheduler with variance_type {kind!r}, but its UNet predicts none", "model")
    try:
        DPMSolverMultistepScheduler.from_config(settings)
    except (NotImplementedError, ValueError) as error:
        raise InputError(f"{model} has a schedule that DPM-Solver++ lacks: {first_line(error)}", "model") from error


def _load_part(folder: Path, part: str, variant: str | None) -> Any:
    """Return the UNet, the VAE or the text encoder, in float32.

    The libraries say nothing of missing tensors: transformers fills them with random numbers, diffusers leaves them
    without data.

    Raises:
        ValueError: the files' tensors are not those that config.json asks for. The libraries may raise other errors.
    """
    library, name = NoiseCutMixPipeline.load_config(folder).get(part) or ("", "")
    part_class = getattr(LIBRARIES.get(library), str(name), None)
    if part_class is None:
        raise ValueError(f"{part}: model_index.json names no class of diffusers or transformers")
    # mismatched sizes are in the report, too; the errors of transformers do not name the tensor
    options = {"variant": variant, "torch_dtype": torch.float32, "output_loading_info": True}
    model, report = part_class.from_pretrained(str(folder / part), ignore_mismatched_sizes=True, **options)
    modules = dict(model.named_modules())
    left_over = {key for key in report["unexpected_keys"] if not REST_OF_CLIP.match(key)}
    left_over -= {key for key in left_over if (layer := CLIP_LAYER.match(key)) and layer[0] not in modules}
    mismatched = {found if isinstance(found, str) else found[0] for found in report["mismatched_keys"]}
    # a shard may lack what its index lists, which older versions do not report
    without_data = {key for key, tensor in model.state_dict().items() if tensor.is_meta}
    missing = (without_data | set(report["missing_keys"])) - mismatched
    problems = (("is missing", missing), ("has a wrong shape", mismatched), ("is left over", left_over))
    found = [f"{min(keys)} {problem}" for problem, keys in problems if keys]
    if found:
        raise ValueError(f"the weights do not fit {part}/config.json: {' and '.join(found)}")
    return model


def _read_embeddings(file: Path) -> tuple[Tensors, dict[str, str]]:
    """Return (embedding by token, token by class name)."""
    content = load_pickle(file)
    parts: list[Any] = [content.get(name) if isinstance(content, dict) else None for name in EMBEDDINGS_CONTENT]
    if not all(isinstance(part, dict) and part for part in parts):
        raise refusal(file, f" holds no dictionary with {' and '.join(EMBEDDINGS_CONTENT)}, as Diff-Mix writes it")
    embeddings, name2placeholder = parts
    for name, placeholder in name2placeholder.items():
        if not isinstance(name, str) or not isinstance(placeholder, str) or placeholder not in embeddings:
            raise refusal(file, f" has no embedding {placeholder!r} for class {name!r}")
    if find_repeated(name2placeholder):
        raise refusal(file, ": two class names differ only in spaces, '/', '_' or case")
    if len(set(name2placeholder.values())) < len(name2placeholder):
        raise refusal(file, ": two classes share a token")
    for placeholder, embedding in embeddings.items():
        if not isinstance(placeholder, str) or not placeholder.strip() or not isinstance(embedding, torch.Tensor):
            raise refusal(file, f": the embedding {placeholder!r} is not a tensor with a name")
        if not is_finite(embedding):
            raise refusal(file, f": the embedding {placeholder} is not finite, or not dense")
    return embeddings, name2placeholder


def _add_tokens(pipe: NoiseCutMixPipeline, embeddings: Tensors, file: Path) -> None:
    """Add all learned tokens with one resize; one for each of 200 tokens would take minutes."""
    text_encoder, tokenizer = pipe.text_encoder, pipe.tokenizer
    width = text_encoder.get_input_embeddings().embedding_dim
    for placeholder, embedding in embeddings.items():
        if embedding.shape != (width,):
            shape = tuple(embedding.shape)
            raise refusal(file, f": {placeholder} has shape {shape}, the text encoder takes ({width},)")
    if known := embeddings.keys() & tokenizer.get_vocab().keys():
        raise refusal(file, f": the tokenizer already has the token {min(known)}")
    tokenizer.add_tokens(list(embeddings))
    ids = tokenizer.convert_tokens_to_ids(list(embeddings))
    for placeholder, token_id in zip(embeddings, ids):
        if tokenizer(placeholder, add_special_tokens=False).input_ids != [token_id]:
            raise refusal(file, f": the tokenizer does not read {placeholder!r} as one token")
    if len(tokenizer) > text_encoder.get_input_embeddings().num_embeddings:
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    weight = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        weight[ids] = torch.stack(list(embeddings.values())).to(weight.dtype)


def class_tokens(num_classes: int) -> list[str]:
    """Return Diff-Mix's token of each class, in label order."""
    return [f"<class_{label}>" for label in range(num_classes)]


def save_checkpoint(
    folder: Path, lora: dict[str, tuple[torch.Tensor, torch.Tensor]], rows: torch.Tensor, class_names: Sequence[str]
) -> None:
    """Write the two files of Diff-Mix's format atomically, in float32.

    Args:
        folder: an existing folder.
        lora: (down (rank, in), up (out, rank)) of each of the UNet's attention layers, by the layer's name; up @ down
            is added to the layer's weight.
        rows: the learned embeddings (num_classes, width).
        class_names: in label order; class i's token is `<class_i>`.
    """
    tensors = {}
    for name, halves in lora.items():
        attention, layer = name.removesuffix(".0").rsplit(".", 1)
        for direction, half in zip(("down", "up"), halves):
            key = f"{attention}.processor.{layer}_lora.{direction}.weight"
            tensors[key] = half.detach().to("cpu", torch.float32).contiguous()
    placeholders = class_tokens(len(class_names))
    # clones, since torch.save would write the storage of all rows for a view of one
    learned = {token: row.clone() for token, row in zip(placeholders, rows.detach().to("cpu", torch.float32))}
    names, tokens = dict(zip(class_names, placeholders)), dict(zip(placeholders, class_names))
    pickled = io.BytesIO()
    torch.save({"learned_embeds_dict": learned, "name2placeholder": names, "placeholder2name": tokens}, pickled)
    for file_name, content in ((EMBEDDINGS_FILE, pickled.getvalue()), (LORA_FILE, save(tensors))):
        write_file(folder / file_name, content)
