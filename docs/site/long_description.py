"""The package's long description: README.md without links that lead nowhere on a package index.

The picture and the links to other files are relative. As long as `project.urls` names no repository, there is nothing to
make them absolute with.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_PICTURE = re.compile(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n+")
_LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)[^)]*\)")


def long_description(readme: str) -> str:
    """Return the text without relative pictures, and with the words of relative links."""
    return _LINK.sub(r"\1", _PICTURE.sub("", readme))


class LongDescription(MetadataHookInterface):
    """The hatchling hook that sets the long description."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the long description to the project's metadata."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": long_description(text)}
