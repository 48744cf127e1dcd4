"""Rules between the fields of a recipe; each field by itself is checked in the recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lm_calib_plugin import registry
from lm_calib_plugin.errors import UserError, listed
from lm_calib_plugin.schemes import SCHEMES
from lm_calib_plugin.stages import STAGES, parse_stage
from lm_calib_plugin.values import DENSE_BITS, flag

if TYPE_CHECKING:
    from lm_calib_plugin.recipe import Recipe

STATIC = "_static"


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
            given = [f"{s}={recipe.stages[s].name}" for s in recipe.stages if getattr(recipe, s)]
            of_stages = f" with {listed(given)}" if name in recipe.entry.options and given else ""
            raise UserError(
                name,
                f"`{name}` is not an option of method `{recipe.method}`{of_stages}",
                f"its options: {listed(options)}",
                f"drop `{name}`",
            )
    if recipe.entry.kind != "quantization":
        _check_pruning(recipe)
        _check_ridge(recipe)
    if recipe.entry.kind != "pruning":
        _check_scheme(recipe)
        _check_activations(recipe)
        _check_choosing(recipe)
    _check_overrides(recipe)
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
        raise UserError(
            "calibration",
            f"{_user_of_data(recipe)} needs calibration data, got none",
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


def _user_of_data(recipe: Recipe) -> str:
    """Return what looks at calibration data, as it is typed."""
    users = [row for row in recipe.parts() if row.needs_data]
    fields = {kind: name for name, kind in STAGES.items()}
    for row in users:
        name = fields[row.kind]  # type: ignore[index]
        if name == "observer":
            return f"scheme={recipe.scheme}" if recipe.scheme else "act_dynamic=false"
        if getattr(recipe, name):
            return f"{name}={row.name}"
    return f"`{recipe.method}`" if users or not recipe.bits_budget else f"bits={recipe.bits}"


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


def _check_ridge(recipe: Recipe) -> None:
    of_pruning = [row for row in recipe.parts() if row.kind in registry.PRUNING_STAGES.values()]
    if recipe.damp == "auto" and any(row.uses_damp for row in of_pruning):
        raise UserError(
            "damp",
            f"got auto with method `{recipe.method}`",
            "pruning takes a number; the search is for quantization alone",
            "for instance damp=0.01",
        )


def _check_activations(recipe: Recipe) -> None:
    if recipe.act_dynamic is not None and recipe.act_bits_in_force is None:
        raise UserError(
            "act_dynamic",
            "given, but no activation is quantized",
            "beside act_bits, or a scheme that quantizes activations",
            "add act_bits=8, or drop `act_dynamic`",
        )
    if recipe.observer is None:
        return
    if not recipe.static_activations:
        raise UserError(
            "observer",
            "given, but no range of an activation is calibrated",
            "it chooses static ranges",
            "add act_bits=8,act_dynamic=false or scheme=W8A8_static, or drop `observer`",
        )
    observer = recipe.stages["observer"]
    first = flag("observer=first", observer.options.get("first", True))
    if recipe.exclude_first_token and not first:
        raise UserError(
            "observer",
            f"got {observer.text()} beside exclude_first_token=true",
            "the first token is left out already; the second would go, too",
            f"use observer={observer.name}",
        )


def _check_choosing(recipe: Recipe) -> None:
    """Refuse to choose by sequences held out where that is not possible."""
    rounding = recipe.stages["rounding"].name if recipe.stages else None
    choosers = []
    if recipe.bits_budget is not None:
        choosers.append(f"bits={recipe.bits}")
        if recipe.entry.kind == "joint" or not recipe.stages:
            raise UserError(
                "bits",
                f"got {recipe.bits} with method `{recipe.method}`",
                "widths are chosen for the quantization methods of `lm-calib ls methods` alone",
                'for instance bits=4, with overrides: {"*down_proj": {"bits": 5}}',
            )
    if recipe.damp == "auto":
        choosers.append("damp=auto")
    if rounding == "gptq_heldout":
        given = recipe.rounding is not None
        choosers.append(f"rounding={rounding}" if given else f"`{recipe.method}`")
    if choosers and recipe.heldout == 0:
        raise UserError(
            "heldout",
            f"got 0, but {choosers[0]} chooses by the error on sequences held out",
            "a fraction of the sequences above 0",
            "for instance heldout=0.1",
        )


def _check_overrides(recipe: Recipe) -> None:
    if recipe.overrides is None:
        return
    if recipe.entry.kind == "pruning":
        raise UserError(
            "overrides",
            f"method `{recipe.method}` has no bits to override",
            "quantization methods; allocation=list gives every block a fraction of its own",
            "drop `overrides`",
        )
    scheme = SCHEMES[recipe.scheme] if recipe.scheme else None
    for pattern, own in recipe.overrides.items():
        for name, value in own.items():
            if name not in recipe.options:
                raise UserError(
                    "overrides",
                    f"`{name}` is not an option of method `{recipe.method}`",
                    f"its options: {listed(recipe.options)}",
                    f"drop `{name}` for {pattern!r}",
                )
            if scheme is None or scheme.number == "int" or value == getattr(scheme, name):
                continue
            if (name, value) == ("bits", DENSE_BITS) or (name == "group_size" and not scheme.fixed):
                continue
            raise UserError(
                "overrides",
                f"got {name}={str(value).lower()} for {pattern!r} with scheme={recipe.scheme}",
                f"the format itself fixes `{name}`; bits=16 leaves the layers as they are",
                f'for instance overrides: {{"{pattern}": {{"bits": 16}}}}',
            )


def _check_execution(recipe: Recipe) -> None:
    kind = recipe.entry.kind
    if recipe.execution == "packed" and kind == "pruning" and recipe.kept != (2, 4):
        raise UserError(
            "execution",
            f"got packed with method `{recipe.method}`"
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
        instead = ""
        if option == "act_dynamic" and _twin(name) in SCHEMES:
            instead = f", or use scheme={_twin(name)}"
        elif scheme.number == "int":
            instead = f", or replace scheme={name} by bits, group_size and act_bits"
        raise UserError(
            option,
            f"got {str(given).lower()}, but scheme={name} has {option}={str(own).lower()}",
            "options beside a scheme only fill in what it leaves open",
            f"drop `{option}`{instead}",
        )


def _twin(scheme: str) -> str:
    """Return the name with calibrated ranges in place of a range a token, and the reverse."""
    return scheme.removesuffix(STATIC) if scheme.endswith(STATIC) else scheme + STATIC
