"""What the tests of the comparison share: coloured noise as photos and augmented sets, and quick options."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from drawing import as_command_line, wait_until
from PIL import Image

from noisecutmix.folder import OutputFolder
from noisecutmix.plan import Plan

COLOURS = {"red kite": (160, 90, 90), "blue jay": (90, 90, 160), "grey heron": (125, 125, 125), "wren": (120, 80, 40)}
NAMES = list(COLOURS)[:3]
SIDE = 32
QUICK = [
    *("--model=test_byobnet", "--no_pretrained", "--image_size=32", "--epochs=8", "--batch_size=8", "--num_workers=0"),
    *("--learning_rate=0.05", "--device=cpu", "--train_dir=train", "--test_dir=test", "--output_dir=out"),
]
ONE_SEED = ["--rows", "none", "cutmix", "--seeds=1", "--epochs=1"]


def draw_colour(name, rng):
    noise = rng.normal(0, 40, (SIDE, SIDE, 3))
    return np.uint8(np.clip(noise + COLOURS[name], 0, 255))


def write_colours(folder, count, seed):
    rng = np.random.default_rng(seed)
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(draw_colour(name, rng)).save(folder / name / f"{number}.png")


def write_augmented(root, count=20, names=NAMES, wrong=(), complete=True):
    """Write a data set as augmentation.py does: two classes' colours under a mask; items in `wrong` have other ones."""
    plan, rng = Plan(0, len(names), 1.0, SIDE), np.random.default_rng(5)
    folder = OutputFolder(root, plan, count, names, {"class_names": names})
    folder.begin({"command": ["python", "augmentation.py"], "ckpt_path": "nowhere"})
    for item in plan.items(count):
        target, aug = names[item.target], names[item.aug]
        if item.index in wrong:
            target = aug = next(name for name in names if name not in (target, aug))
        mask = np.array(item.mask())[:, :, None] > 0
        folder.write(item, Image.fromarray(np.where(mask, draw_colour(target, rng), draw_colour(aug, rng))))
    if complete:
        folder.finish()
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_colours(folder / "train", 8, seed=1)
    write_colours(folder / "test", 10, seed=2)
    write_augmented(folder / "aug")
    return folder


@pytest.fixture
def folder(pictures, tmp_path):
    """A working directory with train, test and aug."""
    shutil.copytree(pictures, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def first_answer(pictures, tmp_path_factory):
    folder = shutil.copytree(pictures, tmp_path_factory.mktemp("answer"), dirs_exist_ok=True)
    classify(folder, *ONE_SEED)
    return folder


@pytest.fixture
def answered(first_answer, tmp_path):
    """A working directory as `folder`, with the comparison of ONE_SEED."""
    return shutil.copytree(first_answer, tmp_path, dirs_exist_ok=True)


def classify(folder, *arguments):
    """Run the script in this process, and return its results; global random states are left alone."""
    before = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()
    with as_command_line("noisecutmix.compare", *QUICK, *arguments, folder=folder) as main:
        main()
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[2]
    assert torch.equal(torch.get_rng_state(), before[1])
    output_dir = next(flag for flag in reversed((*QUICK, *arguments)) if flag.startswith("--output_dir"))
    return json.loads((folder / output_dir.partition("=")[2] / "results.json").read_text())


def results_of(folder):
    return {name: (folder / "out" / name).read_bytes() for name in ("results.json", "results.md", "accuracy.png")}


def wait_for_results(folder, number, process):
    wait_until(lambda: len(list((folder / "out").glob("results/[!.]*"))) >= number, process)
