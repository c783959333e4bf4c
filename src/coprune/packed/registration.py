"""Registration of packed folders with transformers, without importing it.

`import coprune` must stay cheap, and yet `AutoModelForCausalLM.from_pretrained(packed)` must work after it. So the quantizer
is registered at once if transformers' table of quantizers is loaded, and otherwise by an import hook when it is. torch and
the rest of coprune are imported when a packed folder is first opened.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from coprune.model.checkpoint.names import QUANT_METHOD

TABLE = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Make packed folders loadable by transformers, now or when it is imported. May be called more than once."""
    if TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())


def _register() -> None:
    table = sys.modules[TABLE]
    table.AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, _make_quantizer)
    table.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, _Config)


# Stand-ins, because this runs in the middle of transformers' own imports, when its models cannot be imported yet.
def _make_quantizer(config: Any, **options: Any) -> Any:
    from coprune.packed.quantizer import CopruneQuantizer

    return CopruneQuantizer(config, **options)


class _Config:
    @staticmethod
    def from_dict(content: dict[str, Any], **options: Any) -> Any:
        from coprune.packed.quantizer import CopruneConfig

        return CopruneConfig.from_dict(content, **options)


class _TableFinder(importlib.abc.MetaPathFinder):
    """Finds one module, through the other finders, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TABLE:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)  # its work is done, and the search below must not come back here
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)  # get_source and the like
