#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2. A LoRA is given the weight 0.4 with set_adapters("a", 0.4). One
# forward pass is made without it by passing cross_attention_kwargs={"scale": 0.0}, as when a second
# noise estimate is wanted from the plain model. One would expect the next ordinary forward pass to
# use 0.4 again, as it does after a pass with any other scale. Instead a pass with scale 0.0 leaves
# the adapter at full strength 1.0 for every later pass: the pass that was to switch it off even
# switches on, from then on, an adapter whose weight had been set to 0.0. No message is given. Whoever
# mixes estimates with and without a LoRA inside one sampling loop meets it: all steps after the first
# use a strength that nobody asked for.
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
run = lambda **kw: unet(x, 5, text, **kw).sample
plain = run()
unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False), "a")
layer = next(m for m in unet.modules() if hasattr(m, "lora_A"))
full = run()
seen = {}
for weight in (0.4, 0.0):
    for scale in (0.5, 0.0):
        unet.set_adapters("a", weight)
        wanted = run()
        run(cross_attention_kwargs={"scale": scale})
        seen[weight, scale] = layer.scaling["a"]
        same = torch.allclose(run(), wanted, atol=1e-6)
        print(f"set_adapters {weight}, one pass with scale {scale}: adapter now at {seen[weight, scale]:.2f}, output as before: {same}")
assert abs(seen[0.4, 0.5] - 0.4) < 1e-6          # an ordinary scale is undone correctly
assert seen[0.4, 0.0] == 1.0                     # a scale of zero is not
assert seen[0.0, 0.5] == 0.0 and seen[0.0, 0.0] == 1.0
assert torch.allclose(run(), full, atol=1e-6) and not torch.allclose(full, plain, atol=1e-3)
PY
# Output seen on 2026-11-29:
# set_adapters 0.4, one pass with scale 0.5: adapter now at 0.40, output as before: True
# set_adapters 0.4, one pass with scale 0.0: adapter now at 1.00, output as before: False
# set_adapters 0.0, one pass with scale 0.5: adapter now at 0.00, output as before: True
# set_adapters 0.0, one pass with scale 0.0: adapter now at 1.00, output as before: False
