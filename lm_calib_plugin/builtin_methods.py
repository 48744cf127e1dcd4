"""Rows of the registry: methods that prune, and methods that quantize."""

from __future__ import annotations

from typing import Any

from lm_calib_plugin.registry import Entry

_PRUNING = "lm_calib_plugin.pruning."
_STRUCTURE = _PRUNING + "structure."
_PIPELINE = _PRUNING + "pipeline:Pipeline"
_QUANTIZATION = "lm_calib_plugin.quantization."

# Recipe fields of every pipeline; `damp` comes with parts that use the Gram matrix.
PIPELINE_OPTIONS = (
    "sparsity", "pattern", "group", "compat", "damp", "correction", "allocation", "score",
    "refine", "update",
)  # fmt: skip


def _preset(
    name: str, summary: str, arxiv: str, *, needs_data: bool = True, **stages: Any
) -> Entry:
    """Return the row of a named point in the grid of pruning stages."""
    return Entry(
        "pruning",
        name,
        _PIPELINE,
        summary,
        f"https://arxiv.org/abs/{arxiv}" if arxiv else "",
        needs_data=needs_data,
        options=PIPELINE_OPTIONS,
        stages=tuple(stages.items()),
    )


def _depth(name: str, target: str, summary: str, arxiv: str, *options: str) -> Entry:
    """Return the row of a method that removes blocks or parts of them."""
    return Entry(
        "pruning",
        name,
        _STRUCTURE + target,
        summary,
        f"https://arxiv.org/abs/{arxiv}",
        options=("blocks", "sparsity", *options, "update"),
        scope="model",
    )


QUANTIZER_OPTIONS = (
    "scheme", "bits", "group_size", "symmetric", "transform", "grid", "rounding", "observer",
    "act_bits", "act_dynamic", "kv_bits", "act_order", "damp", "correction", "compat",
)  # fmt: skip


def _quantizer(
    name: str, summary: str, paper: str, *, needs_data: bool = True, **stages: Any
) -> Entry:
    """Return the row of a named point in the grid of quantization stages."""
    return Entry(
        "quantization",
        name,
        _QUANTIZATION + "pipeline:Quantizer",
        summary,
        paper,
        needs_data=needs_data,
        options=QUANTIZER_OPTIONS,
        stages=tuple(stages.items()),
    )


METHODS: tuple[Entry, ...] = (
    _preset(
        "magnitude",
        "smallest weights of each layer",
        "1506.02626",
        needs_data=False,
        score="magnitude",
    ),
    _preset(
        "wanda",
        "smallest |weight| x input norm of each output row",
        "2306.11695",
        score="wanda",
    ),
    Entry(
        "pruning",
        "ria",
        _PIPELINE,
        "smallest share of row and column x root of the input norm",
        "https://openreview.net/forum?id=Tr0lPx9woF",
        options=PIPELINE_OPTIONS,
        stages=(("score", "ria"),),
    ),
    _preset(
        "sparsegpt",
        "second-order mask, kept weights updated",
        "2301.00774",
        score="sparsegpt",
        update="obs",
    ),
    _preset(
        "dsnot",
        "wanda, then weights change places until the mean output is kept",
        "2310.08915",
        score="wanda",
        refine="dsnot",
    ),
    _preset(
        "admm",
        "mask grows while the weights are solved for, by alternating directions",
        "2401.02938",
        score="admm_gradual",
        update="admm",
        damp=0.1,
    ),
    _preset(
        "owl",
        "wanda, more from blocks with fewer outliers",
        "2310.05175",
        score="wanda",
        allocation="owl",
    ),
    _preset(
        "owl_sparsegpt",
        "sparsegpt, more from blocks with fewer outliers",
        "2310.05175",
        score="sparsegpt",
        update="obs",
        allocation="owl",
    ),
    _preset(
        "alps",
        "mask by alternating directions, kept weights re-fitted",
        "2406.07831",
        score="admm",
        update="pcg?steps=10&heldout=false",
    ),
    _preset(
        "swap_pcg",
        "ours: support of each row by alternating directions, then exchanges and re-fits",
        "2512.10922",
        score="admm?rho=0.2&steps=12",
        group="row",
        update="pcg?steps=20&swaps=50",
        correction=0.3,
    ),
    _depth(
        "shortgpt",
        "shortgpt:ShortGPT",
        "blocks that turn their input least, all at once",
        "2403.03853",
        "sublayer",
    ),
    _depth(
        "angular",
        "angular:Angular",
        "the run of blocks that turns the last token least",
        "2403.17887",
    ),
    _depth(
        "depth_cosine",
        "depth_cosine:DepthCosine",
        "blocks, attention or MLP by 1 - cos of input and output",
        "2407.16286",
        "sublayer",
    ),
    _depth(
        "depth_l1",
        "depth_l1:DepthL1",
        "blocks, attention or MLP that add least, 1-norm",
        "2407.16286",
        "sublayer",
    ),
    _depth(
        "depth_l2",
        "depth_l2:DepthL2",
        "blocks, attention or MLP that add least, 2-norm",
        "2407.16286",
        "sublayer",
    ),
    _depth(
        "depth_loss",
        "depth_loss:DepthLoss",
        "blocks, attention or MLP that the loss misses least",
        "2407.16286",
        "sublayer",
        "greedy",
    ),
    Entry(
        "pruning",
        "flap",
        _STRUCTURE + "flap:Flap",
        "heads and neurons that fluctuate least, their mean kept in a bias",
        "https://arxiv.org/abs/2312.11983",
        options=("sparsity",),
        scope="model",
    ),
    _quantizer(
        "rtn",
        "round to nearest",
        "https://arxiv.org/abs/2206.01861",
        needs_data=False,
        rounding="rtn",
    ),
    _quantizer(
        "gptq",
        "second-order rounding, column by column",
        "https://arxiv.org/abs/2210.17323",
        rounding="gptq",
    ),
    _quantizer(
        "gptq_heldout",
        "gptq, except for layers that round to nearest better on sequences held out",
        "https://arxiv.org/abs/2210.17323",
        rounding="gptq_heldout",
    ),
    _quantizer(
        "awq",
        "channels with large inputs scaled up, ranges searched, round to nearest",
        "https://arxiv.org/abs/2306.00978",
        transform="awq",
        grid="clip",
        rounding="rtn",
    ),
    _quantizer(
        "smoothquant",
        "large inputs scaled down into the weights, round to nearest",
        "https://arxiv.org/abs/2211.10438",
        transform="smoothquant",
        rounding="rtn",
    ),
    _quantizer(
        "rotation",
        "outliers spread by merged Hadamard rotations, then gptq",
        "https://arxiv.org/abs/2404.00456",
        transform="rotation",
        rounding="gptq",
    ),
    _quantizer(
        "autoround",
        "rounding learned block by block with signed gradients",
        "https://arxiv.org/abs/2309.05516",
        rounding="autoround",
    ),
    _quantizer(
        "hqq",
        "half-quadratic zero points; a control without data",
        "https://mobiusml.github.io/hqq_blog/",
        needs_data=False,
        rounding="hqq",
        symmetric=False,
    ),
)
