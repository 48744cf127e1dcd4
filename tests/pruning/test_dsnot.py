"""DSnoT: cases worked by hand, and what must never happen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lm_calib_plugin import compress, registry
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.pruning.parts import Selection, Strength
from lm_calib_plugin.pruning.refinements.dsnot import DSnoT
from lm_calib_plugin.pruning.scores.wanda import Wanda
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.statistics import STATISTICS, Spread
from tests.engine.test_walk import QUIET, calibration
from tests.methods import method_of
from tests.tiny import make_model


def spread(*sequences: list[list[float]]) -> Spread:
    stats = Spread.empty(len(sequences[0][0]))
    for rows in sequences:
        stats.update(torch.tensor(rows))
    return stats


def refine(
    weight: list[float], gone: list[int], stats: Spread, strength: Strength, **options: float
) -> list[int]:
    keep = torch.ones(1, len(weight), dtype=torch.bool)
    keep[0, gone] = False
    part = DSnoT(**options)  # type: ignore[arg-type]
    found = part.refine(torch.tensor([weight]), Selection(keep), stats, strength)
    return (~found.keep[0]).nonzero().flatten().tolist()


# Two tokens: sums 2, 2, 2, 4; variances 1, 1, 4, 1; energies 4, 4, 10, 10.
EASY = [[2.0, 0.0, 3.0, 1.0], [0.0, 2.0, -1.0, 3.0]]
UNSTRUCTURED = Strength(0.5)


def test_a_row_exchanges_one_pair_by_hand() -> None:
    # q = 2, 1, -1, -2; gone are 0 and 1, the row lacks 3.
    # Back comes 0: q / var is 2 there, 1 at 1. Out goes of q < 0 the smaller Wanda score: 2 with
    # 0.5 * 10^0.5 = 1.58, 3 with the same; the first of them. Then 3 - 1 - 2 = 0: sign turns.
    weight = [1.0, 0.5, -0.5, -0.5]
    assert refine(weight, [0, 1], spread(EASY), UNSTRUCTURED) == [0, 1]
    # Where the sign may turn, as in the paper's code, the exchange is made.
    reference = Strength(0.5, compat="reference")
    assert refine(weight, [0, 1], spread(EASY), reference) == [1, 2]


def test_the_sign_of_what_is_lacking_stays() -> None:
    # q = 4, 4, -0.2, -2: lacks 8, after one exchange 3.8, after two -2.2: one is made.
    weight = [2.0, 2.0, -0.1, -0.5]
    assert refine(weight, [0, 1], spread(EASY), UNSTRUCTURED) == [1, 2]
    # In the paper's code a second one follows.
    reference = Strength(0.5, compat="reference")
    assert refine(weight, [0, 1], spread(EASY), reference) == [2, 3]


def test_variance_ranks_what_comes_back() -> None:
    # q = -1, 4, 5, -0.4; gone are 1 and 2: 4 / 1 beats 5 / 4.
    weight = [-0.5, 2.0, 2.5, -0.1]
    assert refine(weight, [1, 2], spread(EASY), UNSTRUCTURED) == [2, 3]
    # Without the variance 5 comes back: 9 - 0.4 - 5 = 3.6, then 4 would: 3.6 - 1 - 4 < 0.
    assert refine(weight, [1, 2], spread(EASY), UNSTRUCTURED, power=0.0) == [1, 3]


def test_threshold_and_cycles_end_a_row() -> None:
    weight = [2.0, 2.0, -0.1, -0.5]  # lacks 8
    for options in ({"threshold": 8.0}, {"cycles": 0}):
        assert refine(weight, [0, 1], spread(EASY), UNSTRUCTURED, **options) == [0, 1]
    assert refine(weight, [0, 1], spread(EASY), UNSTRUCTURED, threshold=7.9) == [1, 2]


def test_means_are_sums_over_a_sequence() -> None:
    # Twice the same sequence: the same means. Both as one: twice as much, twice the threshold.
    weight = [2.0, 2.0, -0.1, -0.5]
    for stats, limit in ((spread(EASY, EASY), 8.0), (spread(EASY + EASY), 16.0)):
        assert refine(weight, [0, 1], stats, UNSTRUCTURED, threshold=limit) == [0, 1]
        assert refine(weight, [0, 1], stats, UNSTRUCTURED, threshold=limit - 0.1) == [1, 2]


def test_reference_sees_the_variance_within_sequences_only() -> None:
    # Channel 1 hardly varies within a sequence, but much between them.
    stats = spread(
        [[3.0, 9.0, 1.0, 1.0], [1.0, 9.1, 3.0, 3.0]], [[3.0, -5.0, 1.0, 1.0], [1.0, -5.1, 3.0, 3.0]]
    )
    # Sums over a sequence: 4, 4, 4, 4. Both removed weights have q = 4: 0 has the smaller variance,
    # by the code's account 1 has.
    weight = [1.0, 1.0, -0.1, -0.2]
    assert refine(weight, [0, 1], stats, UNSTRUCTURED) == [1, 2]
    reference = Strength(0.5, compat="reference")
    assert refine(weight, [0, 1], stats, reference, cycles=1) == [0, 2]


def test_groups_exchange_within_themselves_by_hand() -> None:
    # 1:2 on q = 4, -0.2 | 3, 5: gone are 0 and 2, the row lacks 7. Back comes 0 (4 / 1 beats 3 / 4)
    # for 1: 7 - 4 - 0.2 = 2.8. Then 2 for 3: 2.8 - 3 + 5 = 4.8: the sign stays, though it is more.
    weight = [2.0, -0.1, 1.5, 1.25]
    stats, pattern = spread(EASY), Strength(0.5, (1, 2))
    assert refine(weight, [0, 2], stats, pattern) == [1, 3]
    assert refine(weight, [0, 2], stats, pattern, cycles=1) == [1, 2]


def test_a_group_that_gave_everything_takes_nothing_back() -> None:
    # 1:4: one weight comes back and the only kept one goes; the others of the group stay gone.
    weight = [2.0, 2.0, 0.5, -0.1]
    assert refine(weight, [0, 1, 2], spread(EASY), Strength(0.75, (1, 4))) == [1, 2, 3]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("compat", [None, "reference"])
@pytest.mark.parametrize("pattern", [None, (2, 4), (1, 4), (3, 5), (4, 8)], ids=str)
def test_counts_stay_and_the_mean_output_comes_nearer(
    pattern: tuple[int, int] | None, compat: str | None
) -> None:
    weight, stats = normal(40, 80), Spread.empty(80)
    stats.update(normal(300, 80, seed=1) + 0.3 * normal(80, seed=2))
    strength = Strength(0.5, pattern, compat=compat)
    start = Wanda().select(weight, stats, strength)
    found = DSnoT().refine(weight, start, stats, strength)
    assert not torch.equal(found.keep, start.keep)
    width = pattern[1] if pattern else 80
    groups = [keep.reshape(-1, width).sum(1) for keep in (start.keep, found.keep)]
    assert torch.equal(*groups)
    mean = stats.mean()
    lost = [(weight * ~keep) @ mean for keep in (start.keep, found.keep)]
    assert lost[1].abs().mean() < lost[0].abs().mean()
    if not pattern and not compat:
        assert (lost[1].abs() <= lost[0].abs()).all()


def test_channels_that_never_vary_or_never_fire_are_safe() -> None:
    weight, stats = normal(20, 12), Spread.empty(12)
    x = normal(50, 12, seed=1) + 0.5
    x[:, 3], x[:, 7], x[:, 8] = 2.0, 0.0, 0.0
    stats.update(x)
    start = Wanda().select(weight, stats, UNSTRUCTURED)
    found = DSnoT().refine(weight, start, stats, UNSTRUCTURED)
    assert torch.equal(found.keep.sum(1), start.keep.sum(1))
    assert torch.equal(found.keep[:, 7:9], start.keep[:, 7:9])


def test_values_of_another_mask_are_dropped_with_it() -> None:
    weight, stats = torch.tensor([[2.0, 2.0, -0.1, -0.5]]), spread(EASY)
    keep = torch.tensor([[False, False, True, True]])
    found = Selection(keep, weight * 2, solved="obs", damp=0.5)
    moved = DSnoT().refine(weight, found, stats, UNSTRUCTURED)
    assert (moved.weight, moved.solved, moved.damp) == (None, "", 0.5)
    still = DSnoT(cycles=0).refine(weight, found, stats, UNSTRUCTURED)
    assert still.weight is found.weight


@pytest.mark.parametrize("update", ["none", "obs", "admm", "pcg"])
@pytest.mark.parametrize("score", [n for n in registry.table("score") if n != "random"])
@pytest.mark.parametrize("strength", [{"sparsity": 0.4}, {"pattern": "2:4"}], ids=str)
def test_it_refines_the_mask_of_any_score_before_any_update(
    strength: dict, score: str, update: str
) -> None:
    weight = normal(9, 40)
    x = normal(200, 40, seed=1) + 0.3
    method = method_of("dsnot", score=score, update=update, **strength)
    stats = STATISTICS[method.statistic].empty(40)
    stats.update(x)
    gone = method.compress(weight, stats).weight == 0
    start = method_of("dsnot", score=score, refine="none", **strength).compress(weight, stats)
    assert int(gone.sum()) == int((start.weight == 0).sum())
    assert not torch.equal(gone, start.weight == 0)
    if "pattern" in strength:
        assert (gone.reshape(9, -1, 4).sum(-1) == 2).all()


@pytest.mark.parametrize("option", ["cycles", "threshold", "power"])
def test_negative_options_are_refused(option: str) -> None:
    with pytest.raises(UserError, match=option):
        DSnoT(**{option: -1})


def test_reference_leaves_the_mlp_alone() -> None:
    def masks(**options: str) -> dict[str, Tensor]:
        model = make_model()
        recipe = Recipe(sparsity=0.5, heldout=0, propagate="dense", **options)
        report = compress(model, None, recipe, QUIET, calibration())
        return {row.name: model.get_submodule(row.name).weight != 0 for row in report.layers}

    threshold = "dsnot?threshold=0"  # a tiny model has tiny means
    wanda, ours = masks(method="wanda"), masks(method="dsnot", refine=threshold)
    theirs = masks(method="dsnot", refine=threshold, compat="reference")
    for name, mask in wanda.items():
        assert not torch.equal(ours[name], mask)
        assert torch.equal(theirs[name], mask) == ("mlp" in name)
