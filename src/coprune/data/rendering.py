"""Chat templates, rendered with limits on memory and time.

A template is a program that comes with a model. transformers runs it in jinja2's sandbox, which still allows loops in loops,
`'x' * 10**10` and an indent of as many spaces. So it runs in a limited child process, which ends when it is idle.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
SECONDS = 10
"""A text is rendered in less."""
_MORE_BYTES = 1 << 30  # of memory, beside what the process has already
_IDLE_SECONDS = 5
_MOST = (1_000_000, 100)
"""Characters of a rendered text: so many, and so many more for each of the messages'."""


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], answers: bool, open_end: bool = False
) -> str:
    """Apply a tokenizer's chat template to messages, in a limited process.

    Args:
        tokenizer: one with a chat template.
        messages: role and content of each.
        answers: whether an answer of the assistant is to follow.
        open_end: whether the last message is left open, to be continued.

    Returns:
        The text.

    Raises:
        ValueError: the template's error, or that it exceeded the limits.
    """
    child, state = _CHILDREN.get(tokenizer), repr((tokenizer.chat_template, tokenizer.special_tokens_map))
    question = [list(messages), answers, open_end]
    found = child.ask(question) if child is not None and child.state == state else None
    if found is None:  # or it ended meanwhile, since nobody asked for long
        child = _CHILDREN[tokenizer] = _Child(tokenizer, state)
        found = child.ask(question)
    if found is None:
        raise ValueError(f"it takes more than {SECONDS} seconds or a gigabyte of memory, or crashes")
    text, error = found
    if error is not None:
        raise ValueError(error)
    return str(text)


class _Child:
    """A child of this process that renders, for as long as it is asked."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, state: str) -> None:
        self.state = state
        self._lock = threading.Lock()
        (asked, ask), (told, tell) = os.pipe(), os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # of forking beside threads: the child uses none of them
            self._process = os.fork()
        if self._process == 0:
            _serve(tokenizer, asked, tell)
        os.close(asked)
        os.close(tell)
        self._ask, self._told = os.fdopen(ask, "wb"), os.fdopen(told, "rb")
        weakref.finalize(self, _end, self._process, self._ask, self._told)

    def ask(self, question: Any) -> list[str | None] | None:
        """Return the process's answer, or None if it ended meanwhile."""
        with self._lock, suppress(BrokenPipeError):
            self._ask.write(json.dumps(question).encode() + b"\n")
            self._ask.flush()
            line = self._told.readline()
            return list(json.loads(line)) if line.endswith(b"\n") else None
        return None


_CHILDREN: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, _Child] = weakref.WeakKeyDictionary()


def _end(process: int, *streams: BinaryIO) -> None:
    for stream in streams:
        with suppress(OSError):
            stream.close()
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _serve(tokenizer: PreTrainedTokenizerBase, asked: int, tell: int) -> None:
    """Render what is asked, one line each, until nobody asks any more; in a process of its own, which ends here."""
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        # The child must not inherit this process's locks and pipes.
        edges = [2, *sorted((asked, tell)), resource.getrlimit(resource.RLIMIT_NOFILE)[0]]
        for before, after in pairwise(edges):
            os.closerange(before + 1, min(after, 1 << 16))
        _limit_memory()
        with os.fdopen(asked, "rb") as questions, os.fdopen(tell, "wb") as answers:
            signal.alarm(_IDLE_SECONDS)
            for line in questions:
                signal.alarm(SECONDS)
                answers.write(json.dumps(_rendered(tokenizer, *json.loads(line))).encode() + b"\n")
                answers.flush()
                signal.alarm(_IDLE_SECONDS)
    finally:
        os._exit(0)


def _limit_memory() -> None:
    with suppress(OSError, ValueError):  # a system that does not tell how much this process has, or has no such limit
        now = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        most = now + _MORE_BYTES if hard == resource.RLIM_INFINITY else min(now + _MORE_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], answers: bool, open_end: bool
) -> tuple[str | None, str | None]:
    """Return the text, or the error."""
    most = _MOST[0] + _MOST[1] * sum(len(message["content"]) for message in messages)
    options: dict[str, Any] = {"add_generation_prompt": answers, "continue_final_message": open_end}
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except MemoryError:
        return None, "it takes more than a gigabyte of memory"
    except Exception as error:  # a template is a program of somebody else's: whatever it raises
        return None, " ".join(str(error).split())[:200] or type(error).__name__
    return (text, None) if len(text) <= most else (None, f"it makes {len(text):,} characters of a few words")
