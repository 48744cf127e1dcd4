"""``divergence=true``: what is compared is what the harness scores, once, under its own task."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
import yaml
from accelerate import cpu_offload
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lm_calib_plugin import Recipe, Runtime, compress
from lm_calib_plugin.diagnostics.tokens import token_divergence
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.harness import Calib, CalibPruned
from lm_calib_plugin.harness.divergence_sums import Place, Request, Sums
from tests.diagnostics.test_tokens import naive
from tests.tiny import make_model, make_tokenizer, saved_model

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WANDA: dict[str, Any] = {
    "method": "wanda",
    "sparsity": 0.5,
    "calibration": "null:random",
    "nsamples": 6,
    "seqlen": 16,
    "progress": False,
}
# Answers of one token and of several; some begin alike; one item has a single answer twice.
ROWS = [
    {
        "q": f"the {LETTERS[i]} of {LETTERS[-i - 1]} is" + " and to" * (i % 3),
        "choices": [LETTERS[i], LETTERS[i + 1], f"{LETTERS[i]} the of", f"{LETTERS[i]} the to"],
        "text": " ".join((LETTERS * 9)[i : i + 20 + 30 * i]),
    }
    for i in range(7)
]
TASKS: dict[str, dict[str, Any]] = {
    "div_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "0",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    },
    "div_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "div_generate": {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["w5"], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
# The same prompts as another task, with one answer less.
TASKS["div_fewer"] = {**TASKS["div_choice"], "doc_to_choice": "{{choices[:3]}}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    found = tmp_path / "tasks"
    found.mkdir()
    for name, own in TASKS.items():
        content = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"validation": str(data)}},
            "validation_split": "validation",
            **own,
        }
        (found / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return found


@pytest.fixture
def model(tmp_path: Path) -> str:
    return saved_model(tmp_path / "model", initializer_range=0.3)


def evaluate(folder: Path, model: str, *tasks: str, **arguments: Any) -> dict[str, Any]:
    options = {k: arguments.pop(k) for k in ("batch_size", "use_cache") if k in arguments}
    results = lm_eval.simple_evaluate(
        model="calib_pruned",
        model_args={"pretrained": model, **WANDA, **arguments},
        tasks=list(tasks or TASKS),
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
        **options,
    )
    return dict(results)


def compared(*given: Any, **arguments: Any) -> dict[str, Any]:
    found = evaluate(*given, divergence=True, **arguments)["config"]["compression"]
    return dict(json.loads(json.dumps(found["divergence"], allow_nan=False)))


def models(model: str) -> tuple[Any, Any]:
    """Return the dense model and the one that is evaluated, made outside the harness."""
    from transformers import AutoModelForCausalLM

    pair = [AutoModelForCausalLM.from_pretrained(model).eval() for _ in range(2)]
    given = {name: value for name, value in WANDA.items() if name != "progress"}
    compress(pair[1], make_tokenizer(), Recipe(**given), Runtime(progress=False))
    return pair[0], pair[1]


def along(pair: tuple[Any, Any], ids: list[int], scored: int) -> dict[str, np.ndarray]:
    """Return naive divergences at the last ``scored`` tokens of a sequence."""
    with torch.no_grad():
        logits = [m(torch.tensor([ids])).logits[0, -scored - 1 : -1].double().numpy() for m in pair]
    return naive(*logits, np.array(ids[-scored:]))


def choice_positions(pair: tuple[Any, Any], answers: int) -> list[dict[str, np.ndarray]]:
    """Return what is scored of the choices: a row a document and input, however many answers."""
    tokenizer = make_tokenizer()
    found = []
    for row in ROWS:
        context = tokenizer(row["q"])["input_ids"]
        seen = set()
        for choice in row["choices"][:answers]:
            tokens = tokenizer(choice)["input_ids"]
            if tuple(context + tokens[:-1]) not in seen:
                found.append(along(pair, context + tokens, len(tokens)))
            seen.add(tuple(context + tokens[:-1]))
    return found


def check(row: dict[str, Any], parts: list[dict[str, np.ndarray]]) -> None:
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert row["positions"] == len(whole["js"])
    assert row["documents"] == len(ROWS)
    for name, place in (("js", "js"), ("kl", "kl"), ("tv", "tv"), ("flip_rate", "flipped")):
        assert row[name]["mean"] == pytest.approx(whole[place].mean(), rel=1e-3), name
        assert row[name]["low"] <= row[name]["mean"] <= row[name]["high"]
    for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        assert row["js"][name] == pytest.approx(np.quantile(whole["js"], share), rel=1e-3)
        assert row["js_normalized"][name] == pytest.approx(row["js"][name] / math.log(2))


def test_scores_are_those_without_it(folder: Path, model: str) -> None:
    plain = evaluate(folder, model)
    watched = evaluate(folder, model, divergence=True)
    assert "divergence" not in plain["config"]["compression"]
    for task in TASKS:
        pairs = zip(plain["samples"][task], watched["samples"][task], strict=True)
        assert all(a["resps"] == b["resps"] for a, b in pairs)
        assert plain["results"][task] == watched["results"][task]
    first, second = (r["config"]["compression"] for r in (plain, watched))
    assert first["key"] == second["key"]
    assert first["weights_digest"] == second["weights_digest"]
    speed = [r["evaluation"]["scored_tokens"] for r in (first, second)]
    assert speed[0] == speed[1]


def test_a_model_that_is_not_compressed_differs_by_exactly_nothing(
    folder: Path, model: str
) -> None:
    found = compared(folder, model, sparsity=0, batch_size=3)
    assert set(found["tasks"]) == set(TASKS)
    for row in (own for task in found["tasks"].values() for own in task.values()):
        if "changed" in row:
            assert row["changed"] == 0
            assert row["confidence"]["dense"] == row["confidence"]["compressed"]
            continue
        for name in ("js", "js_normalized", "kl", "tv", "flip_rate"):
            assert set(row[name].values()) == {0.0}, name
        assert row["nll"]["dense"] == row["nll"]["compressed"] > 0
    assert found["not_compared"] == {}


@pytest.mark.parametrize("size", [1, 4])
def test_choices_are_compared_at_each_position_once(size: int, folder: Path, model: str) -> None:
    """Two tasks share prompts and answers; neither takes what is the other's."""
    found = compared(folder, model, "div_choice", "div_fewer", batch_size=size)["tasks"]
    pair = models(model)
    for task, answers in (("div_choice", 4), ("div_fewer", 3)):
        check(found[task]["scored"], choice_positions(pair, answers))
        assert found[task]["scored"]["requests"] == answers * len(ROWS)
        sums = []
        changed = []
        for number, row in enumerate(ROWS):
            context = make_tokenizer()(row["q"])["input_ids"]
            own = [make_tokenizer()(choice)["input_ids"] for choice in row["choices"][:answers]]
            parts = [along(pair, context + ids, len(ids)) for ids in own]
            for part in parts:
                sums.append(
                    [len(part["js"]), part["nll_dense"].sum(), part["nll_compressed"].sum()]
                )
            best = [
                np.argmin([p[f"nll_{m}"].sum() for p in parts]) for m in ("dense", "compressed")
            ]
            changed += [number] if best[0] != best[1] else []
        tokens, dense, compressed = np.sum(sums, 0)
        nll = found[task]["scored"]["nll"]
        assert nll["dense"] == pytest.approx(dense / tokens, rel=1e-5)
        assert nll["compressed"] == pytest.approx(compressed / tokens, rel=1e-5)
        perplexity = found[task]["scored"]["perplexity"]
        assert perplexity["dense"] == pytest.approx(math.exp(dense / tokens), rel=1e-4)
        assert found[task]["answers"]["items"] == len(ROWS)
        assert found[task]["answers"]["changed"] == len(changed)
        assert found[task]["answers"]["examples"] == changed[:5]
        assert 0.25 < found[task]["answers"]["confidence"]["dense"] < 1


