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
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker of "pytest -n 2" inherits the rest
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes with several threads each slow each other down
elif "cuda" not in sys.argv:  # "pytest -m cuda" uses a real GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads that spin for long would slow down the other processes
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job of a shell; the scripts would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")
