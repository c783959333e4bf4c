"""Run cases on the simulated device and compare them with the CPU: python -m support.simdevice.run_cases [--all] [WORD …].

The words are kinds or parts of case names. Exits with 1 if any case failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from support.simdevice import NAME, SIMULATED
from support.simdevice.compile_device import missing


class Outcome(NamedTuple):
    """The outcome of a case."""

    kind: str
    name: str
    passed: bool
    said: str
    seconds: float


def chosen(words: list[str], everything: bool) -> Iterator[tuple[str, str]]:
    """Yield kind and name of the requested cases."""
    from support.simdevice.cases import CASES, SIMULATED_ONLY

    for kind, cases in CASES.items():
        if NAME != SIMULATED and kind in SIMULATED_ONLY:
            continue
        for case in cases:
            if (case.always or everything) and (not words or any(w == kind or w in case.name for w in words)):
                yield kind, case.name


def tried(kind: str, name: str) -> Outcome:
    """Run a case in a separate folder."""
    from support.simdevice.cases import CASES

    started, before = time.process_time(), used()
    with tempfile.TemporaryDirectory(prefix="simulated-") as folder:
        try:
            said = next(case for case in CASES[kind] if case.name == name).run(Path(folder))
            assert used() > before, "the device was not used"
            passed = True
        except Exception as error:
            passed, said = False, _told(error)
            if os.environ.get("SIM_TRACEBACK"):
                traceback.print_exc()
    return Outcome(kind, name, passed, said, round(time.process_time() - started, 2))


def used() -> int:
    """Return how often the device was used so far: launches, or allocations on a real one."""
    if NAME == SIMULATED:
        from support.simdevice.device import library

        return int(library.sim_launches())
    import torch

    return int(torch.accelerator.memory_stats().get("allocation.all.allocated", 0))


def _told(error: Exception) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "coprune/" in f.filename]
    where = f" at {frames[-1].filename.rpartition('coprune/')[2]}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}: {(str(error) or 'nothing said').splitlines()[0][:400]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--all", action="store_true", help="all cases, not only those of every run of the tests")
    parser.add_argument(
        "--json", action="store_true", help="a line of JSON for each, and then one of what stages ask for"
    )
    options = parser.parse_args()
    if reason := missing():
        print(reason)
        return 0
    prepare()
    failed = 0
    for kind, name in chosen(options.words, options.all):
        outcome = tried(kind, name)
        failed += not outcome.passed
        shown = f"{'pass' if outcome.passed else 'FAIL'}  {kind}: {name}  {outcome.said}  [{outcome.seconds:.1f} s]"
        print(json.dumps(outcome._asdict()) if options.json else shown, flush=True)
    if options.json:
        from support.simdevice import stages

        print(json.dumps({"found": stages.count_all(None if options.all else stages.FEW), "allowed": stages.allowed()}))
    else:
        print(f"{failed} failed")
    return 1 if failed else 0


def prepare() -> None:
    """Register the device, and set options under which both devices compute alike."""
    faulthandler.enable()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    import pytest
    import torch

    from support.short import shorten

    if NAME == SIMULATED:
        from support.simdevice import device

        assert device.library is not None
    shorten(pytest.MonkeyPatch())
    torch.set_num_threads(1)
    for attention in ("flash", "mem_efficient"):
        getattr(torch.backends.cuda, f"enable_{attention}_sdp")(False)


if __name__ == "__main__":
    sys.exit(main())
