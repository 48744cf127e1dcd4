"""Plain one-shot pruning and quantization of Llama-type models, to hold faster code against.

Example::

    python benchmarks/naive.py MODEL TOKENS.json --method wanda --sparsity 0.5
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from naive_methods import gptq, magnitude, rtn, sparsegpt, wanda
from naive_pruning import admm, alps, dsnot, owl_fractions, ria, wanda_refit, wanda_variant
from perplexity import perplexities
from torch import Tensor, nn

METHODS: dict[str, tuple[Callable[..., Tensor], str | None]] = {
    "magnitude": (magnitude, None),
    "wanda": (wanda, "diagonal"),
    "wanda_variant": (wanda_variant, "diagonal"),
    "wanda_refit": (wanda_refit, "gram"),
    "ria": (ria, "diagonal"),
    "dsnot": (dsnot, "tallies"),
    "sparsegpt": (sparsegpt, "gram"),
    "admm": (admm, "gram"),
    "alps": (alps, "gram"),
    "rtn": (rtn, None),
    "gptq": (gptq, "gram"),
}


class Reached(Exception):
    """Raised to leave the forward pass at the first block."""


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer of a block by its name there."""
    return {name: part for name, part in block.named_modules() if isinstance(part, nn.Linear)}


def first_inputs(model: nn.Module, samples: list[list[int]]) -> list[tuple[Tensor, dict]]:
    """Hidden state and keyword arguments with which each sample enters the first block."""
    caught: list[tuple[Tensor, dict]] = []

    def catch(_: nn.Module, args: tuple, kwargs: dict) -> None:
        caught.append((args[0], kwargs))
        raise Reached

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for ids in samples:
        with contextlib.suppress(Reached):
            model(torch.tensor([ids]), use_cache=False)
    handle.remove()
    return caught


def run_block(block: nn.Module, inputs: list[tuple[Tensor, dict]]) -> list[tuple[Tensor, dict]]:
    """Send each sample through a block; its keyword arguments go on to the next one."""
    outputs = []
    for hidden, kwargs in inputs:
        out = block(hidden, **kwargs)
        outputs.append((out[0] if isinstance(out, tuple) else out, kwargs))
    return outputs


def gram_of(x: Tensor) -> Tensor:
    """Gram matrix of inputs ``[tokens, in]``."""
    return x.T @ x


def diagonal_of(x: Tensor) -> Tensor:
    """Diagonal of the Gram matrix."""
    return x.square().sum(0)


def tallies_of(x: Tensor) -> Tensor:
    """Sums, sums of squares, tokens and sequences (one) of each input of a sequence."""
    one = torch.ones(x.shape[1], dtype=x.dtype)
    return torch.stack([x.sum(0), x.square().sum(0), len(x) * one, one])


STATISTICS = {"gram": gram_of, "diagonal": diagonal_of, "tallies": tallies_of}


def observe(
    block: nn.Module, inputs: list[tuple[Tensor, dict]], statistic: str
) -> dict[str, Tensor]:
    """Sum of a statistic over the samples, float64, at the input of each linear layer."""
    sums: dict[str, Any] = dict.fromkeys(linears(block), 0)

    def hook(name: str) -> Callable:
        def add(_: nn.Module, args: tuple) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums[name] + STATISTICS[statistic](x)

        return add

    handles = [part.register_forward_pre_hook(hook(name)) for name, part in linears(block).items()]
    run_block(block, inputs)
    for handle in handles:
        handle.remove()
    return sums


@torch.no_grad()
def fractions_by_outliers(
    model: nn.Module, samples: list[list[int]], sparsity: float
) -> list[float]:
    """Fraction that OWL removes from each block, from one pass of the dense model."""
    inputs, scores = first_inputs(model, samples), []
    for block in model.model.layers:
        found = observe(block, inputs, "diagonal")
        own = [part.weight.abs() * found[name].sqrt() for name, part in linears(block).items()]
        scores.append(torch.cat([score.flatten() for score in own]))
        inputs = run_block(block, inputs)
    return owl_fractions(scores, sparsity)


@torch.no_grad()
def compress(
    model: nn.Module, samples: list[list[int]], method: str, owl: bool = False, **options: Any
) -> None:
    """Compress all linear layers of all blocks in place.

    Parameters
    ----------
    model : nn.Module
        Causal language model with ``model.model.layers``.
    samples : list of list of int
        Calibration windows; not looked at by ``magnitude`` and ``rtn``.
    method : str
        A name of `METHODS`.
    owl : bool
        Whether OWL says how much is removed from each block; for unstructured pruning.
    **options
        The options of that method, by the argument names of its function.
    """
    function, statistic = METHODS[method]
    inputs = first_inputs(model, samples) if statistic else []
    shares = fractions_by_outliers(model, samples, options["sparsity"]) if owl else []
    for index, block in enumerate(model.model.layers):
        if owl:
            options["sparsity"] = shares[index]
        found = observe(block, inputs, statistic) if statistic else {}
        for name, part in linears(block).items():
            arguments = [found[name]] if statistic else []
            part.weight.copy_(function(part.weight, *arguments, **options))
        inputs = run_block(block, inputs)


def method_options(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the method asked for, as keyword arguments of its function."""
    if args.method == "dense":
        return {}
    if args.method in ("rtn", "gptq"):
        options: dict[str, Any] = {"bits": args.bits, "group_size": args.group_size}
        options["symmetric"] = not args.asymmetric
        if args.method == "gptq":
            options["act_order"] = not args.no_act_order
        return options
    pattern = tuple(int(part) for part in args.pattern.split(":")) if args.pattern else None
    sparsity = 1 - pattern[0] / pattern[1] if pattern else args.sparsity
    return {"sparsity": sparsity, "pattern": pattern, "owl": args.owl}


def block_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weight of every linear layer of every block, by its name in the checkpoint."""
    return {
        f"model.layers.{index}.{name}.weight": part.weight.detach()
        for index, block in enumerate(model.model.layers)
        for name, part in linears(block).items()
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("tokens", type=Path, help="file written by tokens.py")
    parser.add_argument("--method", choices=["dense", *METHODS], required=True)
    parser.add_argument("--sparsity", type=float, default=0.5, help="fraction removed")
    parser.add_argument("--pattern", help="N:M, N = kept; overrides --sparsity")
    parser.add_argument("--owl", action="store_true", help="fractions by outliers of the blocks")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--no-act-order", action="store_true")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for the block weights (safetensors)")
    parser.add_argument("--json", type=Path, help="JSON list to add the result to")
    args = parser.parse_args()

    import transformers
    from safetensors.torch import save_file

    content = args.tokens.read_bytes()
    tokens = json.loads(content)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.eval()
    options = method_options(args)
    begin = time.perf_counter()
    if args.method != "dense":
        compress(model, tokens["calib"], args.method, **options)
    seconds = time.perf_counter() - begin
    weights = block_weights(model)
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    result = {
        "model": Path(args.model).name,
        "tokens_sha256": hashlib.sha256(content).hexdigest(),
        "method": args.method,
        "options": options,
        "seconds": round(seconds, 1),
        "sparsity": zeros / sum(weight.numel() for weight in weights.values()),
        "perplexity": perplexities(model, tokens["evals"]),
        "machine": {
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    print(json.dumps(result), flush=True)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        save_file(weights, args.out / "block_linears.safetensors")
    if args.json:
        rows = json.loads(args.json.read_text()) if args.json.exists() else []
        args.json.write_text(json.dumps([*rows, result], indent=1) + "\n")


if __name__ == "__main__":
    main()
