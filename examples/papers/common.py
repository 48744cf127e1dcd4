"""What the files of this folder share: arguments, texts, one model loaded once, a report.

Small settings are the default: a model that comes with a package, the text of this project (its
documents and its own code), few and short sequences; a minute or three on two cores, offline. They
show the shape of a result and no number of a paper. `--paper-settings` takes what is known of the
paper's own (see `--paper-settings --plan`); options that are typed win over both.
"""

from __future__ import annotations

import argparse
import atexit
import copy
import math
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_calib_plugin.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NOT_STATED = "not stated in what we could read"


@dataclass(frozen=True)
class Paper:
    """A paper: link, options that stand for its settings, further words, and commands.

    ``commands`` gives whole `lm-calib` command lines for the paper's settings, where a leaderboard
    or a diagnosis does all of it; else the file itself runs with ``settings``.
    """

    arxiv: str
    settings: Mapping[str, Any]
    notes: Sequence[str] = ()
    commands: Callable[[argparse.Namespace], list[list[str]]] | None = None
    extra: Callable[[argparse.ArgumentParser], object] | None = None
    small: Mapping[str, Any] = field(default_factory=dict)


class Study:
    """One run: what was typed, the texts, the model, and what came out."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        own = _own_texts() if None in (given.text, given.other) else {}
        self.text = given.text or own["prose"]
        self.other = given.other or own["code"]

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from lm_calib_plugin.loading import Loading, load_model

        given = self.given
        return load_model(Loading(given.pretrained, dtype=given.dtype, device=given.device))

    @property
    def model(self) -> Any:
        """The dense model."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self._loaded[1]

    @cached_property
    def runtime(self) -> Any:
        """Where and how: on this machine, with progress bars unless --quiet."""
        from lm_calib_plugin import Runtime

        return Runtime(progress=not self.given.quiet)

    def drawn(self, expression: str, seed: int = 0, fold: str = "choose", count: int = 0) -> Any:
        """Return the sequences of a text; judged on are documents that nothing is chosen from."""
        from lm_calib_plugin.diagnostics.texts import draw_text, text_recipe

        size = self._size(seed, fold) | ({"nsamples": count} if count else {})
        recipe = text_recipe(expression, size)
        return draw_text(recipe, self.model, self.tokenizer, self.runtime)

    def judged_on(self, expression: str) -> Any:
        """Return held-out sequences of a text."""
        return self.drawn(expression, 1, "judge", self.given.eval_samples).sequences

    def compressed(self, seed: int = 0, model: Any = None, **fields: Any) -> Any:
        """Return a compressed twin of the model, by fields of a recipe.

        A finished set may be given as ``calibration_set``.
        """
        from lm_calib_plugin import Recipe, compress

        chosen = fields.pop("calibration_set", None)
        if "calibration" in fields:
            fields = {**self._size(seed, "choose"), **fields}
        twin = copy.deepcopy(self.model if model is None else model)
        compress(twin, self.tokenizer, Recipe(**fields), self.runtime, chosen)
        return twin

    def nll(self, model: Any, sequences: Any) -> list[Any]:
        """Return nats of every token, by sequence."""
        from lm_calib_plugin.diagnostics.scoring import nll_of

        return nll_of(model, sequences, progress=not self.given.quiet)

    def perplexity(self, model: Any, sequences: Any) -> float:
        """Return exp of the mean NLL over all tokens."""
        import torch

        return math.exp(min(float(torch.cat(self.nll(model, sequences)).mean()), 700.0))

    def show(self, title: str, findings: Sequence[str], tables: Sequence[Any]) -> None:
        """Print the report, and write it where --out says."""
        from lm_calib_plugin.diagnostics.document import Document, Section

        given = self.given
        facts = {
            "model": given.pretrained,
            "text": self.text,
            "other text": self.other,
            "calibration": f"{given.nsamples} x {given.seqlen} tokens",
            "judged on": f"{given.eval_samples} sequences of documents held out",
        }
        sections = [Section(name, (), [table]) for name, table in tables]
        data = {
            "facts": facts,
            "findings": list(findings),
            "tables": {n: {"head": t.head, "rows": t.rows} for n, t in tables},
        }
        report = Document(title, findings, facts, sections, data)
        print(report.text())
        if given.out:
            report.write(Path(given.out), Path(sys.argv[0]).stem or "paper")

    def command(self, *words: Any) -> None:
        """Run an `lm-calib` command; end with its exit code when it fails."""
        run([str(word) for word in words])

    def model_words(self) -> list[str]:
        """Return how the model is named on a command line."""
        given = self.given
        device = ["--device", given.device] if given.device else []
        quiet = ["--quiet"] if given.quiet else []
        out = ["--out", given.out] if given.out else []
        return ["--pretrained", given.pretrained, "--dtype", given.dtype, *device, *quiet, *out]

    def text_words(self) -> list[str]:
        """Return how the text of a diagnosis is given on a command line."""
        given = self.given
        return ["--text", self.text, "--text-samples", str(given.eval_samples),
                "--text-length", str(given.seqlen)]  # fmt: skip

    def recipe_words(self, **fields: Any) -> list[str]:
        """Return a recipe as it is typed."""
        words = []
        if "calibration" in fields:
            fields = {**self._size(0, "choose"), **fields}
        for name, value in fields.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        return words

    def _size(self, seed: int, fold: str) -> dict[str, Any]:
        given = self.given
        return {
            "nsamples": given.nsamples,
            "seqlen": given.seqlen,
            "calib_seed": seed,
            "pack": "concat",
            "fold": fold,
        }


