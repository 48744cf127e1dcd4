"""A recipe with nothing left open, and the key that names its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_calib_plugin.storage import digest

if TYPE_CHECKING:
    from lm_calib_plugin.recipe import Recipe

KEY_VERSION = 1


@dataclass(frozen=True)
class Facts:
    """What the run found: identity of the model, of the calibration set and of the layers.

    Parameters
    ----------
    model
        Digest of the dense model: weights, buffers and configuration.
    layers
        Digest of the names of the targeted layers.
    revision
        Revision of the method's code.
    options
        The method's options with defaults filled in.
    inert
        Names of options, and ``propagate``, without any effect on the weights by this method.
    identity
        The options as they enter the key, when some that read differently mean the same.
    unchanged
        Whether these options leave every weight as it is.
    calib_id
        Identity of the calibration set, None without data.
    heldout
        Number of its sequences that were held out.
    seqlen, pack
        What the set was cut to, for the record.
    """

    model: str
    layers: str
    revision: int | str
    options: Mapping[str, Any]
    inert: tuple[str, ...] = ()
    identity: Mapping[str, Any] | None = None
    unchanged: bool = False
    calib_id: str | None = None
    heldout: int = 0
    seqlen: int | None = None
    pack: str | None = None


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe with nothing left open. Its key names the result."""

    recipe: Recipe
    facts: Facts

    def key(self) -> str:
        """Return the sha256 of everything that may change the weights, and of nothing else."""
        recipe, facts = self.recipe, self.facts
        identity: dict[str, Any] = {
            "key_version": KEY_VERSION,
            "model": facts.model,
            "untie": recipe.untie,
        }
        if facts.unchanged:
            return digest(identity)
        options = facts.options if facts.identity is None else facts.identity
        identity |= {
            # A name of a pipeline is its stages, which stand among the options.
            "method": "pipeline" if recipe.stages else recipe.method,
            "revision": facts.revision,
            "options": {k: v for k, v in options.items() if k not in facts.inert},
            "layers": facts.layers,
        }
        if recipe.needs_data:
            identity |= {
                "calib_id": facts.calib_id,
                "heldout": facts.heldout,
            }
            if "propagate" not in facts.inert:
                identity["propagate"] = recipe.propagate
            for name in ("exclude_first_token", "true_sequential"):
                if getattr(recipe, name):
                    identity[name] = True
        if recipe.execution == "packed":
            # Other kernels, other last digits.
            identity["execution"] = recipe.execution
        return digest(identity)

    def to_metadata(self) -> dict[str, Any]:
        """Return plain values for a results file: the recipe, with what was left open filled in."""
        filled = {"seqlen": self.facts.seqlen, "pack": self.facts.pack, **self.facts.options}
        return self.recipe.to_metadata() | {k: v for k, v in filled.items() if v is not None}
