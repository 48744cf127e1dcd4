"""Factors of equal matrices that are computed once: the bits of those computed anew."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
import torch

from lm_calib_plugin.statistics import InverseFactor, inverse_factor, remembered_factors
from lm_calib_plugin.statistics import factor as module


class Kept:
    """A memory that forgets nothing."""

    def __init__(self) -> None:
        self.found: dict[Hashable, InverseFactor] = {}
        self.hits = 0

    def recall(self, name: Hashable) -> InverseFactor | None:
        known = self.found.get(name)
        self.hits += known is not None
        return None if known is None else known.copy()

    def keep(self, name: Hashable, factor: InverseFactor) -> None:
        self.found[name] = factor.copy()


def gram(seed: int = 0, width: int = 12) -> torch.Tensor:
    rows = torch.randn(40, width, generator=torch.Generator().manual_seed(seed))
    rows[:, 3] = 0
    return rows.t() @ rows


def same(one: InverseFactor, other: InverseFactor) -> bool:
    return (
        torch.equal(one.upper, other.upper)
        and torch.equal(one.dead, other.dead)
        and one.damp == other.damp
        and one.upper.stride() == other.upper.stride()
    )


def test_an_equal_matrix_has_the_factor_it_would_get() -> None:
    alone = inverse_factor(gram(), 0.01)
    memory = Kept()
    with remembered_factors(memory):
        for hits in (0, 1, 2):
            found = inverse_factor(gram(), 0.01)
            assert same(found, alone)
            assert memory.hits == hits
            # What a caller does to it stays with the caller.
            found.upper.zero_()
            found.dead.fill_(True)
    assert len(memory.found) == 1
    with remembered_factors(None):
        inverse_factor(gram(), 0.01)
    inverse_factor(gram(), 0.01)
    assert memory.hits == 2


def test_another_matrix_ridge_or_layout_is_another_factor() -> None:
    turned = gram()
    turned[2, 5] += 1e-3  # no longer symmetric, so that its transpose is another matrix
    cases = [(gram(), 0.01), (gram(), 0.02), (gram(1), 0.01), (turned, 0.01), (turned.t(), 0.01)]
    order = torch.arange(11, -1, -1)
    cases += [(gram()[order][:, order], 0.01), (torch.zeros(12, 12), 0.01)]
    alone = [inverse_factor(*case) for case in cases]
    memory = Kept()
    with remembered_factors(memory):
        for case, expected in zip(cases, alone, strict=True):
            assert same(inverse_factor(*case), expected)
        assert memory.hits == 0
        for case, expected in zip(cases, alone, strict=True):
            assert same(inverse_factor(*case), expected)
        assert memory.hits == len(cases)


def test_other_threads_of_the_machine_sum_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Kept()
    with remembered_factors(memory):
        inverse_factor(gram(), 0.01)
        monkeypatch.setattr(module.torch, "get_num_threads", lambda: 99)
        inverse_factor(gram(), 0.01)
    assert memory.hits == 0
