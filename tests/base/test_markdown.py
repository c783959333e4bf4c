"""Foreign names and settings stay plain text in a model card."""

from __future__ import annotations

import re

import pytest
import yaml

from coprune.base.markdown import fenced, front_matter, inline

NAMES = [
    "a/b: c",
    "a/b\nlicense: mit",
    "a/b # c",
    "'a/b",
    '"a/b',
    "a/{b}",
    "a/[b",
    "- a/b",
    "a/b\n---\nx",
    "ü/ß",
    "a/*b",
    "no/yes",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_the_metadata_is_one_value(name: str) -> None:
    facts = {"library_name": "transformers", "base_model": name, "tags": ["pruning"]}
    first, *lines, last = front_matter(facts).splitlines()
    assert first == last == "---"
    assert not any(line.startswith("---") for line in lines)
    assert yaml.safe_load("\n".join(lines)) == facts


@pytest.mark.parametrize("content", ["x: 1\n", "x: |\n  ```\n  # mine\n  ```\n", "`````\n", "````` `` ```"])
def test_fenced_content_cannot_close_its_fence(content: str) -> None:
    lines = fenced(content, "yaml").splitlines()
    fence = lines[0].removesuffix("yaml")
    assert set(fence) == {"`"}
    assert lines[-1] == fence
    assert not any(re.match(rf"\s*{fence}", line) for line in lines[1:-1])
    assert "\n".join(lines[1:-1]) == content.rstrip()


@pytest.mark.parametrize("text", ["a | b", "a\n\n# b", "`a`", "<img src=x onerror=alert(1)>", "[a](http://b)", "**a**"])
def test_text_within_a_line_starts_no_markup(text: str) -> None:
    written = inline(text)
    assert "\n" not in written
    assert not re.search(r"(?<!\\)[`|<>\[\]*]", written)


def test_brackets_of_an_interval_stay_as_they_are() -> None:
    assert inline("1.02 [0.99, 1.05]") == "1.02 [0.99, 1.05]"
    assert inline("[1](http://b)") == "\\[1\\](http://b)"
