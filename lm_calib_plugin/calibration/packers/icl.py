"""``icl``: several whole examples a row, as a prompt with solved examples has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_calib_plugin.calibration.packers import base
from lm_calib_plugin.calibration.packers.base import Packed, Packer, too_few
from lm_calib_plugin.calibration.sources.base import Context, Document
from lm_calib_plugin.calibration.tokens import encode

EXAMPLES = 4
BETWEEN = "\n\n"


@dataclass
class _Row:
    """Examples that fit together, their ids, and whether the only one had to be cut."""

    ids: list[int] = field(default_factory=list)
    examples: list[Document] = field(default_factory=list)
    cut: bool = False


class InContext(Packer):
    """``icl_examples`` documents a row, joined by a blank line (arXiv 2410.07461).

    A row ends earlier when the next example does not fit any more; that one begins the next row.
    An example is cut only when it is longer than ``seqlen`` alone.
    """

    order = "shuffled"

    def __init__(self, icl_examples: int = EXAMPLES) -> None:
        self.examples = icl_examples

    def pack(self, documents: Iterable[Document], context: Context, joiner: str) -> Packed:
        """Fill rows until there are enough."""
        tally = {"seen": 0, "empty": 0}
        rows: list[_Row] = []
        for row in self._rows(documents, context, tally):
            rows.append(row)
            if len(rows) == context.count:
                break
        if len(rows) < context.count:
            raise too_few(len(rows), tally["seen"], context, "or give more documents")
        return Packed(
            [row.ids for row in rows],
            [[example.number for example in row.examples] for row in rows],
            tally["seen"],
            truncated=sum(row.cut for row in rows),
            facts={
                "icl_examples": self.examples,
                "rows_with_fewer": sum(len(row.examples) < self.examples for row in rows),
                "empty": tally["empty"],
            },
        )

    def windows(self, texts: Sequence[str], context: Context, joiner: str) -> int:
        """Count the rows that the texts fill, the last one included."""
        documents = (Document(i, text) for i, text in enumerate(texts))
        return sum(1 for _ in self._rows(documents, context, {"seen": 0, "empty": 0}))

    def _rows(
        self, documents: Iterable[Document], context: Context, tally: dict[str, Any]
    ) -> Iterator[_Row]:
        row = _Row()
        for document in documents:
            tally["seen"] += 1
            if not document.text.strip():
                tally["empty"] += 1
                if tally["empty"] == base.PATIENCE:
                    break
                continue
            ids = self._ids([*row.examples, document], context)
            if len(ids) > context.seqlen and row.examples:
                yield row
                row = _Row()
                ids = self._ids([document], context)
            row.examples.append(document)
            row.ids, row.cut = ids[: context.seqlen], len(ids) > context.seqlen
            if row.cut or len(row.examples) == self.examples:
                yield row
                row = _Row()
        if row.examples:
            yield row

    def _ids(self, examples: Sequence[Document], context: Context) -> list[int]:
        text = BETWEEN.join(example.text.strip() for example in examples)
        return encode(context.tokenizer, text, special=True)
