"""NoiseCutMix: augmented data sets from a diffusion model.

At every denoising step of a Stable Diffusion + LoRA pipeline the noise estimates for two classes are merged under a
CutMix mask, so one natural picture carries features of both, and its label is the area-weighted mix.

    from noisecutmix import NoiseCutMixGenerator

    generator = NoiseCutMixGenerator(device="cpu", data_name="digits")
    images, labels, masks = generator([3, 5], return_mask=True)

Names are loaded on first use, so that importing the package imports no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a name imported as itself is one that users may import
    from .checkpoint import load_pipeline as load_pipeline
    from .datasets import AugmentedDataset as AugmentedDataset
    from .datasets import MixedDataset as MixedDataset
    from .generator import NoiseCutMixGenerator as NoiseCutMixGenerator
    from .pipeline import NoiseCutMixPipeline as NoiseCutMixPipeline
    from .plan import make_mask_and_ratio as make_mask_and_ratio

__version__ = "1.0.0"

_modules = {
    "AugmentedDataset": "datasets",
    "MixedDataset": "datasets",
    "NoiseCutMixGenerator": "generator",
    "NoiseCutMixPipeline": "pipeline",
    "load_pipeline": "checkpoint",
    "make_mask_and_ratio": "plan",
}
__all__ = list(_modules)


def __getattr__(name: str) -> Any:
    if name not in _modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_modules[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
