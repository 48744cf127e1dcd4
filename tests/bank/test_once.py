"""Calibration sets that are drawn once where things are shared, and only there."""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress
from lm_calib_plugin.bank import mixtures
from lm_calib_plugin.bank.mixtures import draw, make_task
from lm_calib_plugin.calibration import build
from lm_calib_plugin.calibration.selectors import stage
from lm_calib_plugin.engine import shared_statistics
from tests.tiny import make_model, make_tokenizer

QUIET = Runtime(progress=False)
WORDS = ["the", "of", "and", "to", "in", "a", "is", "that", "it", "was", "for", "on", "are"]


def write(path: Path, seed: int = 0, documents: int = 30) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(len(WORDS), (documents, 40), generator=generator).tolist()
    path.write_text("\n\n\n".join(" ".join(WORDS[i] for i in row) for row in numbers))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    write(tmp_path / "text.txt")
    return tmp_path / "text.txt"


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipe of every set that is really drawn."""
    done: list[Recipe] = []
    real = mixtures.build_calibration

    def counted(recipe: Recipe, *args: Any, **kwargs: Any) -> CalibrationSet:
        done.append(recipe)
        return real(recipe, *args, **kwargs)

    monkeypatch.setattr(mixtures, "build_calibration", counted)
    return done


def task(text: Path, model_seed: int = 0, tokenizer: Any = None, **fields: Any) -> Any:
    given = {"method": "wanda", "sparsity": 0.5, "calibration": f"file:{text}", "nsamples": 4}
    recipe = Recipe(**{**given, "seqlen": 16, **fields})
    model = make_model(seed=model_seed)
    tokenizer = tokenizer or make_tokenizer()
    return make_task(recipe, model, tokenizer, seqlen=recipe.seqlen, runtime=QUIET)


def test_other_levels_and_methods_draw_nothing_anew(text: Path, draws: list[Recipe]) -> None:
    alone = draw(task(text)).calibration
    gptq = {"method": "gptq", "sparsity": None, "bits": 4, "group_size": 8}
    others = [{"sparsity": 0.3}, {"method": "sparsegpt"}, gptq]
    with shared_statistics() as shared:
        for fields in ({}, *others):
            found = draw(task(text, **fields)).calibration
            assert found.calib_id == alone.calib_id
            assert found.sources == alone.sources
            assert (found.seed, found.seqlen) == (alone.seed, alone.seqlen)
            for one, other in zip(found.sequences, alone.sequences, strict=True):
                assert torch.equal(one, other)
        assert shared.hits == 3
    assert len(draws) == 2
    draw(task(text))
    assert len(draws) == 3


def test_nobody_can_change_what_is_kept(text: Path) -> None:
    with shared_statistics():
        names = []
        for _ in range(3):
            found = draw(task(text)).calibration
            names.append([ids.tolist() for ids in found.sequences])
            names.append(found.sources[0]["documents"])
            found.sequences[0].fill_(5)
            found.sources[0]["documents"] = -1
            found.sources[0]["indices"].clear()
        assert names[:2] == names[2:4] == names[4:]


OTHERS: dict[str, dict[str, Any]] = {
    "seed": {"calib_seed": 7},
    "number": {"nsamples": 5},
    "length": {"seqlen": 12},
    "packing": {"pack": "concat"},
    "fold": {"fold": "choose"},
    "selection": {"select": "zip", "pool": 8},
    "model": {"model_seed": 3},
}


@pytest.mark.parametrize("change", OTHERS)
def test_another_draw_is_another_set(change: str, text: Path, draws: list[Recipe]) -> None:
    with shared_statistics() as shared:
        draw(task(text, pack="pad") if change == "packing" else task(text))
        draw(task(text, **OTHERS[change]))
        assert shared.hits == 0
    assert len(draws) == 2


def test_a_file_that_changed_is_read_again(text: Path, tmp_path: Path) -> None:
    """Also with the same size, and when a folder of files is named."""
    for place in (text, tmp_path):
        write(text)
        with shared_statistics() as shared:
            before = draw(task(place)).calibration
            assert draw(task(place)).calibration.calib_id == before.calib_id
            times = text.stat().st_mtime_ns
            content = text.read_text()
            text.write_text(content[::-1].replace("eht", "the"))
            os.utime(text, ns=(times, times + 1))
            after = draw(task(place)).calibration
            assert after.calib_id != before.calib_id
            assert shared.hits == 1


def test_another_folder_under_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    with shared_statistics() as shared:
        for seed in (1, 2):
            folder = tmp_path / str(seed)
            folder.mkdir()
            write(folder / "text.txt", seed)
            monkeypatch.chdir(folder)
            found.append(draw(task(Path("text.txt"))).calibration.calib_id)
        assert shared.hits == 0
    assert found[0] != found[1]


def test_a_tokenizer_that_changed(text: Path) -> None:
    """Not what a call leaves behind (padding, truncation), but a token and a template count."""
    tokenizer = make_tokenizer()
    with shared_statistics() as shared:
        draw(task(text, tokenizer=tokenizer))
        draw(task(text, tokenizer=tokenizer))
        draw(task(text))
        assert shared.hits == 2
        tokenizer.chat_template = "{{ messages }}"
        draw(task(text, tokenizer=tokenizer))
        tokenizer.add_tokens(["newword"])
        draw(task(text, tokenizer=tokenizer))
        assert shared.hits == 2


def test_text_of_the_model_is_that_of_the_same_model(draws: list[Recipe]) -> None:
    fields = {"calibration": "self", "nsamples": 2, "seqlen": 8}
    unused = Path("unused")
    alone = draw(task(unused, **fields)).calibration
    with shared_statistics() as shared:
        for _ in range(2):
            assert draw(task(unused, **fields)).calibration.calib_id == alone.calib_id
        assert shared.hits == 1
        draw(task(unused, model_seed=3, **fields))
        assert shared.hits == 1


def test_a_draw_that_fails_is_not_kept(text: Path) -> None:
    with shared_statistics() as shared:
        for _ in range(2):
            with pytest.raises(Exception, match="nsamples"):
                draw(task(text, nsamples=10_000))
        assert (shared.hits, shared.bytes) == (0, 0)


def test_the_whole_way_is_the_same(text: Path) -> None:
    """Draw and statistics shared together; the set of the report can be changed."""
    given = {"method": "wanda", "calibration": f"file:{text}", "nsamples": 6, "seqlen": 16}
    cells = [Recipe(**given, propagate="dense", sparsity=s) for s in (0.3, 0.5, 0.3)]

    def digest(recipe: Recipe) -> str:
        report = compress(make_model(), make_tokenizer(), recipe, QUIET)
        assert report.calibration_set is not None
        report.calibration_set.sequences[0].fill_(3)
        return report.weights_digest + report.key

    alone = [digest(one) for one in cells]
    with shared_statistics() as shared:
        assert [digest(one) for one in cells] == alone
        assert shared.hits == 4


def test_every_field_that_is_read_is_part_of_the_name() -> None:
    known = {*Recipe.calibration_fields(), "block_path", "terms", "nsamples_given"}
    # Made of fields that are part of it.
    known |= {"whole_set", "packing_options", "model_fields"}
    source = inspect.getsource(build) + inspect.getsource(stage)
    read = set(re.findall(r"\brecipe\.([a-z_]+)", source))
    assert {"nsamples", "fold", "select"} <= read <= known
