"""``lm-calib inspect``: what an exported folder or an archive is, and whether it is whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_calib_plugin.drawing.words import one_line
from lm_calib_plugin.errors import CalibError
from lm_calib_plugin.export import file_list
from lm_calib_plugin.export.bitmask import ARCHIVE
from lm_calib_plugin.export.file_list import Record
from lm_calib_plugin.export.records import MODEL, Summary, read_summary, verify_folder

_HEAD = 12  # characters of a digest that are shown


@dataclass(frozen=True)
class Look:
    """What was found.

    Parameters
    ----------
    record
        List of the files of the folder or archive.
    summary
        What the folder says of itself; None for an archive.
    whole
        Whether every byte is as it was written; None: not looked at.
    problem
        What is wrong, empty when nothing is.
    """

    record: Record
    summary: Summary | None
    whole: bool | None
    problem: str = ""

    def table(self) -> str:
        """Return lines for people."""
        record = self.record
        size = f"{len(record.files) + 1} files, {record.bytes / 2**20:.1f} MiB"
        rows = [("folder", f"{record.folder} ({size})")]
        if self.summary is None:
            rows.append(("archive", _archived(record.facts)))
        else:
            rows += _rows(self.summary)
        said = {True: "yes, every byte is as it was written", False: f"no: {self.problem}"}
        rows.append(("whole", said.get(self.whole, "not looked at")))
        rows += [("note", note) for note in record.notes]
        return "\n".join(f"{name:<12} {one_line(text)}" for name, text in rows if text)

    def plain(self) -> dict[str, Any]:
        """Return plain values for programs."""
        kind = "archive" if self.summary is None else "model"
        found: dict[str, Any] = {
            "kind": kind,
            "folder": str(self.record.folder),
            "bytes": self.record.bytes,
            "files": sorted(self.record.files),
            "facts": self.record.facts,
            "written_by": self.record.version,
            "whole": self.whole,
            "problem": self.problem or None,
            "notes": list(self.record.notes),
        }
        if self.summary is not None:
            found["recipe"] = self.summary.recipe
            found["calibration"] = self.summary.calibration
            report = self.summary.report or {}
            found["report"] = {k: v for k, v in report.items() if k != "table"}
        return found


def look(folder: Path, *, verify: bool = True, progress: bool = True) -> Look:
    """Read what a folder says of itself and, with ``verify``, every byte of it.

    Raises
    ------
    UserError
        When it is neither an exported folder nor an archive, or a newer version wrote it.
    CalibError
        When what it says of itself can not be read.
    """
    archive = (folder / ARCHIVE.file).exists()
    kind = ARCHIVE if archive else MODEL
    record = file_list.read_list(folder, kind)
    whole, problem = None, ""
    if verify:
        try:
            if archive:
                record = file_list.verify(folder, ARCHIVE, progress=progress)
            else:
                record = verify_folder(folder, progress=progress)
            whole = True
        except CalibError as error:
            whole, problem = False, str(error)
    summary = None
    if not archive:
        try:
            summary = read_summary(folder)
        except CalibError as error:
            summary = Summary(record, None, None, None, None)
            whole, problem = False, problem or str(error)
    return Look(record, summary, whole, problem)


def _rows(summary: Summary) -> list[tuple[str, str]]:
    facts, report = summary.record.facts, summary.report or {}
    check = _dict(facts.get("check"))
    loaded = "not done"
    if check:
        loaded = f"not done ({check.get('why')}), {check.get('tensors')} tensors equal on disk"
        if check.get("loaded", True):
            loaded = (
                f"{check.get('tensors')} tensors equal, logits differ by "
                f"{check.get('logits_difference')} (transformers {check.get('transformers')})"
            )
    versions = _dict(report.get("versions"))
    return [
        ("base", str(facts.get("base_model") or "not named")),
        ("method", _method(summary)),
        ("layers", _layers(report)),
        ("calibration", _calibration(summary)),
        ("error", _error(_dict(report.get("error")))),
        ("format", str(facts.get("format") or "not named")),
        ("key", str(facts.get("key") or "")),
        ("weights", str(facts.get("weights_digest") or "")),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
        ("loaded back", loaded),
    ]


def _method(summary: Summary) -> str:
    report = summary.report or {}
    recipe = _dict(report.get("recipe")) or summary.recipe or {}
    got = _dict(report.get("achieved"))
    parts = [str(recipe.get("method") or "not known")]
    if isinstance(got.get("bits"), float) and recipe.get("bits") is not None:
        parts.append(f"{got['bits']:.3g} bits")
    if isinstance(got.get("bits_stored"), float):
        parts.append(f"{got['bits_stored']:.3g} with scales")
    if isinstance(got.get("sparsity"), float):
        parts.append(f"{got['sparsity']:.2%} zeros")
    if recipe.get("act_bits") is not None:
        parts.append(f"{recipe['act_bits']}-bit inputs")
    return ", ".join(parts)


def _layers(report: dict[str, Any]) -> str:
    removed = report.get("removed")
    if isinstance(removed, list):
        return f"{len(removed)} parts taken out"
    if "layers" not in report:
        return ""
    return f"{report['layers']} compressed, {report.get('left_dense')} left dense"


def _calibration(summary: Summary) -> str:
    found = summary.calibration
    if found is None:
        return "no data"
    sources = found.get("sources")
    named = sources if isinstance(sources, list) else []
    names = "+".join(str(_dict(source).get("source")) for source in named)
    return (
        f"{names or 'a given set'} ({found.get('nsamples')} x {found.get('seqlen')} tokens, "
        f"{str(found.get('calib_id'))[:_HEAD]})"
    )


def _error(error: dict[str, Any]) -> str:
    said = []
    for kind in ("calibration", "heldout"):
        found = _dict(error.get(kind))
        said += [
            f"{kind} {name.replace('_', ' ')} {found[name]}"
            for name in ("median", "worst", "last_hidden")
            if name in found
        ]
    return ", ".join(said)


def _archived(facts: dict[str, Any]) -> str:
    model, packed = _dict(facts.get("model")), _dict(facts.get("packed"))
    return (
        f"of {model.get('base_model')}, {len(packed)} files of bit masks, key "
        f"{str(model.get('key'))[:_HEAD]}; lm-calib unpack gives the folder back"
    )


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
