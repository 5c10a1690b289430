"""What a result depends on cannot be forgotten, and a folder that an earlier version began can be continued."""

import json
import os
import shlex

import pytest
from drawing import DIGITS, ROOT, as_command_line, write_photos

from noisecutmix import cli
from noisecutmix.compare import __main__ as compare
from noisecutmix.errors import InputError
from noisecutmix.files import check_same, describe_program, recorded_command
from noisecutmix.finetune import __main__ as finetune
from noisecutmix.script import program_words

DIGIT_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
# as version 1.0.0 wrote them before the package had wings
RUN = {
    "seed": 0,
    "alpha": 1.0,
    "guidance_scale": 7.5,
    "guidance_interval": [0.0, 1.0],
    "num_inference_steps": 4,
    "resolution": 32,
    "dtype": "float32",
    "prompt": "a photo of a {name} {meta_class}",
    "meta_class": "digit",
    "class_names": DIGIT_NAMES,
    "model": "9c16e25d22705e20a4c6efe871fcb1f3a6f696844797f05da9f80dbc21520246",
    "checkpoint": "5e378a15bc0d905c60df7ec939c565c55cbd347449e008c64931f7d9b8d084b0",
}
FINETUNE = {
    "meta_class": "bird",
    "resolution": 32,
    "random_flip": True,
    "random_crop": False,
    "rank": 10,
    "learning_rate": 5e-05,
    "token_learning_rate": 5e-05,
    "lr_scheduler": "constant",
    "dtype": "float32",
    "seed": 0,
    "examples_per_class": None,
    "effective_batch": 2,
    "class_names": ["blue jay", "red kite"],
    "num_pictures": 6,
    "model": RUN["model"],
}
CLASSIFY = {
    "seed": 0,
    "test_share": None,
    "examples_per_class": None,
    "probability": 0.1,
    "keep": 1.0,
    "model": "test_resnet",
    "pretrained": False,
    "epochs": 1,
    "batch_size": 32,
    "learning_rate": 0.02,
    "weight_decay": 0.0005,
    "image_size": 32,
    "crop_scale": 0.08,
    "color_jitter": 0.4,
    "random_flip": True,
    "dtype": "float32",
    "class_names": ["blue jay", "red kite"],
    "augmented": {},
}
AUGMENTATION_FLAGS = [
    *("--data_name=digits", "--num_inference_steps=4", "--num_aug=2", "--device=cpu", "--output_dir=out")
]
FINETUNE_FLAGS = [
    *("--data_dir=birds", "--meta_class=bird", f"--model={DIGITS / 'base'}", "--resolution=32", "--device=cpu"),
    *("--train_batch_size=2", "--max_train_steps=4", "--output_dir=out"),
]
COMPARE_FLAGS = [
    *("--train_dir=birds", "--test_dir=others", "--rows", "none", "cutmix", "--model=test_resnet", "--no_pretrained"),
    *("--image_size=32", "--epochs=1", "--seeds=1", "--num_workers=0", "--device=cpu", "--output_dir=out"),
]
# command: its flags; the module and the name of the function that makes its parser; where the record is checked
COMMANDS = {
    "augmentation.py": (AUGMENTATION_FLAGS, cli, "create_augmentation_parser", "noisecutmix.files.check_same", RUN),
    "noisecutmix.finetune": (
        *(FINETUNE_FLAGS, finetune, "create_parser", "noisecutmix.finetune.folder.check_same", FINETUNE),
    ),
    "noisecutmix.compare": (
        *(COMPARE_FLAGS, compare, "create_parser", "noisecutmix.compare.comparison.check_same", CLASSIFY),
    ),
}
RECORDS = dict(zip(COMMANDS, ("run.json", "finetune.json", "classify.json")))


class Compared(Exception):
    """The folder has compared its record."""


