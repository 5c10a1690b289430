"""A LoRA as other programs save it: read, checked, and added to a UNet's weights."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .errors import InputError, first_line, is_out_of_memory, quiet_libraries
from .sources import ADAPTER_FILE

with quiet_libraries():
    from diffusers.utils import convert_unet_state_dict_to_peft
    from peft import LoraConfig, get_peft_model_state_dict

# peft's `init_lora_weights`: those that leave the base model as it is, and those whose change of it peft repeats when
# it loads the LoRA; others change it by chance, by data or by a quantized model
PLAIN_STARTS = ("true", "false", "gaussian", "orthogonal", "eva", "mica")
REPEATABLE_STARTS = ("pissa", "olora")
UNREAD_SETTINGS = (
    *("alora_invocation_tokens", "arrow_config", "layer_replication", "megatron_config", "target_parameters"),
    *("trainable_token_indices", "use_bdlora"),
)
IGNORED_SETTINGS = ("peft_version", "runtime_config")
MAX_REASON = 360  # characters: libraries' messages and the names in a file can be of any length

Tensors = dict[str, torch.Tensor]


def refusal(file: Path, reason: str) -> InputError:
    reason = " ".join(reason.splitlines())
    reason = reason if len(reason) <= MAX_REASON else f"{reason[:MAX_REASON]}…"
    return InputError(f"{file}{reason}", "ckpt_path")


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether the tensor holds finite numbers, and is none of the kinds that cannot be computed with here."""
    dense = tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized or tensor.is_complex())
    return dense and bool(torch.isfinite(tensor).all())


