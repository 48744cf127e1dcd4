"""A calibration set as a folder that can be published: ids, record, preview, card.

Same arguments, same bytes: nothing that depends on when or how fast the set was made is written.
The names of the files are fixed here and never read from a file; every changed byte is noticed.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from lm_calib_plugin.calibration.options import ARGUMENT
from lm_calib_plugin.errors import CalibError, UserError, listed
from lm_calib_plugin.storage import (
    check_record,
    json_object,
    new_folder,
    own_version,
    record_text,
    require_space,
)

if TYPE_CHECKING:
    from lm_calib_plugin.calibration.calibration_set import CalibrationSet

FORMAT = "lm-calib-plugin calibration set"
FORMAT_VERSION = 1
RECORD, TOKENS, PREVIEW, CARD = "calibration.json", "tokens.safetensors", "preview.txt", "README.md"
PREVIEWED = 300  # characters of every sequence
INT32 = 1 << 31
_COSTS = ("seconds", "per_second")  # endings of names that tell what the making cost
_AGAIN = "download it again, or make it again with lm-calib calibrate"


def write_set(
    drawn: CalibrationSet,
    folder: Path,
    *,
    tokenizer: Any = None,
    vocab_size: int | None = None,
    factors: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a set to a folder, which appears whole or not at all.

    Parameters
    ----------
    tokenizer
        Decodes the preview; without one it shows ids.
    vocab_size
        Rows of the embedding table that the set was made for.
    factors
        The arguments that made the set, as plain values.
    overwrite
        Replace another calibration set that is there.

    Raises
    ------
    UserError
        When something is there already (with ``overwrite``: something other than a set).
    """
    if folder.exists() or folder.is_symlink():
        may_replace(folder, overwrite=overwrite)
    tokens = _packed(drawn, vocab_size)
    require_space(folder.parent, len(tokens) + 4096 * len(drawn.sequences) + 65536, folder.name)
    with new_folder(folder, replace=overwrite) as temporary:
        contents = {
            TOKENS: tokens,
            PREVIEW: _preview(drawn, tokenizer).encode(),
            CARD: _card(drawn).encode(),
        }
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **describe(drawn, vocab_size=vocab_size, factors=factors),
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        }
        for name, data in contents.items():
            (temporary / name).write_bytes(data)
        (temporary / RECORD).write_bytes(record_text(content).encode())


