"""llama.cpp's library, if it is installed: its quantiser, and running models."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import math
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import numpy as np

from coprune.base.child import interruptible
from coprune.base.errors import BadInput, CopruneError, unknown_name
from coprune.base.words import Set
from coprune.model.checkpoint.names import LLAMA_CPP

if TYPE_CHECKING:  # this module is used before torch is imported, which takes seconds
    from torch import Tensor

TOKEN_EMBEDDINGS = "token_embd.weight"
"""The tensor's name in llama.cpp."""


def has_llama_cpp() -> bool:
    """Return whether the package with llama.cpp's library is installed."""
    return importlib.util.find_spec(LLAMA_CPP) is not None


def require_llama_cpp(why: str, field: str, value: object) -> None:
    """Raise BadInput if llama.cpp is not installed. why: what needs it."""
    if not has_llama_cpp():
        raise BadInput(f"{why}, but llama.cpp is not installed", field=field, value=value, fix=how_to_install())


def how_to_install() -> str:
    """Return the command that installs llama.cpp, or why there is none."""
    here = (sys.platform, platform.machine())
    if here == ("linux", "x86_64"):
        return "pip install 'coprune[gguf]'"
    return f"coprune[gguf] includes it on Linux on x86-64, but this is {here[0]} on {here[1]}"


@cache
def _library() -> tuple[Any, Any]:
    """Return cffi's interface and llama.cpp's functions."""
    bindings: Any = importlib.import_module(f"{LLAMA_CPP}._cffi_bindings")
    ffi, library = bindings.get_ffi(), bindings.get_lib()

    def listen(level: int, text: Any, data: object) -> None:
        if _HEARD is not None:
            _HEARD.append(ffi.string(text).decode(errors="replace"))

    callback = ffi.callback("void(enum ggml_log_level, const char *, void *)", listen, onerror=_keep)
    _KEPT.append(callback)
    library.llama_log_set(callback, ffi.NULL)
    library.llama_backend_init()
    return ffi, _Calls(library)


def _keep(kind: object, error: BaseException, traceback: object) -> None:
    _RAISED.append(error)


class _Calls:
    """llama.cpp's functions; each re-raises on return what a callback raised (such as Ctrl-C), which cannot pass through C."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)

        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            if _RAISED:
                error = _RAISED[0]
                _RAISED.clear()
                raise error
            return result

        self.__dict__[name] = call  # cached for the next call
        return call


_RAISED: list[BaseException] = []
"""Exceptions raised by callbacks in the current call."""
_KEPT: list[Any] = []
"""Callbacks, kept alive as long as the library."""
_HEARD: list[str] | None = None
"""Lines of its log, while being recorded."""
_SIZE = re.compile(r"quant size\s*=\s*([\d.]+) MiB")
_TYPE = re.compile(r"^\[.*?\] +(\S+) .*-> .*\((\w+)\)$", re.MULTILINE)
"""A log line about a tensor that gets another type."""


@dataclass(frozen=True)
class Quantisation:
    """Settings for llama.cpp's quantiser."""

    kind: str
    """A type such as q4_k_m."""
    importance: Mapping[str, Tensor] | None = None
    """Mean squares of the inputs of the file's tensors, by name; some types choose other tensor types with one."""
    embedding: str | None = None
    """Another type for the embeddings and the head, such as q4_0."""
    types: Mapping[str, str] | None = None
    """Types of tensors by name, such as q4_0; by default the kind decides."""


def quantized_bytes(source: Path, asked: Quantisation) -> int:
    """Return the bytes of weights that `quantize` would write, from shapes and types alone. Raises as `quantize`."""
    said = _SIZE.search(_quantizing(source, source.with_suffix(".none"), asked, dry=True))
    if said is None:
        raise BadInput(f"llama.cpp does not say how large the type {asked.kind} is", field="type", value=asked.kind)
    return int(float(said[1]) * 2**20)


