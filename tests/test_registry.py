"""The table of names says what the classes say, and third parties stand in it like our own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from lm_calib_plugin import registry
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.method import LayerResult, Method
from lm_calib_plugin.part import make_part, part_text
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.stages import STAGES
from lm_calib_plugin.statistics import STATISTICS
from tests.matrix import ROWS

METHODS = {**registry.table("pruning"), **registry.table("quantization")}
# Methods of whole models have no weight to be tried on; `tests/engine` knows them.
LAYERWISE = {name: entry for name, entry in METHODS.items() if entry.scope == "layer"}
ours = pytest.mark.parametrize("name", list(METHODS))


def test_matrix_has_a_row_for_every_method() -> None:
    assert {row.name for row in ROWS} == set(LAYERWISE)


def test_rows_of_the_matrix_are_distinct() -> None:
    assert len({row.id for row in ROWS}) == len(ROWS)


def test_matrix_uses_every_option_of_every_method() -> None:
    """Stages and comparison groups of pipelines have tests of their own."""
    for name, entry in LAYERWISE.items():
        used = {option for row in ROWS if row.name == name for option in row.options}
        if entry.stages:
            wanted = {"sparsity", "pattern", "compat"}
            if entry.kind == "quantization":
                wanted = {"bits", "group_size", "symmetric"}
            assert wanted <= used, name
        else:
            assert used == set(entry.options), name


def test_no_name_stands_for_two_methods() -> None:
    assert not registry.table("pruning").keys() & registry.table("quantization").keys()


@ours
def test_row_of_the_registry_equals_its_class(name: str) -> None:
    entry = METHODS[name]
    method = entry.make({})
    assert isinstance(method, Method)
    assert entry.kind == method.kind
    assert entry.needs_data == (method.statistic != "none" or method.block_rounding is not None)
    assert entry.scope == method.scope
    assert method.statistic in ("none", *STATISTICS) or entry.scope == "model"
    assert entry.summary
    own = sorted(f.name for f in fields(method))
    if not entry.stages:
        assert entry.paper == method.paper
    assert sorted(entry.options) == sorted(own)


PARTS = [
    pytest.param(argument, entry, id=f"{argument}={entry.name}")
    for argument, kind in STAGES.items()
    for entry in registry.table(kind).values()
    if entry.distribution == registry.OURS
]


@pytest.mark.parametrize(("argument", "entry"), PARTS)
def test_row_of_a_stage_equals_its_class(argument: str, entry: registry.Entry) -> None:
    assert entry.summary
    if not entry.target:
        assert make_part(argument, entry.name) is None
        return
    # A list has no default.
    part = make_part(argument, entry.name + ("?fractions=0.5" if entry.name == "list" else ""))
    assert part.stage == argument
    assert entry.paper == part.paper
    blockwise = getattr(part, "level", "") == "block"
    assert entry.needs_data == (part.statistic != "none" or blockwise)
    assert entry.uses_order == getattr(part, "uses_order", False)
    assert entry.uses_damp == part.uses_damp
    assert entry.scope == getattr(part, "scope", "layer")
    assert entry.options == tuple(part.options())
    assert make_part(argument, part_text(argument, part)) == part


@ours
def test_every_option_is_a_field_of_the_recipe(name: str) -> None:
    assert set(METHODS[name].options) <= set(Recipe.model_fields)


@ours
def test_paper_is_named_in_the_documentation_of_the_class(name: str) -> None:
    entry = METHODS[name]
    assert re.fullmatch(
        r"https://(arxiv\.org/abs/\d{4}\.\d{5}|openreview\.net/forum\?id=\w+|\S+/hqq_blog/)",
        entry.paper,
    )


def test_named_corpora_do_not_hide_a_source() -> None:
    assert not registry.CORPORA.keys() & registry.table("calibration").keys()


def test_a_joint_method_is_both_of_its_halves() -> None:
    for pruning in ("wanda", "sparsegpt"):
        for quantization in ("rtn", "gptq"):
            entry = registry.find_method(f" {pruning} + {quantization}")
            halves = METHODS[pruning], METHODS[quantization]
            assert entry.name == f"{pruning}+{quantization}"
            assert entry.kind == "joint"
            assert set(entry.options) == {name for half in halves for name in half.options}
            assert entry.stage_names == tuple(name for half in halves for name in half.stage_names)
            method = entry.make({"sparsity": 0.5, "bits": 3})
            assert method.pruning == halves[0].make({"sparsity": 0.5})
            assert method.quantization == halves[1].make({"bits": 3})


# --- third parties -----------------------------------------------------------------------


@dataclass(frozen=True)
class HalfOfEverything(Method):
    """A complete third-party method."""

    kind: ClassVar[str] = "quantization"
    statistic: ClassVar[str] = "none"
    bits: int = 4

    def compress(self, weight: Any, stats: Any, dtype: Any = None) -> LayerResult:
        return LayerResult(weight / 2)


@dataclass(frozen=True)
class Flat(Method):
    """A pruning method whose strength is not its user's choice."""

    kind: ClassVar[str] = "pruning"
    statistic: ClassVar[str] = "gram"

    def compress(self, weight: Any, stats: Any, dtype: Any = None) -> LayerResult:
        return LayerResult(weight)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    points = {
        "lm_calib_plugin.quantization": [("halves", f"{__name__}:HalfOfEverything")],
        "lm_calib_plugin.pruning": [
            ("flat", f"{__name__}:Flat"),
            ("wanda", "somebody.else:Wanda"),
        ],
    }

    def entry_points(group: str) -> list[Any]:
        return [
            SimpleNamespace(name=name, value=value, dist=SimpleNamespace(name="their-package"))
            for name, value in points.get(group, [])
        ]

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    for cached in (registry.table, registry._installed):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (registry.table, registry._installed):
        cached.cache_clear()


def test_method_of_another_package_is_found_with_what_its_class_says(installed: None) -> None:
    entry = registry.find_method("halves")
    assert entry.distribution == "their-package"
    assert entry.kind == "quantization"
    assert not entry.needs_data
    assert entry.options == ("bits",)
    assert registry.find_method("flat").needs_data
    assert registry.find_method("flat").options == ()


def test_method_of_another_package_makes_a_recipe(installed: None) -> None:
    recipe = Recipe(method="halves", bits=3)
    assert recipe.terms == ()
    assert recipe.make_method() == HalfOfEverything(bits=3)
    with pytest.raises(UserError, match="group_size"):
        Recipe(method="halves", group_size=8)


def test_pruning_without_a_strength_option_needs_none(installed: None) -> None:
    assert Recipe(method="flat").method_options() == {}


def test_built_in_name_is_kept_and_both_distributions_are_known(installed: None) -> None:
    assert registry.find_method("wanda").distribution == registry.OURS
    assert registry.table("pruning")["wanda"].distribution == registry.OURS
    ((kept, ignored),) = registry.shadowed("pruning")
    assert (kept.distribution, ignored.distribution) == (registry.OURS, "their-package")
    assert registry.shadowed("quantization") == []


def test_unknown_method_names_the_installed_ones(installed: None) -> None:
    with pytest.raises(UserError, match="halves"):
        registry.find_method("halfs")


def test_table_says_which_sources_are_made_of_others() -> None:
    for entry in registry.table("calibration").values():
        assert registry.nested_of(entry) == entry.load().nested, entry.name
    mixture = registry.Entry("mixture", "theirs", "no.such:Class", distribution="other")
    assert registry.nested_of(mixture) == "many"
