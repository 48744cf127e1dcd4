from __future__ import annotations

import json

import pytest
from conftest import context, draw, word_tokenizer

from lm_calib_plugin.calibration.sources import tasks
from lm_calib_plugin.calibration.sources.tasks import HarnessTask
from lm_calib_plugin.errors import UserError

ROWS = [
    {"question": f"q{i}", "options": ["w1", "w2", "w3"], "label": i % 3, "answer": f"w{i}"}
    for i in range(12)
]
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "label",
}
FREE = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}} =",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"]},
    "metric_list": [{"metric": "exact_match"}],
}
PROMPTS = {
    "output_type": "multiple_choice",
    "doc_to_text": "label",
    "doc_to_choice": "{{options}}",
    "doc_to_target": "ends {{answer}}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files over local data; JSON is YAML, so no writer is needed."""
    import datasets

    datasets.disable_progress_bars()
    root = tmp_path_factory.mktemp("tasks")
    for split, rows in (("train", ROWS[:8]), ("test", ROWS[8:])):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / f"{split}.jsonl").write_text(text)
    files = {split: str(root / f"{split}.jsonl") for split in ("train", "test")}
    base = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "training_split": "train",
        "test_split": "test",
        "metadata": {"version": 2.0},
    }
    variants = {
        "my_choice": CHOICE,
        "my_free": FREE,
        "my_prompts": PROMPTS,
        "my_lead": FREE | {"gen_prefix": "So", "target_delimiter": "\n"},
        "my_text": FREE
        | {
            "doc_to_text": "",
            "output_type": "loglikelihood_rolling",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        "my_untrained": CHOICE | {"training_split": None},
        "my_leak": CHOICE | {"test_split": "train"},
        "my_broken": CHOICE | {"dataset_kwargs": {"data_files": {"train": "/no/such.jsonl"}}},
        "my_tagged": CHOICE | {"tag": "my_tag"},
    }
    for name, fields in variants.items():
        (root / f"{name}.yaml").write_text(json.dumps({"task": name, **base, **fields}))
    group = {"group": "my_group", "task": ["my_choice", "my_free", "my_untrained"]}
    (root / "group.yaml").write_text(json.dumps(group))
    return root


@pytest.fixture(autouse=True)
def own_cache(folder, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf")


def texts(name, folder):
    source = HarnessTask(name, [("include_path", str(folder))])
    source.validate()
    return [d.text for d in source.documents(context(word_tokenizer()))], source.provenance()


def test_multiple_choice_gives_the_correct_choice(folder):
    found, facts = texts("my_choice", folder)
    wanted = [f"Question: q{i}\nAnswer: w{i % 3 + 1}" for i in range(8)]
    assert found == wanted
    assert (facts["split"], facts["task_version"], facts["documents_held"]) == ("train", "2.0", 8)
    assert len(facts["fingerprint"]) == 64


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("my_free", "q0 = w0"),
        ("my_prompts", "w1 ends w0"),
        ("my_lead", "q0 =\nSo w0"),
        ("my_text", "w0"),
    ],
)
def test_other_kinds_of_tasks(folder, name, first):
    found, _ = texts(name, folder)
    assert found[0] == first
    assert len(found) == 8


@pytest.mark.parametrize("name", ["my_choice", "my_free", "my_lead"])
def test_text_is_what_the_harness_writes_as_a_solved_example(folder, name):
    task = tasks._manager(str(folder), False).load(name)["tasks"][name]
    for row in task.training_docs():
        messages = task.build_qa_turn(
            q=task.doc_to_text(row),
            c=task.doc_to_choice(row) if task.config.doc_to_choice else None,
            a=task.doc_to_target(row),
            gen_prefix=task.doc_to_prefix(row),
            tgt_delim=task.config.target_delimiter,
            few_delim="",
        )
        assert tasks.document_text(task, row) == "".join(m.to_text() for m in messages)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_untrained", r"no training split; splits: test \(test\).*leakage"),
        ("my_leak", "evaluates its training split `train`"),
        (
            "my_group",
            r"is a group of tasks; members with a training split: my_choice, my_free; "
            r"name the tasks, for instance task:my_choice\+task:my_free",
        ),
        ("my_tag", r"is a tag of tasks; members with a training split: my_tagged"),
    ],
)
def test_tasks_that_are_refused_by_their_configuration(folder, name, message):
    with pytest.raises(UserError, match=message):
        HarnessTask(name, [("include_path", str(folder))]).validate()


def test_a_typing_error_names_the_nearest_task(folder, monkeypatch):
    original = tasks._manager
    monkeypatch.setattr(tasks, "_manager", lambda path, built_in: original(path, False))
    with pytest.raises(UserError, match="no harness task `my_choise`; did you mean `my_choice`"):
        HarnessTask("my_choise", [("include_path", str(folder))]).validate()


def test_missing_data_is_reported_short(folder):
    with pytest.raises(UserError, match="task `my_broken` cannot be loaded: FileNotFound"):
        texts("my_broken", folder)


def test_a_set_from_a_task_is_padded_rows_of_the_training_split(folder):
    tokenizer = word_tokenizer(start_token=True)
    drawn = draw(f"task:my_free?include_path={folder}", tokenizer, nsamples=8, seqlen=16)
    assert drawn.sources[0]["pack"] == "pad"
    assert sorted(drawn.sources[0]["indices"]) == list(range(8))
    # <s>, two unknown words, the answer
    assert {tuple(ids.tolist()) for ids in drawn.sequences} == {(1, 0, 0, 3 + i) for i in range(8)}
    with pytest.raises(UserError, match=r"found 8 windows .* asks 9"):
        draw(f"task:my_free?include_path={folder}", tokenizer, nsamples=9, seqlen=16)
