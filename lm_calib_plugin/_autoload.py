"""Make plain ``lm_eval --model calib_pruned`` know our model names.

lm-eval 0.4.13 finds no plugins; its next release reads the entry points that we also declare.
Until that is the oldest release we support, a start-up file runs :func:`install` in every Python
process of the environment. It does one thing: when, and only when, ``lm_eval.models`` is imported,
our names are added to its table. Opt out with ``LM_CALIB_NO_AUTOLOAD=1``.

Every process pays for what this module imports, so it imports nothing but ``sys``.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing's own flag would cost an import of typing
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

OPT_OUT = "LM_CALIB_NO_AUTOLOAD"
HOOKED = "lm_eval.models"
MODELS = {
    "calib": "lm_calib_plugin.harness:Calib",
    "calib_pruned": "lm_calib_plugin.harness:CalibPruned",
    "calib_quantized": "lm_calib_plugin.harness:CalibQuantized",
}


def register() -> None:
    """Add our model names to lm-eval's table; calling it again changes nothing.

    Raises
    ------
    ImportError
        When lm-eval is not installed.
    """
    # Never fill an empty table: lm-eval loads its own models only while the table is empty.
    import lm_eval.models  # noqa: F401

    _add_names()


def install() -> None:
    """Wait for the import of ``lm_eval.models``. Never raises; calling it again changes nothing."""
    try:
        import os

        if os.environ.get(OPT_OUT, "") in ("", "0") and not is_waiting():
            if HOOKED in sys.modules:
                _add_names_quietly()
            else:
                sys.meta_path.insert(0, _Finder())
    except Exception:  # noqa: S110 - most processes of the environment never meet lm-eval
        pass


def is_waiting() -> bool:
    """Return whether the finder stands ready in this process."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


class _Finder:
    """Answers for ``lm_eval.models`` once, with the spec that everybody else agrees on."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != HOOKED:
            return None
        spec = None
        try:
            from importlib.util import find_spec

            # Gone before others are asked: no recursion, and a reload meets the plain machinery.
            sys.meta_path.remove(self)
            spec = find_spec(name)
            if spec is not None and spec.loader is not None:
                _run_after(spec.loader, _add_names_quietly)
        except Exception as error:
            _complain(error)
        return spec


def _run_after(loader: Any, action: Callable[[], None]) -> None:
    """Run ``action`` once after the loader executed its module; the loader itself stays."""
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        del loader.exec_module
        execute(module)
        action()

    loader.exec_module = exec_module


def _add_names() -> None:
    from lm_eval.api.registry import model_registry

    for name, target in MODELS.items():
        # A text, not an entry point: 0.4.13 can turn only a text into the decorated class.
        if name not in model_registry:
            model_registry.register(name, target=target)


def _add_names_quietly() -> None:
    try:
        from lm_eval.api import registry

        if not hasattr(registry, "load_plugins"):  # else lm-eval reads our entry points itself
            _add_names()
    except Exception as error:
        _complain(error)


def _complain(error: Exception) -> None:
    if sys.stderr is not None:  # as in a process without a console
        sys.stderr.write(
            f"lm_calib_plugin: could not add {', '.join(MODELS)} to lm_eval"
            f" ({type(error).__name__}: {error}); use `lm-calib eval` instead\n"
        )
