"""Malicious chat templates that exhaust memory or time give one message, and the process continues."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from coprune.base import limited
from coprune.base.errors import BadInput
from coprune.data import rendering
from coprune.data.conversations import template_text
from coprune.data.rendering import render
from support.pico_folder import pico_tokenizer

SAID = [{"role": "user", "content": "w5"}]
GOOD = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w8{% endif %}"
)


def with_template(template: str) -> Any:
    made = pico_tokenizer()
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 'x' * 10**11 }}", "memory"),
        ("{{ '%100000000000d' % 1 }}", "memory"),
        ("{{ messages | tojson(indent=10**11) }}", "memory"),
        ("{{ 'x' * 2 * 10**6 }}", "2,000,000 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ raise_exception('no prompts here') }}", "no prompts here"),
        ("{% for %}", "Expected an expression"),
    ],
)
def test_a_template_that_takes_too_much_or_fails_is_one_message(template: str, said: str) -> None:
    with pytest.raises(BadInput, match=rf"chat template fails on prompt 3: .*{said}"):
        template_text(SAID, with_template(template), "prompt 3")


@pytest.mark.parametrize(
    "template", ["{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 7**(10**8) }}"]
)
def test_a_template_that_takes_too_long_is_ended(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited, "SECONDS", 1)
    tokenizer, started = with_template(template), time.monotonic()
    with pytest.raises(BadInput, match="it takes more than 1 seconds"):
        template_text(SAID, tokenizer, "row 1")
    assert time.monotonic() - started < 10
    tokenizer.chat_template = GOOD
    assert render(tokenizer, SAID, answers=False) == "user w5 "


def test_one_child_renders_the_same_texts_as_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    forks: list[int] = []
    fork = os.fork

    def counted() -> int:
        forks.append(1)
        return fork()

    monkeypatch.setattr(os, "fork", counted)
    tokenizer = with_template(GOOD)
    for number in range(5):
        said = [{"role": "user", "content": f"w{number} ä\ud83d"}]
        expected = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        assert render(tokenizer, said, answers=True) == expected
    assert len(forks) == 1
    tokenizer.chat_template = "other"
    assert render(tokenizer, SAID, answers=True) == "other"
    child = rendering._CHILDREN[tokenizer]
    os.kill(child._process, 9)  # as after a long idle time
    assert render(tokenizer, SAID, answers=True) == "other"


def test_a_child_holds_no_file_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise locks would outlive the process that took them."""
    read, write = os.pipe()
    tokenizer = with_template(GOOD)
    render(tokenizer, SAID, answers=True)
    os.close(write)
    assert os.read(read, 1) == b""  # no other process holds its other end
    os.close(read)
