"""Requests of tasks are built once for all cells that ask the same of the same tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any


class SharedRequests:
    """Remembers what tasks built, while these serve one cell after the other.

    The harness builds prompts anew for every evaluation; with shots and large tasks that takes
    minutes. Its own cache on disk is named by task and shots alone, so that a changed task file
    would be asked with old prompts.
    """

    def __init__(self, tasks: Iterable[Any]) -> None:
        self.built = 0
        self._model = ""
        self._kept: dict[tuple[int, str], list[Any]] = {}
        for task in tasks:
            task.build_all_requests = self._once(task, task.build_all_requests)

    def serve(self, model: str) -> None:
        """Name the base model that is asked next; what was built for another one is forgotten."""
        if model != self._model:
            self._model = model
            self._kept.clear()

    def _once(self, task: Any, build: Any) -> Any:
        def build_once(**asked: Any) -> None:
            # A chat template is that of the model.
            plain = {name: value for name, value in asked.items() if not callable(value)}
            name = id(task), repr(sorted(plain.items()))
            if name not in self._kept:
                build(**asked)
                self.built += 1
                self._kept[name] = [_unanswered(one) for one in task._instances]
                return
            task._instances = [_unanswered(one) for one in self._kept[name]]

        return build_once


def _unanswered(request: Any) -> Any:
    """Return a copy of a request that holds no answers."""
    again = copy.copy(request)
    again.resps, again.filtered_resps = [], {}
    return again