def main(
    about: str, paper: Paper, small: Callable[[Study], None], words: Sequence[str] | None = None
) -> None:
    """Read the arguments and run; bad ones end with a short message."""
    parser = _parser(about, paper)
    given = parser.parse_args(words)
    if given.paper_settings:
        parser.set_defaults(**paper.settings)
        given = parser.parse_args(words)
    commands = paper.commands(given) if paper.commands and given.paper_settings else []
    if given.plan:
        print(_plan(paper, given, commands))
        return
    try:
        if commands:
            for command in commands:
                run(command)
        else:
            small(Study(given))
    except UserError as error:
        sys.exit(f"error: {error}")


def run(words: Sequence[str]) -> None:
    """Run an `lm-calib` command in a process of its own; end with its exit code when it fails."""
    print("$ " + shlex.join(["lm-calib", *words]), flush=True)
    done = subprocess.run([sys.executable, "-m", "lm_calib_plugin", *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def leaderboard(name: str) -> list[list[str]]:
    """Return the commands that measure and report a grid of examples/leaderboards."""
    grid = str(ROOT / "examples" / "leaderboards" / name)
    return [["leaderboard", "run", grid], ["leaderboard", "report", grid]]


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> Any:
    """Return a table that is printed whole."""
    from lm_calib_plugin.diagnostics.document import Table

    return Table(head, rows, caption, shown=len(rows))


def _parser(about: str, paper: Paper) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained", default="builtin:smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device")
    parser.add_argument("--text", metavar="EXPR", help="default: documents of this project")
    parser.add_argument("--other", metavar="EXPR", help="another kind; default: its own code")
    parser.add_argument("--nsamples", type=int, default=8, help="calibration sequences")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens of each")
    parser.add_argument("--eval-samples", type=int, default=8, help="sequences judged on")
    parser.add_argument("--out", metavar="DIR", help="folder for the report")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("--paper-settings", action="store_true", help="the paper's, as known")
    parser.add_argument("--plan", action="store_true", help="say what would be done, and stop")
    if paper.extra is not None:
        paper.extra(parser)
    parser.set_defaults(**paper.small)
    return parser


def _plan(paper: Paper, given: argparse.Namespace, commands: Sequence[Sequence[str]]) -> str:
    lines = [f"https://arxiv.org/abs/{paper.arxiv}"]
    lines += [shlex.join(["lm-calib", *words]) for words in commands]
    if not commands:
        shown = {n: v for n, v in vars(given).items() if n not in ("plan", "paper_settings")}
        lines += [f"{name} = {value}" for name, value in shown.items() if value is not None]
    if given.paper_settings:
        lines += [f"# {note}" for note in (*paper.notes, "What is not named here is our choice.")]
    return "\n".join(lines)


def _own_texts() -> dict[str, str]:
    """Write prose and code of this project as files of documents; return their expressions."""
    folder = Path(tempfile.mkdtemp(prefix="lm-calib-papers-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    prose = [
        part.strip()
        for page in pages
        for part in page.read_text(encoding="utf-8").split("\n\n")
        if len(part.strip()) > 200 and not part.lstrip().startswith(("|", "```", "    "))
    ]
    sources = sorted((ROOT / "lm_calib_plugin").rglob("*.py"))
    code = [
        "\n\n".join(source.read_text(encoding="utf-8").replace("\n\n\n", "\n\n").split("\n\n")[:12])
        for source in sources
    ]
    found = {}
    for name, parts in (("prose", prose), ("code", code)):
        path = folder / f"{name}.txt"
        path.write_text("\n\n\n".join(part for part in parts if part), encoding="utf-8")
        found[name] = f"file:{path}"
    return found
