#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2. A LoRA is merged with fuse_lora() while its weight is 0.5, the
# weight is then set to 1.0 with set_adapters() for later, and unfuse_lora() is called. One would
# expect unfusing to subtract what had been added. Instead it subtracts the update at the weight of
# that moment, 1.0: the base weights are left with minus half a LoRA in them, for good.
# disable_adapters() or delete_adapters() afterwards no longer gives the original model, and a second
# round shifts it further. No message is given. Whoever changes the weight of an adapter between
# fusing and unfusing meets it, for example a sampler that fuses for speed and a menu that sets
# strengths.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
uv venv --quiet --no-python-downloads env
VIRTUAL_ENV="$work/env" uv pip install --quiet 'torch==2.15.0' 'diffusers==0.42.1' 'peft==0.21.2' 'transformers==5.23.0' 'accelerate==1.15.0'
env/bin/python - <<'PY'
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

def make_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=2, cross_attention_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")).eval().requires_grad_(False)

unet = make_unet()
x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)
run = lambda: unet(x, 5, text).sample
plain = run()
unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False), "first")
layer = next(m for m in unet.modules() if hasattr(m, "lora_A"))
original = layer.base_layer.weight.clone()
delta = layer.get_delta_weight("first").clone()
left = lambda: round((((layer.base_layer.weight - original) * delta).sum() / (delta * delta).sum()).item(), 3)
unet.set_adapters("first", 0.5)
unet.fuse_lora()
unet.unfuse_lora()
print("weight unchanged in between: share of the update left in the base weights:", left())
assert abs(left()) < 1e-3
seen = []
for _ in range(2):
    unet.set_adapters("first", 0.5)
    unet.fuse_lora()
    unet.set_adapters("first", 1.0)
    unet.unfuse_lora()
    seen.append(left())
print("weight set from 0.5 to 1.0 in between, two rounds:", seen)
unet.delete_adapters("first")
print("distance of the model without adapters from the original:", f"{(run() - plain).abs().max():.4f}")
assert seen == [-0.5, -1.0] and (run() - plain).abs().max() > 0.01
PY
# Output seen on 2026-11-29:
# weight unchanged in between: share of the update left in the base weights: -0.0
# weight set from 0.5 to 1.0 in between, two rounds: [-0.5, -1.0]
# distance of the model without adapters from the original: 0.0542
