"""Runs augmentation.py with a generator that takes a given time for each block and needs no model.

SECONDS_PER_BLOCK=0.1 python tests/simulated.py --data_name=digits --num_aug=100 --device=cpu

The last line on standard error says how many blocks this process has drawn, and from when to when (Unix time).
"""

import importlib.util
import os
import sys
import time
import types
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


class SimulatedGenerator:
    """Draws pictures that depend on the item, the alpha of the run, and nothing else."""

    def __init__(self, device, classes, plan, **arguments):
        self.seconds, self.alpha = float(os.environ.get("SECONDS_PER_BLOCK", "0")), plan.alpha
        self.num_blocks, self.start = 0, time.time()
        generators.append(self)

    def draw(self, items):
        time.sleep(self.seconds)
        self.num_blocks += 1
        return [self._draw_one(item) for item in items]

    def _draw_one(self, item):
        rng = np.random.default_rng([item.noise_seed, int(self.alpha * 1e6)])
        return Image.fromarray(rng.integers(0, 256, (item.resolution, item.resolution, 3), dtype=np.uint8))


generators = []


def main():
    simulated = types.ModuleType("noisecutmix.generator")
    simulated.NoiseCutMixGenerator = SimulatedGenerator
    sys.modules["noisecutmix.generator"] = simulated
    spec = importlib.util.spec_from_file_location("augmentation", ROOT / "augmentation.py")
    augmentation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(augmentation)
    augmentation.main()
    for generator in generators:
        print(f"drew {generator.num_blocks} blocks from {generator.start} to {time.time()}", file=sys.stderr)


if __name__ == "__main__":
    from noisecutmix import script

    script.run(main)
