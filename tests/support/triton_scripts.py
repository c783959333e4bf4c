"""Run a script that needs Triton in a separate process, since interpreting is decided at import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def run_interpreted(script: str) -> None:
    """Run a script with Triton's interpreter, on the CPU."""
    run_script(script, TRITON_INTERPRET="1")


def run_script(script: str, **variables: str) -> None:
    """Run a script, which has to print only `checked`; skip the test if Triton is not installed."""
    pytest.importorskip("triton")
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **variables}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "checked", done.stderr
