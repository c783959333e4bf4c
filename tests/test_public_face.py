"""The public API is exact, documented, and importable without torch."""

import importlib.metadata
import inspect
import subprocess
import sys
import typing

import pytest
from keyword_arguments import FILE, written
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import coprune
from coprune.commands.command_table import command_named
from coprune.data.keyword_arguments import PruneArguments
from coprune.gguf_files.llama_cpp import GgufType
from coprune.model.transformers_private import Processor
from coprune.recipe.views import MEASURING
from support.annotations import kinds

FUNCTIONS = [
    "bench",
    "compare",
    "estimate",
    "evaluate",
    "export",
    "finetune",
    "fit",
    "generate",
    "inspect",
    "keep_zeros",
    "merge",
    "perplexity",
    "prune",
    "push",
    "register_method",
    "run_recipe",
    "sweep",
]
ERRORS = [
    "BadInput",
    "BrokenMask",
    "CopruneError",
    "LostProcess",
    "OutOfMemory",
    "NumericalError",
    "UnsupportedModel",
    "VerificationError",
]
VALUES = [
    "Bench",
    "Comparison",
    "Estimate",
    "Evaluation",
    "FinetuneReport",
    "Fitted",
    "Gguf",
    "Inspection",
    "Merged",
    "Recipe",
    "Report",
    "Result",
    "SweepResult",
]
PUBLIC = sorted([*FUNCTIONS, *ERRORS, *VALUES])
HEAVY = ("torch", "transformers", "datasets", "numpy", "safetensors")


def test_the_public_names_are_exactly_these() -> None:
    assert coprune.__all__ == PUBLIC
    assert dir(coprune) == sorted([*PUBLIC, "__version__"])


def test_the_version_is_the_installed_one() -> None:
    assert coprune.__version__ == importlib.metadata.version("coprune")


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_exists_under_its_own_name_with_documentation(name: str) -> None:
    found = getattr(coprune, name)
    assert found.__name__ == name
    assert found.__module__.startswith("coprune.")
    assert not any(part.startswith("_") for part in found.__module__.split("."))
    assert (inspect.getdoc(found) or "").partition("\n")[0].endswith(".")


def test_type_checkers_see_exactly_the_public_names() -> None:
    source = inspect.getsource(coprune)
    seen = source[source.index("if TYPE_CHECKING:") : source.index("__version__: str")]
    assert sorted(word.strip(" ,()") for word in seen.split() if word.strip(" ,()") in PUBLIC) == PUBLIC


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_are_typed_and_document_arguments_results_and_errors(name: str) -> None:
    function = getattr(coprune, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    text = inspect.getdoc(function) or ""
    returns = int(signature.return_annotation not in (None, "None"))
    assert [text.count(section) for section in ("Args:\n", "Returns:\n", "Raises:\n")] == [1, returns, 1]
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty
        assert f"\n    {parameter.name}: " in text
        if parameter.kind is parameter.VAR_KEYWORD:
            assert "Unpack" in str(parameter.annotation)


def test_keyword_arguments_are_generated_from_the_settings() -> None:
    assert FILE.read_text(encoding="utf-8") == written(), "run make keywords"


def test_type_checkers_reject_an_unknown_file_type() -> None:
    assert typing.get_type_hints(coprune.export)["type"] == GgufType
    assert "q4_k_m" in typing.get_args(GgufType)
    assert "q4_km" not in typing.get_args(GgufType)


def test_attributes_of_results_are_typed() -> None:
    for name, kind in {"model": PreTrainedModel, "tokenizer": PreTrainedTokenizerBase}.items():
        assert typing.get_type_hints(inspect.getattr_static(coprune.Result, name).fget)["return"] is kind
    for function in (coprune.prune, coprune.estimate, coprune.evaluate, coprune.inspect):
        assert kinds(inspect.signature(function, eval_str=True).parameters["processor"].annotation) == {
            *kinds(Processor), type(None)
        }  # fmt: skip


def test_an_argument_has_the_same_name_in_all_functions() -> None:
    asked = {word for word, _ in MEASURING.values()}
    assert {name for name in MEASURING if name not in asked} == {"data"}
    assert not {"tokenizer", "image_processor"} & set(typing.get_type_hints(PruneArguments))
    for name in ("fit", "compare", "evaluate"):
        options = inspect.signature(command_named(name), eval_str=True).parameters
        for own in inspect.signature(getattr(coprune, name)).parameters.values():
            if own.kind is own.KEYWORD_ONLY and own.name in options:
                declared = getattr(options[own.name].annotation, "__metadata__", [None])[0]
                flags = [flag for flag in getattr(declared, "param_decls", None) or () if flag.startswith("--")]
                assert not flags or f"--{own.name.replace('_', '-')}" in [flag.split("/")[0] for flag in flags], (
                    own.name
                )


def test_an_unknown_name_is_an_attribute_error() -> None:
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
def test_heavy_packages_are_not_imported_for(program: str) -> None:
    wrapped = f"""
import atexit, sys
heavy = {HEAVY!r}
atexit.register(lambda: print('LOADED', [name for name in heavy if name in sys.modules]))
{program}
"""
    ended = subprocess.run([sys.executable, "-c", wrapped], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "LOADED []"
