"""ckpts/finetune.py trains a Diff-Mix checkpoint on a folder of pictures; interruptions do not change the result."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from conftest import CLASS_NAMES, DIGITS, LONGEST_WAIT, RANK, ROOT, as_command_line, command, load_module, write_photos
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image, ImageOps
from safetensors.torch import load_file
from sklearn.svm import SVC
from test_bad_input import files_below, run_without_torch

from noisecutmix import NoiseCutMixGenerator
from noisecutmix.checkpoint import load_pipeline
from noisecutmix.errors import InputError, RunError
from noisecutmix.photos import find_photos
from noisecutmix.pictures import crop_square, open_photo
from noisecutmix.plan import Item
from noisecutmix.samples import PictureLatents, plan_sample
from noisecutmix.training import Trainer, create_accelerator

SCRIPT = "ckpts/finetune.py"
LORA, EMBEDDINGS = "pytorch_lora_weights.safetensors", "learned_embeds-steps-last.bin"
SORTED_NAMES = sorted(CLASS_NAMES)
STEPS = 12
ROUNDING_UNDER_ADAM = 5e-4  # Adam divides by the gradient's size, so rounding of a gradient near zero changes a weight
SETTINGS = {
    "meta_class": "bird",
    "resolution": 16,
    "random_crop": False,
    "random_flip": True,
    "rank": RANK,
    "max_train_steps": STEPS,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "token_learning_rate": 1e-3,
    "lr_scheduler": "constant",
    "gradient_checkpointing": False,
    "dtype": "float32",
    "seed": 0,
}


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
    with as_command_line(SCRIPT, "--output_dir=out", *arguments, folder=folder) as main:
        main()
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


def create_trainer(tiny_model, photos, **changes):
    settings = Namespace(model=str(tiny_model), **{**SETTINGS, **changes})
    return Trainer(settings, find_photos(photos), create_accelerator("cpu", settings.dtype))


# ---------------------------------------------------------------------------------------------- bad input


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def rename(folder, name, new_name):
    (folder / name).rename(folder / new_name)


def keep_one_class(folder):
    for name in CLASS_NAMES[1:]:
        shutil.rmtree(folder / name)


def empty_a_class(folder):
    for file in (folder / CLASS_NAMES[1]).iterdir():
        file.unlink()


BAD_PICTURES = {
    "truncated picture": (
        lambda folder: truncate(folder / CLASS_NAMES[2] / "1.png"),
        r"grey heron.1\.png cannot be read",
    ),
    "text called a picture": (
        lambda folder: (folder / CLASS_NAMES[0] / "0.jpg").write_text("no picture"),
        r"red kite.0\.jpg cannot be read",
    ),
    "empty file": (
        lambda folder: (folder / CLASS_NAMES[0] / "0.jpg").write_text(""),
        r"red kite.0\.jpg cannot be read",
    ),
    "two damaged pictures": (
        lambda folder: [truncate(folder / CLASS_NAMES[2] / f"{number}.png") for number in (0, 1)],
        r"grey heron.0\.png cannot be read.*\(and 1 more\)",
    ),
    "class without pictures": (empty_a_class, "blue jay holds no picture"),
    "one class": (keep_one_class, r"birds holds 1 class folders, but at least two are needed; .*, or give .*birds"),
    "no classes": (lambda folder: [shutil.rmtree(folder / name) for name in CLASS_NAMES], "holds 0 class folders"),
    "two names alike": (
        lambda folder: shutil.copytree(folder / CLASS_NAMES[0], folder / "red_kite"),
        "red kite and .*red_kite count as the same class name",
    ),
    "blank name": (lambda folder: rename(folder, CLASS_NAMES[0], "__"), "__' is not a valid class name"),
    "no folder": (shutil.rmtree, "birds is not there"),
}


@pytest.mark.parametrize("case", BAD_PICTURES)
def test_bad_pictures_are_refused_in_one_line(tmp_path, photos, tiny_model, case):
    damage, message = BAD_PICTURES[case]
    damage(shutil.copytree(photos, tmp_path / "birds"))
    done = start_without_torch(tmp_path, "--data_dir=birds", f"--model={tiny_model}")
    assert_refused(done, "(--data_dir: )?.*" + message)


BAD_FLAGS = {
    "no data_dir": (["--meta_class=bird"], "--data_dir"),
    "blank meta_class": (["--meta_class= "], "--meta_class: is blank"),
    "output within the pictures": (["--output_dir=birds/out"], "--output_dir: birds/out lies in --data_dir"),
    "output is a file": (["--output_dir=a_file"], "--output_dir: a_file cannot be written"),
    "resolution": (["--resolution=17"], "--resolution: has to be a multiple of 2, not 17"),
    "rank": (["--rank=0"], "--rank: has to be a whole number from 1 to 1024"),
    "steps": (["--max_train_steps=0"], "--max_train_steps: "),
    "batch": (["--train_batch_size=-1"], "--train_batch_size: "),
    "accumulation": (["--gradient_accumulation_steps=0"], "--gradient_accumulation_steps: "),
    "examples": (["--examples_per_class=0"], "--examples_per_class: "),
    "states": (["--checkpointing_steps=0"], "--checkpointing_steps: "),
    "rate": (["--learning_rate=nan"], "--learning_rate: has to be a number from "),
    "token rate": (["--token_learning_rate=-1"], "--token_learning_rate: "),
    "schedule": (["--lr_scheduler=warm"], "--lr_scheduler: invalid choice"),
    "dtype": (["--dtype=float8"], "--dtype: invalid choice"),
    "float16 on the CPU": (["--dtype=float16"], "--dtype: float16 needs cuda"),
    "model": (["--model=./nowhere"], "--model: ./nowhere is no folder"),
    "seed": (["--seed=-1"], "--seed: "),
    "unknown flag": (["--epochs=3"], "--epochs=3: no such flag"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_are_refused_in_one_line(tmp_path, photos, tiny_model, case):
    arguments, message = BAD_FLAGS[case]
    shutil.copytree(photos, tmp_path / "birds")
    (tmp_path / "a_file").write_text("here")
    known = [] if case == "no data_dir" else ["--data_dir=birds", f"--model={tiny_model}"]
    assert_refused(start_without_torch(tmp_path, *known, *arguments), message)


def start_without_torch(folder, *arguments):
    """Run the script in a folder; if it fails, check that nothing there has changed."""
    before = files_below(folder)
    known = ["--meta_class=bird", "--output_dir=out", "--device=cpu", "--resolution=16"]
    done = run_without_torch(folder, SCRIPT, *known, *arguments)
    if done.returncode:
        assert files_below(folder) == before
    return done


def assert_refused(done, message):
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if not re.match(r"\d+ classes|\d+ files", line)]
    assert re.match("finetune.py: error: ", line) and re.search(message, line), line
    assert done.stdout == ""


HALF_LAUNCHES = {
    "left over": {"LOCAL_RANK": "0"},
    "MPICH": {"PMI_SIZE": "2", "PMI_RANK": "0", "MASTER_ADDR": "127.0.0.1"},
    "Open MPI": {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
    "MVAPICH": {"MV2_COMM_WORLD_SIZE": "2"},
    "srun": {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    "no number": {"WORLD_SIZE": "two"},
    "without an address": {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "29500"},
}


@pytest.mark.parametrize("case", HALF_LAUNCHES)
def test_half_a_launch_is_refused_by_the_name_of_a_variable(tmp_path, photos, tiny_model, monkeypatch, case):
    """Accelerate would take it for a launch, and wait for the other processes."""
    for name, value in HALF_LAUNCHES[case].items():
        monkeypatch.setenv(name, value)
    done = start_without_torch(tmp_path, f"--data_dir={photos}", f"--model={tiny_model}")
    name = next(name for name in HALF_LAUNCHES[case] if "SIZE" in name or "TASKS" in name or name == "LOCAL_RANK")
    assert_refused(done, f"the environment variable {name} is .*unset {name} for one")


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "1"}, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}])
def test_a_process_of_its_own_is_no_launch(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert load_module(ROOT / SCRIPT).count_processes() == 1


def test_a_clone_uses_its_own_package(tmp_path, run_script):
    shutil.copytree(ROOT / "noisecutmix", tmp_path / "noisecutmix")
    (tmp_path / "ckpts").mkdir()
    shutil.copy(ROOT / SCRIPT, tmp_path / SCRIPT)
    (tmp_path / "noisecutmix" / "__init__.py").write_text("print('the package of this clone')")
    done = run_script(tmp_path / SCRIPT, "--help")
    assert done.stdout.startswith("the package of this clone"), done.stderr


def test_a_foreign_checkpoint_is_not_overwritten(tmp_path, flags, tiny_checkpoint):
    shutil.copytree(tiny_checkpoint, tmp_path / "out")
    before = contents_of(tmp_path)
    with pytest.raises(InputError, match=r"pytorch_lora_weights\.safetensors is not from this program"):
        finetune(tmp_path, *flags)
    assert contents_of(tmp_path) == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"options": {}, "steps": 1, "losses": [], "runs": []}'])
def test_a_record_of_another_program_or_an_earlier_version_is_refused(tmp_path, flags, trained, content):
    (copy_of(trained, tmp_path) / "finetune.json").write_text(content)
    before = contents_of(tmp_path)
    with pytest.raises(InputError, match=r"--output_dir: .*(finetune\.json has no|is not from this program)"):
        finetune(tmp_path, *flags)
    assert contents_of(tmp_path) == before


def test_an_invalid_model_leaves_no_files(tmp_path, flags, tiny_model):
    broken = shutil.copytree(tiny_model, tmp_path / "base")
    (broken / "unet" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="model"):
        finetune(tmp_path, *flags, f"--model={broken}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [(), ("--random_crop",)], ids=["cached", "random crops"])
def test_a_picture_damaged_after_the_check_is_named(tmp_path, flags, photos, monkeypatch, more):
    copy = shutil.copytree(photos, tmp_path / "birds")
    read, damaged = PictureLatents._read, copy / CLASS_NAMES[1] / "2.png"

    def damage_first(self, view):
        if len(damaged.read_bytes()) > 100:
            damaged.write_bytes(damaged.read_bytes()[:100])
        return read(self, view)

    monkeypatch.setattr(PictureLatents, "_read", damage_first)
    with pytest.raises(RunError, match=r"blue jay.2\.png cannot be read: .*could be read when this run began"):
        finetune(tmp_path, *flags, f"--data_dir={copy}", *more)
    assert not (tmp_path / "out" / LORA).exists()


# ---------------------------------------------------------------------------------------------- training


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


def test_a_row_is_initialised_as_the_mean_of_the_tokens_of_its_name(tiny_model, photos):
    trainer = create_trainer(tiny_model, photos)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model)
    table = pipe.text_encoder.get_input_embeddings().weight
    for name, row in zip(SORTED_NAMES, trainer.rows):
        ids = pipe.tokenizer(name, add_special_tokens=False).input_ids
        assert torch.allclose(row, table[ids].mean(0))


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (["001.Red_kite", "002.Blue_jay", "010.Heron"], ["Red kite", "Blue jay", "Heron"]),
        (["n02085620-Chihuahua", "n02085782-Red_kite"], ["Chihuahua", "Red kite"]),
        (["3 kings", "three kings"], ["3 kings", "three kings"]),
        (["737-300", "737-400"], ["737-300", "737-400"]),
        (["3 series", "5 series"], ["3 series", "5 series"]),
    ],
)
def test_a_row_starts_without_the_numbers_of_a_data_sets_folders(tiny_model, tmp_path, folders, words):
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


@pytest.mark.parametrize(("minutes", "duration"), [(30, "30 minutes"), (27 * 60, "27 hours")])
def test_the_time_that_remains_is_one_number(tmp_path, flags, monkeypatch, capsys, minutes, duration):
    module = load_module(ROOT / SCRIPT)
    monkeypatch.setattr(module, "MEASURED_STEPS", STEPS // 2)  # as many are left as have passed
    clock = iter([0, 60 * minutes])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with as_command_line(SCRIPT, *flags, "--output_dir=out", folder=tmp_path):
        module.main()
    assert f"steps remain, about {duration}\n" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["lora", "rows"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_stops_the_run(tiny_model, photos, tmp_path, part, value):
    trainer = create_trainer(tiny_model, photos)
    trainer.latents.encode(tmp_path / "latents.bin", "")
    weight = trainer.rows if part == "rows" else next(iter(trainer.lora.values()))[1]
    weight.register_hook(lambda gradient: torch.full_like(gradient, value))
    with pytest.raises(RunError, match="the gradient of step 1 is not finite; use another `output_dir` and lower"):
        trainer.step(0)


def test_a_loss_scaler_skips_a_step_that_overflows(tiny_model, photos, tmp_path):
    """As with float16 on a GPU, where this is normal."""
    accelerator = create_accelerator("cpu", "float32")
    accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer = Trainer(Namespace(model=str(tiny_model), **SETTINGS), find_photos(photos), accelerator)
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
    trainer = create_trainer(model, photos, learning_rate=1e-2, lr_scheduler="linear")
    trainer.latents.encode(tmp_path / "latents.bin", "")

    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.unet.requires_grad_(False)
    tokens = [f"<class_{label}>" for label in range(3)]
    pipe.tokenizer.add_tokens(tokens)
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    table = pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[-3:] = trainer.rows
    old_rows = table[:-3].detach().clone()
    halves = {name: [half.detach().clone().requires_grad_() for half in pair] for name, pair in trainer.lora.items()}
    optimizer = torch.optim.AdamW(
        [{"params": [half for pair in halves.values() for half in pair], "lr": 1e-2}, {"params": [table], "lr": 1e-3}]
    )
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    found = find_photos(photos)
    for step in range(2):
        for group, rate in zip(optimizer.param_groups, (1e-2, 1e-3)):
            group["lr"] = rate * (1 - step / STEPS)
        samples = [plan_sample(0, 4 * step + i, 9, 1000, (4, 8, 8), True) for i in range(4)]
        images = [crop_square(open_photo(found.files[sample.picture]), 16) for sample in samples]
        images = [ImageOps.mirror(image) if sample.view[1] else image for image, sample in zip(images, samples)]
        pixels = torch.stack([torch.tensor(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])
        captions = [f"a photo of a <class_{found.labels[sample.picture]}> bird" for sample in samples]
        ids = pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            posterior = pipe.vae.encode(pixels).latent_dist
            latents = posterior.mean + posterior.std * torch.stack([sample.posterior_noise for sample in samples])
            latents *= pipe.vae.config.scaling_factor
        noise = torch.stack([sample.noise for sample in samples])
        timesteps = torch.tensor([sample.timestep for sample in samples])
        target = noise if prediction_type == "epsilon" else schedule.get_velocity(latents, noise, timesteps)
        noisy = schedule.add_noise(latents, noise, timesteps)
        changed = {
            f"{name}.weight": pipe.unet.get_submodule(name).weight + up @ down for name, (down, up) in halves.items()
        }
        inputs = (noisy, timesteps, pipe.text_encoder(ids)[0])
        loss = F.mse_loss(torch.func.functional_call(pipe.unet, changed, inputs).sample, target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            table[:-3] = old_rows
        assert trainer.step(step) == (pytest.approx(loss.item(), rel=1e-5), False)
    for name, pair in halves.items():
        for half, expected in zip(trainer.lora[name], pair):
            assert (half - expected).abs().mean() < 1e-5 < half.std()
    assert (trainer.rows - table[-3:]).abs().mean() < 1e-6


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


@pytest.mark.parametrize("random_crop", [False, True])
def test_few_pictures_are_encoded_at_once(tiny_model, photos, tmp_path, random_crop):
    """No more than four of 512x512, whatever the batch, so that encoding needs less memory than training."""
    trainer = create_trainer(tiny_model, photos, resolution=256, random_crop=random_crop)
    encoder, counts = trainer.latents._vae.encoder, []
    encoder.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    trainer.latents.encode(tmp_path / "latents.bin", "")
    if random_crop:
        trainer.latents.of([(number % 9, False, 0.5) for number in range(20)])
    assert max(counts) == 16 and sum(counts) == (20 if random_crop else 18)


def test_random_crops_are_read_while_the_batch_before_is_trained(tiny_model, photos, monkeypatch):
    opened = []
    monkeypatch.setattr("noisecutmix.samples.open_photo", lambda file: opened.append(file) or open_photo(file))
    trainer = create_trainer(tiny_model, photos, random_crop=True, train_batch_size=2, gradient_accumulation_steps=2)
    for step in range(3):
        trainer.step(step)
    trainer.latents._pool.shutdown()
    order = [plan_sample(0, index, 9, 1000, (1,), True).picture for index in range(3 * 4 + 2)]
    assert sorted(opened) == sorted(find_photos(photos).files[picture] for picture in order)


@pytest.mark.parametrize(
    "more", [["--gradient_accumulation_steps=2", "--train_batch_size=2"], ["--gradient_checkpointing"]]
)
def test_memory_can_be_saved_without_changing_what_is_trained(tmp_path, flags, trained, more):
    finetune(tmp_path, *flags, *more)
    assert difference(tmp_path / "out", trained) < ROUNDING_UNDER_ADAM


@pytest.mark.parametrize(
    "more", [["--dtype=bfloat16"], ["--random_crop"], ["--no_random_flip"], ["--seed=1"], ["--lr_scheduler=cosine"]]
)
def test_options_change_what_is_trained(tmp_path, flags, trained, more):
    finetune(tmp_path, *flags, *more)
    assert ROUNDING_UNDER_ADAM < difference(tmp_path / "out", trained) < 1
    assert all(tensor.dtype == torch.float32 for tensor in weights_of(tmp_path / "out").values())


# ---------------------------------------------------------------------------------------------- the checkpoint


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


def test_the_preview_shows_each_class_three_times(trained, photos):
    preview = Image.open(trained / "preview.png").convert("RGB")
    found = find_photos(photos)
    assert preview.width > 3 * 128 and preview.height > 3 * 128
    for label in range(3):
        real = crop_square(open_photo(found.files[3 * label]), 16).resize((128, 128), Image.Resampling.BICUBIC)
        assert contains(preview, real)


def contains(picture, part):
    picture, part = np.asarray(picture), np.asarray(part)
    corners = np.argwhere((picture[: -part.shape[0], : -part.shape[1]] == part[0, 0]).all(-1))
    return any(np.array_equal(picture[y : y + len(part), x : x + part.shape[1]], part) for y, x in corners)


@pytest.mark.parametrize(("script", "count"), [("generation.py", "--num_gen=2"), ("augmentation.py", "--num_aug=2")])
def test_the_scripts_draw_with_the_checkpoint(trained, tmp_path, script, count):
    arguments = [
        f"--data_name={trained}",
        "--num_inference_steps=2",
        "--device=cpu",
        count,
    ]
    with as_command_line(script, *arguments, folder=tmp_path) as main:
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
    AcceleratorState._reset_state(reset_partial_state=True)
    finetune(tmp_path, *flags)
    assert_same_training(tmp_path / "out", trained)
    assert not (tmp_path / "out" / "latents.bin").exists()


def test_a_stop_before_the_preview_leaves_no_earlier_one(tmp_path, flags, trained, monkeypatch):
    finetune(tmp_path, *flags, "--max_train_steps=6")
    draw = NoiseCutMixGenerator.draw
    monkeypatch.setattr(NoiseCutMixGenerator, "draw", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune(tmp_path, *flags)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(NoiseCutMixGenerator, "draw", draw)
    finetune(tmp_path, *flags)
    assert (tmp_path / "out" / "preview.png").read_bytes() == (trained / "preview.png").read_bytes()


def stop(*_):
    raise KeyboardInterrupt


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
        AcceleratorState._reset_state(reset_partial_state=True)
        (tmp_path / "out" / "preview_00005.png").unlink()
    finetune(tmp_path, *flags, "--preview_steps=5")
    assert [file.read_bytes() for file in previews] == contents
    assert difference(tmp_path / "out", trained) < 1e-6


@pytest.mark.parametrize("name", ["digits", "flower", "my 'birds'", "mine/deeper"])
def test_the_folder_may_have_any_name(tmp_path, flags, trained, capsys, name):
    """Also a bundled data set's. The command that is printed draws with this checkpoint."""
    finetune(tmp_path, *flags, f"--output_dir={name}")
    assert_same_training(tmp_path / name, trained)
    script, *arguments = shlex.split(capsys.readouterr().out.splitlines()[-1])[1:]
    more = ["--num_gen=1", "--num_inference_steps=2", "--device=cpu"]
    with as_command_line(script, *arguments, *more, folder=tmp_path) as main:
        main()
    assert Image.open(tmp_path / "outputs" / "gen_0000.png").size == (16, 16)  # the demo's are 32x32


