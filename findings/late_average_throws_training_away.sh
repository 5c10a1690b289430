#!/usr/bin/env bash
# Library: lightning 2.6.6 with torch 2.15.0, the callback EMAWeightAveraging.
# One would expect: with update_starting_at_step=1000 no averaging goes on before
#   step 1000, so validation until then uses the weights being trained, and a
#   run that ends sooner (short set, early stopping) ends with those weights.
# What happens: the "average" until then is the copy of the model made at the
#   start. Every validation before that step measures the UNTRAINED model, and
#   when fit ends before it, the untrained copy is written over the
#   trained weights: the whole training is thrown away without a word. The
#   state_dict of a saved checkpoint is the untrained model as well.
# Who meets it: whoever delays the moving average by a fixed number of steps
#   and then trains on a small set, or fewer epochs, or stops early.
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
    """one weight, from 0 towards 1"""
    def __init__(self):
        super().__init__()
        self.w, self.seen = torch.nn.Parameter(torch.zeros(1)), []
    def training_step(self, batch, i): return (self.w - 1).pow(2).sum()
    def validation_step(self, batch, i): self.seen.append(round(self.w.item(), 3))
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.1)

def fit(callbacks):
    model = Tiny()
    trainer = L.Trainer(max_epochs=5, accelerator="cpu", callbacks=callbacks, logger=False,
                        num_sanity_val_steps=0, enable_progress_bar=False,
                        enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(model, torch.utils.data.DataLoader(range(4)), torch.utils.data.DataLoader(range(1)))
    trainer.save_checkpoint("after.ckpt")
    saved = torch.load("after.ckpt", weights_only=False)["state_dict"]["w"].item()
    print("validated with", model.seen, "final", round(model.w.item(), 3), "saved", round(saved, 3))
    return model.seen, model.w.item(), saved

plain = fit([])
late = fit([EMAWeightAveraging(decay=0.9, update_starting_at_step=1000)])
mid = fit([EMAWeightAveraging(decay=0.9, update_starting_at_step=12)])
assert plain[1] > 0.98
assert late[0] == [0.0] * 5 and late[1] == late[2] == 0.0
assert mid[0][:3] == [0.0] * 3 and mid[0][3] > 0.9
PY
venv/bin/python -W ignore run.py 2>err || { cat err; exit 1; }
# Output seen on 2026-11-29:
# validated with [0.59, 0.832, 0.931, 0.972, 0.988] final 0.988 saved 0.988
# validated with [0.0, 0.0, 0.0, 0.0, 0.0] final 0.0 saved 0.0
# validated with [0.0, 0.0, 0.0, 0.95, 0.962] final 0.962 saved 0.962
