#!/usr/bin/env bash
# Library: torchmetrics 1.9.0 with torch 2.15.0.
# One would expect: two metrics in one MetricCollection report what each of
#   them would report alone.
# What happens: after the first update the collection joins metrics of one
#   family whose counts happen to be equal at that moment, although their arguments differ
#   (ignore_index, threshold). From then on only the first of them is updated
#   and the other one reports the first one's value. So the result depends on
#   what the first batch was; the same batches in another order are right.
# Who meets it: whoever logs accuracy over all pictures beside accuracy without
#   one class, or at two thresholds, and starts with an easy or uniform batch.
set -euo pipefail
tmp="$(mktemp -d)"; trap 'rm -rf "$tmp"' EXIT; cd "$tmp"
export OMP_NUM_THREADS=1
uv venv --quiet --no-python-downloads venv
VIRTUAL_ENV="$tmp/venv" uv pip install --quiet 'torchmetrics==1.9.0' 'torch==2.15.0' 'numpy==2.4.6'
venv/bin/python -W ignore - <<'PY'
import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy

def both(make, batches):
    group = MetricCollection(make())
    alone = make()
    for p, t in batches:
        group.update(p, t)
        for m in alone.values():
            m.update(p, t)
    return ({k: round(v.item(), 3) for k, v in group.compute().items()},
            {k: round(m.compute().item(), 3) for k, m in alone.items()})

T = torch.tensor
acc = lambda: {"all": MulticlassAccuracy(4, average="micro"),
               "no_background": MulticlassAccuracy(4, average="micro", ignore_index=0)}
batches = [(T([1, 2, 3]), T([1, 2, 1])),         # no picture of class 0 in it
           (T([0, 0, 0, 1]), T([0, 0, 0, 2]))]
thr = lambda: {"at_half": BinaryAccuracy(0.5), "at_nine": BinaryAccuracy(0.9)}
scores = [(T([.95, .10]), T([1, 0])), (T([.6, .7, .8]), T([1, 1, 1]))]
for name, make, data in (("ignore_index", acc, batches), ("threshold", thr, scores)):
    for order in ("given", "reversed"):
        got, want = both(make, data if order == "given" else data[::-1])
        print(f"{name:12s} {order:8s} in the collection {got}  alone {want}")
        assert (got == want) == (order == "reversed")
        assert order == "reversed" or len(set(got.values())) == 1
PY
# Output seen on 2026-11-29:
# ignore_index given    in the collection {'all': 0.714, 'no_background': 0.714}  alone {'all': 0.714, 'no_background': 0.5}
# ignore_index reversed in the collection {'all': 0.714, 'no_background': 0.5}  alone {'all': 0.714, 'no_background': 0.5}
# threshold    given    in the collection {'at_half': 1.0, 'at_nine': 1.0}  alone {'at_half': 1.0, 'at_nine': 0.4}
# threshold    reversed in the collection {'at_half': 1.0, 'at_nine': 0.4}  alone {'at_half': 1.0, 'at_nine': 0.4}
