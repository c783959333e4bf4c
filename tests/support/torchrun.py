"""Start processes with torchrun with a time limit, since processes that lose each other wait for long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def torchrun(processes: int, *arguments: str) -> list[str]:
    """Return the command that runs a script, or `-m` and a module, in several processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, *arguments]


def run_together(command: list[str], seconds: float = 300) -> str:
    """Run such a command and return its standard error; fail with that if it fails."""
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        try:
            _, told = running.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            raise AssertionError(f"the processes had not ended after {seconds} s") from None
    assert running.returncode == 0, told[-5000:]
    return told