@pytest.mark.parametrize("size", [1, 4])
def test_running_text_is_compared_in_the_windows_of_the_harness(
    size: int, folder: Path, model: str
) -> None:
    found = compared(folder, model, "div_rolling", batch_size=size)["tasks"]["div_rolling"]
    pair, tokenizer = models(model), make_tokenizer()
    parts = []
    for row in ROWS:
        ids = tokenizer(row["text"])["input_ids"]
        parts.append(along(pair, [tokenizer.bos_token_id, *ids[:64]], min(64, len(ids))))
        for start in range(64, len(ids), 64):
            end = min(start + 64, len(ids))
            parts.append(along(pair, ids[end - 65 : end], end - start))
    assert len(parts) > len(ROWS)
    check(found["scored"], parts)
    assert found["scored"]["requests"] == len(ROWS)
    assert "answers" not in found


@pytest.mark.parametrize("size", [1, 4])
def test_answers_are_compared_along_what_was_generated(size: int, folder: Path, model: str) -> None:
    pair, tokenizer = models(model), make_tokenizer()
    found = compared(folder, model, "div_generate", batch_size=size)["tasks"]["div_generate"]
    parts = []
    for row in ROWS:
        ids = tokenizer(row["q"], return_tensors="pt")["input_ids"]
        length = ids.shape[1]
        for _ in range(5):
            with torch.no_grad():
                ids = torch.cat([ids, pair[1](ids).logits[:, -1:].argmax(-1)], 1)
            if "w5" in tokenizer.decode(ids[0, length:]) or ids[0, -1] == tokenizer.eos_token_id:
                break
        parts.append(along(pair, ids[0].tolist(), ids.shape[1] - length))
    check(found["generated"], parts)
    assert set(found) == {"generated"}