# ---------------------------------------------------------------------------------------------- resuming


def stop_at(monkeypatch, *stops, error=KeyboardInterrupt):
    """Make the trainer raise an error before each of these steps, once."""
    step, left = Trainer.step, list(stops)

    def stopping_step(self, number, *more):
        if left and number == left[0]:
            del left[0]
            raise error
        return step(self, number, *more)

    monkeypatch.setattr(Trainer, "step", stopping_step)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, flags, trained, monkeypatch, capsys):
    """The error comes before a state is written, as a crash does; the checkpoint is that of the last state."""
    stop_at(monkeypatch, 2, 7, 9)
    for kept in (0, 4, 8):
        with pytest.raises(KeyboardInterrupt):
            finetune(tmp_path, *flags)
        AcceleratorState._reset_state(reset_partial_state=True)
        assert json.loads((tmp_path / "out" / "finetune.json").read_text())["steps"] == kept
        assert (tmp_path / "out" / LORA).exists() == (kept > 0)
    finetune(tmp_path, *flags)
    assert "continuing after step 8" in capsys.readouterr().err
    assert_same_training(tmp_path / "out", trained)


def assert_same_training(folder, other):
    """Assert that two finished folders hold the same bytes, but for the command and the files' times."""
    names = {file.name for file in other.iterdir()} - {"finetune.json"}
    assert {file.name for file in folder.iterdir()} - {"finetune.json"} == names
    for name in names - {f"state_{step:08d}.pt" for step in range(STEPS)}:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    ours, theirs = (json.loads((place / "finetune.json").read_text()) for place in (folder, other))
    for name in ("model", "options", "steps", "losses"):
        assert ours[name] == theirs[name]


