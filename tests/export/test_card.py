"""Model cards: what the hub and people read, and what nothing typed can break."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from lm_eval.utils import simple_parse_args_string

from lm_calib_plugin import builtin_models
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.export import card_text
from lm_calib_plugin.export.card import base_license, model_card
from lm_calib_plugin.export.options import Provenance
from lm_calib_plugin.report import LayerRow, Report

CHECK = {
    "tensors": 9,
    "layers": 0.0,
    "logits_difference": 0.0,
    "exact": True,
    "transformers": "5.23.0",
    "compressed-tensors": None,
}
FACTS = {"format": "dense", "check": CHECK}
SELF = {"source": "self", "licence": None, "nsequences": 2}
CORPUS = {
    "source": "c4",
    "licence": "ODC-By",
    "dataset": "allenai/c4",
    "nsequences": 2,
}
RESULTS = {
    "results": {
        "demo": {
            "alias": "demo",
            "acc,none": 0.5,
            "acc_stderr,none": 0.025,
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": "N/A",
            "sample_len": 20,
        },
        "words": {"word_perplexity,none": 12.345678, "word_perplexity_stderr,none": float("nan")},
    },
    "n-shot": {"demo": 5},
}


def row(name: str, calibration: float, heldout: float) -> LayerRow:
    return LayerRow(name, (4, 4), 0.5, None, calibration, heldout, None, 10, 0.1)


def report(*sources: dict[str, Any], **recipe: Any) -> Report:
    recipe = {"method": "wanda", "sparsity": 0.5, "calib_seed": 3} | recipe
    calibration = None
    if sources:
        recipe.setdefault("calibration", "+".join(s["source"] for s in sources))
        calibration = {
            "calib_id": "c" * 64,
            "sources": list(sources),
            "nsamples": 4,
            "seqlen": 32,
            "tokens": 120,
            "heldout_sequences": 1,
        }
    return Report(
        "k" * 64,
        recipe,
        calibration,
        [row("model.layers.0.a", 0.01, 0.02), row("model.layers.1.b", 0.03, 0.06)],
        achieved={"sparsity": 0.5, "sparsity_model": 0.4, "bits": None},
        left_dense=[("lm_head", "named by ignore")],
        versions={"torch": "2.13", "transformers": "5.23"},
        weights_digest="w" * 64,
        model_digest="m" * 64,
    )


def quantized(**recipe: Any) -> Report:
    made = report(CORPUS, **({"method": "gptq", "sparsity": None, "bits": 4} | recipe))
    made.achieved = {"sparsity": 0.1, "bits": 4.0, "bits_stored": 4.25, "bytes": 1234567}
    return made


def front(card: str) -> dict[str, Any]:
    """The block before the text, as any reader of YAML takes it."""
    _, block, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(block)
    return found


def test_the_hub_reads_the_front_matter():
    made = model_card(
        report(CORPUS, SELF),
        Provenance("org/base-1b", license="apache-2.0", results=RESULTS),
        FACTS,
    )
    data = ModelCard(made).data
    assert data.base_model == "org/base-1b"
    assert data.license == "apache-2.0"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["lm-calib-plugin", "pruned"]
    assert data.datasets == ["allenai/c4"]
    found = {(r.dataset_name, r.metric_name): r.metric_value for r in data.eval_results}
    assert found == {
        ("demo", "acc"): 0.5,
        ("demo", "exact_match (strict-match)"): 0.25,
        ("words", "word_perplexity"): 12.345678,
    }
    assert front(made)["base_model_relation"] == "finetune"


def test_a_quantized_model_says_so():
    facts = FACTS | {"format": "compressed-tensors"}
    made = model_card(quantized(), Provenance("org/base"), facts)
    data = front(made)
    assert data["base_model_relation"] == "quantized"
    assert data["tags"] == ["lm-calib-plugin", "quantized", "compressed-tensors"]
    assert "in transformers the model is not faster" in made
    assert "lm-calib pack" not in made
    for word in ("| 4.25 |", "1,234,567", "| Bits of a weight | `4` |", "compressed-tensors alone"):
        assert word in made
    plain = model_card(quantized(), Provenance("org/base"), FACTS)
    assert "neither smaller nor faster" in plain


def test_the_body_says_what_was_measured():
    made = model_card(report(CORPUS, SELF), Provenance("org/base", license="mit"), FACTS)
    for word in (
        "Median error of a layer, calibration text | 0.02 |",
        "Worst error of a layer, calibration text | 0.03 (`model.layers.1.b`)",
        "Median error of a layer, held-out text | 0.04 |",
        "Zeros in the compressed layers | 50.00% |",
        "Zeros in the whole model | 40.00% |",
        "2 compressed, 1 left dense",
        "1 matrices: named by ignore",
        "4 of at most 32 tokens, 120 tokens in all, 1 held out",
        "- c4: ODC-By",
        "The text of `self` was written by the dense base model itself",
        "Zeros are stored like other numbers",
        "9 tensors were equal bit for bit, and so were the logits",
        "https://arxiv.org/abs/2306.11695",
        "k" * 64,
        "w" * 64,
        "torch 2.13",
    ):
        assert word in made, word


def test_depth_pruned_models_are_smaller():
    made = report(CORPUS, method="depth_cosine")
    made.layers, made.structure = (
        [],
        {
            "removed": ["model.layers.1"],
            "error": {"calibration": 0.1, "heldout": 0.2},
        },
    )
    made.achieved |= {"parameters": {"model": [3000, 2000]}}
    card = model_card(made, Provenance("org/base"), FACTS)
    for word in ("`model.layers.1`", "3,000 before, 2,000 after", "smaller and runs faster"):
        assert word in card
    assert "Zeros are stored" not in card


def test_without_data_results_and_check():
    card = model_card(report(method="magnitude"), Provenance("org/base"), {"format": "dense"})
    assert "None: this method looks at weights alone." in card
    assert "## Results" not in card
    assert "was not loaded back" in card
    assert "model-index" not in front(card)
    assert front(card)["license"] == "other"
    assert front(card)["license_name"] == "that-of-the-base-model"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("llama3.1", {"license": "llama3.1"}),
        ("other (My Own: license)", {"license": "other", "license_name": "my-own-license"}),
        ("other", {"license": "other", "license_name": "other"}),
        ("a\nlicense: mit", {"license": "other", "license_name": "a-license-mit"}),
    ],
)
def test_licenses_are_named_as_the_hub_has_them(given: str, expected: dict[str, str]):
    data = front(model_card(report(), Provenance("org/base", license=given), FACTS))
    assert {k: v for k, v in data.items() if k.startswith("license")} == expected


def test_results_stand_in_a_table():
    made = model_card(report(), Provenance("org/base", results=RESULTS), FACTS)
    assert "| `demo` | 5 | acc | 0.5000 | 0.0250 |" in made
    assert "| `demo` | 5 | exact\\_match \\(strict-match\\) | 0.2500 |  |" in made
    assert "| `words` |  | word\\_perplexity | 12.3457 |  |" in made
    assert "sample" not in made
    bare = Provenance("org/base", results=RESULTS["results"])
    assert "| `demo` |  | acc | 0.5000 | 0.0250 |" in model_card(report(), bare, FACTS)
    dense = {"results": {"demo": {"acc,none": 0.75, "acc_stderr,none": 0.01}}}
    beside = model_card(report(), Provenance("org/base", results=RESULTS), FACTS, dense)
    assert "| `demo` | 5 | acc | 0.5000 | 0.0250 | 0.7500 | 0.0100 |" in beside
    assert "| `words` |  | word\\_perplexity | 12.3457 |  |  |  |" in beside


@pytest.mark.parametrize("results", [{"a": 5}, {"results": [1]}, {"results": {"a": [1]}}])
def test_what_is_no_results_file_is_the_users_error(results: dict[str, Any]):
    with pytest.raises(UserError, match="results: .*task -> metric -> value"):
        model_card(report(), Provenance("org/base", results=results), FACTS)


EVIL = [
    "a|b\n| --- |\n# HEAD",
    "`code` ``more`` ```\n```\nbreak",
    "---\nlicense: evil\n---",
    "<script>alert(1)</script>",
    "[link](javascript:x) ![i](http://e)",
    "x\u2028# y\r\n# z\x1b[2J\u202e",
    "{{ jinja }} {% x %} $\\LaTeX$",
    "' \": & *a !!python/object:os.system",
    "\ud800",
]


@pytest.mark.parametrize("evil", EVIL, ids=range(len(EVIL)))
def test_nothing_typed_breaks_out(evil: str):
    usual = model_card(*_typed("no harm"))
    made = model_card(*_typed(evil))
    made.encode()
    assert front(made).keys() == front(usual).keys()
    assert front(made)["license"] == "other"
    # Every line begins as it would have begun, but in the two blocks of code of the command.
    assert len(_outside_code(made)) == len(_outside_code(usual))
    for one, other in zip(_outside_code(made), _outside_code(usual), strict=True):
        assert one[:1] == other[:1]
        bars = [len(re.findall(r"(?<!\\)\|", line)) for line in (one, other)]
        assert bars[0] == bars[1] or not other.startswith("|")  # bars count in tables
        no_code = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", one)
        assert not re.search(r"(?<!\\)[<]", no_code)
        assert not re.search(r"(?<!\\)\]\((?!https://)", no_code)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", made)


def _typed(text: str) -> tuple[Report, Provenance, dict[str, Any]]:
    """A card in which everything that somebody may have typed is this text."""
    made = report(
        {"source": text, "licence": text, "nsequences": 1},
        {"source": f"self:{text}", "licence": None, "nsequences": 1},
        calibration=f"file:{text}",
        method=text,
        ignore=[text],
        pattern=text,
    )
    made.layers[1].name = text
    made.left_dense = [("x", text)]
    made.warnings = [text]
    made.versions = {text: text}
    results = {text: {"acc,none": 1.0, f"{text.replace(',', '')},{text}": 2.0}}
    provenance = Provenance(text, text, text, text, {"results": results})
    check = CHECK | {"transformers": text, "compressed-tensors": text}
    return made, provenance, {"format": "dense", "check": check}


def _outside_code(card: str) -> list[str]:
    """The lines after the front matter that stand in no block of code."""
    body = card.split("---\n", 2)[2]
    lines, fence = [], ""
    for line in body.split("\n"):
        ticks = re.match(r"`{3,}", line)
        if fence:
            fence = "" if line.strip() == fence else fence
        elif ticks and "`" not in line.removeprefix(ticks[0]):
            fence = ticks[0]
        else:
            lines.append(line)
    assert not fence
    return lines


def test_a_card_names_no_folder_of_this_machine(tmp_path: Path):
    source = {"source": "file:/home/someone/secret/a.txt", "licence": None}
    made = model_card(
        report(source, calibration="file:/home/someone/secret/a.txt"),
        Provenance(
            str(tmp_path), command=f"lm-calib export --pretrained {tmp_path} /home/someone/x"
        ),
        FACTS,
    )
    assert "someone" not in made
    assert str(tmp_path.parent) not in made
    assert f"lm-calib export --pretrained {tmp_path.name} x" in made
    assert f"`{tmp_path.name}`" in made
    assert "base_model" not in front(made)


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: mit\n---\n# x", "mit"),
        ("---\r\nlicense: mit\r\n---\r\n# x", "mit"),
        ("---\nlicense: other\nlicense_name: qwen\n---\n", "other (qwen)"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        ("---\ntags: [x]\n---\n", None),
        ("---\nlicense: !!python/name:os.system\n---\n", None),
        ("---\nlicense: {a: b}\n---\n", None),
        ("---\n[1\n---\n", None),
        ("---\n" + "[" * 50_000 + "\n---\n", None),
        ("# no front matter\n---\nlicense: mit\n---\n", None),
        ("", None),
    ],
)
def test_the_license_of_a_folder_is_that_of_its_card(
    tmp_path: Path, card: str, expected: str | None
):
    (tmp_path / "README.md").write_bytes(card.encode())
    assert base_license(str(tmp_path)) == expected


def test_other_licenses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert base_license(str(tmp_path)) is None
    assert base_license("no such ../ name") is None
    assert base_license("org/not-downloaded") is None
    assert base_license("builtin:smollm2-135m") == "apache-2.0"
    assert base_license(str(builtin_models.folder_of("smollm2-135m"))) == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n")
    found = str(tmp_path / "README.md")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a: found)
    assert base_license("org/downloaded") == "gemma"


def test_code_is_closed_by_its_own_fence():
    assert card_text.code("a") == "`a`"
    assert card_text.code("a`b") == "``a`b``"
    assert card_text.code("`a`") == "`` `a` ``"
    assert card_text.cell("a|b") == "`a\\|b`"
    assert card_text.block("a\n````\nb").splitlines()[0] == "`````"
    assert card_text.link("x", "https://arxiv.org/abs/1") == "[x](https://arxiv.org/abs/1)"
    assert card_text.link("x", "javascript:alert(1)") == "x"


def test_what_was_merged_is_named_and_its_license_not_assumed(tmp_path: Path) -> None:
    given = {"license": "mit", "adapters": ("org/lora", str(tmp_path / "my-lora"))}
    text = model_card(report(), Provenance("org/base", **given), FACTS)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == ["org/base", "org/lora"]
    assert "# base + lora + my-lora wanda" in card_text_plain(text)
    assert "`org/base` with `org/lora` and `my-lora` merged into it, pruned" in text
    assert "License of the base model: `mit`; of what was merged into it: not known." in text
    assert str(tmp_path) not in text
    alone = model_card(report(), Provenance("org/base", license="mit"), FACTS)
    assert yaml.safe_load(alone.split("---\n")[1])["base_model"] == "org/base"
    assert "merged" not in alone


def card_text_plain(text: str) -> str:
    return text.replace("\\", "")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"attn_implementation": "eager", "add_bos_token": True, "max_length": 512},
        {"dtype": "float32", "prefix": "two words; $(ls) `x`"},
        {"prefix": "a,b=c"},
        {"rope": {"a": [1, 2]}, "add_bos_token": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("remote", [False, True])
def test_the_harness_gets_what_scores_depend_on(given: dict[str, Any], remote: bool) -> None:
    """What is shown, typed into a shell and read as the harness does, is what was given."""
    text = model_card(
        report(), Provenance("org/base", model_args=given, trust_remote_code=remote), FACTS
    )
    (line,) = [part for part in text.splitlines() if part.startswith("lm_eval --model hf ")]
    words = shlex.split(line)
    said = words[words.index("--model_args") + 1]
    read = json.loads(said) if said.startswith("{") else simple_parse_args_string(said)
    expected = {"pretrained": "FOLDER", **given}
    assert read == expected | ({"trust_remote_code": True} if remote else {})


def test_secrets_are_not_shown() -> None:
    token = "hf_" + "aB3" * 11
    shown = model_card(
        report(),
        Provenance(
            "org/base",
            command=f"lm_eval --model_args pretrained=a/b,token={token} --api-key k3y",
            model_args={"token": token, "max_length": 8},
        ),
        FACTS,
    )
    assert token not in shown
    assert "k3y" not in shown
    assert "token=REDACTED --api-key REDACTED" in shown
