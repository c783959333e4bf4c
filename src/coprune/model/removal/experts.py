"""A mixture of experts: the experts, what chooses among them, and whatever else has one value per expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coprune.base.errors import UnsupportedModel
from coprune.model.folding import close
from coprune.model.removal.routing import ExpertCall, NeverChosen, Routed, forward_as

Forward = Callable[..., Any]
_NOTHING, _NOTHING_OF_HALVES = 1e-4, 2e-2
"""Gates below this share of the largest are rounding."""


@dataclass(frozen=True)
class ListedCall:
    """How the experts of a list are called: one after another, with the rows of their tokens."""

    experts: nn.ModuleList

    def explains(self, own: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether the experts' answers, times their gates, and what comes without them are what the holder returns."""
        try:
            out, routed = self.watch(own, args, kwargs)
            return close(routed.total + self._with(own, args, kwargs, _silence), _rows(out))
        except Exception:  # whatever a model's code says to other answers, where the list holds no experts
            return False

    def index_of(self, own: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """T × k int64: which experts the tokens of a call go to."""
        return self._chosen(own, args, kwargs)[0]

    def watch(self, own: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Routed]:
        """What the holder returns, and each of the answers in it. Raises UnsupportedModel where rows are no tokens."""
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
                raise UnsupportedModel("an expert is given something else than its tokens")
            for token, slot in chosen:
                answers[token, slot] = answer[places[tokens[token]]]
        return out, Routed(index, gates, answers)

    def _chosen(self, own: Forward, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The experts of every token, T × k int64, and their gates."""
        base, told = (self._with(own, args, kwargs, answer) for answer in (_silence, _speak))
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
        """For a while, let every expert answer something else."""

        def instead(number: int, forward: Forward) -> Forward:
            return lambda hidden, *args, **kwargs: answer(number, forward, hidden)

        with ExitStack() as ended:
            for number, expert in enumerate(self.experts):
                ended.enter_context(forward_as(expert, instead(number, expert.forward)))
            yield


_Answer = Callable[[int, Forward, Tensor], Tensor]
"""What an expert answers: by its number, its own forward, and its tokens."""


def _silence(number: int, forward: Forward, hidden: Tensor) -> Tensor:
    return torch.zeros_like(hidden)


def _speak(number: int, forward: Forward, hidden: Tensor) -> Tensor:
    """One, in a channel of the expert's own."""
    out = torch.zeros_like(hidden)
    out[..., number] = 1
    return out


def _rows(output: Any) -> Tensor:
    """What a module returns, or is given, as T × H."""
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found.reshape(-1, found.shape[-1])


def _bytes(rows: Tensor) -> list[bytes]:
    return [row.tobytes() for row in rows.detach().cpu().contiguous().view(torch.uint8).numpy()]


@dataclass(frozen=True)
class Mixture:
    """The experts of a block that tokens are routed to. Paths are relative to the block."""

    block: str
    experts: str
    """Path of the module that holds them."""
    router: str
    """Path of the module whose product gives their logits."""
    sliced: dict[str, int]
    """What has one entry per expert: path, and the dimension of the experts."""
    added: tuple[str, ...]
    """Those that are added to logits or scores, so that minus infinity there keeps an expert from being chosen."""
    count: int
    top: int
    """Experts that a token goes to."""
    groups: int
    """Equal runs of experts, of which a token uses `used`; 1 where any experts may be chosen together."""
    used: int
    call: ExpertCall | ListedCall
    owner: str
    """Path of the module that is called with the tokens: the experts', or the one that holds their list."""

    def masks(self, module: nn.Module, keep: Tensor) -> dict[str, Tensor]:
        """What is kept of every parameter and buffer, by its whole name. keep: E bool."""
        found = {}
        for path, dim in self.sliced.items():
            tensor = tensor_at(module, path)
            shape = [-1 if d == dim else 1 for d in range(tensor.ndim)]
            found[f"{self.block}.{path}"] = keep.view(shape).expand(tensor.shape)
        experts = module.get_submodule(self.experts)
        for number, expert in enumerate(experts if isinstance(experts, nn.ModuleList) else ()):
            for name, tensor in [*expert.named_parameters(), *expert.named_buffers()]:
                found[f"{self.block}.{self.experts}.{number}.{name}"] = keep[number].expand(tensor.shape)
        return found

    def never_choose(self, module: nn.Module, keep: Tensor) -> None:
        """From now on, let some experts of a block not be chosen. keep: E bool."""
        module.get_submodule(self.router).forward = self._without(module, keep)

    @contextmanager
    def silent(self, module: nn.Module, keep: Tensor) -> Iterator[None]:
        """The same for a while."""
        before = {path: tensor_at(module, path).detach().clone() for path in self.added}
        try:
            with forward_as(module.get_submodule(self.router), self._without(module, keep)):
                yield
        finally:
            for path, values in before.items():
                tensor_at(module, path).data.copy_(values)

    def _without(self, module: nn.Module, keep: Tensor) -> NeverChosen:
        owners = [(module.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in self.added]
        return NeverChosen(module.get_submodule(self.router), keep, owners)

    @contextmanager
    def watched(self, module: nn.Module, see: Callable[[Routed], None]) -> Iterator[None]:
        """For a while, show every call of the experts with each of their answers."""
        owner = module.get_submodule(self.owner)
        own = owner.forward

        def forward(*args: object, **kwargs: object) -> object:
            out, routed = self.call.watch(own, args, kwargs)
            see(routed)
            return out

        with forward_as(owner, forward):
            yield


def tensor_at(module: nn.Module, path: str) -> Tensor:
    """A parameter or buffer by its path."""
    owner, _, name = path.rpartition(".")
    found: Tensor = getattr(module.get_submodule(owner), name)
    return found
