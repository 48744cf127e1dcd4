"""``task:NAME``: the training split of a harness task, with the task's own prompt and answer.

Only the training split is used, never what the task evaluates: a task without one is refused, and
so is a task whose training split is the split it evaluates. A group or tag is refused too and its
members are named: a sum of tasks says what share each one has. This file and no other part of
calibration imports the harness.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lm_calib_plugin.calibration.chat import Exchange
from lm_calib_plugin.calibration.options import ARGUMENT, Option
from lm_calib_plugin.calibration.sources.base import Context, Document, Source, visiting_order
from lm_calib_plugin.calibration.sources.hub import licence_of
from lm_calib_plugin.calibration.sources.hub_access import (
    connection_errors,
    one_line,
    usable_now,
)
from lm_calib_plugin.errors import UserError, listed, nearest

_SPLITS = ("training_split", "validation_split", "test_split")
_NAMED_MEMBERS = 6


class HarnessTask(Source):
    """Training documents of a task, each as prompt, delimiter and correct answer."""

    name = "task"
    default_pack = "pad"
    options = {"include_path": Option()}

    def __init__(self, argument: str = "", options: Any = ()) -> None:
        super().__init__(argument, options)
        self._facts: dict[str, Any] = {}
        self._seen = hashlib.sha256()

    def validate(self) -> None:
        """Look the task up and refuse it by its configuration; no data is loaded."""
        folder = self.settings["include_path"]
        if folder is not None and not Path(folder).expanduser().is_dir():
            raise UserError(
                ARGUMENT, f"include_path={folder}: no such folder", "a folder of task files"
            )
        manager = _manager_with(self.argument, folder)
        entry = manager.task_index[self.argument]
        if entry.kind.name in ("GROUP", "TAG"):
            raise self._is_group(manager, entry)
        if entry.kind.name == "TASK" and entry.cfg is not None:
            self._check_splits(entry.cfg)

    def documents(self, context: Context) -> Iterator[Document]:
        """Yield the training documents as texts."""
        self.validate()
        task = self._load()
        config = getattr(task, "config", None)
        if not task.has_training_docs():
            self._check_splits({name: getattr(config, name, None) for name in _SPLITS})
            raise UserError(ARGUMENT, f"task `{self.argument}` has no training documents")
        self._check_splits({name: getattr(config, name, None) for name in _SPLITS}, known=False)
        rows = task.training_docs()
        rows = rows if hasattr(rows, "__getitem__") else list(rows)
        self._facts = {
            "licence": licence_of(rows),
            "split": getattr(config, "training_split", None),
            "task_version": str(getattr(task, "VERSION", "")),
            "documents_held": len(rows),
        }
        # Prompts are written one by one: a template takes long on a split of half a million rows.
        for index in visiting_order(len(rows), context):
            text = document_text(task, rows[index])
            self._seen.update(text.encode() + b"\0")
            yield Document(index, text)

    def provenance(self) -> dict[str, Any]:
        """Digest of the texts that were used, split, version of the task, license of its data."""
        return {"fingerprint": self._seen.hexdigest(), **self._facts}

    def _load(self) -> Any:
        manager = _manager_with(self.argument, self.settings["include_path"])
        try:
            return manager.load(self.argument)["tasks"][self.argument]
        except connection_errors() as error:
            raise UserError(
                ARGUMENT,
                f"the data of task `{self.argument}` cannot be reached "
                f"(offline? {one_line(error, 120)})",
                usable_now(),
            ) from None
        except Exception as error:
            raise UserError(
                ARGUMENT,
                f"task `{self.argument}` cannot be loaded: "
                f"{type(error).__name__}: {one_line(error)}",
                "the same error stops an evaluation of this task",
            ) from error

    def _check_splits(self, config: Mapping[str, Any], known: bool = True) -> None:
        """Refuse a task without training split, or one that evaluates it.

        ``known`` is False for a task written in Python, whose splits need no names.
        """
        training, validation, test = (config.get(name) for name in _SPLITS)
        splits = {k: v for k, v in (("validation", validation), ("test", test)) if v}
        if training is None and known:
            shown = listed(f"{kind} ({name})" for kind, name in splits.items()) or "none"
            raise UserError(
                ARGUMENT,
                f"task `{self.argument}` has no training split",
                f"splits: {shown}",
                "calibrating on what is evaluated would be leakage; use another source, or "
                "file:PATH with training text of your own",
            )
        if training is not None and training == (test or validation):
            raise UserError(
                ARGUMENT,
                f"task `{self.argument}` evaluates its training split `{training}`",
                "calibrating on what is evaluated would be leakage",
                "use another source",
            )

    def _is_group(self, manager: Any, entry: Any) -> UserError:
        members = sorted(entry.tags) if entry.kind.name == "TAG" else entry.cfg.get("task", [])
        names = [m if isinstance(m, str) else m.get("task") or m.get("group") for m in members]
        usable = [
            name
            for name in names
            if isinstance(name, str)
            and name in manager.task_index
            and (manager.task_index[name].cfg or {}).get("training_split")
        ]
        example = "+".join(f"task:{name}" for name in usable[:2])
        return UserError(
            ARGUMENT,
            f"`{self.argument}` is a {entry.kind.name.lower()} of tasks",
            "members with a training split: "
            + (listed(usable[:_NAMED_MEMBERS]) or "none")
            + (f" and {len(usable) - _NAMED_MEMBERS} more" if len(usable) > _NAMED_MEMBERS else ""),
            f"name the tasks, for instance {example}" if example else "",
        )


def document_text(task: Any, row: Any) -> str:
    """Return prompt, delimiter and correct answer as the harness writes a solved example.

    A multiple-choice answer given by number is looked up among the choices. When the *prompts*
    are the choices (WinoGrande), the prompt given by number is the correct one. Of several right
    answers the first is taken. The text remembers prompt and answer as an exchange.
    """
    config = getattr(task, "config", None)
    prompt, answer = task.doc_to_text(row), task.doc_to_target(row)
    choices = task.doc_to_choice(row) if getattr(config, "doc_to_choice", None) else None
    if choices and isinstance(prompt, int):
        prompt = choices[prompt]
    elif choices and isinstance(answer, list) and answer and isinstance(answer[0], int):
        answer = choices[answer[0]]
    elif choices and isinstance(answer, int):
        answer = choices[answer]
    if isinstance(answer, list):
        answer = answer[0] if answer else ""
    answer, prompt = str(answer), str(prompt)
    lead = task.doc_to_prefix(row) if hasattr(task, "doc_to_prefix") else None
    if lead:
        gap = "" if str(lead)[-1:].isspace() or answer[:1].isspace() else " "
        answer = f"{lead}{gap}{answer}"
    if not prompt or not answer:
        return prompt + answer
    delimiter = getattr(config, "target_delimiter", None)
    if delimiter is None:
        delimiter = "" if answer[:1].isspace() else " "
    messages = [
        {"role": "user", "content": prompt.strip()},
        {"role": "assistant", "content": answer.strip()},
    ]
    return Exchange.of(messages, f"{prompt}{delimiter}{answer}")


def _manager_with(name: str, folder: str | None) -> Any:
    """Return a task manager that knows the task: of the extra folder alone when it has it.

    Indexing every built-in task takes seconds, a folder none.
    """
    if folder is not None:
        own = _manager(str(Path(folder).expanduser()), False)
        if name in own.task_index:
            return own
    manager = _manager(None if folder is None else str(Path(folder).expanduser()), True)
    if name not in manager.task_index:
        raise UserError(
            ARGUMENT,
            f"no harness task `{name}`",
            nearest(name, manager.task_index),
            "see lm_eval ls tasks; a folder of your own: task:NAME?include_path=DIR",
        )
    return manager


@functools.lru_cache(maxsize=4)
def _manager(folder: str | None, built_in: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=built_in)
