"""What removing experts costs, by score and by domain, on a mixture made from a small dense model.

    python benchmarks/experts.py OUT [--model smollm2-135m] [--steps 32] [--tokens 4096] [--shares 0.25,0.5] [--only channels]

Trained mixtures need a download, so one is made: the channels of every MLP are clustered into eight experts by when they
are active, a router is fitted to the experts' contributions, and both are trained toward the dense MLP's outputs, with
four experts per token. The domains are Wikipedia passages and Python code. For comparison, the same shares of every
expert's channels are removed. The mixture is kept in OUT/mixture and reused. Prints each line as soon as it is measured.
"""

from __future__ import annotations

import argparse
import sysconfig
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

import coprune
from coprune.data.corpora import embedded_calibration
from coprune.model.loaded_model import open_model
from coprune.recipe.parts import ModelPart

EXPERTS, TOP, SEQLEN, WINDOWS = 8, 4, 512, 8


def main() -> None:
    """Make the mixture and measure it."""
    asked = _options()
    torch.manual_seed(0)
    asked.out.mkdir(parents=True, exist_ok=True)
    texts = write_texts(asked.out)
    mixture = asked.out / "mixture"
    if not mixture.is_dir():
        make_mixture(asked.model, texts, mixture, asked.steps)
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


def make_mixture(name: str, texts: dict[str, Path], folder: Path, steps: int) -> None:
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
    mixture.set_experts_implementation("eager")
    mixture.requires_grad_(False)
    mixture.load_state_dict(dense.state_dict(), strict=False)
    _split_mlps(dense, mixture, windows[:WINDOWS], steps)
    mixture.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _windows(tokenizer: object, text: Path) -> Tensor:
    """N × S int64: the first tokens of a text in windows."""
    ids = tokenizer(text.read_text("utf-8")[:1_500_000], verbose=False)["input_ids"]  # type: ignore[operator]
    return torch.tensor(ids[: len(ids) // SEQLEN * SEQLEN]).view(-1, SEQLEN)


@torch.no_grad()
def _split_mlps(dense: PreTrainedModel, mixture: PreTrainedModel, windows: Tensor, steps: int) -> None:
    """Give every block's experts the dense MLP's channels, so that chosen experts sum to their part of it, and train them."""
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
        with torch.enable_grad():
            error = _trained(experts, hidden, active @ down.T, steps)
        print(f"block {index}: relative error {error:.3f}", flush=True)


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
    """E × H: a router whose logits follow the logarithm of each expert's output norm, scaled so that gates are nearly equal."""
    wanted = answers.log()
    wanted = 0.2 * (wanted - wanted.mean(dim=1, keepdim=True))
    gram = hidden.T @ hidden
    gram.diagonal().add_(0.01 * gram.diagonal().mean())
    solved: Tensor = torch.linalg.solve(gram, hidden.T @ wanted)
    return solved.T


def _trained(experts: torch.nn.Module, hidden: Tensor, wanted: Tensor, steps: int) -> float:
    """Train a router and its experts toward the dense MLP's outputs; returns the relative error of the last batches."""
    experts.requires_grad_(True)
    optimizer = torch.optim.Adam(
        [
            {"params": experts.get_submodule("gate").parameters(), "lr": 1e-3},
            {"params": experts.get_submodule("experts").parameters(), "lr": 3e-4},
        ]
    )
    generator, errors = torch.Generator().manual_seed(0), list[float]()
    for _ in range(steps):
        batch = torch.randperm(len(hidden), generator=generator)[:512]
        found = experts(hidden[batch][None])[0]
        # Normalised per token: the first one of a text is a thousand times as large as the others.
        error = ((found - wanted[batch]).square().sum(dim=1) / wanted[batch].square().sum(dim=1)).mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    experts.requires_grad_(False)
    return sum(errors[-4:]) / len(errors[-4:])


def measure(asked: argparse.Namespace, mixture: Path, texts: dict[str, Path]) -> None:
    """Remove experts by every score, and channels of all experts; one pass over both domains gives the scores."""
    measured = f"embedded,{texts['code.test']}"
    domains = {"wiki": texts["wiki"], "code": texts["code"]}
    print(f"{'way':40} {'parameters':>12} {'Wikipedia':>18} {'code':>18}   kept of wiki, code", flush=True)
    kept = asked.out / "scored" / "experts.json"
    text = {"domains": (), "dataset": ",".join(map(str, domains.values())), "nsamples": len(domains) * asked.samples}
    ways: dict[str, dict[str, Any]] = {
        "experts, reap, blended": {"score": "reap"},
        "experts, frequency, blended": {"score": "frequency"},
        "experts, random": {"score": "random"},
        "experts, aimer": {"score": "aimer", "domains": ()},
        "experts, reap, Wikipedia's alone": {"score": "reap", "blend": "wiki=1,code=0"},
        "experts, reap, code's alone": {"score": "reap", "blend": "wiki=0,code=1"},
        "channels, obs": {"score": "obs", "align": 16, **text},
        "channels, wanda_sp": {"score": "wanda_sp", "align": 16, **text},
    }
    dense = False
    for share in map(float, asked.shares.split(",")):
        for way, settings in ways.items():
            if asked.only not in way:
                continue
            source = str(kept) if kept.is_file() else domains
            given = {"nsamples": asked.samples, "domains": source, **settings}
            result = coprune.prune(
                str(mixture),
                remove=f"{way.split(',')[0]}={share}",
                seqlen=SEQLEN,
                bos="never",
                eval_data=measured,
                eval_tokens=asked.tokens,
                evaluate_dense=not dense,
                save=kept.parent if given["domains"] is domains else None,
                quiet=True,
                **given,
            )
            report = result.report
            if not dense:
                whole = " ".join(f"{entry.dense or 0:18.2f}" for entry in report.perplexity)
                print(f"{'all experts':40} {report.model.parameters:12,} {whole}", flush=True)
                dense = True
            size = result.model.num_parameters() if result.model is not None else 0
            figures = " ".join(f"{entry.pruned:18.2f}" for entry in report.perplexity)
            covered = ", ".join(f"{part:.1%}" for part in report.covered.values())
            print(f"{f'{share:g} of {way}':40} {size:12,} {figures}   {covered}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder for the mixture, the texts and the scores")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=32, help="of every block's training, 512 tokens each")
    parser.add_argument("--samples", type=int, default=8, help="of each domain")
    parser.add_argument("--tokens", type=int, default=4096, help="of each text")
    parser.add_argument("--shares", default="0.25,0.5")
    parser.add_argument("--only", default="", help="ways whose names hold this, such as channels")
    return parser.parse_args()


if __name__ == "__main__":
    main()
