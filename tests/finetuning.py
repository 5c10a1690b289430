"""What the tests of fine-tuning share: a recipe, a folder of photos, a trained checkpoint."""

import dataclasses
import json
import shutil
from functools import partial
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from drawing import CLASS_NAMES, as_command_line, write_photos
from random_models import RECIPE
from safetensors.torch import load_file

from noisecutmix import NoiseCutMixGenerator
from noisecutmix.finetune import preview
from noisecutmix.finetune.trainer import Trainer, create_accelerator
from noisecutmix.photos import find_photos

SCRIPT = "noisecutmix.finetune"
LORA, EMBEDDINGS = "pytorch_lora_weights.safetensors", "learned_embeds-steps-last.bin"
SORTED_NAMES = sorted(CLASS_NAMES)
STEPS = 12
ROUNDING_UNDER_ADAM = 5e-4  # Adam divides by the gradient's size, so rounding of a gradient near zero changes a weight
OWN_RECIPE = dataclasses.replace(
    RECIPE,
    meta_class="bird",
    resolution=16,
    learning_rate=1e-3,
    token_learning_rate=1e-3,
    class_names=SORTED_NAMES,
    num_pictures=9,
    max_train_steps=STEPS,
)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Nine pictures of three classes."""
    return write_photos(tmp_path_factory.mktemp("photos") / "birds")


@pytest.fixture(scope="session")
def flags(photos, tiny_model):
    """The flags with which the script quickly fine-tunes the tiny model."""
    return [
        f"--data_dir={photos}",
        f"--model={tiny_model}",
        "--meta_class=bird",
        "--resolution=16",
        f"--max_train_steps={STEPS}",
        "--train_batch_size=4",
        "--checkpointing_steps=4",
        "--learning_rate=1e-3",
        "--token_learning_rate=1e-3",
        "--device=cpu",
    ]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Reset accelerate's state, of which a process has only one; outside the tests a script has its own process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def finetune(folder, *arguments):
    """Run the script in this process, with previews of two denoising steps."""
    with (
        as_command_line(SCRIPT, "--output_dir=out", *arguments, folder=folder) as main,
        mock.patch.object(preview, "NoiseCutMixGenerator", partial(NoiseCutMixGenerator, num_inference_steps=2)),
    ):
        try:
            main()
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def weights_of(folder):
    """Return {name: tensor} of a checkpoint, LoRA and embeddings."""
    embeddings = torch.load(folder / EMBEDDINGS, weights_only=True)["learned_embeds_dict"]
    return {**load_file(folder / LORA), **embeddings}


def difference(folder, other):
    ours, theirs = weights_of(folder), weights_of(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, flags):
    """A checkpoint of twelve steps, trained without an interruption."""
    folder = tmp_path_factory.mktemp("trained")
    finetune(folder, *flags)
    return folder / "out"


def copy_of(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "out")


def contents_of(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def create_trainer(
    tiny_model, photos, accelerator=None, batch_size=4, accumulated=1, checkpoints_gradients=False, **changes
):
    recipe = dataclasses.replace(OWN_RECIPE, **changes)
    machine = {"batch_size": batch_size, "accumulated": accumulated, "checkpoints_gradients": checkpoints_gradients}
    accelerator = accelerator or create_accelerator("cpu", recipe.dtype)
    return Trainer(recipe, find_photos(photos), accelerator, model=str(tiny_model), **machine)


def stop_at(monkeypatch, *stops, error=KeyboardInterrupt):
    """Make the trainer raise an error before each of these steps, once."""
    step, left = Trainer.step, list(stops)

    def stopping_step(self, number, *more):
        if left and number == left[0]:
            del left[0]
            raise error
        return step(self, number, *more)

    monkeypatch.setattr(Trainer, "step", stopping_step)


def assert_same_training(folder, other, previews=True):
    """Assert that two finished folders hold the same bytes, but for the command and the files' times."""
    names = {file.name for file in other.iterdir()} - {"finetune.json"}
    assert {file.name for file in folder.iterdir()} - {"finetune.json"} == names
    for name in names - (set() if previews else {"preview.png"}) - {f"state_{step:08d}.pt" for step in range(STEPS)}:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    ours, theirs = (json.loads((place / "finetune.json").read_text()) for place in (folder, other))
    for name in ("model", "options", "steps", "losses"):
        assert ours[name] == theirs[name]


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def rename(folder, name, new_name):
    (folder / name).rename(folder / new_name)
