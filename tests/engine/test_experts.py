"""Experts that saw few tokens: what they are pruned with, and what is said."""

from __future__ import annotations

import pytest
import torch

from lm_calib_plugin import CalibrationSet, Recipe, compress
from lm_calib_plugin.engine.experts import fill_up
from lm_calib_plugin.engine.layers import TargetLayer
from lm_calib_plugin.statistics import STATISTICS, Gram, LayerStats
from tests.engine.test_walk import QUIET
from tests.tiny import make_model, random_ids

COUNTS = (0, 5, 7, 40)
WIDTH = 6


def experts(kind: str) -> list[tuple[TargetLayer, LayerStats]]:
    module = torch.nn.Module()
    module.down_proj = torch.nn.Parameter(torch.zeros(len(COUNTS), 3, WIDTH))
    found = []
    for expert, count in enumerate(COUNTS):
        stats = STATISTICS[kind].empty(WIDTH)
        stats.update(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(expert)))
        layer = TargetLayer(f"e{expert}", module, "down_proj", 0, False, expert, "down")
        found.append((layer, stats))
    return found


@pytest.mark.parametrize("kind", list(STATISTICS))
def test_missing_tokens_come_from_all_experts(kind: str) -> None:
    before, after = experts(kind), experts(kind)
    assert fill_up(after) == {"e1": 2 * WIDTH - 5, "e2": 2 * WIDTH - 7}
    shared = sum(s.energy().double() for (_, s), n in zip(before, COUNTS, strict=True) if n)
    for expert, count in enumerate(COUNTS):
        own = before[expert][1].energy().double()
        missing = max(0, 2 * WIDTH - count) if count else 0
        expected = own + shared * missing / sum(COUNTS)
        torch.testing.assert_close(after[expert][1].energy().double(), expected, rtol=1e-5, atol=0)
    assert after[0][1].tokens == 0
    assert after[1][1].tokens == after[2][1].tokens == 2 * WIDTH
    if isinstance(after[1][1], Gram):
        # Five tokens leave a singular matrix; filled up it can be factored.
        assert torch.linalg.matrix_rank(before[1][1].gram()) == 5  # type: ignore[attr-defined]
        assert torch.linalg.matrix_rank(after[1][1].gram()) == WIDTH


def test_the_report_tells_who_borrowed() -> None:
    model = make_model("qwen3_moe")
    calibration = CalibrationSet.of(random_ids([6, 6]), seqlen=6)
    report = compress(
        model, None, Recipe(method="sparsegpt", sparsity=0.5, heldout=0), QUIET, calibration
    )
    few = [row for row in report.layers if row.borrowed]
    none = [row for row in report.layers if ".experts." in row.name and row.tokens == 0]
    assert few
    for row in few:
        assert row.tokens
        assert row.borrowed == 2 * row.shape[1] - row.tokens
    told = " ".join(report.warnings)
    assert f"{len(few)} layers ({few[0].name}, ...) saw fewer tokens than 2 for each input" in told
    assert ("no calibration token" in told) == bool(none)
    assert not [row for row in report.layers if ".experts." not in row.name and row.borrowed]
