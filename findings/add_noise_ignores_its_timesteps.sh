#!/usr/bin/env bash
# diffusers 0.42.1. A sampling loop keeps the unmasked part of an image by noising the original to the
# level of the current step with scheduler.add_noise(original, noise, t). One would expect the given
# timesteps to decide how much noise is added, sample by sample, at any time. That holds for DDIM. For
# Euler, DPM++ multistep and UniPC it holds only until set_begin_index() is called, as the image-to-
# image pipelines do on every run: from then on add_noise reads the scheduler's own position and
# ignores the timesteps argument, so that every sample of the batch gets the same level and even a
# request for the last timestep is answered with nearly pure noise. No message is given. Whoever swaps
# DDIM for one of these in an inpainting or mask-merging loop, or reuses the sampling scheduler to
# noise training images, meets it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
uv venv --quiet --no-python-downloads env
VIRTUAL_ENV="$work/env" uv pip install --quiet 'torch==2.15.0' 'diffusers==0.42.1' 'transformers==5.23.0'
env/bin/python - <<'PY'
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler

image, noise = torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8)   # the result is then the noise level itself
level = lambda s, t: [round(v, 4) for v in s.add_noise(image, noise, t)[:, 0, 0, 0].tolist()]
for kind in (DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler):
    fresh, used = kind(), kind()
    fresh.set_timesteps(10)
    used.set_timesteps(10)
    t = fresh.timesteps[[2, 9]]
    rows = {"new scheduler": level(fresh, t)}
    if kind is not DDIMScheduler:
        used.set_begin_index(0)
        rows["after set_begin_index(0)"] = level(used, t)
    sample = torch.randn(2, 4, 8, 8)
    for step in used.timesteps[:2]:
        sample = used.step(noise, step, used.scale_model_input(sample, step)).prev_sample
    rows["after two steps"] = level(used, t)
    for when, got in rows.items():
        print(f"{kind.__name__:28s} timesteps {[int(v) for v in t]} {when}: {got}")
    assert rows["new scheduler"][0] != rows["new scheduler"][1]
    if kind is DDIMScheduler:
        assert rows["after two steps"] == rows["new scheduler"]
    else:
        assert rows["after set_begin_index(0)"][0] == rows["after set_begin_index(0)"][1]
        assert rows["after two steps"][0] == rows["after two steps"][1] == rows["new scheduler"][0]
PY
# Output seen on 2026-11-29:
# DDIMScheduler                timesteps [700, 0] new scheduler: [0.9966, 0.01]
# DDIMScheduler                timesteps [700, 0] after two steps: [0.9966, 0.01]
# EulerDiscreteScheduler       timesteps [777, 0] new scheduler: [21.4175, 0.01]
# EulerDiscreteScheduler       timesteps [777, 0] after set_begin_index(0): [157.4073, 157.4073]
# EulerDiscreteScheduler       timesteps [777, 0] after two steps: [21.4175, 21.4175]
# DPMSolverMultistepScheduler  timesteps [799, 100] new scheduler: [0.9992, 0.3238]
# DPMSolverMultistepScheduler  timesteps [799, 100] after set_begin_index(0): [1.0, 1.0]
# DPMSolverMultistepScheduler  timesteps [799, 100] after two steps: [0.9992, 0.9992]
# UniPCMultistepScheduler      timesteps [799, 100] new scheduler: [0.9992, 0.3238]
# UniPCMultistepScheduler      timesteps [799, 100] after set_begin_index(0): [1.0, 1.0]
# UniPCMultistepScheduler      timesteps [799, 100] after two steps: [0.9992, 0.9992]
