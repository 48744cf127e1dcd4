"""Recipes in YAML files: strict reading, and merging with arguments typed beside them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lm_calib_plugin.errors import UserError

FILE_ARGUMENT = "recipe"


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML values only; a key that stands twice is an error, and ``2:4`` is a text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "a name has to be plain text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"`{key}` stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _number_or_text(read: Callable[[Any, yaml.ScalarNode], Any]) -> Any:
    def construct(loader: _StrictLoader, node: yaml.ScalarNode) -> Any:
        # YAML 1.1 reads 2:4 as a number in base 60, which is 124.
        return str(node.value) if ":" in node.value else read(loader, node)

    return construct


for _tag, _read in (
    ("tag:yaml.org,2002:int", yaml.SafeLoader.construct_yaml_int),
    ("tag:yaml.org,2002:float", yaml.SafeLoader.construct_yaml_float),
):
    _StrictLoader.add_constructor(_tag, _number_or_text(_read))


def read_recipe_file(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the mapping of a recipe file, and the place (file and line) of each of its names.

    Raises
    ------
    UserError
        When the file is missing, is not YAML, repeats a key, or is not a mapping; the line is
        named.
    """
    return read_yaml(path, FILE_ARGUMENT, "`method: wanda`", "see lm-calib ls options")


def read_yaml(
    path: str | Path, argument: str, example: str, help: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the mapping of a YAML file, and the place (file and line) of each of its names.

    ``argument`` names the file in errors, ``example`` is a line of it, ``help`` where to look.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(argument, f"no file {str(path)!r}", "a YAML file is needed")
    try:
        loader = _StrictLoader(file.read_text(encoding="utf-8"))
        try:
            node = loader.get_single_node()
            content: Any = None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{file}, line {mark.line + 1}" if mark else str(file)
        raise UserError(
            argument,
            f"{place}: {error.problem}",
            "each line is `name: value`, indented with spaces",
            help,
        ) from None
    except (UnicodeDecodeError, yaml.YAMLError):
        raise UserError(argument, f"{file} is not text", "a YAML file is needed") from None
    if not isinstance(node, yaml.MappingNode) or not all(isinstance(k, str) for k in content):
        raise UserError(argument, f"{file} holds no `name: value` lines", f"for instance {example}")
    places = {key.value: f"{file}, line {key.start_mark.line + 1}" for key, _ in node.value}
    return dict(content), places


def read_value(text: str) -> Any:
    """Return one value typed as YAML, by the rules of :func:`read_yaml`.

    Raises
    ------
    ValueError
        When it is not YAML.
    """
    loader = _StrictLoader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    finally:
        loader.dispose()


def merge_recipe_file(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Replace ``recipe=FILE`` among the arguments by the content of the file.

    A name that stands in both places must say the same in both.

    Returns
    -------
    merged, places
        The arguments, and the place (file and line) of those that stand in the file.
    """
    typed = dict(arguments)
    path = typed.pop(FILE_ARGUMENT, None)
    if path is None:
        return typed, {}
    if isinstance(path, Mapping):
        from_file, origin = dict(path), f"{FILE_ARGUMENT}="
        places: dict[str, str] = {}
    elif isinstance(path, (str, Path)):
        from_file, places = read_recipe_file(path)
        origin = str(path)
    else:
        raise UserError(FILE_ARGUMENT, f"got {path!r}", "the path of a YAML file is needed")
    for name in typed.keys() & from_file.keys():
        if typed[name] is not None and not _same(typed[name], from_file[name]):
            raise UserError(
                name,
                f"got {typed[name]!r} as an argument and {from_file[name]!r} in {origin}",
                fix="choose one",
            )
    return from_file | {k: v for k, v in typed.items() if v is not None}, places


def _same(one: Any, other: Any) -> bool:
    """Tell whether two values say the same: 0.5 and "0.50" do."""
    try:
        return float(one) == float(other)
    except (TypeError, ValueError):
        return str(one) == str(other)
