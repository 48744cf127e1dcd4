"""The report of a compression: totals for the results file, one row a layer for a side file."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lm_calib_plugin.storage import canonical_json, digest, file_digest, write_text

# What may differ between runs of one recipe.
_BY_THE_CLOCK = ("seconds",)


@dataclass
class LayerRow:
    """What became of one layer.

    ``removed`` is the fraction of exact zeros in the stored weight, ``bits`` the width of its
    levels (None when not quantized). ``error_calibration`` and ``error_heldout`` are relative
    squared output errors, ``||X (W' - W)^T||^2 / ||X W^T||^2``, on up to 512 tokens of the
    sequences used and of the sequences held out. ``tokens`` counts the input rows seen.
    ``asked`` is the fraction, or the N:M pattern, that an allocation gave to the layer;
    ``borrowed`` the number of tokens by which the statistics of an expert that saw few were filled
    up with those of all experts. ``stored_bits`` are bits a weight with scales and zero points,
    ``scale_min``, ``scale_median`` and ``scale_max`` those of the grid, ``clipped`` the share of
    weights beyond its outermost levels, ``fallback`` what was done instead of the method,
    ``details`` further numbers of the method (errors of the block, of ``autoround``).
    ``input_limit`` is the calibrated range of the input, ``input_limit_rest`` what it would have
    been without the first token of every sequence (None where these do not count anyway).
    ``execution`` is the kernel of a packed layer, or why it has none.
    """

    name: str
    shape: tuple[int, int]
    removed: float
    bits: int | None
    error_calibration: float | None
    error_heldout: float | None
    damp: float | None
    tokens: int | None
    seconds: float
    asked: str | float | None = None
    borrowed: int | None = None
    fallback: str | None = None
    details: dict[str, float] = field(default_factory=dict)
    stored_bits: float | None = None
    scale_min: float | None = None
    scale_median: float | None = None
    scale_max: float | None = None
    clipped: float | None = None
    input_limit: float | None = None
    input_limit_rest: float | None = None
    execution: dict[str, Any] | None = None


# How much wider than without first tokens a range has to be to count as theirs.
WIDENED = 1.5


def from_first_token(row: LayerRow) -> bool:
    """Tell whether the calibrated range of a layer rests on first tokens of sequences alone."""
    if row.input_limit is None or row.input_limit_rest is None:
        return False
    return row.input_limit >= WIDENED * row.input_limit_rest


@dataclass
class Report:
    """Everything that is said about one compressed model.

    ``key`` names the result (see :meth:`lm_calib_plugin.recipe.ResolvedRecipe.key`); ``achieved``
    is counted on the live weights after all work is done. ``structure`` tells what methods of whole
    models took out: ``removed`` (names), ``ranking`` (every part with its value) and ``error``, the
    relative squared error of what the output head receives; ``layers`` is empty then.
    ``transforms`` tells how the model was changed before its weights were rounded, ``execution``
    which kernels a packed model runs on (None: simulated). ``residence`` tells, where that is not
    on the devices of the model, where its ``weights`` are (bytes by place) and where its
    ``hidden_states`` were between two blocks (``host``).
    ``cache`` tells whether the model was loaded instead of compressed, and where it is kept (None:
    nothing is kept).
    ``processes`` tells that several divided the work: ``count``, and the calibration ``tokens``
    that went through each (None: each did all of it). ``seconds`` and memory are those of this one.
    ``calibration_set`` is the set that was used, None without data, and ``grids`` the levels of
    each quantized layer, by name, for whoever stores the model; neither is written anywhere.
    """

    key: str
    recipe: dict[str, Any]
    calibration: dict[str, Any] | None
    layers: list[LayerRow]
    achieved: dict[str, Any] = field(default_factory=dict)
    left_dense: list[tuple[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_gib: float | None = None
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    weights_digest: str = ""
    model_digest: str = ""
    report_file: str | None = None
    report_sha256: str | None = None
    structure: dict[str, Any] | None = None
    transforms: list[dict[str, Any]] = field(default_factory=list)
    execution: dict[str, Any] | None = None
    residence: dict[str, Any] | None = None
    cache: dict[str, Any] | None = None
    processes: dict[str, Any] | None = None
    calibration_set: Any = field(default=None, repr=False, compare=False)
    grids: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def error(self) -> dict[str, Any]:
        """Return median and worst relative output error, on calibration and held-out tokens.

        Of methods of whole models: the error of the last hidden states.
        """
        found: dict[str, Any] = {}
        if self.structure is not None:
            for kind in ("calibration", "heldout"):
                value = self.structure["error"].get(kind)
                found[kind] = None if value is None else {"last_hidden": _rounded(value)}
            return found
        for kind in ("calibration", "heldout"):
            pairs = [(getattr(r, f"error_{kind}"), r.name) for r in self.layers]
            known = [(e, name) for e, name in pairs if e is not None]
            worst = max(known, default=None)
            found[kind] = worst and {
                "median": _rounded(statistics.median(e for e, _ in known)),
                "worst": _rounded(worst[0]),
                "worst_layer": worst[1],
            }
        return found

    def summary(self) -> dict[str, Any]:
        """Return the block that goes into a results file under ``config["compression"]``."""
        return {
            "key": self.key,
            "recipe": self.recipe,
            "calibration": self.calibration,
            "achieved": self.achieved,
            "error": self.error(),
            "layers": len(self.layers),
            "left_dense": len(self.left_dense),
            "seconds": {k: round(v, 3) for k, v in self.seconds.items()},
            "peak_memory_gib": self.peak_memory_gib,
            "warnings": list(self.warnings),
            "versions": self.versions,
            "model_digest": self.model_digest,
            "weights_digest": self.weights_digest,
            "report_file": self.report_file,
            "report_sha256": self.report_sha256,
        } | self._extra()

    def _extra(self) -> dict[str, Any]:
        """Return what only some methods have to say."""
        found: dict[str, Any] = {}
        if self.structure is not None:
            found["removed"] = self.structure["removed"]
        if self.transforms:
            found["transforms"] = len(self.transforms)
        if self.execution is not None:
            found["execution"] = self.execution
        if self.residence is not None:
            found["residence"] = self.residence
        if self.cache is not None:
            found["cache"] = self.cache
        if self.processes is not None:
            found["processes"] = self.processes
        return found

    def line(self) -> str:
        """Return one line for people: what was compressed, by what, with which data, how well."""
        got, error = self.achieved, self.error()
        strength = []
        if got.get("bits") is not None:
            shown = f" ({got['bits_stored']:.3g} stored)" if got.get("bits_stored") else ""
            strength.append(f"{got['bits']:.3g} bits{shown}")
        if self.recipe.get("bits") is None or self.recipe.get("sparsity") is not None:
            strength.append(f"{got['sparsity']:.2%} removed")
        if self.recipe.get("act_bits") is not None:
            how = "dynamic" if self.recipe.get("act_dynamic", True) else "static"
            strength.append(f"{how} {self.recipe['act_bits']}-bit inputs")
        if self.recipe.get("kv_bits") is not None:
            strength.append(f"{self.recipe['kv_bits']}-bit keys and values")
        if self.execution is not None:
            done, kept = self.execution["layers_packed"], self.execution["layers_dense"]
            strength.append(f"{done} of {done + kept} layers packed")
        data = "no data"
        if self.calibration:
            c = self.calibration
            names = "+".join(s["source"] for s in c["sources"]) or "a given set"
            data = f"{names} ({c['nsamples']} x {c['seqlen']} tokens, {c['calib_id'][:12]})"
        what = f"{len(self.layers)} layers"
        if self.structure is not None:
            what = _shortly(self.structure["removed"])
        parts = [
            f"{self.recipe['method']}: {what}, {', '.join(strength)}",
            f"calibrated on {data}",
        ]
        for kind, label in (("calibration", "layer error"), ("heldout", "held out")):
            if error[kind] and "median" in error[kind]:
                parts.append(f"{label} {error[kind]['median']:.4f}")
            elif error[kind]:
                label = label.replace("layer error", "error of the last hidden state")
                parts.append(f"{label} {error[kind]['last_hidden']:.4f}")
        loaded = ""
        if self.cache is not None and self.cache["hit"]:
            loaded = f" (loaded; compressing took {self.cache['seconds_saved']:.1f} s)"
        parts.append(f"{sum(self.seconds.values()):.1f} s{loaded}")
        parts.append(f"key {self.key[:12]}")
        if self.warnings:
            parts.append(f"{len(self.warnings)} warning(s)")
        return "; ".join(parts)

    def table(self) -> dict[str, Any]:
        """Return the content of the side file: the key, every layer, every matrix left dense.

        Nothing in it depends on when or how fast it was made: a repeated run writes the same, but
        for the timings of packed layers.
        """
        return {
            "key": self.key,
            "layers": [
                {k: v for k, v in asdict(row).items() if k not in _BY_THE_CLOCK}
                for row in self.layers
            ],
            "left_dense": [{"name": name, "why": why} for name, why in self.left_dense],
            "transforms": self.transforms,
        } | ({} if self.structure is None else {"structure": self.structure})

    def write(self, folder: Path) -> Path:
        """Write the side file atomically; its name holds the key, its hash goes in the summary."""
        content = self.table()
        # A part of the content's own digest: runs that differ (other hardware, errors measured on
        # other data) never overwrite each other.
        path = folder / f"layers-{self.key[:16]}-{digest(content)[:8]}.json"
        write_text(path, canonical_json(content) + "\n")
        self.report_file, self.report_sha256 = str(path), file_digest(path)
        return path


def _shortly(removed: list[str], limit: int = 4) -> str:
    """Return what was removed, the first few by name."""
    more = f" and {len(removed) - limit} more" if len(removed) > limit else ""
    return f"without {', '.join(removed[:limit])}{more}" if removed else "nothing removed"


def _rounded(value: float, digits: int = 6) -> float:
    """Round to significant digits, which keeps small errors readable."""
    if value == 0 or not math.isfinite(value):
        return value
    return round(value, digits - 1 - math.floor(math.log10(abs(value))))
