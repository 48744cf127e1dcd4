"""What is known of the model that was compressed: its name for others, and its license."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from lm_calib_plugin import builtin_models
from lm_calib_plugin.builtin_models import PREFIX, folder_of
from lm_calib_plugin.export.options import CARD
from lm_calib_plugin.export.published import last_part

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")
_BUILTIN = {"smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")}
_LARGEST_CARD = 2**20


def hub_name(pretrained: str) -> str | None:
    """Return the name of a model on the hub, None for a folder of this machine."""
    builtin = _builtin(pretrained)
    if builtin is not None:
        return _BUILTIN[builtin][0]
    if Path(pretrained).expanduser().exists() or not _HUB_NAME.fullmatch(pretrained):
        return None
    return pretrained


def shown_name(pretrained: str) -> str:
    """Return a name that may be published; of a folder of this machine the last part."""
    return hub_name(pretrained) or last_part(pretrained)


def base_license(pretrained: str) -> str | None:
    """Return the license of a base model as its card says, None if it is not known.

    Parameters
    ----------
    pretrained
        A folder, ``builtin:NAME``, or a hub name; of the latter only what is on this machine
        already is looked at.
    """
    builtin = _builtin(pretrained)
    if builtin is not None:
        return _BUILTIN[builtin][1]
    folder = Path(pretrained).expanduser()
    if folder.is_dir():
        return _license_of(folder / CARD)
    if not _HUB_NAME.fullmatch(pretrained):
        return None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(pretrained, CARD)
    except ValueError:  # no name of the hub, after all
        return None
    return _license_of(Path(found)) if isinstance(found, str) else None


def _builtin(pretrained: str) -> str | None:
    """Return the name of a model that comes with a package, given as such or as its folder."""
    for name in builtin_models.names():
        if name in _BUILTIN and pretrained in (PREFIX + name, str(folder_of(name))):
            return name
    return None


def _license_of(card: Path) -> str | None:
    """Return ``license`` of the front matter; ``other (NAME)`` for one that only has a name."""
    try:
        with card.open("rb") as stream:
            text = stream.read(_LARGEST_CARD).decode("utf-8")
        head, begin, rest = text.partition("---\n")
        if head.strip() or not begin:
            return None
        content: Any = yaml.safe_load(rest.partition("\n---")[0])
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    found, name = content.get("license"), content.get("license_name")
    if isinstance(found, list):
        found = ", ".join(map(str, found))
    if found == "other" and isinstance(name, str):
        return f"other ({name})"
    return found if isinstance(found, str) and found else None
