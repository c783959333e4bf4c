"""Keyword arguments of `coprune.prune` and `coprune.estimate` as types, for editors and type checkers.

A test keeps them equal to the settings of a recipe and the options of the methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from coprune.data.in_memory import CalibrationData, TextData
from coprune.evaluation.measure_arguments import AnswerArguments
from coprune.recipe.choice import Choice
from coprune.recipe.outcome import EvaluatePart, OutputPart
from coprune.recipe.parts import CalibratePart, PrunePart
from coprune.recipe.structure import RemovePart
from coprune.recipe.train import Mode, TrainPart

File = str | Path
Options = Mapping[str, bool | int | float | str | None]
Named = str | Mapping[str, Any] | Choice
"""Something by name, perhaps with options: `owl:spread=0.1`, or `{"name": "owl", "spread": 0.1}`."""


class MethodArguments(TypedDict, total=False):
    """The methods' own options, each for the methods that have it; see `coprune methods`."""

    block_size: int
    """Columns whose mask is chosen together (unstructured); for N:M it is rounded up to a multiple of M. Columns whose
    mask is chosen together (iterative, unstructured); for N:M it is rounded up to a multiple of M."""
    cycles: int
    """Maximum number of swaps per row."""
    damping: float
    """Added to the Hessian's diagonal, as a fraction of its mean. Added to the unit diagonal of the scaled Gram
    matrix. Added to the Gram matrix's diagonal before it is scaled, as a fraction of its mean."""
    group: Literal["row", "matrix"]
    """Weights that compete: those of the whole matrix (the usual baseline) or of one output row. Weights that compete:
    those of one output row (the paper's choice) or the whole matrix. Weights that compete: those of the whole
    matrix (as in the authors' code) or of one output row. Weights that compete when the pattern is unstructured."""
    inner_loop: Literal["auto", "torch", "triton"]
    """The loop over the columns of a block: auto is a native kernel on CPUs where it compiles, one of Triton's on
    NVIDIA's GPUs where it gives what torch gives, and torch elsewhere."""
    mask_rounds: int
    """Number of first rounds in which the mask is chosen again, on a cubic schedule of sparsity."""
    power: float
    """Exponent of the input norms: n^power."""
    refit_rounds: int
    """Rounds of conjugate gradients on the final mask."""
    rho: float
    """Strength of the pull toward the sparse weights. The penalty at the start."""
    rounds: int
    """Rounds of the alternation. Rounds at most; it stops as soon as the mask stands still."""
    rounds_per_rho: int
    """Number of rounds after which the mask is checked and ρ raised."""
    score: Literal["magnitude", "wanda"] | Named | Sequence[Named]
    """Which channels and heads go: obs (what the others can make up for; the default), wanda_sp, flap or magnitude;
    which blocks: map (those in a row that a linear map replaces best; the default), kl (what the model says without
    it) or influence (what changes its inputs least); which experts: reap (gate times answer; the default), frequency,
    random, or aimer (their weights alone, without a text); options as in wanda_sp:refit=true; repeatable."""
    selection: Literal["sequential", "iterative"]
    """Whether the mask is chosen before the update (`sequential`) or along with it (`iterative`)."""
    start: Literal["magnitude", "wanda", "ria"]
    """The method whose mask it begins from."""


