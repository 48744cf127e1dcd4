"""``--model calib``, ``calib_pruned`` and ``calib_quantized``: HFLM, compressed on load."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from lm_calib_plugin import engine
from lm_calib_plugin.builtin_models import resolve_pretrained
from lm_calib_plugin.checks import check_calibration, check_whole, sequence_length
from lm_calib_plugin.compression import compress, is_main_process
from lm_calib_plugin.diagnostics.pair import share_equal, twin
from lm_calib_plugin.errors import CalibError, UserError, install_short_excepthook, listed
from lm_calib_plugin.guard import check_agreed, several_processes
from lm_calib_plugin.harness.arguments import (
    merge_harness,
    parse_argument_text,
    split_arguments,
)
from lm_calib_plugin.harness.cache_guard import guard_response_cache
from lm_calib_plugin.harness.divergence import Watch
from lm_calib_plugin.harness.keeping import Keeping
from lm_calib_plugin.harness.leakage import LeakCheck
from lm_calib_plugin.harness.speed import Speed
from lm_calib_plugin.packed import check_packed
from lm_calib_plugin.placement import execution_device
from lm_calib_plugin.recipe import read_arguments
from lm_calib_plugin.registry import table

SHOWN_WARNINGS = 5
COMPARING = "comparing with the dense model"


class Calib(HFLM):
    """A Hugging Face causal model that is pruned or quantized right after it is loaded.

    Takes every argument of HFLM, the fields of :class:`~lm_calib_plugin.recipe.Recipe` and of
    :class:`~lm_calib_plugin.recipe.Runtime`, and ``recipe=FILE``. ``pretrained`` may be a hub
    name, a folder, a model in memory or ``builtin:NAME``. All of ours is validated before anything
    is loaded. ``report`` holds the :class:`~lm_calib_plugin.report.Report`.
    """

    kinds: tuple[str, ...] = ("pruning", "quantization", "joint")

    def __init__(self, pretrained: Any = None, **arguments: Any) -> None:
        if pretrained is None:
            raise UserError("pretrained", "missing", "a hub name, a folder or builtin:smollm2-135m")
        ours, theirs = split_arguments(arguments)
        self.recipe, runtime = read_arguments(ours)
        self._check_kind()
        method = self.recipe.make_method()
        if self.recipe.execution == "packed":
            check_packed(self.recipe, method, _expected_device(theirs))
        check_calibration(self.recipe)
        keeping = Keeping(self.recipe, runtime, pretrained, theirs)
        if isinstance(pretrained, str):
            pretrained = resolve_pretrained(pretrained)
        elif runtime.divergence:
            check_whole(pretrained, "divergence", COMPARING, "drop divergence=true")
        super().__init__(pretrained=pretrained, **theirs)
        if self._device.type == "meta":
            # Of a model in memory HFLM asks its first weight, which may be offloaded.
            self._device = execution_device(self.model.get_input_embeddings())
        if theirs.get("peft"):
            # Adapters become part of the weights before these are compressed.
            self._model = self._model.merge_and_unload()
        keeping.check(self.model)
        dense = None
        if runtime.divergence:
            check_whole(self.model, "divergence", COMPARING)
            dense = twin(self.model)
        self.report = compress(self.model, self.tokenizer, self.recipe, runtime)
        self.watch = None
        if dense is not None:
            share_equal(dense, self.model)
            self.watch = Watch(self, dense)
        if theirs.get("trust_remote_code"):
            self.report.warnings.append(
                "code that came with the model was allowed to run (trust_remote_code)"
            )
        self.leak_check = LeakCheck(self.report.calibration_set, self.tokenizer, runtime.on_leak)
        self.speed = Speed()
        self._agree_across_ranks()
        self.exported = None
        if is_main_process():
            sys.stderr.write(f"lm-calib: {self.report.line()}\n")
            for note in self.report.warnings[:SHOWN_WARNINGS]:
                sys.stderr.write(f"lm-calib: warning: {note}\n")
            self.exported = keeping.export(self.model, self.tokenizer, self.report)
        # Scales are only of use to whoever stores the model.
        self.report.grids = {}

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> Calib:
        """Make the model from a mapping; the way of ``lm_eval`` and of ``simple_evaluate``."""
        try:
            # What the command line passes beside the arguments may be its own default.
            _check_device(arg_dict.get("device"))
            return cls(**merge_harness(arg_dict, additional_config or {}))
        except UserError:
            install_short_excepthook()
            raise

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> Calib:
        """Make the model from ``key=value,...``; nested values stay whole."""
        return cls.create_from_arg_obj(parse_argument_text(arg_string), additional_config)

    def get_model_info(self) -> dict[str, Any]:
        """Add the compression summary; it goes into the results file.

        Raises
        ------
        CalibError
            When the weights that were evaluated are not those that were reported.
        """
        if engine.weights_digest(self.model) != self.report.weights_digest:
            raise CalibError(
                "The weights have changed since they were compressed: the evaluation is not of "
                "the model that the report describes."
            )
        summary = self.report.summary()
        summary["evaluation"] = self.speed.summary()
        if self.exported is not None:
            summary["exported"] = self.exported
        summary["leakage"] = self.leak_check.report()
        summary["warnings"] += self.leak_check.warnings()
        if self.watch is not None:
            summary["divergence"], notes = self.watch.report()
            summary["warnings"] += notes
        return {**super().get_model_info(), "compression": summary}

    def loglikelihood(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Score continuations, after a look for calibration text among them."""
        self._check_leaks(requests)
        with self.watch.scoring(requests) if self.watch else nullcontext():
            return super().loglikelihood(requests, *args, **kwargs)

    def loglikelihood_rolling(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Score running text, after a look for calibration text in it."""
        self._check_leaks(requests)
        with self.watch.scoring(requests, rolling=True) if self.watch else nullcontext():
            return super().loglikelihood_rolling(requests, *args, **kwargs)

    def generate_until(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Generate, after a look for calibration text in the prompts."""
        self._check_leaks(requests)
        with self.watch.generating(requests) if self.watch else nullcontext():
            return super().generate_until(requests, *args, **kwargs)

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Score token ids; the dense model has to know whose they are."""
        if self.watch is not None:
            self.watch.tokenized(requests)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _select_cont_toks(self, logits: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what is scored of a row, which both models are compared at."""
        if self.watch is not None:
            self.watch.scored(*args, **kwargs)
        return super()._select_cont_toks(logits, *args, **kwargs)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the model, and count tokens and seconds."""
        if self.watch is not None:
            self.watch.release()
        with self.speed.timed("scored", inps) as count:
            found: torch.Tensor = super()._model_call(inps, *args, **kwargs)
            count(inps.numel())
        if self.watch is not None:
            self.watch.passed(inps, found)
        return found

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> int:
        """Look for the largest batch; its trials are no evaluation."""
        with self.speed.paused():
            return int(super()._detect_batch_size(*args, **kwargs))

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Generate, and count new tokens and seconds."""
        with self.speed.timed("generated", context) as count:
            found: torch.Tensor = super()._model_generate(context, *args, **kwargs)
            count(found.shape[0] * max(0, found.shape[1] - context.shape[1]))
        if self.watch is not None:
            self.watch.generated(context, kwargs.get("attention_mask"), found, kwargs.get("stop"))
        return found

    def barrier(self) -> None:
        """Wait for the other processes and add up what each has found.

        The harness calls this on every process after each kind of request, also where the
        response cache had all the answers.
        """
        super().barrier()
        self.leak_check.gather()
        if self.watch is not None:
            self.watch.gather()

    def _check_leaks(self, requests: list[Any]) -> None:
        try:
            self.leak_check.check(requests)
        except UserError:
            install_short_excepthook()
            raise

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuse a response cache that was written by another recipe."""
        try:
            guard_response_cache(cache_hook.dbdict, self.report.key)
            self.leak_check.watch_cache(cache_hook.dbdict)
            if self.watch is not None:
                self.watch.watch_cache(cache_hook.dbdict)
        except UserError:
            install_short_excepthook()
            raise
        super().set_cache_hook(cache_hook)

    def _get_config(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what can not be compressed as soon as the configuration is known."""
        super()._get_config(*args, **kwargs)
        engine.check_config(self._config, self._config.__class__.__name__.removesuffix("Config"))
        sequence_length(self.recipe, self._config)

    def _check_kind(self) -> None:
        kind = self.recipe.entry.kind
        if kind not in self.kinds:
            right = [name for own in self.kinds for name in table(own)]  # type: ignore[arg-type]
            what = "prunes and quantizes" if kind == "joint" else f"is a {kind} method"
            models = {"pruning": "calib_pruned", "quantization": "calib_quantized"}
            raise UserError(
                "method",
                f"`{self.recipe.method}` {what}",
                f"methods of this model class: {listed(right)}",
                f"use --model {models.get(kind, 'calib')}",
            )

    def _agree_across_ranks(self) -> None:
        """Every process must hold the same weights, else their answers can not be pooled."""
        if not several_processes():
            return
        mine = self.report.weights_digest
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        check_agreed(everyone)


class CalibPruned(Calib):
    """``--model calib_pruned``: pruning methods only."""

    kinds = ("pruning",)


class CalibQuantized(Calib):
    """``--model calib_quantized``: quantization methods only."""

    kinds = ("quantization",)


def _expected_device(arguments: dict[str, Any]) -> torch.device:
    """Return where HFLM will put the model, as far as its arguments tell."""
    asked = str(arguments.get("device") or "cuda")
    if asked.startswith("cuda") and not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device(asked)


def _check_device(device: Any) -> None:
    if device is not None and str(device).startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            "device", f"got {device}, but no CUDA device was found", "cpu", "device=cpu"
        )
