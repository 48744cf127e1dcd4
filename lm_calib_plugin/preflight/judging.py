"""Every set is judged on every domain.

One dense pass over the sets and over text of the domains; then every set is judged on documents
of every domain that no set has seen, layer by layer, without evaluating the model.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_calib_plugin import storage
from lm_calib_plugin.bank import Bank, Part, build_bank
from lm_calib_plugin.bank.mixtures import draw, make_task
from lm_calib_plugin.bank.plots import plot_transfer
from lm_calib_plugin.bank.transfer import FAR, NO_USE, Transfer, transfer
from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.calibration.contamination import ContaminationIndex, words
from lm_calib_plugin.checks import sequence_length
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.guard import left_as_found
from lm_calib_plugin.loading import Loading, load_model
from lm_calib_plugin.preflight.question import JUDGE, SET, Question, checked_recipes
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.runtime import Runtime


@dataclass(frozen=True)
class Preflight:
    """The answer.

    ``overlap`` are shares of judged sequences that hold 13 words in a row of a set, by set and
    domain; ``seconds`` what each stage took.
    """

    transfer: Transfer
    calib_ids: dict[str, str]
    overlap: dict[str, dict[str, float]]
    seconds: dict[str, float]
    bank: Bank

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "transfer": self.transfer.to_json(),
            "calib_ids": self.calib_ids,
            "overlap": self.overlap,
            "seconds": {stage: round(spent, 2) for stage, spent in self.seconds.items()},
        }

    def table(self) -> str:
        """Return the table of R, and of T in parentheses, and the advice, as text."""
        domains = self.transfer.domains
        width = max(len(name) for name in (*self.transfer.sets, "calibration set"))
        lines = ["calibration set".ljust(width) + "".join(f"{d:>16}" for d in domains)]
        for name in self.transfer.sets:
            cells = []
            for domain in domains:
                entry = self.transfer.at(name, domain)
                mark = " " if entry.transfers else "!"
                cells.append(f"{entry.regret:.2f} ({entry.against_no_data:.2f}){mark}".rjust(16))
            lines.append(name.ljust(width) + "".join(cells))
        lines += [
            "",
            f"R (T). R: layer error on the domain, relative to {self.transfer.method} calibrated "
            "on the domain's own text.",
            f"T: relative to {self.transfer.baseline} without data (median layer). "
            f"!: does not transfer (R of {FAR} or more, T of {NO_USE} or more).",
        ]
        for domain in domains:
            own = self.transfer.at(self.transfer.sets[0], domain).own_against_no_data
            if own >= NO_USE:
                lines.append(
                    f"note: on `{domain}` even its own text has T = {own:.2f}, so R alone decides."
                )
        for name, shares in self.overlap.items():
            for domain, share in shares.items():
                if share:
                    lines.append(
                        f"warning: {share:.0%} of what `{domain}` is judged on overlaps with the "
                        f"set `{name}`; build it with --fold choose"
                    )
        lines += [
            "",
            f"bank: {self.bank.folder} (another sparsity needs no pass; delete it when done)",
            f"advice: {self.transfer.advice()}",
        ]
        return "\n".join(lines)


def preflight(
    question: Question,
    loading: Loading,
    *,
    bank: Path | None = None,
    out: Path | None = None,
    runtime: Runtime | None = None,
) -> Preflight:
    """Judge calibration sets on domains without evaluating anything.

    Parameters
    ----------
    question
        Method, sets and domains.
    loading
        The model.
    bank
        Folder of the statistics bank, kept and used again; default: in the cache.
    out
        Folder for ``preflight.json``, ``preflight.txt`` and, with matplotlib, ``preflight.png``.

    Raises
    ------
    UserError
        When the method uses no data, or an expression, a domain or the model cannot be used;
        before the model is loaded where that shows earlier.
    """
    runtime = runtime or Runtime()
    for what, folder in (("bank", bank), ("out", out)):
        _check_folder(what, folder)
    recipes = checked_recipes(question)
    model, tokenizer = load_model(loading)
    recipe = question.recipe
    seqlen = sequence_length(recipe, model.config)
    seconds: dict[str, float] = {}
    began = time.perf_counter()
    with left_as_found(model):
        task = make_task(recipe, model, tokenizer, seqlen=seqlen, runtime=runtime)
        method, layers = task.method, task.layers

        def drawn_for(asked: Recipe) -> CalibrationSet:
            length = sequence_length(asked, model.config)
            return draw(dataclasses.replace(task, recipe=asked, seqlen=length)).calibration

        drawn = {key: drawn_for(asked) for key, asked in recipes.items()}
        seconds["calibration"] = time.perf_counter() - began
        began = time.perf_counter()
        second = method.statistic == "gram"
        parts = [
            Part(name, fold, found, second_order=second or fold == JUDGE)
            for (name, fold), found in drawn.items()
        ]
        folder = bank or _cached(task.model_id, parts, recipe)
        opened = build_bank(
            model,
            layers,
            task.blocks,
            parts,
            folder,
            model_id=task.model_id,
            exclude_first_token=recipe.exclude_first_token,
            runtime=runtime,
        )
        seconds["bank"] = time.perf_counter() - began
        began = time.perf_counter()
        sets = {name: opened.mixture({name: 1.0}, SET) for name in question.sets}
        found = transfer(
            opened, layers, method, sets, list(question.domains), progress=runtime.progress
        )
        seconds["transfer"] = time.perf_counter() - began
    answer = Preflight(
        found,
        {name: drawn[name, SET].calib_id for name in question.sets},
        _overlaps(question, drawn, tokenizer),
        seconds,
        opened,
    )
    if out is not None:
        _write(answer, out)
    return answer


def _check_folder(what: str, folder: Path | None) -> None:
    """Refuse a folder that is a file, or stands in one, before any work."""
    for path in (folder, *folder.parents) if folder else ():
        if path.exists() and not path.is_dir():
            raise UserError(what, f"{path} is a file", "name a folder")


def _cached(digest: str, parts: list[Part], recipe: Recipe) -> Path:
    """Return a folder of the cache named after everything that decides the bank."""
    content = {
        "model": digest,
        "parts": [[p.source, p.fold, p.calibration.calib_id, p.second_order] for p in parts],
        "exclude_first_token": recipe.exclude_first_token,
        "layers": [recipe.targets, recipe.ignore, recipe.block_path],
    }
    return storage.cache_dir() / "banks" / storage.digest(content)[:24]


def _overlaps(
    question: Question, drawn: Mapping[tuple[str, str], CalibrationSet], tokenizer: Any
) -> dict[str, dict[str, float]]:
    """Return the share of judged sequences with words of a set, by set and domain."""

    def texts(found: CalibrationSet) -> list[str]:
        return [tokenizer.decode(ids, skip_special_tokens=True) for ids in found.sequences]

    judged = {name: [words(t) for t in texts(drawn[name, JUDGE])] for name in question.domains}
    shares: dict[str, dict[str, float]] = {}
    for name in question.sets:
        index = ContaminationIndex(texts(drawn[name, SET]))
        shares[name] = {
            domain: sum(index.find(text) is not None for text in parts) / len(parts)
            for domain, parts in judged.items()
        }
    return shares


def _write(answer: Preflight, out: Path) -> None:
    storage.write_text(out / "preflight.json", json.dumps(answer.to_json(), indent=1) + "\n")
    storage.write_text(out / "preflight.txt", answer.table() + "\n")
    if importlib.util.find_spec("matplotlib") is not None:
        plot_transfer(answer.transfer, out / "preflight.png")
