"""The recipe: normal forms, identity, and every way in and out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import lm_calib_plugin
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.expression import SourceTerm, parse_calibration
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.resolved import Facts
from lm_calib_plugin.runtime import RUNTIME_ARGUMENTS, Runtime
from lm_calib_plugin.schemes import SCHEMES, scheme_name

# --- recipes at random -------------------------------------------------------------------

_names = st.text("abcdefghij/_-.", min_size=1, max_size=12).filter(lambda s: s.strip() == s)
_wild = st.text("ab+*&=? :'\"#0.5", min_size=1, max_size=8).map(str.strip).filter(bool)
_terms = st.one_of(
    st.fixed_dictionaries({"source": st.sampled_from(["self", "c4", "wikitext2", "random"])}),
    st.fixed_dictionaries({"source": _names.map(lambda s: f"file:{s}.txt")}),
    st.fixed_dictionaries({"source": st.just("file:a+b*2.jsonl"), "column": _wild}),
    st.fixed_dictionaries({"source": st.just("self"), "temperature": st.floats(0, 2)}),
)
_weighted = st.builds(
    lambda term, weight: {**term, "weight": weight},
    _terms,
    st.floats(1e-3, 1e3),
)


def _summing_to_one(terms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    total = sum(term["weight"] for term in terms)
    return [{**term, "weight": term["weight"] / total} for term in terms]


_common = {
    "calibration": st.one_of(
        st.just("self"), st.lists(_weighted, min_size=1, max_size=4).map(_summing_to_one)
    ),
    "nsamples": st.integers(1, 10**6),
    "seqlen": st.integers(1, 10**6),
    "calib_seed": st.integers(-5, 10**9),
    "pack": st.sampled_from(["longdoc", "concat", "pad"]),
    "heldout": st.floats(0, 0.5),
    "propagate": st.sampled_from(["compressed", "dense"]),
    "targets": st.lists(_names, min_size=1, max_size=3),
    "ignore": st.lists(_names, max_size=3),
    "block_path": _names,
    "untie": st.booleans(),
}
_whole = {k: v for k, v in _common.items() if k not in ("targets", "ignore", "untie")}
_depth = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["shortgpt", "depth_l1", "depth_loss"]),
        "blocks": st.integers(0, 9),
    },
    optional={
        "sublayer": st.sampled_from(["block", "attention", "mlp"]),
        "update": st.sampled_from(["none", "mean", "lowrank", "lowrank?rank=3&ridge=0.5"]),
        **_whole,
    },
)
_pruning = st.fixed_dictionaries(
    {"method": st.sampled_from(["magnitude", "wanda", "sparsegpt"])},
    optional={"compat": st.just("reference"), **_common},
)
_strength = st.one_of(
    st.fixed_dictionaries({"sparsity": st.floats(0, 0.999)}),
    st.fixed_dictionaries(
        {
            "pattern": st.tuples(st.integers(1, 8), st.integers(1, 8)).map(
                lambda p: f"{p[0]}:{sum(p)}"
            )
        }
    ),
)
_quantization = st.fixed_dictionaries(
    {"method": st.just("gptq")},
    optional={
        "bits": st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16]),
        "group_size": st.sampled_from([-1, 1, 64, 128]),
        "symmetric": st.booleans(),
        "act_order": st.booleans(),
        "damp": st.floats(0, 10),
        **_common,
    },
)
# Every argument of quantization that goes with every other one here.
_parts = {
    "transform": st.sampled_from(["none", "awq?steps=3", "smoothquant?alpha=auto", "rotation"]),
    "grid": st.sampled_from(["minmax", "mse?steps=4", "clip?skip=none"]),
    "kv_bits": st.sampled_from([2, 8, 16]),
    "execution": st.sampled_from(["simulated", "packed"]),
    **{name: values for name, values in _common.items() if name not in ("propagate", "heldout")},
}
_layers = st.dictionaries(
    _names,
    st.fixed_dictionaries({"bits": st.integers(2, 8)}, optional={"symmetric": st.booleans()}),
    min_size=1,
    max_size=2,
)
_by_parts = st.fixed_dictionaries(
    {"method": st.sampled_from(["rtn", "gptq", "gptq_heldout", "awq", "smoothquant", "rotation"])},
    optional={
        "bits": st.sampled_from([3, 16]) | st.floats(2, 16).map(lambda b: f"auto:{b!r}"),
        "rounding": st.sampled_from(["rtn", "gptq", "gptq_heldout", "autoround?iters=2"]),
        "act_bits": st.sampled_from([4, 8, 16]),
        "overrides": _layers,
        "true_sequential": st.booleans(),
        **_parts,
    },
)
_by_scheme = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["rtn", "gptq", "gptq_heldout", "awq"]),
        "scheme": st.sampled_from(list(SCHEMES)),
    },
    optional=_parts,
)
_static = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["rtn", "gptq", "hqq", "autoround"]),
        "scheme": st.just("W8A8_static"),
        "observer": st.sampled_from(["minmax?first=false", "percentile?q=99.5", "mse"]),
    },
    optional=_parts,
)
_joint = st.fixed_dictionaries(
    {
        "method": st.sampled_from(["wanda+rtn", "sparsegpt+gptq", "swap_pcg+rtn", "admm+gptq"]),
        "sparsity": st.floats(0, 0.9),
    },
    optional={"scheme": st.sampled_from(list(SCHEMES)), **_parts},
)
_given = st.one_of(
    st.builds(lambda a, b: {**a, **b}, _pruning, _strength),
    _quantization,
    _depth,
    _by_parts,
    _by_scheme,
    _static,
    _joint,
)


def method_of(recipe: Recipe) -> Any:
    return recipe.make_method()


def facts_of(recipe: Recipe, **changes: Any) -> Facts:
    method = method_of(recipe)
    # What the composition root adds, for it alone knows the layers.
    own = {"bits": recipe.bits} if recipe.bits_budget is not None else {}
    own |= {"overrides": recipe.overrides} if recipe.overrides else {}
    found: dict[str, Any] = {
        "model": "m" * 64,
        "layers": "l" * 64,
        "revision": method.revision,
        "options": method.options() | own,
        "identity": method.identity() | own,
        "inert": method.inert,
        "unchanged": method.does_nothing,
        "calib_id": "c" * 64 if recipe.terms else None,
        "seqlen": 2048 if recipe.terms else None,
        "pack": "concat" if recipe.terms else None,
    }
    return Facts(**{**found, **changes})


def key(recipe: Recipe, **changes: Any) -> str:
    return recipe.resolve(facts_of(recipe, **changes)).key()


def wanda(**changes: Any) -> Recipe:
    return Recipe(**{"method": "wanda", "sparsity": 0.5, **changes})


def key_of(**given: Any) -> str:
    return key(Recipe(**given))


few = settings(max_examples=30)

# --- ways in and out ---------------------------------------------------------------------


@few
@given(_given)
def test_metadata_is_read_back_as_the_same_recipe(given: dict[str, Any]) -> None:
    recipe = Recipe(**given)
    metadata = recipe.to_metadata()
    again = Recipe(**metadata)
    assert again.to_metadata() == metadata
    assert again.terms == recipe.terms
    # Nothing else may differ: only what was left open may have been filled in.
    same = {**recipe.model_dump(), "calibration": None}
    assert {**again.model_dump(), "calibration": None} == same
    assert method_of(again) == method_of(recipe)
    assert key(again) == key(recipe)


@few
@given(_given)
def test_metadata_survives_json_and_yaml(given: dict[str, Any]) -> None:
    recipe = Recipe(**given)
    metadata = recipe.to_metadata()
    assert json.loads(json.dumps(metadata)) == metadata
    assert yaml.safe_load(yaml.safe_dump(metadata)) == metadata


def test_written_yaml_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    for recipe in (
        wanda(
            calibration="c4*0.3+self?temperature=0.8&prefix_tokens=4*0.7", targets="*q_proj+*mlp*"
        ),
        Recipe(method="sparsegpt", pattern="2:4", damp=1e-3, calibration="file:my text.jsonl"),
        Recipe(method="gptq", bits=3, group_size=-1, symmetric=False, untie=True),
        Recipe(method="magnitude", sparsity=1e-3, ignore=["*down_proj"]),
    ):
        file.write_text(yaml.safe_dump(recipe.to_metadata()), encoding="utf-8")
        assert Recipe.from_yaml(file).to_metadata() == recipe.to_metadata()


def test_hand_written_yaml(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        """\
# a comment
method: sparsegpt
pattern: 2:4          # not the number 124
nsamples: 1e3
calibration:
  - {source: c4, weight: 0.75}
  - source: self
    weight: 0.25
    temperature: 0.8
