"""The calib_demo tasks: their items, how the harness finds them, and a run without a network."""

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

TASKS = Path(__file__).resolve().parents[2] / "tasks"
FOLDER = TASKS / "calib_demo"
NAMES = ["cloze", "grammar", "prose", "code", "generate"]
CHOICE_FILES = ["cloze_test", "cloze_train", "grammar_test"]


def rows(name):
    text = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


# ---------------------------------------------------------------- the items


def test_committed_items_are_what_the_sources_generate():
    command = [sys.executable, str(TASKS / "make_items.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", CHOICE_FILES)
def test_choices_are_distinct_and_the_answer_is_one_of_them(name):
    expected = 2 if name.startswith("grammar") else 4
    for row in rows(name):
        choices = [choice.strip().lower() for choice in row["choices"]]
        assert len(set(choices)) == len(choices) == expected, row
        assert all(choices), row
        assert row["gold"] in range(expected), row


@pytest.mark.parametrize("name", CHOICE_FILES)
def test_a_constant_answer_scores_at_chance(name):
    counts = Counter(row["gold"] for row in rows(name))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_a_constant_answer_scores_at_chance_in_every_paradigm():
    counts = Counter((row["paradigm"], row["gold"]) for row in rows("grammar_test"))
    assert set(counts.values()) == {9}


def test_cloze_prompts_occur_once_and_not_in_both_splits():
    prompts = [row["prompt"].lower() for row in rows("cloze_test") + rows("cloze_train")]
    assert len(set(prompts)) == len(prompts)


def test_cloze_training_split_has_every_category():
    train, test = rows("cloze_train"), rows("cloze_test")
    assert {row["category"] for row in train} == {row["category"] for row in test}
    assert len(train) >= 60
    assert len(test) >= 200


def test_cloze_prompts_are_short_and_do_not_name_the_answer():
    for row in rows("cloze_test") + rows("cloze_train"):
        words = re.findall(r"\w+", row["prompt"].lower())
        assert len(words) <= 16, row
        assert row["choices"][row["gold"]].lower() not in words, row
        assert not row["prompt"].endswith((" ", ".")), row


@pytest.mark.parametrize("name", ["cloze_test", "cloze_train"])
def test_cloze_articles_do_not_give_the_answer_away(name):
    for row in rows(name):
        if row["prompt"].endswith((" a", " an")):
            vowel = row["prompt"].endswith(" an")
            for choice in row["choices"]:
                assert (choice[0].lower() in "aeiou") == vowel, row


def test_grammar_sentences_are_whole_and_unique():
    table = rows("grammar_test")
    good = [row["choices"][row["gold"]] for row in table]
    assert len(set(good)) == len(good)
    assert not set(good) & {row["choices"][1 - row["gold"]] for row in table}
    for row in table:
        for sentence in row["choices"]:
            assert re.fullmatch(r"[A-Z][A-Za-z ]+\.", sentence), sentence
            assert "  " not in sentence


def test_grammar_pairs_differ_in_one_word():
    for row in rows("grammar_test"):
        first, second = (
            Counter(sentence.replace("No one", "Nobody").split()) for sentence in row["choices"]
        )
        assert (first - second).total() == 1, row


@pytest.mark.parametrize("name", ["prose_test", "code_test"])
def test_passages_are_unique_and_of_the_stated_length(name):
    table = rows(name)
    assert len({row["text"] for row in table}) == len({row["title"] for row in table}) == len(table)
    for row in table:
        assert 40 <= len(row["text"].split()) <= 150, row["title"]


def test_python_programs_compile():
    programs = [row for row in rows("code_test") if row["language"] == "python"]
    assert len(programs) == 12
    for row in programs:
        ast.parse(row["text"], row["title"])


def test_generate_prompts_show_four_other_examples():
    table = rows("generate_test")
    assert len({row["prompt"] for row in table}) == len(table) >= 30
    for row in table:
        *examples, question = row["prompt"].split("\n")
        assert len(examples) == 4
        assert question.endswith(" ->")
        inputs = [example.split(" -> ")[0] for example in examples]
        assert question.removesuffix(" ->") not in inputs


def test_readme_states_the_number_of_items():
    readme = (TASKS / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        (line,) = [
            line for line in readme.splitlines() if line.startswith(f"| `calib_demo_{name}`")
        ]
        assert re.search(rf"\| {len(rows(f'{name}_test'))}\b", line), line
    assert f"(+ {len(rows('cloze_train'))} for training)" in readme


# ---------------------------------------------------------------- the harness

PROBE = """
import json, sys
from lm_eval.tasks import TaskManager
loaded = TaskManager(include_path=sys.argv[1], include_defaults=False).load("calib_demo")
print(json.dumps({
    name: [len(task.eval_docs), task.has_training_docs() and len(task.training_docs())]
    for name, task in loaded["tasks"].items()
}))
"""


def test_group_loads_from_another_directory_without_a_cache(tmp_path):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(TASKS)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    expected = {f"calib_demo_{name}": [len(rows(f"{name}_test")), False] for name in NAMES}
    expected["calib_demo_cloze"][1] = len(rows("cloze_train"))
    assert counts == expected
    assert not list(tmp_path.rglob("*.arrow"))


def test_a_copy_of_the_folder_is_complete_and_may_stand_beside_the_original(tmp_path):
    from lm_eval.tasks import TaskManager

    copy = tmp_path / "elsewhere" / "calib_demo"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("__pycache__"))
    manager = TaskManager(include_path=[tmp_path, TASKS], include_defaults=False)
    for name in NAMES:
        assert manager.task_index[f"calib_demo_{name}"].yaml_path.is_relative_to(TASKS)
    manager = TaskManager(include_path=[TASKS, tmp_path], include_defaults=False)
    (task,) = manager.load("calib_demo_grammar")["tasks"].values()
    assert task.config.metadata["config_source"].startswith(str(tmp_path))
    assert len(task.eval_docs) == len(rows("grammar_test"))


@pytest.fixture
def tiny_model():
    """A random model of two layers that reads bytes."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config).to(torch.float32).eval()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    return HFLM(pretrained=model, tokenizer=fast, batch_size=2, device="cpu")


def test_whole_group_runs_without_a_network(tiny_model, tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    def refuse(*args):
        raise OSError("the test allows no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    results = lm_eval.simple_evaluate(
        tiny_model,
        tasks=["calib_demo"],
        task_manager=TaskManager(include_path=TASKS, include_defaults=False),
        limit=2,
        bootstrap_iters=0,
    )["results"]
    for name in ("cloze", "grammar"):
        assert 0 <= results[f"calib_demo_{name}"]["acc,none"] <= 1
    for name in ("prose", "code"):
        assert 0 < results[f"calib_demo_{name}"]["bits_per_byte,none"] < 20
    assert results["calib_demo_generate"]["exact_match,none"] == 0
    assert all(results[f"calib_demo_{name}"]["sample_len"] == 2 for name in NAMES)


@pytest.mark.parametrize(
    ("output", "score"),
    [(" Thursday", 1), ("  thursday. ", 1), ("Friday", 0), (" Thursday, Friday", 0), ("", 0)],
)
def test_generated_text_is_normalized(output, score):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=TASKS, include_defaults=False)
    (task,) = manager.load("calib_demo_generate")["tasks"].values()
    doc = next(row for row in task.eval_docs if row["answer"] == "Thursday")
    assert task.process_results(doc, [output])["exact_match"] == score
