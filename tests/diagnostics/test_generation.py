"""Texts that two models write: planted loops, odd lengths and refusals are found and named."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_calib_plugin import cli
from lm_calib_plugin.diagnostics.generation import (
    Generated,
    Prompts,
    Side,
    Written,
    diagnose,
    generated,
    greedy,
)
from lm_calib_plugin.diagnostics.health import (
    REFUSALS,
    distinct_share,
    first_difference,
    loop_of,
    refuses,
    repeated_share,
)
from lm_calib_plugin.diagnostics.pair import Pair
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.loading import Loading
from lm_calib_plugin.runtime import Runtime
from tests.tiny import VOCAB, make_model, make_tokenizer, random_ids, saved_model

QUIET = Runtime(progress=False)
END = 2


def following(successor: dict[int, int]) -> Any:
    """Return a model that writes after each token the one that is told, by default the next."""
    model = make_model(
        "llama", hidden_size=104, num_hidden_layers=1, max_position_embeddings=128,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCAB, 104))
        head = torch.zeros(VOCAB, 104)
        for i in range(VOCAB):
            head[successor.get(i, min(i + 1, VOCAB - 1)), i] = 1.0
        model.lm_head.weight.copy_(head)
    model.config.eos_token_id = model.generation_config.eos_token_id = END
    return model


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["inspect", "generation", *arguments])
    return int(end.value.code or 0)


@pytest.mark.parametrize(
    ("ids", "piece", "tokens"),
    [
        ([5, 7] * 4, 2, 8),
        ([1, 2, 3, 9, 9, 9, 9, 9, 9, 9, 9], 1, 8),
        ([4, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1], 3, 10),
        ([*range(30), *range(30, 40), *range(30, 40), *range(30, 40)], 10, 30),
        ([8, *[1, 1, 2] * 3], 3, 9),
    ],
)
def test_loops_by_hand(ids: list[int], piece: int, tokens: int) -> None:
    loop = loop_of(ids)
    assert loop is not None
    assert (len(loop.piece), loop.tokens) == (piece, tokens)
    assert loop.times == tokens / piece


@pytest.mark.parametrize(
    "ids",
    [
        [],
        [1],
        [1] * 7,  # too few tokens
        [1, 2, 3, 4, 5, 6] * 2,  # twice only
        [*[1, 2] * 6, 3],  # not at the end
        list(range(64)),
    ],
)
def test_what_is_no_loop(ids: list[int]) -> None:
    assert loop_of(ids) is None


def test_loops_as_brute_force() -> None:
    dice = random.Random(0)
    seen = set()
    for _ in range(400):
        ids = [dice.randrange(2) for _ in range(dice.randrange(1, 16))]
        best = None
        for length in range(1, len(ids) + 1):
            for tokens in range(len(ids), 0, -1):
                tail = ids[-tokens:]
                if tokens >= max(8, 3 * length) and tail == (tail[:length] * 99)[:tokens]:
                    best = (tuple(tail[:length]), tokens)
                    break
            if best:
                break
        loop = loop_of(ids)
        assert best == (None if loop is None else (loop.piece, loop.tokens))
        seen.add(best is None)
    assert seen == {True, False}


def test_shares_by_hand() -> None:
    assert repeated_share([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repeated_share([1, 2, 3]) == 0
    assert distinct_share([[1, 1, 2], [2]], 1) == 0.5
    assert distinct_share([[1, 1, 2], [1, 2]], 2) == pytest.approx(2 / 3)
    assert distinct_share([[1]], 2) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([1, 2], [1, 2]) is None


def test_refusals() -> None:
    assert all(refuses(f"  \u201c{text}".replace("\u201c", '"')) for text in REFUSALS)
    assert refuses("I can\u2019t help with that.")
    assert not refuses("Sorry to hear that you can't sleep.")
    assert not refuses("")


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_batches_write_what_single_prompts_do(name: str) -> None:
    model, tokenizer = make_model(name), make_tokenizer()
    prompts = [ids.tolist() for ids in random_ids([3, 9, 1, 5, 5, 2, 12])]
    state = torch.get_rng_state()
    together = greedy(model, prompts, 20, tokenizer, batch=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert together == [greedy(model, [ids], 20, tokenizer)[0] for ids in prompts]
    for ids, one in zip(prompts, together, strict=True):
        whole = list(ids)
        while len(whole) < len(ids) + 20:
            with torch.no_grad():
                best = int(model(torch.tensor([whole])).logits[0, -1].argmax())
            if best == END:
                break
            whole.append(best)
        assert list(one.ids) == whole[len(ids) :]
        assert (one.end == END) == (len(whole) < len(ids) + 20)


def test_a_model_that_circles_is_found_and_named() -> None:
    tokenizer = make_tokenizer()
    circle = following({50: 51, 51: 52, 52: 50})
    pair = Pair(following({}), circle, tokenizer, "plain", "circles")
    found = generated(pair, [[40], [47, 48], [60]], 30, progress=False)
    assert [one.loop is not None for one in found.compressed.texts] == [True, True, False]
    assert found.compressed.texts[0].ids[-3:] in [(50, 51, 52), (51, 52, 50), (52, 50, 51)]
    assert found.differences == [12, 4, None]
    assert found.survival()[3:5] == [1.0, pytest.approx(2 / 3)]
    before, after, gap = found.compared()["loops"]
    assert (before, after) == (0, pytest.approx(2 / 3))
    assert gap.value == pytest.approx(2 / 3)
    from lm_calib_plugin.diagnostics.generation_report import document

    report = document(pair, found, {"model": "plain"})
    piece = tokenizer.decode([50, 51, 52])
    assert any(f"{piece!r}" in one for one in report.findings)
    assert any(
        one.startswith("2 of 3 texts of the compressed model end") for one in report.findings
    )
    assert report.data["texts"][0]["first_difference"] == 12


def test_odd_lengths() -> None:
    tokenizer = make_tokenizer()
    short = Pair(following({}), following({45: END, 88: END}), tokenizer, "plain", "short")
    found = generated(short, [[40], [45], [50]], 20, progress=False)
    assert [len(one.ids) for one in found.compressed.texts] == [5, 0, 20]
    assert found.lengths() == {"ended early": [0, 1], "never ended": [], "empty": [1]}
    assert found.differences == [5, 0, None]
    endless = Pair(following({43: END}), following({}), tokenizer, "ends", "endless")
    found = generated(endless, [[40]], 20, progress=False)
    assert found.lengths() == {"ended early": [], "never ended": [0], "empty": []}
    assert found.compared()["cut at the limit"][:2] == (0, 1)


def test_refusals_of_both_sides_are_counted() -> None:
    def side(*texts: str) -> Side:
        return Side(tuple(Written((1, 2), END, text) for text in texts))

    found = Generated(
        ("a", "b"), ((1,), (2,)), side("Sure.", "I'm sorry, no."), side("I cannot.", "I can't."), 5
    )
    assert found.compared()["refusals"][:2] == (0.5, 1.0)


def test_equal_models_write_equal_texts(tmp_path: Path, capsys: Any) -> None:
    model = saved_model(tmp_path / "m")
    found = diagnose(
        Loading(model, device="cpu"), Prompts(count=4), compressed=model, tokens=12, runtime=QUIET
    )
    assert "write the same for all 4 prompts" in found.findings[0]
    assert found.data["identical"] == 1
    assert set(found.data["survival"]) == {1.0}
    assert all(
        row["difference"] == {"value": 0, "low": 0, "high": 0}
        for row in found.data["measures"].values()
    )


def test_command(tmp_path: Path, capsys: Any) -> None:
    model = saved_model(tmp_path / "m", initializer_range=0.3)
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("the of", "it was a", "b")))
    recipe = ["--method", "magnitude", "--sparsity", "0.7"]
    plain = ["--pretrained", model, "--device", "cpu", "--quiet", "--new-tokens", "10"]
    out = tmp_path / "out"
    code = command(*plain, *recipe, "--prompts", str(file), "--out", str(out))
    assert code == 0
    assert capsys.readouterr().out.startswith("Generation: ")
    data = json.loads((out / "generation.json").read_text())
    assert [one["prompt"] for one in data["texts"]] == ["the of", "it was a", "b"]
    assert data["recipe"]["method"] == "magnitude"
    assert (out / "generation.html").is_file()
    text = tmp_path / "text.txt"
    text.write_text(" ".join(["the", "of", "and", "to", "in"] * 40))
    assert command(*plain, *recipe, "--prompts", f"file:{text}", "--prompt-count", "3") == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--method", "magnitude", "--sparsity", "0.5", "--prompts", "nowhere.txt"], "no such"),
        (["--method", "magnitude", "--sparsity", "0.5", "--prompts", "nosource:x"], "prompts: "),
        (["--method", "magnitude", "--sparsity", "0.5", "--prompts", "none"], "prompts: got none"),
        ([], "compressed: got neither"),
    ],
)
def test_bad_input_is_told_before_anything_is_loaded(
    words: list[str], told: str, capsys: Any
) -> None:
    assert command("--pretrained", "no/model", *words) == 2
    assert told in capsys.readouterr().err


def test_what_only_the_model_tells(tmp_path: Path, capsys: Any) -> None:
    model = saved_model(tmp_path / "m")
    plain = ["--pretrained", model, "--compressed", model, "--device", "cpu", "--quiet"]
    assert command(*plain, "--chat") == 2
    assert "no chat template" in capsys.readouterr().err
    assert command(*plain, "--new-tokens", "64") == 2
    assert "accepts 64 positions" in capsys.readouterr().err


def test_chat_asks_with_the_template() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}it is{% endif %}"
    )
    asked = Prompts(count=2, chat=True)
    for ids in asked.drawn(make_model(), tokenizer, QUIET):
        assert tokenizer.decode(ids).endswith("it is")


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("the of\n\nand to\nin a\n")
    tokenizer = make_tokenizer()
    drawn = Prompts(str(file), count=2).drawn(make_model(), tokenizer, QUIET)
    assert [tokenizer.decode(ids) for ids in drawn] == ["the of", "and to"]
    for count in (0, -1):
        with pytest.raises(UserError, match="prompt-count"):
            Prompts(str(file), count=count)
