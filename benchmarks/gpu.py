"""Test coprune on one GPU in under ten minutes: the same results as on the CPU, speed and memory. Prints Markdown.

Every section runs in a process of its own with a time limit of its own, so that none can stop the others: not by an error, a
hang, or a device left unusable by an illegal address. A verdict ends the output. The exit code is 1 where a section that
tests correctness failed, and 2 without a GPU.

    python benchmarks/gpu.py                                  # on the GPU that torch finds
    python benchmarks/gpu.py --sections machine,wide          # two of the sections
    python benchmarks/gpu.py --device sim                     # the correctness sections, simulated, in tiny sizes
    python benchmarks/gpu.py --device sim --sections all      # all sections, to try this script: times mean nothing
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import IO, NamedTuple

from gpu_sections.section import ENDING, SIMULATED, Asked, Section
from gpu_sections.sections import SECTIONS

HERE = Path(__file__).resolve()
PATHS = (HERE.parent, HERE.parents[1] / "tests")
LEAST = 5.0
"""Seconds with which a section is still begun."""


class Outcome(NamedTuple):
    """How a section ended. passed: None where it was skipped."""

    section: str
    passed: bool | None
    said: str
    seconds: float


def main() -> int:
    options = read_arguments()
    device = options.device if options.device != "auto" else found_device()
    if device is None:
        print("There is no GPU here that torch finds. --device names one; --device sim is the simulated device.")
        return 2
    if options.inside is not None:
        return inside(options.inside, Asked(device, options.seconds, options.tiny, options.folder, options.cases))
    chosen = options.sections or ("proving" if device == SIMULATED else "all")
    names = chosen.split(",") if chosen not in ("proving", "all") else list(SECTIONS)
    if unknown := [name for name in names if name not in SECTIONS]:
        print(f"There is no section {unknown[0]!r}: {', '.join(SECTIONS)}")
        return 2
    sections = {name: SECTIONS[name] for name in names if chosen != "proving" or SECTIONS[name].proves}
    tiny = options.tiny or device == SIMULATED
    print(heading(device, tiny), flush=True)
    ends = time.monotonic() + 60 * (options.minutes if device != SIMULATED else 600)
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        asked = Asked(device, 0.0, tiny, Path(folder), options.cases)
        outcomes = [run_section(name, section, asked, ends) for name, section in sections.items()]
    print(verdict(outcomes), flush=True)
    return 1 if any(failed(outcome) for outcome in outcomes) else 0


def found_device() -> str | None:
    """The GPU that torch finds, by its kind."""
    from coprune.base.devices import accelerator

    found = accelerator()
    return None if found is None else found.type


def heading(device: str, tiny: bool) -> str:
    """What was run, when, and where; the machine's section says more."""
    from importlib.metadata import version

    git = ["git", "-C", str(HERE.parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "no commit"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    small = ", tiny: times mean nothing" if tiny else ""
    simulated = " (simulated)" if device == SIMULATED else ""
    return f"# coprune on {device}{simulated}\n\n{time.strftime('%Y-%m-%d')}, commit {commit}, {packages}{small}"


def run_section(name: str, section: Section, asked: Asked, ends: float) -> Outcome:
    """Run a section in a process of its own and print its output. ends: when the whole benchmark has to be over."""
    print(f"\n## {section.title}\n", flush=True)
    limit = section.seconds if asked.device != SIMULATED else 60 * section.seconds
    seconds = min(limit, ends - time.monotonic())
    if seconds < LEAST:
        print("Left out: there was no time.")
        return Outcome(name, None, "no time", 0.0)
    asked = replace(asked, seconds=seconds)
    return outcome_of(name, command_of(name, asked), environment_of(asked), seconds)


def command_of(name: str, asked: Asked) -> list[str]:
    """The command that runs one section."""
    words = ["--inside", name, "--device", asked.device, "--seconds", f"{asked.seconds:.0f}", "--cases", asked.cases]
    return [sys.executable, str(HERE), *words, "--folder", str(asked.folder), *(["--tiny"] if asked.tiny else [])]


def environment_of(asked: Asked) -> dict[str, str]:
    paths = [*map(str, PATHS), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "CASES_DEVICE": asked.device, "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | own | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def outcome_of(name: str, command: Sequence[str], environment: dict[str, str], seconds: float) -> Outcome:
    """Run a command until it ends or its time is up, print its output, and return how it ended."""
    started = time.monotonic()
    ending: list[str] = []
    errors: deque[str] = deque(maxlen=3)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        readers = [
            Thread(target=relay, args=(running.stdout, ending)),
            Thread(target=errors.extend, args=(running.stderr,)),
        ]
        for reader in readers:
            reader.start()
        try:
            running.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, 9)
        for reader in readers:
            reader.join()
    took = time.monotonic() - started
    if ending:
        passed, said = json.loads(ending[-1])
    elif took >= seconds:
        passed, said = False, f"not done after {seconds:.0f} s"
    else:
        passed, said = False, f"ended with {running.returncode}: {' '.join(line.strip() for line in errors)[-400:]}"
    print(f"\n{said}, {took:.0f} s" if passed is not False else f"\n**Failed**: {said}, {took:.0f} s", flush=True)
    return Outcome(name, passed, said, took)


def relay(stream: IO[str], ending: list[str]) -> None:
    """Print lines as they come, and return the one that holds the section's result."""
    for line in stream:
        if line.startswith(ENDING):
            ending.append(line.removeprefix(ENDING))
        else:
            print(line, end="", flush=True)


def failed(outcome: Outcome) -> bool:
    """Whether a section that tests correctness failed."""
    return outcome.passed is False and SECTIONS[outcome.section].proves


def verdict(outcomes: Sequence[Outcome]) -> str:
    """The last lines: what passed, failed and was skipped."""
    words = {True: "passed", False: "FAILED", None: "left out"}
    lines = ["\n## Verdict\n", "| section | proves | | |", "| --- | --- | --- | --- |"]
    for name, passed, said, seconds in outcomes:
        proves = "correctness" if SECTIONS[name].proves else "nothing, measures"
        lines.append(f"| {name} | {proves} | {words[passed]} | {said.replace('|', '/')}, {seconds:.0f} s |")
    wrong = [outcome.section for outcome in outcomes if failed(outcome)]
    others = [outcome.section for outcome in outcomes if outcome.passed is False and not failed(outcome)]
    proven = sum(outcome.passed is True and SECTIONS[outcome.section].proves for outcome in outcomes)
    total = f"{sum(outcome.seconds for outcome in outcomes):.0f} s"
    if wrong:
        lines.append(f"\n**Verdict: not right here. Failed: {', '.join(wrong)}.** {total}.")
    elif not proven:
        lines.append(f"\n**Verdict: nothing was proven here.** {total}.")
    else:
        lines.append(f"\n**Verdict: right as on the CPU, by {proven} section{'s' * (proven > 1)}.** {total}.")
    if others:
        lines.append(f"Could not be measured: {', '.join(others)}.")
    return "\n".join(lines)


def inside(name: str, asked: Asked) -> int:
    """Run a section in this process; its result is the last line."""
    if asked.device == SIMULATED:
        from support.simdevice import device

        assert device.library is not None
    passed, said = SECTIONS[name].run(asked)
    print(f"\n{ENDING}{json.dumps([passed, said])}", flush=True)
    return 0


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", default="auto", help="cuda, another kind that torch knows, or sim [what torch finds]"
    )
    parser.add_argument(
        "--sections", default="", help=f"all, proving, or some of {', '.join(SECTIONS)} [all; proving on sim]"
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="after which nothing runs any more [9.5]")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to try this script")
    parser.add_argument("--cases", default="", help="words of cases to run, apart by commas, or `few` [as time allows]")
    parser.add_argument("--inside", choices=list(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path(), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