ignore: ["*down_proj"]
""",
        encoding="utf-8",
    )
    recipe = Recipe.from_yaml(file)
    assert recipe.kept == (2, 4)
    assert recipe.nsamples == 1000
    assert recipe.terms == (
        SourceTerm("c4", weight=0.75),
        SourceTerm("self", options=(("temperature", "0.8"),), weight=0.25),
    )
    assert recipe.ignore == ("*down_proj",)
    assert Recipe.from_model_args({"recipe": str(file)}) == recipe
    typed = {"recipe": str(file), "nsamples": 1000.0, "damp": 0.1}
    assert Recipe.from_model_args(typed).damp == 0.1


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "4:8", "3:5", "16:32"])
def test_patterns_need_no_quotes_in_yaml(tmp_path: Path, pattern: str) -> None:
    file = tmp_path / "recipe.yaml"
    for written in (pattern, f'"{pattern}"', f"'{pattern}'"):
        file.write_text(f"method: wanda\npattern: {written}\n", encoding="utf-8")
        assert Recipe.from_yaml(file).pattern == pattern


def test_recipe_file_and_arguments_are_merged(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("method: wanda\nsparsity: 0.5\nnsamples: 16\n", encoding="utf-8")
    merged = Recipe.from_model_args(
        {"recipe": str(file), "sparsity": 0.5, "seqlen": 64, "nsamples": None}
    )
    assert merged == wanda(nsamples=16, seqlen=64)
    assert Recipe.from_model_args({"recipe": {"method": "wanda"}, "sparsity": 0.5}) == wanda()


def test_code_in_a_recipe_file_is_not_run(tmp_path: Path) -> None:
    file, trace = tmp_path / "recipe.yaml", tmp_path / "trace"
    file.write_text(f"method: !!python/object/apply:os.mkdir ['{trace}']\n", encoding="utf-8")
    with pytest.raises(UserError):
        Recipe.from_yaml(file)
    assert not trace.exists()


def test_recipe_is_frozen_and_refuses_more() -> None:
    recipe = wanda()
    with pytest.raises(ValidationError):
        recipe.sparsity = 0.6
    with pytest.raises(UserError, match="did you mean `nsamples`"):
        wanda(nsample=3)


# --- normal forms ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"sparsity": "0.50"}, {"sparsity": 0.5}),
        ({"sparsity": "5e-1"}, {"sparsity": 0.5}),
        ({"sparsity": -0.0}, {"sparsity": 0}),
        ({"nsamples": "1e3"}, {"nsamples": 1000}),
        ({"nsamples": 128.0}, {}),
        ({"calib_seed": "7"}, {"calib_seed": 7}),
        ({"targets": "*q_proj+*mlp*"}, {"targets": ["*q_proj", "*mlp*"]}),
        ({"targets": " *q_proj + *mlp* "}, {"targets": ("*q_proj", "*mlp*")}),
        ({"untie": "False"}, {"untie": 0}),
        ({"untie": "yes"}, {"untie": True}),
        ({"schema_version": 1}, {}),
        ({"seqlen": None}, {}),
        ({"pattern": " 02:4 ", "sparsity": None}, {"pattern": "2:4", "sparsity": None}),
        ({"calibration": "c4+self"}, {"calibration": "c4*0.5 + self*0.5"}),
        ({"calibration": "c4*1"}, {"calibration": [{"source": "c4"}]}),
    ],
    ids=str,
)
def test_one_meaning_has_one_form(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert wanda(**one) == wanda(**other)
    assert hash(str(wanda(**one).to_metadata())) == hash(str(wanda(**other).to_metadata()))


def test_defaults_depend_on_the_need_for_data() -> None:
    assert [term.name for term in wanda().terms] == ["self"]
    assert Recipe(method="gptq").terms == parse_calibration("self")
    assert Recipe(method="magnitude", sparsity=0.5).terms == ()
    assert Recipe(method="rtn").terms == ()
    assert Recipe(method="rtn", calibration="self").terms == parse_calibration("self")


def test_method_options_are_those_given_only() -> None:
    assert wanda().method_options() == {"sparsity": 0.5}
    assert Recipe(method="gptq").method_options() == {}
    given = {"bits": 3, "act_order": False, "damp": 0.0}
    assert Recipe(method="gptq", **given).method_options() == given


# --- identity ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsity": "0.50"},
        {"pattern": "unstructured"},
        {"calibration": "self"},
        {"calibration": "c4*0.2+self*0.8"},
        {"nsamples": 7},
        {"seqlen": 99},
        {"calib_seed": 5},
        {"pack": "pad"},
        {"targets": "*"},
        {"ignore": "*nothing*"},
        {"block_path": "model.layers"},
        {"schema_version": 1},
        {"propagate": "compressed"},
        {"heldout": 0.2},  # how many sequences that means is in the facts
        {"compat": "reference"},  # makes no difference to wanda
    ],
    ids=str,
)
def test_key_stays_when_model_layers_and_tokens_are_the_same(changes: dict[str, Any]) -> None:
    """What text, how much of it and which names are all in the identities of the facts."""
    assert key(wanda(**changes)) == key(wanda())


@pytest.mark.parametrize(
    "changes",
    [
        {"sparsity": 0.5000001},
        {"sparsity": None, "pattern": "2:4"},
        {"propagate": "dense"},
        {"untie": True},
    ],
    ids=str,
)
def test_key_changes_when_the_recipe_may_change_the_weights(changes: dict[str, Any]) -> None:
    assert key(wanda(**changes)) != key(wanda())


def test_key_of_a_method_of_whole_models() -> None:
    """What is fitted behind a removed block depends on what it sees; a ranking does not."""

    def depth(**changes: Any) -> str:
        return key(Recipe(**{"method": "shortgpt", "blocks": 2, **changes}))

    assert depth() == depth(propagate="dense") == depth(update="none", sublayer="block")
    assert depth(update="mean") != depth(update="mean", propagate="dense")
    flap = Recipe(method="flap", sparsity=0.2)
    assert key(flap) == key(flap.replaced(propagate="dense"))
    changes: list[dict[str, Any]] = [{}, {"blocks": 3}, {"sublayer": "mlp"}, {"update": "mean"}]
    changes += [{"method": "depth_l2"}, {"update": "lowrank"}, {"update": "lowrank?rank=4"}]
    assert len({depth(**c) for c in changes}) == len(changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 3},
        {"group_size": 64},
        {"symmetric": False},
        {"act_order": False},
        {"damp": 0.02},
        {"compat": "reference"},
    ],
    ids=str,
)
def test_key_changes_with_every_option_of_a_quantizer(changes: dict[str, Any]) -> None:
    assert key(Recipe(method="gptq", **changes)) != key(Recipe(method="gptq"))


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "n" * 64},
        {"layers": "k" * 64},
        {"revision": 2},
        {"calib_id": "d" * 64},
        {"heldout": 3},
    ],
    ids=str,
)
def test_key_changes_with_model_layers_code_and_data(changes: dict[str, Any]) -> None:
    assert key(wanda(), **changes) != key(wanda())


def test_recipes_that_change_nothing_share_a_key() -> None:
    nothing = key(wanda(sparsity=0))
    assert key(wanda(sparsity=0), calib_id="e" * 64, heldout=2) == nothing
    assert key(Recipe(method="gptq", bits=16, group_size=64)) == nothing
    assert key(wanda(sparsity=0), model="n" * 64) != nothing


def test_methods_have_keys_of_their_own() -> None:
    keys = {key(Recipe(method=name, sparsity=0.5)) for name in ("magnitude", "wanda", "sparsegpt")}
    keys |= {key(Recipe(method=name)) for name in ("rtn", "gptq")}
    assert len(keys) == 5


def test_defaults_written_out_do_not_change_the_key() -> None:
    given = {"bits": 4, "group_size": 128, "symmetric": True, "act_order": True, "damp": 0.01}
    assert key(Recipe(method="gptq", **given)) == key(Recipe(method="gptq"))
    fixed = Recipe(method="wanda", pattern="1:4", sparsity=0.75)
    assert key(fixed) == key(Recipe(method="wanda", pattern="1:4"))


@pytest.mark.parametrize(
    "changes",
    [{"heldout": 0.3}, {"propagate": "dense"}, {"calibration": "c4"}, {"nsamples": 3}],
    ids=str,
)
def test_key_of_a_method_without_data_ignores_calibration(changes: dict[str, Any]) -> None:
    """Calibration text given to such a method only measures errors; the weights are the same."""
    plain = Recipe(method="magnitude", sparsity=0.5)
    assert key(Recipe(method="magnitude", sparsity=0.5, **changes)) == key(plain)
    assert key(plain, calib_id="e" * 64) == key(plain)


def test_key_is_a_sha256_and_does_not_depend_on_the_process() -> None:
    code = (
        "from lm_calib_plugin.recipe import Recipe; from lm_calib_plugin.resolved import Facts;"
        "r = Recipe(method='wanda', sparsity=0.5);"
        "f = Facts(model='m', layers='l', revision=1, options={'sparsity': .5, 'a': None});"
        "print(r.resolve(f).key())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert len(seen) == 1
    assert len(seen.pop()) == 64


def test_runtime_is_no_part_of_a_recipe() -> None:
    assert not set(RUNTIME_ARGUMENTS) & set(Recipe.model_fields)
    for name in RUNTIME_ARGUMENTS:
        with pytest.raises(UserError):
            wanda(**{name: 1})
    assert Runtime(calib_batch_size="4").calib_batch_size == 4
    assert Runtime().calib_batch_size == "auto"
    assert Runtime(progress="false").progress is False  # type: ignore[arg-type]


@few
@given(_given)
def test_record_of_a_result_leads_to_the_same_key(given: dict[str, Any]) -> None:
    """What stands in a results file, given as a recipe, names the same result."""
    recipe = Recipe(**given)
    resolved = recipe.resolve(facts_of(recipe))
    record = json.loads(json.dumps(resolved.to_metadata()))
    again = Recipe(**record)
    assert again.resolve(facts_of(again)).key() == resolved.key()
    assert again.resolve(facts_of(again)).to_metadata() == resolved.to_metadata()
    if recipe.terms:
        assert (record["seqlen"], record["pack"]) == (2048, "concat")


# --- light imports -----------------------------------------------------------------------


def test_nothing_heavy_is_imported_by_names_validation_and_identity() -> None:
    code = """