def test_a_finished_folder_is_not_trained_again(tmp_path, flags, trained):
    """Torch is not even imported."""
    out = copy_of(trained, tmp_path)
    before = files_below(out)
    done = run_without_torch(tmp_path, SCRIPT, *flags, "--output_dir=out")
    assert done.returncode == 0, done.stderr
    assert "out is complete: 12 steps" in done.stdout
    assert files_below(out) == before


def test_more_steps_continue_the_training(tmp_path, flags, trained):
    finetune(tmp_path, *flags, "--max_train_steps=6")
    finetune(tmp_path, *flags)
    assert difference(tmp_path / "out", trained) < 1e-6
    assert json.loads((tmp_path / "out" / "finetune.json").read_text())["steps"] == STEPS


def test_more_steps_are_refused_with_a_decaying_learning_rate(tmp_path, flags):
    finetune(tmp_path, *flags, "--lr_scheduler=cosine", "--max_train_steps=2")
    with pytest.raises(InputError, match=r"another max_train_steps \(2 there, 3 now\)"):
        finetune(tmp_path, *flags, "--lr_scheduler=cosine", "--max_train_steps=3")


OTHER_OPTIONS = {
    "rank": ["--rank=4"],
    "resolution": ["--resolution=32"],
    "seed": ["--seed=5"],
    "learning_rate": ["--learning_rate=2e-3"],
    "token_learning_rate": ["--token_learning_rate=2e-3"],
    "effective_batch": ["--train_batch_size=5"],
    "lr_scheduler": ["--lr_scheduler=linear"],
    "random_crop": ["--random_crop"],
    "random_flip": ["--no_random_flip"],
    "dtype": ["--dtype=bfloat16"],
    "meta_class": ["--meta_class=animal"],
    "examples_per_class": ["--examples_per_class=2"],
}