def describe(
    drawn: CalibrationSet,
    *,
    vocab_size: int | None = None,
    factors: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return all that is recorded of a set but its tokens, as plain values."""
    return {
        "lm_calib_plugin": own_version(),
        "calib_id": drawn.calib_id,
        "tokenizer": drawn.tokenizer,
        "vocab_size": vocab_size,
        "seqlen": drawn.seqlen,
        "seed": drawn.seed,
        "nsamples": drawn.nsamples,
        "tokens": drawn.tokens,
        "factors": dict(factors or {}),
        "sources": [_without_costs(source) for source in drawn.sources],
        "licences": licences(drawn.sources),
    }


def read_set(folder: Path) -> tuple[dict[str, Any], list[Tensor], list[float] | None]:
    """Read a folder back: the record, the sequences and their weights.

    Raises
    ------
    UserError
        When there is no such folder, it holds no set, or a newer version wrote it.
    CalibError
        When a file is missing or damaged; it is named, with what was expected.
    """
    content = read_record(folder)
    expected = content.get("files")
    if not isinstance(expected, dict) or set(expected) != {TOKENS, PREVIEW, CARD}:
        raise _damaged(folder / RECORD, f"expected digests of {TOKENS}, {PREVIEW}, {CARD}")
    found: dict[str, bytes] = {}
    for name in (TOKENS, PREVIEW, CARD):
        found[name] = _bytes(folder / name)
        sha256 = hashlib.sha256(found[name]).hexdigest()
        if sha256 != expected[name]:
            raise _damaged(folder / name, f"expected sha256 {expected[name]}, found {sha256}")
    try:
        return content, *_unpacked(found[TOKENS])
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise _damaged(folder / TOKENS, f"expected ids and offsets ({error})") from None


def read_record(folder: Path) -> dict[str, Any]:
    """Read ``calibration.json`` alone, checked against its own digest."""
    file = folder / RECORD
    if not folder.is_dir():
        what = f"{folder} is a file" if folder.exists() else f"no folder {str(folder)!r}"
        raise UserError(
            ARGUMENT,
            what,
            "set:DIR names a folder made by lm-calib calibrate",
            f"for instance lm-calib calibrate self --pretrained MODEL --out {folder}",
        )
    if not file.exists():
        there = sorted(path.name for path in folder.iterdir())[:6]
        raise UserError(
            ARGUMENT,
            f"{str(folder)!r} holds no {RECORD} (there: {listed(there) or 'nothing'})",
            "set:DIR names a folder made by lm-calib calibrate",
            "text files of your own: file:PATH",
        )
    text = _bytes(file)
    try:
        content = json_object(text)
    except ValueError as error:
        raise _damaged(file, str(error)) from None
    number = content.get("format_version")
    if content.get("format") != FORMAT or type(number) is not int:
        raise UserError(ARGUMENT, f"{file} is not the record of a calibration set")
    if number > FORMAT_VERSION:
        raise UserError(
            ARGUMENT,
            f"{file} is written in format {number}",
            f"this build reads up to {FORMAT_VERSION}",
            "pip install --upgrade lm-calib-plugin",
        )
    try:
        return check_record(content, text)
    except ValueError as error:
        raise _damaged(file, str(error)) from None


def damaged_identity(folder: Path, expected: str, found: str) -> CalibError:
    """Return the error of ids that do not have the name they claim."""
    return _damaged(folder / TOKENS, f"expected calib_id {expected}, found {found}")


def licences(sources: Any) -> list[str]:
    """Return ``source: note`` for every source of a set, those inside other sources too."""
    notes = []
    for source in sources:
        inner = source.get("inner") or (source.get("set") or {}).get("sources") or []
        notes += licences(inner) if inner else [f"{source['source']}: {source.get('licence')}"]
    return [note.replace(": None", ": not known to this program") for note in notes]


def _packed(drawn: CalibrationSet, vocab_size: int | None) -> bytes:
    ids = torch.cat(drawn.sequences)
    rows = max(int(ids.max()) + 1, vocab_size or 0)
    lengths = torch.tensor([0, *map(len, drawn.sequences)], dtype=torch.int64)
    tensors = {
        "ids": ids.to(torch.int32 if rows <= INT32 else torch.int64),
        "offsets": lengths.cumsum(0),
    }
    if drawn.weights is not None:
        tensors["weights"] = torch.tensor(drawn.weights, dtype=torch.float64)
    return save_tensors(tensors)


def _unpacked(data: bytes) -> tuple[list[Tensor], list[float] | None]:
    tensors = load_tensors(data)
    ids, offsets, weights = tensors["ids"], tensors["offsets"].tolist(), tensors.get("weights")
    rising = all(a < b for a, b in itertools.pairwise(offsets))
    if ids.dim() != 1 or offsets[:1] != [0] or offsets[-1] != len(ids) or not rising:
        raise ValueError("offsets do not cut the ids into sequences")
    whole = ids.to(torch.int64)
    parts = [whole[a:b].clone() for a, b in itertools.pairwise(offsets)]
    return parts, None if weights is None else weights.tolist()


def _preview(drawn: CalibrationSet, tokenizer: Any) -> str:
    owner = owners(drawn)
    lines = [f"{drawn.nsamples} sequences, {drawn.tokens} tokens, calib_id {drawn.calib_id}", ""]
    for number, ids in enumerate(drawn.sequences):
        # A token is at least one byte of at most four: no more ids than this can be shown.
        start = ids[: 4 * PREVIEWED].tolist()
        text = " ".join(map(str, start)) if tokenizer is None else decoded(tokenizer, start)
        shown = " ".join(text.split())
        more = "" if len(shown) <= PREVIEWED and len(start) == len(ids) else " ..."
        lines += [f"[{number}] {owner[number]}, {len(ids)} tokens", shown[:PREVIEWED] + more, ""]
    return "\n".join(lines)


def _card(drawn: CalibrationSet) -> str:
    rows = "\n".join(f"- {note}" for note in licences(drawn.sources))
    return f"""# Calibration set {drawn.calib_id[:12]}

{drawn.nsamples} sequences of at most {drawn.seqlen} tokens, {drawn.tokens} tokens in all, seed
{drawn.seed}, for compressing a causal language model with
[lm-calib-plugin](https://pypi.org/project/lm-calib-plugin/). `{PREVIEW}` shows the text,
`{RECORD}` says where each sequence comes from.

Use (DIR is this folder, MODEL one with the same tokenizer):

    lm_eval --model calib_pruned \\
        --model_args pretrained=MODEL,method=wanda,sparsity=0.5,calibration=set:DIR --tasks TASK

Sources and what is known of their licenses:

{rows}

calib_id: `{drawn.calib_id}`
"""


def decoded(tokenizer: Any, ids: Any) -> str:
    """Return the text of ids, special tokens left out, spaces as they are."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def owners(drawn: CalibrationSet) -> list[str]:
    """Return the source of every sequence, ``given`` where no record tells."""
    names = ["given"] * drawn.nsamples
    for source in drawn.sources:
        for row in source.get("rows", ()):
            names[row] = str(source.get("source", "given"))
    return names


def _without_costs(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_costs(v) for k, v in value.items() if not str(k).endswith(_COSTS)}
    if isinstance(value, (list, tuple)):
        return [_without_costs(v) for v in value]
    return value


def may_replace(folder: Path, *, overwrite: bool) -> None:
    """Raise unless the folder holds a set and nothing else, and may be replaced."""
    if not overwrite:
        raise UserError(
            "out", f"{folder} exists", "a new folder", "name another one, or give --overwrite"
        )
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = sorted(names - {RECORD, TOKENS, PREVIEW, CARD})
    if folder.is_symlink() or RECORD not in names or foreign:
        raise UserError(
            "out",
            f"{folder} is not only a calibration set"
            + (f" (there: {listed(foreign[:6])})" if foreign else ""),
            "--overwrite replaces nothing else",
            "name another folder",
        )


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise _damaged(file, f"cannot be read ({error.strerror})") from None


def _damaged(file: Path, what: str) -> CalibError:
    return CalibError(f"{file}: damaged: {what}; {_AGAIN}.")
