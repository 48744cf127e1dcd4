"""One recipe applied to some layers only: weights exchanged in place, or the work done anew.

A method that changes nothing but the weights (and biases) of its target layers needs one run: its
weights and the dense ones take turns in a twin of the model, which shares memory with both. What
comes out is what this run did to the layers. A run that leaves a group out from the start can
differ where later layers are calibrated with what compressed ones before them produce
(``propagate=compressed``), so that can be asked for, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin import engine
from lm_calib_plugin.bank.mixtures import mixture_of
from lm_calib_plugin.compression import compress
from lm_calib_plugin.diagnostics.pair import twin
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.report import Report
from lm_calib_plugin.runtime import Runtime

EXCHANGED = "weights of the one run, exchanged"
RECOMPRESSED = "compressed anew"


@dataclass
class _Place:
    """A parameter of the working model: its dense value, that of the run, and whose rows it is.

    ``owners`` are ``(layer, expert)``: the whole parameter, or its part of that number.
    """

    owner: nn.Module
    attribute: str
    dense: Tensor
    compressed: Tensor
    owners: list[tuple[engine.TargetLayer, int | None]] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        getattr(self.owner, self.attribute).data = value

    def mixed(self, names: Collection[str]) -> Tensor:
        """Return the value with the layers of these names compressed."""
        chosen = [layer.name in names for layer, _ in self.owners]
        if all(chosen):
            return self.compressed
        if not any(chosen):
            return self.dense
        value = self.dense.clone()
        for (_, expert), taken in zip(self.owners, chosen, strict=True):
            if taken:
                value[expert] = self.compressed[expert]
        return value


class Weights:
    """A model whose layers take dense, compressed or other values in turn.

    Parameters
    ----------
    dense
        The model as it was; never changed.
    work
        A twin of it, compressed or not; nobody else may use it.
    recipe
        Which layers are meant.

    Attributes
    ----------
    layers
        The layers, in ``work``.
    stray
        Names of parameters and buffers that differ although they are no part of a layer.
    """

    def __init__(self, dense: Any, work: Any, recipe: Recipe | None) -> None:
        self.work = work
        self.blocks = engine.find_blocks(work, recipe.block_path if recipe else None)
        before = target_layers(dense, recipe)
        self.layers = target_layers(work, recipe)
        self._places: dict[tuple[int, str], _Place] = {}
        for old, new in zip(before, self.layers, strict=True):
            for attribute in _attributes(new):
                place = self._places.setdefault(
                    (id(new.module), attribute),
                    _Place(
                        new.module,
                        attribute,
                        getattr(old.module, attribute).data,
                        getattr(new.module, attribute).data,
                    ),
                )
                place.owners.append((new, new.expert))
        self.stray = self._share(dense)

    def use(self, names: Iterable[str]) -> Any:
        """Return the model with these layers compressed and all others dense."""
        taken = frozenset(names)
        for place in self._places.values():
            place.put(place.mixed(taken))
        return self.work

    def put(self, values: Mapping[str, Tensor]) -> Any:
        """Return the dense model with other weights, ``[out, in]`` by name of the layer."""
        for place in self._places.values():
            own = [(x, e) for x, e in place.owners if x.name in values]
            if not own or place.attribute != own[0][0].attribute:
                place.put(place.dense)
                continue
            value = place.dense.clone()
            for layer, expert in own:
                part = value if expert is None else value[expert]
                new = values[layer.name].to(part.dtype)
                part.copy_(new.t() if layer.transposed else new)
            place.put(value)
        return self.work

    def weights_of(self, layer: engine.TargetLayer) -> tuple[Tensor, Tensor]:
        """Return the dense and the compressed weight of a layer, float32 ``[out, in]``."""
        place = self._places[layer.place]
        found = []
        for value in (place.dense, place.compressed):
            part = value if layer.expert is None else value[layer.expert]
            found.append((part.t() if layer.transposed else part).float())
        return found[0], found[1]

    def _share(self, dense: nn.Module) -> list[str]:
        """Let what is no part of a layer share memory with the dense model; name what differs."""
        own = {id(getattr(p.owner, p.attribute)) for p in self._places.values()}
        there = dict(dense.named_parameters(remove_duplicate=False))
        there |= dict(dense.named_buffers(remove_duplicate=False))
        stray = []
        for name, mine in [*self.work.named_parameters(), *self.work.named_buffers()]:
            if id(mine) in own:
                continue
            other = there.get(name)
            if other is None or other.shape != mine.shape or not torch.equal(other, mine):
                stray.append(name)
            else:
                mine.data = other.data
        return stray


def target_layers(model: Any, recipe: Recipe | None) -> list[engine.TargetLayer]:
    """Return the layers that a recipe means; without one every linear layer of the blocks."""
    blocks = engine.find_blocks(model, recipe.block_path if recipe else None)
    if recipe is None:
        return engine.find_layers(blocks)[0]
    return engine.select_layers(model, blocks, recipe.targets, recipe.ignore, recipe.untie)[0]


def _attributes(layer: engine.TargetLayer) -> list[str]:
    """Return the names under which the module keeps the weight, and the bias if there is one."""
    bias = "bias"
    if layer.expert is not None:
        bias = f"{layer.attribute}_bias"
    return [layer.attribute, *([bias] if layer.bias is not None else [])]


@dataclass
class Compressed:
    """A recipe, done to a twin of a model, and what stands for parts of it.

    ``how`` says in words what variants are; ``report`` is that of the run on all layers;
    ``weights`` is None where they can not be exchanged.
    """

    dense: Any
    tokenizer: Any
    recipe: Recipe
    runtime: Runtime
    report: Report
    how: str
    layers: list[engine.TargetLayer]
    blocks: engine.Blocks
    weights: Weights | None
    whole: Any

    def variant(self, names: Collection[str], anew: bool = False) -> Any:
        """Return the model with the layers of these names compressed, all others dense.

        It is good until the next call. ``anew``: compressed anew even where weights can be
        exchanged.
        """
        if not names:
            return self.dense
        if self.weights is not None and not anew:
            return self.weights.use(names)
        if len(names) == len(self.layers):
            return self.whole if self.weights is None else self.weights.use(names)
        other = twin(self.dense)
        compress(
            other,
            self.tokenizer,
            recipe_for(self.recipe, self.report, self.layers, names),
            self.runtime,
            self.report.calibration_set,
        )
        return other


def compress_twin(dense: Any, tokenizer: Any, recipe: Recipe, runtime: Runtime) -> Compressed:
    """Compress a twin of a model, which is left as it is.

    Raises
    ------
    UserError
        For methods that remove whole parts, and what compression refuses.
    """
    check_layerwise(recipe)
    work = twin(dense)
    report = compress(work, tokenizer, recipe, runtime)
    quiet = dataclasses.replace(runtime, progress=False, cache=False)
    reason = why_not_exchanged(recipe)
    weights = None
    if reason is None:
        weights = Weights(dense, work, recipe)
        if weights.stray:
            reason, weights = f"the method also changes {weights.stray[0]}", None
    how = EXCHANGED if weights else f"{RECOMPRESSED} for each, as {reason}"
    blocks = engine.find_blocks(dense, recipe.block_path)
    layers = target_layers(dense, recipe)
    return Compressed(dense, tokenizer, recipe, quiet, report, how, layers, blocks, weights, work)


def check_layerwise(recipe: Recipe) -> None:
    """Refuse methods of which no layer can be left out; before anything is loaded.

    Raises
    ------
    UserError
        For methods that take parts out of the model.
    """
    if recipe.entry.scope == "model":
        raise UserError(
            "method",
            f"`{recipe.method}` takes whole parts out of the model",
            "methods that change the weights of layers: one group is left out at a time",
            "to rank blocks for removal: --probe depth, without a recipe",
        )


def why_not_exchanged(recipe: Recipe) -> str | None:
    """Return why dense and compressed weights can not stand side by side; None where they can."""
    method = recipe.make_method()
    if method.transform is not None:
        return "its transform changes the basis in which weights stand"
    if method.activations is not None:
        return "inputs of its layers are rounded while the model runs"
    if method.kv_bits is not None:
        return "cached keys and values are rounded, too"
    if recipe.execution == "packed":
        return "packed layers are other modules"
    return None


def recipe_for(
    recipe: Recipe, report: Report, layers: Iterable[engine.TargetLayer], names: Collection[str]
) -> Recipe:
    """Return the recipe for the layers of these names, and no others.

    Parameters
    ----------
    report
        Of the run on all layers: what it found out about the data holds for its parts, too.
    """
    own = [layer for layer in layers if layer.name in names]
    changes: dict[str, Any] = {
        "targets": tuple(layer.name for layer in own),
        "ignore": (),
        "untie": recipe.untie and any(layer.block == engine.HEAD for layer in own),
    }
    if recipe.overrides:
        # A pattern that means nothing is refused as a typing error.
        changes["overrides"] = {
            pattern: options
            for pattern, options in recipe.overrides.items()
            if any(engine.matches(layer.name, pattern) for layer in own)
        } or None
    if mixture_of(recipe) is not None and "damp" in report.recipe and "damp" in recipe.options:
        # A mixture may have chosen the ridge along with the shares.
        changes["damp"] = report.recipe["damp"]
    return recipe.replaced(**changes)
