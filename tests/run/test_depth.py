"""A small version of benchmarks/depth.py: peak memory does not grow with depth, and may be below the model's size."""

from __future__ import annotations

import argparse
import resource
import sys
from pathlib import Path

import pytest
import torch
from depth import prune
from synthetic import write_llama, write_words

from support.limits import data_of_imports

MIB = 1 << 20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory on Linux only")
def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    arguments = argparse.Namespace(nsamples=2, seqlen=32, eval_tokens=0)
    words = write_words(tmp_path / "words.txt")
    write_llama(tmp_path / "shallow", 4, 512, torch.float32)
    size = write_llama(tmp_path / "deep", 64, 512, torch.float32)
    shallow = prune(arguments, tmp_path / "shallow", words, "wanda")
    room = 320 * MIB  # 60 unreleased blocks of 12 MiB would not fit
    deep = prune(arguments, tmp_path / "deep", words, "wanda", {resource.RLIMIT_DATA: data_of_imports() + room})
    assert size > 2 * room
    assert deep["sparsity"]["matrices"] == pytest.approx(0.5, abs=1e-4)
    assert deep["peak_memory_bytes"] < 1.1 * shallow["peak_memory_bytes"]
