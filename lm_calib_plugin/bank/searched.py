"""Mixtures searched in a statistics bank: ``minimax``, ``weighted`` and ``no_worse``.

Every source is drawn in two folds; shares that statistics of ``choose`` serve are judged on
``validate``. The bank goes when the search ends, what was found stays in the cache.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_calib_plugin import storage
from lm_calib_plugin.bank.build import Part, build_bank
from lm_calib_plugin.bank.mixing import Objective, search_mix
from lm_calib_plugin.bank.mixtures import Found, Mixture, Task, stored_inside, with_record
from lm_calib_plugin.calibration import CalibrationSet, Option
from lm_calib_plugin.calibration.build import interleaved
from lm_calib_plugin.errors import UserError, listed
from lm_calib_plugin.expression import SourceTerm, shares

REVISION = 2  # raised when the same expression begins to give other shares
FEWEST_CHECKED = 8
FIT, CHECK = "choose", "validate"


class Searched(Mixture):
    """A mixture whose shares are found in a statistics bank."""

    divides_folds = True

    def __init__(self, term: SourceTerm) -> None:
        super().__init__(term)
        stored = stored_inside(term.inner)
        if stored:
            raise UserError(
                "calibration",
                f"`{self.name}` of {listed(stored)}",
                "sources of documents: a finished set has no documents left to judge it by",
                "name the source that the set was made of",
            )

    def objective(self) -> Objective:
        """Return what the shares are to be good at."""
        raise NotImplementedError

    def resolve(self, task: Task) -> Found:
        """Draw every source in two folds, fill a bank, search, and keep a share of each."""
        task.require_layers(self.name)
        parts = self._parts(task)
        chosen = [p.calibration for p in parts if p.fold == FIT]
        mix = self._even() if task.method.does_nothing else self._found(task, parts)
        total = sum(mix["shares"].values())  # 1, but for rounding
        terms = [replace(t, weight=mix["shares"][t.text()] / total) for t in self.term.inner]
        record = {
            "expression": self.term.text(),
            "fold": FIT,
            "checked_on": CHECK,
            "method": task.recipe.method,
        }
        return Found(joined(chosen, terms, task, record | mix), mix["damp"])

    def _even(self) -> dict[str, Any]:
        """Return equal shares: where no weight is changed, no share is better than another."""
        count = len(self.term.inner)
        return {"shares": {t.text(): 1 / count for t in self.term.inner}, "damp": None}

    def _found(self, task: Task, parts: Sequence[Part]) -> dict[str, Any]:
        """Return what was found, now or by an equal search before."""
        identity = {
            "revision": REVISION,
            "model": task.model_id,
            "layers": [layer.name for layer in task.layers],
            "method": task.recipe.method,
            "options": task.method.options(),
            "method_revision": task.method.revision,
            "exclude_first_token": task.recipe.exclude_first_token,
            "objective": repr(self.objective()),
            "search_damp": self._searches_damp(task),
            "parts": [[p.source, p.fold, p.calibration.calib_id] for p in parts],
        }
        place = storage.cache_dir() / "mixes" / storage.digest(identity)
        with storage.only_once(place):
            return self._recalled(place) or self._search(task, parts, place)

    def _searches_damp(self, task: Task) -> bool:
        # The halves of a joint method have ridges of their own.
        asked = task.recipe.damp is None and task.method.kind != "joint"
        return asked and "damp" in task.method.options() and task.method.statistic == "gram"

    def _parts(self, task: Task) -> list[Part]:
        count = task.recipe.nsamples
        checked = max(FEWEST_CHECKED, math.ceil(count / 2))
        second = task.method.statistic == "gram"
        parts = []
        for term in self.term.inner:
            alone, name = replace(term, weight=1.0), term.text()
            parts.append(Part(name, FIT, task.draw((alone,), count, FIT), second_order=second))
            parts.append(Part(name, CHECK, task.draw_plainly(alone, checked, CHECK)))
        return parts

    def _search(self, task: Task, parts: Sequence[Part], place: Path) -> dict[str, Any]:
        """Search once; the bank is given back, what was found is kept."""
        bank = build_bank(
            task.model,
            task.layers,
            task.blocks,
            parts,
            place.with_name(place.name + ".bank"),
            model_id=task.model_id,
            exclude_first_token=task.recipe.exclude_first_token,
            runtime=task.runtime,
        )
        found = search_mix(
            bank,
            task.layers,
            task.method,
            [term.text() for term in self.term.inner],
            self.objective(),
            fit_fold=FIT,
            check_fold=CHECK,
            search_damp=self._searches_damp(task),
            progress=task.runtime.progress,
        )
        plain = found.to_json()
        content = json.dumps({"digest": storage.digest(plain), "mix": plain})
        storage.write_text(place.with_suffix(".json"), content)
        shutil.rmtree(bank.folder, ignore_errors=True)
        mix: dict[str, Any] = json.loads(content)["mix"]  # as it is read back
        return mix

    @staticmethod
    def _recalled(place: Path) -> dict[str, Any] | None:
        """Return what an equal search found before; a damaged file counts as none."""
        try:
            content = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
            mix: dict[str, Any] = content["mix"]
            same = storage.digest(mix) == content["digest"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return mix if same else None


class Minimax(Searched):
    """``minimax(A+B)``: the worst domain is as good as can be."""

    name = "minimax"

    def objective(self) -> Objective:
        """Return the largest log regret."""
        return Objective("minimax")


class Weighted(Searched):
    """``weighted(A*0.7+B*0.3)``: the mean over domains, by the shares that are typed."""

    name = "weighted"
    weighs = True

    def objective(self) -> Objective:
        """Return the mean log regret by traffic."""
        return Objective("weighted", {t.text(): t.weight for t in self.term.inner})


class NoWorse(Searched):
    """``no_worse(A+B)?limit=1.1``: the mean, with no domain above ``limit`` times its own error."""

    name = "no_worse"
    options = {"limit": Option("number", default=1.1, lowest=1)}

    def objective(self) -> Objective:
        """Return the mean log regret with a limit."""
        return Objective("no_worse", limit=self.settings["limit"])


def joined(
    parts: Sequence[CalibrationSet],
    terms: Sequence[SourceTerm],
    task: Task,
    record: dict[str, Any],
) -> CalibrationSet:
    """Return the first sequences of every part by the weight of its term, interleaved evenly."""
    counts = shares(terms, task.recipe.nsamples)
    order = interleaved(counts)
    sources = []
    for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
        (own,) = part.sources
        rows = [row for row, (owner, _) in enumerate(order) if owner == number]
        first = {
            name: own[name][:count]
            for name in ("indices", "chosen")
            if len(own.get(name) or ()) == part.nsamples
        }
        found = {"nsequences": count, "weight": terms[number].weight, "rows": rows}
        if not count:
            note = f"a share of {terms[number].weight:.3f} of {sum(counts)} sequences is none"
            found["warnings"] = [*own.get("warnings", ()), note]
        sources.append(own | first | found | {"share": count / sum(counts)})
    weights = [_weights(part, count) for part, count in zip(parts, counts, strict=True)]
    return CalibrationSet.of(
        [parts[owner].sequences[place] for owner, place in order],
        seqlen=max(part.seqlen for part in parts),
        seed=task.recipe.calib_seed,
        tokenizer=parts[0].tokenizer,
        sources=with_record(sources, record),
        weights=[weights[owner][place] for owner, place in order],
    )


def _weights(part: CalibrationSet, count: int) -> list[float]:
    """Return the weights of the first sequences; a token counts once on average, as before."""
    if part.weights is None or not count:
        return [1.0] * count
    sizes = [len(ids) for ids in part.sequences[:count]]
    weights = part.weights[:count]
    scale = sum(sizes) / sum(w * n for w, n in zip(weights, sizes, strict=True))
    return [w * scale for w in weights]