class CalibrationArguments(TypedDict, total=False):
    """Arguments of pruning and calibration."""

    prune: PrunePart | Mapping[str, Any]
    options: Options
    """How weights are chosen and mended; see: coprune methods."""
    use_variant: bool
    sparsity: float | None
    """Fraction of zeros, 0 ≤ s < 1, or 50%; an N:M pattern sets it. [0.5]"""
    sparsity_ratio: float | None
    pattern: str
    """unstructured, or N:M = N kept of every M inputs (2:4, 4:8, 1:4 …)."""
    sparsity_type: str
    permute: bool
    """For N:M: reorder channels first so that less is pruned; the model's outputs stay. Loads the whole model into
    memory."""
    rotate: bool
    """Rotate the values of attention heads first so that the pattern removes less; the model's outputs stay. Loads the
    whole model into memory."""
    include: str | Sequence[str]
    """Prune only matrices that match this pattern, e.g. '*.q_proj'; repeatable."""
    exclude: str | Sequence[str]
    """Leave matrices that match this pattern alone; repeatable."""
    calibrate: CalibratePart | Mapping[str, Any]
    dataset: CalibrationData
    """Calibration text: wikitext2, c4, ptb, embedded, a datasets id, a local .txt, .jsonl or .parquet file or folder,
    or self (what the dense model writes; self:prompts.jsonl, its answers); several with shares:
    self=0.5,wikitext2=0.5. Images: digits, a folder of classes, .parquet, or a datasets id."""
    nsamples: int
    """Number of calibration samples."""
    seqlen: int | None
    """Tokens per sample and per perplexity window. [min(2048, model's limit)]"""
    calibrate_on: Literal["all", "generated"]
    """Which positions the statistics are of: all, or only those that a model wrote, the others being what it looks
    back on. Text that says nothing of who wrote it counts whole."""
    bos: Literal["auto", "first", "every", "never"]
    """Where the token that begins a text (BOS) stands, in calibration and perplexity: at the start of the text, of
    every window, or never; auto does as the tokenizer, unless it puts BOS and the dense model is clearly better (by
    5 % in perplexity, on a few windows) where every window has it."""
    seed: int
    """Seed for the choice of calibration samples."""
    batch_size: int | None
    """Samples per forward pass. [about 512 tokens on a CPU, 4096 elsewhere]"""
    activation_memory: float | None
    """GiB of calibration activations to keep in memory; the rest goes to a temporary file and comes back batch by
    batch. [all in memory]"""
    device_activation_memory: float | None
    """GiB of calibration activations to keep on a GPU; the rest goes to the host's memory, as far as activation_memory
    lets it. [half of what is free there]"""
    propagation: Literal["block", "sequential", "dense"]
    """block: statistics of a block from its dense weights, as in the papers; sequential: each matrix from the inputs
    that its pruned predecessors give it, in one pass (faster); dense: each matrix from its inputs in the dense
    model, in one pass, so that all methods and patterns have the same statistics."""
    allocation: Named
    """How the sparsity is spread over the matrices: uniform, owl or fisher (options as in owl:spread=0.1), or a
    FILE.yaml of patterns of names and sparsities; how channels and heads that are removed are spread over the
    blocks: uniform or error."""
    refine: Named | Sequence[Named]
    """Improve every mask's weights: refit, swaps (which ends with a refit), options as in refit:rounds=10; repeatable."""
    reconstruct: int | str
    """Train every pruned block for so many steps toward the dense model's outputs."""
    reconstruct_tokens: int
    """With reconstruct: train every block on at least so many tokens, with more steps where samples are short, so that
    half as long ones do not halve the training. [as many as the steps hold]"""
    reconstruct_lr: float
    """Learning rate of that, times the size (root mean square) of each matrix and vector, so that one serves models
    with smaller or larger weights."""
    reconstruct_dtype: Literal["float32", "bfloat16"]
    """What blocks compute in while they are trained."""


class StructureArguments(TypedDict, total=False):
    """Arguments of structured removal."""

    remove: str | Sequence[str] | RemovePart | Mapping[str, Any]
    """Remove parts of the model, so that it gets smaller: size=0.25, or a share of channels=0.33, heads=0.25,
    blocks=0.2, experts=0.25, vocabulary=96k (tokens that stay); repeatable, or with commas between. size is the
    share of the parameters that goes, or what is left: size=100MB, size=1.2B. Also experts=keep:96 (how many stay),
    vocabulary=0.6 (a share to go) and vocabulary=loss:1% (as few as cost so many more bits per byte)."""
    domains: str | Sequence[str] | Mapping[str, File]
    """Texts by domain, on whose samples (as many of each) the experts are scored instead of the calibration text's:
    code=code.jsonl,chat=chat.jsonl; or the experts.json of an earlier run, whose scores are blended anew without a
    pass; repeatable."""
    blend: str
    """How domains are blended: max-min (the one that keeps the least of its score keeps as much as can be), or by
    weights: code=2,chat=1."""
    align: int
    """Keep channels in multiples of this, where the model has them."""
    vocabulary_text: str | Sequence[str] | Mapping[str, float]
    """What the vocabulary keeps: tokens of files, folders or corpora, words of languages (needs coprune[languages]),
    and code, each perhaps with a share: mine.jsonl=2,en,code=0.5; repeatable. [the calibration text, en and code]"""
    vocabulary_force: bool
    """Cut a vocabulary even where that saves less than 5 per cent of the weights' bytes."""


