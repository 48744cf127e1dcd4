"""``CalibConfig``: a recipe and how its result is stored, by the habits of Optimum."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimum.configuration_utils import BaseConfig

from lm_calib_plugin.errors import UserError
from lm_calib_plugin.export.options import CALIB_CONFIG, ExportOptions
from lm_calib_plugin.integrations.arguments import check_plain, first_line, read_fields
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.recipe_file import FILE_ARGUMENT

_AUTO = ExportOptions().format


class CalibConfig(BaseConfig):  # type: ignore[misc]
    """A recipe, and the format its result is stored in; saved as ``calib_config.json``.

    Parameters
    ----------
    export_format
        ``auto``, ``dense``, ``compressed-tensors`` or ``gptq``; see
        :class:`~lm_calib_plugin.export.options.ExportOptions`.
    fields
        Fields of :class:`~lm_calib_plugin.recipe.Recipe`, or ``recipe=`` a YAML file, a mapping or
        a :class:`~lm_calib_plugin.recipe.Recipe`. What is None was not given.

    Raises
    ------
    UserError
        For every value that can not be used, at once.
    """

    model_type = "calib"
    CONFIG_NAME = CALIB_CONFIG
    FULL_CONFIGURATION_FILE = CALIB_CONFIG

    def __init__(self, *, export_format: str | None = None, **fields: Any) -> None:
        recipe, _ = read_fields(fields, frozenset(), ("export_format",))
        try:
            options = ExportOptions(format=_AUTO if export_format is None else export_format)
        except UserError as error:
            raise error.renamed("export_format") from None
        super().__init__()
        self.recipe = recipe
        self.export_format = options.format

    def to_dict(self) -> dict[str, Any]:
        """Return ``recipe`` and ``export_format`` as plain values."""
        # What the base class knows of transformers models has no meaning here.
        return {FILE_ARGUMENT: self.recipe.to_metadata(), "export_format": self.export_format}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same as :meth:`to_dict`."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return the content of ``calib_config.json``."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CalibConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Make a configuration of what :meth:`to_dict` returned; ``kwargs`` win over it.

        Raises
        ------
        UserError
            For names that are not of a recipe, as the constructor does, and for a recipe that is
            the name of a file.
        """
        check_plain(config_dict)
        unused = {} if kwargs.pop("return_unused_kwargs", False) else None
        fields = {**config_dict, **kwargs}
        for name in ("_commit_hash", "_from_auto", "_from_pipeline"):
            fields.pop(name, None)
        config = cls(**fields)
        return config if unused is None else (config, unused)

    @classmethod
    def from_json_file(cls, json_file: Any) -> Any:
        """Make a configuration of the content of a file; errors are those of :meth:`from_dict`."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @classmethod
    def get_config_dict(cls, place: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the content of ``calib_config.json`` in a folder or on the hub.

        Raises
        ------
        UserError
            When there is none, or it is not JSON of a mapping.
        """
        folder = Path(str(place)).expanduser()
        if folder.is_dir():
            place = folder
            if not (folder / kwargs.get("subfolder", "") / CALIB_CONFIG).is_file():
                raise _missing(place, "the folder holds none")
        try:
            # The base class would follow a file name that stands in the file.
            content, kwargs = cls._get_config_dict(place, **kwargs)
        except OSError as error:
            raise _missing(place, first_line(error)) from None
        if not isinstance(content, dict):
            raise UserError(
                "calib_config", f"{place} holds no mapping", f"what {cls.__name__} wrote"
            )
        return content, kwargs

    @classmethod
    def from_recipe(cls, recipe: Recipe, export_format: str = _AUTO) -> CalibConfig:
        """Make a configuration of a recipe."""
        return cls(recipe=recipe, export_format=export_format)


def _missing(place: Any, why: str) -> UserError:
    return UserError(
        "calib_config",
        f"no {CALIB_CONFIG} in `{place}` ({why})",
        "a folder or hub name that has one",
        "CalibConfig.save_pretrained and every export write one",
    )
