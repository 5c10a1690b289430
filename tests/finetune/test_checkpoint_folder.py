"""The folder of a checkpoint: what it holds, while the training lasts and after it."""

import json
import re
import shlex
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from drawing import as_command_line
from finetuning import (
    EMBEDDINGS,
    LORA,
    SORTED_NAMES,
    STEPS,
    assert_same_training,
    difference,
    finetune,
    stop_at,
    weights_of,
)
from PIL import Image
from safetensors.torch import load_file

from noisecutmix import NoiseCutMixGenerator
from noisecutmix.checkpoint import load_pipeline
from noisecutmix.finetune.folder import TrainingFolder
from noisecutmix.finetune.trainer import Trainer
from noisecutmix.photos import find_photos
from noisecutmix.photos.opening import crop_square, open_photo


def read_plainly(folder):
    """Return {layer: up @ down} of a LoRA with Diff-Mix's keys, as the method's first implementation reads it."""
    tensors = load_file(folder / LORA)
    layers = {}
    for key, down in tensors.items():
        match = re.fullmatch(r"(.*\.attn[12])\.processor\.(to_q|to_k|to_v|to_out)_lora\.down\.weight", key)
        if match:
            layer = "to_out.0" if match[2] == "to_out" else match[2]
            layers[f"{match[1]}.{layer}"] = tensors[key.replace(".down.", ".up.")] @ down
    assert 2 * len(layers) == len(tensors)
    return layers


def test_the_checkpoint_holds_the_trained_weights(trained, tiny_model, photos):
    """The weights are the same in the files, in the pipeline of load_pipeline and in the last state."""
    state = torch.load(trained / f"state_{STEPS:08d}.pt", weights_only=True)
    layers = read_plainly(trained)
    assert layers.keys() == state["lora"].keys()
    base = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipe = load_pipeline(str(tiny_model), trained, device="cpu")
    for name, weight in base.unet.state_dict().items():
        change = layers.get(name.removesuffix(".weight"))
        expected = weight if change is None else weight + change
        assert torch.allclose(pipe.unet.state_dict()[name], expected, atol=1e-6), name
    for name, change in layers.items():
        down, up = state["lora"][name]
        assert change.any() and torch.equal(change, up @ down)
    content = torch.load(trained / EMBEDDINGS, weights_only=True)
    tokens = [f"<class_{label}>" for label in range(3)]
    assert content["name2placeholder"] == dict(zip(SORTED_NAMES, tokens))
    assert content["placeholder2name"] == dict(zip(tokens, SORTED_NAMES))
    assert torch.equal(torch.stack([content["learned_embeds_dict"][token] for token in tokens]), state["rows"])
    assert (trained / EMBEDDINGS).stat().st_size < 20_000  # the file holds only the rows, not the whole table


def test_the_folder_records_the_training(trained, tiny_model):
    assert {file.name for file in trained.iterdir() if not file.name.startswith(".")} == {
        LORA,
        EMBEDDINGS,
        "classes.json",
        "finetune.json",
        "log.csv",
        "preview.png",
        "state_00000008.pt",
        "state_00000012.pt",
    }
    assert json.loads((trained / "classes.json").read_text()) == {"classes": SORTED_NAMES, "meta_class": "bird"}
    record = json.loads((trained / "finetune.json").read_text())
    assert (record["model"], record["resolution"], record["steps"]) == (str(tiny_model), 16, STEPS)
    assert len(record["losses"]) == STEPS and all(0 < loss < 10 for loss in record["losses"])
    assert {"torch", "diffusers", "peft"} <= record["versions"].keys()
    assert record["options"]["class_names"] == SORTED_NAMES
    log = np.loadtxt(trained / "log.csv", delimiter=",", skiprows=1)
    assert log[:, 0].tolist() == list(range(1, STEPS + 1)) and log[:, 1].tolist() == record["losses"]
    assert (log[:, 2:] == 1e-3).all() and (trained / "log.csv").read_text().startswith("step,loss,learning_rate,")


def test_a_working_directory_that_is_no_valid_text_is_recorded(tmp_path):
    record = {"options": {}, "listing": "", "command": [], "working_directory": "caf\udce9"}
    for _ in range(2):
        folder = TrainingFolder(tmp_path)
        folder.begin(record)
        assert folder.record["working_directory"] == "caf\udce9"


