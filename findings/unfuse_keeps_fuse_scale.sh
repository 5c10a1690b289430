#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2. A LoRA is merged for a trial at half strength with
# fuse_lora(lora_scale=0.5) and taken out again with unfuse_lora(). One would expect the model to be
# back where it was, with the adapter active at strength 1. Instead the factor stays in the adapter:
# after unfuse_lora() the live adapter runs at 0.5, the same fuse_lora(lora_scale=0.5) call repeated
# merges 0.25, and a third time 0.125. No message is given. Whoever sweeps fusing strengths in a loop,
# or fuses for sampling and then goes on using or training the adapter, meets it: the strengths of the
# sweep are products of all the earlier ones.
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
unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False), "a")
layer = next(m for m in unet.modules() if hasattr(m, "lora_A"))
start = layer.base_layer.weight.clone()
delta = layer.get_delta_weight("a").clone()
before = run()
print("adapter strength before:", layer.scaling["a"])
merged = []
for turn in range(3):
    unet.fuse_lora(lora_scale=0.5)
    merged.append(((layer.base_layer.weight - start).norm() / delta.norm()).item())
    unet.unfuse_lora()
    print(f"round {turn + 1}: asked for 0.5, share of the update merged {merged[-1]:.3f}, left at {layer.scaling['a']}")
print("largest output change after the last unfuse:", f"{(run() - before).abs().max():.3f}")
assert [round(m, 3) for m in merged] == [0.5, 0.25, 0.125] and layer.scaling["a"] == 0.125
assert not torch.allclose(run(), before, atol=1e-3)
PY
# Output seen on 2026-11-29:
# adapter strength before: 1.0
# round 1: asked for 0.5, share of the update merged 0.500, left at 0.5
# round 2: asked for 0.5, share of the update merged 0.250, left at 0.25
# round 3: asked for 0.5, share of the update merged 0.125, left at 0.125
# largest output change after the last unfuse: 0.080
