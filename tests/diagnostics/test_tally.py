"""Means, quantiles and intervals over documents, against numpy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lm_calib_plugin.diagnostics.tally import Tally, over_documents
from lm_calib_plugin.diagnostics.tokens import LN2, TokenDivergence, token_divergence

LENGTHS = [3, 50, 1, 17, 8]


def parts(seed: int = 0) -> list[TokenDivergence]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in LENGTHS:
        dense, noise = (2 * torch.randn(length, 31, generator=generator) for _ in range(2))
        targets = torch.randint(31, (length,), generator=generator)
        found.append(token_divergence(dense, dense + noise * length / 20, targets))
    return found


def test_rows_are_means_over_tokens() -> None:
    found = parts()
    row = Tally.of(found).row()
    whole = TokenDivergence.joined(found)
    assert (row["positions"], row["documents"]) == (sum(LENGTHS), len(LENGTHS))
    for name, values in (
        ("js", whole.js), ("kl", whole.kl), ("tv", whole.tv), ("flip_rate", whole.flipped)
    ):  # fmt: skip
        assert row[name]["mean"] == pytest.approx(float(values.mean()))
        assert row[name]["low"] < row[name]["mean"] < row[name]["high"]
    for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        assert row["js"][name] == pytest.approx(np.quantile(whole.js.numpy(), share), rel=1e-6)
    assert row["js_normalized"]["p99"] == row["js"]["p99"] / LN2
    for name in ("dense", "compressed"):
        nll = float(getattr(whole, f"nll_{name}").mean())
        assert row["nll"][name] == pytest.approx(nll)
        assert row["perplexity"][name] == pytest.approx(np.exp(nll))
    json.dumps(row, allow_nan=False)


def test_intervals_are_those_of_documents_taken_again() -> None:
    """Tokens of a document come and go together."""
    generator = np.random.default_rng(0)
    weights = generator.integers(1, 60, 40).astype(float)
    totals = weights * generator.normal(1, 0.5, 40)
    (found,) = over_documents(weights, [totals])
    assert found.value == pytest.approx(totals.sum() / weights.sum())
    taken = generator.integers(40, size=(20000, 40))
    again = totals[taken].sum(1) / weights[taken].sum(1)
    low, high = np.quantile(again, [0.025, 0.975])
    width = high - low
    assert found.low == pytest.approx(low, abs=0.1 * width)
    assert found.high == pytest.approx(high, abs=0.1 * width)
    assert over_documents(weights, [totals]) == [found]


def test_a_tally_in_parts_is_the_whole() -> None:
    found = parts()
    whole, first, second = Tally.of(found), Tally(), Tally()
    for number, part in enumerate(found):
        tally = first if number % 2 else second
        half = len(part) // 2
        for piece in (slice(0, half), slice(half, None)):
            tally.add(number, TokenDivergence(*(v[piece] for v in vars(part).values())))
            tally.add_tokens(number, part.nll_dense[piece], part.nll_compressed[piece])
    first.merge(second)
    row, again = whole.row(), first.row()
    for name in ("js", "kl", "tv", "flip_rate"):
        assert again[name]["mean"] == pytest.approx(row[name]["mean"], rel=1e-12)
    assert again["js"]["p95"] == row["js"]["p95"]
    assert sorted(first.documents) == list(whole.documents)


def test_one_document_tells_nothing_of_others() -> None:
    row = Tally.of(parts()[:1]).row()
    assert row["js"]["low"] is row["js"]["high"] is None
    assert row["js"]["mean"] > 0
    assert Tally().row() == {"positions": 0, "documents": 0, "requests": 0}


def test_the_last_positions() -> None:
    part = parts()[1]
    assert torch.equal(part.last(7).kl, part.kl[-7:])
    assert len(part.last(0)) == 0
