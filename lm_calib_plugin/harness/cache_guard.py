"""Keep ``--use_cache`` from giving one model's answers to another.

The harness keys cached responses by the request alone. We write the recipe key into the cache and
refuse a cache that was written under another one, or without one.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from lm_calib_plugin.errors import UserError

RESERVED = "lm_calib_plugin.recipe_key"


def guard_response_cache(database: MutableMapping[str, Any], key: str) -> None:
    """Claim an empty response cache for a recipe key, or check that it is ours.

    Raises
    ------
    UserError
        When the cache holds answers of another recipe, or of a run that left no key.
    """
    owner = database.get(RESERVED)
    if owner == key:
        return
    if owner is None and len(database) == 0:
        database[RESERVED] = key
        return
    whose = f"recipe {str(owner)[:16]}" if owner else "a run that left no recipe key"
    raise UserError(
        "use_cache",
        f"this cache holds answers of {whose}, this run is recipe {key[:16]}",
        "one cache for each recipe",
        f"for instance --use_cache cache/{key[:16]}",
    )