def planned_types(source: Path, asked: Quantisation) -> dict[str, int]:
    """Return ggml's type number for each tensor that `quantize` would write, by name. Raises as `quantize`."""
    said = _quantizing(source, source.with_suffix(".none"), asked, dry=True)
    return {name: type_number(type) for name, type in _TYPE.findall(said)}


def tensor_kind(name: str) -> str:
    """Return the type that a file type such as q4_k_m or iq3_m has for most of its tensors."""
    from gguf import GGMLQuantizationType

    stem = name.rpartition("_")[0]
    return next(one for one in (name, stem, f"{stem}_s") if one.upper() in GGMLQuantizationType.__members__)


def type_number(name: str) -> int:
    """Return ggml's number of a tensor type such as q4_0."""
    return int(_library()[0].typeof("enum ggml_type").relements[f"GGML_TYPE_{name.upper()}"])


def quantize(source: Path, target: Path, asked: Quantisation, until: float = math.inf) -> None:
    """Quantise a float16 file with llama.cpp, in a child process, since signals cannot interrupt this call for minutes.

    Args:
        source: the file.
        target: the new file.
        asked: types and importance.
        until: deadline in `time.perf_counter()`.

    Raises:
        BadInput: llama.cpp reports an error.
        LostProcess: the child was killed.
        OutOfTime: the deadline has passed.
    """
    interruptible(partial(_quantizing, source, target, asked, dry=False), until)


def _quantizing(source: Path, target: Path, asked: Quantisation, dry: bool) -> str:
    """Quantise, or only plan it if `dry`; return llama.cpp's log. Raises BadInput if it refuses."""
    global _HEARD
    ffi, library = _library()
    options = ffi.new("llama_model_quantize_params *", library.llama_model_quantize_default_params())
    options.ftype = ffi.typeof("enum llama_ftype").relements[f"LLAMA_FTYPE_MOSTLY_{asked.kind.upper()}"]
    import torch

    options.nthread, options.dry_run = torch.get_num_threads(), dry
    if asked.embedding is not None:
        options.token_embedding_type = options.output_tensor_type = type_number(asked.embedding)
    held: list[Any] = []
    if asked.types:
        overrides = ffi.new("struct llama_model_tensor_override[]", len(asked.types) + 1)  # an empty one ends the list
        for override, (name, stored) in zip(overrides, asked.types.items(), strict=False):
            held.append(ffi.new("char[]", f"^{re.escape(name)}$".encode()))
            override.pattern, override.type = held[-1], type_number(stored)
        options.tt_overrides = overrides
    if asked.importance:
        count = len(asked.importance) + 1  # an empty one ends the list
        entries = ffi.new("struct llama_model_imatrix_data[]", count)
        for entry, (name, means) in zip(entries, asked.importance.items(), strict=False):
            values = np.ascontiguousarray(means.numpy(), dtype=np.float32)
            held += [ffi.new("char[]", name.encode()), values]
            entry.name, entry.data, entry.size = held[-2], ffi.cast("const float *", values.ctypes.data), values.size
        options.imatrix = entries
    _HEARD = heard = list[str]()
    try:
        failed = library.llama_model_quantize(str(source).encode(), str(target).encode(), options) != 0
    finally:
        _HEARD = None
    said = "".join(heard)
    if failed:
        *_, last = ["it does not say why", *filter(None, map(str.strip, said.splitlines()))]
        if "iostream error" in last:  # C++'s only message about a failed write
            cause = f"the disk is full or cannot be written: {target} could not be written"
            raise CopruneError(cause, fix="free some space and repeat the command")
        raise BadInput(
            f"llama.cpp could not quantise this model to {asked.kind}: {last}", field="type", value=asked.kind
        )
    return said


WATCHED = 256
"""Maximum number of tokens per call of a watched model, since logits over a large vocabulary take most of its memory."""
See = Callable[[Any], None]
"""Called with the bytes of a computed tensor, as a numpy array."""


