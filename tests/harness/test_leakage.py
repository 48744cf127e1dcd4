"""Evaluated items that stand in the calibration text are counted, told and, on request, refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from lm_calib_plugin import CalibrationSet
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.harness import CalibPruned
from lm_calib_plugin.harness.leakage import LeakCheck
from tests.tiny import make_tokenizer, saved_model

VOCABULARY = "the of and to in a is that it was for on are as with his they at be this from".split()  # noqa: SIM905
LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]


def sentence(seed: int, count: int) -> str:
    return " ".join(random.Random(seed).choices([*VOCABULARY, *LETTERS], k=count))


ROWS = [
    {
        "passage": sentence(i, 20 + i % 7),
        "question": sentence(100 + i, 7),
        "choices": [sentence(200 + i, 2), sentence(300 + i, 2)],
        "gold": i % 2,
    }
    for i in range(12)
]
TASKS: dict[str, dict[str, Any]] = {
    "leak_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{passage}} ? {{question}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    },
    "leak_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{passage}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "leak_generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{passage}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 2, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "leak_rewritten": {
        "output_type": "loglikelihood",
        "doc_to_text": "this is the task of words : {{passage.split()|reverse|join(' ')}}",
        "doc_to_target": "{{choices[0]}}",
        "metric_list": [{"metric": "acc"}],
    },
}


def write_task(folder: Path, name: str, data: Path, **changes: Any) -> None:
    files = {"validation": str(data), "train": str(data)}
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "validation_split": "validation",
        "fewshot_split": "train",
        **TASKS[name],
        **changes,
    }
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.fixture
def folder(tmp_path: Path, data: Path) -> Path:
    for name in TASKS:
        write_task(tmp_path / "tasks", name, data)
    return tmp_path / "tasks"


def text_file(tmp_path: Path, texts: list[str]) -> str:
    file = tmp_path / "calibration.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return f"file:{file}"


def evaluate(
    folder: Path,
    tmp_path: Path,
    calibration: str,
    task: str | list[str] = "leak_choice",
    **more: Any,
) -> dict[str, Any]:
    arguments = {
        "pretrained": saved_model(tmp_path / "model", max_position_embeddings=512),
        "method": "wanda",
        "sparsity": 0.5,
        "calibration": calibration,
        "nsamples": 12,
        "pack": "pad",
        "seqlen": 64,
        "progress": False,
        **more.pop("arguments", {}),
    }
    results = lm_eval.simple_evaluate(
        model="calib_pruned",
        model_args={k: v for k, v in arguments.items() if v is not None},
        tasks=[task] if isinstance(task, str) else task,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
        **more,
    )
    return dict(results["config"]["compression"])


def test_calibrating_on_the_file_of_the_task(folder: Path, data: Path, tmp_path: Path) -> None:
    """All items are touched, in every kind of task."""
    calibration = f"file:{data}?column=passage"
    names = ["leak_choice", "leak_rolling", "leak_generate"]
    found = evaluate(folder, tmp_path, calibration, names)
    assert set(found["leakage"]) == set(names)
    for row in found["leakage"].values():
        assert row["items"] == row["touched"] == 12
        assert row["share"] == 1
        assert row["by"] == {"13-gram": 12}
        assert row["sources"] == {calibration: 12}
        assert [example["doc_id"] for example in row["examples"]] == [0, 1, 2]
    assert row["examples"][0]["words"] == " ".join(ROWS[0]["passage"].split()[:13])
    assert sum("12 of 12 items of task" in note for note in found["warnings"]) == 3
    json.dumps(found)


def test_refusal_comes_before_the_model_sees_anything(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("the model was asked")

    monkeypatch.setattr(CalibPruned, "_loglikelihood_tokens", forward)
    with pytest.raises(UserError) as caught:
        evaluate(folder, tmp_path, f"file:{data}?column=passage", arguments={"on_leak": "error"})
    text = str(caught.value)
    assert "12 of 12 items of task `leak_choice` (100.0%)" in text
    assert " ".join(ROWS[0]["passage"].split()[:13]) in text
    assert "on_leak=warn" in text


def test_few_shot_examples_touch_no_item(folder: Path, tmp_path: Path) -> None:
    """Items 2 and 5 are in the calibration text, and in the prompts of many others."""
    others = [sentence(900 + i, 30) for i in range(10)]
    calibration = text_file(tmp_path, [ROWS[2]["passage"], ROWS[5]["passage"], *others])
    found = evaluate(folder, tmp_path, calibration, num_fewshot=3)["leakage"]["leak_choice"]
    assert (found["items"], found["touched"]) == (12, 2)
    assert [example["doc_id"] for example in found["examples"]] == [2, 5]


def test_a_rewritten_document_is_found_by_its_prompt(folder: Path, tmp_path: Path) -> None:
    """The instruction, in all prompts and in the calibration text, touches nobody."""
    turned = [" ".join(reversed(ROWS[i]["passage"].split())) for i in (1, 4, 7)]
    lead = [f"{sentence(800 + i, 12)} this is the task of words : and" for i in range(9)]
    long = "from his to be this is the task of words : " + " ".join(VOCABULARY)
    calibration = text_file(tmp_path, [*turned, *lead[:-1], long])
    found = evaluate(folder, tmp_path, calibration, "leak_rewritten")["leakage"]["leak_rewritten"]
    assert [example["doc_id"] for example in found["examples"]] == [1, 4, 7]
    assert found["touched"] == 3


def test_nothing_touched_is_a_row_too(folder: Path, tmp_path: Path) -> None:
    found = evaluate(
        folder, tmp_path, text_file(tmp_path, [sentence(500 + i, 30) for i in range(12)])
    )
    assert found["leakage"]["leak_choice"] == {
        "items": 12, "touched": 0, "share": 0.0, "by": {}, "sources": {}, "examples": [],
    }  # fmt: skip
    assert not found["warnings"]


def test_not_looking_and_nothing_to_look_at_are_said(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    ignored = evaluate(
        folder, tmp_path, f"file:{data}?column=passage", arguments={"on_leak": "ignore"}
    )
    assert ignored["leakage"] == "not checked"
    no_data = {"method": "magnitude", "pack": None, "nsamples": None}
    without = evaluate(folder, tmp_path, "none", arguments=no_data)
    assert without["leakage"] == "no calibration text"


def test_looking_changes_no_key(folder: Path, data: Path, tmp_path: Path) -> None:
    keys = {
        evaluate(folder, tmp_path, f"file:{data}?column=passage", arguments={"on_leak": way})["key"]
        for way in ("warn", "ignore")
    }
    assert len(keys) == 1


def test_the_response_cache_hides_nothing(folder: Path, data: Path, tmp_path: Path) -> None:
    calibration = f"file:{data}?column=passage"
    cache = {"use_cache": str(tmp_path / "cache")}
    first = evaluate(folder, tmp_path, calibration, **cache)
    again = evaluate(folder, tmp_path, calibration, **cache)
    assert again["leakage"] == first["leakage"]
    assert again["leakage"]["leak_choice"]["touched"] == 12
    with pytest.raises(UserError, match="12 of 12 items"):
        evaluate(folder, tmp_path, calibration, arguments={"on_leak": "error"}, **cache)
    unseen = {"use_cache": str(tmp_path / "unseen")}
    evaluate(folder, tmp_path, calibration, arguments={"on_leak": "ignore"}, **unseen)
    later = evaluate(folder, tmp_path, calibration, **unseen)
    assert any("were not checked" in note for note in later["warnings"])


def test_a_task_is_no_source_for_what_it_evaluates(
    folder: Path, data: Path, tmp_path: Path
) -> None:
    for split, message in (
        ("validation", "evaluates its training split `validation`"),
        (None, "has no training split"),
    ):
        # A folder of its own: tasks are looked up once.
        own = tmp_path / f"own-{split}"
        write_task(own, "leak_choice", data, training_split=split)
        with pytest.raises(UserError, match=message):
            evaluate(own, tmp_path, f"task:leak_choice?include_path={own}")
    own = tmp_path / "own"
    write_task(own, "leak_choice", data, training_split="train")
    with pytest.raises(UserError, match="split"):
        evaluate(own, tmp_path, f"task:leak_choice?include_path={own}&split=validation")
    # A training split under another name that holds the same rows is found by its text.
    found = evaluate(own, tmp_path, f"task:leak_choice?include_path={own}")
    assert found["leakage"]["leak_choice"]["share"] == 1


# --- the rule, on requests made by hand -----------------------------------------------------------


def check(
    calibration: list[str], requests: list[Instance], on_leak: str = "warn"
) -> dict[str, Any]:
    tokenizer = make_tokenizer()
    ids = [tokenizer(text)["input_ids"] for text in calibration]
    made = CalibrationSet.of(ids, seqlen=max(map(len, ids)))
    leaks = LeakCheck(made, tokenizer, on_leak)
    leaks.check(requests)
    report = leaks.report()
    assert isinstance(report, dict)
    return report["t"]


def request(doc: Any, prompt: str, target: str = "", number: int = 0) -> Instance:
    return Instance("loglikelihood", doc, (prompt, target), 0, metadata=("t", number, 1))


def test_short_items_count_whole() -> None:
    question = sentence(1, 9)
    doc = {"question": question, "choices": [sentence(2, 5), "a b"]}
    prompt = f"question : {question} answer :"
    whole = check([f"{sentence(3, 20)} {question} {sentence(4, 20)}"], [request(doc, prompt)])
    assert whole["by"] == {"whole text": 1}
    part = " ".join(question.split()[:-1])
    assert check([f"{sentence(3, 20)} {part}"], [request(doc, prompt)])["touched"] == 0
    # An answer of five words, beside a longer question, stands in many books.
    answer = doc["choices"][0]
    assert check([f"{sentence(3, 20)} {answer}"], [request(doc, prompt, answer)])["touched"] == 0
    four = sentence(5, 4)
    assert check([f"{four} {four}"], [request({"question": four}, four)])["touched"] == 0


def test_a_field_that_is_never_shown_does_not_count() -> None:
    hidden, shown = sentence(6, 30), sentence(7, 30)
    doc = {"explanation": hidden, "nested": {"list": [shown]}}
    assert check([hidden], [request(doc, shown)])["touched"] == 0
    assert check([shown], [request(doc, shown)])["touched"] == 1
    assert check([hidden], [request(doc, shown, f" {hidden}")])["touched"] == 1


def test_requests_without_document_or_number() -> None:
    text = sentence(8, 30)
    bare = [request(None, text, number=None), request(None, sentence(9, 30), number=None)]  # type: ignore[arg-type]
    found = check([text], bare)
    assert (found["items"], found["touched"]) == (2, 1)


def test_items_are_counted_once() -> None:
    text = sentence(8, 30)
    twice = [request({"q": text}, text, target) for target in (" a", " b")]
    assert check([text], [*twice, *twice])["items"] == 1


def test_processes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks with a part of the items each, as the harness deals them out."""
    tokenizer = make_tokenizer()
    texts = [sentence(i, 30) for i in range(4)]
    made = CalibrationSet.of(
        [tokenizer(texts[0])["input_ids"], tokenizer(texts[3])["input_ids"]], seqlen=30
    )
    ranks = [LeakCheck(made, tokenizer, "warn") for _ in range(2)]
    for rank, leaks in enumerate(ranks):
        leaks.check([request({"q": texts[i]}, texts[i], number=i) for i in range(rank, 4, 2)])
    seen = [json.loads(json.dumps(leaks._plain())) for leaks in ranks]  # nothing but plain values
    assert seen

    def gather(everyone: list[Any], _mine: Any) -> None:
        everyone[:] = [leaks._plain() for leaks in ranks]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    ranks[0].gather()
    ranks[0].gather()
    row = ranks[0].report()["t"]  # type: ignore[index]
    assert (row["items"], row["touched"], row["share"]) == (4, 2, 0.5)
    assert [example["doc_id"] for example in row["examples"]] == [0, 3]
