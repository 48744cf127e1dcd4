"""Named corpora: where each one lives, at which commit, and under which license.

The draw of a corpus is part of a result, so its revision is pinned where the commit is known;
``revision=None`` says that it is looked up and recorded when the corpus is drawn from. License
notes repeat what the data set's own page says; they are notes, not advice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lm_calib_plugin.errors import UserError

_COMMON_CRAWL = "the terms of use of Common Crawl apply too"
_WIKIPEDIA = "b04c8d1ceb2f5cd4588862100d08de323dccfbaa"


@dataclass(frozen=True)
class Corpus:
    """One row of the table.

    Parameters
    ----------
    summary
        One line.
    dataset, config, split
        Where it lives on the hub; ``{}`` in ``config`` stands for the language, the argument.
    columns
        Columns with text; several are joined by a blank line.
    revision
        Commit; None: looked up and recorded when the corpus is drawn from.
    licence
        Note on the license.
    lines
        A row is a line or a short example rather than a document: only joined they make a text.
    files
        Pattern of JSON-lines files, for a data set that describes itself with a program, which
        is never run.
    language
        Regular expression of the argument, and an example of it; empty: no argument.
    keep
        Column and the values with which a row is used; empty: every row.
    """

    summary: str
    dataset: str
    licence: str
    config: str | None = None
    split: str = "train"
    columns: tuple[str, ...] = ("text",)
    revision: str | None = None
    lines: bool = False
    files: str = ""
    language: tuple[str, str] | None = None
    keep: tuple[str, tuple[str, ...]] | None = None

    def checked_argument(self, name: str, argument: str) -> str:
        """Return the argument if this corpus takes it, else raise a :class:`UserError`."""
        if self.language is None:
            if argument:
                raise UserError(
                    "calibration",
                    f"`{name}` takes no argument, got `{argument}`",
                    fix=f"write `{name}`, or hf:{self.place()} with your own config",
                )
            return ""
        shape, example = self.language
        if not re.fullmatch(shape, argument):
            raise UserError(
                "calibration",
                f"`{name}` needs a language" + (f", got `{argument}`" if argument else ""),
                f"its code looks like `{example}`",
                f"for instance {name}:{example}",
            )
        return argument

    def place(self, argument: str = "") -> str:
        """Return ``ORG/NAME:config:split:column`` as ``hf:`` takes it."""
        config = (self.config or "").format(argument or "LANGUAGE")
        return f"{self.dataset}:{config}:{self.split}:{self.columns[0]}"


CORPORA: dict[str, Corpus] = {
    "c4": Corpus(
        "English web text, the usual choice",
        "allenai/c4",
        f"ODC-BY 1.0; {_COMMON_CRAWL}",
        "en",
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
    ),
    "wikitext2": Corpus(
        "selected Wikipedia articles, line by line",
        "Salesforce/wikitext",
        "CC BY-SA 3.0 and GFDL",
        "wikitext-2-raw-v1",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        lines=True,
    ),
    "wikipedia": Corpus(
        "English Wikipedia of November 2023",
        "wikimedia/wikipedia",
        "CC BY-SA 3.0 and GFDL",
        "20231101.en",
        revision=_WIKIPEDIA,
    ),
    "slimpajama": Corpus(
        "a sample of SlimPajama, six billion tokens",
        "DKYoon/SlimPajama-6B",
        "none stated for the sample; the parts keep their own licenses",
        "default",
        revision="b5f90f419b7489cdba26fdbc8c022fcb5562f968",
    ),
    "redpajama": Corpus(
        "a sample of RedPajama, one billion tokens",
        "togethercomputer/RedPajama-Data-1T-Sample",
        "none for the whole; the parts keep their own licenses",
        files="*_sample.jsonl",
    ),
    "fineweb": Corpus(
        "filtered English web text, a sample of ten billion tokens",
        "HuggingFaceFW/fineweb",
        f"ODC-BY 1.0; {_COMMON_CRAWL}",
        "sample-10BT",
        revision="9bb295ddab0e05d785b879661af7260fed5140fc",
    ),
    "dclm": Corpus(
        "English web text chosen by a classifier",
        "mlfoundations/dclm-baseline-1.0",
        f"CC BY 4.0; {_COMMON_CRAWL}",
        "default",
        revision="a3b142c183aebe5af344955ae20836eb34dcf69b",
    ),
    "pile": Corpus(
        "ten thousand documents of the Pile",
        "NeelNanda/pile-10k",
        "none for the whole; the parts keep their own licenses, some forbid sharing",
        "default",
        revision="127bfedcd5047750df5ccf3a12979a47bfa0bafa",
    ),
    "gsm8k": Corpus(
        "school mathematics, question and worked answer",
        "openai/gsm8k",
        "MIT",
        "main",
        columns=("question", "answer"),
        revision="cc7b047b6e5bb11b4f1af84efc572db110a51b3c",
        lines=True,
    ),
    "code": Corpus(
        "Python files under permissive licenses",
        "codeparrot/codeparrot-clean-valid",
        "that of each file; only MIT, Apache-2.0, BSD, ISC, Unlicense and CC0 files are used",
        columns=("content",),
        revision="4db92d2ec0c1b4c41eeb439cfae16854511d9dcd",
        keep=(
            "license",
            ("mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "cc0-1.0"),
        ),
    ),
    "flores": Corpus(
        "flores:LANGUAGE, translated sentences (gated: log in first), not those for testing",
        "openlanguagedata/flores_plus",
        "CC BY-SA 4.0",
        "{}",
        split="dev",
        revision="5fec6c13f9e5a4db2f745d4ec0d7c9721ddc4f06",
        lines=True,
        language=("[a-z]{3}_[A-Z][a-z]{3}(_[a-z0-9]+)?", "fra_Latn"),
    ),
    "lang": Corpus(
        "lang:LANGUAGE, Wikipedia of November 2023 in that language",
        "wikimedia/wikipedia",
        "CC BY-SA 3.0 and GFDL",
        "20231101.{}",
        revision=_WIKIPEDIA,
        lines=True,  # most articles of most languages are short
        language=("[a-z]{2,3}(-[a-z]{2,12})*", "fr"),
    ),
}
