"""Ollama's `Modelfile` for a GGUF file: its stop tokens, and its chat template if a Go version of it is proven equal.

Ollama does not run the Jinja template in a GGUF file. It looks for a similar one among the templates that it knows, and passes
the user's text on unchanged if there is none; a TEMPLATE in the Modelfile takes precedence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coprune.base.files import write_text
from coprune.base.limited import Child, render_limited
from coprune.model.checkpoint.gguf_reader import gguf_reader
from coprune.model.transformers_private import rendered_chat

FILE = "Modelfile"
_STOPS = ("eos", "eot", "eom")
"""Metadata names of tokens that end an answer."""
_ROLES = ("system", "user", "assistant")
_ONE, _OTHER, _LAST = "Hello there", "What is 2+2?", "And 3+3?"
Messages = Sequence[Mapping[str, str]]


def _talk(*said: tuple[str, str]) -> Messages:
    return [{"role": role, "content": content} for role, content in said]


SAMPLES: tuple[Messages, ...] = (
    _talk(("user", _ONE)),
    _talk(("system", "Be brief."), ("user", _ONE)),
    _talk(("user", _ONE), ("assistant", _OTHER), ("user", _LAST)),
    _talk(
        ("system", "Be brief."),
        ("user", _ONE),
        ("assistant", "Hi."),
        ("user", _OTHER),
        ("assistant", "4"),
        ("user", _LAST),
    ),
)
"""Conversations to compare the two templates on."""


@dataclass(frozen=True)
class Turns:
    """A chat template, as texts around each message."""

    around: Mapping[str, tuple[str, str]]
    """Texts before and after a message, by its role."""
    answer: str
    """Text that begins an answer."""
    unasked: str = ""
    """Text at the beginning if there is no system message."""

    def render(self, messages: Messages) -> str:
        """Render a conversation as the model reads it, up to its answer."""
        first = "" if messages[0]["role"] == "system" else self.unasked
        said = (self.around[one["role"]] for one in messages)
        return first + "".join(f"{a}{m['content']}{b}" for (a, b), m in zip(said, messages, strict=True)) + self.answer

    def in_go(self) -> str:
        """Return the template in Ollama's template language."""
        whole = f"{{{{ if not .System }}}}{self.unasked}{{{{ end }}}}" if self.unasked else ""
        whole += "{{ range .Messages }}"
        for number, role in enumerate(role for role in _ROLES if role in self.around):
            before, after = self.around[role]
            whole += f'{{{{ {"else " if number else ""}if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        return f"{whole}{{{{ end }}}}{{{{ end }}}}{self.answer}"


@dataclass(frozen=True)
class Modelfile:
    """The content of a Modelfile."""

    file: str
    stops: Sequence[str]
    turns: Turns | None
    why: str = field(default="")
    """Why there is no template, if so."""

    def text(self) -> str:
        """Return the file's content."""
        lines = [f"FROM ./{self.file}"]
        if self.turns is None:
            lines.append(f"# No TEMPLATE: {self.why}.")
        else:
            lines.append(f'TEMPLATE """{self.turns.in_go()}"""')
        return (
            "\n".join([*lines, *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in self.stops)])
            + "\n"
        )

    def line(self) -> str:
        """Describe the content in a line."""
        told = ", ".join(self.stops) or "none"
        template = (
            f"no template ({self.why})" if self.turns is None else f"template proven on {len(SAMPLES)} conversations"
        )
        return f"{template}, stop: {told}"


@dataclass(frozen=True)
class Written:
    """A written Modelfile."""

    path: Path
    content: Modelfile


def write_modelfile(gguf: Path) -> Written:
    """Write the Modelfile beside a GGUF file, from that file's metadata."""
    found = Written(gguf.with_name(FILE), modelfile_of(gguf))
    write_text(found.path, found.content.text())
    return found