def test_what_ends_an_answer_ends_the_comparison(model: str) -> None:
    """Rows go on being written until all of a batch have ended."""
    lm = CalibPruned(pretrained=model, device="cpu", divergence=True, **WANDA)
    assert lm.watch is not None
    ids = make_tokenizer()("a w15 b w1 c w1 d")["input_ids"]
    assert lm.watch._kept(ids, []) == len(ids)
    assert lm.watch._kept(ids, ["w1 "]) == 5
    assert lm.watch._kept(ids, ["w15"]) == 2
    assert lm.watch._kept(ids, ["c", "d"]) == 5
    assert lm.watch._kept(ids, ["b w1 c"]) == 5
    assert lm.watch._kept([*ids[:2], lm.eot_token_id, *ids], ["c"]) == 3
    assert lm.watch._kept([], ["c"]) == 0


def test_trials_for_the_largest_batch_do_not_count(
    folder: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one = compared(folder, model, "div_choice", "div_rolling")
    found = compared(
        folder, model, "div_choice", "div_rolling", batch_size="auto", max_batch_size=2
    )
    assert "Determined" in capsys.readouterr().out
    for task in ("div_choice", "div_rolling"):
        for name in ("positions", "requests", "documents", "tokens"):
            assert found["tasks"][task]["scored"][name] == one["tasks"][task]["scored"][name]
    assert found["not_compared"] == {}


def test_repeated_requests_and_those_that_fill_up_count_once(model: str) -> None:
    lm = CalibPruned(pretrained=model, device="cpu", divergence=True, **WANDA)
    assert lm.watch is not None

    def request(document: int, number: int, answer: str) -> Instance:
        arguments = ("the a of", f" {answer}")
        return Instance("loglikelihood", {}, arguments, number, ("t", document, 1))

    asked = [request(0, 0, "b"), request(0, 1, "c"), request(1, 0, "b the"), request(1, 1, "c to")]
    lm.loglikelihood([*asked, asked[-1], asked[-1]], disable_tqdm=True)
    row = lm.watch.report()[0]["tasks"]["t"]["scored"]
    # One position for document 0, both of whose answers are a token; two rows of two for the other.
    assert (row["positions"], row["requests"], row["documents"]) == (5, 4, 2)
    assert row["tokens"] == 6
    plain = CalibPruned(
        pretrained=model, device="cpu", divergence=True, logits_cache=False, **WANDA
    )
    plain.loglikelihood([*asked, asked[-1]], disable_tqdm=True)
    assert plain.watch is not None
    again = plain.watch.report()[0]["tasks"]["t"]["scored"]
    assert again["tokens"] == row["tokens"]
    for name in ("js", "kl", "tv", "nll"):
        assert again[name] == pytest.approx(row[name], rel=1e-5)


def test_answers_of_a_cache_are_not_compared_and_this_is_said(
    folder: Path, model: str, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    first = compared(folder, model, "div_choice", use_cache=cache)
    assert first["not_compared"] == {}
    both = evaluate(folder, model, "div_choice", "div_rolling", use_cache=cache, divergence=True)
    summary = both["config"]["compression"]
    found = summary["divergence"]
    assert set(found["tasks"]) == {"div_rolling"}
    assert found["not_compared"] == {"answers of the response cache": 4 * len(ROWS)}
    said = f"divergence: not compared: {4 * len(ROWS)} answers of the response cache"
    assert said in summary["warnings"]


def test_processes_are_added_up() -> None:
    """Items of one process and of two come to the same."""

    def counted(items: list[int]) -> Sums:
        sums = Sums()
        for item in items:
            generator = torch.Generator().manual_seed(item)
            for number in range(2):
                dense, other = (torch.randn(3, 11, generator=generator) for _ in range(2))
                found = token_divergence(dense, other, torch.tensor([1, 2, 3]))
                request = Place(Request("t", item, number, False, True)).request
                sums.tally("t", "scored").add(item, found)
                sums.tally("t", "scored").add_tokens(item, found.nll_dense, found.nll_compressed)
                nll = (-float(found.nll_dense.sum()), -float(found.nll_compressed.sum()))
                sums.answered(request, *nll)
        sums.left["rows"] += 1
        return sums

    together = Sums()
    for items in ([0, 2, 4], [1, 3]):
        together.merge(counted(items).plain())
    one = counted([0, 2, 4, 1, 3]).report()
    found = together.report()
    assert found["not_compared"] == {"rows": 2}
    assert found["tasks"]["t"]["scored"] == one["tasks"]["t"]["scored"]
    assert found["tasks"]["t"]["answers"] == one["tasks"]["t"]["answers"]


def test_no_number_is_no_divergence(model: str) -> None:
    lm = CalibPruned(pretrained=model, device="cpu", divergence=True, **WANDA)
    assert lm.watch is not None
    lm.watch._dense.lm_head.weight = torch.nn.Parameter(torch.full((97, 32), math.nan))
    asked = [
        Instance("loglikelihood", {}, ("the a", " b c"[: 2 * i]), i, ("t", 0, 1)) for i in (1, 2)
    ]
    lm.loglikelihood(asked[:1])
    found, notes = lm.watch.report()
    assert found["tasks"] == {}
    assert len(notes) == 1
    assert "1 logits that are not finite" in notes[0]
    # An item of which one answer is not known has no best answer.
    lm.watch._dense.lm_head.weight = lm.model.lm_head.weight
    lm.loglikelihood(asked[1:])
    found, _ = lm.watch.report()
    assert found["tasks"]["t"]["scored"]["requests"] == 1
    assert "answers" not in found["tasks"]["t"]


def test_offloaded_weights_are_refused_before_any_work() -> None:
    lm = {"tokenizer": make_tokenizer(), "device": "cpu", "divergence": True, **WANDA}
    with pytest.raises(UserError, match="divergence: comparing with the dense model needs the"):
        Calib(pretrained=cpu_offload(make_model()), **lm)


@pytest.mark.parametrize(
    "method",
    [
        {"method": "rtn", "bits": 8, "group_size": 16, "act_bits": 4, "kv_bits": 2},
        {"method": "gptq", "bits": 4, "group_size": 16, "transform": "rotation"},
        {"method": "awq", "bits": 3, "group_size": 16},
        {"method": "rtn", "bits": 8, "group_size": -1, "act_bits": 8, "execution": "packed"},
        {"method": "shortgpt", "blocks": 1},
        {"method": "flap", "sparsity": 0.3},
    ],
    ids=str,
)
def test_the_dense_model_stays_what_it_was(
    method: dict[str, Any], folder: Path, model: str
) -> None:
    """Rounded activations, rotations, kernels and missing blocks are those of the other alone."""
    text = " ".join(LETTERS)
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0, ("t", 0, 1))]
    given = {name: value for name, value in WANDA.items() if name not in ("method", "sparsity")}
    lm = Calib(pretrained=model, device="cpu", divergence=True, **given, **method)
    lm.loglikelihood_rolling(asked, disable_tqdm=True)
    assert lm.watch is not None
    row = lm.watch.report()[0]["tasks"]["t"]["scored"]
    dense = HFLM(pretrained=model, device="cpu").loglikelihood_rolling(asked, disable_tqdm=True)
    assert row["nll"]["dense"] == pytest.approx(-dense[0] / 26, rel=1e-6)
    assert row["js"]["mean"] > 1e-6


