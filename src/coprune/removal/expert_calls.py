"""Calls of a mixture's experts: each token's experts, gates and answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coprune.base.errors import UnsupportedModel
from coprune.model.folding import close
from coprune.model.routing import forward_as

Forward = Callable[..., Any]
_NOTHING, _NOTHING_OF_HALVES = 1e-4, 2e-2
"""Gates below this share of the largest are rounding."""
Place = int | str
"""Place of an argument in a call: its position or its keyword."""


@dataclass(frozen=True)
class Routed:
    """A call of a mixture's experts: T tokens, each with k experts."""

    index: Tensor
    """T × k int64: the experts of each token."""
    gates: Tensor
    """T × k: the factor of each answer."""
    answers: Tensor
    """T × k × H: the answer of each expert."""

    @property
    def total(self) -> Tensor:
        """The gated sum of the answers: T × H."""
        return (self.answers * self.gates[..., None]).sum(dim=1).to(self.answers.dtype)


@dataclass(frozen=True)
class ExpertCall:
    """The signature of a mixture's experts: tokens, the experts of each, and their gates."""

    hidden: Place
    index: Place
    gates: Place

    @classmethod
    def seen(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ExpertCall | None:
        """Derive the signature from one call; None if the call does not show the routing."""
        places: dict[Place, Any] = _places(args, kwargs)
        given = {place: value for place, value in places.items() if isinstance(value, Tensor)}
        flat = {place: value for place, value in given.items() if value.ndim == 2}
        index = [place for place, value in flat.items() if not value.is_floating_point() and value.dtype != torch.bool]
        if len(index) != 1:
            return None
        shape = flat[index[0]].shape
        floats = [place for place, value in flat.items() if value.is_floating_point() and len(value) == shape[0]]
        gates = [place for place in floats[1:] if flat[place].shape == shape]
        return cls(floats[0], index[0], gates[0]) if len(gates) == 1 else None

    def run(self, forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Routed:
        """Run the experts and keep their answers apart, calling each token once per expert."""
        given: dict[Place, Any] = _places(args, kwargs)
        index, gates, hidden = given[self.index], given[self.gates], given[self.hidden]
        top = index.shape[1]
        given[self.hidden] = hidden.repeat_interleave(top, dim=0)
        given[self.index], given[self.gates] = index.reshape(-1, 1), torch.ones_like(gates).reshape(-1, 1)
        named = {place: value for place, value in given.items() if isinstance(place, str)}
        out: Tensor = forward(*(given[place] for place in range(len(args))), **named)
        return Routed(index, gates, out.reshape(*index.shape, -1))

    def watch(self, own: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Routed]:
        """Run the experts; return the gated sum of their answers, and the answers."""
        routed = self.run(own, args, kwargs)
        return routed.total, routed

    def explains(self, own: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Return whether the experts' gated answers add up to the module's output."""
        return close(self.run(own, args, kwargs).total, own(*args, **kwargs))

    def index_of(self, own: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the experts of each token of a call: T × k int64."""
        found: Tensor = args[self.index] if isinstance(self.index, int) else kwargs[self.index]
        return found


def _places(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Place, Any]:
    """Return a call's arguments by place."""
    found: dict[Place, Any] = dict(enumerate(args))
    for name, value in kwargs.items():
        found[name] = value
    return found


@dataclass(frozen=True)
class ListedCall:
    """The calls of a list of experts, one after another, each with its tokens' rows."""

    experts: nn.ModuleList

    def explains(self, own: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Return whether the experts' gated answers plus the part without experts give the module's output."""
        try:
            out, routed = self.watch(own, args, kwargs)
            return close(routed.total + self._with(own, args, kwargs, _silence), _rows(out))
        except Exception:  # a model's code may raise anything if the list holds no experts
            return False

    def index_of(self, own: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the experts of each token of a call: T × k int64."""
        return self._chosen(own, args, kwargs)[0]

    def watch(self, own: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Routed]:
        """Run the holder; return its output and each answer. Raises UnsupportedModel if rows are not tokens."""
        index, gates = self._chosen(own, args, kwargs)
        calls: dict[int, tuple[Tensor, Tensor]] = {}

        def keep(number: int, forward: Forward, hidden: Tensor) -> Tensor:
            out: Tensor = forward(hidden)
            calls[number] = _rows(hidden), _rows(out)
            return out

        with self._answering(keep):
            out = own(*args, **kwargs)
        width = next(iter(calls.values()))[0].shape[-1]
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.shape[-1:] == (width,)]
        tokens = _bytes(_rows(given[0]))
        answers = _rows(out).new_zeros(*index.shape, _rows(out).shape[-1])
        for number, (hidden, answer) in calls.items():
            places = {row: place for place, row in enumerate(_bytes(hidden))}
            chosen = (index == number).nonzero().tolist()
            if any(tokens[token] not in places for token, _ in chosen):
                raise UnsupportedModel("an expert does not receive the rows of its tokens")
            for token, slot in chosen:
                answers[token, slot] = answer[places[tokens[token]]]
        return out, Routed(index, gates, answers)

    def _chosen(self, own: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return each token's experts, T × k int64, and their gates."""
        base, told = (self._with(own, args, kwargs, answer) for answer in (_silence, _mark))
        gates = (told - base)[:, : len(self.experts)].float()
        rounding = _NOTHING if base.dtype.itemsize >= 4 else _NOTHING_OF_HALVES
        used = gates.abs() > rounding * gates.abs().max()
        index = gates.abs().topk(max(1, int(used.sum(dim=1).max())), dim=1).indices
        return index, gates.gather(1, index)

    def _with(self, own: Forward, args: Sequence[Any], kwargs: Mapping[str, Any], answer: _Answer) -> Tensor:
        with self._answering(answer):
            return _rows(own(*args, **kwargs))

    @contextmanager
    def _answering(self, answer: _Answer) -> Iterator[None]:
        """Replace each expert's answer in the body."""

        def instead(number: int, forward: Forward) -> Forward:
            return lambda hidden, *args, **kwargs: answer(number, forward, hidden)

        with ExitStack() as ended:
            for number, expert in enumerate(self.experts):
                ended.enter_context(forward_as(expert, instead(number, expert.forward)))
            yield


_Answer = Callable[[int, Forward, Tensor], Tensor]
"""The answer of an expert, given its number, its own forward and its tokens."""


def _silence(number: int, forward: Forward, hidden: Tensor) -> Tensor:
    return torch.zeros_like(hidden)


def _mark(number: int, forward: Forward, hidden: Tensor) -> Tensor:
    """Return one in the channel with the expert's number."""
    out = torch.zeros_like(hidden)
    out[..., number] = 1
    return out


def _rows(output: Any) -> Tensor:
    """Return a module's input or output as T × H."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found.reshape(-1, found.shape[-1])


def _bytes(rows: Tensor) -> list[bytes]:
    return [row.tobytes() for row in rows.detach().cpu().contiguous().view(torch.uint8).numpy()]
