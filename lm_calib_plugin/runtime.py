"""Where and how the work is done: everything that can not change the result."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from lm_calib_plugin.errors import UserError, listed, nearest
from lm_calib_plugin.values import flag, whole

ON_LEAK = ("warn", "error", "ignore")


@dataclass(frozen=True)
class Runtime:
    """Device-side and file-side choices; never part of a recipe's identity.

    Parameters
    ----------
    calib_batch_size
        Sequences per forward pass; ``auto`` takes about 4,096 tokens on a CPU and 16,384 on a GPU.
    eval_tokens
        Tokens that the evaluation multiplies at once (batch size times length): kernels of
        ``execution=packed`` are chosen by their speed at this number.
    report_dir
        Folder of the per-layer report; default: ``reports`` in our cache.
    progress
        Show progress bars.
    on_leak
        What to do when evaluated items stand in the calibration text: ``warn``, ``error`` (refuse
        to evaluate them) or ``ignore`` (do not look).

    Raises
    ------
    UserError
        For a value that can not be used, such as a ``report_dir`` that is a file.
    """

    calib_batch_size: int | str = "auto"
    eval_tokens: int = 512
    report_dir: str | None = None
    progress: bool = True
    on_leak: str = "warn"

    def __post_init__(self) -> None:
        if self.calib_batch_size != "auto":
            size = whole("calib_batch_size", self.calib_batch_size, lowest=1)
            object.__setattr__(self, "calib_batch_size", size)
        tokens = whole("eval_tokens", self.eval_tokens, lowest=1)
        object.__setattr__(self, "eval_tokens", tokens)
        object.__setattr__(self, "progress", flag("progress", self.progress))
        if self.on_leak not in ON_LEAK:
            raise UserError(
                "on_leak",
                f"got {self.on_leak!r}",
                nearest(str(self.on_leak), ON_LEAK),
                f"allowed: {listed(ON_LEAK)}",
            )
        if self.report_dir is not None:
            object.__setattr__(self, "report_dir", str(self.report_dir))
            taken = [
                p
                for p in (Path(self.report_dir), *Path(self.report_dir).parents)
                if p.exists() and not p.is_dir()
            ]
            if taken:
                raise UserError("report_dir", f"{taken[0]} is a file", "name a folder")


RUNTIME_ARGUMENTS = {field.name: field for field in fields(Runtime)}.keys()
