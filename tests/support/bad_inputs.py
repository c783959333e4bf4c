"""Bad inputs in Python and on the command line, with their messages (`bad_inputs.yaml`)."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

import coprune
from support.pico_folder import save_pico, write_words

TABLE = Path(__file__).with_suffix(".yaml")
# Default settings of every case of `prune`. The command streams models, Python loads them.
PRUNE: dict[str, Any] = {"model": "model", "dataset": "words.txt", "seqlen": 32, "nsamples": 4, "stream": None}
PRUNE_COMMAND = ["--dataset", "words.txt", "--seqlen", "32", "--nsamples", "4"]
_QUIET = ("prune", "eval", "inspect", "compare", "finetune", "export")
_CALLS: dict[str, Callable[..., Any]] = {
    "evaluate": lambda **settings: coprune.evaluate(**settings, quiet=True),
    "compare": lambda **settings: coprune.compare(**settings, quiet=True),
    "prune": lambda **settings: coprune.prune(**{**PRUNE, **settings}, quiet=True),
    "finetune": lambda **settings: coprune.finetune(**settings, quiet=True),
    "generate": lambda **settings: coprune.generate(**settings, quiet=True),
    "bench": coprune.bench,
    "export": lambda **settings: coprune.export(**settings, quiet=True),
}


@dataclass(frozen=True)
class BadInputCase:
    """One bad input. A text is the whole message, in which `<any>` stands for machine-dependent parts."""

    name: str
    text: str
    """The message in Python, or on the command line if there is no other."""
    call: str = "prune"
    """The Python function."""
    python: dict[str, Any] | None = None
    """Its arguments; None if the case only exists on the command line."""
    command: str | None = None
    """The same on the command line: a whole line, or the rest after `coprune prune model …`. None for Python only."""
    flags: str | None = None
    """The message on the command line, if it differs."""
    field: str | None = None
    """The setting named by the error."""
    error: str = "BadInput"

    def ask(self) -> Any:
        """Make the call in Python."""
        assert self.python is not None
        return _CALLS[self.call](**self.python)

    def arguments(self) -> list[str]:
        """Return the words after `coprune`, with `--quiet` if the command has it."""
        assert self.command is not None
        words = shlex.split(self.command)
        name, *rest = words[1:] if words[0] == "coprune" else ["prune", "model", *PRUNE_COMMAND, *words]
        # First, so that a final option without its value still lacks it.
        return [name, *(["--quiet"] if name in _QUIET else []), *rest]

    @property
    def on_command_line(self) -> str:
        """The message on the command line."""
        return self.text if self.flags is None else self.flags


def read_cases() -> dict[str, BadInputCase]:
    """Return all cases by name."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return {name: BadInputCase(name, **case) for name, case in table.items()}


def says(text: str, expected: str) -> bool:
    """Return whether a text matches the expected one."""
    return re.fullmatch(re.escape(expected).replace("<any>", ".+"), text) is not None


def make_place(folder: Path) -> None:
    """Fill a folder with a model, a text, and obstacles, which no case may change."""
    model = save_pico(folder / "model")
    write_words(folder / "words.txt")
    (folder / "short.txt").write_text("w5 w6 w7")
    (folder / "empty").mkdir()
    (folder / "occupied").mkdir()
    (folder / "occupied" / "thesis.txt").write_text("mine")
    (folder / "finished").mkdir()
    (folder / "finished" / "recipe.yaml").write_text("model: model\n")
    (folder / "finished" / "report.json").write_text("{}")
    (folder / "broken.yaml").write_text("model: [unclosed\n")
    (folder / "list.yaml").write_text("- model\n")
    (folder / "unknown.yaml").write_text("model: model\nsparsitty: 0.5\n")
    (folder / "wrong.yaml").write_text("model: model\nnsamples: plenty\noptions: {group: column}\n")
    (folder / "allocation.yaml").write_text('"*": 0.5\n')
    (folder / "questions.jsonl").write_text('{"prompt": "w5 w6"}\n{"question": "w7"}\n')
    (folder / "nothing.jsonl").write_text("\n")
    (folder / "good.jsonl").write_text('{"prompt": "w5 w6"}\n')
    for name in ("truncated", "shardless", "nan", "configless", "garbled", "templated"):
        (folder / name).mkdir()
        for file in model.iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
    _damage(folder, model)


def _damage(folder: Path, model: Path) -> None:
    (folder / "templated" / "chat_template.jinja").write_text("{{ raise_exception('no prompts here') }}")
    shards = sorted(path.name for path in model.glob("*.safetensors"))
    assert len(shards) > 1
    whole = (model / shards[-1]).read_bytes()
    (folder / "truncated" / shards[-1]).write_bytes(whole[: len(whole) // 2])
    (folder / "shardless" / shards[-1]).unlink()
    (folder / "configless" / "config.json").unlink()
    (folder / "garbled" / "config.json").write_text("{")
    name = "model.layers.1.mlp.down_proj.weight"
    index = json.loads((model / "model.safetensors.index.json").read_text())
    shard = folder / "nan" / index["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][3, 5] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