import sys
import lm_calib_plugin
from lm_calib_plugin import errors, expression, recipe, recipe_file, registry, storage
assert lm_calib_plugin.Recipe is recipe.Recipe
assert lm_calib_plugin.UserError is errors.UserError
r = recipe.Recipe(method="sparsegpt", pattern="2:4", calibration="c4*0.5+self*0.5")
r.to_metadata(), r.method_options(), r.entry
dir(lm_calib_plugin)
try:
    recipe.Recipe(method="sparsgpt")
except errors.UserError:
    pass
heavy = {"torch", "transformers", "lm_eval", "datasets", "accelerate", "optimum", "numpy", "pandas"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout.strip() == "[]"


def test_public_names_are_listed_and_others_are_refused() -> None:
    assert set(lm_calib_plugin.__all__) <= set(dir(lm_calib_plugin))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lm_calib_plugin.nothing


@pytest.mark.parametrize("given", ["none", None])
@pytest.mark.parametrize("stage", ["refine", "update"])
def test_a_stage_that_does_nothing_survives_the_harness(stage: str, given: str | None) -> None:
    """The harness turns the text `none` into None."""
    arguments = {"method": "sparsegpt", "refine": "swap", "sparsity": 0.5, stage: given}
    assert Recipe.from_model_args(arguments).stages[stage].name == "none"


def test_points_that_mean_the_same_have_one_key() -> None:
    wanda = {"method": "wanda", "sparsity": 0.5}
    assert key_of(**wanda) == key_of(**wanda, group="row") == key_of(**wanda, compat="reference")
    assert key_of(**wanda) != key_of(**wanda, group="layer")
    assert key_of(method="wanda", pattern="2:4") == key_of(
        method="wanda", pattern="2:4", group="layer"
    )
    over_all = {**wanda, "allocation": "global"}
    assert key_of(**over_all) != key_of(**over_all, compat="reference")
    magnitude = {"method": "magnitude", "sparsity": 0.5, "allocation": "owl"}
    assert key_of(**magnitude) == key_of(**magnitude, propagate="dense")


# --- quantization ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "form"),
    [
        ({"scheme": "w8a8-static"}, {"scheme": "W8A8_static"}),
        ({"scheme": " nvfp4 "}, {"scheme": "NVFP4"}),
        ({"bits": "4.0"}, {"bits": 4}),
        ({"bits": "auto:3.0"}, {"bits": "auto:3"}),
        ({"bits": " Auto : 3.25 "}, {"bits": "auto:3.25"}),
        ({"damp": "AUTO"}, {"damp": "auto"}),
        ({"damp": "1e-2"}, {"damp": 0.01}),
        ({"act_bits": "8"}, {"act_bits": 8}),
        ({"act_bits": "none"}, {"act_bits": 16}),
        ({"kv_bits": "none"}, {"kv_bits": 16}),
        ({"kv_bits": 4.0}, {"kv_bits": 4}),
        ({"act_bits": 8, "act_dynamic": "no"}, {"act_bits": 8, "act_dynamic": False}),
        ({"true_sequential": "yes"}, {"true_sequential": True}),
        ({"transform": {"name": "awq", "duo": False}}, {"transform": "awq?duo=false"}),
        ({"transform": "smoothquant ? alpha = auto"}, {"transform": "smoothquant?alpha=auto"}),
        ({"grid": {"name": "mse", "steps": 4}}, {"grid": "mse?steps=4"}),
        ({"rounding": "autoround?iters=3"}, {"rounding": "autoround?iters=3"}),
        (
            {"scheme": "FP8_static", "observer": {"name": "percentile", "q": 99.5}},
            {"scheme": "FP8_static", "observer": "percentile?q=99.5"},
        ),
        (
            {"overrides": '{"*down_proj": {"bits": "8", "symmetric": "no"}}'},
            {"overrides": {"*down_proj": {"bits": 8, "symmetric": False}}},
        ),
        ({"overrides": {" *x ": {"group_size": "-1"}}}, {"overrides": {"*x": {"group_size": -1}}}),
        ({"execution": "packed"}, {"execution": "packed"}),
    ],
    ids=str,
)
def test_arguments_of_quantization_have_one_form(
    given: dict[str, Any], form: dict[str, Any], tmp_path: Path
) -> None:
    """From Python, from the harness and from a file."""
    recipe = Recipe(method="gptq", **given)
    assert recipe.model_dump(include=set(form)) == form
    assert Recipe.from_model_args({"method": "gptq", **given}) == recipe
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"method": "gptq", **given}), encoding="utf-8")
    assert Recipe.from_yaml(file) == recipe
    assert Recipe(**recipe.to_metadata()).model_dump(include=set(form)) == form


