"""Several processes of one launch draw one data set; if one of them stops, the others stop, too."""

import contextlib
import os
import random
import signal
import socket
import sys
import time

import psutil
import pytest
from conftest import LONGEST_WAIT, ROOT, command, files_of, run_to_the_end, wait_for_images


def is_worker(process):
    with contextlib.suppress(psutil.Error):  # the process has just ended
        return str(ROOT / "augmentation.py") in process.cmdline()
    return False


@pytest.fixture
def launch(start, tmp_path):
    def launch_two(*arguments):
        return start(
            [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--num_machines=1",
             "--mixed_precision=no", "--dynamo_backend=no", "--multi_gpu", "--main_process_port=0",
             str(ROOT / "augmentation.py"), *arguments],
            OMP_NUM_THREADS="1",
            HF_HOME=str(tmp_path / "no_configuration_of_the_user"),
        )  # fmt: skip

    return launch_two


def find_free_port():
    """Return a free port outside the range that is used for outgoing connections."""
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


@pytest.fixture
def start_ranks(start, tmp_path):
    """Start the processes of a launch as on separate machines: no agent stops the others when one fails."""

    def start_them(*arguments_by_rank, world_size=None, **environment):
        port = str(find_free_port())
        return [
            start(
                command("augmentation.py", *arguments),
                **{
                    "RANK": str(rank),
                    "LOCAL_RANK": "0",
                    "WORLD_SIZE": str(world_size or len(arguments_by_rank)),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "OMP_NUM_THREADS": "1",
                    **environment,
                },
            )
            for rank, arguments in enumerate(arguments_by_rank)
        ]

    return start_them


@pytest.mark.slow
def test_a_machine_with_other_options_is_refused(start_ranks, tmp_path, tiny_arguments):
    shared = [*tiny_arguments, "--output_dir=out"]
    processes = start_ranks([*shared, "--seed=0"], [*shared, "--seed=1"])
    errors = [process.communicate(timeout=LONGEST_WAIT)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 2]
    assert "process 1: the main process has another seed (0 there, 1 now)" in errors[1]
    assert "process 1 of this launch stopped: the main process has another seed" in errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_machines_without_a_shared_folder_are_named(start_ranks, tmp_path, tiny_arguments):
    shared = [*tiny_arguments, "--num_aug=20"]
    processes = start_ranks([*shared, "--output_dir=here"], [*shared, "--output_dir=there"])
    errors = [process.communicate(timeout=LONGEST_WAIT)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 2]
    assert "process 1: --output_dir: there is not the folder of the main process" in errors[1]
    assert "no such file" not in errors[1].lower()


@pytest.mark.slow
def test_a_process_without_its_main_process_stops_and_writes_nothing_more(start_ranks, tmp_path, tiny_arguments):
    """The main process is killed and another run takes the folder, which then holds no picture of the old run."""
    arguments = [*tiny_arguments, "--num_inference_steps=20", "--num_aug=2000", "--output_dir=out"]
    main, other = start_ranks(arguments, arguments)
    wait_for_images(tmp_path / "out", 20, main)
    main.kill()
    killed = time.monotonic()
    run_to_the_end(tmp_path, tiny_arguments, 20, "--overwrite", "--alpha=0.5")
    _, errors = other.communicate(timeout=LONGEST_WAIT)
    assert time.monotonic() - killed < 60
    assert other.returncode == 1
    last = errors.replace("\r", "\n").splitlines()[-1]
    assert "process 0 of this launch, the main one, has ended" in last or "another run has taken out" in last, errors
    (tmp_path / "alone").mkdir()
    run_to_the_end(tmp_path / "alone", tiny_arguments, 20, "--alpha=0.5")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone" / "out")


@pytest.mark.slow
def test_a_process_that_freezes_ends_the_launch(start_ranks, tmp_path, tiny_arguments):
    """A machine that loses its network stops responding; SIGSTOP has the same effect for the other processes."""
    shared = [*tiny_arguments, "--num_inference_steps=20", "--num_aug=20000"]
    launches = [start_ranks(*[[*shared, f"--output_dir=out{frozen}"]] * 2) for frozen in range(2)]
    for frozen, processes in enumerate(launches):
        wait_for_images(tmp_path / f"out{frozen}", 20, processes[0])
        psutil.Process(processes[frozen].pid).suspend()
    begin = time.monotonic()
    for frozen, processes in enumerate(launches):
        _, errors = processes[1 - frozen].communicate(timeout=LONGEST_WAIT)
        assert time.monotonic() - begin < 60
        assert processes[1 - frozen].returncode == 1
        assert f"process {frozen} of this launch" in errors.replace("\r", "\n").splitlines()[-1], errors


@pytest.mark.slow
def test_a_bad_flag_on_one_machine_ends_the_others_within_a_minute(start_ranks, tmp_path, tiny_arguments):
    shared = [*tiny_arguments, "--num_aug=20", "--output_dir=out"]
    begin = time.monotonic()
    launches = [
        start_ranks(*([*shared, "--seed=x"] if rank == bad else shared for rank in range(2))) for bad in range(2)
    ]
    for bad, processes in enumerate(launches):
        errors = [process.communicate(timeout=LONGEST_WAIT)[1] for process in processes]
        assert time.monotonic() - begin < 60 + 30  # a minute, and the time to import torch
        assert processes[bad].returncode == 2 and processes[1 - bad].returncode == 1
        assert "the processes of this launch do not reach each other at 127.0.0.1" in errors[1 - bad]
        assert bad == 0 or "process 1 has not connected within" in errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_process_that_waits_for_the_others(start_ranks, tmp_path, tiny_arguments, number):
    (process,) = start_ranks([*tiny_arguments, "--output_dir=out"], world_size=2)
    end = time.monotonic() + LONGEST_WAIT
    while not psutil.Process(process.pid).net_connections() and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(number)
    begin = time.monotonic()
    _, errors = process.communicate(timeout=LONGEST_WAIT)
    assert time.monotonic() - begin < 10
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK is ''"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "", "MASTER_PORT": "1"}, "MASTER_ADDR is ''"),
        ({"WORLD_SIZE": "two", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK is '2'"),
        ({"WORLD_SIZE": "2", "RANK": "one", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK is 'one'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x"}, "MASTER_PORT is not set"),
    ],
)
def test_an_incomplete_launch_environment_is_refused_in_one_line(run_script, tmp_path, environment, named):
    done = run_script("augmentation.py", "--data_name=digits", "--device=cpu", environment=environment)
    assert done.returncode == 2, done.stderr
    assert named in done.stderr and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_generation_in_a_launch_draws_once(run_script, tmp_path, tiny_arguments):
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = run_script("generation.py", *tiny_arguments, "--output_dir=out", environment={**launch, "RANK": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not (tmp_path / "out").exists()
    done = run_script(
        "generation.py", *tiny_arguments, "--num_gen=2", "--output_dir=out", environment={**launch, "RANK": "0"}
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "preview.png").is_file()


@pytest.mark.slow
def test_one_process_continues_after_one_of_two_was_killed(launch, tmp_path, tiny_arguments):
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
