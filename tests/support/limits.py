"""How far a process may be limited and still begin."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

IMPORTED = (
    "import torch, transformers.models.llama.modeling_llama; from pathlib import Path;"
    "from coprune.base.memory import _numbers; print(_numbers(Path('/proc/self/status'))['VmData'])"
)


@cache
def data_of_imports() -> int:
    """Bytes of data that Python holds with its libraries alone: 0.4 GB, and 0.9 where torch was built for GPUs."""
    return int(subprocess.run([sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True).stdout)