@pytest.mark.parametrize("option", OTHER_OPTIONS)
def test_other_options_are_refused_and_named(tmp_path, flags, trained, option):
    out = copy_of(trained, tmp_path)
    before = contents_of(out)
    with pytest.raises(InputError, match=rf"out was made with another .*{option}"):
        finetune(tmp_path, *flags, *OTHER_OPTIONS[option])
    assert contents_of(out) == before


def test_other_pictures_and_another_model_are_refused(tmp_path, flags, trained, photos, tiny_model):
    copy_of(trained, tmp_path)
    more = shutil.copytree(photos, tmp_path / "more")
    shutil.copy(more / CLASS_NAMES[0] / "0.png", more / CLASS_NAMES[0] / "9.png")
    other = shutil.copytree(photos, tmp_path / "other")
    Image.new("RGB", (20, 20)).save(other / CLASS_NAMES[0] / "0.png")
    renamed = shutil.copytree(photos, tmp_path / "renamed")
    rename(renamed, CLASS_NAMES[0], "kite")
    changed = shutil.copytree(tiny_model, tmp_path / "changed")
    config = changed / "unet" / "config.json"
    config.write_text(config.read_text() + "\n")
    for flag, message in (
        (f"--data_dir={more}", r"another num_pictures \(9 there, 10 now\), pictures"),
        (f"--data_dir={other}", "another pictures"),
        (f"--data_dir={renamed}", "another class_names"),
        (f"--model={changed}", "another model"),
        ("--max_train_steps=11", "--max_train_steps: out has 12 steps already"),
    ):
        with pytest.raises(InputError, match=message):
            finetune(tmp_path, *flags, flag)


