#!/usr/bin/env bash
# peft 0.21.2. add_weighted_adapter() makes a new LoRA from weighted old ones; combination_type "cat"
# gives the exact weighted sum for ordinary LoRAs. For LoRAs trained with use_rslora=True (strength
# alpha / sqrt(rank)) one would expect the same. Instead the new adapter takes in the old strength and
# is then itself scaled once more by the square-root rule, so that the result is too strong by the
# square root of the new adapter's rank: a copy of one adapter with weight 1.0 and rank 16 comes out 4
# times as strong, with any combination_type. No message is given. Whoever averages or negates
# adapters trained with rank-stabilised scaling meets it, and the factor hides in the choice of a
# weight that looks good.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
uv venv --quiet --no-python-downloads env
VIRTUAL_ENV="$work/env" uv pip install --quiet 'torch==2.15.0' 'peft==0.21.2' 'transformers==5.23.0'
env/bin/python - <<'PY'
import torch
from peft import LoraConfig, get_peft_model

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q = torch.nn.Linear(32, 32)
    def forward(self, x):
        return self.q(x)

x = torch.eye(32)
for rslora in (False, True):
    config = lambda: LoraConfig(r=16, lora_alpha=16, use_rslora=rslora, target_modules=["q"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(Net().requires_grad_(False), config(), adapter_name="one").eval()
    model.add_adapter("two", config())
    with model.disable_adapter():
        plain = model(x)
    update = {}
    def use(name):
        model.set_adapter(name)
        return (model(x) - plain).detach()
    a, b = use("one"), use("two")
    for kind in ("linear", "svd", "cat"):
        model.add_weighted_adapter(["one"], [1.0], "copy_" + kind, combination_type=kind)
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "mean", combination_type="cat")
    got = {k: round((use("copy_" + k).norm() / a.norm()).item(), 3) for k in ("linear", "svd", "cat")}
    mean = use("mean")
    ratio = (mean.norm() / ((a + b) / 2).norm()).item()
    print(f"use_rslora={rslora}: strength of a copy with weight 1.0: {got}, of the mean by cat: {ratio:.3f}")
    want = 4.0 if rslora else 1.0
    assert all(abs(v - want) < 1e-2 for v in got.values()), got
    assert abs(ratio - (32 ** 0.5 if rslora else 1.0)) < 1e-2
PY
# Output seen on 2026-11-29:
# use_rslora=False: strength of a copy with weight 1.0: {'linear': 1.0, 'svd': 1.0, 'cat': 1.0}, of the mean by cat: 1.000
# use_rslora=True: strength of a copy with weight 1.0: {'linear': 4.0, 'svd': 4.0, 'cat': 4.0}, of the mean by cat: 5.657
