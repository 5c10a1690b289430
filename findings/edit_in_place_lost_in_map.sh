#!/usr/bin/env bash
# Libraries: datasets 5.2.0 with Pillow 13.0.0.
# One would expect: a function given to Dataset.map that shrinks a picture in
#   place (Image.thumbnail) or paints on it (ImageDraw, paste) and returns it
#   yields a data set of the changed pictures.
# What happens: the picture still carries the name of the file it was opened
#   from, and datasets stores that name instead of the pixels. The new data set
#   silently shows the ORIGINAL files: full size, nothing painted. A method that
#   makes a new picture, such as resize, works, and so hides the trap. The same
#   holds for Dataset.from_dict with opened and changed pictures.
# Who meets it: whoever makes thumbnails, masks or blots out parts of pictures
#   of an imagefolder data set within map.
set -euo pipefail
tmp="$(mktemp -d)"; trap 'rm -rf "$tmp"' EXIT; cd "$tmp"
export OMP_NUM_THREADS=1 HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1
uv venv --quiet --no-python-downloads venv
VIRTUAL_ENV="$tmp/venv" uv pip install --quiet 'datasets==5.2.0' 'pillow==13.0.0' 'numpy==2.4.6'
venv/bin/python -W ignore - <<'PY'
import os, datasets, numpy as np
from PIL import Image, ImageDraw
datasets.disable_progress_bars()
for cls in ("finch", "wren"):
    os.makedirs(f"pics/{cls}")
    Image.new("RGB", (120, 100), (200, 150, 100)).save(f"pics/{cls}/0.png")
ds = datasets.load_dataset("imagefolder", data_dir="pics", split="train")

def shrink(row):
    row["image"].thumbnail((32, 32))
    assert row["image"].size == (32, 27)      # it is small in here
    return row

def blot(row):
    ImageDraw.Draw(row["image"]).rectangle((0, 0, 120, 100), fill=(0, 0, 0))
    assert np.asarray(row["image"]).max() == 0  # it is black in here
    return row

small, black = ds.map(shrink)[0]["image"], ds.map(blot)[0]["image"]
new = ds.map(lambda r: {"image": r["image"].resize((32, 27))})[0]["image"]
opened = Image.open("pics/wren/0.png"); opened.thumbnail((32, 32))
feats = datasets.Features({"image": datasets.Image()})
made = datasets.Dataset.from_dict({"image": [opened]}, features=feats)[0]["image"]
print("thumbnail in map:", small.size, "| resize in map:", new.size)
print("painted black in map, brightest value:", np.asarray(black).max())
print("from_dict with a picture of", opened.size, "gives", made.size)
assert small.size == made.size == (120, 100) and new.size == (32, 27)
assert np.asarray(black).max() == 200
PY
# Output seen on 2026-11-29:
# thumbnail in map: (120, 100) | resize in map: (32, 27)
# painted black in map, brightest value: 200
# from_dict with a picture of (32, 27) gives (120, 100)
