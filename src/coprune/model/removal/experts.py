"""A mixture of experts: the experts, what chooses among them, and whatever else has one value per expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from coprune.model.removal.listed import ListedCall
from coprune.model.removal.routing import ExpertCall, NeverChosen, Routed, forward_as


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
