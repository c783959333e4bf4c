"""A mixture of experts made out of a small dense model, and what removing its experts costs, by score and by domain.

    python benchmarks/experts.py OUT [--model smollm2-135m] [--minutes 4] [--tokens 4096] [--shares 0.125,0.25,0.5]

No trained mixture is at hand without a network, so one is made: the channels of every MLP are clustered into eight experts
by when they are active, a router is fitted to the experts' contributions, and both are trained for some minutes toward
the dense model's logits, four experts a token. The domains are Wikipedia passages and Python code. The mixture stays in
OUT/mixture, and is not made again where it is there. Prints a line as soon as it is measured.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

import coprune
from coprune.data.embedded import embedded_calibration
from coprune.model.opened import open_model
from coprune.recipe.parts import ModelPart

EXPERTS, TOP, SEQLEN = 8, 4, 512


def main() -> None:
    """Make the mixture and measure it."""
    asked = _options()
    torch.manual_seed(0)
    asked.out.mkdir(parents=True, exist_ok=True)
    texts = write_texts(asked.out)
    mixture = asked.out / "mixture"
    if not mixture.is_dir():
        make_mixture(asked.model, texts, mixture, asked.minutes)
    measure(asked, mixture, texts)


def write_texts(folder: Path) -> dict[str, Path]:
    """Write the domains' texts, for calibration and (`….test`) for measuring; returns them by name."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts: dict[str, list[str]] = {"code": [], "code.test": []}
    for file in files:
        parts["code.test" if zlib.crc32(file.name.encode()) % 4 == 0 else "code"].append(file.read_text("utf-8"))
    texts = {"wiki": embedded_calibration().text} | {name: "\n\n".join(part) for name, part in parts.items()}
    found = {}
    for name, text in texts.items():
        found[name] = folder / f"{name}.txt"
        found[name].write_text(text, encoding="utf-8")
    return found


