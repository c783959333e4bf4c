"""Torture tests: python tests/torture/run_torture.py [--quick] [--only PART] [--seed N].

100 changed tokenizers, chat templates and configurations each, used for pruning; 160 runs killed once or twice, half at random
moments and half at system calls, and 24 on a disk that is full at a random byte, each restarted and compared
byte by byte with an undisturbed one; 40 commands stopped by SIGTERM; a dozen kinds of
hostile surroundings. docs/reliability.md has the results.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from torture.fuzz import CHANGES, attack
from torture.kills import Undisturbed
from torture.stops import Stopped
from torture.surroundings import ATTACKS, make_place


def main() -> int:
    """Run everything and print a table; return 1 on any failure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument(
        "--only", choices=["files", "runs", "disks", "stops", "surroundings", *ATTACKS], help="one part of it"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    part = 10 if options.quick else 1
    started = time.monotonic()
    print(f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()} with {os.cpu_count()} cores, {platform.system()}")
    bad = []
    with tempfile.TemporaryDirectory() as place:
        for kind in CHANGES if options.only in (None, "files") else ():
            ends, wrong = attack(kind, options.seed, 100 // part)
            print(f"{100 // part} changed {kind}: {', '.join(f'{n} {end}' for end, n in ends.items())}", flush=True)
            bad += wrong
        if options.only in (None, "runs", "disks"):
            undisturbed = Undisturbed(Path(place) / "runs")
            for how, count in (("kills", 80), ("kills at calls", 80), ("filled disks", 24)):
                if options.only != "disks" or how == "filled disks":
                    bad += _disturbances(undisturbed, options.seed, count // part, how)
        if options.only in (None, "stops"):
            ends, wrong = Stopped(Path(place) / "stops").stop(40 // part, options.seed)
            print(f"{40 // part} commands stopped: {', '.join(f'{n} {end}' for end, n in ends.items())}", flush=True)
            bad += wrong
        for name, attack_in in ATTACKS.items():
            if options.only in (None, "surroundings", name):
                began, wrong = time.monotonic(), attack_in(make_place(Path(place) / name))
                print(f"{name}: {'; '.join(wrong) or 'as promised'} ({time.monotonic() - began:.0f} s)", flush=True)
                bad += [f"{name}: {one}" for one in wrong]
    for line in bad:
        print(f"NOT AS PROMISED: {line}")
    print(f"{len(bad)} things were not as promised; {(time.monotonic() - started) / 60:.0f} minutes.")
    return 1 if bad else 0


def _disturbances(undisturbed: Undisturbed, seed: int, count: int, how: str) -> list[str]:
    bad, times = [], Counter[str]()
    for number in range(count):
        name = list(undisturbed.works)[number % len(undisturbed.works)]
        hit, wrong = undisturbed.disturbed(name, random.Random(f"{seed} {how} {number}"), how)
        times[name] += hit
        for one in wrong:
            bad.append(f"{name}, {how} {number}: {one}")
            print(bad[-1], flush=True)
        if number % 10 == 9 or number == count - 1:
            told = ", ".join(f"{hits} × {name}" for name, hits in times.items())
            print(f"{number + 1} runs, {times.total()} {how} ({told}); {len(bad)} not as promised", flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main())
