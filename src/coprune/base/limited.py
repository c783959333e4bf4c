"""Render untrusted templates in a child process with limits on memory and time."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import threading
import weakref
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from coprune.base.child import begin_child, end_child, fork

Render = Callable[..., str]
SECONDS = 10
"""Time limit per text."""
_MORE_BYTES = 1 << 30  # of memory, in addition to what the process already uses
_IDLE_SECONDS = 5
_LONGEST, _TIMES = 1_000_000, 100
"""Maximum number of characters of a text, and the allowance per byte of its arguments."""
Key = TypeVar("Key")


class Exceeded(ValueError):
    """Rendering a text exceeded the limits on time, memory or length."""


class Child:
    """A child process that renders texts, and exits after being idle.

    Args:
        render: renders a text; runs in the child.
        state: identifies the renderer's state, so that a caller notices a change.
    """

    def __init__(self, render: Render, state: str) -> None:
        self.state = state
        self._lock = threading.Lock()
        (asked, ask), (told, tell) = os.pipe(), os.pipe()
        self._process = fork()
        if self._process == 0:
            _serve(render, asked, tell)
        os.close(asked)
        os.close(tell)
        self._ask, self._told = os.fdopen(ask, "wb"), os.fdopen(told, "rb")
        weakref.finalize(self, _end, self._process, self._ask, self._told)

    def ask(self, question: bytes) -> list[str | None] | None:
        """Return the result of `_rendered`, or None if the child has exited. question: pickled arguments."""
        with self._lock, suppress(BrokenPipeError):
            self._ask.write(len(question).to_bytes(8, "little") + question)
            self._ask.flush()
            line = self._told.readline()
            return list(json.loads(line)) if line.endswith(b"\n") else None
        return None


def render_limited(
    children: MutableMapping[Key, Child], key: Key, render: Render, arguments: tuple[Any, ...], state: str = ""
) -> str:
    """Return `render(*arguments)`, computed in a child process with limits on memory, time and length.

    Args:
        children: the running children.
        key: of the child to use; it is started if it is missing or has exited.
        render: renders the text.
        arguments: of `render`, picklable.
        state: of the renderer; a child with another state is replaced.

    Raises:
        ValueError: the renderer's error.
        Exceeded: it exceeded a limit.
    """
    child, question = children.get(key), pickle.dumps(arguments)
    found = child.ask(question) if child is not None and child.state == state else None
    if found is None:  # or it exited after being idle
        child = children[key] = Child(render, state)
        found = child.ask(question)
    if found is None:
        raise Exceeded(f"it takes more than {SECONDS} seconds or a gigabyte of memory, or crashes")
    text, error, limit = found
    if limit is not None:
        raise Exceeded(limit)
    if error is not None:
        raise ValueError(error)
    return str(text)


def _end(process: int, *streams: BinaryIO) -> None:
    for stream in streams:
        with suppress(OSError):
            stream.close()
    end_child(process)


def _serve(render: Render, asked: int, tell: int) -> None:
    """Answer each request with a line until the input ends, then exit."""
    try:
        begin_child(asked, tell)
        _limit_memory()
        with os.fdopen(asked, "rb") as questions, os.fdopen(tell, "wb") as answers:
            signal.alarm(_IDLE_SECONDS)
            while length := int.from_bytes(questions.read(8), "little"):
                question = questions.read(length)
                signal.alarm(SECONDS)
                answers.write(json.dumps(_rendered(render, question)).encode() + b"\n")
                answers.flush()
                signal.alarm(_IDLE_SECONDS)
    finally:
        os._exit(0)


def _limit_memory() -> None:
    with suppress(OSError, ValueError):  # this system does not report memory use, or has no such limit
        now = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        most = now + _MORE_BYTES if hard == resource.RLIM_INFINITY else min(now + _MORE_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _rendered(render: Render, question: bytes) -> tuple[str | None, str | None, str | None]:
    """Return the text, the error, and the limit that was exceeded, two of them None."""
    try:
        text = str(render(*pickle.loads(question)))
    except MemoryError:
        return None, None, "it takes more than a gigabyte of memory"
    except Exception as error:  # a template is untrusted code and may raise anything
        return None, " ".join(str(error).split())[:200] or type(error).__name__, None
    if len(text) > _LONGEST + _TIMES * len(question):
        return None, None, f"it turns a few words into {len(text):,} characters"
    return text, None, None