def _watching(ffi: Any, see: Mapping[str, See]) -> Any:
    """Return an evaluation callback for llama.cpp that passes computed tensors to `see` by name."""
    from coprune.model.checkpoint.mapped_gguf import ggml_library

    ggml = ggml_library()
    assert ggml is not None
    ggml.ggml_get_name.argtypes, ggml.ggml_get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
    ggml.ggml_nbytes.argtypes, ggml.ggml_nbytes.restype = [ctypes.c_void_p], ctypes.c_size_t
    ggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]

    def shown(tensor: Any, asks: bool, data: object) -> bool:
        address = int(ffi.cast("uintptr_t", tensor))
        own = see.get(ggml.ggml_get_name(address).decode())
        if own is None or asks:
            return own is not None or not asks
        values = np.empty(ggml.ggml_nbytes(address), dtype=np.uint8)
        ggml.ggml_backend_tensor_get(address, values.ctypes.data, 0, len(values))
        own(values)
        return True

    return ffi.callback("bool(struct ggml_tensor *, bool, void *)", shown, error=False, onerror=_keep)


class LlamaCpp:
    """A GGUF file loaded in llama.cpp, which computes logits of tokens."""

    def __init__(
        self,
        file: Path,
        context: int = 512,
        threads: int | None = None,
        see: Mapping[str, See] | None = None,
        branches: int = 1,
    ) -> None:
        """Load a file. Raises BadInput if llama.cpp cannot.

        Args:
            file: its first part.
            context: maximum number of tokens.
            threads: number of threads, by default torch's.
            see: callbacks by tensor name, called whenever that tensor was computed. Weights then stay in the mapped file;
                otherwise those of some types are copied in another order.
            branches: number of continuations of a text to read at a time, if the architecture has no recurrent state.
        """
        self._ffi, self._library = _library()
        ffi, library = self._ffi, self._library
        options = library.llama_model_default_params()
        options.n_gpu_layers, options.use_extra_bufts = 0, see is None
        self._context = ffi.NULL
        self._model = library.llama_model_load_from_file(str(file).encode(), options)
        if self._model == ffi.NULL:
            raise BadInput(f"llama.cpp cannot load {file}", field="model", value=str(file))
        asked = library.llama_context_default_params()
        asked.n_ctx = context
        asked.n_batch = asked.n_ubatch = context if see is None else min(context, WATCHED)
        states = library.llama_model_is_recurrent(self._model) or library.llama_model_is_hybrid(self._model)
        self._branches = 1 if states else branches
        asked.n_seq_max, asked.kv_unified = self._branches, self._branches > 1
        import torch

        asked.n_threads = asked.n_threads_batch = threads or torch.get_num_threads()
        if see is not None:
            asked.cb_eval = self._callback = _watching(ffi, see)  # must live as long as the context
        self._context = library.llama_init_from_model(self._model, asked)
        if self._context == ffi.NULL:
            raise BadInput(f"llama.cpp cannot run {file}", field="model", value=str(file))
        self.vocabulary: int = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))

    @property
    def bytes(self) -> int:
        """Bytes of all weights in memory."""
        return int(self._library.llama_model_size(self._model))

    @property
    def type(self) -> str:
        """Type of most of its tensors, such as q4_k_m."""
        guessed = 1024  # llama.cpp adds it if the file does not name its type
        number = int(self._library.llama_model_ftype(self._model)) & ~guessed
        name: str = self._ffi.typeof("enum llama_ftype").elements[number]
        return name.removeprefix("LLAMA_FTYPE_").removeprefix("MOSTLY_").removeprefix("ALL_").lower()

    def forget(self) -> None:
        """Start a new text."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def read(self, tokens: Sequence[int], all_logits: bool = False) -> None:
        """Append tokens to the text and compute them; by default only the last one's logits."""
        begin = self._library.llama_memory_seq_pos_max(self._library.llama_get_memory(self._context), 0) + 1
        last = len(tokens) - 1
        self._compute([(one, begin + at, (0,), all_logits or at == last) for at, one in enumerate(tokens)])

    def _compute(self, tokens: Sequence[tuple[int, int, Sequence[int], bool]]) -> None:
        """Compute tokens, each with its position, its branches, and whether to keep its logits."""
        batch = self._library.llama_batch_init(len(tokens), 0, self._branches)
        try:
            batch.n_tokens = len(tokens)
            for place, (token, position, branches, kept) in enumerate(tokens):
                batch.token[place], batch.pos[place], batch.logits[place] = token, position, kept
                batch.n_seq_id[place] = len(branches)
                for at, branch in enumerate(branches):
                    batch.seq_id[place][at] = branch
            if self._library.llama_decode(self._context, batch) != 0:
                raise BadInput("llama.cpp could not compute a text of this length", field="prompt", value=len(tokens))
        finally:
            self._library.llama_batch_free(batch)
        self._library.llama_synchronize(self._context)

    def branched(self, before: Sequence[int], afters: Sequence[Sequence[int]]) -> list[Tensor] | None:
        """Return the logits that predict each continuation's tokens, computed together: tokens × vocabulary, float32.

        Args:
            before: the common beginning, at least one token.
            afters: independent continuations.

        Returns:
            One tensor per continuation; None if there are too many or the architecture does not allow it.
        """
        length, everywhere = len(before), tuple(range(len(afters)))
        tokens = [(token, place, everywhere, place == length - 1) for place, token in enumerate(before)]
        tokens += [
            (one, length + at, (branch,), True) for branch in everywhere for at, one in enumerate(afters[branch][:-1])
        ]
        if len(afters) > self._branches or len(tokens) > self._library.llama_n_batch(self._context):
            return None
        self.forget()
        self._compute(tokens)
        sizes = [1, *(len(after) - 1 for after in afters)]
        first, *others = self.last_logits(sum(sizes)).split(sizes)
        import torch

        return [torch.cat([first, one]) for one in others]

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits of a text from its beginning: tokens × vocabulary, float32."""
        self.forget()
        self.read(tokens, all_logits=True)
        return self.last_logits(len(tokens))

    def last_logits(self, count: int) -> Tensor:
        """Return the logits of the last `count` tokens, read with `all_logits`: tokens × vocabulary, float32."""
        raw = self._ffi.buffer(self._library.llama_get_logits(self._context), count * self.vocabulary * 4)
        import torch

        return torch.from_numpy(np.frombuffer(raw, dtype=np.float32).reshape(count, -1).copy())

    def cut_back(self, length: int) -> bool:
        """Truncate the text to `length` tokens; return whether the architecture allows it."""
        memory = self._library.llama_get_memory(self._context)
        return bool(self._library.llama_memory_seq_rm(memory, 0, length, -1))

    def ends(self, token: int) -> bool:
        """Return whether a token ends generation."""
        return bool(self._library.llama_vocab_is_eog(self._library.llama_model_get_vocab(self._model), token))

    def tokenize(self, text: str) -> list[int]:
        """Tokenize a text with the file's tokenizer, including the tokens that it prepends."""
        raw = text.encode()
        found = self._ffi.new("llama_token[]", len(raw) + 8)
        vocabulary = self._library.llama_model_get_vocab(self._model)
        count = self._library.llama_tokenize(vocabulary, raw, len(raw), found, len(found), True, True)
        return [int(found[place]) for place in range(max(count, 0))]

    @property
    def context_bytes(self) -> int:
        """Bytes of the state of the text read so far."""
        return int(self._library.llama_state_get_size(self._context))

    def close(self) -> None:
        """Free the memory."""
        if self._context != self._ffi.NULL:
            self._library.llama_free(self._context)
            self._context = self._ffi.NULL
        if self._model != self._ffi.NULL:
            self._library.llama_model_free(self._model)
            self._model = self._ffi.NULL

    def __del__(self) -> None:
        with suppress(AttributeError, TypeError):  # at exit the interpreter may have cleared its modules
            self.close()