def test_hand_written_yaml_of_a_quantizer(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        """\
method: gptq
bits: auto:3.25
damp: auto
transform: {name: awq, steps: 10}
kv_bits: 8
overrides:
  "*down_proj": {bits: 8, group_size: 32}
  "*o_proj": {symmetric: false}
""",
        encoding="utf-8",
    )
    recipe = Recipe.from_yaml(file)
    assert recipe.bits_budget == 3.25
    assert recipe.damp == "auto"
    assert recipe.stages["transform"].text() == "awq?steps=10"
    # The first pattern that fits counts, so they keep their order.
    assert list(recipe.overrides or {}) == ["*down_proj", "*o_proj"]


def test_names_of_schemes_say_what_they_stand_for() -> None:
    """``W<bits>A<bits>``: read the name, compare with the row."""
    for name, scheme in SCHEMES.items():
        assert scheme_name(name.lower()) == scheme_name(name.replace("_", "-")) == name
        assert scheme.act_dynamic == (not name.endswith("_static"))
        if name.startswith("W"):
            weights, _, inputs = name.removesuffix("_static")[1:].partition("A")
            assert (scheme.number, scheme.bits) == ("int", int(weights))
            assert (scheme.act_bits or 16) == int(inputs)
        else:
            assert name.lower().startswith(scheme.number)
            assert scheme.bits == scheme.act_bits == int(name.removesuffix("_static")[-1])


