#!/usr/bin/env bash
# Library: datasets 5.2.0.
# One would expect: Dataset.map computes anew when the function's code has been
#   changed, as it does for a function written in the script itself.
# What happens: for a function imported from a module of one's own, only its name
#   counts. After the body is edited, the next run silently takes the old result
#   from the cache. The very same edit is noticed when the function stands in the
#   script; wrapping the imported one in a lambda of the script does not help.
# Who meets it: whoever keeps prompts, crops or soft label rules in a helper
#   module, changes one (here the soft label from 0.7 to 0.9) and runs again.
set -euo pipefail
tmp="$(mktemp -d)"; trap 'rm -rf "$tmp"' EXIT; cd "$tmp"
export OMP_NUM_THREADS=1 HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
uv venv --quiet --no-python-downloads venv
VIRTUAL_ENV="$tmp/venv" uv pip install --quiet 'datasets==5.2.0' 'numpy==2.4.6'
write() {  # the same function in a module and in the script, with weight $1
  printf 'def soften(row):\n    return {"soft": row["label"] * %s}\n' "$1" > helper.py
  cat > main.py <<PY
import datasets, helper
datasets.disable_progress_bars()
def soften(row):
    return {"soft": row["label"] * $1}
ds = datasets.load_from_disk("birds")
print("weight $1: in the script", ds.map(soften)["soft"][:],
      "| imported", ds.map(helper.soften)["soft"][:],
      "| imported, in a lambda", ds.map(lambda r: helper.soften(r))["soft"][:],
      "| called directly", helper.soften({"label": 1})["soft"])
PY
}
venv/bin/python -W ignore - <<'PY'
import datasets
datasets.disable_progress_bars()
datasets.Dataset.from_dict({"label": [1, 0, 1]}).save_to_disk("birds")
PY
write 0.7; venv/bin/python -W ignore main.py | tee first
write 0.9; venv/bin/python -W ignore main.py | tee second
grep -qF 'in the script [0.7, 0.0, 0.7] | imported [0.7, 0.0, 0.7]' first
[ "$(grep -c 'imported \[0.7' second)" = 1 ] || { echo "the edit of the module is noticed now"; exit 1; }
grep -qF 'in the script [0.9, 0.0, 0.9] | imported [0.7, 0.0, 0.7] | imported, in a lambda [0.7, 0.0, 0.7] | called directly 0.9' second
# Output seen on 2026-11-29:
# weight 0.7: in the script [0.7, 0.0, 0.7] | imported [0.7, 0.0, 0.7] | imported, in a lambda [0.7, 0.0, 0.7] | called directly 0.7
# weight 0.9: in the script [0.9, 0.0, 0.9] | imported [0.7, 0.0, 0.7] | imported, in a lambda [0.7, 0.0, 0.7] | called directly 0.9