GgufType = Literal[
    "f32", "f16", "bf16",
    "q8_0", "q5_1", "q5_0", "q4_1", "q4_0",
    "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "iq3_m",
    "iq3_s", "q2_k", "iq3_xs", "iq3_xxs", "q2_k_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s",
]  # fmt: skip
"""Types of a file: plain, the gguf package's and llama.cpp's, each ordered by bits per weight."""
TYPES: tuple[str, ...] = get_args(GgufType)
PLAIN = ("f32", "f16", "bf16")
QUANTISED = {"q8_0": 8, "q5_1": 5, "q5_0": 5, "q4_1": 4, "q4_0": 4}
"""Types with blocks of 32 that the gguf package can write, with their bits."""
BY_LLAMA_CPP = tuple(name for name in TYPES if name not in (*PLAIN, *QUANTISED))
"""Types that only llama.cpp's quantiser writes."""
NEED_IMPORTANCE = ("iq3_xs", "iq3_xxs", "q2_k_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s")
"""Those that require an importance matrix."""
_BLOCK = 32
_LARGEST_HALF = 65504.0


def require_type(name: str) -> GgufType:
    """Return a type by its name. Raises BadInput for an unknown type, or one whose package is not installed."""
    if name not in TYPES:
        raise unknown_name("type", name, TYPES, "type")
    if name in BY_LLAMA_CPP:
        require_llama_cpp(f"the type {name} needs llama.cpp's quantiser", "type", name)
    return cast(GgufType, name)