def run(command, folder, monkeypatch):
    """Run a command up to the comparison of the folder's record; return (the record there, the one of now)."""
    flags, _, _, where, _ = COMMANDS[command]
    seen = {}

    def compare_and_stop(root, there, now):
        seen["records"] = there, now
        check_same(root, there, now)
        raise Compared

    monkeypatch.setattr(where, compare_and_stop)
    with as_command_line(command, *flags, folder=folder) as main, pytest.raises(Compared):
        main()
    return seen["records"]


@pytest.fixture
def folder(tmp_path):
    for name in ("birds", "others"):
        write_photos(tmp_path / name, ["blue jay", "red kite"])
    (tmp_path / "out").mkdir()
    return tmp_path


def store(folder, command, options):
    more = {"num_aug": 2, "steps": 0, "losses": [], "listing": "", "model": "", "resolution": 32}
    (folder / "out" / RECORDS[command]).write_text(json.dumps({"options": options, **more}))


@pytest.mark.parametrize("command", ["augmentation.py", "noisecutmix.finetune"])
def test_a_record_of_an_earlier_version_is_that_of_now(folder, monkeypatch, command):
    *_, options = COMMANDS[command]
    monkeypatch.setattr("noisecutmix.finetune.folder.fingerprint_files", lambda *_: "of these pictures")
    stored = {**options, "pictures": "of these pictures"} if command == "noisecutmix.finetune" else options
    store(folder, command, stored)
    there, now = run(command, folder, monkeypatch)
    assert there == now == stored


def test_a_comparison_that_mixed_every_batch_is_refused(folder):
    store(folder, "noisecutmix.compare", CLASSIFY)
    with (
        as_command_line("noisecutmix.compare", *COMPARE_FLAGS, folder=folder) as main,
        pytest.raises(InputError, match=r"made with another mix_probability \(None there, 0.5 now\)"),
    ):
        main()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_new_flag_is_recorded_without_anybodys_help(folder, monkeypatch, command):
    """At its default it changes no record, so that a folder from before it came is continued."""
    flags, module, create_parser, _, options = COMMANDS[command]
    original = getattr(module, create_parser)

    def with_a_new_flag():
        parser = original()
        parser.add_argument("--new_flag", type=float, default=0.5)
        return parser

    monkeypatch.setattr(module, create_parser, with_a_new_flag)
    store(folder, command, options)
    for value, words in (("0.5", None), ("0.7", r"new_flag \(None there, 0.7 now\)")):
        with (
            as_command_line(command, *flags, f"--new_flag={value}", folder=folder) as main,
            pytest.raises(InputError, match="made with another ") as refusal,
        ):
            # another difference than the new flag's is wanted at its default
            main() if words else store(folder, command, {**options, "seed": 7}) or main()
        assert ("new_flag" in str(refusal.value)) == bool(words)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_recorded_command_runs_in_every_folder(folder, command):
    flags, *_ = COMMANDS[command]
    with as_command_line(command, *flags, folder=folder):
        recorded = describe_program(program_words())
    start = ["python", str(ROOT / command)] if command.endswith(".py") else ["python", "-m", command]
    line = recorded_command(recorded, "--output_dir=a copy")
    then = ";" if os.name == "nt" else " &&"
    assert line == f"cd {shlex.quote(str(folder))}{then} {shlex.join([*start, *flags])} '--output_dir=a copy'"


@pytest.mark.parametrize("command", ["augmentation.py", "noisecutmix.finetune"])
def test_a_large_seed_of_an_earlier_version_is_refused(folder, monkeypatch, command):
    """Its random numbers were others, so the folder would mix two plans."""
    seed = 3 * 2**32 + 5
    flags, *_, options = COMMANDS[command]
    monkeypatch.setattr("noisecutmix.finetune.folder.fingerprint_files", lambda *_: "of these pictures")
    store(folder, command, {**options, "pictures": "of these pictures", "seed": seed})
    with (
        as_command_line(command, *flags, f"--seed={seed}", folder=folder) as main,
        pytest.raises(InputError, match=r"made with another (pictures .*, )?seed_sequence \(None there, 2 now\)"),
    ):
        main()
