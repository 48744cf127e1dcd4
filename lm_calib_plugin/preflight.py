"""``lm-calib preflight``: which calibration set will serve which domain, before any evaluation.

One dense pass over the sets and over text of the domains; then every set is judged on documents
of every domain that no set has seen, layer by layer, without evaluating the model.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_calib_plugin import storage
from lm_calib_plugin.bank import Bank, Part, build_bank
from lm_calib_plugin.bank.mixtures import draw, make_mixture, make_task, mixture_of
from lm_calib_plugin.bank.transfer import Transfer, transfer
from lm_calib_plugin.calibrate import Loading, load_model
from lm_calib_plugin.calibration import CalibrationSet, validate_calibration
from lm_calib_plugin.calibration.contamination import ContaminationIndex, words
from lm_calib_plugin.compression import sequence_length
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.guard import left_as_found
from lm_calib_plugin.recipe import ALL_FOLDS, Recipe
from lm_calib_plugin.runtime import Runtime

SET, CHOOSE, JUDGE = "set", "choose", "judge"


@dataclass(frozen=True)
class Question:
    """What is asked.

    Parameters
    ----------
    recipe
        Method, strength, ``nsamples``, ``seqlen``, ``calib_seed``; its calibration is not used.
    sets
        Name -> calibration expression. Documents come from the fold ``choose``, unless the
        expression is a finished set.
    domains
        Name -> calibration expression of text of the domain; its fold ``choose`` calibrates the
        domain's own reference, its fold ``judge`` is what all sets are judged on.
    judged
        Sequences of each domain to judge on; default: ``nsamples``.
    """

    recipe: Recipe
    sets: Mapping[str, str]
    domains: Mapping[str, str]
    judged: int | None = None

    def of_set(self, name: str) -> Recipe:
        """Return the recipe of a set."""
        recipe = self.recipe.replaced(calibration=self.sets[name])
        # A finished set has its fold already; a mixture divides the folds itself.
        plain = not recipe.whole_set and mixture_of(recipe) is None and recipe.fold == ALL_FOLDS
        if recipe.whole_set:
            given = recipe.model_fields_set - {"nsamples", "seqlen", "pack", "fold", "calib_seed"}
            return Recipe(**{field: getattr(recipe, field) for field in given})
        return recipe.replaced(fold=CHOOSE) if plain else recipe

    def of_domain(self, name: str, fold: str) -> Recipe:
        """Return the recipe of a fold of a domain."""
        count = self.recipe.nsamples if fold == CHOOSE else self.judged or self.recipe.nsamples
        return self.recipe.replaced(
            calibration=self.domains[name],
            fold=fold,
            nsamples=count,
            select="random",
            pool=None,
            select_target=None,
        )


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
            "!: does not transfer.",
        ]
        for name, shares in self.overlap.items():
            for domain, share in shares.items():
                if share:
                    lines.append(
                        f"warning: {share:.0%} of what `{domain}` is judged on overlaps with the "
                        f"set `{name}`; build it with --fold choose"
                    )
        lines += ["", f"advice: {self.transfer.advice()}"]
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
    recipes = _checked(question)
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


def _checked(question: Question) -> dict[tuple[str, str], Recipe]:
    """Return the recipe of every part, all checked without the model."""
    if not question.recipe.entry.needs_data:
        raise UserError(
            "method",
            f"`{question.recipe.method}` uses no calibration data",
            "a method that does, such as wanda, sparsegpt or gptq",
        )
    for what, given in (("set", question.sets), ("domain", question.domains)):
        if not given:
            raise UserError(
                what, "none given", f"--{what} NAME=EXPR, once or more", f"for instance --{what} "
                + ("c4=c4" if what == "set" else "code=file:code.txt"),
            )  # fmt: skip
    recipes = {(name, SET): question.of_set(name) for name in question.sets}
    for name in question.domains:
        for fold in (CHOOSE, JUDGE):
            recipes[name, fold] = question.of_domain(name, fold)
    for (name, fold), recipe in recipes.items():
        mixture = mixture_of(recipe)
        if recipe.whole_set and fold != SET:
            raise UserError(
                "domain",
                f"{name}={question.domains[name]}",
                "a source of documents, part of which no set has seen",
                f"for instance --domain {name}=file:{name}.txt",
            )
        if mixture is not None and fold != SET:
            raise UserError("domain", f"{name}={question.domains[name]}", "a plain source or a sum")
        validate_calibration(recipe)
        if mixture is not None:
            make_mixture(mixture)
    return recipes


def _cached(digest: str, parts: list[Part], recipe: Recipe) -> Path:
    """Return a folder of the cache named after everything that decides the bank."""
    content = {
        "model": digest,
        "parts": [[p.source, p.fold, p.calibration.calib_id, p.second_order] for p in parts],
        "exclude_first_token": recipe.exclude_first_token,
        "layers": [recipe.targets, recipe.ignore, recipe.blocks],
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
