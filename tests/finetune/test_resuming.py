"""Interruptions, damage and other options do not change what is trained."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from drawing import CLASS_NAMES
from finetuning import (
    LORA,
    SCRIPT,
    STEPS,
    assert_same_training,
    contents_of,
    copy_of,
    create_trainer,
    difference,
    finetune,
    rename,
    stop_at,
    truncate,
)
from PIL import Image, ImageOps
from test_bad_input import files_below, run_without_torch

from noisecutmix.errors import InputError, RunError
from noisecutmix.finetune.folder import count_steps


def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, flags, trained, monkeypatch, capsys):
    """The error comes before a state is written, as a crash does; the checkpoint is that of the last state."""
    stop_at(monkeypatch, 2, 7, 9)
    for kept in (0, 4, 8):
        with pytest.raises(KeyboardInterrupt):
            finetune(tmp_path, *flags)
        assert json.loads((tmp_path / "out" / "finetune.json").read_text())["steps"] == kept
        assert (tmp_path / "out" / LORA).exists() == (kept > 0)
    finetune(tmp_path, *flags)
    assert "continuing after step 8" in capsys.readouterr().err
    assert_same_training(tmp_path / "out", trained)


def test_a_finished_folder_is_not_trained_again(tmp_path, flags, trained):
    """Torch is not even imported."""
    out = copy_of(trained, tmp_path)
    before = files_below(out)
    done = run_without_torch(tmp_path, SCRIPT, *flags, "--output_dir=out")
    assert done.returncode == 0, done.stderr
    assert "out is complete: 12 steps" in done.stdout
    assert files_below(out) == before


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


@pytest.mark.parametrize(
    ("batch", "message"),
    [("2", "out has 4 pictures in a step, .* have 2 in a batch now; give 2"), ("3", ".*use another --train_batch")],
)
def test_another_number_of_pictures_in_a_step_names_what_continues(tmp_path, flags, trained, batch, message):
    copy_of(trained, tmp_path)
    with pytest.raises(InputError, match=f"--gradient_accumulation_steps: {message}"):
        finetune(tmp_path, *flags, f"--train_batch_size={batch}")


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


@pytest.mark.parametrize(("call", "states"), [(1, [4]), (2, [4]), (5, [8, 12])])
def test_a_failed_write_leaves_whole_files_and_is_made_good(tmp_path, flags, trained, monkeypatch, call, states):
    """It fails at the first checkpoint, the second state, the last checkpoint."""
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
def test_damaged_latents_are_encoded_again(tmp_path, tiny_model, photos, damage):
    file, view = tmp_path / "latents.bin", [(picture, False, 0.5) for picture in range(9)]
    contents, latents = [], []
    for _ in range(2):
        trainer = create_trainer(tiny_model, photos)
        trainer.latents.encode(file, "these pictures")
        contents.append(file.read_bytes())
        latents.append(trainer.latents.of(view))
        damage(file)
    assert contents[0] == contents[1] and torch.equal(*latents)


def test_latents_of_other_pictures_are_not_used(tmp_path, flags, trained, photos, monkeypatch):
    other = shutil.copytree(photos, tmp_path / "other")
    for file in other.glob("*/*.png"):
        ImageOps.invert(Image.open(file)).save(file)
    stop_at(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt):
        finetune(tmp_path, *flags, f"--data_dir={other}")
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
    with pytest.raises(RunError, match=r"the loss of step \d+ is not finite; use another output_dir and lower learn"):
        finetune(tmp_path, *flags, "--learning_rate=1e6", "--checkpointing_steps=1", "--max_train_steps=50")
    for file in (tmp_path / "out").glob("state_*.pt"):
        assert np.isfinite(torch.load(file, weights_only=True)["losses"]).all()


@pytest.mark.parametrize("place", ["noisecutmix.finetune.trainer.Trainer.step", "noisecutmix.generator.load_pipeline"])
def test_out_of_memory_suggests_flags(tmp_path, flags, monkeypatch, place):
    """In a step, and while the model of a preview is loaded."""

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(place, fail)
    with pytest.raises(RunError, match=r"out of memory with --train_batch_size=4; halve it and double"):
        finetune(tmp_path, *flags)


def test_the_budget_is_that_of_diff_mix_and_is_printed(tmp_path, flags, capsys):
    assert count_steps(9, 16, None) == 1000
    assert count_steps(5994, 8, None) == -(-47 * 5994 // 8)
    assert count_steps(5994, 8, 7) == 7
    finetune(tmp_path, *flags, "--max_train_steps=2", "--gradient_accumulation_steps=2")
    errors = capsys.readouterr().err
    assert "3 classes ('blue jay' to 'red kite'), 9 pictures; 2 steps of 8 pictures" in errors
    assert "(4 in a batch x 2 accumulated x 1 processes): 1.8 passes" in errors
