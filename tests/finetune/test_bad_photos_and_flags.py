"""What cannot be trained is refused in one line, before anything is written."""

import re
import shutil

import pytest
from drawing import CLASS_NAMES, ROOT
from finetuning import LORA, SCRIPT, contents_of, copy_of, finetune, rename, truncate
from test_bad_input import files_below, refusal_of, run_without_torch

from noisecutmix.errors import InputError, RunError
from noisecutmix.finetune.samples import PictureLatents
from noisecutmix.launch import count_group

KNOWN = ["--meta_class=bird", "--output_dir=out", "--device=cpu", "--resolution=16"]


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
    assert_refused(tmp_path, message, "--data_dir=birds", f"--model={tiny_model}")


BAD_FLAGS = {
    "no data_dir": (["--meta_class=bird"], "--data_dir"),
    "blank meta_class": (["--meta_class= "], "--meta_class: is blank"),
    "output within the pictures": (["--output_dir=birds/out"], "--output_dir: birds/out lies in --data_dir"),
    "output is a file": (["--output_dir=a_file"], "--output_dir: a_file cannot be written"),
    "resolution": (["--resolution=17"], "--resolution: has to be a multiple of 2, not 17"),
    "rank": (["--rank=0"], "--rank: has to be a whole number from 1 to 1024"),
    "schedule": (["--lr_scheduler=warm"], "--lr_scheduler: invalid choice"),
    "dtype": (["--dtype=float8"], "--dtype: invalid choice"),
    "float16 on the CPU": (["--dtype=float16"], "--dtype: float16 needs cuda"),
    "model": (["--model=./nowhere"], "--model: ./nowhere is no folder"),
    "unknown flag": (["--epochs=3"], "--epochs=3: no such flag"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_flags_are_refused_in_one_line(tmp_path, photos, tiny_model, case):
    arguments, message = BAD_FLAGS[case]
    shutil.copytree(photos, tmp_path / "birds")
    (tmp_path / "a_file").write_text("here")
    known = [] if case == "no data_dir" else ["--data_dir=birds", f"--model={tiny_model}"]
    assert_refused(tmp_path, message, *known, *arguments)


def assert_refused(folder, message, *arguments):
    line = refusal_of(folder, SCRIPT, *KNOWN, *arguments)
    assert re.search(message, line) and "\n" not in line, line


@pytest.mark.parametrize(("content", "message"), [(None, "birds is not there"), ("", r"0\.jpg cannot be read")])
def test_a_refusal_needs_no_torch(tmp_path, tiny_model, content, message):
    if content is not None:
        for name in CLASS_NAMES:
            (tmp_path / "birds" / name).mkdir(parents=True)
            (tmp_path / "birds" / name / "0.jpg").write_text(content)
    before = files_below(tmp_path)
    done = run_without_torch(tmp_path, SCRIPT, *KNOWN, "--data_dir=birds", f"--model={tiny_model}")
    (line,) = [line for line in done.stderr.splitlines() if not re.match(r"\d+ classes|\d+ files", line)]
    assert line.startswith("noisecutmix.finetune: error: ") and re.search(message, line), line
    assert (done.returncode, done.stdout) == (2, "")
    assert files_below(tmp_path) == before


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
def test_half_a_launch_is_refused_by_the_name_of_a_variable(monkeypatch, case):
    """Accelerate would take it for a launch, and wait for the other processes."""
    for name, value in HALF_LAUNCHES[case].items():
        monkeypatch.setenv(name, value)
    name = next(name for name in HALF_LAUNCHES[case] if "SIZE" in name or "TASKS" in name or name == "LOCAL_RANK")
    with pytest.raises(InputError, match=f"^the environment variable {name} is .*unset {name} for one"):
        count_group()


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "1"}, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}])
def test_a_process_of_its_own_is_no_launch(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert count_group() == 1


def test_a_clone_uses_its_own_package(tmp_path, run_script):
    shutil.copytree(ROOT / "noisecutmix", tmp_path / "noisecutmix")
    (tmp_path / "noisecutmix" / "__init__.py").write_text("__version__ = print('the package of this clone')")
    done = run_script(SCRIPT, "--help")
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
