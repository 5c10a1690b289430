"""The training is Diff-Mix's: what is trained, from what, and in which steps."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from benchmark_finetune import PlainLoop, Setup
from diffusers import StableDiffusionPipeline
from drawing import RANK, write_photos
from finetuning import (
    OWN_RECIPE,
    ROUNDING_UNDER_ADAM,
    SORTED_NAMES,
    STEPS,
    create_trainer,
    difference,
    finetune,
    weights_of,
)
from PIL import Image, ImageOps

from noisecutmix.errors import RunError
from noisecutmix.finetune.samples import plan_sample
from noisecutmix.finetune.trainer import create_accelerator
from noisecutmix.photos import find_photos
from noisecutmix.photos.opening import crop_square, open_photo


def test_only_the_lora_and_the_new_rows_are_trained(tiny_model, photos):
    before = torch.random.get_rng_state()
    trainer = create_trainer(tiny_model, photos)
    assert torch.equal(torch.random.get_rng_state(), before)
    model = trainer._model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * len(trainer.lora) + 1
    assert all(".lora_" in name or name.endswith(".rows") for name in trained)
    layers = {f"unet.{name}" for name, _ in model.unet.named_modules() if re.search(r"\.to_(q|k|v|out\.0)$", name)}
    assert {f"unet.{name}" for name in trainer.lora} == layers
    downs = torch.cat([down.flatten() for down, _ in trainer.lora.values()])
    assert downs.std().item() == pytest.approx(1 / RANK, rel=0.05)
    assert not any(up.any() for _, up in trainer.lora.values())
    trainer.latents.encode(photos.parent / "only.bin", "")
    trainer.step(0)
    moments = trainer.state()["optimizer"]["state"].values()
    assert sum(moment["exp_avg"].numel() for moment in moments) == sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (SORTED_NAMES, SORTED_NAMES),
        (["001.Red_kite", "002.Blue_jay", "010.Heron"], ["Red kite", "Blue jay", "Heron"]),
        (["n02085620-Chihuahua", "n02085782-Red_kite"], ["Chihuahua", "Red kite"]),
        (["3 kings", "three kings"], ["3 kings", "three kings"]),
        (["737-300", "737-400"], ["737-300", "737-400"]),
        (["3 series", "5 series"], ["3 series", "5 series"]),
    ],
)
def test_a_row_starts_as_the_mean_of_its_tokens_without_numbers_of_folders(tiny_model, tmp_path, folders, words):
    """Unless it is a part of the name: where other names have none, or where nothing else tells the classes apart."""
    trainer = create_trainer(tiny_model, write_photos(tmp_path / "photos", folders, count=1))
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    table = pipe.text_encoder.get_input_embeddings().weight
    for name, row in zip(words, trainer.rows):
        assert torch.allclose(row, table[pipe.tokenizer(name, add_special_tokens=False).input_ids].mean(0))


def test_long_class_names_raise_no_warning(tiny_model, tmp_path, capfd):
    write_photos(tmp_path / "photos", ["a" * 90, "b" * 90], count=1)
    create_trainer(tiny_model, tmp_path / "photos")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("part", "value"), [("lora", float("inf")), ("rows", float("nan"))])
def test_a_gradient_that_is_not_finite_stops_the_run(tiny_model, photos, tmp_path, part, value):
    trainer = create_trainer(tiny_model, photos)
    trainer.latents.encode(tmp_path / "latents.bin", "")
    weight = trainer.rows if part == "rows" else next(iter(trainer.lora.values()))[1]
    weight.register_hook(lambda gradient: torch.full_like(gradient, value))
    with pytest.raises(RunError, match="the gradient of step 1 is not finite; use another output_dir and lower"):
        trainer.step(0)


def test_a_loss_scaler_skips_a_step_that_overflows(tiny_model, photos, tmp_path):
    """As with float16 on a GPU, where this is normal."""
    accelerator = create_accelerator("cpu", "float32")
    accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer = create_trainer(tiny_model, photos, accelerator)
    trainer.latents.encode(tmp_path / "latents.bin", "")
    before, scale = trainer.rows.detach().clone(), accelerator.scaler.get_scale()
    hook = trainer.rows.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    trainer.step(0)
    assert torch.equal(trainer.rows, before) and accelerator.scaler.get_scale() == scale / 2
    hook.remove()
    trainer.step(1)
    assert not torch.equal(trainer.rows, before)
    assert trainer.state()["scaler"]["scale"] == scale / 2


@pytest.mark.parametrize("part", ["lora", "rows", "moments"])
def test_a_state_that_is_not_finite_is_never_written(tiny_model, photos, tmp_path, part):
    trainer = create_trainer(tiny_model, photos)
    trainer.latents.encode(tmp_path / "latents.bin", "")
    trainer.step(0)
    parts = {
        "lora": next(iter(trainer.lora.values()))[1],
        "rows": trainer.rows,
        "moments": trainer.state()["optimizer"]["state"][0]["exp_avg_sq"],
    }
    with torch.no_grad():
        parts[part].view(-1)[0] = float("inf")
    with pytest.raises(RunError, match="a trained weight is not finite"):
        trainer.state()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_step_equals_that_of_a_plain_loop(tiny_model, photos, tmp_path, prediction_type):
    """As in Diff-Mix, the loop encodes in each step, trains the whole table and restores its old rows."""
    model = shutil.copytree(tiny_model, tmp_path / "base")
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    (model / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({**config, "prediction_type": prediction_type})
    )
    changes = {"learning_rate": 1e-2, "lr_scheduler": "linear"}
    trainer = create_trainer(model, photos, **changes)
    trainer.latents.encode(tmp_path / "latents.bin", "")
    plain = PlainLoop(Setup(photos, "cpu", str(model), dataclasses.replace(OWN_RECIPE, **changes)))
    for step in range(2):
        for group, rate in zip(plain.optimizer.param_groups, (1e-2, 1e-3)):
            group["lr"] = rate * (1 - step / STEPS)
        loss = plain.step(step)
        assert trainer.step(step) == (pytest.approx(loss, rel=1e-5), False)
    halves = [half for pair in trainer.lora.values() for half in pair]
    assert len(halves) == len(plain.lora)
    for half, expected in zip(halves, plain.lora):
        assert (half - expected).abs().mean() < 1e-5 < half.std()
    assert (trainer.rows - plain.table[-3:]).abs().mean() < 1e-6


def test_every_pass_shows_every_picture_once():
    passes = [[plan_sample(7, 10 * turn + i, 10, 1000, (1,), True) for i in range(10)] for turn in range(20)]
    for samples in passes:
        assert sorted(sample.picture for sample in samples) == list(range(10))
    everything = [sample for samples in passes for sample in samples]
    assert len({tuple(sample.picture for sample in samples) for samples in passes}) == 20
    assert 0.35 < np.mean([sample.view[1] for sample in everything]) < 0.65
    assert np.mean([sample.timestep for sample in everything]) == pytest.approx(500, abs=70)
    assert len({sample.noise.item() for sample in everything}) == 200


def test_mirror_images_are_encoded(tiny_model, photos, tmp_path):
    trainer = create_trainer(tiny_model, photos)
    trainer.latents.encode(tmp_path / "latents.bin", "")
    vae = StableDiffusionPipeline.from_pretrained(tiny_model).vae
    image = ImageOps.mirror(crop_square(open_photo(find_photos(photos).files[5]), 16))
    pixels = torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    assert torch.allclose(trainer.latents._encoded[5, 1, 0], posterior.mean[0], atol=1e-5)
    assert torch.allclose(trainer.latents._encoded[5, 1, 1], posterior.std[0], atol=1e-5)


def test_large_photos_are_decoded_once_and_at_a_fraction(tmp_path, flags, monkeypatch):
    """A folder that an earlier version began goes on with whole ones; what is encoded hardly differs."""
    for number in range(6):
        colours = np.random.default_rng(number).integers(0, 255, (20, 26, 3), dtype=np.uint8)
        (tmp_path / "large" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(colours).resize((260, 200), Image.Resampling.BICUBIC)
        picture.save(tmp_path / "large" / "ab"[number % 2] / f"{number}.jpg", quality=95)
    sizes = []

    def open_and_count(file, min_side):
        sizes.append((photo := open_photo(file, min_side)).size)
        return photo

    monkeypatch.setattr("noisecutmix.photos.listing.open_photo", open_and_count)
    flags = [*flags, f"--data_dir={tmp_path / 'large'}", "--max_train_steps=2"]
    finetune(tmp_path, *flags)
    assert sizes[:6] == [(65, 50)] * 6  # a quarter, at least twice 16 pixels; the preview opens more
    record_file = tmp_path / "out" / "finetune.json"
    record = json.loads(record_file.read_text())
    assert record["options"].pop("reduced_decoding") is True
    for file in (tmp_path / "out").iterdir():
        file.unlink()
    record_file.write_text(json.dumps({**record, "steps": 0, "losses": []}))
    sizes.clear()
    finetune(tmp_path, *flags)
    assert sizes[:6] == [(260, 200)] * 6
    losses = json.loads(record_file.read_text())["losses"]
    assert losses != record["losses"] and losses == pytest.approx(record["losses"], rel=1e-3)


@pytest.mark.parametrize("random_crop", [False, True])
def test_few_pictures_are_encoded_at_once(tiny_model, photos, tmp_path, monkeypatch, random_crop):
    """Whatever the batch, so that encoding needs less memory than training."""
    monkeypatch.setattr("noisecutmix.finetune.samples.ENCODED_PIXELS", 4 * 16**2)
    trainer = create_trainer(tiny_model, photos, random_crop=random_crop)
    encoder, counts = trainer.latents._vae.encoder, []
    encoder.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    trainer.latents.encode(tmp_path / "latents.bin", "")
    if random_crop:
        trainer.latents.of([(number % 9, False, 0.5) for number in range(20)])
    assert max(counts) == 4 and sum(counts) == (20 if random_crop else 18)


def test_random_crops_are_read_while_the_batch_before_is_trained(tiny_model, photos, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "noisecutmix.photos.listing.open_photo", lambda file, _: opened.append(file) or open_photo(file)
    )
    trainer = create_trainer(tiny_model, photos, random_crop=True, batch_size=2, accumulated=2)
    for step in range(3):
        trainer.step(step)
    trainer.latents._pool.shutdown()
    order = [plan_sample(0, index, 9, 1000, (1,), True).picture for index in range(3 * 4 + 2)]
    assert sorted(opened) == sorted(find_photos(photos).files[picture] for picture in order)


def train_two_steps(tiny_model, photos, folder, **changes):
    """Return the losses of two steps and all trained values."""
    trainer = create_trainer(tiny_model, photos, **changes)
    trainer.latents.encode(folder / f"{len(list(folder.iterdir()))}.bin", "")
    losses = [trainer.step(step)[0] for step in range(2)]
    weights = [trainer.rows, *(half for pair in trainer.lora.values() for half in pair)]
    assert all(weight.dtype == torch.float32 for weight in weights)
    return losses, torch.cat([weight.detach().flatten() for weight in weights])


@pytest.mark.parametrize("changes", [{"accumulated": 2, "batch_size": 2}, {"checkpoints_gradients": True}])
def test_memory_can_be_saved_without_changing_what_is_trained(tiny_model, photos, tmp_path, changes):
    (losses, weights), (others, changed) = (train_two_steps(tiny_model, photos, tmp_path, **c) for c in ({}, changes))
    assert others == pytest.approx(losses, rel=1e-5)
    assert (changed - weights).abs().max() < ROUNDING_UNDER_ADAM


@pytest.mark.parametrize(
    "changes", [{"random_crop": True}, {"random_flip": False}, {"seed": 1}, {"lr_scheduler": "cosine"}]
)
def test_options_change_what_is_trained(tiny_model, photos, tmp_path, changes):
    (_, weights), (_, changed) = (train_two_steps(tiny_model, photos, tmp_path, **c) for c in ({}, changes))
    assert 1e-5 < (changed - weights).abs().max() < 10


@pytest.mark.slow
def test_the_type_of_the_frozen_weights_is_not_that_of_the_trained_ones(tmp_path, flags, trained):
    finetune(tmp_path, *flags, "--dtype=bfloat16")
    assert ROUNDING_UNDER_ADAM < difference(tmp_path / "out", trained) < 1
    assert all(tensor.dtype == torch.float32 for tensor in weights_of(tmp_path / "out").values())
