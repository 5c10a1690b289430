"""Read and write Diff-Mix checkpoints: a UNet LoRA and learned tokens."""

import io
import json
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .classes import EMBEDDINGS_FILE, LORA_FILE, find_repeated, normalise
from .errors import InputError, first_line, is_out_of_memory
from .files import atomic_file
from .quiet import quiet_libraries
from .ranges import default_dtype
from .sources import ADAPTER_FILE, WITH_WEIGHTS, find_checkpoint_files, find_model

with quiet_libraries():  # transformers warns of missing packages that are not needed here
    import diffusers
    import transformers
    from diffusers import DPMSolverMultistepScheduler
    from diffusers.utils import convert_unet_state_dict_to_peft
    from peft import get_peft_model_state_dict

    from .pipeline import NoiseCutMixPipeline

EMBEDDINGS_CONTENT = ("learned_embeds_dict", "name2placeholder")
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
# left over in text encoders that are right: the rest of a whole CLIP, and the last layers where config.json skips them
REST_OF_CLIP = re.compile(r"(vision_model|visual_projection|text_projection|logit_scale)\b")
CLIP_LAYER = re.compile(r"(text_model\.)?encoder\.layers\.\d+(?=\.)")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
Tensors = dict[str, torch.Tensor]


def load_pipeline(
    model: str,
    ckpt_path: str | Path,
    device: str | torch.device = "cuda",
    dtype: torch.dtype | str | None = None,
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
        raise InputError(f"`dtype`: has to be {', '.join(DTYPES)} or None, not {dtype!r}")
    lora_file, embeddings_file, settings_file = find_checkpoint_files(Path(ckpt_path))
    # torch and peft fill new weights with random numbers, from the global generator
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        embeddings, name2placeholder = _read_embeddings(embeddings_file)
        lora, settings = _read_lora(lora_file, settings_file)
        pipe = load_base_model(str(model), prefers_half=dtype == torch.float16)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, final_sigmas_type="sigma_min")
        _add_tokens(pipe, embeddings, embeddings_file)
        _fuse_lora(pipe.unet, lora, settings, lora_file)
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
    try:
        parts = {part: _load_part(folder, part, variant) for part in WITH_WEIGHTS}
        pipe: NoiseCutMixPipeline = NoiseCutMixPipeline.from_pretrained(
            folder, **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, pickle.PickleError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"`model`: {model} cannot be loaded: {first_line(error)}") from error
    unet, channels = pipe.unet.config, pipe.vae.config.latent_channels
    taken = (unet.in_channels, unet.out_channels, unet.cross_attention_dim)
    others = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim", "time_cond_proj_dim")
    if taken != (channels, channels, pipe.text_encoder.config.hidden_size) or any(map(unet.get, others)):
        raise InputError(f"`model`: {model} is not a plain Stable Diffusion model, such as 1.5 or 2.1")
    return pipe


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
    model, report = part_class.from_pretrained(
        str(folder / part),
        variant=variant,
        torch_dtype=torch.float32,
        ignore_mismatched_sizes=True,  # they are in the report; the errors of transformers do not name the tensor
        output_loading_info=True,
    )
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


def _refusal(file: Path, reason: str) -> InputError:
    return InputError(f"`ckpt_path`: {file}{reason}")