def test_the_preview_shows_each_class_three_times(trained, photos):
    preview = Image.open(trained / "preview.png").convert("RGB")
    found = find_photos(photos)
    assert preview.width > 3 * 256 and preview.height > 3 * 256
    for label in range(3):
        real = crop_square(open_photo(found.files[3 * label]), 16).resize((256, 256), Image.Resampling.BICUBIC)
        assert contains(preview, real)


def contains(picture, part):
    picture, part = np.asarray(picture), np.asarray(part)
    corners = np.argwhere((picture[: -part.shape[0], : -part.shape[1]] == part[0, 0]).all(-1))
    return any(np.array_equal(picture[y : y + len(part), x : x + part.shape[1]], part) for y, x in corners)


def test_augmentation_draws_with_the_checkpoint(trained, tmp_path):
    arguments = [f"--data_name={trained}", "--num_inference_steps=2", "--device=cpu", "--num_aug=2"]
    with as_command_line("augmentation.py", *arguments, folder=tmp_path) as main:
        main()
    assert len(list((tmp_path / "outputs").rglob("gen_*.png"))) == 2


def test_the_checkpoint_works_while_the_training_lasts(tmp_path, flags, monkeypatch):
    stop_at(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        finetune(tmp_path, *flags)
    arguments = ["--data_name=out", "--num_inference_steps=2", "--device=cpu", "--num_gen=1"]
    with as_command_line("generation.py", *arguments, folder=tmp_path) as main:
        main()
    state = torch.load(tmp_path / "out" / "state_00000004.pt", weights_only=True)
    assert torch.equal(torch.stack(list(weights_of(tmp_path / "out").values())[-3:]), state["rows"])


def test_a_stop_at_the_last_step_leaves_no_latents(tmp_path, flags, trained, monkeypatch):
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, number, _: (step(self, number)[0], number == STEPS - 1))
    with pytest.raises(KeyboardInterrupt):
        finetune(tmp_path, *flags)
    finetune(tmp_path, *flags)
    assert_same_training(tmp_path / "out", trained)
    assert not (tmp_path / "out" / "latents.bin").exists()


@pytest.mark.slow
def test_a_stop_before_the_preview_leaves_no_earlier_one(tmp_path, flags, trained, monkeypatch):
    """More steps continue the training."""
    finetune(tmp_path, *flags, "--max_train_steps=6")
    draw = NoiseCutMixGenerator.draw
    monkeypatch.setattr(NoiseCutMixGenerator, "draw", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(tmp_path, *flags)
    monkeypatch.setattr(NoiseCutMixGenerator, "draw", draw)
    finetune(tmp_path, *flags)
    assert (tmp_path / "out" / "preview.png").read_bytes() == (trained / "preview.png").read_bytes()
    assert difference(tmp_path / "out", trained) < 1e-6
    assert json.loads((tmp_path / "out" / "finetune.json").read_text())["steps"] == STEPS


def stop(*_):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_previews_show_how_it_learns(tmp_path, flags, trained, monkeypatch):
    """They are the same after an interruption, also one between a checkpoint and its preview."""
    finetune(tmp_path, *flags, "--preview_steps=5")
    previews = [tmp_path / "out" / name for name in ("preview_00005.png", "preview_00010.png", "preview.png")]
    contents = [file.read_bytes() for file in previews]
    assert len(set(contents)) == 3 and contents[2] == (trained / "preview.png").read_bytes()
    shutil.rmtree(tmp_path / "out")
    stop_at(monkeypatch, 5, 7)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            finetune(tmp_path, *flags, "--preview_steps=5")
        (tmp_path / "out" / "preview_00005.png").unlink()
    finetune(tmp_path, *flags, "--preview_steps=5")
    assert [file.read_bytes() for file in previews] == contents
    assert difference(tmp_path / "out", trained) < 1e-6


@pytest.mark.parametrize("name", ["digits", "flower", "my 'birds'", "mine/deeper"])
def test_the_folder_may_have_any_name(tmp_path, flags, trained, capsys, name):
    """Also a bundled data set's. The command that is printed draws with this checkpoint."""
    shutil.copytree(trained, tmp_path / name)
    finetune(tmp_path, *flags, f"--output_dir={name}")
    script, *arguments = shlex.split(capsys.readouterr().out.splitlines()[-1])[1:]
    more = ["--num_gen=1", "--num_inference_steps=2", "--device=cpu"]
    with as_command_line(script, *arguments, *more, folder=tmp_path) as main:
        main()
    assert Image.open(tmp_path / "outputs" / "gen_0000.png").size == (16, 16)  # the demo's are 32x32
