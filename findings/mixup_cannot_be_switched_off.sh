#!/usr/bin/env bash
# Library: timm 1.0.31 with torch 2.15.0.
# One would expect: loader.mixup_enabled = False, which is what timm's own
#   training script does for the option mixup_off_epoch, ends the mixing, so the
#   last epochs see plain pictures with hard labels.
# What happens: mixing goes on for the rest of the run. The mixing is done in the
#   worker processes, and create_loader keeps the workers alive by default
#   (persistent_workers is True), so they still hold their own copy of the
#   switch; reading loader.mixup_enabled says False all the same. Without
#   workers, or with workers that are started anew, it works.
# Who meets it: whoever mixes in the loader (FastCollateMixup with prefetcher,
#   timm's default way) and wants a clean end phase of the training.
set -euo pipefail
tmp="$(mktemp -d)"; trap 'rm -rf "$tmp"' EXIT; cd "$tmp"
export OMP_NUM_THREADS=1
uv venv --quiet --no-python-downloads venv
VIRTUAL_ENV="$tmp/venv" uv pip install --quiet 'timm==1.0.31' 'torch==2.15.0' 'torchvision==0.29.2' 'pillow==13.0.0' 'numpy==2.4.6'
cat > run.py <<'PY'
import os, torch
from PIL import Image
from timm.data import FastCollateMixup, create_dataset, create_loader

def soft(loader):
    """how many of the labels of one epoch are shared by two classes"""
    return sum(int(((t > 0) & (t < 1)).any(1).sum()) for _, t in loader)

def run(**kw):
    torch.manual_seed(0)
    mix = FastCollateMixup(mixup_alpha=1.0, cutmix_alpha=0.0, label_smoothing=0.0, num_classes=8)
    loader = create_loader(create_dataset("", root="pics"), input_size=(3, 16, 16), batch_size=4,
                           is_training=True, no_aug=True, collate_fn=mix, pin_memory=False,
                           device=torch.device("cpu"), use_prefetcher=True, **kw)
    seen = [soft(loader)]
    loader.mixup_enabled = False
    return seen + [soft(loader) for _ in range(3)], loader.mixup_enabled

if __name__ == "__main__":
    for i in range(8):  # eight classes of one picture each, so every mix shows
        os.makedirs(f"pics/bird{i}")
        Image.new("RGB", (16, 16), (i * 30,) * 3).save(f"pics/bird{i}/0.png")
    got = {}
    for name, kw in (("default, 2 workers", dict(num_workers=2)),
                     ("fresh workers", dict(num_workers=2, persistent_workers=False)),
                     ("no workers", dict(num_workers=0, persistent_workers=False))):
        got[name], switch = run(**kw)
        print(f"{name:18s} soft labels per epoch, switched off after the first:", got[name], "switch:", switch)
        assert switch is False and got[name][0] == 8
        assert got[name][1:] == ([8, 8, 8] if name.startswith("default") else [0, 0, 0])
PY
venv/bin/python -W ignore run.py
# Output seen on 2026-11-29:
# default, 2 workers soft labels per epoch, switched off after the first: [8, 8, 8, 8] switch: False
# fresh workers      soft labels per epoch, switched off after the first: [8, 0, 0, 0] switch: False
# no workers         soft labels per epoch, switched off after the first: [8, 0, 0, 0] switch: False
