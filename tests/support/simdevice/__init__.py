"""A simulated accelerator, as strict as CUDA, and the cases of coprune that run on it.

`compile_device.py` compiles it, and `device.py` registers it with PyTorch for a whole process. `run_cases.py` runs the cases of
`cases/` in such a process, each on the device and on the CPU, and compares. `counting.py` and `stages.py` count its operations.

With CASES_DEVICE the same cases run on a real device, as in `benchmarks/gpu.py`.
"""

import os

SIMULATED = "sim"
NAME = os.environ.get("CASES_DEVICE", SIMULATED)
"""The device of this process's cases."""
