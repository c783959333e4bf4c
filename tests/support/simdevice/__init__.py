"""A simulated accelerator, as strict as CUDA, and what of coprune is rehearsed on it.

`build.py` compiles it, `device.py` makes it known to PyTorch, for a whole process; `run.py` runs the cases of `cases/` in
such a process, each on the device and on the CPU, and compares. `counting.py` and `stages.py` count what is asked of it.

The same cases run on a real device that CASES_DEVICE names, which is how `benchmarks/gpu.py` asks for them.
"""

import os

SIMULATED = "sim"
NAME = os.environ.get("CASES_DEVICE", SIMULATED)
"""The device that the cases of this process run on."""