class OutcomeArguments(AnswerArguments, total=False):
    """Arguments of loading, training, measuring and writing."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    """Type of the model's weights; auto is the checkpoint's own (float32 for GGUF)."""
    device: str
    """auto, cpu, cuda, cuda:1 …; auto takes a GPU if there is one."""
    cache_dir: File | None
    """Where downloads are kept. [the Hugging Face cache]"""
    stream: bool | None
    """Read and write the model block by block, so that memory holds one block at a time. [yes for checkpoint folders;
    a GGUF file is read whole]"""
    check_memory: bool
    """Refuse a run that would not fit the memory."""
    train: Literal["whole", "blocks"] | TrainPart | Mapping[str, Any] | None
    finetune: Mode | str | None
    """Fine-tune the pruned model with its zeros kept."""
    finetune_minutes: float | None
    """Limit on the time of the fine-tuning, with loading, measuring and saving; the learning rate falls with it. [one
    pass over the text]"""
    finetune_tokens: int | None
    """Fine-tune on so many tokens: as many steps as they fill. [one pass over the text]"""
    finetune_lr: float | None
    """Peak rate of the fine-tuning. [1e-4 for lora, 2e-3 for lora-distill, else 5e-5]"""
    finetune_rates: Literal["absolute", "relative"]
    """absolute: one learning rate for all that is trained; relative: times the size of each matrix and vector, so that
    one rate serves models with smaller or larger weights."""
    finetune_accumulate: int | None
    """Forward passes per step of the fine-tuning. [8 of text, 1 of images]"""
    finetune_dtype: Literal["float32", "bfloat16"]
    """What the fine-tuning computes in; trained weights are float32."""
    evaluate: bool | EvaluatePart | Mapping[str, Any]
    """Measure perplexity."""
    evaluate_dense: bool
    """Measure the dense model's perplexity too."""
    eval_data: TextData | None
    """Text for perplexity, comma-separated. [test split of the calibration corpus; of a text of your own the last
    tenth, which is held out]"""
    eval_images: int | None
    """Use only so many images of each evaluation set, evenly spaced. [all]"""
    eval_tokens: int | None
    """Use only so many tokens of each evaluation text. [all]"""
    eval_zero_shot: bool
    """Run zero-shot tasks on the dense and the pruned model (needs coprune[eval])."""
    tasks: str | Sequence[str] | None
    """Tasks of lm-eval to run, comma-separated; implies --eval-zero-shot.
    [boolq,rte,hellaswag,winogrande,arc_easy,arc_challenge,openbookqa]"""
    num_fewshot: int
    """Solved examples before every question."""
    include_path: File | None
    """Folder with task definitions of your own (YAML); those that run code (`!function`) need --trust-tasks."""
    trust_tasks: bool
    """Let task definitions run the code that they name; read it first."""
    limit: int | None
    """Only the first so many items of each task. [all]"""
    apply_chat_template: bool
    """Put the tasks' prompts in the tokenizer's chat template."""
    gen_kwargs: str | None
    """How tasks that generate do so, as in max_gen_toks=64,do_sample=true,temperature=0.7."""
    log_samples: File | None
    """Folder for every item of the tasks with the model's answer, a .jsonl file per model and task."""
    prompt: str
    """Text that both models continue, for the report; empty for none, as for streamed models."""
    layer_error: bool
    """Measure every matrix's relative layer error (costs little)."""
    gate: bool
    """Let a model that is saved answer a few short prompts, and say whether the answers loop or are empty."""
    require: str | None
    """Exit with 3, once all is saved, unless the answers, or what is measured, are so: conditions with commas between,
    such as 'loops<=dense+1,kl<0.5' or 'perplexity<=dense*1.05' (accuracy, word_error; cosine, overlap, alike with
    the dense model); no more answers may be empty than the dense model's unless that is said: empty<=dense+1."""
    output: OutputPart | Mapping[str, Any]
    save: File | None
    """Run folder for recipe, report and log. [out/MODEL/PATTERN/METHOD]"""
    save_model: File | None
    """Folder for the pruned model and tokenizer; NAME.gguf where a GGUF file loses experts, blocks or tokens, for a
    file in which all else has the source's bytes. [not saved]"""
    encoding: Literal["source", "dense"]
    """How the saved model's tensors are stored: as the source's are (FP8, MXFP4, INT4 …, else dense), or dense, as any
    tool reads them."""
    report_to: str | Sequence[str] | None
    """Also log to these, comma-separated: tensorboard, wandb, mlflow, trackio."""
    push_to_hub: str | None
    """Upload the saved model with its card to this repository of the Hub."""
    private: bool | None
    """Let nobody else see that repository, which is then a new one."""
    overwrite: bool | None
    """Replace what an earlier run left in the folders of this one."""
    log_json: File | None
    """Also write what happens to this file, one JSON object a line."""


class PruneArguments(MethodArguments, StructureArguments, CalibrationArguments, OutcomeArguments, total=False):
    """A recipe's settings, but for the model and the method's name, and the methods' own options."""
