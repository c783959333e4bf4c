"""Packed folders changed by chance or by intent, loaded and multiplied from, with kernels that watch every access.

Run as a script it is the process that may crash: `mutations.py SEED COUNT` prints how the folders ended, as JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from coprune.base.errors import BadInput
from coprune.base.native.build import load_kernels
from coprune.model.checkpoint.load import quiet_transformers
from coprune.packed.folder import pack, unpack
from coprune.packed.header import CHECKSUM_AT, CHECKSUM_END
from coprune.packed.quantizer import load_packed

FILE = "model.safetensors"
Blobs = dict[str, Tensor]


def make_folder(folder: Path) -> Path:
    """A small packed model with biases, half of its matrices 2:4."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4, attention_bias=True))
    for number, parameter in enumerate(model.parameters()):
        if parameter.ndim == 2 and number % 2:
            smallest = parameter.detach().abs().reshape(-1, 4).argsort(dim=1)[:, :2]
            parameter.data.view(-1, 4).scatter_(1, smallest, 0.0)
        elif parameter.ndim == 2:
            parameter.data.masked_fill_(torch.rand(parameter.shape) < 0.6, 0.0)
    with quiet_transformers():
        model.save_pretrained(folder / "dense")
    pack(folder / "dense", folder / "packed")
    return folder / "packed"


def _anywhere(folder: Path, chance: random.Random) -> None:
    """Some bytes of the file, wherever they are."""
    data = bytearray((folder / FILE).read_bytes())
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] = chance.randrange(256)
    (folder / FILE).write_bytes(data)


