"""The recipe: everything that can change the compressed weights, validated and named.

One class serves ``--model_args``, YAML files, Python, the identity of a run and its record.
:class:`~lm_calib_plugin.runtime.Runtime` holds what can not change the result (chunk size,
folders); it is never part of the identity.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from lm_calib_plugin import registry
from lm_calib_plugin.errors import UserError, listed, nearest
from lm_calib_plugin.expression import (
    NO_DATA,
    SourceTerm,
    parse_calibration,
    plain_form,
)
from lm_calib_plugin.recipe_rules import check_together
from lm_calib_plugin.resolved import Facts, ResolvedRecipe
from lm_calib_plugin.runtime import RUNTIME_ARGUMENTS, Runtime
from lm_calib_plugin.schemes import SCHEMES, scheme_name
from lm_calib_plugin.stages import DEFAULTS, STAGES, Stage, parse_stage
from lm_calib_plugin.values import (
    BITS,
    DENSE_BITS,
    flag,
    group_size,
    number,
    overrides,
    patterns,
    plain_value,
    whole,
    width,
)

SCHEMA_VERSION = 1
DEFAULT_CALIBRATION = "self"
STORED_SET = "set"
# Fields that say what is done with a calibration set (or have nothing to do with it), beside the
# options of the methods. Every other field decides what is in the set.
_USED_LATER = (
    "schema_version", "method", "propagate", "heldout", "exclude_first_token", "targets", "ignore",
    "block_path", "untie", "execution", "true_sequential", "overrides",
)  # fmt: skip
_OF_METHODS = (
    "sparsity", "pattern", "blocks", "sublayer", "greedy", "group", "allocation", "score", "refine",
    "update", "scheme", "bits", "group_size", "symmetric", "transform", "grid", "rounding",
    "observer", "act_bits", "act_dynamic", "kv_bits", "act_order", "damp", "correction", "compat",
)  # fmt: skip
UNSTRUCTURED = "unstructured"
ALL_FOLDS = "all"
RANDOM_SELECTION = "random"
FOLDS = (ALL_FOLDS, "choose", "validate", "judge")
AUTO = "auto"
EXECUTIONS = ("simulated", "packed")


class Recipe(BaseModel):
    """What is done to a model: method, strength, calibration data, and which layers.

    Parameters
    ----------
    schema_version
        Version of this list of fields.
    method
        A name of ``lm-calib ls methods``.
    sparsity
        Fraction of the weights *removed*, 0 <= s < 1 (pruning).
    pattern
        ``unstructured`` or ``N:M``: N weights *kept* in every M consecutive inputs (pruning).
    blocks
        Number of blocks, or sub-layers, that are removed; instead of ``sparsity`` (depth pruning).
    sublayer
        What is removed: ``block``, or only its ``attention`` or ``mlp`` (depth pruning).
        Default: ``block``.
    greedy
        Remove one block at a time and measure the others anew (``depth_loss``). Default: false.
    scheme
        Weights and activations by the name of their format, such as ``W4A16``, ``W8A8_static`` or
        ``FP8``; ``lm-calib ls schemes`` (quantization).
    bits
        Width of the integer grid, 2-8; 16 leaves the weights as they are; ``auto:3.25`` gives each
        layer a width of its own, 3.25 bits a weight on average with scales and zero points counted
        (quantization). Default: 4.
    group
        Weights that are compared with each other: ``row``, ``layer`` or ``block128`` (all rows of
        128 columns). Default: as the score defines (pruning).
    allocation
        How much is removed where; a name of ``lm-calib ls allocations``, with options such as
        ``owl?m=5&lambda=0.08``. Default: as the method defines, mostly ``uniform`` (pruning).
    score
        What says which weights matter; a name of ``lm-calib ls scores`` (pruning).
    refine
        What improves the mask; a name of ``lm-calib ls refinements`` (pruning).
    update
        What gives the kept weights new values; a name of ``lm-calib ls updates`` (pruning). For
        depth pruning: what stands in for the removed blocks.
    transform
        What changes the model, but not what it computes, so that it rounds better; a name of
        ``lm-calib ls transforms`` with options such as ``awq?steps=10`` (quantization).
    grid
        How much of the range of its weights a grid spans; a name of ``lm-calib ls grids``
        (quantization). Default: ``minmax``.
    rounding
        How weights are brought to levels; a name of ``lm-calib ls roundings`` (quantization).
    act_bits
        Width of the inputs of the layers, 2-8, rounded while the model runs; 16: as they are
        (quantization).
    act_dynamic
        Whether every token has a range of its own, or all share one that is calibrated.
        Default: true.
    observer
        How a calibrated range is chosen; a name of ``lm-calib ls observers``. Default: ``minmax``.
    kv_bits
        Width of cached keys and values, 2-8, each token and head with a range of its own
        (quantization).
    group_size
        Consecutive inputs that share a scale; -1: one scale per output channel. Default: 128, or
        as the scheme says.
    symmetric
        Whether the grid is symmetric around zero. Default: true.
    act_order
        Visit columns by falling input energy, scales fixed before (``gptq``). Default: true.
    damp
        Ridge added to the Gram matrix, relative to its mean diagonal; ``auto``: for each layer of
        seven values the one with the smallest error on sequences held out (``gptq``).
        Default: 0.01, and 0.1 for ``admm``.
    correction
        Part of the error of earlier blocks that each layer makes up for, 0 to 1: its target is the
        output in the dense model instead of that of its own weight. For methods that use the Gram
        matrix; one more forward pass. Default: 0 (``swap_pcg``: 0.3).
    compat
        ``reference`` reproduces the counting rules of the papers' code instead of exact counts.
    propagate
        ``compressed``: a block is calibrated with what compressed blocks before it produce;
        ``dense``: with what the dense model produces.
    true_sequential
        Inside a block, too, calibrate a layer with what compressed layers before it produce; one
        more forward pass for each distinct input. Default: false.
    overrides
        Other ``bits``, ``group_size`` or ``symmetric`` for layers by name pattern, the first that
        fits: ``{"*down_proj": {"bits": 4}}`` (quantization; in YAML or JSON).
    execution
        ``simulated``: exactly what the grids say, in the dtype of the model; ``packed``: kernels
        that work on low-precision numbers, where the device has them (quantization, and 2:4
        pruning). Default: ``simulated``.
    calibration
        Where the text comes from; see :mod:`lm_calib_plugin.expression`. Default ``self`` for
        methods that need data and ``none`` for the others.
    nsamples
        Number of calibration sequences. Not given beside ``set:DIR`` alone: all of the set.
    seqlen
        Tokens in each. Default: 2048, or what the model accepts if that is less; the length of
        the set for ``set:DIR``.
    calib_seed
        Seed of the draw.
    pack
        How text is cut: ``longdoc``, ``concat``, ``windows``, ``pad``, ``icl`` or ``multilen``.
        Default: what suits the source.
    icl_examples
        Examples a row of ``pack=icl``. Default: 4.
    chat_template
        Write every document with the chat template of the tokenizer before it is cut.
    fold
        Part of the documents that may be used: ``choose`` (60 %), ``validate`` (20 %), ``judge``
        (20 %), fixed for every document by its text, or ``all``.
    select
        How the sequences are chosen from a larger pool; a name of ``lm-calib ls selections``.
    pool
        Number of sequences to choose from, at least ``nsamples``. Default: 8 x ``nsamples``; for
        ``select=random`` no pool, the sequences are drawn as they come.
    select_target
        Calibration expression of the 32 sequences that ``centroid`` and ``grad_match`` compare
        the pool with.
    heldout
        Fraction of the sequences kept out of the statistics to measure the error on.
    exclude_first_token
        Leave the first token of every sequence out of the statistics: many models park huge
        activations there.
    targets
        Layers to compress, name patterns joined by ``+``. Default: every linear layer of the
        decoder blocks.
    ignore
        Layers to leave as they are, name patterns joined by ``+``.
    block_path
        Path of the list of decoder blocks, when it is not found by itself.
    untie
        Give the output head its own copy of the weights before it is compressed.

    Raises
    ------
    UserError
        For every value that can not be used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    method: str
    sparsity: float | None = None
    pattern: str | None = None
    blocks: int | None = None
    sublayer: str | None = None
    greedy: bool | None = None
    scheme: str | None = None
    bits: int | str | None = None
    group: str | None = None
    allocation: str | None = None
    score: str | None = None
    refine: str | None = None
    update: str | None = None
    transform: str | None = None
    grid: str | None = None
    rounding: str | None = None
    observer: str | None = None
    act_bits: int | None = None
    act_dynamic: bool | None = None
    kv_bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    act_order: bool | None = None
    damp: float | str | None = None
    correction: float | None = None
    compat: str | None = None
    propagate: str = "compressed"
    true_sequential: bool = False
    overrides: dict[str, dict[str, Any]] | None = None
    execution: str | None = None
    calibration: tuple[SourceTerm, ...] | None = None
    nsamples: int = 128
    seqlen: int | None = None
    calib_seed: int = 0
    pack: str | None = None
    icl_examples: int | None = None
    chat_template: bool = False
    fold: str = ALL_FOLDS
    select: str = RANDOM_SELECTION
    pool: int | None = None
    select_target: tuple[SourceTerm, ...] | None = None
    heldout: float = 0.1
    exclude_first_token: bool = False
    targets: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    block_path: str | None = None
    untie: bool = False

    def __init__(self, **data: Any) -> None:
        unknown = [name for name in data if name not in type(self).model_fields]
        if unknown:
            raise unknown_argument(unknown[0], type(self).model_fields)
        if data.get("method") is None:
            raise UserError(
                "method",
                "missing",
                f"methods: {listed([*registry.table('pruning'), *registry.table('quantization')])}",
                "for instance method=wanda",
            )
        data = {name: value for name, value in data.items() if value is not None}
        try:
            super().__init__(**data)
        except ValidationError as error:
            first = error.errors()[0]
            cause = first.get("ctx", {}).get("error")
            if isinstance(cause, UserError):
                raise cause from None
            name = ".".join(map(str, first["loc"])) or "recipe"
            raise UserError(name, f"got {first['input']!r}", first["msg"]) from None

    # --- one field at a time -------------------------------------------------------------

    @field_validator("schema_version", mode="before")
    @classmethod
    def _check_schema(cls, value: Any) -> Literal[1]:
        if value != SCHEMA_VERSION:
            raise UserError(
                "schema_version", f"got {value!r}", f"this build reads version {SCHEMA_VERSION}"
            )
        return 1

    @field_validator("method", mode="before")
    @classmethod
    def _check_method(cls, value: Any) -> str:
        return registry.find_method(str(value)).name

    @field_validator("sparsity", mode="before")
    @classmethod
    def _check_sparsity(cls, value: Any) -> float:
        allowed = "sparsity is a fraction removed, 0 <= s < 1"
        found = number("sparsity", value, allowed)
        if found == 1:
            raise UserError("sparsity", "1.0 would remove every weight", "use a value below 1")
        if not 0 <= found < 1:
            hint = f"for {found:g} % write {found / 100:g}" if 1 < found < 100 else ""
            raise UserError("sparsity", f"got {found:g}", allowed, hint)
        return found

    @field_validator("pattern", mode="before")
    @classmethod
    def _check_pattern(cls, value: Any) -> str:
        text = str(value).strip()
        if text == UNSTRUCTURED:
            return text
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if not found:
            raise UserError("pattern", f"got {text!r}", f"`{UNSTRUCTURED}` or N:M, such as 2:4")
        keep, group = int(found[1]), int(found[2])
        if not 0 < keep < group:
            hint = f"did you mean {group}:{keep}?" if 0 < group < keep else "for instance 2:4"
            raise UserError("pattern", f"got {text}", "N:M keeps N of every M, 0 < N < M", hint)
        return f"{keep}:{group}"

    @field_validator("scheme", mode="before")
    @classmethod
    def _check_scheme(cls, value: Any) -> str:
        return scheme_name(value)

    @field_validator(*STAGES, mode="before")
    @classmethod
    def _check_stage(cls, value: Any, info: Any) -> str:
        return parse_stage(info.field_name, value).text()

    @field_validator("bits", mode="before")
    @classmethod
    def _check_bits(cls, value: Any) -> int | str:
        head, _, budget = str(value).partition(":")
        if head.strip().lower() != AUTO:
            return width("bits", value)
        try:
            found = number("bits", budget)
        except UserError:
            found = 0
        if not min(BITS) <= found <= max(BITS):
            raise UserError(
                "bits",
                f"got {value}",
                "auto:B with 2 <= B <= 16 bits a weight on average, scales and zero points counted",
                "for instance bits=auto:3.25",
            )
        return f"{AUTO}:{found!r}".removesuffix(".0")

    @field_validator("act_bits", "kv_bits", mode="before")
    @classmethod
    def _check_widths(cls, value: Any, info: Any) -> int:
        if str(value).strip().lower() == NO_DATA:
            return DENSE_BITS
        return width(info.field_name, value, "values as they are")

    @field_validator("overrides", mode="before")
    @classmethod
    def _check_overrides(cls, value: Any) -> dict[str, dict[str, Any]]:
        return overrides(value)

    @field_validator("group_size", mode="before")
    @classmethod
    def _check_group_size(cls, value: Any) -> int:
        return group_size("group_size", value)

    @field_validator(
        "symmetric",
        "act_order",
        "act_dynamic",
        "true_sequential",
        "greedy",
        "untie",
        "exclude_first_token",
        "chat_template",
        mode="before",
    )
    @classmethod
    def _check_flags(cls, value: Any, info: Any) -> bool:
        return flag(info.field_name, value)

    @field_validator("damp", mode="before")
    @classmethod
    def _check_damp(cls, value: Any) -> float | str:
        if str(value).strip().lower() == AUTO:
            return AUTO
        found = number("damp", value, "a ridge >= 0, usually 0.01, or auto")
        if found < 0:
            raise UserError("damp", f"got {found:g}", "a ridge >= 0, usually 0.01, or auto")
        return found

    @field_validator("correction", mode="before")
    @classmethod
    def _check_correction(cls, value: Any) -> float:
        found = number("correction", value)
        if not 0 <= found <= 1:
            raise UserError("correction", f"got {found:g}", "a part of the error, 0 to 1")
        return found

    @field_validator("block_path", mode="before")
    @classmethod
    def _check_block_path(cls, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise UserError(
                "block_path",
                f"got {value!r}",
                "the path of the list of decoder blocks",
                "for instance block_path=model.layers",
            )
        return value.strip()

    @field_validator("blocks", mode="before")
    @classmethod
    def _check_blocks(cls, value: Any) -> int:
        try:
            return whole("blocks", value, lowest=0)
        except UserError as error:
            if isinstance(value, str) and re.search("[a-z]", value):
                hint = f"block_path={value.strip()}"
                raise UserError(
                    "blocks", f"got {value!r}", "how many blocks are removed", f"for a path {hint}"
                ) from None
            raise error from None

    @field_validator(
        "compat",
        "group",
        "sublayer",
        "propagate",
        "pack",
        "fold",
        "select",
        "execution",
        mode="before",
    )
    @classmethod
    def _check_choices(cls, value: Any, info: Any) -> str:
        allowed: list[str] = {
            "compat": ["reference"],
            "group": ["row", "layer", "block128"],
            "sublayer": ["block", "attention", "mlp"],
            "propagate": ["compressed", "dense"],
            "execution": list(EXECUTIONS),
            "pack": list(registry.table("packing")),
            "fold": list(FOLDS),
            "select": list(registry.table("selection")),
        }[info.field_name]
        if value not in allowed:
            raise UserError(
                info.field_name,
                f"got {value!r}",
                nearest(str(value), allowed),
                f"allowed: {listed(allowed)}",
            )
        return str(value)

    @field_validator("calibration", mode="before")
    @classmethod
    def _check_calibration(cls, value: Any) -> tuple[SourceTerm, ...]:
        if isinstance(value, tuple) and all(isinstance(v, SourceTerm) for v in value):
            return value
        return parse_calibration(value)

    @field_validator("select_target", mode="before")
    @classmethod
    def _check_select_target(cls, value: Any) -> tuple[SourceTerm, ...]:
        try:
            terms = cls._check_calibration(value)
        except UserError as error:
            raise error.renamed("select_target") from None
        if not terms:
            raise UserError(
                "select_target", f"got {value!r}", "a source of text", "for instance task:arc_easy"
            )
        return terms

    @field_validator("nsamples", "seqlen", "pool", "icl_examples", mode="before")
    @classmethod
    def _check_counts(cls, value: Any, info: Any) -> int:
        return whole(info.field_name, value, lowest=1)

    @field_validator("calib_seed", mode="before")
    @classmethod
    def _check_seed(cls, value: Any) -> int:
        return whole("calib_seed", value)

    @field_validator("heldout", mode="before")
    @classmethod
    def _check_heldout(cls, value: Any) -> float:
        found = number("heldout", value)
        if not 0 <= found <= 0.5:
            raise UserError("heldout", f"got {found:g}", "a fraction of the sequences, 0 to 0.5")
        return found

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _checkpatterns(cls, value: Any, info: Any) -> tuple[str, ...]:
        return patterns(info.field_name, value)

    # --- fields together -----------------------------------------------------------------

    @model_validator(mode="after")
    def _check_together(self) -> Recipe:
        check_together(self, _OF_METHODS)
        return self

    # --- what is derived -----------------------------------------------------------------

    @property
    def entry(self) -> registry.Entry:
        """The registry row of the method."""
        return registry.find_method(self.method)

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages of a pipeline, given ones before those of the method."""
        named = dict(self.entry.stages)
        texts = {
            name: getattr(self, name) or named.get(name) or DEFAULTS[name]
            for name in self.entry.stage_names
        }
        return {name: parse_stage(name, text) for name, text in texts.items()}

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the fields that the method reads."""
        parts = self.parts()
        dropped = set()
        if parts and not any(part.uses_damp for part in parts):
            # Both belong to the Gram matrix.
            dropped = {"damp", "correction"}
        if self.entry.kind == "quantization" and not any(part.uses_order for part in parts):
            dropped |= {"act_order", "compat"}
        return tuple(name for name in self.entry.options if name not in dropped)

    @property
    def needs_data(self) -> bool:
        """Whether the method, or a stage of it, looks at calibration data."""
        found = any(row.needs_data for row in self.parts() or [self.entry])
        return found or self.bits_budget is not None

    def parts(self) -> list[registry.Entry]:
        """Return the registry rows of the stages at work, none for methods without stages."""
        return [
            registry.find_part(STAGES[name], stage.name, name)
            for name, stage in self.stages.items()
            if name != "observer" or self.static_activations
        ]

    @property
    def act_bits_in_force(self) -> int | None:
        """Width of the activations, given or of the scheme; None where they stay as they are."""
        found = self.act_bits or (SCHEMES[self.scheme].act_bits if self.scheme else None)
        return None if found == DENSE_BITS else found

    @property
    def static_activations(self) -> bool:
        """Whether ranges of activations are calibrated."""
        dynamic = SCHEMES[self.scheme].act_dynamic if self.scheme else True
        given = dynamic if self.act_dynamic is None else self.act_dynamic
        return self.act_bits_in_force is not None and not given

    @property
    def bits_budget(self) -> float | None:
        """Bits a weight on average, scales counted, of ``bits=auto:B``; None: the same for all."""
        text = str(self.bits)
        return float(text.partition(":")[2]) if text.startswith(AUTO) else None

    @property
    def kept(self) -> tuple[int, int]:
        """``(N, M)`` of an N:M pattern; ``(0, 0)`` when unstructured."""
        if self.pattern in (None, UNSTRUCTURED):
            return 0, 0
        keep, group = str(self.pattern).split(":")
        return int(keep), int(group)

    @property
    def terms(self) -> tuple[SourceTerm, ...]:
        """Calibration terms with the default filled in; empty when no data is used."""
        if self.calibration is not None:
            return self.calibration
        return parse_calibration(DEFAULT_CALIBRATION) if self.needs_data else ()

    @classmethod
    def calibration_fields(cls) -> tuple[str, ...]:
        """Return the names of the fields that decide the calibration set."""
        rows = [*registry.table("pruning").values(), *registry.table("quantization").values()]
        of_methods = {name for row in rows for name in row.options}
        return tuple(f for f in cls.model_fields if f not in of_methods and f not in _USED_LATER)

    @property
    def nsamples_given(self) -> bool:
        """Whether ``nsamples`` was typed, or is the default."""
        return "nsamples" in self.model_fields_set

    @property
    def whole_set(self) -> bool:
        """Whether the calibration is one ``set:DIR``, of which nothing is selected."""
        alone = len(self.terms) == 1 and self.terms[0].name == STORED_SET
        return alone and self.select == RANDOM_SELECTION and self.pool is None

    def packing_options(self) -> dict[str, Any]:
        """Return the options of the packing that were given."""
        return {} if self.icl_examples is None else {"icl_examples": self.icl_examples}

    def method_options(self) -> dict[str, Any]:
        """Return the options that the method reads, as given (unset ones left out)."""
        given = {name: getattr(self, name) for name in self.options}
        return {name: value for name, value in given.items() if value is not None}

    def make_method(self) -> Any:
        """Import the method and return it with these options.

        Raises
        ------
        UserError
            For an option of a stage that is of the wrong kind or out of range.
        """
        return self.entry.make(self.method_options())

    def replaced(self, **changes: Any) -> Recipe:
        """Return the recipe with some fields changed, checked like any other."""
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**given, **changes})

    def to_metadata(self) -> dict[str, Any]:
        """Return the recipe as plain values, as :class:`Recipe` and YAML take them back."""
        plain = {k: v for k, v in self.model_dump().items() if v is not None}
        plain["calibration"] = plain_form(self.terms)
        if self.select_target is not None:
            plain["select_target"] = plain_form(self.select_target)
        if self.whole_set and not self.nsamples_given:
            del plain["nsamples"]
        for name in ("targets", "ignore"):
            plain[name] = list(plain.get(name, ()))
            if not plain[name]:
                del plain[name]
        return plain

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Read a recipe from a YAML file of flat ``name: value`` lines."""
        return cls.from_model_args({"recipe": path})

    @classmethod
    def from_model_args(cls, arguments: Mapping[str, Any]) -> Recipe:
        """Make a recipe from harness arguments, ``recipe=FILE`` merged with the others."""
        return read_arguments(arguments)[0]

    def resolve(self, facts: Facts) -> ResolvedRecipe:
        """Freeze what was left open with the facts of this model and this draw."""
        return ResolvedRecipe(self, facts)


def read_arguments(arguments: Mapping[str, Any]) -> tuple[Recipe, Runtime]:
    """Make recipe and runtime from harness arguments; ``recipe=FILE`` may hold any of both.

    Raises
    ------
    UserError
        For a value that can not be used; file and line are named when it stands in a file.
    """
    from lm_calib_plugin.recipe_file import merge_recipe_file

    given = {name: plain_value(value) for name, value in arguments.items()}
    # The harness turns the text `none` into None before we see it.
    for name in ("calibration", "refine", "update", *registry.QUANTIZATION_STAGES):
        if name in arguments and arguments[name] is None:
            given[name] = NO_DATA
    merged, places = merge_recipe_file(given)
    try:
        runtime = Runtime(**{name: merged.pop(name) for name in RUNTIME_ARGUMENTS & merged.keys()})
        return Recipe(**merged), runtime
    except UserError as error:
        if error.argument in places:
            raise error.at(places[error.argument]) from None
        raise


def check_purpose(recipe: Recipe, given: bool) -> None:
    """Refuse a mixture that is built without the method it is to serve, and the reverse."""
    name = next((term.name for term in recipe.terms), NO_DATA)
    mixture = name in registry.table("mixture")
    if mixture and not given:
        raise UserError(
            "for",
            f"`{name}` looks for a mix that serves a method, none was named",
            "the method and its options",
            "for instance --for method=wanda,sparsity=0.5",
        )
    if given and not mixture:
        raise UserError(
            "for",
            f"a set from `{name}` does not depend on the method",
            f"mixtures do: {listed(registry.table('mixture'))}",
            "drop --for",
        )


def unknown_argument(name: str, known: Any) -> UserError:
    """Return the error for an argument name that nobody knows."""
    return UserError(
        name,
        f"unknown argument `{name}`",
        nearest(name, known),
        "all options: lm-calib ls options",
    )