def test_a_text_none_is_a_wish_and_not_an_omission() -> None:
    """The harness turns the text ``none`` into None."""
    assert (
        Recipe.from_model_args({"method": "awq", "transform": None}).stages["transform"].name
        == "none"
    )
    for stage in ("grid", "rounding", "observer"):
        with pytest.raises(UserError, match=f"no {stage} part `none`"):
            Recipe.from_model_args({"method": "gptq", "scheme": "W8A8_static", stage: None})


def test_options_are_those_that_the_parts_read() -> None:
    def options(**given: Any) -> set[str]:
        return set(Recipe(**given).options)

    gram = {"act_order", "damp", "correction", "compat"}
    assert gram <= options(method="gptq")
    assert gram <= options(method="rtn", rounding="gptq")
    assert not gram & options(method="rtn")
    assert not gram & options(method="gptq", rounding="rtn")
    assert not gram & options(method="autoround")
    joint = options(method="wanda+gptq", sparsity=0.5)
    assert options(method="wanda", sparsity=0.5) | options(method="gptq") == joint
    assert gram - {"act_order"} <= options(method="sparsegpt+rtn", sparsity=0.5)


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ({"method": "rtn"}, False),
        ({"method": "hqq"}, False),
        ({"method": "gptq"}, True),
        ({"method": "autoround"}, True),
        ({"method": "gptq", "rounding": "rtn"}, False),
        ({"method": "rtn", "rounding": "gptq"}, True),
        ({"method": "rtn", "transform": "rotation"}, False),
        ({"method": "rtn", "transform": "awq"}, True),
        ({"method": "awq", "transform": "none"}, True),
        ({"method": "awq", "transform": "none", "grid": "minmax"}, False),
        ({"method": "rtn", "grid": "mse"}, False),
        ({"method": "rtn", "grid": "clip"}, True),
        ({"method": "rtn", "scheme": "W8A8"}, False),
        ({"method": "rtn", "scheme": "W8A8_static"}, True),
        ({"method": "rtn", "act_bits": 8, "act_dynamic": False}, True),
        ({"method": "rtn", "kv_bits": 8}, False),
        ({"method": "rtn", "bits": "auto:4"}, True),
        ({"method": "magnitude+rtn", "sparsity": 0.5}, False),
        ({"method": "magnitude+gptq", "sparsity": 0.5}, True),
        ({"method": "wanda+rtn", "sparsity": 0.5}, True),
    ],
    ids=str,
)
def test_data_is_needed_where_a_part_looks_at_it(given: dict[str, Any], needed: bool) -> None:
    recipe = Recipe(**given)
    assert recipe.needs_data == needed
    assert [term.name for term in recipe.terms] == (["self"] if needed else [])
    method = recipe.make_method()
    looks = method.statistic != "none" or method.block_rounding is not None
    static = method.activations is not None and not method.activations.dynamic
    assert needed == (looks or static or recipe.bits_budget is not None)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"scheme": "W3A16", "group_size": 64}, {"bits": 3, "group_size": 64}),
        ({"scheme": "W4A16"}, {}),
        ({"scheme": "W8A8"}, {"bits": 8, "group_size": -1, "act_bits": 8}),
        (
            {"scheme": "W8A8_static"},
            {"bits": 8, "group_size": -1, "act_bits": 8, "act_dynamic": False},
        ),
        ({"scheme": "W8A8_static"}, {"scheme": "W8A8_static", "observer": "minmax?first=true"}),
        ({"method": "awq"}, {"method": "rtn", "transform": "awq", "grid": "clip"}),
        ({"method": "awq"}, {"transform": "awq?steps=20", "grid": "clip?low=0.50&steps=20"}),
        ({"method": "smoothquant"}, {"transform": "smoothquant?alpha=0.50"}),
        ({"method": "rotation"}, {"method": "gptq", "transform": "rotation?seed=0"}),
        ({"method": "gptq_heldout"}, {"method": "gptq", "rounding": "gptq_heldout"}),
        ({"method": "hqq"}, {"rounding": "hqq", "symmetric": False}),
        ({"method": "hqq", "rounding": "rtn"}, {}),
        ({"method": "gptq", "rounding": "rtn"}, {}),
        ({"act_bits": 16}, {}),
        ({"kv_bits": 16}, {}),
        ({"grid": "minmax", "transform": "none"}, {}),
        ({"execution": "simulated"}, {}),
        ({"true_sequential": True}, {}),
        ({"method": "gptq", "correction": 0}, {"method": "gptq"}),
        ({"bits": 16, "group_size": 64, "act_bits": 8}, {"bits": 16, "act_bits": 8}),
        ({"bits": 16, "grid": "mse", "kv_bits": 8}, {"bits": 16, "kv_bits": 8}),
        ({"bits": "auto:3.0"}, {"bits": "auto:3"}),
        (
            {"method": "wanda+gptq", "sparsity": 0.5, "scheme": "W3A16"},
            {"method": "wanda+rtn", "sparsity": 0.5, "rounding": "gptq", "bits": 3},
        ),
    ],
    ids=str,
)
def test_quantizers_that_mean_the_same_have_one_key(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert key_of(**{"method": "rtn", **one}) == key_of(**{"method": "rtn", **other})


def test_every_argument_of_quantization_changes_the_key() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"scheme": "W8A8"},
        {"scheme": "W8A8_static"},
        {"scheme": "W8A8_static", "observer": "mse"},
        {"scheme": "W8A8_static", "observer": "percentile"},
        {"scheme": "W8A8_static", "observer": "minmax?first=false"},
        {"scheme": "FP8"},
        {"scheme": "FP8_static"},
        {"scheme": "NVFP4"},
        {"scheme": "MXFP4"},
        {"bits": 8},
        {"bits": 8, "group_size": -1},
        {"bits": "auto:4"},
        {"bits": "auto:4.0000001"},
        {"symmetric": False},
        {"act_bits": 8},
        {"act_bits": 4},
        {"kv_bits": 8},
        {"kv_bits": 4},
        {"transform": "awq"},
        {"transform": "awq?duo=false"},
        {"transform": "smoothquant"},
        {"transform": "smoothquant?alpha=auto"},
        {"transform": "rotation"},
        {"transform": "rotation?seed=1"},
        {"grid": "mse"},
        {"grid": "clip"},
        {"rounding": "rtn"},
        {"rounding": "gptq_heldout"},
        {"rounding": "autoround"},
        {"rounding": "autoround?iters=3"},
        {"rounding": "hqq", "symmetric": False},
        {"damp": "auto"},
        {"correction": 0.3},
        {"true_sequential": True},
        {"exclude_first_token": True},
        {"execution": "packed"},
        {"overrides": {"*down_proj": {"bits": 8}}},
        {"overrides": {"*down_proj": {"group_size": 32}}},
        {"method": "wanda+gptq", "sparsity": 0.5},
        {"method": "wanda+gptq", "sparsity": 0.5, "kv_bits": 8},
        {"method": "sparsegpt+gptq", "sparsity": 0.5},
        {"method": "sparsegpt+gptq", "sparsity": 0.5, "correction": 0.3},
    ]
    keys = [key_of(**{"method": "gptq", **given}) for given in changes]
    assert len(set(keys)) == len(changes)


