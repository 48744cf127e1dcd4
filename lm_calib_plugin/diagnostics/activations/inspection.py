"""The inspection itself: every set goes through the dense model, and what was seen is measured."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lm_calib_plugin import engine
from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.checks import check_tokenizer
from lm_calib_plugin.diagnostics.activations import compared, features, rounding
from lm_calib_plugin.diagnostics.activations.inputs import Grams, Input
from lm_calib_plugin.diagnostics.activations.metrics import measured
from lm_calib_plugin.diagnostics.activations.result import ALL, REST, OfSet, Result
from lm_calib_plugin.diagnostics.activations.seen import Seen
from lm_calib_plugin.diagnostics.activations.stream import Stream
from lm_calib_plugin.diagnostics.activations.watching import (
    Both,
    Watch,
    WatchStream,
    passed,
)
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.guard import left_as_found

GRAM_BYTES = 2 << 30
# Sampled rows of all inputs of one set take at most so many bytes.
_SAMPLE_BYTES = 512 << 20
_SAMPLE, _LEAST = 256, 8


def inspect(
    model: nn.Module,
    tokenizer: Any,
    sets: Mapping[str, CalibrationSet],
    *,
    gram_bytes: int = GRAM_BYTES,
    transforms: bool = True,
    seed: int = 0,
    batch_size: int | None = None,
    sample_rows: int | None = None,
    block_path: str | None = None,
    progress: bool = True,
) -> Result:
    """Look at the inputs of every linear layer of the decoder blocks, for every set of sequences.

    The model is left as found. Memory does not grow with the number of tokens: the hidden states
    of one chunk live at a time, and everything kept has a size of its own.

    Parameters
    ----------
    model, tokenizer
        A causal language model, and its tokenizer (None: not compared with that of the sets).
    sets
        Name -> sequences; the first is what others are compared with.
    gram_bytes
        Most bytes of Gram matrices at a time; when they do not all fit, blocks take turns in
        several passes. 0: none, so that subspaces are not compared.
    transforms
        Whether rounding is also looked at after SmoothQuant and a rotation.
    seed
        Of the rows that rounding is measured on, and of the rotation.
    batch_size
        Sequences at once; None: about 4,096 tokens on a CPU, 16,384 on a GPU.
    sample_rows
        Rows of each input that rounding is measured on; None: 256, fewer where that would take
        more than half a GiB a set.

    Raises
    ------
    UserError
        When there is no set, one of another tokenizer, or a token id beyond the model's.
    NumericalError
        For activations that are NaN or infinite; the input is named.
    """
    began = time.perf_counter()
    _check(model, tokenizer, sets)
    engine.check_supported(model)
    blocks = engine.find_blocks(model, block_path)
    layers, _ = engine.find_layers(blocks)
    rows = sample_rows or _affordable(layers)
    with left_as_found(model):
        run = _Run(
            model, blocks, layers, sets, Grams(gram_bytes, len(sets)), rows, seed, batch_size
        )
        run.passes(progress)
        result = run.result(transforms)
    result.seconds = time.perf_counter() - began
    return result


class _Run:
    """One inspection under way."""

    def __init__(
        self,
        model: nn.Module,
        blocks: engine.Blocks,
        layers: Sequence[engine.TargetLayer],
        sets: Mapping[str, CalibrationSet],
        grams: Grams,
        rows: int,
        seed: int,
        size: int | None,
    ) -> None:
        self.model, self.blocks, self.layers = model, blocks, layers
        self.sets, self.grams, self.seed, self.size = sets, grams, seed, size
        self.rows, self.hidden = rows, int(engine.text_config(model.config).hidden_size)
        self.inputs: dict[str, Input] = {}
        self.found: dict[str, dict[str, Both]] = {name: {} for name in sets}
        self.streams = {name: Stream(len(blocks) + 1, self.hidden) for name in sets}
        self.pairs: dict[Any, Any] = {}
        self.rank_shares: dict[str, dict[str, dict[str, float | None]]] = {}
        self.warnings: list[str] = []
        self.number = 0

    def passes(self, progress: bool) -> None:
        """Run all sets through the model until every Gram matrix was seen."""
        while True:
            self.number += 1
            tokens = sum(one.tokens for one in self.sets.values())
            title = "activations, tokens" if self.number == 1 else f"pass {self.number}, tokens"
            with tqdm(total=tokens, desc=title, disable=not progress) as bar:
                for name, calibration in self.sets.items():
                    where = self.model, self.blocks, self.layers, calibration
                    self.warnings += passed(*where, self._watch(name), self.size, bar.update)
            self._compare_grams()
            if not self.grams.full:
                return
            self.grams.next_pass()

    def _watch(self, name: str) -> Watch:
        given = (
            self.found[name], self.inputs, self.grams, self.rows, self.seed, self.hidden,
        )  # fmt: skip
        if self.number > 1:
            return Watch(*given, metrics=False)
        watch = WatchStream(*given)
        watch.residual = self.streams[name]
        return watch

    def _compare_grams(self) -> None:
        """Compare the sets by the Gram matrices of this pass, and let go of these."""
        for name, one in self.inputs.items():
            seconds: dict[str, dict[str, tuple[Tensor, int]]] = {}
            for place, found in self.found.items():
                both = found.get(name)
                if both is not None:
                    seconds[place] = _second_moments(both)
                    both.first.gram = both.rest.gram = None
            for place, parts in seconds.items():
                shares = {part: compared.rank_share(h) for part, (h, _) in parts.items()}
                if shares:
                    self.rank_shares.setdefault(place, {})[name] = shares
            for a, b in itertools.combinations(seconds, 2):
                for part in seconds[a].keys() & seconds[b].keys():
                    (h_a, n_a), (h_b, n_b) = seconds[a][part], seconds[b][part]
                    k = compared.dimensions(one.width, n_a, n_b)
                    into = self.pairs.setdefault((a, b), {}).setdefault(name, {})
                    into[part] = {**compared.by_gram(h_a, h_b, k, self.seed), "k": k}

    def result(self, transforms: bool) -> Result:
        """Measure everything that was seen."""
        order = {layer.name: number for number, layer in enumerate(self.layers)}
        inputs = sorted(self.inputs.values(), key=lambda one: order[one.layers[0]])
        inner = {one.name: self._inner(one) for one in inputs} if transforms else {}
        sets = {}
        for name, calibration in self.sets.items():
            made = OfSet(name, calibration, stream=self.streams[name])
            for one in inputs:
                both = self.found[name][one.name]
                self._measure(made, one, both, inner.get(one.name), transforms)
            made.massive = self.streams[name].largest()
            for part in (ALL, REST):
                made.features[part] = features.outlier_features(
                    [(one, self._part(name, one, part)) for one in inputs if one.hidden]
                )
            sets[name] = made
        self._compare_channels(inputs)
        settings = {
            "gram_bytes": self.grams.limit,
            "sample_rows": self.rows,
            "transforms": transforms,
            "seed": self.seed,
        }
        return Result(
            inputs,
            sets,
            self.pairs,
            self.rank_shares,
            self.number,
            self.grams.left_out,
            settings,
            list(dict.fromkeys(self.warnings)),
            0.0,
        )

    def _part(self, name: str, one: Input, part: str) -> Seen:
        both = self.found[name][one.name]
        return both.all() if part == ALL else both.rest

    def _measure(
        self, made: OfSet, one: Input, both: Both, inner: Tensor | None, transforms: bool
    ) -> None:
        together = both.all()
        found = {ALL: measured(together), REST: measured(both.rest)}
        if together.rows:
            parts = [both.first, both.rest]
            found[ALL]["snr"] = rounding.ratios(parts, inner, self.seed, transforms)
        if both.rest.rows:
            found[REST]["snr"] = rounding.ratios([both.rest], inner, self.seed, transforms)
        made.inputs[one.name] = found
        made.unplaced += both.unplaced
        made.densities[one.name] = {ALL: together.counts, REST: both.rest.counts}
        peaks = together.peaks.double().numpy()
        means = (together.powers[:, 1] / together.tokens.clamp(min=1)[:, None]).numpy()
        made.halves[one.name] = compared.by_channel(peaks[0], means[0], peaks[1], means[1])

    def _compare_channels(self, inputs: Sequence[Input]) -> None:
        """Add to every pair what largest values and energies of channels say."""
        for one in inputs:
            for part in (ALL, REST):
                seen = {name: self._part(name, one, part) for name in self.sets}
                for a, b in itertools.combinations(self.sets, 2):
                    if not (seen[a].rows and seen[b].rows):
                        continue
                    given = [
                        vector.double().numpy()
                        for name in (a, b)
                        for vector in (seen[name].peak, seen[name].energy / seen[name].rows)
                    ]
                    into = self.pairs.setdefault((a, b), {}).setdefault(one.name, {})
                    into[part] = {**compared.by_channel(*given), **into.get(part, {})}

    def _inner(self, one: Input) -> Tensor:
        """Return the largest absolute weight of every channel over the readers of an input."""
        named = {layer.name: layer for layer in self.layers}
        return torch.stack([named[n].read().abs().amax(0).cpu() for n in one.layers]).amax(0)


def _second_moments(both: Both) -> dict[str, tuple[Tensor, int]]:
    """Return ``H`` of all tokens and of all but the first ones, and the number of tokens."""
    first, rest = both.first.gram, both.rest.gram
    if first is None or rest is None:
        return {}
    found = {}
    tokens = first.tokens + rest.tokens
    if tokens:
        found[ALL] = (first.matrix + rest.matrix) / tokens, tokens
    if rest.tokens:
        found[REST] = rest.matrix / rest.tokens, rest.tokens
    return found


def _affordable(layers: Sequence[engine.TargetLayer]) -> int:
    """Return how many rows of each input are sampled; no input shared is the worst case."""
    width = sum(layer.shape[1] for layer in layers)
    return max(_LEAST, min(_SAMPLE, _SAMPLE_BYTES // (4 * max(1, width))))


def _check(model: Any, tokenizer: Any, sets: Mapping[str, CalibrationSet]) -> None:
    if not sets:
        raise UserError("calibration", "got no set", "one or more", "for instance c4")
    size = int(model.get_input_embeddings().weight.shape[0])
    for name, calibration in sets.items():
        if tokenizer is not None:
            check_tokenizer(calibration, tokenizer)
        if not calibration.sequences:
            raise UserError("calibration", f"the set {name} is empty", "one or more sequences")
        largest = max(int(ids.max()) for ids in calibration.sequences)
        if largest >= size:
            raise UserError(
                "calibration",
                f"the set {name} holds the token id {largest}",
                f"the model has {size}",
                "make the set with the tokenizer of this model",
            )
