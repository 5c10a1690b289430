"""Removes settings of the user's shell that would change the results of the tests; imported before torch."""

import os
import signal
import sys

from hypothesis import settings

for name in (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
    "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "OMP_DYNAMIC",
    "DNNL_DEFAULT_FPMATH_MODE", "PYTHONWARNINGS", "PYTHONDEVMODE",
    "TORCH_COMPILE_DISABLE", "TQDM_DISABLE",
):  # fmt: skip
    os.environ.pop(name, None)
# the last bits of a number depend on the threads; and processes with several threads each slow each other down
os.environ["OMP_NUM_THREADS"] = "1"
# a worker of "pytest -n 2" inherits it; "pytest -m cuda" uses a real GPU
if "PYTEST_XDIST_WORKER" not in os.environ and "cuda" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads that spin for long would slow down the other processes
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job of a shell; the scripts would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # nohup ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")
