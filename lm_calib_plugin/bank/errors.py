"""Output errors of layers compressed under one set of statistics and judged under another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from lm_calib_plugin import engine
from lm_calib_plugin.bank.layout import InputRow
from lm_calib_plugin.bank.store import Bank
from lm_calib_plugin.errors import UserError, listed
from lm_calib_plugin.method import Method
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.stages import UNIFORM
from lm_calib_plugin.statistics import BANKED, output_error


def check_banked(recipe: Recipe) -> None:
    """Refuse methods that a bank cannot judge.

    Raises
    ------
    UserError
        When a stage looks at more than second moments, or layers are not treated alike.
    """
    method: Method = recipe.make_method()
    if method.scope == "model":
        raise UserError(
            "method",
            f"`{recipe.method}` takes whole parts out of the model",
            "a bank judges layers one by one",
            "judge the sets for wanda or sparsegpt, and use the best with your method",
        )
    for name in ("overrides", "bits"):
        if (recipe.overrides if name == "overrides" else recipe.bits_budget) is not None:
            raise UserError(
                name,
                f"got {getattr(recipe, name)}",
                "a bank judges every layer at one width",
                "judge the sets with bits=4, and use the best with yours",
            )
    if method.statistic not in BANKED:
        raise UserError(
            "method",
            f"`{recipe.method}` looks at {method.statistic} statistics of the inputs",
            f"a bank holds second moments, for methods that look at {listed(BANKED[1:])}",
            "judge the sets for wanda or sparsegpt, and use the best with your method",
        )
    if method.transform is not None or method.block_rounding is not None:
        stage = "rounding" if method.transform is None else "transform"
        raise UserError(
            stage,
            f"got {recipe.stages[stage].text()}",
            "a bank judges layers one by one, as they are in the model",
            "judge the sets for gptq, and use the best with your method",
        )
    if method.kind != "pruning" and method.uses_heldout:
        raise UserError(
            "damp" if recipe.damp == "auto" else "method",
            f"got {recipe.damp if recipe.damp == 'auto' else recipe.method}",
            "a bank holds no sequences held out for a layer to choose by",
            "judge the sets for gptq with a number as damp, and use the best with your method",
        )
    if method.correction:
        raise UserError(
            "correction",
            f"got {method.correction:g}",
            "a bank holds what the dense model does, where nothing is to be corrected",
            "judge the sets with correction=0, and use the best with yours",
        )
    allocation = recipe.stages.get("allocation")
    if allocation is not None and allocation.name != UNIFORM:
        raise UserError(
            "allocation",
            f"got {allocation.text()}",
            "a bank judges every layer at one strength",
            "judge the sets with allocation=uniform, and use the best with yours",
        )


def layers_by_input(
    bank: Bank, layers: Sequence[engine.TargetLayer], share: tuple[int, int] = (0, 1)
) -> list[tuple[InputRow, list[engine.TargetLayer]]]:
    """Return the inputs of the bank with the layers that read them, in the order of the model.

    Parameters
    ----------
    layers
        All or some of the layers that the bank was built for.
    share
        ``(i, k)``: the i-th of k nearly equal parts of the inputs, dealt so that every kind of
        layer comes into every part.

    Raises
    ------
    UserError
        When a layer is not in the bank.
    """
    by_name = {layer.name: layer for layer in layers}
    missing = by_name.keys() - {name for row in bank.inputs for name in row.layers}
    if missing or not by_name:
        first = sorted(missing)[:3]
        more = f" and {len(missing) - len(first)} more" if len(missing) > len(first) else ""
        raise UserError(
            "bank",
            f"{bank.folder} does not hold {listed(first) + more if first else 'no layer at all'}",
            f"it holds {sum(len(row.layers) for row in bank.inputs)} layers",
            "choose among these (targets=, ignore=), or build another bank",
        )
    found = []
    for row in bank.inputs:
        own = [by_name[name] for name in row.layers if name in by_name]
        if own:
            found.append((row, own))
    first_part, parts = share
    # Blocks repeat: with `i % parts` alone a part could hold one kind of layer only.
    return [item for i, item in enumerate(found) if (i + i // parts) % parts == first_part]


def parts_of(bank: Bank, layers: Sequence[engine.TargetLayer], wanted: int) -> int:
    """Return into how many parts the inputs can be dealt with something in each."""
    return max(1, min(wanted, len(layers_by_input(bank, layers))))


def spread_rows(weight: Tensor, rows: int | None) -> Tensor:
    """Return ``rows`` evenly spread rows of a weight ``[out, in]``; None: all of them."""
    out = weight.shape[0]
    if rows is None or rows >= out:
        return weight
    return weight[torch.arange(rows, device=weight.device) * out // rows]


def layer_errors(
    bank: Bank,
    layers: Sequence[engine.TargetLayer],
    methods: Mapping[str, tuple[Method, Tensor | None]],
    judges: Mapping[str, Tensor],
    *,
    share: tuple[int, int] = (0, 1),
    rows: int | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Compress every layer in several ways and judge each on several domains.

    No forward pass: statistics come from the bank, weights from the dense model, which is not
    changed; the work is done where each layer is. One-shot: every layer sees dense activations.

    Parameters
    ----------
    bank, layers
        Statistics, and the layers of the dense model.
    methods
        Name -> the method, and the weights ``[sequences]`` of its calibration set (None for a
        method without data).
    judges
        Name of a domain -> weights of the sequences that it is judged on.
    share
        ``(i, k)``: only the i-th of k parts of the inputs; see :func:`layers_by_input`.
    rows
        Judge so many evenly spread output rows only; None: all. Methods whose rows depend on each
        other compress all of them.

    Returns
    -------
    dict
        Name -> relative squared output errors ``tr(D H D^T) / tr(W H W^T)``, float64
        ``[layers, domains]``; NaN where the dense output is zero on a domain.

    Raises
    ------
    UserError
        When the bank does not hold a layer.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in methods}
    work = layers_by_input(bank, layers, share)
    for row, own in tqdm(work, desc="layer errors", disable=not progress):
        device = own[0].device
        grams = [bank.gram(row, weights, device).gram() for weights in judges.values()]
        whole = [layer.read() for layer in own]
        before = [spread_rows(weight, rows) for weight in whole]
        sizes = [[output_error(weight, gram) for gram in grams] for weight in before]
        errors: dict[str, list[list[float]]] = {}
        for name, (method, weights) in methods.items():
            # One set of statistics at a time: Gram matrices of wide layers are large.
            stats = bank.statistics(
                row, "none" if weights is None else method.statistic, weights, device
            )
            errors[name] = []
            for layer, full, weight, size in zip(own, whole, before, sizes, strict=True):
                dtype = layer.parameter.dtype
                if method.rows_independent:
                    result = method.compress(weight, stats, dtype).weight
                else:
                    result = spread_rows(method.compress(full, stats, dtype).weight, rows)
                change = result.to(dtype).float() - weight
                errors[name].append(
                    [
                        output_error(change, gram) / s if s > 0 else float("nan")
                        for gram, s in zip(grams, size, strict=True)
                    ]
                )
        for name in methods:
            found[name] += errors[name]
    return {
        name: torch.tensor(values, dtype=torch.float64).reshape(-1, len(judges))
        for name, values in found.items()
    }
