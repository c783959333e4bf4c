"""Settings and calls on the command line: flags and commands. Nothing heavy is imported here."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from coprune.base.words import Face, Set

# The Wanda repository's names of options, and short forms. Every other option is named like its setting.
_FLAGS: dict[str, list[str]] = {
    "method": ["--method", "--prune_method", "--prune-method", "-m"],
    "sparsity": ["--sparsity", "--sparsity_ratio", "--sparsity-ratio", "-s"],
    "pattern": ["--pattern", "--sparsity_type", "--sparsity-type", "-p"],
    "cache_dir": ["--cache-dir", "--cache_dir"],
    "save_model": ["--save-model", "--save_model"],
    "eval_zero_shot": ["--eval-zero-shot", "--eval_zero_shot"],
    "num_fewshot": ["--num-fewshot", "--num_fewshot"],
    "include_path": ["--include-path", "--include_path"],
    "apply_chat_template": ["--apply-chat-template", "--apply_chat_template"],
    "gen_kwargs": ["--gen-kwargs", "--gen_kwargs"],
    "log_samples": ["--log-samples", "--log_samples"],
    "evaluate": ["--eval/--no-eval"],
    "evaluate_dense": ["--eval-dense/--no-eval-dense"],
    "layer_error": ["--layer-error/--no-layer-error"],
    "gate": ["--gate/--no-gate"],
    "stream": ["--stream/--no-stream"],
    "check_memory": ["--check-memory/--no-check-memory"],
    "masked": ["--masked/--no-masked"],
    "finetune_masked": ["--finetune-masked/--no-finetune-masked"],
    "permute": ["--permute/--no-permute"],
    "rotate": ["--rotate/--no-rotate"],
}

# Those of a training, where a name has another meaning in a run that prunes.
_FLAGS_OF_TRAINING: dict[str, list[str]] = {
    "seqlen": ["--seqlen", "--block-size", "--block_size"],
    "train": ["--train-only", "--train"],
}

# Old names by option, accepted but hidden, since they had another meaning in other commands.
OLDER: dict[str, list[str]] = {
    "method": ["--prune-method"],
    "sparsity": ["--sparsity-ratio"],
    "pattern": ["--sparsity-type"],
    "seqlen": ["--block-size"],
    "prompt_tokens": ["--prompt"],
    "decode_tokens": ["--tokens"],
    "script": ["--preset"],
    "cache": ["--evaluations"],
    "train": ["--train"],
}
"""An option that has no other name keeps these."""


def flags_of(setting: str, in_training: bool = False) -> list[str]:
    """Return the flags of a setting's option, its own first. in_training: whether they are of `coprune finetune`."""
    known = _FLAGS | _FLAGS_OF_TRAINING if in_training else _FLAGS
    return known.get(setting, [f"--{setting.replace('_', '-')}"])


CALLED = {"evaluate": "eval"}
"""Commands that are not called like their function in Python."""


class CommandLine(Face):
    """Settings are flags, calls are commands."""

    between = " "

    def __init__(self, command: str = "prune") -> None:
        """Speak to whoever typed a command, whose flags are named."""
        self._trains = command == "finetune"

    def name(self, setting: str) -> str:
        return flags_of(setting, self._trains)[0].partition("/")[0]

    def setting(self, name: str) -> str:
        return self.name(name)

    def set(self, name: str, value: Any) -> str:
        yes, _, no = flags_of(name, self._trains)[0].partition("/")
        if isinstance(value, bool):
            return yes if value else no or f"no {yes}"
        # What begins with a dash would be taken for another flag.
        return f"{yes}{'=' if str(value).startswith('-') else ' '}{_word(value)}"

    def command(self, name: str, parts: tuple[str | Path | Set, ...]) -> str:
        own = CommandLine(name)
        said = [part.said_in(own) if isinstance(part, Set) else _word(part) for part in parts]
        return " ".join(["coprune", CALLED.get(name, name), *said])


def _word(value: Any) -> str:
    return "…" if value is ... else shlex.quote(str(value))
