"""Cut the calibration and evaluation windows that a set of benchmark runs shares.

Example::

    python benchmarks/tokens.py MODEL OUT.json --calib c4_train.jsonl \
        --eval wikitext2=wiki.test.raw --eval c4_val=c4_validation.jsonl

The file written is ``{"calib": [[id, ...], ...], "evals": {name: [[id, ...], ...]}}``.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path

Encoder = Callable[[str], list[int]]


def read_jsonl(path: Path, limit: int | None = None) -> list[str]:
    """Read the ``text`` field of the first `limit` lines of a JSON-lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in islice(lines, limit)]


def calibration_windows(
    documents: list[str], encode: Encoder, samples: int, length: int, seed: int
) -> list[list[int]]:
    """Draw one window from each of the first `samples` long documents of a shuffle.

    Parameters
    ----------
    documents : list of str
        Candidate texts; the list itself is left as it is.
    encode : callable
        Text to token ids, without special tokens.
    samples, length : int
        Number of windows and tokens in each.
    seed : int
        Seed of the shuffle and of the window starts.

    Returns
    -------
    list of list of int
        `samples` windows of `length` ids. A document counts when it has more than `length` ids.

    Raises
    ------
    ValueError
        When too few documents are long enough.
    """
    generator = random.Random(seed)
    order = list(documents)
    generator.shuffle(order)
    drawn: list[list[int]] = []
    for text in order:
        if len(drawn) == samples:
            break
        ids = encode(text)
        if len(ids) > length:
            start = generator.randrange(len(ids) - length)
            drawn.append(ids[start : start + length])
    if len(drawn) < samples:
        raise ValueError(f"{len(drawn)} documents exceed {length} tokens, {samples} are needed")
    return drawn


def evaluation_windows(text: str, encode: Encoder, total: int, length: int) -> list[list[int]]:
    """Cut the first `total` tokens of a text into adjoining windows, dropping a short rest."""
    ids = encode(text)[:total]
    return [ids[k * length : (k + 1) * length] for k in range(len(ids) // length)]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or hub name of the tokenizer")
    parser.add_argument("out", type=Path)
    parser.add_argument("--calib", type=Path, required=True, help="JSON lines with a text field")
    parser.add_argument(
        "--eval",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="plain text, or JSON lines (documents joined by a blank line); repeatable",
    )
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-tokens", type=int, default=20480, help="tokens kept of each text")
    parser.add_argument("--eval-length", type=int, default=512, help="tokens in each window")
    parser.add_argument("--eval-documents", type=int, default=200, help="read of a .jsonl file")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    calib = calibration_windows(
        read_jsonl(args.calib), encode, args.samples, args.length, args.seed
    )
    evals = {}
    for entry in args.eval:
        name, _, file = entry.partition("=")
        path = Path(file)
        if path.suffix == ".jsonl":
            text = "\n\n".join(read_jsonl(path, args.eval_documents))
        else:
            text = path.read_text(encoding="utf-8")
        evals[name] = evaluation_windows(text, encode, args.eval_tokens, args.eval_length)
    args.out.write_text(json.dumps({"calib": calib, "evals": evals}), encoding="utf-8")
    counts = ", ".join(f"{name} {len(rows)}" for name, rows in evals.items())
    print(f"{args.out}: {len(calib)} x {args.length} calibration; windows: {counts}")


if __name__ == "__main__":
    main()
