#!/usr/bin/env bash
# diffusers 0.42.1 with peft 0.21.2. A finished LoRA is loaded, everything is frozen with
# requires_grad_(False), and a new LoRA is added for training on top of it. To have both in the
# forward pass one calls set_adapters(["done", "new"], [0.8, 1.0]). One would expect a call that sets
# weights for the forward pass to leave requires_grad as it was, as set_adapters reads as an inference
# setting. Instead it switches requires_grad on for every adapter that it names, so the usual
# optimizer over [p for p in unet.parameters() if p.requires_grad] trains the finished LoRA too, and
# saving only the new one loses that part of what was learned: the sum on the next machine is a
# different model. No message is given.
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
config = lambda start: LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=start)
unet.add_adapter(config(False), "done")
unet.save_lora_adapter("done_before", adapter_name="done")
unet.requires_grad_(False)
unet.add_adapter(config(True), "new")
trainable = lambda name: sum(p.requires_grad for k, p in unet.named_parameters() if f".{name}." in k)
print("trainable tensors after add_adapter: done", trainable("done"), "new", trainable("new"))
assert trainable("done") == 0 and trainable("new") > 0
unet.set_adapters(["done", "new"], [0.8, 1.0])
print("trainable tensors after set_adapters: done", trainable("done"), "new", trainable("new"))
assert trainable("done") == trainable("new") > 0
torch.manual_seed(1)
x, text, aim = torch.randn(4, 4, 8, 8), torch.randn(4, 3, 8), torch.randn(4, 4, 8, 8)
optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-2)
for _ in range(30):
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(unet(x, 5, text).sample, aim).backward()
    optimizer.step()
unet.save_lora_adapter("new_after", adapter_name="new")
fresh = make_unet()
for folder, name in (("done_before", "done"), ("new_after", "new")):
    fresh.load_lora_adapter(folder, prefix=None, adapter_name=name, weight_name="pytorch_lora_weights.safetensors")
fresh.set_adapters(["done", "new"], [0.8, 1.0])
gap = (fresh(x, 5, text).sample - unet(x, 5, text).sample).abs().max().item()
print(f"trained model against finished LoRA file + new LoRA file: largest difference {gap:.3f}")
assert gap > 0.05
PY
# Output seen on 2026-11-29:
# trainable tensors after add_adapter: done 0 new 32
# trainable tensors after set_adapters: done 32 new 32
# trained model against finished LoRA file + new LoRA file: largest difference 0.499
