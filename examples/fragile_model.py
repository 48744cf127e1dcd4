"""Make a model that is fragile on purpose: it computes the same, and is hard to quantize.

usage: python examples/fragile_model.py OUT [--pretrained builtin:smollm2-135m] [--factor 32]

Channels of every block become outliers (scaled up where they are written, down where they are
read, by a power of two), so W8A8 with one calibrated range a tensor breaks, while ranges for each
token and SmoothQuant mend. The folder says that it is synthetic: README.md, and
`lm_calib_synthetic` in config.json. See lm_calib_plugin.diagnostics.outliers; it runs without a
model hub.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lm_calib_plugin.diagnostics.document import check_out
from lm_calib_plugin.diagnostics.outliers import CHOICES, FEEDS, NOTE, inject_outliers
from lm_calib_plugin.diagnostics.texts import draw_text, text_recipe
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.loading import Loading, load_model

TEXTS = Path(__file__).resolve().parents[1] / "tasks" / "calib_demo"
README = """# Fragile on purpose: {name}

{note}

Made from `{name}` by `examples/fragile_model.py`: choose={choose}, feeds={feeds},
factor={factor:g}. Largest difference of logits, before and after, over the largest logit:
{difference:.2g}.

| source | channels | factors | range of the tensor, times |
| --- | --- | --- | --- |
{rows}
"""


def options() -> argparse.Namespace:
    """Return what was typed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="folder of the model; made")
    parser.add_argument("--pretrained", default="builtin:smollm2-135m")
    parser.add_argument("--factor", type=float, default=32.0, help="a power of two")
    parser.add_argument("--channels", type=int, default=1, help="of each source")
    parser.add_argument("--choose", default="bursty", help=", ".join(CHOICES))
    parser.add_argument("--feeds", default="norm", help=", ".join(FEEDS))
    parser.add_argument(
        "--text", default=f"file:{TEXTS}/prose_test.jsonl", help="what channels are chosen on"
    )
    parser.add_argument(
        "--against", default=f"file:{TEXTS}/code_test.jsonl", help="the other, choose=specific"
    )
    parser.add_argument("--nsamples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


def make(given: argparse.Namespace) -> str:
    """Make the folder; return a line about it."""
    out = check_out(given.out)
    assert out is not None
    if out.exists() and any(out.iterdir()):
        raise UserError("out", f"{out} is not empty", "a new folder")
    size = {"nsamples": given.nsamples, "seqlen": given.seqlen, "pack": "concat"}
    texts = [text_recipe(given.text, size)]
    if given.choose == "specific":
        texts.append(text_recipe(given.against, size, "against"))
    model, tokenizer = load_model(Loading(given.pretrained, dtype=given.dtype))
    drawn = [draw_text(text, model, tokenizer).sequences for text in texts]
    record = inject_outliers(
        model,
        given.factor,
        given.channels,
        choose=given.choose,
        feeds=given.feeds,
        text=drawn[0],
        against=drawn[-1] if given.choose == "specific" else (),
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    rows = "\n".join(
        f"| {one.source} | {one.channels} | {one.factors} | {one.widened or 1:.3g} |"
        for one in record.injected
    )
    text = README.format(name=given.pretrained, note=NOTE, rows=rows, **record.plain())
    (out / "README.md").write_text(text, encoding="utf-8")
    changed = f"{len(record.injected)} sources with outliers"
    return f"{out}: {changed}; logits differ by {record.difference:.2g}"


if __name__ == "__main__":
    try:
        print(make(options()))
    except UserError as error:
        sys.exit(f"error: {error}")
