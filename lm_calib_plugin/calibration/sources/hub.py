"""``hf:ORG/NAME[:config][:split][:column]``: a data set of the Hugging Face hub, or a local one.

A hub data set is streamed at a revision that is looked up first and recorded. A local folder of
data files, or one made with ``save_to_disk``, is read in place: ``hf:./folder[:config]...``.
Named corpora (``c4``, ``wikitext2``...) are short names of such sources.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm_calib_plugin.calibration.options import ARGUMENT, Option
from lm_calib_plugin.calibration.sources import hub_access
from lm_calib_plugin.calibration.sources.base import Context, Document, Source, visiting_order
from lm_calib_plugin.calibration.sources.text_files import missing_column, text_of
from lm_calib_plugin.errors import CalibError, UserError

SHAPE = "hf:ORG/NAME[:config][:split][:column]"
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Rows of these are lines rather than documents: only joined they make a text.
_LINES = frozenset({"Salesforce/wikitext", "wikitext"})


class HubDataset(Source):
    """Text of one column of one split of a data set."""

    name = "hf"
    options = {
        "revision": Option(),
        "buffer": Option("whole", default=10_000, lowest=1),
    }

    def __init__(self, argument: str = "", options: Any = ()) -> None:
        super().__init__(argument, options)
        parts = [*argument.split(":"), "", "", ""]
        self.path = parts[0]
        self.config, self.split, self.column = (parts[1] or None, parts[2] or "train", parts[3])
        self.columns: tuple[str, ...] = (self.column or "text",)
        self.pinned: str | None = None
        self.files = ""
        self.keep: tuple[str, tuple[str, ...]] | None = None
        self.default_pack = "concat" if self.path in _LINES else "longdoc"
        self._facts: dict[str, Any] = {}

    @property
    def local(self) -> Path | None:
        """The folder meant, when the name is a path; it may not exist."""
        path = Path(self.path).expanduser()
        return path if path.is_dir() or self.path.startswith((".", "/", "~")) else None

    def validate(self) -> None:
        """Check the shape of the name, and that a local folder is there."""
        if self.argument.count(":") > 3 or not self.path:
            raise UserError(ARGUMENT, f"got hf:{self.argument}", f"{SHAPE} is needed")
        if self.local is not None:
            if self.local.is_file():
                raise UserError(
                    ARGUMENT, f"{self.path} is a file", "hf: names a folder", f"file:{self.path}"
                )
            if not self.local.is_dir():
                raise UserError(
                    ARGUMENT, f"no folder {self.path!r}", f"a local data set folder, or {SHAPE}"
                )
        elif not _NAME.fullmatch(self.path):
            raise UserError(ARGUMENT, f"got hf:{self.argument}", f"{SHAPE} is needed")

    def documents(self, context: Context) -> Iterator[Document]:
        """Yield rows; a stream is shuffled in a buffer of ``?buffer=`` rows.

        The index of a document of a shuffled stream is its place in that stream, which
        revision, seed and buffer fix.
        """
        self.validate()
        dataset, streaming = self._open()
        self._facts = {"licence": licence_of(dataset), **self._facts, "streamed": streaming}
        self._check_column(dataset)
        if not streaming:
            self._facts["documents_held"] = len(dataset)
            for index in visiting_order(len(dataset), context):
                yield from self._document(dataset[index], index)
            return
        if context.order == "shuffled":
            buffer = self.settings["buffer"]
            self._facts["buffer"] = buffer
            dataset = dataset.shuffle(seed=context.seed % 2**32, buffer_size=buffer)
        index = -1
        try:
            for index, row in enumerate(dataset):
                yield from self._document(row, index)
        except hub_access.connection_errors() as error:
            raise CalibError(
                f"hf:{self.path}: the stream broke after {index + 1} rows ({error}); run again, "
                "or use a local copy: calibration=file:PATH."
            ) from error

    def provenance(self) -> dict[str, Any]:
        """Revision or data set fingerprint, license as the data set states it, and access."""
        return dict(self._facts)

    def _open(self) -> tuple[Any, bool]:
        """Return the split and whether it is a stream."""
        import datasets

        if self.local is not None:
            with hub_access.explained(self.path, self.config, self.split):
                dataset = hub_access.open_local(self.local, self.config, self.split)
            self._facts = {"fingerprint": getattr(dataset, "_fingerprint", None)}
            return dataset, False
        answer = hub_access.look_up(self.path, self.settings["revision"], self.pinned, self.name)
        if answer is None:  # offline, but an earlier download is there
            with hub_access.explained(self.path, self.config, self.split):
                dataset = datasets.load_dataset(self.path, self.config, split=self.split)
            self._facts = {"fingerprint": getattr(dataset, "_fingerprint", None), "cached": True}
            return dataset, False
        with hub_access.explained(self.path, self.config, self.split):
            if self.files:
                place = f"hf://datasets/{self.path}@{answer.revision}/{self.files}"
                stream = datasets.load_dataset(
                    "json", data_files=place, split=self.split, streaming=True
                )
            else:
                stream = datasets.load_dataset(
                    self.path,
                    self.config,
                    split=self.split,
                    streaming=True,
                    revision=answer.revision,
                )
        self._facts = {"fingerprint": answer.revision, "licence": answer.licence}
        return stream, True

    def _check_column(self, dataset: Any) -> None:
        names = dataset.column_names
        for column in self.columns if names else ():
            if column not in names:
                raise missing_column(column, list(names), f"hf:{self.path}")

    def _document(self, row: Any, index: int) -> Iterator[Document]:
        """Give the row as a document, or nothing when it is none of those kept."""
        if self.keep is not None and row.get(self.keep[0]) not in self.keep[1]:
            return
        yield Document(index, text_of(row, self.columns, f"hf:{self.path}, row {index}"))


def licence_of(dataset: Any) -> str | None:
    """Return the license that a data set states about itself, or None."""
    return getattr(getattr(dataset, "info", None), "license", None) or None
