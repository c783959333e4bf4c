"""What a mixture's experts are given, and which of them may be chosen.

An expert that is removed gives no zeros: it is never chosen, and the gates of the others are what they are without it.
So a mixture is made smaller in memory by its router's logits, which are minus infinity for what is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from coprune.model.folding import close
from coprune.model.walk.observe import PRODUCTS

Place = int | str
"""Where an argument stands in a call: its position or its keyword."""


class OtherLogits(TorchFunctionMode):
    """While active, the results of products that give one value per expert are changed: a router's logits."""

    def __init__(self, experts: int, change: Callable[[Tensor], Tensor]) -> None:
        """change: gives other logits for T × E of them."""
        super().__init__()
        self._experts, self._change = experts, change

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS and isinstance(result, Tensor) and result.ndim > 0 and result.shape[-1] == self._experts:
            return self._change(result)
        return result


class NeverChosen:
    """A router's forward in which some experts cannot be chosen."""

    def __init__(self, router: nn.Module, keep: Tensor, vectors: Sequence[tuple[nn.Module, str]]) -> None:
        """keep: E bool; vectors: modules and the names of what they add to the logits or scores of the experts."""
        before = router.forward
        self._forward: Callable[..., Any] = before._forward if isinstance(before, NeverChosen) else before
        self._keep, self._vectors = keep, vectors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for owner, name in self._vectors:
            values: Tensor = getattr(owner, name).data
            values.masked_fill_(~self._keep.to(values.device), -torch.inf)
        with OtherLogits(len(self._keep), self._masked):
            return self._forward(*args, **kwargs)

    def _masked(self, logits: Tensor) -> Tensor:
        return logits.masked_fill(~self._keep.to(logits.device), -torch.inf)


@contextmanager
def forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """For a while, let a module run another function instead of its forward."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            vars(module).pop("forward")
        else:
            vars(module)["forward"] = before


@dataclass(frozen=True)
class Routed:
    """One call of a mixture's experts: T tokens, k of the experts for each."""

    index: Tensor
    """T × k int64: which experts a token goes to."""
    gates: Tensor
    """T × k: by how much each answer is multiplied."""
    answers: Tensor
    """T × k × H: what each of the experts answers."""

    @property
    def total(self) -> Tensor:
        """T × H: the sum of the answers, times their gates."""
        return (self.answers * self.gates[..., None]).sum(dim=1).to(self.answers.dtype)


@dataclass(frozen=True)
class ExpertCall:
    """How a mixture's experts are called: with tokens, the experts that each goes to, and their gates."""

    hidden: Place
    index: Place
    gates: Place

    @classmethod
    def seen(cls, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ExpertCall | None:
        """Read it from one call; None if that does not say which token goes where."""
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
        """Run the experts so that every answer is seen by itself: each token once for each of its experts."""
        given: dict[Place, Any] = _places(args, kwargs)
        index, gates, hidden = given[self.index], given[self.gates], given[self.hidden]
        top = index.shape[1]
        given[self.hidden] = hidden.repeat_interleave(top, dim=0)
        given[self.index], given[self.gates] = index.reshape(-1, 1), torch.ones_like(gates).reshape(-1, 1)
        named = {place: value for place, value in given.items() if isinstance(place, str)}
        out: Tensor = forward(*(given[place] for place in range(len(args))), **named)
        return Routed(index, gates, out.reshape(*index.shape, -1))

    def watch(self, own: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Routed]:
        """What the experts return, as the sum of what each answers, and these answers."""
        routed = self.run(own, args, kwargs)
        return routed.total, routed

    def explains(self, own: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether the experts' answers, times their gates, are what they return."""
        return close(self.run(own, args, kwargs).total, own(*args, **kwargs))

    def index_of(self, own: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """T × k int64: which experts the tokens of a call go to."""
        found: Tensor = args[self.index] if isinstance(self.index, int) else kwargs[self.index]
        return found


def _places(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Place, Any]:
    """A call's arguments by where they stand."""
    found: dict[Place, Any] = dict(enumerate(args))
    for name, value in kwargs.items():
        found[name] = value
    return found
