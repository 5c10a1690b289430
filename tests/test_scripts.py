"""What the flags of both scripts change."""

import json
import re
import shutil

import numpy as np
import pytest
from drawing import CLASS_NAMES, as_command_line
from PIL import Image

from noisecutmix.errors import InputError


def test_a_single_class_differs_in_mask_label_and_picture_alone(tmp_path, tiny_arguments, whole):
    arguments = [*tiny_arguments, "--num_aug=20", "--output_dir=out"]
    with as_command_line("augmentation.py", *arguments, "--single_class", folder=tmp_path) as main:
        main()
    out = tmp_path / "out"
    single, mixed = (
        [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()] for folder in (out, whole)
    )
    assert [line | {"box": [0, 0, 16, 16], "ratio": 1.0} for line in mixed] == single
    labels = np.load(out / "soft_label.npy")
    assert labels.tolist() == np.eye(3)[[line["target_label"] for line in single]].tolist()
    assert all(Image.open(mask).getextrema() == (255, 255) for mask in (out / "mask").iterdir())
    with (
        as_command_line("augmentation.py", *arguments, folder=tmp_path) as main,
        pytest.raises(InputError, match=r"another single_class \(True there, None now\)"),
    ):
        main()


def test_generation_draws_the_requested_pair(tmp_path, tiny_arguments):
    arguments = [*tiny_arguments, "--num_gen=3", "--target_class=Blue Jay", "--aug_class=0", "--output_dir=out"]
    with as_command_line("generation.py", *arguments, folder=tmp_path) as main:
        main()
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["gen_0000.png", "gen_0001.png", "gen_0002.png", "preview.png"]
    assert Image.open(tmp_path / "out" / "gen_0000.png").size == (16, 16)
    first = [(tmp_path / "out" / name).read_bytes() for name in names]

    with as_command_line("generation.py", *arguments, folder=tmp_path) as main:
        main()
    assert [(tmp_path / "out" / name).read_bytes() for name in names] == first  # the same on every run
    with as_command_line("generation.py", *arguments, "--seed=1", folder=tmp_path) as main:
        main()
    assert (tmp_path / "out" / "gen_0000.png").read_bytes() != first[0]


def test_a_class_that_the_checkpoint_lacks_is_named(tmp_path, tiny_arguments):
    path = tmp_path / "more.json"
    path.write_text(json.dumps({"classes": [*CLASS_NAMES, "dodo"], "meta_class": "bird"}))
    arguments = [*tiny_arguments, f"--data_name={path}", "--output_dir=out"]
    with (
        as_command_line("augmentation.py", *arguments, folder=tmp_path) as main,
        pytest.raises(InputError, match="--ckpt_path: the checkpoint has no token for 'dodo'"),
    ):
        main()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_pictures_are_the_same(tmp_path, tiny_arguments, capsys):
    for name, *more in (("plain",), ("compiled", "--compile")):
        arguments = [*tiny_arguments, "--num_gen=5", "--batch_size=4", f"--output_dir={name}", *more]
        with as_command_line("generation.py", *arguments, folder=tmp_path) as main:
            main()
    assert "compiled in" in capsys.readouterr().err
    for i in range(5):
        plain, compiled = (
            np.asarray(Image.open(tmp_path / name / f"gen_{i:04d}.png")).astype(int) for name in ("plain", "compiled")
        )
        assert np.abs(plain - compiled).max() <= 1  # float32 rounding, then rounding to grey levels


@pytest.mark.slow
def test_compiling_without_a_compiler_is_one_line(run_script, tmp_path, tiny_arguments):
    environment = {"CXX": str(tmp_path / "nowhere"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = run_script("generation.py", *tiny_arguments, "--compile", "--output_dir=out", environment=environment)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert re.fullmatch("generation.py: error: --compile: .*compiler.*; without it the run is only slower", last, re.I)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
