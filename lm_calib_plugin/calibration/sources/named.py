"""Named corpora: ``c4``, ``lang:fr``; from the hub, or ``c4?path=FILE``, a copy of your own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lm_calib_plugin.calibration.options import ARGUMENT, Option
from lm_calib_plugin.calibration.sources.base import Context, Document
from lm_calib_plugin.calibration.sources.files import Files, find_files
from lm_calib_plugin.calibration.sources.hub import HubDataset
from lm_calib_plugin.calibration.sources.text_files import READERS
from lm_calib_plugin.corpora import CORPORA
from lm_calib_plugin.errors import UserError, listed


class NamedCorpus(HubDataset):
    """A row of :data:`~lm_calib_plugin.corpora.CORPORA`.

    Parameters
    ----------
    corpus
        Its name.
    argument
        The language, where the corpus has one.
    options
        ``revision`` and ``buffer`` as of ``hf:``; ``path``, ``column`` and ``split`` for a copy.
    """

    options = {**HubDataset.options, "path": Option(), "column": Option(), "split": Option()}

    def __init__(self, corpus: str, argument: str, options: Iterable[tuple[str, str]]) -> None:
        row = CORPORA[corpus]
        # The class attribute is what messages about options call the source.
        self.name = corpus  # type: ignore[misc]
        super().__init__(row.place(row.checked_argument(corpus, argument)), options)
        self.corpus, self.row, self.language = corpus, row, argument
        self.columns = row.columns
        self.pinned, self.files, self.keep = row.revision, row.files, row.keep
        self.default_pack = "concat" if row.lines else "longdoc"
        if self.settings["column"] is not None:
            self.columns = (self.settings["column"],)
        self.copy = self.settings["path"]
        self._files: Files | None = None

    def validate(self) -> None:
        """Check that a local copy is there; a corpus of the hub is only asked for when drawn."""
        if self.copy is not None:
            find_files(self._copy_path())
        elif self.settings["column"] is not None or self.settings["split"] is not None:
            name = "column" if self.settings["column"] is not None else "split"
            raise UserError(
                ARGUMENT,
                f"`{name}` of `{self.corpus}` belongs to a local copy",
                fix=f"{self.corpus}?path=FILE&{name}=..., or drop it",
            )

    def documents(self, context: Context) -> Iterator[Document]:
        """Yield documents of the local copy if one is named, else of the hub."""
        if self.copy is None:
            yield from super().documents(context)
            return
        split = self.settings["split"]
        self._files = Files(self._copy_path(), (("split", split),) if split else ())
        self._files.columns = self.columns
        yield from self._files.documents(context)

    def provenance(self) -> dict[str, Any]:
        """Name, license note, and what identifies the content: a commit, or a file digest."""
        facts = super().provenance()
        if self._files is not None:
            facts = self._files.provenance() | {"local_copy": True}
        named = {"corpus": self.corpus, "dataset": self.row.dataset}
        return named | facts | {"licence": self.row.licence}

    def _copy_path(self) -> str:
        """Return the file or folder meant; of a folder by language the part of this language."""
        folder = Path(self.copy).expanduser()
        if not self.language or not folder.is_dir():
            return str(self.copy)
        places = [folder / self.language, *(folder / f"{self.language}{end}" for end in READERS)]
        for place in places:
            if place.exists():
                return str(place)
        there = sorted(
            p.stem for p in folder.iterdir() if p.suffix.lower() in READERS or p.is_dir()
        )
        raise UserError(
            ARGUMENT,
            f"{self.corpus}:{self.language}: nothing of that language in {self.copy!r} "
            f"(there: {listed(there[:20]) or 'nothing'})",
            f"{self.language}.txt, {self.language}.jsonl or a folder {self.language} is looked for",
        )
