#!/usr/bin/env bash
# Library: lightning 2.6.6 with torch 2.15.0, the callback EMAWeightAveraging.
# One would expect: update_starting_at_epoch=3 begins the moving average at
#   epoch 3; with update_starting_at_epoch=100 a run of 5 epochs has none.
# What happens: averaging starts at the very first step all the same, exactly
#   as without the argument. The argument only adds one update more at
#   the end of each epoch from that one on, with the same weights again, so the
#   average moves differently. To delay it, update_starting_at_step is needed.
# Who meets it: whoever wants to leave the first wild epochs of a fine-tuning
#   out of the average and counts in epochs.
set -euo pipefail
tmp="$(mktemp -d)"; trap 'rm -rf "$tmp"' EXIT; cd "$tmp"
export OMP_NUM_THREADS=1
uv venv --quiet --no-python-downloads venv
VIRTUAL_ENV="$tmp/venv" uv pip install --quiet 'lightning==2.6.6' 'torch==2.15.0' 'numpy==2.4.6'
cat > run.py <<'PY'
import logging, torch, lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

class Tiny(L.LightningModule):
    """one weight, from 0 towards 1, four steps an epoch"""
    def __init__(self):
        super().__init__()
        self.w, self.seen = torch.nn.Parameter(torch.zeros(1)), []
    def training_step(self, batch, i): return (self.w - 1).pow(2).sum()
    def validation_step(self, batch, i): self.seen.append(round(self.w.item(), 4))
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.1)

def fit(**kw):
    model, counted = Tiny(), EMAWeightAveraging(decay=0.9, **kw)
    L.Trainer(max_epochs=5, accelerator="cpu", callbacks=[counted], logger=False,
              num_sanity_val_steps=0, enable_progress_bar=False, enable_checkpointing=False,
              enable_model_summary=False).fit(
        model, torch.utils.data.DataLoader(range(4)), torch.utils.data.DataLoader(range(1)))
    updates = int(counted._average_model.n_averaged)
    print(kw or "no start given", "| validated with", model.seen, "| final",
          round(model.w.item(), 4), "|", updates, "updates")
    return model.seen, round(model.w.item(), 4), updates

always = fit()
never = fit(update_starting_at_epoch=100)
late = fit(update_starting_at_epoch=3)
steps = fit(update_starting_at_step=12)
assert never == always and always[2] == 20
assert late[0][:4] == always[0][:4] and late[1] != always[1] and late[2] == 22
assert steps[2] == 8
PY
venv/bin/python -W ignore run.py 2>err || { cat err; exit 1; }
# Output seen on 2026-11-29:
# no start given | validated with [0.2779, 0.4455, 0.6031, 0.726, 0.8147] | final 0.8147 | 20 updates
# {'update_starting_at_epoch': 100} | validated with [0.2779, 0.4455, 0.6031, 0.726, 0.8147] | final 0.8147 | 20 updates
# {'update_starting_at_epoch': 3} | validated with [0.2779, 0.4455, 0.6031, 0.726, 0.8308] | final 0.8466 | 22 updates
# {'update_starting_at_step': 12} | validated with [0.0, 0.0, 0.0, 0.9504, 0.9619] | final 0.9619 | 8 updates
