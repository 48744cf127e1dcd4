"""Where and how the work is done: everything that can not change the result."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, fields
from pathlib import Path

from lm_calib_plugin.errors import UserError, listed, nearest
from lm_calib_plugin.values import flag, whole

ON_LEAK = ("warn", "error", "ignore")
EXPORT_FORMATS = ("auto", "dense", "compressed-tensors", "gptq")


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
    export_dir
        Folder to keep the compressed model in, as an ordinary Hugging Face folder; made before the
        evaluation begins.
    export_format
        How weights are stored there: ``dense`` (ordinary numbers), ``compressed-tensors`` (packed
        levels), ``gptq`` (packed integer levels, for gptqmodel and servers that read its format),
        or ``auto``: ``compressed-tensors`` where levels are, else dense.
    export_check
        Load the folder back and compare it with the model; needs memory for a second model.
    cache
        Keep the compressed model, and load it when the same is asked for again: ``true`` (in our
        cache), or the folder to keep it in.
    split
        Whether several processes (``torchrun``, ``accelerate launch``) divide the work, so that
        all have to compress together; with ``false`` each does all of it by itself.
    on_leak
        What to do when evaluated items stand in the calibration text: ``warn``, ``error`` (refuse
        to evaluate them) or ``ignore`` (do not look).
    divergence
        Run the dense model beside the compressed one during an evaluation, and compare what they
        say at every scored position of every task; takes about the time of both, and the memory of
        all weights that compression changes once more.

    Raises
    ------
    UserError
        For a value that can not be used, such as a ``report_dir`` that is a file.
    """

    calib_batch_size: int | str = "auto"
    eval_tokens: int = 512
    report_dir: str | None = None
    progress: bool = True
    export_dir: str | None = None
    export_format: str = "auto"
    export_check: bool = True
    cache: bool | str = False
    split: bool = True
    on_leak: str = "warn"
    divergence: bool = False

    def __post_init__(self) -> None:
        if self.calib_batch_size != "auto":
            size = whole("calib_batch_size", self.calib_batch_size, lowest=1)
            object.__setattr__(self, "calib_batch_size", size)
        tokens = whole("eval_tokens", self.eval_tokens, lowest=1)
        object.__setattr__(self, "eval_tokens", tokens)
        for name in ("progress", "export_check", "split", "divergence"):
            object.__setattr__(self, name, flag(name, getattr(self, name)))
        for name, allowed in (("on_leak", ON_LEAK), ("export_format", EXPORT_FORMATS)):
            value = getattr(self, name)
            if value not in allowed:
                raise UserError(
                    name,
                    f"got {value!r}",
                    nearest(str(value), allowed),
                    f"allowed: {listed(allowed)}",
                )
        for name in ("report_dir", "export_dir"):
            self._check_folder(name)
        self._check_cache()

    def _check_cache(self) -> None:
        if self.cache is None:
            object.__setattr__(self, "cache", False)
        if not isinstance(self.cache, Path):
            with contextlib.suppress(UserError):
                object.__setattr__(self, "cache", flag("cache", self.cache))
                return
        if not isinstance(self.cache, (str, Path)) or not str(self.cache).strip():
            raise UserError(
                "cache", f"got {self.cache!r}", "true, false or a folder", "for instance cache=true"
            )
        object.__setattr__(self, "cache", str(Path(self.cache).expanduser()))
        self._check_folder("cache")

    def _check_folder(self, name: str) -> None:
        if getattr(self, name) is None:
            return
        path = Path(str(getattr(self, name)))
        object.__setattr__(self, name, str(path))
        taken = [p for p in (path, *path.parents) if p.exists() and not p.is_dir()]
        if taken:
            raise UserError(name, f"{taken[0]} is a file", "name a folder")


RUNTIME_ARGUMENTS = {field.name: field for field in fields(Runtime)}.keys()
