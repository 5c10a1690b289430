#!/usr/bin/env bash
# lycoris-lora 4.1.3. merge_to() writes a trained adapter into the weights of the model, and for LoRA
# and LoKr the merged model gives the same output as the model with the live adapter. For algo="loha"
# one would expect the same. Instead merging multiplies the update by alpha / rank twice, while the
# live adapter applies it once: with alpha 4 and rank 16 the merged model carries a quarter of the
# trained effect, and only alpha equal to rank hides it. No message is given. Whoever trains a LoHa,
# checks it live and then merges it for export, meets it: the exported model is weaker than the one
# that was checked.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
uv venv --quiet --no-python-downloads env
VIRTUAL_ENV="$work/env" uv pip install --quiet 'torch==2.15.0' 'numpy' 'lycoris-lora==4.1.3'
env/bin/python - <<'PY'
import logging
import torch
from lycoris import create_lycoris

logging.disable(logging.WARNING)
make = lambda: (torch.manual_seed(0), torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False)))[1].eval()
x = torch.eye(32)
plain = make()(x).detach()

def adapted(algo, alpha):
    model = make()
    net = create_lycoris(model, 1.0, linear_dim=16, linear_alpha=alpha, algo=algo)
    net.apply_to()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in sorted(net.named_parameters()):
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)      # stands for training
    return model, net.eval()

@torch.no_grad()
def share(algo, alpha):
    model, net = adapted(algo, alpha)
    live = model(x) - plain
    net.restore()
    net.merge_to(1.0)
    return round(((model(x) - plain).norm() / live.norm()).item(), 4)

for algo in ("lora", "lokr", "loha"):
    for alpha in (16, 4):
        got = share(algo, alpha)
        print(f"{algo}: rank 16, alpha {alpha}: merged update / live update = {got:.4f}")
        want = alpha / 16 if algo == "loha" else 1.0
        assert abs(got - want) < 1e-3, (algo, alpha, got)
PY
# Output seen on 2026-11-29:
# lora: rank 16, alpha 16: merged update / live update = 1.0000
# lora: rank 16, alpha 4: merged update / live update = 1.0000
# lokr: rank 16, alpha 16: merged update / live update = 1.0000
# lokr: rank 16, alpha 4: merged update / live update = 1.0000
# loha: rank 16, alpha 16: merged update / live update = 1.0000
# loha: rank 16, alpha 4: merged update / live update = 0.2500
