"""Write the item files of the calib_demo tasks from their sources.

Run ``python tasks/make_items.py`` after a change in ``tasks/sources`` or ``tasks/grammar.py``;
``--check`` writes nothing and fails if a committed file differs.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path

import grammar

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "sources"
TARGET = HERE / "calib_demo"
TRAIN_EVERY = 5
EXAMPLES = 4


def sections(name):
    """The ``[title]`` sections of a source file, each with its lines."""
    result = {}
    for line in (SOURCES / name).read_text(encoding="utf-8").splitlines():
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            lines = result.setdefault(line.strip("[]"), [])
        else:
            lines.append(line)
    return result


def passages(name):
    """The ``## title`` parts of a Markdown file, without the introduction."""
    text = (SOURCES / name).read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)[1:]
    return [(title, body.strip()) for title, body in zip(parts[::2], parts[1::2], strict=True)]


def cloze():
    splits = {"train": [], "test": []}
    for category, lines in sections("cloze.txt").items():
        for number, line in enumerate(lines, start=1):
            prompt, answer, *wrong = (part.strip() for part in line.split("|"))
            split = "train" if number % TRAIN_EVERY == 0 else "test"
            splits[split].append((category, prompt, answer, wrong))
    for split, rows in splits.items():
        rng = random.Random(f"calib_demo_cloze/{split}")
        positions = grammar.balanced_positions(len(rows), 4, rng)
        for i, ((category, prompt, answer, wrong), gold) in enumerate(
            zip(rows, positions, strict=True)
        ):
            rng.shuffle(wrong)
            choices = [*wrong[:gold], answer, *wrong[gold:]]
            rows[i] = {"category": category, "prompt": prompt, "choices": choices, "gold": gold}
    return splits


def prose():
    return [{"title": title, "text": text} for title, text in passages("prose.md")]


def code():
    rows = []
    for title, body in passages("code.md"):
        language, text = re.fullmatch(r"```(\w+)\n(.*)```", body, flags=re.DOTALL).groups()
        rows.append({"title": title, "language": language, "text": text})
    return rows


def generate():
    rows = []
    for pattern, lines in sections("generate.txt").items():
        examples = "".join(line + "\n" for line in lines[:EXAMPLES])
        for line in lines[EXAMPLES:]:
            question, answer = line.split(" -> ")
            rows.append(
                {"pattern": pattern, "prompt": f"{examples}{question} ->", "answer": answer}
            )
    return rows


def files():
    """Name and content of every item file."""
    cloze_items = cloze()
    tables = {
        "cloze_train": cloze_items["train"],
        "cloze_test": cloze_items["test"],
        "grammar_test": grammar.items(),
        "prose_test": prose(),
        "code_test": code(),
        "generate_test": generate(),
    }
    return {
        f"{name}.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for name, rows in tables.items()
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args(argv)
    different = []
    for name, content in files().items():
        path = TARGET / name
        if path.exists() and path.read_bytes() == content.encode():
            continue
        different.append(name)
        if not args.check:
            path.write_bytes(content.encode())
    for name in different:
        print(f"{'differs' if args.check else 'wrote'}: {name}")
    return 1 if args.check and different else 0


if __name__ == "__main__":
    sys.exit(main())