def modelfile_of(gguf: Path) -> Modelfile:
    """Return the Modelfile of a GGUF file."""
    fields = gguf_reader(gguf, field="output").fields

    def value(name: str) -> Any:
        return fields[name].contents() if name in fields else None

    def token(kind: str) -> str | None:
        number = value(f"tokenizer.ggml.{kind}_token_id")
        return None if number is None else str(fields["tokenizer.ggml.tokens"].contents(number))

    stops = list(dict.fromkeys(found for kind in _STOPS if (found := token(kind))))
    template = value("tokenizer.chat_template")
    if not template:
        return Modelfile(gguf.name, stops, None, "the file has no chat template, so Ollama continues plain text")
    special = {"bos_token": token("bos") or "", "eos_token": token("eos") or ""}
    added = special["bos_token"] if value("tokenizer.ggml.add_bos_token") else ""
    turns = turns_of(str(template), special, added)
    why = "the chat template is not just text around each message; Ollama uses its own if it knows a similar one"
    return Modelfile(gguf.name, stops, turns, "" if turns else why)


def turns_of(template: str, special: Mapping[str, str], added: str) -> Turns | None:
    """Convert a Jinja chat template to texts around messages; None if they differ on a sample or cannot be written in Go.

    Args:
        template: in Jinja, as transformers runs it.
        special: texts of `bos_token` and `eos_token`.
        added: text that the runtime itself puts before every text, and that a Go template must not repeat.
    """
    try:
        render = _renderer(template, special, added)
        found = _read(render)
    except ValueError:
        return None
    if found is None or any("{{" in text or '"""' in text for text in _texts(found)):
        return None
    return found if _agrees(found, render) else None


def _agrees(turns: Turns, render: Render) -> bool:
    has_system = "system" in turns.around
    for sample in SAMPLES:
        if not has_system and sample[0]["role"] == "system":
            continue
        try:
            if render(sample, True) != turns.render(sample):
                return False
        except ValueError:
            return False
    return True


def _texts(turns: Turns) -> list[str]:
    return [turns.unasked, turns.answer, *(text for pair in turns.around.values() for text in pair)]


Render = Callable[[Messages, bool], str]


def _renderer(template: str, special: Mapping[str, str], added: str) -> Render:
    """Return a function that renders messages as transformers does, without `added`.

    Its last argument says whether to begin an answer. It runs in a limited process, and raises ValueError if the
    template fails or exceeds a limit.
    """

    def render(messages: Messages, begins: bool) -> str:
        text = render_limited(_CHILDREN, "modelfile", rendered_chat, (template, messages, dict(special), begins))
        return text.removeprefix(added)

    return render


_CHILDREN: dict[str, Child] = {}


def _read(render: Render) -> Turns | None:
    """Derive the texts around messages from three conversations, without proof."""
    one, briefed, several = SAMPLES[:3]
    alone = _cut(render(one, False), one)
    asked = _cut(render(one, True), one)
    parts = _cut(render(several, True), several)
    if alone is None or asked is None or parts is None or not asked[1].startswith(alone[1]):
        return None
    start, after_user = alone
    answer, between = asked[1].removeprefix(after_user), parts[2]
    ended = _cut(render(several[:2], False), several[:2])
    if ended is None or not between.startswith(ended[2]):
        return None
    before_user = between.removeprefix(ended[2])
    if not start.endswith(before_user):
        return None
    around = {"user": (before_user, after_user), "assistant": (answer, ended[2])}
    with suppress(ValueError):  # some templates reject system messages
        if (told := _cut(render(briefed, True), briefed)) is not None:
            around["system"] = (told[0], told[1].removesuffix(before_user))
    return Turns(around, answer, start.removesuffix(before_user))


def _cut(text: str, messages: Messages) -> list[str] | None:
    """Return the texts before, between and after messages; None if a message does not occur verbatim."""
    found = []
    for message in messages:
        before, there, text = text.partition(message["content"])
        if not there:
            return None
        found.append(before)
    return [*found, text]