def make_mixture(name: str, texts: dict[str, Path], folder: Path, minutes: float) -> None:
    """Cluster, fit and train, and save the result with the dense model's tokenizer."""
    loaded = open_model(ModelPart(name=name), stream=False)
    dense, tokenizer = loaded.model, loaded.processor
    windows = torch.cat([_windows(tokenizer, texts[domain]) for domain in ("wiki", "code")])
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    config = dense.config
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    more = ("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id")
    settings = {key: getattr(config, key) for key in same + more}
    width = config.intermediate_size // EXPERTS
    made = MixtralConfig(
        **settings,
        rope_parameters=config.rope_parameters,
        head_dim=config.hidden_size // config.num_attention_heads,
        intermediate_size=width,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP,
        sliding_window=None,
    )
    mixture = MixtralForCausalLM(made).eval()
    mixture.load_state_dict(dense.state_dict(), strict=False)
    started = time.perf_counter()
    _split_mlps(dense, mixture, windows[:4])
    print(f"clustered in {time.perf_counter() - started:.0f} s; {mixture.num_parameters():,} parameters", flush=True)
    _distill(dense, mixture, windows[4:], minutes)
    mixture.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _windows(tokenizer: object, text: Path) -> Tensor:
    """N × S int64: the first tokens of a text in windows."""
    ids = tokenizer(text.read_text("utf-8")[:1_500_000], verbose=False)["input_ids"]  # type: ignore[operator]
    return torch.tensor(ids[: len(ids) // SEQLEN * SEQLEN]).view(-1, SEQLEN)


@torch.no_grad()
def _split_mlps(dense: PreTrainedModel, mixture: PreTrainedModel, windows: Tensor) -> None:
    """Give every block's experts the dense MLP's channels, so that the chosen ones add up to their part of it."""
    inputs: dict[int, list[Tensor]] = {}
    layers = dense.get_submodule("model.layers")
    hooks = [
        layer.get_submodule("mlp").register_forward_pre_hook(
            lambda module, args, index=index: inputs.setdefault(index, []).append(args[0].flatten(0, 1))
        )
        for index, layer in enumerate(layers.children())
    ]
    for window in windows:
        dense(window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    for index, layer in enumerate(layers.children()):
        gate, up, down = (layer.get_parameter(f"mlp.{part}_proj.weight") for part in ("gate", "up", "down"))
        hidden = torch.cat(inputs.pop(index))
        active = F.silu(hidden @ gate.T) * (hidden @ up.T)
        order = _clustered(active * down.norm(dim=0))
        experts = mixture.get_submodule(f"model.layers.{index}.mlp")
        experts.get_parameter("experts.gate_up_proj").copy_(torch.cat([gate[order], up[order]], dim=1))
        experts.get_parameter("experts.down_proj").copy_(TOP * down[:, order].permute(1, 0, 2))
        answers = torch.stack([active[:, own] @ down[:, own].T for own in order], dim=1).norm(dim=-1)
        experts.get_parameter("gate.weight").copy_(_fitted(hidden, answers))


def _clustered(active: Tensor) -> Tensor:
    """E × W int64: channels that are active together, as many in each. active: T × C."""
    features = F.normalize(active.abs()[::4].T.sqrt(), dim=1)
    count, size = len(features), len(features) // EXPERTS
    generator = torch.Generator().manual_seed(0)
    centres = features[torch.randperm(count, generator=generator)[:EXPERTS]]
    for _ in range(6):
        likeness = features @ F.normalize(centres, dim=1).T
        own, left = [-1] * count, [size] * EXPERTS
        for place in likeness.flatten().argsort(descending=True).tolist():
            channel, expert = divmod(place, EXPERTS)
            if own[channel] < 0 and left[expert] > 0:
                own[channel], left[expert] = expert, left[expert] - 1
        order = torch.tensor(own).argsort(stable=True).view(EXPERTS, size)
        centres = features[order].mean(dim=1)
    return order


def _fitted(hidden: Tensor, answers: Tensor) -> Tensor:
    """E × H: a router whose logits go with the logarithm of how much an expert answers, and whose gates are nearly equal."""
    wanted = answers.log()
    wanted = 0.2 * (wanted - wanted.mean(dim=1, keepdim=True))
    gram = hidden.T @ hidden
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    solved: Tensor = torch.linalg.solve(gram, hidden.T @ wanted)
    return solved.T


def _distill(dense: PreTrainedModel, mixture: PreTrainedModel, windows: Tensor, minutes: float) -> None:
    """Train router and experts toward the dense model's distribution of the next token."""
    mixture.requires_grad_(False)
    mixture.set_experts_implementation("eager")
    named = {name: p for name, p in mixture.named_parameters() if ".experts." in name or "mlp.gate." in name}
    for parameter in named.values():
        parameter.requires_grad_(True)
    routers = [p for name, p in named.items() if "mlp.gate." in name]
    experts = [p for name, p in named.items() if ".experts." in name]
    optimizer = torch.optim.AdamW([{"params": routers, "lr": 1e-3}, {"params": experts, "lr": 2e-4}], weight_decay=0.0)
    ended, step, losses = time.perf_counter() + 60 * minutes, 0, list[float]()
    while time.perf_counter() < ended:
        window = windows[step % len(windows)][None]
        with torch.no_grad():
            aim = dense(window, use_cache=False).logits.log_softmax(dim=-1)
        found = mixture(window, use_cache=False).logits.log_softmax(dim=-1)
        loss = F.kl_div(found, aim, log_target=True, reduction="none").sum(dim=-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(named.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, losses = step + 1, [*losses, loss.item()]
        if step % 10 == 0 or step == 1:
            print(f"step {step}: KL to dense {sum(losses[-10:]) / len(losses[-10:]):.3f}", flush=True)
    mixture.requires_grad_(False)


def measure(asked: argparse.Namespace, mixture: Path, texts: dict[str, Path]) -> None:
    """Remove experts in every way, by the scores of one pass over both domains."""
    measured = f"embedded,{texts['code.test']}"
    domains = {"wiki": texts["wiki"], "code": texts["code"]}
    print(f"{'way':40} {'parameters':>12} {'Wikipedia':>18} {'code':>18}   kept of wiki, code", flush=True)
    kept = asked.out / "scored" / "experts.json"
    shares = [float(share) for share in asked.shares.split(",")]
    for share in shares:
        for way, settings in {
            "reap, blended": {"score": "reap"},
            "frequency, blended": {"score": "frequency"},
            "random": {"score": "random"},
            "reap, Wikipedia's alone": {"score": "reap", "blend": "wiki=1,code=0"},
            "reap, code's alone": {"score": "reap", "blend": "wiki=0,code=1"},
        }.items():
            first = not kept.is_file()
            source = domains if first else str(kept)
            result = coprune.prune(
                str(mixture),
                remove=f"experts={share}",
                domains=source,
                nsamples=asked.samples,
                seqlen=SEQLEN,
                bos="never",
                eval_data=measured,
                eval_tokens=asked.tokens,
                evaluate_dense=first,
                save=asked.out / "scored" if first else None,
                quiet=True,
                **settings,  # type: ignore[arg-type]
            )
            report = result.report
            if first:
                whole = " ".join(f"{entry.dense or 0:18.2f}" for entry in report.perplexity)
                print(f"{'all experts':40} {report.model.parameters:12,} {whole}", flush=True)
            size = result.model.num_parameters() if result.model is not None else 0
            figures = " ".join(f"{entry.pruned:18.2f}" for entry in report.perplexity)
            covered = ", ".join(f"{part:.1%}" for part in report.covered.values())
            print(f"{f'{share:g} removed, {way}':40} {size:12,} {figures}   {covered}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder for the mixture, the texts and the scores")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--minutes", type=float, default=4.0, help="of distillation")
    parser.add_argument("--samples", type=int, default=8, help="of each domain")
    parser.add_argument("--tokens", type=int, default=4096, help="of each text")
    parser.add_argument("--shares", default="0.125,0.25,0.5")
    return parser.parse_args()


if __name__ == "__main__":
    main()
