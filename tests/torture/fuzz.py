"""Randomly and maliciously changed tokenizers, chat templates and configurations: each works or is refused with one message.

Every folder is pruned and generates text in a child with limits on time and memory, which must exit without a traceback.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import coprune
from support.forking import forked
from support.pico_folder import save_pico, write_words

SECONDS = 120
MORE_BYTES = 4 << 30
_ODD: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        64,
        255,
        10**6,
        10**8,
        2**31,
        2**63,
        10**30,
        0.0,
        -1.5,
        1e308,
        float("nan"),
    ),
    *(
        "",
        "a",
        "x" * 100_000,
        "\ud83d",
        "../../etc/passwd",
        "Sequence",
        "Replace",
        [],
        {},
        [[]],
        [{}],
        {"a": 1},
        [0] * 1000,
    ),
]
_STEPS: list[dict[str, Any]] = [
    *({"type": "Replace", "pattern": {"String": "w"}, "content": "w" * n} for n in (0, 2, 100)),
    *({"type": "Replace", "pattern": {"Regex": one}, "content": "ww"} for one in (".", "", "(w+)+$", r"\p{L}", "(")),
    *({"type": one} for one in ("NFKC", "Lowercase", "Strip", "ByteLevel", "Nmt", "Precompiled", "BertNormalizer")),
    {"type": "Prepend", "prepend": "w" * 50},
]
_PIECES = [
    *("{{ messages[0]['content'] }} ", "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"),
    *(
        "{{ 'x' * NUMBER }}",
        "{{ '%NUMBERd' % 1 }}",
        "{{ messages | tojson(indent=NUMBER) }}",
        "{{ 'x'.ljust(NUMBER) }}",
    ),
    *(
        "{% for a in range(NUMBER) %}{{ a }}{% endfor %}",
        "{{ NUMBER ** NUMBER }}",
        "{{ range(NUMBER) | list | length }}",
    ),
    *(
        "{% set x = namespace(y='w') %}{% for a in range(60) %}{% set x.y = x.y ~ x.y %}{% endfor %}{{ x.y }}",
        "{{ a.b.c }}",
    ),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ ''.__class__.__mro__ }}", "{% include 'a' %}"),
    "{{ raise_exception('no') }}",
    *(
        "{% for",
        "}}",
        "{{ messages | sort(attribute='x') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ lipsum(n=NUMBER) }}",
        "\0",
    ),
]


def _anywhere(value: Any, chance: random.Random) -> tuple[Any, Any]:
    """Return a random place in nested lists and mappings: its container and key."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = chance.choice(keys)
        inner = value[key]
        if not isinstance(inner, dict | list) or not inner or chance.random() < 0.3:
            return value, key
        value = inner


def _values(file: Path, chance: random.Random) -> None:
    """Change or delete random values of a JSON file, or change bytes."""
    if chance.random() < 0.15:
        data = bytearray(file.read_bytes())
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        file.write_bytes(data)
        return
    content = json.loads(file.read_text(encoding="utf-8"))
    for _ in range(chance.randint(1, 3)):
        holder, key = _anywhere(content, chance)
        if chance.random() < 0.2 and len(holder) > 1:
            del holder[key]
        else:
            holder[key] = chance.choice(_ODD)
        if not content:
            break
    file.write_text(json.dumps(content))


def _config(folder: Path, chance: random.Random) -> None:
    _values(folder / "config.json", chance)


def _tokenizer(folder: Path, chance: random.Random) -> None:
    """Add steps to a tokenizer, or change values."""
    file = folder / chance.choice(["tokenizer.json", "tokenizer.json", "tokenizer_config.json"])
    if chance.random() < 0.5 or file.name != "tokenizer.json":
        _values(file, chance)
        return
    content = json.loads(file.read_text(encoding="utf-8"))
    content["normalizer"] = {"type": "Sequence", "normalizers": chance.choices(_STEPS, k=chance.randint(1, 30))}
    file.write_text(json.dumps(content))


def _template(folder: Path, chance: random.Random) -> None:
    """Write a chat template of random pieces."""
    pieces = "".join(chance.choices(_PIECES, k=chance.randint(1, 3)))
    if chance.random() < 0.3:
        pieces = "{% for b in range(99999) %}" * chance.randint(1, 3) + pieces
        pieces += "{% endfor %}" * pieces.count("{% for b")
    number = str(chance.choice([3, 1000, 10**5, 10**7, 10**10, 10**20]))
    (folder / "chat_template.jinja").write_text(pieces.replace("NUMBER", number))


CHANGES: dict[str, Callable[[Path, random.Random], None]] = {
    "tokenizers": _tokenizer,
    "chat templates": _template,
    "configurations": _config,
}


def _use(folder: Path, place: Path) -> None:
    """Prune a folder in this process, and generate text with the dense and the pruned model."""
    torch.set_num_threads(1)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MORE_BYTES, now + MORE_BYTES))
    signal.alarm(SECONDS)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    settings: dict[str, Any] = {"dataset": str(place / "words.txt"), "nsamples": 2, "seqlen": 16, "device": "cpu"}
    settings |= {"generate": str(place / "ask.jsonl"), "generate_tokens": 4, "method": "magnitude", "evaluate": False}
    try:
        coprune.prune(str(folder), save=place / "run", quiet=True, **settings)
    except coprune.CopruneError as error:
        message = str(error)
        if "\n" in message or len(message) > 2000:
            print(f"a long message: {message[:3000]!r}", file=sys.stderr)
            sys.exit(4)
        sys.exit(3)


def attack(kind: str, seed: int, count: int) -> tuple[dict[str, int], list[str]]:
    """Change and use a folder `count` times, each time from the original; return counts of outcomes, and failures."""
    ends, bad = Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        whole, folder, said = save_pico(place / "whole", num_hidden_layers=2), place / "changed", place / "said.txt"
        write_words(place / "words.txt", 300)
        (place / "ask.jsonl").write_text('{"prompt": "w5 w6"}\n')
        for number in range(seed, seed + count):
            shutil.copytree(whole, folder)
            CHANGES[kind](folder, random.Random(f"{kind} {number}"))
            code = os.waitstatus_to_exitcode(os.waitpid(forked(lambda: _heard(folder, place, said)), 0)[1])
            ends[{0: "used", 3: "refused"}.get(code, "wrong")] += 1
            if code not in (0, 3):
                bad.append(f"{kind} {number}: ended with {code}: {said.read_text(errors='replace')[-1500:]}")
            shutil.rmtree(folder)
            shutil.rmtree(place / "run", ignore_errors=True)
    return dict(ends), bad


def _heard(folder: Path, place: Path, said: Path) -> None:
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
    _use(folder, place)
