"""Read the items of the calib_demo tasks, which lie next to this file."""

import json
from pathlib import Path

from datasets import Dataset, DatasetDict

HERE = Path(__file__).resolve().parent


def _load(name, splits=("test",)):
    tables = {}
    for split in splits:
        text = (HERE / f"{name}_{split}.jsonl").read_text(encoding="utf-8")
        tables[split] = Dataset.from_list([json.loads(line) for line in text.splitlines()])
    return DatasetDict(tables)


# The harness passes the task's metadata and the model arguments to these functions; the items
# do not depend on them.


def load_cloze(**_kwargs):
    return _load("cloze", ("train", "test"))


def load_grammar(**_kwargs):
    return _load("grammar")


def load_prose(**_kwargs):
    return _load("prose")


def load_code(**_kwargs):
    return _load("code")


def load_generate(**_kwargs):
    return _load("generate")
