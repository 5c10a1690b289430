"""Takes away what a shell may bring along and would decide otherwise than the tests say; before torch is imported."""

import os
import signal
import sys

from hypothesis import settings

for name in (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_DYNAMIC", "DNNL_DEFAULT_FPMATH_MODE", "PYTHONWARNINGS", "PYTHONDEVMODE",
    "TORCH_COMPILE_DISABLE", "TQDM_DISABLE",
):  # fmt: skip
    os.environ.pop(name, None)
if "cuda" not in sys.argv:  # of "pytest -m cuda", which is for a real GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads that wait busily for long starve the other processes
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; the scripts would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.load_profile("reproducible")
