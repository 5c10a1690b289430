"""Several processes of one launch: they draw one data set, and none goes on alone or hangs."""

import contextlib
import random
import socket
import sys

import psutil
import pytest
from conftest import LONGEST_WAIT, ROOT, command, run_to_the_end, wait_for_images


def is_worker(process):
    with contextlib.suppress(psutil.Error):  # it has just ended
        return str(ROOT / "augmentation.py") in process.cmdline()
    return False


# the processes of one machine talk over its loopback, whatever the host's name resolves to
TALK_LOCALLY = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}


@pytest.fixture
def launch(start, tmp_path):
    def launch_two(*arguments):
        return start(
            [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--num_machines=1",
             "--mixed_precision=no", "--dynamo_backend=no", "--multi_gpu", "--main_process_port=0",
             str(ROOT / "augmentation.py"), *arguments],
            OMP_NUM_THREADS="1",
            HF_HOME=str(tmp_path / "no_configuration_of_the_user"),
            **TALK_LOCALLY,
        )  # fmt: skip

    return launch_two


def find_free_port():
    """Return a port that is free and outside the range from which outgoing connections take theirs."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


@pytest.mark.slow
def test_two_processes_draw_what_one_draws(whole, launch, tmp_path, tiny_arguments):
    process = launch(*tiny_arguments, "--num_aug=20", "--output_dir=out")
    output, errors = process.communicate(timeout=LONGEST_WAIT)
    assert process.returncode == 0, errors
    assert output.count("out is complete: 20 items") == 1  # rank 0 alone prints
    assert files_of(tmp_path / "out") == files_of(whole)


@pytest.mark.slow
def test_a_machine_with_other_options_is_refused(start, tmp_path, tiny_arguments):
    port = str(find_free_port())
    processes = [
        start(
            command("augmentation.py", *tiny_arguments, "--output_dir=out", f"--seed={rank}"),
            RANK=str(rank),
            LOCAL_RANK="0",
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            **TALK_LOCALLY,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=LONGEST_WAIT)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 2]
    assert "process 1: the main process has another seed (0 there, 1 now)" in errors[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_one_process_goes_on_after_one_of_two_was_killed(launch, tmp_path, tiny_arguments):
    steps = "--num_inference_steps=20"
    (tmp_path / "whole").mkdir()
    run_to_the_end(tmp_path / "whole", tiny_arguments, 300, steps)
    process = launch(*tiny_arguments, steps, "--num_aug=300", "--output_dir=out")
    wait_for_images(tmp_path / "out", 30, process)
    next(filter(is_worker, psutil.Process(process.pid).children(recursive=True))).kill()
    process.communicate(timeout=LONGEST_WAIT)
    assert process.returncode != 0
    assert not (tmp_path / "out" / "soft_label.npy").exists()
    run_to_the_end(tmp_path, tiny_arguments, 300, steps)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole" / "out")
