"""Rules between the fields of a recipe; each field by itself is checked in the recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_calib_plugin import registry
from lm_calib_plugin.errors import UserError, listed
from lm_calib_plugin.schemes import SCHEMES
from lm_calib_plugin.stages import MINMAX, parse_stage

if TYPE_CHECKING:
    from lm_calib_plugin.recipe import Recipe

DENSE_BITS = 16


def check_together(recipe: Recipe, of_methods: tuple[str, ...]) -> None:
    """Refuse fields that do not go with each other.

    Parameters
    ----------
    recipe
        Every field is valid by itself.
    of_methods
        Names of the fields that only some methods read.

    Raises
    ------
    UserError
        For the first rule that is broken.
    """
    options = recipe.options
    for name in of_methods:
        if getattr(recipe, name) is not None and name not in options:
            raise UserError(
                name,
                f"`{name}` is not an option of method `{recipe.method}`",
                f"its options: {listed(options)}",
                f"drop `{name}`",
            )
    if recipe.entry.kind != "quantization":
        _check_pruning(recipe)
    if recipe.entry.kind != "pruning":
        _check_quantization(recipe)
    _check_execution(recipe)
    _check_scope(recipe)
    _check_selection(recipe)
    _check_packing(recipe)
    _check_data(recipe)


def _check_packing(recipe: Recipe) -> None:
    taken = registry.table("packing")[recipe.pack].options if recipe.pack else ()
    for name in recipe.packing_options():
        if name not in taken:
            raise UserError(
                name,
                f"`{name}` is no option of "
                + (f"pack={recipe.pack}" if recipe.pack else "the default packing"),
                fix=f"add pack=icl, or drop `{name}`",
            )


def _check_data(recipe: Recipe) -> None:
    if recipe.needs_data and recipe.calibration == ():
        what = f"`{recipe.method}`"
        if not any(part.needs_data for part in recipe.parts()):
            what = f"bits={recipe.bits}"
        raise UserError(
            "calibration",
            f"{what} needs calibration data, got none",
            f"methods without data: {listed(data_free())}",
            "drop `calibration=none`, or name a source such as calibration=self",
        )
    if recipe.true_sequential and recipe.propagate == "dense":
        raise UserError(
            "true_sequential",
            "given beside propagate=dense, where no layer sees what others before it became",
            "propagate=compressed",
            "drop one of the two",
        )


def data_free() -> list[str]:
    """Return the names of the methods that need no calibration data."""
    rows = [*registry.table("pruning").values(), *registry.table("quantization").values()]
    return [row.name for row in rows if not row.needs_data]


def _check_selection(recipe: Recipe) -> None:
    if recipe.pool is not None and recipe.pool < recipe.nsamples:
        raise UserError(
            "pool",
            f"got {recipe.pool}, less than nsamples={recipe.nsamples}",
            "a number of sequences to choose from, at least nsamples",
            f"for instance pool={8 * recipe.nsamples}",
        )
    takes = "select_target" in registry.find_selector(recipe.select).options
    if takes and recipe.select_target is None:
        raise UserError(
            "select_target",
            "missing",
            f"`{recipe.select}` compares the pool with text of the target",
            "for instance select_target=task:arc_easy or select_target=file:target.jsonl",
        )
    if recipe.select_target is not None and not takes:
        rows = registry.table("selection")
        users = [name for name, row in rows.items() if "select_target" in row.options]
        raise UserError(
            "select_target",
            f"`select_target` is not an option of select={recipe.select}",
            f"selectors that compare with a target: {listed(users)}",
            "drop `select_target`",
        )


def _check_scope(recipe: Recipe) -> None:
    """Refuse what is meant for layers beside methods of whole models, and the reverse."""
    scope = recipe.entry.scope
    if recipe.update is not None:
        part = registry.find_part("update", parse_stage("update", recipe.update).name, "update")
        if part.target and part.scope != scope:
            rows = registry.table("update").values()
            fitting = [row.name for row in rows if row.scope == scope or not row.target]
            what = "removes whole parts" if scope == "model" else "works on single weights"
            raise UserError(
                "update",
                f"`{part.name}` does not go with method `{recipe.method}`, which {what}",
                f"updates of this method: {listed(fitting)}",
                "name one of them, or drop `update`",
            )
    if scope == "layer":
        return
    for name in ("targets", "ignore", "untie", "true_sequential"):
        if getattr(recipe, name):
            raise UserError(
                name,
                f"method `{recipe.method}` does not choose among layers",
                "it looks at the whole model",
                f"drop `{name}`",
            )
    if "blocks" in recipe.options and (recipe.blocks is None) == (recipe.sparsity is None):
        raise UserError(
            "blocks",
            "missing" if recipe.blocks is None else "given beside `sparsity`",
            "how many blocks are removed: blocks=N, or sparsity=S as a fraction of them",
            f"for instance method={recipe.method},blocks=2",
        )


def _check_pruning(recipe: Recipe) -> None:
    options = recipe.entry.options
    if recipe.damp == "auto" and recipe.entry.kind == "pruning":
        raise UserError(
            "damp",
            f"got auto with method `{recipe.method}`",
            "a ridge >= 0; roundings choose among several",
            "for instance damp=0.01",
        )
    if "blocks" in options:
        return
    if recipe.kept == (0, 0):
        listed_out = "allocation" in recipe.stages and recipe.stages["allocation"].name == "list"
        if recipe.sparsity is None and "sparsity" in options and not listed_out:
            raise UserError(
                "sparsity",
                "missing",
                "a fraction removed, 0 <= s < 1"
                + (", or a pattern" if "pattern" in options else ""),
                "for instance sparsity=0.5" + (" or pattern=2:4" if "pattern" in options else ""),
            )
    else:
        implied = 1 - recipe.kept[0] / recipe.kept[1]
        if recipe.sparsity is not None and abs(recipe.sparsity - implied) > 1e-9:
            raise UserError(
                "pattern",
                f"{recipe.pattern} fixes sparsity at {implied:g}, got {recipe.sparsity:g}",
                fix="drop `sparsity` or the pattern",
            )


def _check_quantization(recipe: Recipe) -> None:
    _check_scheme(recipe)
    if recipe.bits_budget is not None and recipe.entry.kind == "joint":
        raise UserError(
            "bits",
            f"got {recipe.bits} with method `{recipe.method}`",
            "widths are chosen for layers that are quantized, not pruned",
            "a width, for instance bits=4, and others by overrides",
        )
    quantized = recipe.act_bits_in_force is not None
    if recipe.act_dynamic is not None and not quantized:
        raise UserError(
            "act_dynamic",
            "given, but no activation is quantized",
            "beside act_bits, or a scheme that quantizes activations",
            "add act_bits=8, or drop `act_dynamic`",
        )
    if recipe.observer is not None and not recipe.static_activations:
        raise UserError(
            "observer",
            "given, but no range of an activation is calibrated",
            "it chooses static ranges",
            "add act_bits=8,act_dynamic=false or scheme=W8A8_static, or drop `observer`",
        )
    observer = recipe.stages["observer"] if recipe.stages else None
    if observer is not None and recipe.exclude_first_token and recipe.static_activations:
        if observer.options.get("first") == "false":
            raise UserError(
                "observer",
                f"got {observer.text()} beside exclude_first_token=true",
                "the first token is left out already; the second would go, too",
                f"observer={observer.name}",
            )
    choosing = recipe.damp == "auto" or any(p.name == "gptq_heldout" for p in recipe.parts())
    if (choosing or recipe.bits_budget is not None) and recipe.heldout == 0:
        what = "bits" if recipe.bits_budget is not None else "damp"
        raise UserError(
            "heldout",
            f"got 0, but `{what if recipe.damp == 'auto' or what == 'bits' else recipe.method}` "
            "chooses by the error on sequences held out",
            "a fraction of the sequences above 0",
            "for instance heldout=0.1",
        )


def _check_execution(recipe: Recipe) -> None:
    kind = recipe.entry.kind
    if recipe.overrides and kind == "pruning":
        raise UserError(
            "overrides",
            f"method `{recipe.method}` has no bits to override",
            "quantization methods; allocation=list gives every block a fraction of its own",
            "drop `overrides`",
        )
    if recipe.execution == "packed" and kind == "pruning" and recipe.kept != (2, 4):
        raise UserError(
            "execution",
            f"packed with method `{recipe.method}`"
            + (f" and pattern={recipe.pattern}" if recipe.pattern else ""),
            "hardware works with quantized numbers, and with weights pruned 2:4",
            "drop `execution`, or add pattern=2:4",
        )


def _check_scheme(recipe: Recipe) -> None:
    if recipe.scheme is None:
        return
    scheme, name = SCHEMES[recipe.scheme], recipe.scheme
    fixed = {"bits": scheme.bits, "act_bits": scheme.act_bits or DENSE_BITS}
    if scheme.act_bits:
        fixed["act_dynamic"] = scheme.act_dynamic
    if scheme.fixed:
        fixed["group_size"] = scheme.group_size
    if scheme.number != "int":
        fixed["symmetric"] = True
    for option, own in fixed.items():
        given = getattr(recipe, option)
        if given is None or given == own:
            continue
        shown = str(own).lower()
        raise UserError(
            option,
            f"got {str(given).lower()}, but scheme={name} has {option}={shown}",
            "options beside a scheme only fill in what it leaves open",
            f"drop `{option}`, or replace scheme={name} by bits, group_size and act_bits",
        )
    if scheme.number != "int" and recipe.grid not in (None, MINMAX) and scheme.fixed:
        raise UserError(
            "grid",
            f"got {recipe.grid} with scheme={name}",
            "the format itself fixes the scales: grid=minmax",
            "drop `grid`",
        )