def _load_pickle(file: Path) -> Any:
    """Return the content of a file that torch.save wrote; only tensors and plain containers are unpickled."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or malicious pickle can raise any error
        raise _refusal(file, " is not a pickle that holds only tensors, so it was not loaded") from error


def _read_embeddings(file: Path) -> tuple[Tensors, dict[str, str]]:
    """Return (embedding by token, token by class name)."""
    content = _load_pickle(file)
    parts: list[Any] = [content.get(name) if isinstance(content, dict) else None for name in EMBEDDINGS_CONTENT]
    if not all(isinstance(part, dict) and part for part in parts):
        raise _refusal(file, f" holds no dictionary with {' and '.join(EMBEDDINGS_CONTENT)}, as Diff-Mix writes it")
    embeddings, name2placeholder = parts
    for name, placeholder in name2placeholder.items():
        if not isinstance(name, str) or not isinstance(placeholder, str) or placeholder not in embeddings:
            raise _refusal(file, f" has no embedding {placeholder!r} for class {name!r}")
    if find_repeated(name2placeholder):
        raise _refusal(file, ": two class names differ only in spaces, '/', '_' or case")
    if len(set(name2placeholder.values())) < len(name2placeholder):
        raise _refusal(file, ": two classes share a token")
    for placeholder, embedding in embeddings.items():
        if not isinstance(placeholder, str) or not placeholder.strip() or not isinstance(embedding, torch.Tensor):
            raise _refusal(file, f": the embedding {placeholder!r} is not a tensor with a name")
        if not torch.isfinite(embedding).all():
            raise _refusal(file, f": the embedding {placeholder} is not finite")
    return embeddings, name2placeholder


def _add_tokens(pipe: NoiseCutMixPipeline, embeddings: Tensors, file: Path) -> None:
    """Add all learned tokens with one resize; one for each of 200 tokens would take minutes."""
    text_encoder, tokenizer = pipe.text_encoder, pipe.tokenizer
    width = text_encoder.get_input_embeddings().embedding_dim
    for placeholder, embedding in embeddings.items():
        if embedding.shape != (width,):
            shape = tuple(embedding.shape)
            raise _refusal(file, f": {placeholder} has shape {shape}, the text encoder takes ({width},)")
    known = embeddings.keys() & tokenizer.get_vocab().keys()
    if known:
        raise _refusal(file, f": the tokenizer already has the token {min(known)}")
    tokenizer.add_tokens(list(embeddings))
    ids = tokenizer.convert_tokens_to_ids(list(embeddings))
    for placeholder, token_id in zip(embeddings, ids):
        if tokenizer(placeholder, add_special_tokens=False).input_ids != [token_id]:
            raise _refusal(file, f": the tokenizer does not read {placeholder!r} as one token")
    if len(tokenizer) > text_encoder.get_input_embeddings().num_embeddings:
        text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    weight = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        weight[ids] = torch.stack(list(embeddings.values())).to(weight.dtype)


def _read_lora(file: Path, settings_file: Path) -> tuple[Tensors, dict[str, Any] | None]:
    """Return the file's tensors, and the LoraConfig that was saved in the file or in `settings_file`, if any."""
    settings = None
    if file.suffix == ".bin":
        tensors = _load_pickle(file)
        if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise _refusal(file, " holds no dictionary of tensors")
    else:
        try:
            with safe_open(file, framework="pt") as content:
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not a dict)
                settings = (content.metadata() or {}).get("lora_adapter_metadata")
        except (SafetensorError, OSError) as error:
            raise _refusal(file, f" is not a safetensors file: {first_line(error)}") from error
    try:
        if settings is None and settings_file.exists():
            file, settings = settings_file, settings_file.read_text(encoding="utf-8")
        if settings is not None:  # diffusers writes "unet." before every name, peft does not
            settings = {name.removeprefix("unet."): value for name, value in json.loads(settings).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise _refusal(file, f": the LoRA's settings cannot be read: {first_line(error)}") from error
    return tensors, settings


def _fuse_lora(unet: Any, tensors: Tensors, settings: dict[str, Any] | None, file: Path) -> None:
    """Add the LoRA to the UNet's weights; raise an InputError if a tensor of the file cannot be applied."""
    _check_lora(tensors, settings, file)
    lora, alphas = _name_as_in_peft(unet, tensors)
    if not lora:
        raise _refusal(file, " holds no LoRA tensor")
    ranks: dict[str, int] = {}
    for place, matrix in lora.items():
        layer, _, side = place.partition(".lora_")
        if side in ("A.weight", "B.weight") and matrix.ndim > 1:  # down (rank, in, …) and up (out, rank, …)
            rank = matrix.shape[0 if side == "A.weight" else 1]
            if ranks.setdefault(layer, rank) != rank:
                raise _refusal(file, f": {place} has rank {rank}, but the other matrix of its layer has not")
    if settings is None:
        settings = {  # "^", since peft would also apply a pattern to longer names that end with it
            "rank_pattern": {f"^{layer}": rank for layer, rank in ranks.items()},
            "alpha_pattern": {f"^{layer}": alphas.get(layer, rank) for layer, rank in ranks.items()},
            "target_modules": list(ranks),
        }
    try:
        unet.load_lora_adapter(lora, prefix=None, metadata=settings)
        placed = get_peft_model_state_dict(unet, adapter_name=unet.active_adapters()[0])
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        reason = str(error.__cause__ or error).strip().splitlines()[-1].strip()
        raise _refusal(file, f" does not fit the UNet; a LoRA of another base model? ({reason})") from error
    lost = sorted((alphas.keys() - ranks.keys()) | (lora.keys() - placed.keys()))
    if lost:
        raise _refusal(file, f": nothing in the UNet takes {lost[0]}; a LoRA of another base model?")
    if not len(tensors) - len(alphas) == len(lora) == len(placed):
        raise _refusal(file, f": its {len(tensors)} LoRA tensors do not fill the {len(placed)} places in the UNet")
    unet.fuse_lora()
    unet.unload_lora()


def _check_lora(tensors: Tensors, settings: dict[str, Any] | None, file: Path) -> None:
    """Raise an InputError unless this is a LoRA of only a UNet, with a known strength."""
    kind = (settings or {}).get("peft_type", "LORA")
    if kind != "LORA":
        raise _refusal(file, f" is a {kind}; only LoRAs are read")
    if (settings or {}).get("use_dora") or any("lora_magnitude" in name or "dora_scale" in name for name in tensors):
        raise _refusal(file, " is a DoRA; only LoRAs are read")
    for name, tensor in tensors.items():
        if name.startswith(("text_encoder", "lora_te")):
            raise _refusal(file, f": {name} is for the text encoder, but only LoRAs of a UNet can be applied")
        if name.startswith("base_model.model.") and settings is None:
            raise _refusal(file, f" was saved by peft: put its {ADAPTER_FILE}, which has its strength, beside it")
        if name.endswith(".alpha") and settings is not None:
            raise _refusal(file, f": {name} and {ADAPTER_FILE} both set the LoRA's strength; remove one")
        if not torch.isfinite(tensor).all():
            raise _refusal(file, f": {name} is not finite")


def _name_as_in_peft(unet: Any, tensors: Tensors) -> tuple[Tensors, dict[str, float]]:
    """Return the LoRA's down and up matrices in float32, by peft's names in the UNet, and the alpha of each layer."""
    kohya = {f"lora_unet_{name.replace('.', '_')}": name for name, _ in unet.named_modules()}
    lora, alphas = {}, {}
    for name, tensor in tensors.items():
        layer, _, rest = name.partition(".")
        name = f"{kohya[layer]}.{rest}" if layer in kohya else name
        name = name.removeprefix("base_model.model.").removeprefix("unet.").replace(".default.weight", ".weight")
        if name.endswith(".alpha"):
            alphas[name.removesuffix(".alpha")] = float(tensor)
        else:
            lora[name.replace(".lora_down.", ".lora_A.").replace(".lora_up.", ".lora_B.")] = tensor.float()
    return convert_unet_state_dict_to_peft(lora), alphas


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
    placeholders = [f"<class_{label}>" for label in range(len(class_names))]
    # clones, since torch.save would write the storage of all rows for a view of one
    learned = {token: row.clone() for token, row in zip(placeholders, rows.detach().to("cpu", torch.float32))}
    names, tokens = dict(zip(class_names, placeholders)), dict(zip(placeholders, class_names))
    pickled = io.BytesIO()
    torch.save({"learned_embeds_dict": learned, "name2placeholder": names, "placeholder2name": tokens}, pickled)
    for file_name, content in ((EMBEDDINGS_FILE, pickled.getvalue()), (LORA_FILE, save(tensors))):
        with atomic_file(folder / file_name) as file:
            file.write(content)
