#!/usr/bin/env bash
# diffusers 0.42.1. timestep_spacing ("leading", "linspace" or "trailing") and use_karras_sigmas=True
# are settings of most samplers, and the same two values should give the same list of noise levels in
# each. They do not: Euler, Heun and LMS build the Karras list between the ends of the spaced
# timesteps, so with "leading" 5 steps start at sigma 5.1 instead of 14.6 on latents that hold much
# less noise than the model was trained to start from, and with "trailing" they end at sigma 0.57.
# DPM++, UniPC and DEIS ignore timestep_spacing altogether as soon as Karras sigmas are on. No message
# is given. Whoever swaps DPM++ Karras for Euler Karras with from_config on a Stable Diffusion
# checkpoint (its saved spacing is usually "leading") changes the whole range of noise levels; a
# comparison of samplers at few steps is then one of ranges.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
uv venv --quiet --no-python-downloads env
VIRTUAL_ENV="$work/env" uv pip install --quiet 'torch==2.15.0' 'scipy' 'diffusers==0.42.1' 'transformers==5.23.0'
env/bin/python - <<'PY'
import diffusers

seen = {}
for kind in ("EulerDiscrete", "HeunDiscrete", "LMSDiscrete", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"):
    for spacing in ("leading", "linspace", "trailing"):
        scheduler = getattr(diffusers, kind + "Scheduler")(beta_start=0.00085, beta_end=0.012,
            beta_schedule="scaled_linear", use_karras_sigmas=True, timestep_spacing=spacing)
        scheduler.set_timesteps(5)
        levels = list(dict.fromkeys(round(s, 2) for s in scheduler.sigmas.tolist() if s > 0))
        seen[kind, spacing] = levels
        print(f"{kind:20s} {spacing:9s} {levels}")
for kind in ("EulerDiscrete", "HeunDiscrete", "LMSDiscrete"):
    assert [seen[kind, s][0] for s in ("leading", "linspace", "trailing")] == [5.11, 14.61, 14.61]
    assert [seen[kind, s][-1] for s in ("leading", "linspace", "trailing")] == [0.03, 0.03, 0.57]
for kind in ("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"):
    assert seen[kind, "leading"] == seen[kind, "linspace"] == seen[kind, "trailing"]
    assert (seen[kind, "leading"][0], seen[kind, "leading"][-1]) == (14.61, 0.03)
PY
# Output seen on 2026-11-29:
# EulerDiscrete        leading   [5.11, 1.92, 0.62, 0.16, 0.03]
# EulerDiscrete        linspace  [14.61, 4.8, 1.27, 0.25, 0.03]
# EulerDiscrete        trailing  [14.61, 7.39, 3.48, 1.49, 0.57]
# HeunDiscrete         leading   [5.11, 1.92, 0.62, 0.16, 0.03]
# HeunDiscrete         linspace  [14.61, 4.8, 1.27, 0.25, 0.03]
# HeunDiscrete         trailing  [14.61, 7.39, 3.48, 1.49, 0.57]
# LMSDiscrete          leading   [5.11, 1.92, 0.62, 0.16, 0.03]
# LMSDiscrete          linspace  [14.61, 4.8, 1.27, 0.25, 0.03]
# LMSDiscrete          trailing  [14.61, 7.39, 3.48, 1.49, 0.57]
# DPMSolverMultistep   leading   [14.61, 4.8, 1.27, 0.25, 0.03]
# DPMSolverMultistep   linspace  [14.61, 4.8, 1.27, 0.25, 0.03]
# DPMSolverMultistep   trailing  [14.61, 4.8, 1.27, 0.25, 0.03]
# UniPCMultistep       leading   [14.61, 4.8, 1.27, 0.25, 0.03]
# UniPCMultistep       linspace  [14.61, 4.8, 1.27, 0.25, 0.03]
# UniPCMultistep       trailing  [14.61, 4.8, 1.27, 0.25, 0.03]
# DEISMultistep        leading   [14.61, 4.8, 1.27, 0.25, 0.03]
# DEISMultistep        linspace  [14.61, 4.8, 1.27, 0.25, 0.03]
# DEISMultistep        trailing  [14.61, 4.8, 1.27, 0.25, 0.03]
