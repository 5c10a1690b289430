"""Bad input gives one line on standard error that names the flag, and exit status 2; torch is not imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from drawing import ROOT, as_command_line, offline_environment

from noisecutmix import cli
from noisecutmix.compare import __main__ as compare
from noisecutmix.errors import InputError
from noisecutmix.finetune import __main__ as finetune

TORCH_FREE = """
import runpy, sys
sys.argv = sys.argv[1:]
run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
try:
    run(sys.argv[0], run_name="__main__", **({} if run is runpy.run_path else {"alter_sys": True}))
finally:
    assert "torch" not in sys.modules, "torch was imported"
"""


def run_without_torch(folder, script, *arguments):
    script = str(ROOT / script) if script.endswith(".py") else script
    words = [sys.executable, "-c", TORCH_FREE, script, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=folder, env=offline_environment())


def files_below(folder):
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


BOTH = ("augmentation.py", "generation.py")
# name: (scripts, arguments, part of the message)
CASES = {
    "num_aug zero": (BOTH[:1], ["--num_aug=0"], "--num_aug: has to be a whole number from 1 to "),
    "batch_size huge": (
        BOTH[:1],
        ["--batch_size=1" + "0" * 21],
        "--batch_size: has to be a whole number from 1 to 4096",
    ),
    "too many steps": (BOTH, ["--num_inference_steps=1000"], "--num_inference_steps: has to be a whole number from 1"),
    "alpha zero": (BOTH, ["--alpha=0"], "--alpha: has to be a number from 1e-06 to 1e+06, not '0'"),
    "alpha huge": (BOTH[:1], ["--alpha=1.7e308"], "--alpha: has to be a number from 1e-06 to 1e+06"),
    "alpha tiny": (BOTH[:1], ["--alpha=1e-320"], "--alpha: has to be a number from 1e-06 to 1e+06"),
    "guidance huge": (BOTH[:1], ["--guidance_scale=1e308"], "--guidance_scale: has to be a number from 0 to 1000"),
    "guidance interval outside": (BOTH, ["--guidance_interval", "0", "1.5"], "--guidance_interval: "),
    "guidance interval falls": (BOTH, ["--guidance_interval", "0.8", "0.2"], "--guidance_interval: 0.8 is above 0.2"),
    "resolution huge": (BOTH, ["--resolution=1000000000"], "--resolution: has to be a whole number from 1 to 8192"),
    "resolution not divisible": (BOTH, ["--resolution=33"], "--resolution: has to be a multiple of 2, not 33"),
    "data set unknown": (BOTH, ["--data_name=birds"], "--data_name: 'birds' is unknown; choose one of cub, flower"),
    "JSON missing": (BOTH, ["--data_name=none.json"], "--data_name: none.json cannot be read"),
    "JSON malformed": (BOTH, ["--data_name=malformed.json"], "--data_name: malformed.json is not valid JSON"),
    "JSON a list": (BOTH, ["--data_name=list.json"], '--data_name: list.json has no "classes" of type list'),
    "JSON without classes": (BOTH, ["--data_name=classless.json"], '--data_name: classless.json has no "classes"'),
    "JSON empty": (BOTH, ["--data_name=empty.json"], "needs at least two names"),
    "JSON one class": (BOTH, ["--data_name=one.json"], "needs at least two names"),
    "JSON duplicates": (BOTH, ["--data_name=twice.json"], "names 'a b' twice"),
    "JSON duplicates by case": (BOTH[:1], ["--data_name=case.json"], "names 'robin' twice"),
    "JSON duplicates by composition": (BOTH[:1], ["--data_name=composed.json"], "names 'Vo\u0308gel' twice"),
    "JSON class no valid text": (BOTH[:1], ["--data_name=surrogate.json"], "--data_name: surrogate.json needs"),
    "JSON meta class no valid text": (
        BOTH[:1],
        ["--data_name=meta.json"],
        "--data_name: meta.json needs at least two names",
    ),
    "JSON classes no strings": (BOTH, ["--data_name=numbers.json"], "numbers.json needs at least two names"),
    "JSON without meta class": (BOTH, ["--data_name=metaless.json"], 'metaless.json has no "meta_class"'),
    "JSON without checkpoint": (BOTH, ["--data_name=good.json"], "--ckpt_path: needed with a data set of your own"),
    "folder of no data set": (
        BOTH[:1],
        ["--data_name=half"],
        "--data_name: half has no finetune.json; give a folder that",
    ),
    "folder without finetune.json": (BOTH[:1], ["--data_name=tuned"], "tuned has no finetune.json"),
    "checkpoint missing": (BOTH, ["--ckpt_path=nowhere"], "--ckpt_path: nowhere has no pytorch_lora"),
    "checkpoint a file": (BOTH, ["--ckpt_path=a_file"], "--ckpt_path: a_file has no pytorch_lora"),
    "checkpoint empty": (BOTH, ["--ckpt_path=empty"], "--ckpt_path: empty has no pytorch_lora_weights.safetensors"),
    "checkpoint half": (BOTH, ["--ckpt_path=half"], "--ckpt_path: half has no learned_embeds-steps-last.bin"),
    "device of 5,000 digits": (
        BOTH[:1],
        ["--device=cuda:" + "1" * 5000],
        "--device: has to be cuda, cuda:N, mps or cpu",
    ),
    "device unknown": (BOTH, ["--device=gpu"], "--device: has to be cuda, cuda:N, mps or cpu"),
    "dtype unknown": (BOTH, ["--dtype=float8"], "--dtype: invalid choice: 'float8'"),
    "prompt without name": (BOTH, ["--prompt=a photo of a bird"], "--prompt: has to be a template with {name}"),
    "prompt with unknown field": (BOTH, ["--prompt={name} {place}"], "has to be a template"),
    "prompt with attribute": (BOTH, ["--prompt={name.__class__}"], "has to be a template"),
    "prompt with a lone brace": (BOTH, ["--prompt={name} {"], "--prompt: has to be a template"),
    "prompt with a format": (BOTH, ["--prompt={name:>99}"], "has to be a template"),
    "prompt with a name cut short": (BOTH[:1], ["--prompt={name:.9}"], "has to be a template"),
    "prompt with an item of the name": (BOTH[:1], ["--prompt={name} {name[a]}"], "has to be a template"),
    "prompt with a token": (BOTH[:1], ["--prompt=a photo of a <class_0>"], "has to be a template"),
    "model a missing folder": (BOTH, ["--model=./nowhere"], "--model: ./nowhere is no folder, and no id on the hub"),
    "model a file": (BOTH, ["--model=/etc/passwd"], "--model: /etc/passwd is a single file; convert it once"),
    "model empty": (BOTH, ["--model="], "--model: is blank"),
    "model without VAE blocks": (BOTH[:1], ["--model=blockless"], "--model: blockless/vae/config.json has no "),
    "model without revision": (
        BOTH[:1],
        ["--model=some/model@"],
        "--model: some/model@ is no folder, and no id on the hub",
    ),
    "output of an unknown user": (
        BOTH[:1],
        ["--output_dir=~nobody9/x"],
        "--output_dir: no home folder is known for ~nobody",
    ),
    "checkpoint of an unknown user": (BOTH[:1], ["--ckpt_path=~nobody9/x"], "--ckpt_path: no home folder is known for"),
    "model of an unknown user": (BOTH[:1], ["--model=~nobody9/x"], "--model: ~nobody9/x is no folder"),
    "output empty": (BOTH, ["--output_dir="], "--output_dir: is blank"),
    "output a file": (BOTH, ["--output_dir=a_file"], "--output_dir: "),
    "output below a file": (BOTH, ["--output_dir=a_file/deeper"], "a_file cannot be written: "),
    "seed negative": (BOTH, ["--seed=-1"], "--seed: has to be a whole number from 0 to"),
    "target class unknown": (
        BOTH[1:],
        ["--target_class=fiv"],
        "'fiv' is no class of the data set; give a name, such as zero",
    ),
    "aug class out of range": (BOTH[1:], ["--aug_class=10"], "'10' is no class of the data set"),
    "class of 5,000 digits": (BOTH[1:], ["--target_class=" + "1" * 5000], "--target_class: "),
    "classes the same": (BOTH[1:], ["--target_class=3", "--aug_class=three"], "--aug_class: 'three' is the target"),
    "flag unknown": (BOTH, ["--num_pictures=3"], "--num_pictures"),
    "flag cut short": (BOTH, ["--num_inf=3"], "--num_inf"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad_input")
    (folder / "a_file").write_text("here")
    (folder / "empty").mkdir()
    (folder / "half").mkdir()
    (folder / "half" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    contents = {
        "list": ["a", "b"],
        "classless": {"meta_class": "pet"},
        "empty": {"classes": [], "meta_class": "pet"},
        "one": {"classes": ["a"], "meta_class": "pet"},
        "twice": {"classes": ["a_b", "c", "a b"], "meta_class": "pet"},
        "case": {"classes": ["Robin", "crow", "robin"], "meta_class": "bird"},
        "composed": {"classes": ["V\u00f6gel", "Vo\u0308gel"], "meta_class": "animal"},
        "surrogate": {"classes": ["a", "b\ud800"], "meta_class": "pet"},
        "meta": {"classes": ["a", "b"], "meta_class": "pet\udfff"},
        "numbers": {"classes": [1, 2], "meta_class": "pet"},
        "metaless": {"classes": ["a", "b"]},
        "good": {"classes": ["a", "b"], "meta_class": "pet"},
    }
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "tuned").mkdir()
    (folder / "tuned" / "classes.json").write_text(json.dumps(contents["good"]))
    (folder / "blockless" / "vae").mkdir(parents=True)
    (folder / "blockless" / "vae" / "config.json").write_text("{}")
    (folder / "malformed.json").write_text("{classes: [")
    return folder


def refusal_of(folder, script, *arguments):
    """Return the line that a script prints; check that nothing in the folder has changed."""
    before = files_below(folder)
    with as_command_line(script, *arguments, folder=folder) as main, pytest.raises(InputError) as refusal:
        main()
    assert files_below(folder) == before
    return str(refusal.value)


@pytest.mark.parametrize(("script", "case"), [(script, case) for case in CASES for script in CASES[case][0]])
def test_bad_input(folder, script, case, capsys):
    _, arguments, message = CASES[case]
    line = refusal_of(folder, script, "--data_name=digits", *arguments)
    assert line.startswith("--") and "\n" not in line and message in line
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("script", BOTH)
@pytest.mark.parametrize("case", ["output a file", "checkpoint half", "dtype unknown", "JSON malformed"])
def test_bad_input_ends_a_script_with_one_line_and_without_torch(folder, script, case):
    _, arguments, message = CASES[case]
    before = files_below(folder)
    done = run_without_torch(folder, script, "--data_name=digits", *arguments)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{script}: error: --") and message in line
    assert (done.returncode, done.stdout) == (2, "")
    assert files_below(folder) == before


PARSERS = {
    "generation.py": cli.create_generation_parser,
    "augmentation.py": cli.create_augmentation_parser,
    "noisecutmix.finetune": finetune.create_parser,
    "noisecutmix.compare": compare.create_parser,
}


@pytest.mark.parametrize("script", PARSERS)
@pytest.mark.parametrize("number", ["nan", "inf", "-1", "x", "1" * 500, "1e308"])
def test_every_flag_of_a_number_has_a_range(script, number):
    parser = PARSERS[script]()
    actions = [action for action in parser._actions if getattr(action.type, "__qualname__", "").startswith("as_number")]
    assert len(actions) > 5
    for action in actions:
        with pytest.raises(InputError, match="has to be a") as refusal:
            parser.parse_args([action.option_strings[0], *(action.nargs or 1) * [number]])
        assert refusal.value.option == action.dest


def test_a_missing_checkpoint_is_reported_with_its_folder(folder):
    if (ROOT / "ckpts" / "cub").exists():
        pytest.skip("this checkout has the checkpoint")
    done = run_without_torch(folder, "augmentation.py", "--data_name=cub")
    assert done.returncode == 2
    assert "lora-rank10 has no pytorch_lora_weights.safetensors; download or train a Diff-Mix checkpoint" in done.stderr


INVALID_TEXT = "caf\udce9"  # Python's name for the bytes of "café" in Latin-1


@pytest.mark.parametrize("option", ["output_dir", "data_name", "ckpt_path", "model", "prompt"])
def test_invalid_text_is_refused_where_it_would_be_recorded(option):
    with pytest.raises(InputError, match=rf"^{option}: '.*caf\\udce9' is not valid text; ") as refusal:
        cli.parse_generation(["--data_name=digits", f"--{option}={INVALID_TEXT}"])
    assert refusal.value.as_line().startswith(f"--{option}: ")


@pytest.mark.skipif(sys.platform == "win32", reason="arguments are no bytes there")
def test_invalid_text_writes_nothing(folder):
    before = files_below(folder)
    done = run_without_torch(folder, "augmentation.py", "--data_name=digits", f"--output_dir={INVALID_TEXT}")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("augmentation.py: error: --output_dir: ")
    assert files_below(folder) == before


@pytest.mark.parametrize("name", ["augmentation.py", "generation.py"])
def test_the_home_folder_in_every_path_flag(tmp_path, monkeypatch, name):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    (tmp_path / "good.json").write_text(json.dumps({"classes": ["a", "b"], "meta_class": "pet"}))
    (tmp_path / "checkpoint").mkdir()
    for file in ("pytorch_lora_weights.safetensors", "learned_embeds-steps-last.bin"):
        (tmp_path / "checkpoint" / file).write_bytes(b"")
    parse = {"augmentation.py": cli.parse_augmentation, "generation.py": cli.parse_generation}[name]
    model = ROOT / "ckpts" / "digits" / "base"
    if sys.platform != "win32":  # links need a privilege there
        (tmp_path / "base").symlink_to(model)
        model = "~/base"
    options = parse(["--data_name=~/good.json", "--ckpt_path=~/checkpoint", "--output_dir", "~/x", f"--model={model}"])
    assert options.output_dir == tmp_path / "x"
    assert options.ckpt_path == tmp_path / "checkpoint"
    assert options.classes.names == ("a", "b")
    assert Path(options.model).resolve() == ROOT / "ckpts" / "digits" / "base"


@pytest.mark.parametrize("model", ["gpt", "some/model", "some/model@main", "some/model@refs/pr/3", "some/model@0a1b2c"])
def test_models_of_the_hub_are_accepted(model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.parse_generation(["--data_name=digits", f"--model={model}"]).model == model


def test_a_checkpoint_may_hold_its_lora_as_bin(tmp_path):
    for file in ("pytorch_lora_weights.bin", "learned_embeds-steps-last.bin"):
        (tmp_path / file).write_bytes(b"")
    options = cli.parse_augmentation(
        ["--data_name=digits", f"--ckpt_path={tmp_path}", f"--output_dir={tmp_path / 'x'}"]
    )
    assert options.ckpt_path == tmp_path


@pytest.mark.parametrize("device", ["cuda:99", "mps"])
def test_a_missing_gpu_is_reported(tmp_path, device):
    if device == "mps" and sys.platform == "darwin":
        pytest.skip("it may be there")
    flags = ["--data_name=digits", f"--device={device}", "--output_dir=new"]
    assert refusal_of(tmp_path, "generation.py", *flags).startswith(f"--device: {device} is not there")


@pytest.mark.parametrize("script", BOTH)
def test_help_needs_no_torch_and_shows_defaults(folder, script):
    done = run_without_torch(folder, script, "--help")
    assert done.returncode == 0
    for text in ("--guidance_scale", "(default: 7.5)", "(default: outputs)", "method:", "machine:"):
        assert text in done.stdout
