"""Errors that teach: what was given, what is allowed, what to type instead."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator
from types import TracebackType


class CalibError(Exception):
    """Base of every error raised on purpose by this package. ``exit_code`` is 1."""

    exit_code = 1


class UserError(CalibError, ValueError):
    """Something the user gave cannot be used.

    Parameters
    ----------
    argument
        Name of the argument (or file) at fault; shown first.
    given
        What was given.
    allowed
        What is allowed.
    fix
        What to type instead.
    """

    exit_code = 2

    def __init__(self, argument: str, given: str, allowed: str = "", fix: str = "") -> None:
        self.argument = argument
        parts = [part.rstrip(".").rstrip("; ") for part in (given, allowed, fix) if part]
        text = f"{argument}: " + "; ".join(parts)
        super().__init__(text if text.endswith("?") else text + ".")

    def renamed(self, argument: str) -> UserError:
        """Return the same lesson about another argument that takes the same values."""
        return UserError(argument, str(self).removeprefix(f"{self.argument}: "))

    def at(self, place: str) -> UserError:
        """Put the place (file and line) where the value was read in front of the message."""
        self.args = (f"{place}: {self}",)
        return self


class UnsupportedModelError(UserError):
    """The model is of a kind that cannot be compressed here; the message names the way out."""


class NumericalError(CalibError):
    """NaN, Inf or a singular matrix, with the layer and the stage where it was first seen."""

    def __init__(self, layer: str, stage: str, what: str, fix: str = "") -> None:
        self.layer, self.stage, self.what, self.fix = layer, stage, what, fix
        super().__init__(f"{layer}, {stage}: {what}" + (f"; {fix}" if fix else "") + ".")


@contextlib.contextmanager
def named(layer: str) -> Iterator[None]:
    """Name the layer in what the mathematics, which does not know it, raises inside."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(layer, error.stage, error.what, error.fix) from None


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean `x`?"`` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else ""


def listed(names: Iterable[str]) -> str:
    """Join names for a message: ``a, b, c``."""
    return ", ".join(names)


def install_short_excepthook() -> None:
    """Make an *uncaught* :class:`UserError` end the process with its message and exit code 2.

    Every other exception keeps its traceback. Used where a command line that is not ours
    (``lm_eval``) would print a traceback for a typing error.
    """
    previous = sys.excepthook
    if getattr(previous, "_lm_calib", False):
        return

    def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        if isinstance(value, UserError):
            sys.stderr.write(f"error: {value}\n")
            sys.stderr.flush()
            raise SystemExit(value.exit_code)
        previous(kind, value, trace)

    hook._lm_calib = True  # type: ignore[attr-defined]
    sys.excepthook = hook