def file_type(name: str) -> int:
    """Return the number of a file's main type in its metadata."""
    from gguf import LlamaFileType

    return int(LlamaFileType["ALL_F32" if name == "f32" else f"MOSTLY_{name.upper()}"])


def tensor_type(name: str, shape: Sequence[int], asked: str, source_type: str, mixed: bool) -> str:
    """Return the storage type of a tensor.

    Vectors stay float32, as do the source file's float32 tensors if it also has other types. Tensors outside the blocks,
    above all embeddings, get at least eight bits; rows whose length is not a multiple of 32 get sixteen.

    Args:
        name: of the tensor in the file.
        shape: of the tensor, rows last.
        asked: the requested type, one that the gguf package can write.
        source_type: its type in the source file.
        mixed: whether the source file has matrices in other types than float32.
    """
    if len([size for size in shape if size > 1]) < 2 or (mixed and source_type.lower() == "f32"):
        return "f32"
    if asked in PLAIN:
        return asked
    if shape[-1] % _BLOCK:
        return "f16"
    return asked if name.startswith("blk.") else "q8_0"


def encode(tensor: Tensor, kind: str) -> Any:
    """Encode a float32 tensor as the bytes of a type, in a numpy array. Raises BadInput beyond float16's range."""
    from gguf import GGMLQuantizationType, quants

    values = tensor.contiguous().numpy()
    if kind == "f32":
        return values
    if kind == "f16":
        least, most = tensor.aminmax()
        largest = max(-float(least), float(most))
        if largest > _LARGEST_HALF:
            raise BadInput(
                f"weights of up to {largest:g} are too large for float16",
                field="type",
                fix=("use ", Set("type", "bf16")),
            )
        return values.astype(np.float16)
    return quants.quantize(values, GGMLQuantizationType[kind.upper()])


def encoded_bytes(shape: Sequence[int], kind: str) -> tuple[int, tuple[int, ...]]:
    """Return the size of an encoded tensor in bytes, and the shape of its byte array."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    code = GGMLQuantizationType[kind.upper()]
    values, size = GGML_QUANT_SIZES[code]
    count = int(np.prod(shape))
    if kind in ("f32", "f16"):
        return count * size, tuple(shape)
    return count * size // values, tuple(quant_shape_to_byte_shape(tuple(shape), code))
