#!/usr/bin/env bash
# diffusers 0.42.1 with transformers 5.23.0. Embeddings for several learned tokens are loaded with
# load_textual_inversion() under plain names, one vector each: "rust" for a kind of damage and
# "rust_1", "rust_2" for two more. One would expect the prompt "rust" to use the one vector of that
# token. Instead NAME_1, NAME_2 and so on are read as the further vectors of NAME, so the prompt
# becomes "rust rust_1 rust_2" and mixes three separately learned concepts. A second case: with two
# vectors each for "class-1" and "class-10", the prompt "class-1 and class-10" loses class-10
# altogether, because the text class-1 is replaced inside the name class-10. Each prompt alone is
# right, and no message is given. Whoever numbers learned tokens, or puts two of them into one prompt
# to mix classes, meets it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
uv venv --quiet --no-python-downloads env
VIRTUAL_ENV="$work/env" uv pip install --quiet 'torch==2.15.0' 'diffusers==0.42.1' 'transformers==5.23.0' 'accelerate==1.15.0'
env/bin/python - <<'PY'
import json
import string
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

letters = string.ascii_lowercase + string.digits + "-_"
vocab = {t: i for i, t in enumerate([c + end for c in letters for end in ("", "</w>")] + ["<|startoftext|>", "<|endoftext|>"])}
json.dump(vocab, open("vocab.json", "w"))
open("merges.txt", "w").write("#version: 0.2\\n")

def pipeline(learned):
    last = len(vocab) - 1
    config = CLIPTextConfig(vocab_size=len(vocab), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=last - 1, eos_token_id=last, pad_token_id=last)
    pipe = StableDiffusionPipeline(vae=None, unet=None, scheduler=None, safety_checker=None, feature_extractor=None,
        tokenizer=CLIPTokenizer("vocab.json", "merges.txt", model_max_length=77),
        text_encoder=CLIPTextModel(config), requires_safety_checker=False)
    for name, vectors in learned.items():
        pipe.load_textual_inversion({name: torch.randn(vectors, 16)}, token=name)
    # the tokens that reach the text encoder when the pipeline encodes this prompt
    return lambda text: [t for t in pipe.tokenizer.tokenize(pipe.maybe_convert_prompt(text, pipe.tokenizer)) if len(t.removesuffix("</w>")) > 1]

tokens = pipeline({"rust": 1, "rust_1": 1, "rust_2": 1})
for text in ("rust", "rust_1"):
    print(f"{text!r} -> {tokens(text)}")
assert tokens("rust") == ["rust", "rust_1", "rust_2"] and tokens("rust_1") == ["rust_1"]
tokens = pipeline({"class-1": 2, "class-10": 2})
for text in ("class-1", "class-10", "class-1 and class-10"):
    print(f"{text!r} -> {tokens(text)}")
assert tokens("class-1") == ["class-1", "class-1_1"] and tokens("class-10") == ["class-10", "class-10_1"]
assert "class-10" not in tokens("class-1 and class-10")
PY
# Output seen on 2026-11-29:
# 'rust' -> ['rust', 'rust_1', 'rust_2']
# 'rust_1' -> ['rust_1']
# 'class-1' -> ['class-1', 'class-1_1']
# 'class-10' -> ['class-10', 'class-10_1']
# 'class-1 and class-10' -> ['class-1', 'class-1_1', 'class-1', 'class-1_1']
