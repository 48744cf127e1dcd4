"""Every bad input gets a message that says what was given, what is allowed and what to type.

The texts are kept in ``messages/*.txt``; ``pytest --update-messages`` rewrites them. The words
that each message must hold stand in ``bad_inputs.py`` and ``bad_grids.py``, so that a rewrite can
not lose the lesson.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lm_calib_plugin import registry
from lm_calib_plugin.errors import CalibError, NumericalError, UserError
from lm_calib_plugin.expression import parse_calibration
from lm_calib_plugin.recipe import Recipe
from tests.contracts.bad_grids import GRIDS
from tests.contracts.bad_inputs import CASES as INPUTS
from tests.contracts.bad_inputs import Case, yaml_file

FOLDER = Path(__file__).parent / "messages"
CASES = [*INPUTS, *GRIDS]


@pytest.fixture(autouse=True)
def only_our_own_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Messages list what is installed: leave other packages out, and files in a folder of ours."""
    monkeypatch.setattr(registry, "_installed", lambda kind: ())
    registry.table.cache_clear()
    monkeypatch.chdir(tmp_path)
    yield
    registry.table.cache_clear()


def message(case: Case) -> UserError:
    with pytest.raises(UserError) as caught:
        case.do()
    return caught.value


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_message_teaches(case: Case, request: pytest.FixtureRequest) -> None:
    error = message(case)
    text = str(error)
    assert error.argument == case.argument
    assert error.exit_code == 2
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__
    assert f"{case.argument}: " in text
    for words in case.must:
        assert words in text
    assert "\n" not in text
    assert text.endswith((".", "?"))
    for ours in ("Traceback", "pydantic", "validation error", "Input should", "..", ";;", ": ;"):
        assert ours not in text, ours
    golden = FOLDER / f"{case.name}.txt"
    if request.config.getoption("--update-messages"):
        FOLDER.mkdir(exist_ok=True)
        golden.write_text(text + "\n", encoding="utf-8")
    assert text + "\n" == golden.read_text(encoding="utf-8"), "run pytest --update-messages"


def test_every_golden_file_has_a_case() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert {file.stem for file in FOLDER.iterdir()} == set(names)


@pytest.mark.parametrize(
    "given",
    [
        {"method": "wanda", "sparsity": "0.5", "nsamples": "1e3"},
        {"method": "wanda", "sparsity": 0.5, "nsamples": 1000.0},
        {"method": "wanda", "pattern": " 2:4 ", "sparsity": 0.5},
        {"method": "magnitude", "pattern": "1:3", "sparsity": 1 - 1 / 3},
        {"method": "magnitude", "sparsity": 0.5, "calibration": "none"},
        {"method": "magnitude", "sparsity": 0.5, "calibration": None},
        {"method": "rtn", "bits": "16"},
        {"method": "gptq", "symmetric": "False", "act_order": "yes", "group_size": "-1"},
        {"method": "wanda", "sparsity": 0.5, "seqlen": "", "pack": None, "block_path": "null"},
        {"method": "wanda", "sparsity": 0.5, "ignore": [], "targets": "*q_proj + *mlp*"},
    ],
    ids=str,
)
def test_what_can_be_read_is_accepted(given: dict[str, Any]) -> None:
    Recipe.from_model_args(given)


def test_harness_none_means_no_data() -> None:
    """The harness turns the text ``none`` into None; that is still a wish, not an omission."""
    with pytest.raises(UserError, match="`wanda` needs calibration data"):
        Recipe.from_model_args({"method": "wanda", "sparsity": 0.5, "calibration": None})
    left_out = Recipe.from_model_args({"method": "wanda", "sparsity": 0.5})
    assert [term.name for term in left_out.terms] == ["self"]


def test_place_in_a_file_is_named_only_for_what_stands_there() -> None:
    do = yaml_file("method: wanda\nsparsity: 0.5\n", nsamples=0)
    with pytest.raises(UserError) as caught:
        do()
    assert "recipe.yaml" not in str(caught.value)


def test_numerical_errors_name_layer_and_stage() -> None:
    error = NumericalError("model.layers.3.mlp.up_proj", "weights", "NaN", "raise damp")
    assert str(error) == "model.layers.3.mlp.up_proj, weights: NaN; raise damp."
    assert error.exit_code == 1
    assert isinstance(error, CalibError)
    assert not isinstance(error, UserError)


def test_parse_errors_are_those_of_the_argument() -> None:
    with pytest.raises(UserError) as caught:
        parse_calibration("nosuch")
    assert caught.value.argument == "calibration"
