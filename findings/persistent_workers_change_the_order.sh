#!/usr/bin/env bash
# Library: torch 2.15.0, torch.utils.data.DataLoader.
# One would expect: with one and the same seeded generator the shuffled order of
#   every epoch is fixed, and persistent_workers only saves the start-up time.
# What happens: the number of workers changes nothing, but persistent_workers
#   does. The first epoch agrees; from the second epoch on the order is another
#   one, as a persistent loader draws a seed for its workers in the first epoch
#   only, and any other loader draws one in every epoch. The same happens with only torch.manual_seed. Runs
#   that differ only in this speed setting are different runs, and a run resumed
#   by replaying epochs with the other setting sees other batches.
# Who meets it: whoever compares seeded runs between a laptop (no workers) and a
#   server (persistent workers), or resumes one on the other.
set -euo pipefail
tmp="$(mktemp -d)"; trap 'rm -rf "$tmp"' EXIT; cd "$tmp"
export OMP_NUM_THREADS=1
uv venv --quiet --no-python-downloads venv
VIRTUAL_ENV="$tmp/venv" uv pip install --quiet 'torch==2.15.0' 'numpy==2.4.6'
cat > order.py <<'PY'
import torch
from torch.utils.data import DataLoader

def epochs(workers, persistent, own):
    torch.manual_seed(5)
    g = torch.Generator().manual_seed(5) if own else None
    loader = DataLoader(range(8), batch_size=8, shuffle=True, generator=g,
                        num_workers=workers, persistent_workers=persistent)
    return [[b.tolist() for b in loader][0] for _ in range(3)]

if __name__ == "__main__":
    for own in (True, False):
        a, b, c = epochs(0, False, own), epochs(2, False, own), epochs(2, True, own)
        print("with a generator" if own else "with torch.manual_seed")
        for e in range(3):
            print("  epoch", e, "| no workers", a[e], "| 2 workers", b[e], "| 2 persistent", c[e])
        assert a == b and a[0] == c[0] and a[1] != c[1] and a[2] != c[2]
PY
venv/bin/python order.py
# Output seen on 2026-11-29:
# with a generator
#   epoch 0 | no workers [7, 4, 1, 3, 2, 0, 6, 5] | 2 workers [7, 4, 1, 3, 2, 0, 6, 5] | 2 persistent [7, 4, 1, 3, 2, 0, 6, 5]
#   epoch 1 | no workers [7, 6, 5, 2, 4, 3, 1, 0] | 2 workers [7, 6, 5, 2, 4, 3, 1, 0] | 2 persistent [7, 6, 0, 2, 5, 4, 1, 3]
#   epoch 2 | no workers [6, 0, 3, 7, 5, 1, 4, 2] | 2 workers [6, 0, 3, 7, 5, 1, 4, 2] | 2 persistent [4, 6, 7, 2, 1, 5, 3, 0]
# with torch.manual_seed
#   epoch 0 | no workers [4, 6, 1, 7, 5, 3, 2, 0] | 2 workers [4, 6, 1, 7, 5, 3, 2, 0] | 2 persistent [4, 6, 1, 7, 5, 3, 2, 0]
#   epoch 1 | no workers [5, 3, 7, 1, 2, 0, 4, 6] | 2 workers [5, 3, 7, 1, 2, 0, 4, 6] | 2 persistent [1, 7, 4, 3, 2, 0, 6, 5]
#   epoch 2 | no workers [0, 7, 2, 4, 1, 3, 5, 6] | 2 workers [0, 7, 2, 4, 1, 3, 5, 6] | 2 persistent [5, 3, 7, 1, 2, 0, 4, 6]
