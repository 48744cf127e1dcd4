"""Two models beside each other: what is equal is held once, what differs is compared."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from lm_calib_plugin.diagnostics.pair import check_pair, open_pair, recipe_words, share_equal
from lm_calib_plugin.diagnostics.scoring import divergence_of, nll_of
from lm_calib_plugin.diagnostics.texts import decoded, draw_text, text_recipe
from lm_calib_plugin.errors import NumericalError, UserError
from lm_calib_plugin.export.command import export
from lm_calib_plugin.loading import Loading
from lm_calib_plugin.recipe import Recipe
from lm_calib_plugin.runtime import Runtime
from tests.tiny import make_model, make_tokenizer, random_ids, saved_model

RECIPE = Recipe(method="magnitude", sparsity=0.5)
QUIET = Runtime(progress=False)


def test_a_recipe_and_its_twin(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "dense")
    pair = open_pair(Loading(folder), RECIPE, runtime=QUIET)
    assert pair.report is not None
    assert pair.name == "method=magnitude,sparsity=0.5"
    shared = own = 0
    theirs = dict(pair.compressed.named_parameters())
    for name, mine in pair.dense.named_parameters():
        if mine.data_ptr() == theirs[name].data_ptr():
            shared += 1
        else:
            assert bool((theirs[name] == 0).any())
            own += 1
    assert (shared > 0, own) == (True, 3 * 7)


def test_a_compressed_model_that_is_there(tmp_path: Path) -> None:
    dense, other = saved_model(tmp_path / "a"), saved_model(tmp_path / "b", seed=1)
    pair = open_pair(Loading(dense), compressed=other)
    assert (pair.name, pair.report, pair.calibration) == (other, None, None)
    small = saved_model(tmp_path / "c", vocab_size=50)
    with pytest.raises(UserError, match="50 token ids"):
        open_pair(Loading(dense), compressed=small)


def test_an_export_on_packed_levels(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64}
    dense, out = saved_model(tmp_path / "dense", **sizes), tmp_path / "out"
    recipe = Recipe(method="rtn", bits=4, group_size=32)
    export(recipe, Loading(dense), out, runtime=QUIET)
    there = open_pair(Loading(dense), compressed=str(out))
    made = open_pair(Loading(dense), recipe, runtime=QUIET)
    ids = random_ids([9, 12])
    found = divergence_of(there.dense, there.compressed, ids, progress=False)
    wanted = divergence_of(made.dense, made.compressed, ids, progress=False)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.js, other.js, rtol=1e-4, atol=1e-7)
    weights = out / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(UserError, match="is damaged"):
        open_pair(Loading(dense), compressed=str(out))


def test_one_thing_to_compare_with() -> None:
    for given in ((None, None), (RECIPE, "there")):
        with pytest.raises(UserError, match="compressed: got (neither|both)"):
            check_pair(*given)


def test_sharing_keeps_every_number() -> None:
    dense = make_model()
    other = copy.deepcopy(dense)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(2)
        for model, zero in ((dense, 0.0), (other, -0.0)):  # equal, but not the same bits
            model.model.layers[0].mlp.up_proj.weight[0, 0] = zero
    before = {name: p.clone() for name, p in other.named_parameters()}
    saved = share_equal(dense, other)
    bytes_of = sum(p.numel() * p.element_size() for p in [*dense.parameters(), *dense.buffers()])
    changed = other.model.layers[1].mlp.up_proj.weight
    assert saved == bytes_of - 2 * changed.numel() * 4
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


def test_scores_do_not_depend_on_company() -> None:
    """Sequences of other lengths beside it change nothing of a sequence."""
    dense, other = make_model(seed=0), make_model(seed=1)
    ids = random_ids([9, 17, 9, 5])
    together = divergence_of(dense, other, ids, progress=False)
    for number, one in enumerate(ids):
        alone = divergence_of(dense, other, [one], progress=False)[0]
        torch.testing.assert_close(together[number].js, alone.js, rtol=1e-4, atol=1e-7)
        assert len(alone) == len(one) - 1
    plain = nll_of(dense, ids, progress=False)
    for found, mine in zip(plain, together, strict=True):
        torch.testing.assert_close(found, mine.nll_dense, rtol=1e-5, atol=1e-6)
    for one, found in zip(ids, plain, strict=True):
        loss = dense(one[None], labels=one[None]).loss.detach()  # transformers' own mean
        assert float(found.mean()) == pytest.approx(float(loss), rel=1e-5)


def test_a_model_is_its_own_equal() -> None:
    model = make_model()
    for found in divergence_of(model, copy.deepcopy(model), random_ids([12, 7]), progress=False):
        assert float(found.js.abs().max()) == 0
        assert float(found.kl.abs().max()) == 0


def test_logits_that_are_no_numbers_stop(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(NumericalError, match="the scored model"):
        nll_of(model, random_ids([5]), progress=False)


def test_texts(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"w{i % 90} w{(7 * i) % 90} w3 w4 w5" for i in range(200)))
    recipe = text_recipe(f"file:{file}", {"nsamples": "3", "seqlen": "16"})
    model, tokenizer = make_model(), make_tokenizer()
    drawn = draw_text(recipe, model, tokenizer, QUIET)
    assert [len(s) for s in drawn.sequences] == [16] * 3
    assert draw_text(recipe, model, tokenizer, QUIET).calib_id == drawn.calib_id
    assert decoded(tokenizer, drawn.sequences[0], 8).endswith(" ...")


@pytest.mark.parametrize("given", ["none", "no-such-source", "file:/no/such/file.txt"])
def test_a_text_that_is_none_is_named(given: str) -> None:
    with pytest.raises(UserError) as caught:
        text_recipe(given)
    assert caught.value.argument == "text"


def test_words_of_a_recipe() -> None:
    recipe = Recipe(method="wanda", sparsity=0.5, calibration="c4*0.75+self*0.25")
    assert recipe_words(recipe).startswith("method=wanda,sparsity=0.5")
    assert recipe_words(recipe).endswith("calibration=c4*0.75+self*0.25")