def test_what_is_rounded_while_the_model_runs_is_a_change_too() -> None:
    nothing = key_of(method="rtn", bits=16)
    assert key_of(method="rtn", bits=16, act_bits=16, kv_bits=16) == nothing
    for change in ({"act_bits": 8}, {"kv_bits": 8}, {"transform": "rotation"}):
        assert key_of(method="rtn", bits=16, **change) != nothing


def test_halves_of_a_joint_method_keep_their_own_defaults() -> None:
    """`admm` and `gptq` have ridges of their own; one that is given holds for both."""
    both = Recipe(method="admm+gptq", sparsity=0.5)
    method = both.make_method()
    assert method.pruning == Recipe(method="admm", sparsity=0.5).make_method()
    assert method.quantization == Recipe(method="gptq").make_method()
    assert "damp" not in method.options()
    given = both.replaced(damp=0.05).make_method()
    assert (given.pruning.damp, given.quantization.damp) == (0.05, 0.05)
    assert given.options()["damp"] == 0.05


@pytest.mark.parametrize(
    ("name", "own", "half"),
    [
        ("swap_pcg+gptq", 0.3, "pruning"),
        ("swap_pcg+rtn", 0.3, "pruning"),
        ("sparsegpt+rtn", 0.0, "pruning"),
        ("wanda+gptq", 0.0, "quantization"),
    ],
)
def test_a_joint_method_corrects_once(name: str, own: float, half: str) -> None:
    recipe = Recipe(method=name, sparsity=0.5)
    assert recipe.make_method().correction == own
    method = recipe.replaced(correction=0.4).make_method()
    assert method.correction == getattr(method, half).correction == 0.4
    other = ({"pruning", "quantization"} - {half}).pop()
    assert getattr(method, other).correction == 0
