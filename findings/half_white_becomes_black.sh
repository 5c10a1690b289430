#!/usr/bin/env bash
# Library: torchvision 0.29.2 with torch 2.15.0.
# One would expect: v2.ToDtype(torch.uint8, scale=True) turns a half precision
#   picture in [0, 1] into bytes just as it does a float32 picture; 1.0 is 255.
# What happens: in float16 and in bfloat16 the value 1.0 becomes 0, so every
#   pure white pixel turns black. No error and no warning. The scale factor
#   255.999 is rounded to 256 in half precision and 256 wraps round in a byte.
#   The older convert_image_dtype does the same. In float32 all is well.
# Who meets it: whoever takes pictures straight from a half precision diffusion
#   pipeline as tensors and turns them into bytes with torchvision.
set -euo pipefail
tmp="$(mktemp -d)"; trap 'rm -rf "$tmp"' EXIT; cd "$tmp"
export OMP_NUM_THREADS=1
uv venv --quiet --no-python-downloads venv
VIRTUAL_ENV="$tmp/venv" uv pip install --quiet 'torch==2.15.0' 'torchvision==0.29.2' 'numpy==2.4.6' 'pillow==13.0.0'
venv/bin/python - <<'PY'
import torch
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms.functional import to_pil_image

# a bird-like grey disc on a pure white ground
yy, xx = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
disc = ((yy - 16) ** 2 + (xx - 16) ** 2 < 64).float()
picture = (1.0 - 0.6 * disc).expand(3, 32, 32)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    half = picture.to(dtype)
    new = v2.ToDtype(torch.uint8, scale=True)(half)
    old = v1.ConvertImageDtype(torch.uint8)(half)
    pil = to_pil_image(half.float()).getpixel((0, 0))[0]
    print(dtype, "corner in:", half[0, 0, 0].item(), "v2:", new[0, 0, 0].item(),
          "v1:", old[0, 0, 0].item(), "to_pil_image of float32:", pil,
          "mean byte:", round(new.float().mean().item(), 1))
    white = 255 if dtype == torch.float32 else 0
    assert half[0, 0, 0].item() == 1.0
    assert new[0, 0, 0].item() == old[0, 0, 0].item() == white and pil == 255
PY
# Output seen on 2026-11-29:
# torch.float32 corner in: 1.0 v2: 255 v1: 255 to_pil_image of float32: 255 mean byte: 226.2
# torch.float16 corner in: 1.0 v2: 0 v1: 0 to_pil_image of float32: 255 mean byte: 19.2
# torch.bfloat16 corner in: 1.0 v2: 0 v1: 0 to_pil_image of float32: 255 mean byte: 19.2