def load_pickle(file: Path) -> Any:
    """Return the content of a file that torch.save wrote; only tensors and plain containers are unpickled."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or malicious pickle can raise any error
        raise refusal(file, " is not a pickle that holds only tensors, so it was not loaded") from error


def read_lora(file: Path, settings_file: Path) -> tuple[Tensors, dict[str, Any] | None]:
    """Return the file's tensors, and the LoraConfig that was saved in the file or in `settings_file`, if any."""
    settings = None
    if file.suffix == ".bin":
        tensors = load_pickle(file)
        named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
        if not named or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise refusal(file, " holds no dictionary of tensors")
    else:
        try:
            with safe_open(file, framework="pt") as content:
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not a dict)
                settings = (content.metadata() or {}).get("lora_adapter_metadata")
        except (SafetensorError, OSError) as error:
            raise refusal(file, f" is not a safetensors file: {first_line(error)}") from error
    try:
        if settings is None and settings_file.exists():
            file, settings = settings_file, settings_file.read_text(encoding="utf-8")
        if settings is not None:  # diffusers writes "unet." before every name, peft does not
            settings = {name.removeprefix("unet."): value for name, value in json.loads(settings).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise refusal(file, f": the LoRA's settings cannot be read: {first_line(error)}") from error
    return tensors, None if settings is None else _check_settings(settings, file)


def fuse_lora(unet: Any, tensors: Tensors, settings: dict[str, Any] | None, file: Path) -> None:
    """Add the LoRA to the UNet's weights; raise an InputError if a tensor of the file cannot be applied."""
    _check_lora(tensors, settings, file)
    lora, alphas = _name_as_in_peft(unet, tensors)
    if not lora:
        raise refusal(file, " holds no LoRA tensor")
    layers = {name for name, _ in unet.named_modules()}
    ranks: dict[str, int] = {}
    for place, matrix in lora.items():
        layer, _, side = place.partition(".lora_")
        if side not in ("A.weight", "B.weight") or matrix.ndim < 2:
            if settings is None:  # else it may be a bias, say, and peft knows where it belongs
                raise refusal(file, f": nothing in the UNet takes {place}; only down and up matrices are read")
            continue
        if layer not in layers:
            raise refusal(file, f": nothing in the UNet takes {place}; a LoRA of another base model?")
        rank = matrix.shape[0 if side == "A.weight" else 1]  # down (rank, in, …) and up (out, rank, …)
        if ranks.setdefault(layer, rank) != rank:
            raise refusal(file, f": {place} has rank {rank}, but the other matrix of its layer has not")
    if settings is None:
        settings = {  # "^", since peft would also apply a pattern to longer names that end with it
            "rank_pattern": {f"^{layer}": rank for layer, rank in ranks.items()},
            "alpha_pattern": {f"^{layer}": alphas.get(layer, rank) for layer, rank in ranks.items()},
            "target_modules": list(ranks),
        }
    try:
        unet.load_lora_adapter(lora, prefix=None, metadata=settings)
        placed = get_peft_model_state_dict(unet, adapter_name=unet.active_adapters()[0])
        unet.fuse_lora()
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise refusal(file, f" does not fit the UNet; a LoRA of another base model? ({reason})") from error
    if lost := sorted((alphas.keys() - ranks.keys()) | (lora.keys() - placed.keys())):
        raise refusal(file, f": nothing in the UNet takes {lost[0]}; a LoRA of another base model?")
    if not len(tensors) - len(alphas) == len(lora) == len(placed):
        raise refusal(file, f": its {len(tensors)} LoRA tensors do not fill the {len(placed)} places in the UNet")
    unet.unload_lora()


def _check_settings(settings: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the LoraConfig for the installed peft; raise an InputError if the LoRA's tensors and it are not enough."""
    kind = settings.get("peft_type") or "LORA"
    if kind != "LORA":
        raise refusal(file, f" is a {kind}; only LoRAs are read")
    if settings.get("use_dora"):
        raise refusal(file, " is a DoRA; only LoRAs are read")
    start = str(settings.get("init_lora_weights") or False).lower()
    if start not in PLAIN_STARTS + REPEATABLE_STARTS:
        reason = f": its LoRA starts with {start}, from base weights that cannot be computed again"
        raise refusal(file, f"{reason}; save a plain LoRA (in peft: path_initial_model_for_weight_conversion)")
    known = {field.name for field in fields(LoraConfig)}.difference(IGNORED_SETTINGS)
    for name, value in settings.items():
        if value and name in UNREAD_SETTINGS:
            raise refusal(file, f": LoRAs with {name} are not read")
        if value and name not in known.union(IGNORED_SETTINGS):
            raise refusal(file, f": the installed peft does not know the LoRA's setting {name}")
    needed = ("r", "lora_alpha")  # peft refuses a null, but replaces a missing one
    kept = {name: value for name, value in settings.items() if name in known and (value is not None or name in needed)}
    # older versions of diffusers need both
    patterns = {name: settings.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    return kept | patterns | {"init_lora_weights": start if start in REPEATABLE_STARTS else True}


def _check_lora(tensors: Tensors, settings: dict[str, Any] | None, file: Path) -> None:
    """Raise an InputError unless this is a LoRA of only a UNet, with a known strength."""
    if any("lora_magnitude" in name or "dora_scale" in name for name in tensors):
        raise refusal(file, " is a DoRA; only LoRAs are read")
    for name, tensor in tensors.items():
        if name.startswith(("text_encoder", "lora_te")):
            raise refusal(file, f": {name} is for the text encoder, but only LoRAs of a UNet can be applied")
        if name.startswith("base_model.model.") and settings is None:
            raise refusal(file, f" was saved by peft: put its {ADAPTER_FILE}, which has its strength, beside it")
        if name.endswith(".alpha") and settings is not None:
            raise refusal(file, f": {name} and {ADAPTER_FILE} both set the LoRA's strength; remove one")
        if name.endswith(".alpha") and tensor.numel() != 1:
            raise refusal(file, f": {name} is not one number")
        if not is_finite(tensor):
            raise refusal(file, f": {name} is not finite, or not dense")


def _name_as_in_peft(unet: Any, tensors: Tensors) -> tuple[Tensors, dict[str, float]]:
    """Return the LoRA's down and up matrices in float32, by peft's names in the UNet, and the alpha of each layer."""
    layers = [name for name, _ in unet.named_modules()]
    kohya = {f"{prefix}_{name.replace('.', '_')}": name for prefix in ("lora_unet", "lycoris") for name in layers}
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
