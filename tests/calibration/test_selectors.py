"""Each selector against its definition, written out plainly."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch

from lm_calib_plugin import registry
from lm_calib_plugin.calibration.selectors import zip_words
from lm_calib_plugin.calibration.selectors.centers import farthest_first
from lm_calib_plugin.calibration.selectors.clusters import kmeans
from lm_calib_plugin.calibration.selectors.cover import covered_channels
from lm_calib_plugin.calibration.selectors.grad_match import marginal_relevance
from lm_calib_plugin.calibration.selectors.gram_dopt import d_optimal
from lm_calib_plugin.calibration.selectors.greedy import greedy_cover, match_mean
from lm_calib_plugin.calibration.selectors.perplexity import band_of
from lm_calib_plugin.calibration.selectors.probes import Maxima
from lm_calib_plugin.calibration.selectors.stage import make_selector

NAMES = list(registry.table("selection"))
DRAWN = {"random", "ppl_low", "ppl_mid", "ppl_high", "kmeans"}


def points(count, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


class Given:
    """Features made up for a test."""

    def __init__(self, count, seed=0, target=None):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.nll = randn(count)
        self.means = [randn(count, 6).float(), (5 * randn(count, 6)).float()]
        self.gradients = randn(count, 16)
        spread = randn(10).abs() ** 6
        self.maxima = [
            Maxima(("0.a", "0.b"), (randn(count, 10).abs() * spread).float(), randn(10).abs())
        ]
        plain = random.Random(seed)
        self.words = [frozenset(plain.sample("abcdefghijklmnop", 4)) for _ in range(count)]
        self.target = target

    def projected(self, dimensions=64):
        parts = [mean.double() / mean.double().norm(dim=1, keepdim=True) for mean in self.means]
        return torch.cat(parts, 1)

    def reordered(self, order):
        other = Given.__new__(Given)
        other.nll, other.gradients = self.nll[order], self.gradients[order]
        other.means = [mean[order] for mean in self.means]
        other.maxima = [Maxima(m.layers, m.values[order], m.energy) for m in self.maxima]
        other.words = [self.words[i] for i in order]
        other.target = self.target
        return other


def picked(name, count, features, seed=0):
    candidates = [torch.tensor([1, 2])] * len(features.nll)
    return make_selector(name).select(candidates, count, features, seed)


# --- every selector ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 5, 23, 24])
def test_budget_is_exact_and_the_choice_repeats(name, count):
    features = Given(24, target=Given(6, seed=9))
    first = picked(name, count, features)
    assert len(first) == len(set(first)) == count
    assert set(first) <= set(range(24))
    assert all(type(i) is int for i in first)
    assert picked(name, count, features) == first


@pytest.mark.parametrize("name", sorted(set(NAMES) - DRAWN - {"zip"}))
def test_the_order_of_the_pool_changes_nothing(name):
    features = Given(20, target=Given(6, seed=9))
    order = random.Random(3).sample(range(20), 20)
    chosen = picked(name, 8, features)
    # A cover that is complete begins anew among equals; all else has no ties here.
    moved = [order[i] for i in picked(name, 8, features.reordered(order))]
    if name == "cover":
        sets, weights = covered_channels(features.maxima, 20)
        assert [_weight(sets, weights, chosen[:k]) for k in range(1, 9)] == pytest.approx(
            [_weight(sets, weights, moved[:k]) for k in range(1, 9)]
        )
    else:
        assert moved == chosen


@pytest.mark.parametrize("name", sorted(set(NAMES) - DRAWN))
def test_the_first_choices_are_those_of_a_smaller_set(name):
    features = Given(20, target=Given(6, seed=9))
    assert picked(name, 9, features)[:4] == picked(name, 4, features)


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_what_is_drawn_depends_on_the_seed(name):
    features = Given(40)
    assert len({tuple(picked(name, 8, features, seed=seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize("name", NAMES)
def test_copies_are_no_trouble(name):
    features = Given(3, target=Given(6, seed=9)).reordered([0, 1, 2] * 4)
    chosen = picked(name, 9, features)
    assert len(set(chosen)) == 9


@pytest.mark.parametrize("name", NAMES)
def test_row_of_the_registry_equals_its_class(name):
    entry = registry.table("selection")[name]
    selector = make_selector(name)
    assert entry.paper == selector.paper
    assert entry.options == (("select_target",) if selector.takes_target else ())
    assert entry.summary


# --- thirds --------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "count"), [(30, 10), (31, 4), (9, 9), (10, 7), (3, 1), (2, 1)])
def test_thirds_part_the_ranks_and_hold_what_is_asked(total, count):
    bands = [band_of(total, count, band) for band in range(3)]
    assert bands[0][0] == 0
    assert bands[2][1] == total
    for first, last in bands:
        assert 0 <= first < last <= total
        assert last - first >= count
    if count <= total // 3:
        assert bands[0][1] == bands[1][0]
        assert bands[1][1] == bands[2][0]
    elif count > total - 2 * (total // 3):
        assert bands[1][1] - bands[1][0] == count
        assert abs(bands[1][0] - (total - bands[1][1])) <= 1


def test_thirds_hold_the_likely_and_the_unlikely():
    features = Given(30)
    ranks = {place: rank for rank, place in enumerate(features.nll.argsort().tolist())}
    for name, allowed in (
        ("ppl_low", range(10)),
        ("ppl_mid", range(10, 20)),
        ("ppl_high", range(20, 30)),
    ):
        seen = {ranks[i] for seed in range(20) for i in picked(name, 4, features, seed)}
        assert seen == set(allowed)


# --- covers --------------------------------------------------------------------------------


def _weight(sets, weights, chosen):
    return sum(weights[x] for x in set().union(*(sets[i] for i in chosen)))


def plain_greedy(sets, count, weights):
    """Count every gain anew in every step."""
    covered, chosen = set(), []
    while len(chosen) < count:
        gains = {
            i: sum(weights[x] for x in set(s) - covered)
            for i, s in enumerate(sets)
            if i not in chosen
        }
        best = max(gains, key=lambda i: (gains[i], -i))
        if gains[best] <= 0 and covered:
            covered = set()
            continue
        chosen.append(best)
        covered |= set(sets[best])
    return chosen


@pytest.mark.parametrize("seed", range(6))
def test_lazy_cover_is_the_plain_one_and_near_the_optimum(seed):
    plain = random.Random(seed)
    weights = {x: plain.randint(1, 9) for x in range(14)}
    sets = [set(plain.sample(range(14), plain.randint(0, 5))) for _ in range(9)]
    chosen, _ = greedy_cover(sets, 9, weights)
    assert chosen == plain_greedy(sets, 9, weights)
    for count in (1, 2, 3, 4):
        best = max(_weight(sets, weights, c) for c in itertools.combinations(range(9), count))
        assert _weight(sets, weights, chosen[:count]) >= (1 - 1 / math.e) * best


def test_cover_begins_anew_when_it_is_complete():
    chosen, covers = greedy_cover([{1, 2, 3}, {1, 2}, {3}, {1}], 4)
    assert chosen == [0, 1, 2, 3]
    assert covers == 3  # {1, 2, 3}; {1, 2} and {3}; {1}
    assert greedy_cover([set(), set()], 2) == ([0, 1], 1)


def test_zip_looks_at_a_part_of_a_large_pool_in_every_step(monkeypatch):
    monkeypatch.setattr(zip_words, "PER_STEP", 5)
    features = Given(30)
    chosen = picked("zip", 12, features)
    assert len(set(chosen)) == 12
    assert chosen != picked("zip", 12, features, seed=1)
    monkeypatch.setattr(zip_words, "PER_STEP", 30)
    assert picked("zip", 12, features) == picked("zip", 12, features, seed=1)


def test_outlier_channels_and_who_covers_them():
    values = torch.ones(10, 7)
    values[:, 2] = torch.arange(10) + 10.0  # outlier; 99th percentile 18.91, nine tenths 17.02
    values[3, 5] = 7.0  # outlier in a single sequence
    values[4, 6] = 6.0  # exactly six medians: none
    energy = torch.arange(7).double() + 1
    sets, weights = covered_channels([Maxima(("0.x",), values, energy)], 10)
    assert weights == {(0, 2): 19.0**2 * 3, (0, 5): 7.0**2 * 6}
    needed = 0.9 * np.percentile(values[:, 5], 99)
    assert needed > 1
    assert sets == [{(0, 5)} if i == 3 else {(0, 2)} if i >= 8 else set() for i in range(10)]


def test_a_model_without_outliers_is_told_of():
    features = Given(8)
    features.maxima = [Maxima(("0.x",), torch.ones(8, 5), torch.ones(5).double())]
    selector = make_selector("cover")
    assert selector.select([torch.tensor([1])] * 8, 3, features, 0) == [0, 1, 2]
    assert "no channel of this model is an outlier" in selector.warnings[0]
    assert selector.facts["outlier_channels"] == 0


# --- geometry ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_farthest_first_is_within_twice_the_best_radius(seed):
    cloud = points(9, 2, seed)
    distance = torch.cdist(cloud, cloud)
    for count in (1, 2, 3, 4):
        chosen, radius = farthest_first(cloud, count)
        assert radius == pytest.approx(float(distance[:, chosen].amin(1).max()))
        best = min(
            float(distance[:, list(c)].amin(1).max())
            for c in itertools.combinations(range(9), count)
        )
        assert radius <= 2 * best + 1e-12


def test_farthest_first_takes_the_farthest_each_time():
    cloud = points(12, 3)
    chosen, _ = farthest_first(cloud, 12)
    for step in range(1, 12):
        left = [i for i in range(12) if i not in chosen[:step]]
        near = {i: min(float((cloud[i] - cloud[j]).norm()) for j in chosen[:step]) for i in left}
        assert chosen[step] == max(left, key=lambda i: near[i])


@pytest.mark.parametrize("seed", range(4))
def test_matching_a_mean_is_the_argmin_of_every_step(seed):
    cloud, target = points(10, 4, seed), points(1, 4, seed + 50)[0]
    chosen = match_mean(cloud, target, 10)
    for step in range(10):
        left = [i for i in range(10) if i not in chosen[:step]]
        error = {i: float((cloud[[*chosen[:step], i]].mean(0) - target).norm()) for i in left}
        assert chosen[step] == min(left, key=lambda i: error[i])


def test_herding_and_centroid_match_the_means_they_say():
    target = Given(6, seed=9)
    features = Given(15, target=target)
    cloud = features.projected()
    assert picked("herding", 6, features) == match_mean(cloud, cloud.mean(0), 6)
    chosen = picked("centroid", 6, features)
    for step in range(6):
        error = {}
        for i in set(range(15)) - set(chosen[:step]):
            rows = [*chosen[:step], i]
            error[i] = sum(
                float((m[rows].double().mean(0) - t.double().mean(0)).square().sum())
                / float(m.double().var(0, unbiased=False).sum())
                for m, t in zip(features.means, target.means, strict=True)
            )
        assert chosen[step] == min(error, key=lambda i: error[i])


@pytest.mark.parametrize("seed", range(4))
def test_d_optimal_is_the_largest_log_determinant_of_every_step(seed):
    cloud = points(9, 4, seed)
    chosen, reached = d_optimal(cloud, 7)
    ridge = 1e-2 * float((cloud.T @ cloud / len(cloud)).diagonal().mean())

    def log_det(rows):
        return float(torch.linalg.slogdet(ridge * torch.eye(4) + cloud[rows].T @ cloud[rows])[1])

    for step in range(7):
        values = {i: log_det([*chosen[:step], i]) for i in range(9) if i not in chosen[:step]}
        assert chosen[step] == max(values, key=lambda i: values[i])
    assert reached == pytest.approx(log_det(chosen))


# --- clusters ------------------------------------------------------------------------------


def test_kmeans_finds_the_best_partition_of_a_tiny_set():
    cloud = points(7, 2)
    owner, centers, inertia = kmeans(cloud, 3, seed=0)
    best = math.inf
    for labels in itertools.product(range(3), repeat=7):
        if len(set(labels)) == 3:
            groups = [cloud[[i for i in range(7) if labels[i] == c]] for c in range(3)]
            best = min(best, sum(float((g - g.mean(0)).square().sum()) for g in groups))
    assert inertia == pytest.approx(best)
    for cluster in range(3):
        assert torch.allclose(centers[cluster], cloud[owner == cluster].mean(0))


@pytest.mark.parametrize("count", [1, 5, 12])
def test_no_cluster_is_empty(count):
    cloud = torch.cat([points(3, 2)] * 4)
    owner, _, inertia = kmeans(cloud, count, seed=1)
    assert sorted(set(owner.tolist())) == list(range(count))
    assert math.isfinite(inertia)


def test_medoids_are_nearest_to_the_center_of_their_cluster():
    cloud = torch.cat(
        [
            points(8, 2, s) * 0.01 + 10 * torch.tensor(c)
            for s, c in enumerate([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        ]
    )
    features = Given(24)
    features.projected = lambda dimensions=64: cloud
    chosen = picked("kmeans", 3, features)
    for start in (0, 8, 16):
        group = cloud[start : start + 8]
        nearest = start + int((group - group.mean(0)).norm(dim=1).argmin())
        assert nearest in chosen


# --- marginal relevance --------------------------------------------------------------------


def test_marginal_relevance_step_by_step():
    directions = torch.nn.functional.normalize(points(10, 3), dim=1)
    similarity = directions @ torch.nn.functional.normalize(points(1, 3, 7), dim=1)[0]
    chosen = marginal_relevance(directions, similarity, 10)
    assert chosen[0] == int(similarity.argmax())
    for step in range(1, 10):
        score = {
            i: 0.7 * float(similarity[i])
            - 0.3 * max(float(directions[i] @ directions[j]) for j in chosen[:step])
            for i in range(10)
            if i not in chosen[:step]
        }
        assert chosen[step] == max(score, key=lambda i: score[i])
