"""The rows of the registry that come with this package; nothing here imports a part."""

from __future__ import annotations

from typing import Any

from lm_calib_plugin.registry import Entry

_PRUNING = "lm_calib_plugin.pruning."
_PIPELINE = _PRUNING + "pipeline:Pipeline"
_QUANTIZATION = "lm_calib_plugin.quantization."
_SOURCES = "lm_calib_plugin.calibration.sources."
_SEARCHED = "lm_calib_plugin.bank.searched:"
_BLENDS = "lm_calib_plugin.bank.blends:"
_SELECTORS = "lm_calib_plugin.calibration.selectors."
_PACKERS = "lm_calib_plugin.calibration.packers:"

# Recipe fields of every pipeline; `damp` comes with parts that use the Gram matrix.
PIPELINE_OPTIONS = (
    "sparsity", "pattern", "group", "compat", "damp", "allocation", "score", "refine", "update",
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


BUILTIN: tuple[Entry, ...] = (
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
        "wanda, weights exchanged by exact gain, kept weights re-fitted",
        "",
        score="wanda",
        refine="swap",
        update="pcg",
    ),
    Entry(
        "quantization",
        "rtn",
        _QUANTIZATION + "rtn:RTN",
        "round to nearest",
        "https://arxiv.org/abs/2206.01861",
        needs_data=False,
        options=("bits", "group_size", "symmetric"),
    ),
    Entry(
        "quantization",
        "gptq",
        _QUANTIZATION + "gptq:GPTQ",
        "second-order rounding, column by column",
        "https://arxiv.org/abs/2210.17323",
        options=("bits", "group_size", "symmetric", "act_order", "damp", "compat"),
    ),
    Entry(
        "score",
        "magnitude",
        _PRUNING + "scores.magnitude:Magnitude",
        "|weight|, compared over the layer",
        "https://arxiv.org/abs/1506.02626",
        needs_data=False,
    ),
    Entry(
        "score",
        "wanda",
        _PRUNING + "scores.wanda:Wanda",
        "|weight| x input norm, compared over each row",
        "https://arxiv.org/abs/2306.11695",
    ),
    Entry(
        "score",
        "ria",
        _PRUNING + "scores.ria:RIA",
        "share of row and column x root of the input norm, over the layer",
        "https://openreview.net/forum?id=Tr0lPx9woF",
    ),
    Entry(
        "score",
        "sparsegpt",
        _PRUNING + "scores.sparsegpt:SparseGPT",
        "second-order saliency, over all rows of 128 columns",
        "https://arxiv.org/abs/2301.00774",
        uses_damp=True,
    ),
    Entry(
        "score",
        "admm",
        _PRUNING + "scores.admm:ADMM",
        "the support that ALPS finds by alternating directions, over the layer",
        "https://arxiv.org/abs/2406.07831",
        options=("rho", "steps"),
        uses_damp=True,
    ),
    Entry(
        "score",
        "random",
        _PRUNING + "scores.random_choice:Random",
        "uniform; a control",
        needs_data=False,
        options=("seed",),
    ),
    Entry("refinement", "none", "", "the mask of the score", needs_data=False),
    Entry(
        "refinement",
        "swap",
        _PRUNING + "refinements.swap:Swap",
        "exact exchanges of one weight on the Gram matrix",
        "https://arxiv.org/abs/2512.10922",
        options=("steps", "candidates", "shrink"),
        uses_damp=True,
    ),
    Entry("update", "none", "", "kept weights stay as they are", needs_data=False),
    Entry(
        "update",
        "obs",
        _PRUNING + "updates.obs:OBS",
        "SparseGPT's sweep over any mask",
        "https://arxiv.org/abs/2301.00774",
        uses_damp=True,
    ),
    Entry(
        "update",
        "pcg",
        _PRUNING + "updates.pcg:PCG",
        "re-fit by masked conjugate gradients",
        "https://arxiv.org/abs/2406.07831",
        options=("steps", "swaps", "shrink", "heldout"),
        uses_damp=True,
    ),
    Entry(
        "update",
        "bias",
        _PRUNING + "updates.bias:Bias",
        "the mean output is restored by the bias",
    ),
    Entry(
        "allocation",
        "uniform",
        "",
        "the same fraction in every layer",
        needs_data=False,
    ),
    Entry(
        "allocation",
        "owl",
        _PRUNING + "allocations.owl:OWL",
        "blocks with more outliers keep more",
        "https://arxiv.org/abs/2310.05175",
        options=("m", "lambda"),
    ),
    Entry(
        "allocation",
        "atp",
        _PRUNING + "allocations.atp:ATP",
        "arithmetic progression over the blocks",
        "https://arxiv.org/abs/2502.14770",
        needs_data=False,
        options=("beta",),
    ),
    Entry(
        "allocation",
        "list",
        _PRUNING + "allocations.listed:Listed",
        "the fraction of each block, list?fractions=0.4+0.5+0.6",
        needs_data=False,
        options=("fractions",),
    ),
    Entry(
        "allocation",
        "global",
        _PRUNING + "allocations.global_threshold:Global",
        "one threshold on the scores of all layers",
        needs_data=False,
    ),
    Entry(
        "calibration",
        "self",
        _SOURCES + "self_generated:SelfGenerated",
        "self[:prefix], self:bos or self:chat: the model writes its own text",
        "https://arxiv.org/abs/2410.17711",
    ),
    Entry(
        "calibration",
        "file",
        _SOURCES + "files:Files",
        "file:PATH, a .txt, .jsonl or .parquet file or a folder of them",
    ),
    Entry(
        "calibration",
        "hf",
        _SOURCES + "hub:HubDataset",
        "hf:ORG/NAME[:config][:split][:column], or a local dataset folder",
    ),
    Entry(
        "calibration",
        "task",
        _SOURCES + "tasks:HarnessTask",
        "task:NAME, the training split of a harness task with its own prompt",
    ),
    Entry(
        "calibration",
        "set",
        _SOURCES + "sets:StoredSet",
        "set:DIR, a folder made by lm-calib calibrate",
    ),
    Entry(
        "calibration", "random", _SOURCES + "random_ids:RandomIds", "uniform token ids; a control"
    ),
    Entry(
        "calibration",
        "null",
        _SOURCES + "nulls:Null",
        "null:KIND, controls: random, ascii, ellipsis, shuffle(SOURCE), unigram(SOURCE)",
        "https://arxiv.org/abs/2405.20835",
        nested="varies",
    ),
    Entry(
        "mixture",
        "minimax",
        _SEARCHED + "Minimax",
        "minimax(A+B+C), shares for which the worst domain is as good as can be",
        nested="many",
    ),
    Entry(
        "mixture",
        "weighted",
        _SEARCHED + "Weighted",
        "weighted(A*0.7+B*0.3), shares for a mean over domains with this traffic",
        nested="many",
    ),
    Entry(
        "mixture",
        "no_worse",
        _SEARCHED + "NoWorse",
        "no_worse(A+B)?limit=1.1, the mean, with no domain worse than its own text by more",
        nested="many",
    ),
    Entry(
        "mixture",
        "cross",
        _BLENDS + "Cross",
        "cross(DOMAIN+GENERAL)?lambda=0.5, statistics of both, weighed",
        "https://arxiv.org/abs/2502.18424",
        nested="many",
    ),
    Entry(
        "mixture",
        "tasa",
        _BLENDS + "Tasa",
        "tasa(TARGET+A+B), shares of A and B with the gradient traces of the target",
        "https://arxiv.org/abs/2607.00908",
        nested="many",
    ),
    Entry(
        "packing",
        "longdoc",
        _PACKERS + "LongDocument",
        "one window inside one document longer than seqlen",
    ),
    Entry("packing", "concat", _PACKERS + "Concatenate", "documents joined, then cut into windows"),
    Entry(
        "packing",
        "windows",
        _PACKERS + "Windows",
        "documents joined, windows at random starts that may overlap",
        "https://arxiv.org/abs/2410.17711",
    ),
    Entry(
        "packing",
        "pad",
        _PACKERS + "Pad",
        "one document a row, cut at seqlen, pads excluded from every statistic",
    ),
    Entry(
        "packing",
        "icl",
        _PACKERS + "InContext",
        "several whole examples a row, joined by a blank line",
        "https://arxiv.org/abs/2410.07461",
        options=("icl_examples",),
    ),
    Entry(
        "packing",
        "multilen",
        _PACKERS + "SeveralLengths",
        "windows of 256 to 2048 tokens, each sequence counting alike",
        "https://arxiv.org/abs/2602.07465",
    ),
    Entry(
        "selection",
        "random",
        _SELECTORS + "random_choice:RandomChoice",
        "uniform without replacement; the baseline",
    ),
    Entry(
        "selection",
        "ppl_low",
        _SELECTORS + "perplexity:PerplexityLow",
        "at random from the third of lowest perplexity",
    ),
    Entry(
        "selection",
        "ppl_mid",
        _SELECTORS + "perplexity:PerplexityMiddle",
        "at random from the third of middle perplexity",
    ),
    Entry(
        "selection",
        "ppl_high",
        _SELECTORS + "perplexity:PerplexityHigh",
        "at random from the third of highest perplexity",
    ),
    Entry(
        "selection",
        "zip",
        _SELECTORS + "zip_words:ZipWords",
        "greedy cover of distinct tokens; needs no model",
        "https://arxiv.org/abs/2603.16105",
    ),
    Entry(
        "selection",
        "kmeans",
        _SELECTORS + "clusters:Clusters",
        "the medoid of each cluster of activations (COLA)",
        "https://arxiv.org/abs/2510.10618",
    ),
    Entry(
        "selection",
        "kcenter",
        _SELECTORS + "centers:FarthestFirst",
        "farthest first in activations",
        "https://arxiv.org/abs/1708.00489",
    ),
    Entry(
        "selection",
        "herding",
        _SELECTORS + "herding:Herding",
        "greedy matching of the pool's mean activation",
        "https://arxiv.org/abs/1203.3472",
    ),
    Entry(
        "selection",
        "cover",
        _SELECTORS + "cover:OutlierCover",
        "greedy cover of outlier channels (COVERCAL)",
        "https://arxiv.org/abs/2604.24008",
    ),
    Entry(
        "selection",
        "centroid",
        _SELECTORS + "centroid:Centroid",
        "greedy matching of the mean activation of select_target (ACDM)",
        "https://openreview.net/forum?id=pfw3saHzGU",
        options=("select_target",),
    ),
    Entry(
        "selection",
        "gram_dopt",
        _SELECTORS + "gram_dopt:DOptimal",
        "activations in all directions: greedy log det",
        "https://arxiv.org/abs/1207.6083",
    ),
    Entry(
        "selection",
        "grad_match",
        _SELECTORS + "grad_match:GradientMatch",
        "gradients like those of select_target, unlike each other (after LESS)",
        "https://arxiv.org/abs/2402.04333",
        options=("select_target",),
    ),
)
