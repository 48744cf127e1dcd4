"""Rows of the registry: where calibration text comes from, how it is mixed, cut and chosen."""

from __future__ import annotations

from lm_calib_plugin.registry import Entry

_SOURCES = "lm_calib_plugin.calibration.sources."
_SEARCHED = "lm_calib_plugin.bank.searched:"
_BLENDS = "lm_calib_plugin.bank.blends:"
_SELECTORS = "lm_calib_plugin.calibration.selectors."
_PACKERS = "lm_calib_plugin.calibration.packers:"

SOURCES: tuple[Entry, ...] = (
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
