"""What a finished run says of its layers: files are checked, never believed, never executed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_calib_plugin.diagnostics.layers.rows import read_recipe, read_table
from lm_calib_plugin.errors import CalibError, UserError, listed
from lm_calib_plugin.export import file_list
from lm_calib_plugin.export.file_list import Record
from lm_calib_plugin.export.options import FILES
from lm_calib_plugin.export.records import CONFIG, MODEL, read_summary
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.report import LayerRow
from lm_calib_plugin.storage import digest, json_object

ARGUMENT = "run"
RESULTS, EXPORT, LAYERS = "results", "export", "layers"
_SIDE_FILE = re.compile(r"layers-([0-9a-f]+)-([0-9a-f]+)\.json")
_PACKED_ELSEWHERE = "gptq"
_ALLOWED = (
    "a results file of lm_eval for one of our model classes, a folder with one of these, an "
    "exported folder, or a layers-*.json"
)


@dataclass(frozen=True)
class Run:
    """A finished compression, as its files tell it.

    Parameters
    ----------
    place
        The file or folder that was read.
    kind
        ``results``, ``export`` or ``layers`` (the side file of a report alone).
    key
        Of the result.
    rows
        One a layer; none where whole parts were taken out.
    left_dense
        Names of matrices that were not compressed, with the reason.
    transforms, structure
        As in :class:`~lm_calib_plugin.report.Report`.
    recipe
        What was done; None where it can not be known, with ``no_recipe`` as the reason.
    calibration
        The record of the calibration set, None without data, or where nothing is told.
    pretrained, revision, subfolder, dtype, tokenizer
        The base model as the run names it, as far as it does.
    model_digest, weights_digest
        Of the dense and of the compressed model; empty where not told.
    adapters
        Whether adapters were merged into the base model.
    folder
        An exported folder that holds the compressed weights, where these can be looked at: levels
        packed for gptqmodel can not.
    warnings
        Those of the run.
    """

    place: Path
    kind: str
    key: str
    rows: list[LayerRow]
    left_dense: list[tuple[str, str]] = field(default_factory=list)
    transforms: list[dict[str, Any]] = field(default_factory=list)
    structure: dict[str, Any] | None = None
    recipe: Recipe | None = None
    no_recipe: str = ""
    calibration: dict[str, Any] | None = None
    pretrained: str | None = None
    revision: str | None = None
    subfolder: str = ""
    dtype: str | None = None
    tokenizer: str | None = None
    model_digest: str = ""
    weights_digest: str = ""
    adapters: bool = False
    folder: Path | None = None
    warnings: tuple[str, ...] = ()

    @property
    def calib_id(self) -> str | None:
        """Identity of the calibration set."""
        found = (self.calibration or {}).get("calib_id")
        return found if isinstance(found, str) else None


def read_run(place: str | Path) -> Run:
    """Read what a run left behind; no model and no data is loaded.

    Parameters
    ----------
    place
        A results file, a folder that holds exactly one, an exported folder, or the side file of a
        report alone.

    Raises
    ------
    UserError
        When it is nothing of that kind, or the side file is not there.
    CalibError
        When a side file, or a file of an exported folder, is not as it was written.
    """
    path = Path(place).expanduser()
    if not path.exists():
        raise UserError(ARGUMENT, f"no file or folder {str(place)!r}", _ALLOWED)
    if path.is_dir():
        if (path / FILES).exists():
            return _exported(path)
        path = _only_one(path)
    if path.suffix != ".json":
        raise UserError(ARGUMENT, f"{path} is no JSON file", _ALLOWED)
    content = _content(path)
    if "layers" in content and "config" not in content:
        key, parts = read_table(content, path)
        _check_name(path, key, content)
        why = "a file of layers does not say how they were made"
        return Run(path, LAYERS, key, no_recipe=why, **parts)
    return _evaluated(path, content)


def _only_one(folder: Path) -> Path:
    """Return the results file of a folder, or its side file where there is no results file."""
    found = [p for p in sorted(folder.rglob("results*.json")) if _summary(_content(p)) is not None]
    found = found or [p for p in sorted(folder.glob("*.json")) if _SIDE_FILE.fullmatch(p.name)]
    if len(found) == 1:
        return found[0]
    if found:
        names = listed(str(p.relative_to(folder)) for p in found[:4])
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        raise UserError(
            ARGUMENT, f"{folder} holds {len(found)} runs", "one run", f"name one: {names}{more}"
        )
    raise UserError(ARGUMENT, f"{folder} holds no run", _ALLOWED)


def _content(path: Path) -> dict[str, Any]:
    try:
        return json_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(ARGUMENT, f"{path} can not be read ({error})", _ALLOWED) from None


def _summary(content: Mapping[str, Any]) -> dict[str, Any] | None:
    found = _dict(content.get("config")).get("compression")
    return found if isinstance(found, dict) else None


def _evaluated(path: Path, content: Mapping[str, Any]) -> Run:
    """Return the run of a results file."""
    summary = _summary(content)
    if summary is None:
        raise UserError(
            ARGUMENT,
            f"{path} holds no config.compression",
            _ALLOWED,
            "--model calib, calib_pruned and calib_quantized write it",
        )
    key, side = _text(summary, "key", path), _text(summary, "report_file", path)
    file = _side_file(path, side)
    data = file.read_bytes()
    _check_digest(file, data, _text(summary, "report_sha256", path), path.name)
    found, parts = read_table(json_object(data), file)
    if found != key:
        raise CalibError(f"{file}: expected the key {key[:12]}, found {found[:12]}.")
    recipe, why = read_recipe(_dict(summary.get("recipe")))
    arguments = _arguments(_dict(content.get("config")))
    dtype = _dict(content.get("config")).get("model_dtype")
    return Run(
        path,
        RESULTS,
        key,
        recipe=recipe,
        no_recipe=why,
        calibration=summary.get("calibration"),
        pretrained=arguments.get("pretrained"),
        revision=arguments.get("revision"),
        subfolder=arguments.get("subfolder") or "",
        dtype=str(dtype).removeprefix("torch.") if isinstance(dtype, str) else None,
        tokenizer=arguments.get("tokenizer"),
        model_digest=_text(summary, "model_digest", path),
        weights_digest=_text(summary, "weights_digest", path),
        adapters=any(name in arguments for name in ("peft", "delta")),
        folder=_kept(summary, key),
        warnings=_texts(summary.get("warnings")),
        **parts,
    )


def _exported(folder: Path) -> Run:
    """Return the run of an exported folder; the weights are not looked at yet."""
    summary = read_summary(folder)
    report, facts = summary.report, summary.record.facts
    if report is None or not isinstance(report.get("table"), dict):
        raise CalibError(f"{folder}: holds no report of its layers; export it again.")
    key, parts = read_table(report["table"], folder)
    recipe, why = read_recipe(dict(summary.recipe or {}))
    base = facts.get("base_model")
    return Run(
        folder,
        EXPORT,
        key,
        recipe=recipe,
        no_recipe=why,
        calibration=report.get("calibration"),
        # Of a local path an exported folder keeps the last part: no name to load a model by.
        dtype=_dtype(summary.record),
        pretrained=base if isinstance(base, str) and re.search("[/:]", base) else None,
        model_digest=str(facts.get("model_digest") or ""),
        weights_digest=str(facts.get("weights_digest") or ""),
        folder=folder if _readable(facts) else None,
        warnings=_texts(report.get("warnings")),
        **parts,
    )


def _dtype(record: Record) -> str | None:
    """Return the dtype of an exported model, None where its configuration names none."""
    data = file_list.read_small(record, CONFIG, MODEL)
    content = {} if data is None else json_object(data)
    found = content.get("dtype", content.get("torch_dtype"))
    return found if isinstance(found, str) else None


def _kept(summary: Mapping[str, Any], key: str) -> Path | None:
    """Return the folder that the evaluation kept its model in, where it still is."""
    exported = _dict(summary.get("exported"))
    name = exported.get("folder")
    if not isinstance(name, str) or exported.get("error") or not (Path(name) / FILES).is_file():
        return None
    facts = read_summary(name).record.facts
    return Path(name) if facts.get("key") == key and _readable(facts) else None


def _readable(facts: Mapping[str, Any]) -> bool:
    """Tell whether an exported folder gives ordinary weights once it is loaded."""
    return facts.get("format") != _PACKED_ELSEWHERE


def _side_file(results: Path, name: str) -> Path:
    """Return the side file of a results file, where it was written or beside that."""
    if not _SIDE_FILE.fullmatch(Path(name).name):
        raise UserError(ARGUMENT, f"{results} names {name!r} as its report", "a layers-*.json")
    for file in (Path(name), results.parent / Path(name).name):
        if file.is_file():
            return file
    raise UserError(
        ARGUMENT,
        f"the report of the layers is not there: {name}",
        "the file that the evaluation wrote",
        f"copy it beside {results.name}, or evaluate again with report_dir=",
    )


def _check_digest(file: Path, data: bytes, expected: str, who: str) -> None:
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise CalibError(
            f"{file}: expected sha256 {expected[:12]}, as {who} says, found {found[:12]}: it was "
            "changed or belongs to another run, and nothing of it is used. Evaluate again."
        )


def _check_name(file: Path, key: str, content: Mapping[str, Any]) -> None:
    """Compare a side file with its own name, which holds parts of its key and of its digest."""
    said = _SIDE_FILE.fullmatch(file.name)
    if said is None:
        return
    found = digest(content)
    if not (key.startswith(said[1]) and found.startswith(said[2])):
        raise CalibError(
            f"{file}: expected contents with the key {said[1]} and the digest {said[2]}, as its "
            f"name says, found {key[:16]} and {found[:8]}: it was changed, and nothing of it is "
            "used. Evaluate again."
        )


def _arguments(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the arguments of a model as texts; older files hold them as one text."""
    given = config.get("model_args")
    if isinstance(given, str):
        pairs = (part.partition("=") for part in given.split(","))
        given = {name: value for name, _, value in pairs}
    return {k: v for k, v in _dict(given).items() if isinstance(v, str) and v}


def _text(summary: Mapping[str, Any], name: str, place: Path) -> str:
    found = summary.get(name)
    if not isinstance(found, str) or not found:
        raise UserError(ARGUMENT, f"{place} has no {name} in config.compression", _ALLOWED)
    return found


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
