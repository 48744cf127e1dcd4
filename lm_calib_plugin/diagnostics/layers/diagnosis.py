"""Everything that is found of a run: from its report, and from its models where they are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_calib_plugin import engine
from lm_calib_plugin.diagnostics.layers import reasons
from lm_calib_plugin.diagnostics.layers.depths import Propagation
from lm_calib_plugin.diagnostics.layers.evidence import Layer, Weights, basis_of, gathered
from lm_calib_plugin.diagnostics.layers.measuring import Measured, rounding_of
from lm_calib_plugin.diagnostics.layers.opening import Opened
from lm_calib_plugin.diagnostics.layers.propagation import follow
from lm_calib_plugin.diagnostics.layers.reading import Run
from lm_calib_plugin.diagnostics.layers.reasons import Reason

# Layers that reasons are looked for: each needs both of its weights at once.
WORST = 10


@dataclass
class Diagnosis:
    """What was found of a run.

    ``worst`` are the layers with the largest errors, with every reason that holds; ``unlike`` the
    layers that a transform scaled, so that their weights were not compared.
    """

    run: Run
    layers: list[Layer]
    worst: list[tuple[Layer, list[Reason]]] = field(default_factory=list)
    propagation: Propagation | None = None
    opened: Opened | None = None
    unlike: set[str] = field(default_factory=set)

    @property
    def basis(self) -> str:
        """What errors of layers are compared on: ``text``, ``heldout`` or ``calibration``."""
        return basis_of(self.layers)

    @property
    def over_fitted(self) -> list[tuple[Layer, str, float]]:
        """Layers over-fitted to the calibration set, on what it shows, and how many times."""
        found = [(layer, reasons.over_fitted(layer)) for layer in self.layers]
        known = [(layer, *how) for layer, how in found if how is not None]
        return sorted(known, key=lambda one: -one[2])

    @property
    def starved(self) -> list[Layer]:
        """Layers that saw fewer tokens than they have inputs, those without any first."""
        few = [x for x in self.layers if x.row.tokens is not None]
        few = [x for x in few if (x.row.tokens or 0) < x.row.shape[1]]
        return sorted(few, key=lambda x: x.row.tokens or 0)


def diagnose(run: Run, opened: Opened | None = None, progress: bool = True) -> Diagnosis:
    """Look for where the error of a run arises, how it travels, and why.

    Parameters
    ----------
    run
        See :func:`~lm_calib_plugin.diagnostics.layers.reading.read_run`.
    opened
        Its models; without them only what the report says is told.

    Raises
    ------
    NumericalError
        When hidden states or logits are not finite.
    """
    if opened is None:
        found = Diagnosis(run, gathered(run.rows))
        found.worst = [(x, _why(found, x, None)) for x in _largest(found.layers)]
        return found
    unlike = opened.unlike
    text, calibration, propagation = _measured(run, opened, unlike, progress)
    layers = gathered(run.rows, text, calibration)
    found = Diagnosis(run, layers, [], propagation, opened, unlike)
    at_hand = _weights(run, opened, unlike, _largest(layers))
    found.worst = [(x, _why(found, x, at_hand.get(x.name))) for x in _largest(layers)]
    return found


def _measured(
    run: Run, opened: Opened, unlike: set[str], progress: bool
) -> tuple[dict[str, Measured], dict[str, Measured], Propagation | None]:
    """Return what was measured on the text, on the calibration set, and by depth."""
    recipe = run.recipe
    names = [row.name for row in run.rows if row.name not in unlike]
    given: dict[str, Any] = {"progress": progress}
    rounded = {}
    if recipe is not None:
        given |= {"block_path": recipe.block_path, "ignore": recipe.ignore}
        dtypes = {
            name.removesuffix(".weight"): parameter.dtype
            for name, parameter in opened.dense.named_parameters()
        }
        rounded = rounding_of(recipe.make_method(), run.rows, dtypes)
    pair = opened.dense, opened.compressed
    on_text = follow(*pair, opened.text.sequences, names, rounded, title="text", **given)
    calibration: dict[str, Measured] = {}
    if opened.calibration and names:
        seen = follow(
            *pair,
            opened.calibration,
            names,
            propagate=False,
            title="calibration set",
            **given,
        )
        calibration = seen.layers
    return on_text.layers, calibration, on_text.propagation


def _largest(layers: Sequence[Layer]) -> list[Layer]:
    basis = basis_of(layers)
    known = [(layer.errors[basis], layer) for layer in layers]
    found = [(error, layer) for error, layer in known if error is not None]
    return [layer for _, layer in sorted(found, key=lambda one: -one[0])[:WORST]]


def _weights(
    run: Run, opened: Opened, unlike: set[str], layers: Sequence[Layer]
) -> dict[str, Weights]:
    """Return dense and compressed weights of some layers, by name."""
    names = {layer.name for layer in layers} - unlike
    path, ignore = (None, ()) if run.recipe is None else (run.recipe.block_path, run.recipe.ignore)
    both = []
    for model in (opened.dense, opened.compressed):
        found, _ = engine.find_layers(engine.find_blocks(model, path), ignore)
        both.append({x.name: x for x in found if x.name in names})
    sizes = _group_sizes(run)
    return {
        name: Weights(
            both[0][name].read(),
            both[1][name].read(),
            sizes.get(name, -1),
            next(layer.row.bits for layer in layers if layer.name == name),
        )
        for name in both[0].keys() & both[1].keys()
        if both[0][name].shape == both[1][name].shape
    }


def _group_sizes(run: Run) -> dict[str, int]:
    """Return how many inputs share a scale, by layer; as the recipe says, with its overrides."""
    recipe = run.recipe
    if recipe is None:
        return {}
    method = recipe.make_method()
    plain = getattr(getattr(method, "quantization", method), "group_size", -1)
    found = {}
    for row in run.rows:
        own = [o for p, o in (recipe.overrides or {}).items() if engine.matches(row.name, p)]
        found[row.name] = int(own[0].get("group_size", plain) if own else plain)
    return found


def _why(found: Diagnosis, layer: Layer, weights: Weights | None) -> list[Reason]:
    recipe = found.run.recipe
    damp = None if recipe is None else getattr(recipe.make_method(), "damp", None)
    asked = float(damp) if isinstance(damp, (int, float)) else None
    return reasons.reasons(reasons.case_of(layer, found.layers, weights, asked))
