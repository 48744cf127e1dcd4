"""``export_dir=``: keep the model that an evaluation has just built."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm_calib_plugin.builtin_models import resolve_pretrained
from lm_calib_plugin.errors import CalibError
from lm_calib_plugin.export.card import base_license
from lm_calib_plugin.export.folder import asked_of, check_out, export_model
from lm_calib_plugin.export.formats import check_export, check_model
from lm_calib_plugin.export.options import ExportOptions, Provenance
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.report import Report
from lm_calib_plugin.runtime import Runtime

# Arguments of the harness that change what a model scores, and that no folder holds.
SCORING = (
    "add_bos_token",
    "attn_implementation",
    "chat_template_args",
    "enable_thinking",
    "max_length",
    "prefix_token_id",
    "softmax_dtype",
    "truncation",
)


class Keeping:
    """The folder that an evaluation is asked to keep its model in, if any.

    Parameters
    ----------
    recipe, runtime
        What is done to the model, and ``export_dir`` and ``export_format``.
    pretrained, arguments
        The model as it was named, and the arguments it is loaded with.

    Raises
    ------
    UserError
        When the folder can not be written, or no format holds what the recipe makes; before
        anything is loaded.
    """

    def __init__(
        self, recipe: Recipe, runtime: Runtime, pretrained: Any, arguments: Mapping[str, Any]
    ) -> None:
        self.recipe, self.pretrained, self.arguments = recipe, pretrained, arguments
        self.out = Path(runtime.export_dir).expanduser() if runtime.export_dir else None
        self.options = ExportOptions(format=runtime.export_format, check=runtime.export_check)
        if self.out is not None:
            check_export(recipe, self.options.format)
            asked = asked_of(self._name(), self.options)
            check_out(self.out, recipe, name="export_dir", asked=asked)

    def check(self, model: Any) -> None:
        """Refuse a model whose layers the format can not hold, before it is compressed."""
        if self.out is not None:
            check_model(model, self.recipe, self.options.format)

    def export(self, model: Any, tokenizer: Any, report: Report) -> dict[str, Any] | None:
        """Write the folder, and say so; None where none was asked for.

        The evaluation goes on where that fails: the report gets a warning, and what is returned,
        for the results file, the ``error``.
        """
        if self.out is None:
            return None
        try:
            done = export_model(
                model,
                self._tokenizer(tokenizer),
                self.recipe,
                report,
                self.out,
                self.options,
                self._provenance(),
            )
        except (CalibError, OSError) as error:
            told = f"not exported to {self.out}: {error}"
            report.warnings.append(told)
            sys.stderr.write(f"lm-calib: error: {told}\n")
            return {"folder": str(self.out), "error": str(error)}
        sys.stderr.write(f"lm-calib: {done.line()}\n")
        return done.summary()

    def _tokenizer(self, loaded: Any) -> Any:
        """Return the tokenizer as it came: the harness gives its own a padding token."""
        if not isinstance(self.pretrained, str):
            return loaded
        from transformers import AutoTokenizer

        named = self.arguments.get("tokenizer")
        if named is not None and not isinstance(named, str):
            return named
        # Revision and folder are those of the model.
        own = {k: self.arguments.get(k) for k in ("revision", "subfolder")} if not named else {}
        return AutoTokenizer.from_pretrained(
            named or resolve_pretrained(self.pretrained),
            **{k: v for k, v in own.items() if v},
            trust_remote_code=bool(self.arguments.get("trust_remote_code")),
            use_fast=self.arguments.get("use_fast_tokenizer") is not False,
        )

    def _name(self) -> str:
        if isinstance(self.pretrained, str):
            return self.pretrained
        return str(getattr(self.pretrained, "name_or_path", "")) or "a model in memory"

    def _provenance(self) -> Provenance:
        name = self._name()
        license = (
            base_license(resolve_pretrained(name)) if isinstance(self.pretrained, str) else None
        )
        given = {k: v for k, v in self.arguments.items() if v is not None}
        return Provenance(
            name,
            given.get("revision"),
            license,
            _command(),
            trust_remote_code=bool(given.get("trust_remote_code")),
            adapters=tuple(str(given[k]) for k in ("peft", "delta") if given.get(k)),
            model_args={k: given[k] for k in SCORING if k in given},
        )


def _command() -> str | None:
    """Return the line that was typed; None where another program made the evaluation."""
    program = Path(sys.argv[0])
    words = shlex.join(sys.argv[1:])
    if program.name in ("lm_eval", "lm-eval") or program.parent.name == "lm_eval":
        return f"lm_eval {words}"
    known = program.name == "lm-calib" or program.parent.name == "lm_calib_plugin"
    return f"lm-calib {words}" if known else None
