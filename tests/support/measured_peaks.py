"""Estimated and measured memory of runs: `python -m support.measured_peaks CASES`, in a separate process.

Every run is a fork of one process that has imported everything, so that it measures only its own peak,
and the imports are done once.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from support.forking import forked

TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Peak:
    """Bytes of one process, estimated and measured."""

    estimated: int
    measured: int
    held: int
    """Bytes held at the time of the estimate."""
    phases: dict[str, int]

    def __str__(self) -> str:
        told = {name: size >> 20 for name, size in self.phases.items()}
        return f"{self.estimated >> 20} MiB estimated {told}, {self.measured >> 20} measured, {self.held >> 20} held before"


def measured_peaks(cases: dict[str, dict[str, Any]]) -> dict[str, Peak]:
    """Run `coprune.prune` with each case's arguments."""
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "support.measured_peaks", json.dumps(cases)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {name: Peak(**found) for name, found in map(json.loads, done.stdout.splitlines())}


def _prune(name: str, arguments: dict[str, Any]) -> None:
    """Execute one run in this process, and print the estimated and the measured memory."""
    from dataclasses import replace

    import coprune
    from coprune.base.memory import resident_peak
    from coprune.run.context import Run

    told: list[Any] = []
    make = Run.estimate

    def noted(run: Run) -> Any:
        told.append(make(run))
        return replace(told[-1])

    Run.estimate = noted  # type: ignore[method-assign, assignment]
    coprune.prune(**arguments, quiet=True, device="cpu")
    said = told[0]
    found = Peak(said.peak_bytes, resident_peak()[1], said.resident_bytes, said.phases)
    print(json.dumps((name, vars(found))), flush=True)


def _main() -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401

    import coprune.runner.run_recipe  # noqa: F401

    for name, arguments in json.loads(sys.argv[1]).items():
        _, status = os.waitpid(forked(partial(_prune, name, arguments)), 0)
        if status:
            sys.exit(f"{name} failed")


if __name__ == "__main__":
    _main()
