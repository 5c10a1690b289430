#!/usr/bin/env bash
# Library: datasets 5.2.0.
# One would expect: class_encode_column on a column of whole numbers 0 to 11
#   makes it a ClassLabel column and leaves the numbers as they are.
# What happens: the numbers are turned into strings and sorted as strings, so
#   10 and 11 come before 2. Label 2 becomes 4, label 10 becomes 2 and so on. With
#   ten classes or fewer nothing changes, so a small test does not show it. There is no
#   warning; a list of class names kept elsewhere, or a model trained earlier,
#   is silently off for all classes from the third on.
# Who meets it: whoever needs a ClassLabel column, for example for
#   train_test_split(stratify_by_column), from numeric labels of 11 or more
#   classes such as birds or aircraft, and then uses old names or a classifier.
set -euo pipefail
tmp="$(mktemp -d)"; trap 'rm -rf "$tmp"' EXIT; cd "$tmp"
export OMP_NUM_THREADS=1 HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1
uv venv --quiet --no-python-downloads venv
VIRTUAL_ENV="$tmp/venv" uv pip install --quiet 'datasets==5.2.0' 'numpy==2.4.6'
venv/bin/python -W ignore - <<'PY'
import datasets
datasets.disable_progress_bars()
for classes in (10, 12, 200):
    old = list(range(classes))
    ds = datasets.Dataset.from_dict({"label": old}).class_encode_column("label")
    new = ds["label"][:]
    kept = sum(a == b for a, b in zip(old, new))
    print(f"{classes} classes: {kept} labels keep their number; the first twelve are now {new[:12]}")
    if classes == 10:
        assert kept == 10
    if classes == 12:
        assert new == [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3]
        print("names:", ds.features["label"].names)
    if classes == 200:
        assert kept < 10
PY
# Output seen on 2026-11-29:
# 10 classes: 10 labels keep their number; the first twelve are now [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
# 12 classes: 2 labels keep their number; the first twelve are now [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3]
# names: ['0', '1', '10', '11', '2', '3', '4', '5', '6', '7', '8', '9']
# 200 classes: 2 labels keep their number; the first twelve are now [0, 1, 112, 123, 134, 145, 156, 167, 178, 189, 2, 13]
