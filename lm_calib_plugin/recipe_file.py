"""Recipes in YAML files: strict reading, and merging with arguments typed beside them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lm_calib_plugin.errors import UserError

FILE_ARGUMENT = "recipe"


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML values only; a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"`{key}` stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_recipe_file(path: str | Path) -> dict[str, Any]:
    """Return the mapping of a recipe file.

    Raises
    ------
    UserError
        When the file is missing, is not YAML, repeats a key, or is not a mapping; the line is
        named.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(FILE_ARGUMENT, f"no file {str(path)!r}", "a YAML file is needed")
    loader = _StrictLoader(file.read_text(encoding="utf-8"))
    try:
        content = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{file}, line {mark.line + 1}" if mark else str(file)
        raise UserError(
            FILE_ARGUMENT,
            f"{place}: {error.problem}",
            "each line is `name: value`, indented with spaces",
            "see lm-calib ls options",
        ) from None
    finally:
        loader.dispose()
    if not isinstance(content, Mapping) or not all(isinstance(k, str) for k in content):
        raise UserError(
            FILE_ARGUMENT, f"{file} holds no `name: value` lines", "for instance `method: wanda`"
        )
    return dict(content)


def merge_recipe_file(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Replace ``recipe=FILE`` among the arguments by the content of the file.

    A name that stands in both places must say the same in both.
    """
    typed = dict(arguments)
    path = typed.pop(FILE_ARGUMENT, None)
    if path is None:
        return typed
    from_file = dict(path) if isinstance(path, Mapping) else read_recipe_file(path)
    for name in typed.keys() & from_file.keys():
        if typed[name] is not None and str(typed[name]) != str(from_file[name]):
            raise UserError(
                name,
                f"got {typed[name]!r} as an argument and {from_file[name]!r} in {path}",
                fix="choose one",
            )
    return from_file | {k: v for k, v in typed.items() if v is not None}
