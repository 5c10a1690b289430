#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2. fuse_qkv_projections() is offered as a pure speed-up: it joins
# the query, key and value matrices of each attention layer. With a LoRA on exactly those matrices one
# would expect the same output, or an error. Instead the joined matrices are copied from the weights
# without the LoRA, so self-attention loses the LoRA entirely and cross-attention keeps only its query
# part; it does not matter whether the LoRA was loaded before or after. set_adapters(),
# active_adapters() and the LoRA weights in the model all look right, and no message is given;
# unfuse_qkv_projections() brings the LoRA back. Whoever turns on the speed-up for a pipeline with a
# LoRA gets images that are weakly or not at all adapted.
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

x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)
run = lambda u: u(x, 5, text).sample
cases = {"self-attention only": r".*attn1\.to_[qkv]", "cross-attention key and value": r".*attn2\.to_[kv]", "all of q, k and v": r".*\.to_[qkv]"}
for name, where in cases.items():
    effect = {}
    for order in ("no fusion", "LoRA, then fusion", "fusion, then LoRA", "unfused again"):
        unet = make_unet()
        plain = run(unet)
        if order == "fusion, then LoRA":
            unet.fuse_qkv_projections()
            assert torch.allclose(run(unet), plain, atol=1e-5)
        torch.manual_seed(1)
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=where, init_lora_weights=False), "a")
        if order in ("LoRA, then fusion", "unfused again"):
            unet.fuse_qkv_projections()
        if order == "unfused again":
            unet.unfuse_qkv_projections()
        assert unet.active_adapters() == ["a"]
        effect[order] = round((run(unet) - plain).abs().max().item(), 4)
    print(f"{name}: change of the output by the LoRA:", effect)
    assert effect["no fusion"] == effect["unfused again"] > 0.01
    assert effect["LoRA, then fusion"] == effect["fusion, then LoRA"] < 0.5 * effect["no fusion"]
    assert name.startswith("all") or effect["LoRA, then fusion"] < 1e-4
PY
# Output seen on 2026-11-29:
# self-attention only: change of the output by the LoRA: {'no fusion': 0.0403, 'LoRA, then fusion': 0.0, 'fusion, then LoRA': 0.0, 'unfused again': 0.0403}
# cross-attention key and value: change of the output by the LoRA: {'no fusion': 0.052, 'LoRA, then fusion': 0.0, 'fusion, then LoRA': 0.0, 'unfused again': 0.052}
# all of q, k and v: change of the output by the LoRA: {'no fusion': 0.0636, 'LoRA, then fusion': 0.0242, 'fusion, then LoRA': 0.0242, 'unfused again': 0.0636}
