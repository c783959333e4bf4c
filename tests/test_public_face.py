"""The public face is exact, documented, and there before torch is."""

import importlib.metadata
import inspect
import subprocess
import sys

import pytest

import coprune

PUBLIC = [
    "BadInput",
    "BrokenMask",
    "CopruneError",
    "LostProcess",
    "NumericalError",
    "Recipe",
    "Report",
    "Result",
    "UnsupportedModel",
    "VerificationError",
    "accelerate",
    "load_packed",
    "perplexity",
    "prune",
    "register_method",
    "run_recipe",
]
HEAVY = ("torch", "transformers", "datasets", "numpy", "safetensors")


def test_the_public_names_are_exactly_these():
    assert coprune.__all__ == PUBLIC
    assert dir(coprune) == sorted([*PUBLIC, "__version__"])


def test_the_version_is_the_installed_one():
    assert coprune.__version__ == importlib.metadata.version("coprune")


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_and_documented(name):
    assert inspect.getdoc(getattr(coprune, name)).partition("\n")[0].endswith(".")


@pytest.mark.parametrize("name", ["prune", "perplexity", "register_method", "run_recipe"])
def test_public_functions_are_typed_and_say_what_they_raise(name):
    function = getattr(coprune, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())
    assert "Raises" in inspect.getdoc(function)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prnue'"):
        coprune.prnue  # noqa: B018


@pytest.mark.parametrize(
    "program",
    [
        "import coprune",
        "import coprune; coprune.Recipe(model='x')",
        "import coprune; coprune.__version__",
        "import sys; sys.argv = ['coprune', '--help']; from coprune.commands.app import main; main()",
        "import sys; sys.argv = ['coprune', 'prune', '--help']; from coprune.commands.app import main; main()",
    ],
)
def test_nothing_heavy_is_loaded_for(program):
    wrapped = f"""
import atexit, sys
heavy = {HEAVY!r}
atexit.register(lambda: print('LOADED', [name for name in heavy if name in sys.modules]))
{program}
"""
    ended = subprocess.run([sys.executable, "-c", wrapped], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "LOADED []"
