"""Files ``samples_TASK_TIME.jsonl`` of ``lm_eval --log_samples``: plain JSON, never trusted."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_calib_plugin.errors import UserError

_NAME = re.compile(r"samples_(?P<task>.+?)(_(?P<time>\d{4}-\d\d-\d\dT[\d.-]+))?\.jsonl")
# What says whether two models were asked the same.
_HASHES = ("doc_hash", "prompt_hash", "target_hash")


@dataclass(frozen=True)
class Item:
    """An item: summed log-likelihoods of its answers (none: no choice), and the right one.

    ``asked`` is equal where the same was asked.
    """

    doc_id: int
    likelihoods: tuple[float, ...]
    gold: int | None
    asked: tuple[Any, ...]


def read_tasks(path: Path, argument: str) -> dict[str, list[Item]]:
    """Return the items of each task of a file or a folder; of several runs the newest.

    Raises
    ------
    UserError
        When there are none, or one is damaged; ``argument`` is named.
    """
    files = _files(path, argument)
    return {task: _items(file, argument) for task, file in sorted(files.items())}


def _files(path: Path, argument: str) -> dict[str, Path]:
    if not path.exists():
        raise UserError(
            argument,
            f"{path} does not exist",
            "a file samples_TASK_TIME.jsonl, or a folder of them",
        )
    found: dict[str, tuple[str, Path]] = {}
    for file in [path] if path.is_file() else sorted(path.rglob("samples_*.jsonl")):
        match = _NAME.fullmatch(file.name)
        if match is None:
            continue
        own = (match["time"] or "", file)
        found[match["task"]] = max(found.get(match["task"], own), own)
    if not found:
        raise UserError(
            argument,
            f"{path} is no file of samples, nor holds any",
            "samples_TASK_TIME.jsonl, which lm_eval writes",
            "give lm_eval --log_samples --output_path DIR",
        )
    return {task: file for task, (_, file) in found.items()}


def _items(file: Path, argument: str) -> list[Item]:
    found: dict[int, tuple[str, Item]] = {}
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(argument, f"{file} can not be read ({error})") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            sample = json.loads(line)
            name, item = str(sample.get("filter")), _item(sample)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
            raise UserError(
                argument,
                f"{file}, line {number}, is no sample of lm_eval",
                "whole files as lm_eval wrote them",
                "evaluate again with --log_samples",
            ) from None
        # An item stands there once for each filter; likelihoods are those of every one.
        known = found.setdefault(item.doc_id, (name, item))
        if known[0] == name and known[1] is not item:
            raise UserError(
                argument,
                f"{file} holds item {item.doc_id} twice",
                "one run a file",
                "evaluate again with --log_samples",
            )
    return [item for _, item in found.values()]


def _item(sample: Mapping[str, Any]) -> Item:
    asked = _arguments(sample["arguments"])
    answers = sample["resps"]
    likelihoods: tuple[float, ...] = ()
    if len(asked) > 1 and all(len(pair) == 2 and isinstance(pair[1], str) for pair in asked):
        likelihoods = tuple(_likelihood(answer) for answer in answers)
        if len(likelihoods) != len(asked):
            raise ValueError("as many answers as were asked for")
        if "acc_mutual_info" in sample.get("metrics", ()):
            # There every answer is asked for without the question, too.
            half = len(asked) // 2
            likelihoods, asked = likelihoods[:half], asked[:half]
    gold = _gold(sample, [str(pair[-1]) for pair in asked], likelihoods) if likelihoods else None
    same = (len(asked), *(sample.get(name) for name in _HASHES))
    return Item(int(sample["doc_id"]), likelihoods, gold, same)


def _arguments(asked: Any) -> list[list[Any]]:
    """Return what was asked for, as lists; newer files name each part."""
    if isinstance(asked, Mapping):
        return [list(asked[f"gen_args_{i}"].values()) for i in range(len(asked))]
    return [list(one) for one in asked]


def _likelihood(answer: Any) -> float:
    """Return the log-likelihood of ``[["-1.25", "False"]]``."""
    while isinstance(answer, Sequence) and not isinstance(answer, str):
        answer = answer[0]
    return float(answer)


def _gold(
    sample: Mapping[str, Any], answers: Sequence[str], likelihoods: Sequence[float]
) -> int | None:
    """Return the number of the right answer, None where the file does not tell it.

    The target is its number or its text. Which of the two is checked by the accuracy that the
    harness noted; where neither fits, that of two answers tells which one is right.
    """
    if not all(map(math.isfinite, likelihoods)):
        return None
    target = str(sample.get("target")).strip()
    texts = [answer.strip() for answer in answers]
    wanted = [int(target)] if re.fullmatch(r"\d{1,4}", target) else []
    wanted += [texts.index(target)] if texts.count(target) == 1 else []
    right = sample.get("acc")
    best = max(range(len(likelihoods)), key=likelihoods.__getitem__)
    for gold in wanted:
        if gold < len(answers) and (right is None or bool(right) == (gold == best)):
            return gold
    if right is not None and len(answers) == 2:
        return best if right else 1 - best
    return None