def test_a_damaged_state_is_replaced_by_the_previous_one(tmp_path, flags, trained, monkeypatch, capsys):
    stop_at(monkeypatch, 11)
    with pytest.raises(KeyboardInterrupt):
        finetune(tmp_path, *flags)
    truncate(tmp_path / "out" / "state_00000008.pt")
    finetune(tmp_path, *flags)
    errors = capsys.readouterr().err
    assert "state_00000008.pt is damaged and not used" in errors and "continuing after step 4" in errors
    assert json.loads((tmp_path / "out" / "finetune.json").read_text())["steps"] == STEPS
    assert difference(tmp_path / "out", trained) < 1e-6


@pytest.mark.parametrize(("call", "states"), [(1, [4]), (2, [4]), (3, [4, 8]), (5, [8, 12])])
def test_a_failed_write_leaves_whole_files_and_is_made_good(tmp_path, flags, trained, monkeypatch, call, states):
    """It fails at the first checkpoint, the second state, the second checkpoint, the last one."""
    save, calls = torch.save, []

    def fail_once(content, file, *more):
        calls.append(content)
        if len(calls) == call + 1:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        save(content, file, *more)

    monkeypatch.setattr(torch, "save", fail_once)
    with pytest.raises(OSError, match="No space left on device"):
        finetune(tmp_path, *flags)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert {file.name for file in (tmp_path / "out").glob("*state*")} == {f"state_{step:08d}.pt" for step in states}
    assert not list((tmp_path / "out").glob(".*tmp"))
    finetune(tmp_path, *flags)
    assert_same_training(tmp_path / "out", trained)