def _in_the_header(folder: Path, chance: random.Random) -> None:
    """Some bytes of the JSON at the beginning, or its length."""
    data = bytearray((folder / FILE).read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    for _ in range(chance.randint(1, 4)):
        data[chance.randrange(end)] = chance.choice(b'0123456789{}[],:"aF \x00\xff')
    (folder / FILE).write_bytes(data)


def _length(folder: Path, chance: random.Random) -> None:
    """Cut off, or longer."""
    data = (folder / FILE).read_bytes()
    data = data[: chance.randrange(len(data))] if chance.random() < 0.7 else data + chance.randbytes(100)
    (folder / FILE).write_bytes(data)


def _signed(folder: Path, chance: random.Random) -> None:
    """Bytes of a packed tensor's own header or bitmask, with a checksum that is right again."""
    blobs = load_file(folder / FILE)
    for name in chance.sample(sorted(blobs), 3):
        blob = blobs[name].numpy() if blobs[name].dtype == torch.uint8 else None
        if blob is None or bytes(blob[:7]) != b"COPRUNE":
            continue
        for _ in range(chance.randint(1, 3)):
            place = chance.choice([10, 11, 12, 13, 14, *range(24, 48), *range(64, 128), chance.randrange(len(blob))])
            blob[place] = chance.choice([0, 1, 2, 4, 32, 48, 64, 255, chance.randrange(256)])
        _sign(blob)
    save_file(blobs, folder / FILE, metadata={"format": "pt"})


def _sign(blob: Any) -> None:
    checksum = zlib.crc32(blob[CHECKSUM_END:].tobytes(), zlib.crc32(blob[:CHECKSUM_AT].tobytes()))
    struct.pack_into("<I", blob.data, CHECKSUM_AT, checksum)


def _swapped(folder: Path, chance: random.Random) -> None:
    """Tensors under other names, twice under two spellings, or left out."""
    blobs = load_file(folder / FILE)
    one, other = chance.sample(sorted(blobs), 2)
    kind = chance.randrange(4)
    if kind == 0:
        blobs[one], blobs[other] = blobs[other], blobs[one]
    elif kind == 1:
        blobs[one.removeprefix("model.")] = blobs[other].clone()
    elif kind == 2:
        blobs[one] = blobs[one][: chance.randrange(len(blobs[one]) + 1)].clone()
    else:
        del blobs[one]
    save_file(blobs, folder / FILE, metadata={"format": "pt"})


def _settings(folder: Path, chance: random.Random) -> None:
    """Values of the configuration, or bytes of what packing replaced."""
    if chance.random() < 0.5:
        config = json.loads((folder / "config.json").read_text())
        name = chance.choice([name for name, value in config.items() if isinstance(value, int)])
        config[name] = chance.choice([0, 1, 2, 3, 8, 64, -1, 2**31, 10**9])
        (folder / "config.json").write_text(json.dumps(config))
    else:
        data = bytearray((folder / "coprune_packed.json").read_bytes())
        data[chance.randrange(len(data))] = chance.randrange(256)
        (folder / "coprune_packed.json").write_bytes(data)


MUTATIONS: list[Callable[[Path, random.Random], None]] = [
    *(_anywhere, _in_the_header, _length, _signed, _swapped, _signed, _settings, _signed, _swapped, _anywhere),
]


def _outcome(folder: Path, expected: Tensor) -> str:
    """How a folder ends: refused by coprune, by transformers, the same answers, or others."""
    tokens = torch.arange(20)[None]
    ends = []
    for use in (lambda: load_packed(folder)(tokens).logits, lambda: unpack(folder, folder.parent / "out")):
        try:
            with quiet_transformers(), torch.no_grad():
                found = use()
            same = not isinstance(found, Tensor) or (found.shape == expected.shape and torch.equal(found, expected))
            ends.append("the same" if same else "other answers")
        except BadInput:
            ends.append("refused")
        except (MemoryError, RecursionError, AssertionError):
            raise
        except Exception as error:
            ends.append(f"refused by {type(error).__name__}")
        finally:
            shutil.rmtree(folder.parent / "out", ignore_errors=True)
    return ends[0] if ends[0] != "the same" else ends[1]


def attack(seed: int, count: int) -> dict[str, int]:
    """Change a folder `count` times, each time from the whole one, and use it."""
    torch.set_num_threads(1)
    assert load_kernels() is not None, "without kernels there is nothing to watch"
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        whole = make_folder(Path(place))
        with torch.no_grad():
            expected = load_packed(whole)(torch.arange(20)[None]).logits
        for number in range(seed, seed + count):
            folder = Path(place) / "changed"
            shutil.copytree(whole, folder)
            MUTATIONS[number % len(MUTATIONS)](folder, random.Random(number))
            print(number, file=sys.stderr, flush=True)  # which one it was, if this is the last line
            ends[_outcome(folder, expected)] += 1
            shutil.rmtree(folder)
    return dict(ends)


def _library(name: str) -> str:
    """The path of one of the compiler's libraries; the bare name where it has none."""
    asked = ["g++", f"-print-file-name={name}"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def watched(seed: int, count: int, place: Path) -> tuple[dict[str, int], str]:
    """The same in a process whose kernels are built under the address sanitiser, where the compiler has it.

    Returns how the folders ended and what watched. Raises RuntimeError if the process crashed.
    """
    library = _library("libasan.so")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COPRUNE_CACHE": str(place / "kernels")}
    if Path(library).is_absolute():
        compiler = place / "sanitising-compiler"
        compiler.write_text('#!/bin/sh\nexec env -u LD_PRELOAD g++ -fsanitize=address "$@" -O1\n')
        compiler.chmod(0o700)
        # The second, since the first looks for its exceptions when the process starts.
        environment |= {"CXX": str(compiler), "LD_PRELOAD": f"{library} {_library('libstdc++.so.6')}"}
        environment |= {"ASAN_OPTIONS": "detect_leaks=0:exitcode=99:allocator_may_return_null=1"}
    script = [sys.executable, __file__, str(seed), str(count)]
    run = subprocess.run(script, env=environment, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        last = run.stderr.partition("AddressSanitizer")
        told = f"{last[0][-100:]}{last[1]}{last[2][:1500]}" if last[1] else run.stderr[-1500:]
        raise RuntimeError(f"a folder ended the process ({run.returncode}): {told}")
    ends: dict[str, int] = json.loads(run.stdout.splitlines()[-1])
    return ends, "address sanitiser" if Path(library).is_absolute() else "no sanitiser"


if __name__ == "__main__":
    print(json.dumps(attack(int(sys.argv[1]), int(sys.argv[2]))))
