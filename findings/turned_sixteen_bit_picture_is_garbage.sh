#!/usr/bin/env bash
# Libraries: Pillow 13.0.0, and torchvision 0.29.2 on top of it.
# One would expect: turning a 16 bit grey picture (mode I;16) by a few degrees
#   with bilinear or bicubic interpolation keeps its grey values; a picture of
#   the one value 40000 still holds 40000 in the middle. Resize does keep them.
# What happens: rotate and transform return mode I;16 again, but all values are
#   below 256: each byte of the data was interpolated as though it were a
#   grey value of its own, so the picture is practically black and meaningless.
#   Nearest is right. No error and no warning; torchvision's RandomRotation and
#   RandomAffine with bilinear interpolation hand the same on.
# Who meets it: whoever augments 16 bit depth maps, X-rays or microscope pictures.
set -euo pipefail
tmp="$(mktemp -d)"; trap 'rm -rf "$tmp"' EXIT; cd "$tmp"
export OMP_NUM_THREADS=1
uv venv --quiet --no-python-downloads venv
VIRTUAL_ENV="$tmp/venv" uv pip install --quiet 'pillow==13.0.0' 'torch==2.15.0' 'torchvision==0.29.2' 'numpy==2.4.6'
venv/bin/python -W ignore - <<'PY'
import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

grey = Image.fromarray(np.full((64, 64), 40000, np.uint16))
grey.save("grey.png")
grey = Image.open("grey.png")
centre = (32, 32)
zoom = (0.5, 0, 16, 0, 0.5, 16)
seen = {}
for name, how in (("nearest", Image.Resampling.NEAREST), ("bilinear", Image.Resampling.BILINEAR),
                  ("bicubic", Image.Resampling.BICUBIC)):
    turned = grey.rotate(10, how)
    zoomed = grey.transform((64, 64), Image.Transform.AFFINE, zoom, how)
    resized = grey.resize((40, 40), how)
    tv = v2.RandomRotation((10, 10), interpolation=InterpolationMode(name))(grey)
    seen[name] = [im.getpixel(c) for im, c in ((turned, centre), (zoomed, centre), (tv, centre), (resized, (20, 20)))]
    print(f"{grey.mode} {name:8s} rotate {seen[name][0]}, transform {seen[name][1]},",
          f"torchvision {seen[name][2]}, resize {seen[name][3]}")
assert seen["nearest"] == [40000] * 4
for name in ("bilinear", "bicubic"):
    assert max(seen[name][:3]) < 256 and seen[name][3] == 40000
PY
# Output seen on 2026-11-29:
# I;16 nearest  rotate 40000, transform 40000, torchvision 40000, resize 40000
# I;16 bilinear rotate 72, transform 87, torchvision 72, resize 40000
# I;16 bicubic  rotate 66, transform 78, torchvision 66, resize 40000
