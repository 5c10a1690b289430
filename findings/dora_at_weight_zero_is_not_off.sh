#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2. set_adapters("a", 0.0) is the usual way to switch a LoRA off for
# a comparison, and for an ordinary LoRA the output is then exactly that of the plain model. For an
# adapter with use_dora=True one would expect the same. Instead only the low-rank part goes to zero,
# while the trained column lengths stay in force, so at weight 0.0 the model still differs from the
# plain one, and cross_attention_kwargs={"scale": 0.0} has the same fault; only disable_adapters()
# gives the plain model. No message is given. Whoever sweeps the strength of a DoRA from 0 to 1, or
# takes weight 0 as the control group of an experiment, meets it.
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

x, text = torch.randn(4, 4, 8, 8), torch.randn(4, 3, 8)
run = lambda u, **kw: u(x, 5, text, **kw).sample
for dora in (False, True):
    unet = make_unet()
    plain = run(unet)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], use_dora=dora), "a")
    start = (run(unet) - plain).abs().max().item()          # before training it is the plain model in both cases
    trained = [p for p in unet.parameters() if p.requires_grad]
    torch.manual_seed(1)
    aim, optimizer = torch.randn_like(plain), torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(run(unet), aim).backward()
        optimizer.step()
    with torch.no_grad():
        far = lambda out: round((out - plain).abs().max().item(), 4)
        seen = {"weight 1.0": far(run(unet))}
        seen["scale 0.0 in the call"] = far(run(unet, cross_attention_kwargs={"scale": 0.0}))
        unet.set_adapters("a", 0.0)
        seen["weight 0.0"] = far(run(unet))
        unet.disable_adapters()
        seen["disabled"] = far(run(unet))
    print(f"use_dora={dora}: largest distance from the plain model: untrained {start:.4f},", seen)
    assert start < 1e-4 and seen["disabled"] < 1e-4 and seen["weight 1.0"] > 0.05
    if dora:
        assert seen["weight 0.0"] > 0.02 and seen["scale 0.0 in the call"] > 0.02
    else:
        assert seen["weight 0.0"] < 1e-4 and seen["scale 0.0 in the call"] < 1e-4
PY
# Output seen on 2026-11-29:
# use_dora=False: largest distance from the plain model: untrained 0.0000, {'weight 1.0': 0.9842, 'scale 0.0 in the call': 0.0, 'weight 0.0': 0.0, 'disabled': 0.0}
# use_dora=True: largest distance from the plain model: untrained 0.0000, {'weight 1.0': 0.8623, 'scale 0.0 in the call': 0.3464, 'weight 0.0': 0.3464, 'disabled': 0.0}
