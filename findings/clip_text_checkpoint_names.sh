#!/usr/bin/env bash
# transformers 4.51.3 and 5.23.0. The weights of a CLIP text encoder are found in the wild under three
# spellings: with the prefix "text_model." (the classic one), without prefix (as version 5 writes its
# state dict), and with "clip.text_model." (taken out of a larger model). One would expect both
# versions to read, or both to refuse, the same files. Instead 4.51.3 makes up random weights for the
# names without prefix and reads the other two; 5.23.0 makes up random weights for "clip.text_model."
# and reads the other two. from_pretrained returns in every case, with only a logged report. Whoever
# moves checkpoints between a training machine and a sampling machine with different versions meets
# it; a text encoder of random weights still gives well-formed images.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
for version in 4.51.3 5.23.0; do
  uv venv --quiet --no-python-downloads "env-$version"
  VIRTUAL_ENV="$work/env-$version" uv pip install --quiet 'torch==2.15.0' 'numpy<2.4' "transformers==$version"
done
cat > write.py <<'PY'
import sys
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel
config = CLIPTextConfig(vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
    bos_token_id=98, eos_token_id=99, pad_token_id=99)
torch.manual_seed(0)
weights = {k.removeprefix("text_model."): torch.randn_like(v) for k, v in CLIPTextModel(config).state_dict().items()}
torch.save(weights, "weights.pt")
for folder, prefix in (("without", ""), ("text_model", "text_model."), ("clip", "clip.text_model.")):
    config.save_pretrained(folder)
    save_file({prefix + k: v for k, v in weights.items()}, folder + "/model.safetensors", metadata={"format": "pt"})
PY
cat > read.py <<'PY'
import torch
import transformers
from transformers import CLIPTextModel
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
weights, seen = torch.load("weights.pt"), {}
for folder in ("without", "text_model", "clip"):
    got = {k.removeprefix("text_model."): v for k, v in CLIPTextModel.from_pretrained(folder).state_dict().items()}
    seen[folder] = sum(torch.equal(got[k], v) for k, v in weights.items())
print(f"transformers {transformers.__version__}: tensors read, of {len(weights)}:", seen)
new = transformers.__version__.startswith("5.")
assert seen == {"without": 36 if new else 0, "text_model": 36, "clip": 0 if new else 36}
PY
env-5.23.0/bin/python write.py
for version in 4.51.3 5.23.0; do "env-$version/bin/python" read.py; done
# Output seen on 2026-11-29:
# transformers 4.51.3: tensors read, of 36: {'without': 0, 'text_model': 36, 'clip': 36}
# transformers 5.23.0: tensors read, of 36: {'without': 36, 'text_model': 36, 'clip': 0}
