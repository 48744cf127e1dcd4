"""What a statistics bank is made of: parts, sequences, inputs, and the header that lists them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = "lm-calib-plugin statistics bank"
FORMAT_VERSION = 1
HEADER, PLAN, SETS = "bank.json", "plan.json", "sets"


@dataclass(frozen=True)
class PartRow:
    """Sequences of one source in one fold.

    Parameters
    ----------
    source
        Name of the source, as the user calls it.
    fold
        ``choose``, ``validate``, ``judge`` or ``all``.
    calib_id
        Identity of its calibration set.
    second_order
        Whether Gram matrices are kept (else diagonals and ranges only).
    groups
        Into how many groups the sequences were dealt; a Gram matrix is kept of each.
    """

    source: str
    fold: str
    calib_id: str
    second_order: bool
    groups: int = 1


@dataclass(frozen=True)
class SequenceRow:
    """One sequence: its part, its group in it, counted tokens, and its weight in its set."""

    part: int
    group: int
    tokens: int
    weight: float = 1.0


@dataclass(frozen=True)
class InputRow:
    """A distinct layer input: its name (that of its first layer), block, width, its layers."""

    name: str
    block: int
    width: int
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Header:
    """Everything about a bank but the numbers.

    ``files`` maps a block number (as text) to name and sha256 of its file.
    """

    model: str
    tokenizer: str
    exclude_first_token: bool
    parts: tuple[PartRow, ...]
    sequences: tuple[SequenceRow, ...]
    inputs: tuple[InputRow, ...]
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Header:
        """Read plain values back; KeyError or TypeError when they are not a header."""
        return cls(
            model=content["model"],
            tokenizer=content["tokenizer"],
            exclude_first_token=content["exclude_first_token"],
            parts=tuple(PartRow(**row) for row in content["parts"]),
            sequences=tuple(SequenceRow(**row) for row in content["sequences"]),
            inputs=tuple(
                InputRow(**{**row, "layers": tuple(row["layers"])}) for row in content["inputs"]
            ),
            files=content["files"],
            seconds=content["seconds"],
        )


def cells(parts: Sequence[PartRow]) -> list[tuple[int, int]]:
    """Return every (part, group) that keeps a Gram matrix, in order."""
    return [
        (number, group)
        for number, part in enumerate(parts)
        if part.second_order
        for group in range(part.groups)
    ]


def gram_key(name: str, part: int, group: int) -> str:
    """Return the tensor name of a Gram matrix in a block file."""
    return f"{name}.gram.{part}.{group}"