def cut(file):
    file.write_bytes(file.read_bytes()[:1000])


def fill_with_zeros(file):
    file.write_bytes(bytes(file.stat().st_size))


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def exchange_two_pictures(file):
    content = file.read_bytes()
    size = len(content) // 9
    file.write_bytes(content[size : 2 * size] + content[:size] + content[2 * size :])


@pytest.mark.parametrize(
    "damage", [cut, fill_with_zeros, flip_a_bit, exchange_two_pictures, lambda file: file.unlink()]
)
def test_damaged_latents_are_encoded_again(tmp_path, flags, trained, monkeypatch, damage):
    stop_at(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        finetune(tmp_path, *flags)
    AcceleratorState._reset_state(reset_partial_state=True)
    damage(tmp_path / "out" / "latents.bin")
    finetune(tmp_path, *flags)
    assert_same_training(tmp_path / "out", trained)


def test_latents_of_other_pictures_are_not_used(tmp_path, flags, trained, photos, monkeypatch):
    other = shutil.copytree(photos, tmp_path / "other")
    for file in other.glob("*/*.png"):
        ImageOps.invert(Image.open(file)).save(file)
    stop_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        finetune(tmp_path, *flags, f"--data_dir={other}")
    AcceleratorState._reset_state(reset_partial_state=True)
    (tmp_path / "out" / "finetune.json").unlink()
    finetune(tmp_path, *flags)
    assert_same_training(tmp_path / "out", trained)


def test_pictures_that_were_checked_are_not_read_again(tmp_path, flags, trained, photos, monkeypatch):
    """Unless a name, size or time differs. The preview opens the first picture of each class."""
    copy, (moment, again) = shutil.copytree(photos, tmp_path / "birds"), (10**18, 10**18 + 1)
    stop_at(monkeypatch, 7)
    with pytest.raises(KeyboardInterrupt):
        finetune(tmp_path, *flags, f"--data_dir={set_times(copy, moment)}")
    for file in copy.glob("*/2.png"):
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(InputError, match=r"2\.png cannot be read"):
        finetune(tmp_path, *flags, f"--data_dir={set_times(copy, again)}")
    AcceleratorState._reset_state(reset_partial_state=True)
    finetune(tmp_path, *flags, f"--data_dir={set_times(copy, moment)}")
    assert difference(tmp_path / "out", trained) < 1e-6


def set_times(folder, nanoseconds):
    for file in folder.rglob("*.png"):
        os.utime(file, ns=(nanoseconds, nanoseconds))
    return folder


def test_pictures_with_other_times_continue_the_training(tmp_path, flags, trained, photos):
    copy_of(trained, tmp_path)
    finetune(tmp_path, *flags, f"--data_dir={set_times(shutil.copytree(photos, tmp_path / 'birds'), 10**18)}")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, flags):
    with pytest.raises(RunError, match=r"the loss of step \d+ is not finite; use another --output_dir and lower learn"):
        finetune(tmp_path, *flags, "--learning_rate=1e6", "--checkpointing_steps=1", "--max_train_steps=50")
    for file in (tmp_path / "out").glob("state_*.pt"):
        assert np.isfinite(torch.load(file, weights_only=True)["losses"]).all()