@pytest.mark.slow
def test_two_processes_find_what_one_finds(folder: Path, model: str, tmp_path: Path) -> None:
    """Seven items do not divide by two: requests that fill up the second process count nowhere."""
    arguments = {"pretrained": model, **WANDA, "divergence": True}
    out = tmp_path / "out"
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    evaluation = [
        *("-m", "lm_calib_plugin", "eval", "--model", "calib_pruned", "--device", "cpu"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
        *("--tasks", ",".join(TASKS), "--include_path", str(folder), "--batch_size", "2"),
        *("--output_path", str(out)),
    ]
    done = subprocess.run(
        [sys.executable, "-m", *launch, *evaluation],
        env={**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next(out.rglob("results_*.json")).read_text())
    found = results["config"]["compression"]["divergence"]
    alone = compared(folder, model, batch_size=2)
    assert found["not_compared"] == alone["not_compared"] == {}
    for task, kinds in alone["tasks"].items():
        for kind, row in kinds.items():
            other = found["tasks"][task][kind]
            for name in ("positions", "documents", "requests", "items", "changed", "examples"):
                assert other.get(name) == row.get(name), (task, name)
            for name in ("js", "kl", "tv", "nll", "confidence"):
                if name in row:
                    assert other[name] == pytest.approx(row[name], rel=1e-5), (task, name)
