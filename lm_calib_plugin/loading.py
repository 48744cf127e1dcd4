"""Which model is compressed, and how it is loaded: the same for every command and class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lm_calib_plugin import engine
from lm_calib_plugin.builtin_models import resolve_pretrained
from lm_calib_plugin.errors import UserError, listed, nearest
from lm_calib_plugin.guard import local_rank, random_state_untouched

DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Loading:
    """Which model a set is built for, and how it is loaded where it is needed at all.

    Parameters
    ----------
    pretrained
        Hub name, folder, or ``builtin:NAME``.
    tokenizer
        Another tokenizer; default: that of the model.
    revision, trust_remote_code, subfolder
        As for ``from_pretrained``; revision and subfolder are those of the model, and of its own
        tokenizer.
    dtype, device
        Of the model, for text that it writes itself. Defaults: that of the checkpoint; ``cuda``
        where there is one.

    Raises
    ------
    UserError
        For a dtype that there is not, and a device that this machine does not have.
    """

    pretrained: str
    tokenizer: str | None = None
    revision: str = "main"
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    subfolder: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(
                "dtype",
                f"got {self.dtype!r}",
                nearest(self.dtype, DTYPES),
                f"allowed: {listed(DTYPES)}",
            )
        if self.device is not None:
            _check_device(self.device)

    def place(self) -> str:
        """Return the device the model goes to; each of several processes has one of its own."""
        if self.device is not None or not torch.cuda.is_available():
            return self.device or "cpu"
        number = local_rank()
        return "cuda" if number is None else f"cuda:{number}"

    def of_model(self) -> dict[str, Any]:
        """Return what ``from_pretrained`` of model and configuration get beside the name."""
        inside = {"subfolder": self.subfolder} if self.subfolder else {}
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code, **inside}

    def of_tokenizer(self) -> tuple[str, dict[str, Any]]:
        """Return the name of the tokenizer, and what its ``from_pretrained`` gets beside it.

        A revision is one of the model: another repository does not have it.
        """
        if self.tokenizer in (None, self.pretrained):
            return self.pretrained, self.of_model()
        return str(self.tokenizer), {"trust_remote_code": self.trust_remote_code}


def load_model(loading: Loading) -> tuple[Any, Any]:
    """Return model and tokenizer.

    Raises
    ------
    UserError
        When they cannot be loaded, or the model is of a kind that cannot be compressed.
    """
    with random_state_untouched():
        try:
            tokenizer = load_tokenizer(loading)
        except (OSError, ValueError) as error:
            raise cannot_load(loading, error) from None
    model = load_weights(loading)
    engine.check_supported(model)
    return model, tokenizer


def load_tokenizer(loading: Loading) -> Any:
    """Return the tokenizer; errors are those of transformers."""
    name, options = loading.of_tokenizer()
    return AutoTokenizer.from_pretrained(resolve_pretrained(name), **options)


def load_weights(loading: Loading) -> Any:
    """Return the model alone, where it is to run.

    Raises
    ------
    UserError
        When it cannot be loaded.
    """
    folder = resolve_pretrained(loading.pretrained)
    with random_state_untouched():
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=loading.dtype, **loading.of_model()
            )
            return model.to(loading.place())
        except (OSError, ValueError) as error:
            raise cannot_load(loading, error) from None


def cannot_load(loading: Loading, error: Exception) -> Exception:
    """Return the error for a model that cannot be loaded."""
    if isinstance(error, UserError):
        return error
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        "pretrained",
        f"`{loading.pretrained}` cannot be loaded ({first[:200]})",
        "a hub name, a folder, or builtin:smollm2-135m",
    )


def _check_device(given: str) -> None:
    there = ["cpu"]
    if torch.accelerator.is_available():
        kind = str(torch.accelerator.current_accelerator()).partition(":")[0]
        there += [kind, *(f"{kind}:{n}" for n in range(torch.accelerator.device_count()))]
    if given not in there:
        raise UserError(
            "device",
            f"got {given!r}",
            nearest(given.replace("gpu", "cuda"), there),
            f"this machine has: {listed(there)}",
        )
