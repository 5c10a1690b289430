#!/usr/bin/env bash
# diffusers 0.42.1. The usual line to change the sampler is
# EulerDiscreteScheduler.from_config(pipe.scheduler.config). One would expect the same new scheduler
# whether the old one was just built in Python or was saved with save_pretrained and read back, since
# both show identical settings. Instead settings that were left at their defaults are handed on only
# after a save and reload: a DDIM scheduler built with default spacing ("leading") turns into an Euler
# scheduler with Euler's own default ("linspace"), starting at timestep 999 with sigma 36.9, while its
# saved and reloaded twin turns into one with "leading", starting at 800 with sigma 6.9. No message is
# given. Whoever trains a pipeline in one process, samples from it there, and later samples from the
# saved folder with the same line and the same seed gets different images.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
uv venv --quiet --no-python-downloads env
VIRTUAL_ENV="$work/env" uv pip install --quiet 'torch==2.15.0' 'diffusers==0.42.1' 'transformers==5.23.0'
env/bin/python - <<'PY'
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

built = DDIMScheduler(beta_schedule="scaled_linear")
built.save_pretrained("saved")
reloaded = DDIMScheduler.from_pretrained("saved")
public = lambda s: {k: v for k, v in s.config.items() if not k.startswith("_")}
print("visible settings equal:", public(built) == public(reloaded))
assert public(built) == public(reloaded)
seen = {}
for target in (EulerDiscreteScheduler, DPMSolverMultistepScheduler):
    for origin, source in (("built", built), ("reloaded", reloaded)):
        new = target.from_config(source.config)
        new.set_timesteps(5)
        seen[target, origin] = (new.config.timestep_spacing, [float(t) for t in new.timesteps])
        print(f"{target.__name__} from the {origin} one:", *seen[target, origin], f"first sigma {float(new.sigmas[0]):.2f}")
    assert seen[target, "built"][0] == "linspace" and seen[target, "reloaded"][0] == "leading"
assert seen[EulerDiscreteScheduler, "built"][1][0] == 999 and seen[EulerDiscreteScheduler, "reloaded"][1][0] == 800
PY
# Output seen on 2026-11-29:
# visible settings equal: True
# EulerDiscreteScheduler from the built one: linspace [999.0, 749.25, 499.5, 249.75, 0.0] first sigma 36.91
# EulerDiscreteScheduler from the reloaded one: leading [800.0, 600.0, 400.0, 200.0, 0.0] first sigma 6.95
# DPMSolverMultistepScheduler from the built one: linspace [999.0, 799.0, 599.0, 400.0, 200.0] first sigma 36.91
# DPMSolverMultistepScheduler from the reloaded one: leading [830.0, 664.0, 498.0, 332.0, 166.0] first sigma 8.58
