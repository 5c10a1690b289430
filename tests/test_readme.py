"""The README is correct: its Python code runs unchanged, its commands succeed, and its links are valid.

Blocks marked `sh gpu` need a GPU, downloads or a cluster; only their flags are checked.
"""

import re
import shlex

import pytest
from conftest import ROOT, as_command_line, load_module

from noisecutmix.cli import create_augmentation_parser, create_generation_parser

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+(?: \w+)?)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
SCRIPTS = {"augmentation.py": create_augmentation_parser(), "generation.py": create_generation_parser()}
TOOLS = {name: load_module(ROOT / "ckpts" / name).create_parser() for name in ("finetune.py", "classify.py")}
PARSERS = {**SCRIPTS, **TOOLS}


def script_commands(kind):
    """Return (script, arguments) of each command in the blocks of a kind that runs one of the scripts."""
    text = "\n".join(block for name, block in BLOCKS if name == kind).replace("\\\n", " ").replace("'", "")
    commands = re.findall(r"(augmentation\.py|generation\.py|finetune\.py|classify\.py) (.*)", text)
    return [(script, shlex.split(arguments)) for script, arguments in commands]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A working directory with outputs/digits, as after the first command of the README."""
    folder = tmp_path_factory.mktemp("readme")
    arguments = ["--data_name=digits", "--num_aug=32", "--num_inference_steps=5", "--output_dir=outputs/digits"]
    with as_command_line("augmentation.py", *arguments, folder=folder) as main:
        main()
    return folder


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_snippets_run(outputs, monkeypatch, number):
    code = PYTHON[number]
    assert len(code.splitlines()) <= 25
    if "ckpts/" in code:
        monkeypatch.chdir(ROOT)
    else:
        monkeypatch.chdir(outputs)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize(("script", "arguments"), script_commands("sh"))
def test_commands_run(run_script, script, arguments):
    done = run_script(script, *arguments)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("script", "arguments"), script_commands("sh gpu"))
def test_gpu_commands_have_valid_flags(script, arguments):
    PARSERS[script].parse_args(arguments)


def test_every_flag_is_in_the_table():
    table = README[README.index("## Flags") : README.index("## Output")]
    for script, parser in SCRIPTS.items():
        for action in parser._actions:
            if "--help" not in action.option_strings:
                assert f"`{action.option_strings[0]}`" in table, f"{script} {action.option_strings[0]}"


def test_local_links_resolve():
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)", README, flags=re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (ROOT / target).exists(), target


def test_the_package_lists_its_public_names():
    import noisecutmix

    assert set(noisecutmix.__all__) == set(dir(noisecutmix))
    for name in noisecutmix.__all__:
        assert getattr(noisecutmix, name).__doc__