def test_out_of_memory_suggests_flags(tmp_path, flags, monkeypatch):
    stop_at(monkeypatch, 5, error=torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RunError, match=r"out of memory with --train_batch_size=4; halve it and double"):
        finetune(tmp_path, *flags)


def test_the_budget_is_that_of_diff_mix_and_is_printed(photos, tmp_path, capsys):
    module = load_module(ROOT / SCRIPT)
    arguments = [f"--data_dir={photos}", "--meta_class=bird", f"--output_dir={tmp_path}", f"--model={DIGITS / 'base'}"]
    options = module.parse([*arguments, "--gradient_accumulation_steps=2"])
    assert module.plan_steps(options, find_photos(photos), 1) == 1000
    errors = capsys.readouterr().err
    assert "3 classes ('blue jay' to 'red kite'), 9 pictures; 1000 steps of 16 pictures" in errors
    assert "(8 in a batch x 2 accumulated x 1 processes)" in errors
    many = find_photos(photos).__class__(photos, ("a", "b"), (photos,) * 5994, (0,) * 5994, ())
    assert module.plan_steps(module.parse(arguments), many, 1) == -(-47 * 5994 // 8)


# ---------------------------------------------------------------------------------------------- processes and signals


def start_finetuning(start, *arguments, launcher=(), **environment):
    script, *arguments = command(SCRIPT, *arguments, "--output_dir=out")[1:]
    return start([sys.executable, *launcher, script, *arguments], **environment)


TWO_PROCESSES = (
    *("-m", "torch.distributed.run", "--nproc_per_node=2"),
    *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"),
)


def wait_for_state(folder, step, process):
    end = time.monotonic() + 300
    while not any(int(file.stem.rpartition("_")[2]) >= step for file in folder.glob("out/state_*.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"no state of step {step}"
        time.sleep(0.02)


@pytest.mark.slow
def test_random_kills_do_not_change_the_result(tmp_path, flags, start):
    flags = [*flags, "--max_train_steps=36", "--checkpointing_steps=1"]
    (tmp_path / "whole").mkdir()
    finetune(tmp_path / "whole", *flags)
    rng = random.Random(0)
    for step in (1, 18):
        process = start_finetuning(start, *flags)
        wait_for_state(tmp_path, step, process)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.communicate()
    finetune(tmp_path, *flags)
    assert difference(tmp_path / "out", tmp_path / "whole" / "out") < 1e-6


ON_POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no SIGTERM")


@pytest.mark.slow
@ON_POSIX
@pytest.mark.parametrize(
    ("launcher", "sent", "status"),
    [((), signal.SIGINT, 130), (TWO_PROCESSES, signal.SIGTERM, None)],
    ids=["one process", "two processes"],
)
def test_nothing_is_lost_on_a_signal(tmp_path, flags, trained, start, launcher, sent, status):
    """The step is finished and a state written. In a launch, it may arrive in one of the processes alone."""
    flags = [*flags, f"--train_batch_size={2 if launcher else 4}"]
    process = start_finetuning(start, *flags, "--max_train_steps=5000", launcher=launcher)
    wait_for_state(tmp_path, 4, process)
    workers = psutil.Process(process.pid).children() if launcher else [process]
    workers[-1].send_signal(sent)
    _, errors = process.communicate(timeout=LONGEST_WAIT)
    if not launcher:
        assert process.returncode == status, errors
        assert errors.replace("\r", "\n").splitlines()[-1] == "stopped; run the same command again to continue"
        assert "Traceback" not in errors
    states = [int(file.stem.rpartition("_")[2]) for file in (tmp_path / "out").glob("state_*.pt")]
    assert json.loads((tmp_path / "out" / "finetune.json").read_text())["steps"] == max(states)
    steps = max(states) + 1
    process = start_finetuning(start, *flags, f"--max_train_steps={steps}", launcher=launcher)
    _, errors = process.communicate(timeout=LONGEST_WAIT)
    assert process.returncode == 0 and f"continuing after step {steps - 1}" in errors, errors
    (tmp_path / "whole").mkdir()
    finetune(tmp_path / "whole", *flags, "--train_batch_size=4", f"--max_train_steps={steps}")
    tolerance = 1e-6 if not launcher else 2 * steps * ROUNDING_UNDER_ADAM
    assert difference(tmp_path / "out", tmp_path / "whole" / "out") < tolerance


@pytest.mark.slow
@ON_POSIX
def test_a_signal_ends_the_wait_for_a_process_that_never_comes(tmp_path, flags, start):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launch = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process = start_finetuning(start, *flags, **launch)
    while not any(connection.laddr.port == port for connection in psutil.Process(process.pid).net_connections()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LONGEST_WAIT)
    assert process.returncode == -signal.SIGTERM  # which a shell reports as 143
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_runs_of_the_same_options_write_the_same_bytes(tmp_path, flags, trained, start):
    runs = [start_finetuning(start, *flags) for _ in range(2)]
    for run in runs:
        _, errors = run.communicate(timeout=LONGEST_WAIT)
        assert run.returncode == 0, errors
    assert_same_training(tmp_path / "out", trained)


@pytest.mark.slow
def test_of_two_runs_with_other_options_exactly_one_is_refused(tmp_path, flags, start):
    runs = [start_finetuning(start, *flags, f"--seed={seed}") for seed in range(2)]
    errors = [run.communicate(timeout=LONGEST_WAIT)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], errors
    assert "--output_dir: out was made with another seed" in errors[[run.returncode for run in runs].index(2)]
    (tmp_path / "alone").mkdir()
    winner = [run.returncode for run in runs].index(0)
    finetune(tmp_path / "alone", *flags, f"--seed={winner}")
    assert_same_training(tmp_path / "out", tmp_path / "alone" / "out")


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path, flags, trained, start):
    """Each process trains on its own half of the batch."""
    process = start_finetuning(start, *flags, "--train_batch_size=2", launcher=TWO_PROCESSES)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "12 steps of 4 pictures (2 in a batch x 1 accumulated x 2 processes)" in errors
    assert difference(tmp_path / "out", trained) < ROUNDING_UNDER_ADAM


@pytest.mark.slow
def test_two_processes_print_one_error(tmp_path, flags, photos, start):
    truncate(shutil.copytree(photos, tmp_path / "birds") / CLASS_NAMES[1] / "0.png")
    process = start_finetuning(start, *flags, "--data_dir=birds", launcher=TWO_PROCESSES)
    _, errors = process.communicate(timeout=300)
    lines = [line for line in errors.splitlines() if "finetune.py: error: " in line]
    assert len(lines) == 1 and "0.png cannot be read" in lines[0], errors
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_mirrored_digits_are_learned(tmp_path):
    """The README's commands, for a shorter time, and a classifier that was trained on other mirrored digits."""
    shorter = {
        "ckpts/finetune.py": ["--max_train_steps=400"],
        "generation.py": ["--num_gen=2"],
        "augmentation.py": ["--num_aug=16"],
        "ckpts/classify.py": ["--epochs=2"],
    }
    commands = [shlex.split(line)[2:] for line in readme_commands() if "mirrored" in line]
    commands = [words[2:] if words[0] in ("--group", "--extra") else words for words in commands]
    scripts = [
        "ckpts/digits/train.py",
        "ckpts/finetune.py",
        "generation.py",
        *["augmentation.py"] * 2,
        "ckpts/classify.py",
    ]
    assert [script for script, *_ in commands] == scripts
    for script, *arguments in commands:
        arguments = [argument.replace("--model=ckpts/", f"--model={ROOT / 'ckpts'}/") for argument in arguments]
        with as_command_line(script, *arguments, *shorter.get(script, []), folder=tmp_path) as main:
            main()
    rows = json.loads((tmp_path / "outputs" / "mirrored_answer" / "results.json").read_text())["rows"]
    assert list(rows) == ["none", "cutmix", "stable_diffusion", "noisecutmix"]
    for row in rows.values():
        assert len(row["top1"]) == 3 and row["real_pictures"] == 200
    assert rows["noisecutmix"]["real_pictures_of_generator"] == 200

    train = load_module(DIGITS / "train.py")
    images, digits, test_images, test_digits = train.load_split()
    unseen = np.setdiff1d(np.arange(len(digits)), train.choose_digits(digits, 20))

    def as_vectors(pictures):
        return train.enlarge(pictures[:, :, ::-1]).reshape(len(pictures), -1) / 255

    classifier = SVC(gamma="scale").fit(as_vectors(images[unseen]), digits[unseen])
    assert classifier.score(as_vectors(test_images), test_digits) > 0.95

    generator = NoiseCutMixGenerator("cpu", str(tmp_path / "outputs" / "mirrored_checkpoint"))
    items = [Item(i, i % 10, (i + 3) % 10, (0, 0, 32, 32), 1.0, 1000 + i, 32) for i in range(60)]
    drawn = np.stack([np.asarray(image.convert("L")) for image in generator.draw(items)]).reshape(60, -1) / 255
    wanted = [train.CLASS_NAMES.index(generator.class_names[item.target]) for item in items]
    assert (classifier.predict(drawn) == wanted).mean() >= 0.7  # 0.97 after all of the README's steps


def readme_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Your own data") : text.index("## Reproducing a result")]
    return re.findall(r"^uv run .*$", section, flags=re.MULTILINE)
