"""What fewer denoising steps cost: distance to the converged picture, a judge's recognition, and the classifiers.

uv run --all-extras --group dev tests/measure/steps.py --seeds=10

The demo draws the same items, with the same noise and boxes, in 10, 15, 25 and 100 steps, with the scheduler of the
method and with Karras' noise levels. The judge is a support-vector classifier of real digits. The classifiers are
trained on 10 real digits a class, alone and with 300 pictures of each number of steps.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from sklearn.svm import SVC

from noisecutmix import NoiseCutMixGenerator
from noisecutmix.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ckpts" / "digits"))
import train as digits  # noqa: E402 (the script of the demo lies in no package)

STEPS, CONVERGED, COUNT, NUM_AUG = (25, 15, 10), 100, 100, 300
REAL_A_CLASS = 10


def draw(steps: int, karras: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the pictures (COUNT, 32, 32) of the first items, of the target class alone, and their classes."""
    plan = Plan(0, 10, 1.0, 32, single_class=True)
    generator = NoiseCutMixGenerator("cpu", "digits", num_inference_steps=steps, plan=plan, batch_size=20)
    if karras:
        pipe = generator.pipe
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, use_karras_sigmas=True)
    items = list(plan.items(COUNT))
    images = [image for start in range(0, COUNT, 20) for image in generator.draw(items[start : start + 20])]
    return np.stack([np.asarray(image.convert("L")) for image in images]), np.array([item.target for item in items])


def compare(folder: Path, seeds: int) -> dict:
    """Return the rows of results.json."""
    images, labels, test_images, test_labels = digits.load_split()
    few = np.concatenate([np.flatnonzero(labels == label)[:REAL_A_CLASS] for label in range(10)])
    for part, pictures, classes in (("train", images[few], labels[few]), ("test", test_images, test_labels)):
        digits.write_pictures(folder / part, digits.enlarge(pictures).astype(np.uint8), classes)
    flags = []
    for steps in STEPS:
        out = folder / f"steps{steps}"
        run("augmentation.py", "--data_name=digits", f"--num_aug={NUM_AUG}", f"--num_inference_steps={steps}", out=out)
        flags += ["--augmented", f"steps{steps}={out}"]
    flags += [
        "--rows",
        "none",
        *(f"steps{steps}" for steps in STEPS),
        f"--baseline=steps{STEPS[0]}",
        f"--seeds={seeds}",
    ]
    flags += [f"--train_dir={folder / 'train'}", f"--test_dir={folder / 'test'}", "--probability=0.5", "--epochs=60"]
    flags += ["--model=test_resnet", "--no_pretrained", "--image_size=32", "--crop_scale=0.6", "--no_random_flip"]
    run("-m", "noisecutmix.compare", *flags, "--num_workers=0", out=folder / "answer")
    return json.loads((folder / "answer" / "results.json").read_text())["rows"]


def run(*arguments: str, out: Path) -> None:
    subprocess.run([sys.executable, *arguments, f"--output_dir={out}", "--device=cpu"], cwd=ROOT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    images, labels, _, _ = digits.load_split()
    judge = SVC(gamma="scale").fit(digits.enlarge(images).reshape(len(images), -1) / 255, labels)
    converged, _ = draw(CONVERGED, karras=False)
    lines = []
    for steps in STEPS:
        cells = []
        for karras in (False, True):
            pictures, classes = draw(steps, karras)
            distance = np.abs(pictures.astype(float) - converged).mean()
            recognised = 100 * (judge.predict(pictures.reshape(COUNT, -1) / 255) == classes).mean()
            cells += [f"{distance:.1f}", f"{recognised:.0f} %"]
        lines.append([steps, *cells])
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(Path(folder), options.seeds)
    print("| steps | distance | recognised | with Karras: distance | recognised | accuracy | difference to 25 |")
    print("|---|---|---|---|---|---|---|")
    for steps, *cells in lines:
        row = rows[f"steps{steps}"]
        error = row["standard_error"] or 0
        cells += [f"{row['top1_mean']:.1f}", f"{row['difference']:+.2f} ± {error:.2f}"]
        print("|", " | ".join([str(steps), *cells]), "|")
    print(f"without augmented pictures: {rows['none']['top1_mean']:.1f}")


if __name__ == "__main__":
    main()
