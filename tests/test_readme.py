"""The README is correct: its Python code runs unchanged, its commands succeed, and its links are valid.

Blocks marked `sh gpu` need a GPU, downloads or a cluster; only their flags are checked.
"""

import importlib
import json
import re
import shlex
import shutil

import numpy as np
import pytest
from drawing import ROOT, as_command_line
from PIL import Image

from noisecutmix.cli import create_augmentation_parser, create_generation_parser

FILES = (
    "README.md",
    "noisecutmix/README.md",
    "noisecutmix/finetune/README.md",
    "noisecutmix/compare/README.md",
    "tests/README.md",
)
TEXTS = {file: (ROOT / file).read_text(encoding="utf-8") for file in FILES}
README = TEXTS["README.md"]
BLOCK = re.compile(r"^```(\w+(?: \w+)?)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [block for text in TEXTS.values() for block in BLOCK.findall(text)]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
SCRIPTS = {"augmentation.py": create_augmentation_parser(), "generation.py": create_generation_parser()}
TOOLS = {
    name: importlib.import_module(f"{name}.__main__").create_parser()
    for name in ("noisecutmix.finetune", "noisecutmix.compare")
}
PARSERS = {**SCRIPTS, **TOOLS}


def script_commands(kind):
    """Return (script, arguments) of each command in the blocks of a kind that runs one of the scripts."""
    text = "\n".join(block for name, block in BLOCKS if name == kind).replace("\\\n", " ").replace("'", "")
    commands = re.findall(r"(augmentation\.py|generation\.py|noisecutmix\.finetune|noisecutmix\.compare) (.*)", text)
    return [(script, shlex.split(arguments)) for script, arguments in commands]


@pytest.fixture(scope="module")
def first_command(tmp_path_factory):
    """Run the README's first command with fewer steps; return the working directory. .ci/quickstart runs it whole."""
    folder = tmp_path_factory.mktemp("readme")
    script, arguments = script_commands("sh")[0]
    with as_command_line(script, *arguments, "--num_inference_steps=5", folder=folder) as main:
        main()
    return folder


def test_the_first_command_writes_the_documented_files(first_command):
    out = first_command / "outputs" / "digits"
    images = sorted(path.name for path in (out / "image").iterdir())
    masks = sorted(path.name for path in (out / "mask").iterdir())
    assert images == [f"gen_{i:04d}.png" for i in range(32)]
    assert masks == [f"mask_{i:04d}.png" for i in range(32)]
    labels = np.load(out / "soft_label.npy")
    assert labels.dtype == np.float32 and labels.shape == (32, 10)
    assert np.allclose(labels.sum(axis=1), 1, atol=1e-6)

    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["file_name"] for line in lines] == [f"image/gen_{i:04d}.png" for i in range(32)]
    for row, line in zip(labels, lines):
        image, mask = Image.open(out / line["file_name"]), Image.open(out / line["mask_file_name"])
        pixels = np.asarray(mask)
        assert (image.mode, image.size) == ("RGB", (32, 32))
        assert (mask.mode, mask.size) == ("L", (32, 32))
        assert set(np.unique(pixels)) <= {0, 255}
        left, top, right, bottom = line["box"]
        assert (pixels[top:bottom, left:right] == 255).all()
        assert (pixels == 255).mean() == pytest.approx(line["ratio"])
        assert row[line["target_label"]] == pytest.approx(line["ratio"], abs=1e-6)
        assert row[line["aug_label"]] == pytest.approx(1 - line["ratio"], abs=1e-6)
        assert np.asarray(image).std() > 10  # something is drawn

    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert run["num_aug"] == 32
    assert run["options"]["guidance_scale"] == 7.5 and run["options"]["num_inference_steps"] == 5
    assert SCRIPTS["augmentation.py"].get_default("num_inference_steps") == 25
    assert {"torch", "diffusers", "noisecutmix"} <= run["versions"].keys()
    assert Image.open(out / "preview.png").size[0] > 512


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_snippets_run(first_command, monkeypatch, number):
    code = PYTHON[number]
    assert len(code.splitlines()) <= 25
    monkeypatch.chdir(first_command)
    if "ckpts/" in code:
        shutil.copytree(ROOT / "ckpts" / "digits", "ckpts/digits")
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize(("script", "arguments"), script_commands("sh gpu"))
def test_gpu_commands_have_valid_flags(script, arguments):
    PARSERS[script].parse_args(arguments)


def test_every_flag_is_in_the_table():
    table = README[README.index("## Flags") : README.index("## Output")]
    for script, parser in SCRIPTS.items():
        for action in parser._actions:
            if "--help" not in action.option_strings:
                assert f"`{action.option_strings[0]}`" in table, f"{script} {action.option_strings[0]}"


def anchors_of(file):
    titles = re.findall(r"^#+ (.*)", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("file", FILES)
def test_local_links_resolve(file):
    for target in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", TEXTS[file]):
        path, _, anchor = "".join(target).partition("#")
        if "://" not in path:
            there = (ROOT / file).parent / path if path else ROOT / file
            assert there.exists(), target
            if anchor:
                place = there / "README.md" if there.is_dir() else there
                assert anchor in anchors_of(place.resolve().relative_to(ROOT)), target


def test_the_package_lists_its_public_names():
    import noisecutmix

    assert set(noisecutmix.__all__) == set(dir(noisecutmix))
    for name in noisecutmix.__all__:
        assert getattr(noisecutmix, name).__doc__
