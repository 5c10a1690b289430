"""How the scripts end: with signals at any moment, closed pipes, and letters that a terminal cannot encode."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from drawing import CLASS_NAMES, MAX_WAIT, ROOT, command, offline_environment, wait_for_images

ON_POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals and pipes")

# runs a script in which a library catches the exception that a signal raises, while the model is loaded
SIGNAL_WHILE_LOADING = """
import runpy, signal, sys
import transformers
load, number, wraps = transformers.CLIPTextModel.from_pretrained, int(sys.argv[1]), sys.argv[2] == "wraps"

def load_with_signal(*arguments, **named):
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt as error:
        if wraps:
            raise RuntimeError("the weights cannot be read") from error
    return load(*arguments, **named)

transformers.CLIPTextModel.from_pretrained = load_with_signal
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_python(code, *arguments, folder, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder,
        env=offline_environment(PYTHONPATH=str(ROOT), **environment),
        capture_output=True,
        text=True,
        timeout=MAX_WAIT,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "number", "status", "script"),
    [("wraps", signal.SIGINT, 130, "augmentation.py"), ("swallows", signal.SIGTERM, 143, "generation.py")],
)
def test_a_signal_that_a_library_catches_while_loading(tmp_path, tiny_arguments, way, number, status, script):
    arguments = [int(number), way, ROOT / script, *tiny_arguments, "--output_dir=out"]
    done = run_python(SIGNAL_WHILE_LOADING, *arguments, folder=tmp_path)
    assert done.returncode == status, done.stderr
    assert done.stderr.replace("\r", "\n").splitlines()[-1] == "stopped; run the same command again"
    assert "Traceback" not in done.stderr and "--model" not in done.stderr


NOTEBOOK = """
import builtins, io, os, runpy, signal, sys

class Cell(io.TextIOBase):  # as a notebook's stream: no reconfigure, no buffer
    def write(self, text):
        return sys.__stdout__.write(text)

builtins.get_ipython = lambda: None  # as IPython has it while a cell runs
before = signal.getsignal(signal.SIGTERM)
sys.stdout, sys.argv = Cell(), sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print("exit", end.code, signal.getsignal(signal.SIGTERM) == before)
"""


def test_a_script_runs_in_a_notebook_and_leaves_its_signals(tmp_path, tiny_arguments):
    arguments = [ROOT / "tests" / "simulated.py", *tiny_arguments, "--num_aug=1", "--output_dir=out"]
    done = run_python(NOTEBOOK, *arguments, folder=tmp_path)
    assert done.stdout.splitlines() == ["out is complete: 1 items", "exit 0 True"], done.stderr


@ON_POSIX
def test_a_closed_pipe_is_no_failure(tmp_path, tiny_arguments):
    arguments = " ".join(f"'{word}'" for word in command("tests/simulated.py", *tiny_arguments, "--output_dir=out"))
    shell = f"set -o pipefail; {{ {arguments}; echo $? > status; }} 2>&1 | true"
    subprocess.run(["bash", "-c", shell], cwd=tmp_path, env=offline_environment(), timeout=MAX_WAIT, check=False)
    assert (tmp_path / "status").read_text() == "0\n"
    assert (tmp_path / "out" / "soft_label.npy").is_file()


@ON_POSIX
def test_ctrl_c_keeps_its_status_when_the_pipe_is_closed_too(start, tmp_path, tiny_arguments):
    process = start(command("tests/simulated.py", *tiny_arguments, "--num_aug=4000", "--output_dir=out"))
    wait_for_images(tmp_path / "out", 8, process)
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=MAX_WAIT) == 130


