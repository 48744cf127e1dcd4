"""Errors that teach, and the short way they leave the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lm_calib_plugin.errors import (
    CalibError,
    NumericalError,
    UnsupportedModelError,
    UserError,
    listed,
    nearest,
)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        (("bits", "got 1", "allowed: 2-8"), "bits: got 1; allowed: 2-8."),
        (("bits", "got 1.", "allowed: 2-8.", "bits=4."), "bits: got 1; allowed: 2-8; bits=4."),
        (("bits", "got 1", "", "bits=4"), "bits: got 1; bits=4."),
        (("bits", "missing"), "bits: missing."),
        (("method", "no `x`", "did you mean `y`?"), "method: no `x`; did you mean `y`?"),
    ],
)
def test_parts_make_one_sentence(parts: tuple[str, ...], text: str) -> None:
    error = UserError(*parts)
    assert str(error) == text
    assert error.argument == parts[0]


def test_place_stands_in_front() -> None:
    error = UserError("bits", "got 1").at("recipe.yaml, line 3")
    assert str(error) == "recipe.yaml, line 3: bits: got 1."
    assert error.argument == "bits"


def test_exit_codes_and_kinds() -> None:
    assert UserError("a", "b").exit_code == UnsupportedModelError("a", "b").exit_code == 2
    assert CalibError("a").exit_code == NumericalError("a", "b", "c").exit_code == 1
    assert isinstance(UserError("a", "b"), ValueError)
    error = NumericalError("layers.0.fc1", "weights", "NaN")
    assert (error.layer, error.stage) == ("layers.0.fc1", "weights")
    assert str(error) == "layers.0.fc1, weights: NaN."


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("wnada", "did you mean `wanda`?"),
        ("sparsegtp", "did you mean `sparsegpt`?"),
        ("qqq", ""),
        ("", ""),
    ],
)
def test_nearest_name(word: str, hint: str) -> None:
    assert nearest(word, ["magnitude", "wanda", "sparsegpt"]) == hint


def test_names_are_listed() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed([]) == ""


@pytest.mark.parametrize("installs", [1, 2])
def test_uncaught_user_error_is_one_line_and_exit_code_2(installs: int) -> None:
    code = "from lm_calib_plugin.errors import UserError, install_short_excepthook;"
    code += "install_short_excepthook();" * installs + "raise UserError('bits', 'got 1')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 2
    assert done.stderr == "error: bits: got 1.\n"
    assert done.stdout == ""


def test_other_errors_keep_their_traceback() -> None:
    code = (
        "from lm_calib_plugin.errors import install_short_excepthook;"
        "install_short_excepthook(); raise KeyError('x')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "KeyError: 'x'" in done.stderr
