"""Run a script that needs Triton, in a process of its own (whether it interprets is fixed at import)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_interpreted(script: str) -> None:
    """Run kernels on the CPU, in Triton's interpreter."""
    run_script(script, TRITON_INTERPRET="1")


def run_script(script: str, **variables: str) -> None:
    """Skip where Triton is not installed; the script has to print `checked` and nothing else."""
    pytest.importorskip("triton")
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **variables}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "checked", done.stderr
