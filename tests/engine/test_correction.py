"""Correction for the error of earlier blocks: the target, and the two streams it comes from."""

from __future__ import annotations

import copy

import pytest
import torch

from lm_calib_plugin import Recipe, compress
from lm_calib_plugin.engine import solve
from lm_calib_plugin.engine.correction import RIDGE, input_shift
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.statistics import Gram
from tests.engine.test_walk import LENGTHS, QUIET, calibration, flat
from tests.tiny import make_model, random_ids


def rows(seed: int, width: int = 12) -> torch.Tensor:
    return torch.randn(200, width, generator=torch.Generator().manual_seed(seed))


def test_the_target_is_a_ridge_regression_on_the_dense_outputs() -> None:
    weight, own = rows(0)[:7], rows(1)
    dense = own + 0.3 * rows(2)
    own[:, 4] = dense[:, 4] = 0.0  # an input that is always silent
    stats = Gram.empty(12)
    stats.update(own)
    x, y, w = own.double(), dense.double(), weight.double()
    root = (RIDGE * (x.t() @ x).diagonal()).sqrt()
    # Rows of the ridge stand below those of the data.
    left = torch.cat([x, torch.diag(root)])
    right = torch.cat([y @ w.t(), root[:, None] * w.t()])
    best = torch.linalg.lstsq(left, right, driver="gelsd").solution.t()
    best[:, 4] = w[:, 4]
    cross = own.t() @ (dense - own)
    found = weight + weight @ input_shift(stats, cross).t()
    torch.testing.assert_close(found.double(), best, rtol=1e-4, atol=1e-4)
    assert not input_shift(stats, torch.zeros(12, 12)).any()


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_both_models_are_followed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Cross products equal those of plain passes through the dense and the half-pruned model."""
    seen: dict[str, torch.Tensor] = {}
    target = solve.Solver._target

    def spy(self, layer, before, watched):
        if watched.cross is not None:
            seen[layer.name] = watched.cross.clone()
        return target(self, layer, before, watched)

    monkeypatch.setattr(solve.Solver, "_target", spy)
    before, after = make_model(name), make_model(name)
    recipe = Recipe(
        method="sparsegpt",
        sparsity=0.6,
        correction=0.5,
        heldout=0,
        # One block is left out: both models still have to pass through it.
        ignore=["layers.1.*"],
    )
    compress(after, None, recipe, QUIET, calibration())
    assert not [n for n in seen if ".experts." in n or ".layers.1." in n]
    for index in (0, 2):
        mixed = copy.deepcopy(before)
        for i in range(index):
            mixed.model.layers[i].load_state_dict(after.model.layers[i].state_dict())
        local = "self_attn.q_proj"
        found = []
        for model in (mixed, before):
            inputs: list[torch.Tensor] = []
            hook = (
                model.model.layers[index]
                .get_submodule(local)
                .register_forward_pre_hook(
                    lambda _m, args, inputs=inputs: inputs.append(args[0][0].double())
                )
            )
            with torch.no_grad():
                for ids in random_ids(LENGTHS):
                    model(input_ids=ids[None], use_cache=False)
            hook.remove()
            found.append(torch.cat(inputs))
        expected = found[0].t() @ (found[1] - found[0])
        cross = seen[f"model.layers.{index}.{local}"].double()
        torch.testing.assert_close(cross, expected, rtol=1e-3, atol=1e-3)


def test_chunks_do_not_matter_and_nothing_is_corrected_by_zero() -> None:
    from lm_calib_plugin import Runtime

    def run(runtime: Runtime, **options: float) -> tuple[torch.Tensor, str]:
        model = make_model()
        recipe = Recipe(method="sparsegpt", sparsity=0.5, **options)
        report = compress(model, None, recipe, runtime, calibration())
        return flat(model), report.weights_digest

    one = Runtime(progress=False, calib_batch_size=1)
    assert run(QUIET)[1] == run(QUIET, correction=0)[1] != run(QUIET, correction=0.5)[1]
    torch.testing.assert_close(run(QUIET, correction=0.5)[0], run(one, correction=0.5)[0])


def test_dense_inputs_leave_nothing_to_correct() -> None:
    reports = [
        compress(
            make_model(),
            None,
            Recipe(method="sparsegpt", sparsity=0.5, propagate="dense", correction=amount),
            QUIET,
            calibration(),
        )
        for amount in (0.0, 0.7)
    ]
    assert reports[0].weights_digest == reports[1].weights_digest
    assert reports[0].key == reports[1].key


def test_methods_without_a_gram_matrix_refuse() -> None:
    with pytest.raises(UserError, match="`correction` is not an option of method `wanda`"):
        Recipe(method="wanda", sparsity=0.5, correction=0.5)
    # What a preset adds is for its own score and update.
    plain = Recipe(method="swap_pcg", sparsity=0.5, score="wanda", update="none").make_method()
    assert (plain.correction, plain.group) == (0, None)