def test_letters_that_the_terminal_cannot_encode(run_script):
    """--help, which has an ellipsis, and an error show an escape sequence in place of such a letter."""
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = run_script("generation.py", "--help", environment=environment, errors="replace")
    assert done.returncode == 0 and "\\u2026" in done.stdout
    done = run_script(
        "generation.py",
        "--data_name=digits",
        "--target_class=Žluťoučký",
        "--device=cpu",
        environment=environment,
        errors="replace",
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


@pytest.mark.slow
@ON_POSIX
def test_signals_at_many_moments_of_the_start(start, tmp_path, tiny_arguments):
    """From the first line that a script prints to its first picture; before it, Python still reads the modules."""
    arguments = command("augmentation.py", *tiny_arguments, "--num_aug=4000", "--output_dir=out")
    process = start(arguments)
    process.stderr.readline()
    first_line = time.monotonic()
    wait_for_images(tmp_path / "out", 1, process)
    whole_start = time.monotonic() - first_line
    process.kill()
    process.communicate()
    for moment in range(4):
        process = start(arguments)
        process.stderr.readline()
        time.sleep(moment / 4 * whole_start)
        number = signal.SIGTERM if moment % 2 else signal.SIGINT
        process.send_signal(number)
        _, errors = process.communicate(timeout=MAX_WAIT)
        assert process.returncode == 128 + number, errors
        assert "stopped; run the same command again" in errors
        assert "Traceback" not in errors


def test_class_names_in_every_script_are_written_and_drawn(run_script, tmp_path, tiny_model, tmp_path_factory):
    from diffusers import UNet2DConditionModel
    from drawing import in_old_keys, random_lora, write_checkpoint

    names = ["Vögelchen", "Žluťoučký kůň", "птица"]
    unet = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
    write_checkpoint(tmp_path / "checkpoint", in_old_keys(random_lora(unet)), class_names=names)
    (tmp_path / "data.json").write_text(json.dumps({"classes": names, "meta_class": "zvíře"}), encoding="utf-8")
    done = run_script(
        "tests/simulated.py", "--data_name=data.json", f"--model={tiny_model}", "--ckpt_path=checkpoint",
        "--resolution=16", "--num_inference_steps=2", "--device=cpu", "--num_aug=4", "--output_dir=out",
        environment={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "out" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["target_name"] for line in lines} <= set(names) and len(CLASS_NAMES) == 3


@ON_POSIX
def test_a_process_with_bad_input_lets_the_first_one_of_its_launch_report_it(start):
    """A launcher ends all processes once one has ended, so the message would be lost."""
    code = "from noisecutmix import errors, script\ndef main(): raise errors.InputError('wrong')\nscript.run(main)"
    process = start([sys.executable, "-c", code], PYTHONPATH=str(ROOT), LOCAL_RANK="1", RANK="1", WORLD_SIZE="2")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=MAX_WAIT)
    assert (process.returncode, errors) == (2, "")


@ON_POSIX
@pytest.mark.parametrize(
    "methods",
    [
        "def __del__(self): signal.raise_signal(signal.SIGINT)",
        "def __init__(self): signal.raise_signal(signal.SIGINT)\n    def __del__(self): self.missing",  # as tqdm's
    ],
)
def test_a_signal_in_a_finalizer_or_a_constructor_stops_the_run_without_a_traceback(tmp_path, methods):
    """Python cannot raise in a finalizer: it prints the exception and continues."""
    code = (
        f"import signal\nfrom noisecutmix import script\nclass Finalized:\n    {methods}\n"
        "def main():\n    Finalized()\n    script.check_signals()\nscript.run(main)"
    )
    done = run_python(code, folder=tmp_path)
    assert (done.returncode, done.stderr) == (130, "stopped; run the same command again\n")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [({}, "PASSIVE"), ({"GOMP_SPINCOUNT": "7"}, None), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")],
)
def test_threads_wait_passively_unless_the_user_says_otherwise(tmp_path, settings, wanted):
    code = "import os; from noisecutmix import script; script.run(lambda: print(os.environ.get('OMP_WAIT_POLICY')))"
    environment = {k: v for k, v in offline_environment().items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], env={**environment, **settings}, capture_output=True, text=True)
    assert done.stdout == f"{wanted}\n", done.stderr
