"""The walk: sequential calibration, pads, chunks, memory, numbers that are not, state."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compress, engine
from lm_calib_plugin.engine import solve
from lm_calib_plugin.errors import CalibError, NumericalError, UserError
from tests.tiny import make_model, random_ids

QUIET = Runtime(progress=False, calib_batch_size=4)
LENGTHS = [32, 20, 7, 32, 15, 9, 31, 3, 12, 32]


def calibration(lengths: list[int] = LENGTHS) -> CalibrationSet:
    return CalibrationSet.of(random_ids(lengths), seqlen=32)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def compressed(recipe: Recipe, runtime: Runtime = QUIET, name: str = "llama") -> nn.Module:
    model = make_model(name)
    compress(model, None, recipe, runtime, calibration())
    return model


def test_a_block_sees_what_compressed_blocks_produce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gram matrices of the walk equal those of plain passes through the half-compressed model."""
    seen: dict[str, torch.Tensor] = {}
    compressed_unit = solve.Solver._compressed

    def spy(self, method, layers, weights, stats):
        seen.update({layer.name: stats.gram().clone() for layer in layers})
        return compressed_unit(self, method, layers, weights, stats)

    monkeypatch.setattr(solve.Solver, "_compressed", spy)
    recipe = Recipe(method="sparsegpt", sparsity=0.6, heldout=0)
    after = compressed(recipe)
    before = make_model()
    for index in range(3):
        # blocks < index compressed, the others dense
        mixed = copy.deepcopy(before)
        for i in range(index):
            mixed.model.layers[i].load_state_dict(after.model.layers[i].state_dict())
        for local in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            name = f"model.layers.{index}.{local}"
            rows: list[torch.Tensor] = []
            hook = mixed.get_submodule(name).register_forward_pre_hook(
                lambda _m, args, rows=rows: rows.append(args[0][0].double())
            )
            with torch.no_grad():
                for ids in random_ids(LENGTHS):
                    mixed(input_ids=ids[None], use_cache=False)
            hook.remove()
            x = torch.cat(rows)
            torch.testing.assert_close(seen[name].double(), x.t() @ x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "gptq"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "bloom"])
def test_pads_and_chunk_size_do_not_matter(method: str, name: str) -> None:
    options = {"sparsity": 0.5}
    if method == "gptq":
        # With propagate=compressed, one weight on the edge between two levels may go the other
        # way when sums are formed in another order, and change every block after it.
        options = {"bits": 3, "group_size": 8, "propagate": "dense"}
    recipe = Recipe(method=method, **options)
    one = flat(compressed(recipe, Runtime(progress=False, calib_batch_size=1), name))
    for size in (3, 10):
        many = flat(compressed(recipe, Runtime(progress=False, calib_batch_size=size), name))
        agree = torch.isclose(many, one, rtol=1e-3, atol=1e-5).float().mean()
        assert agree > (0.999 if method == "gptq" else 0.99999)


def test_the_same_recipe_gives_the_same_bits() -> None:
    recipe = Recipe(method="sparsegpt", sparsity=0.5)
    first, second = make_model(), make_model()
    reports = [compress(m, None, recipe, QUIET, calibration()) for m in (first, second)]
    assert reports[0].weights_digest == reports[1].weights_digest
    assert reports[0].key == reports[1].key
    assert torch.equal(flat(first), flat(second))


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(method="magnitude", sparsity=0),
        Recipe(method="wanda", sparsity=0),
        Recipe(method="sparsegpt", sparsity=0),
        Recipe(method="rtn", bits=16),
        Recipe(method="gptq", bits=16),
    ],
    ids=lambda r: r.method,
)
def test_zero_strength_changes_no_bit(recipe: Recipe) -> None:
    assert torch.equal(flat(compressed(recipe)), flat(make_model()))


def test_the_key_knows_more_of_the_model_than_its_weights() -> None:
    """Equal weights under another rotary base are another model, and give other masks."""
    keys = set()
    for theta in (10000.0, 100.0):
        model = make_model("llama", rope_parameters={"rope_type": "default", "rope_theta": theta})
        recipe = Recipe(method="wanda", sparsity=0.5)
        keys.add(compress(model, None, recipe, QUIET, calibration()).key)
    assert len(keys) == 2


def test_not_a_number_in_held_out_activations_is_found() -> None:
    ids = random_ids([16] * 10)
    held = engine.heldout_indices(10, 0.1)[0]
    ids[held] = torch.tensor([5] * 16)
    model = make_model()
    model.model.embed_tokens.weight.data[5] = float("nan")
    for i, sequence in enumerate(ids):
        if i != held:
            sequence[sequence == 5] = 6
    with pytest.raises(NumericalError, match="calibration input"):
        compress(
            model,
            None,
            Recipe(method="wanda", sparsity=0.5),
            QUIET,
            CalibrationSet.of(ids, seqlen=16),
        )


@pytest.mark.parametrize("stage", ["observe", "propagate", "capture"])
def test_out_of_memory_halves_the_chunk(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(method="wanda", sparsity=0.5)
    expected = flat(compressed(recipe))
    model = make_model()
    victim = {
        "observe": model.model.layers[1].self_attn.o_proj,
        "propagate": model.model.layers[1],
        "capture": model.model.embed_tokens,
    }[stage]
    failures: list[int] = []

    def fail(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if x.shape[0] > 1:
            failures.append(x.shape[0])
            raise torch.OutOfMemoryError("injected")

    victim.register_forward_pre_hook(fail, with_kwargs=True)
    report = compress(model, None, recipe, QUIET, calibration())
    assert set(failures) == {4, 2}
    assert any("out of memory" in w for w in report.warnings)
    torch.testing.assert_close(flat(model), expected, rtol=0, atol=0)


def test_out_of_memory_with_one_sequence_says_what_to_change() -> None:
    model = make_model()

    def fail(_module: nn.Module, _args: object) -> None:
        raise torch.OutOfMemoryError("injected")

    model.model.layers[0].mlp.register_forward_pre_hook(fail)
    with pytest.raises(CalibError, match="one sequence at a time.*seqlen"):
        compress(model, None, Recipe(method="wanda", sparsity=0.5), QUIET, calibration())


def test_not_a_number_in_the_weights_is_found_first() -> None:
    model = make_model()
    model.model.layers[2].mlp.up_proj.weight.data[3, 4] = float("nan")
    before = flat(model).nan_to_num()
    with pytest.raises(NumericalError, match=r"layers\.2\.mlp\.up_proj, weights"):
        compress(model, None, Recipe(method="wanda", sparsity=0.5), QUIET, calibration())
    assert torch.equal(flat(model).nan_to_num(), before)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "gptq"])
def test_infinite_activations_name_the_layer(method: str) -> None:
    model = make_model()
    hook = model.model.layers[1].post_attention_layernorm.register_forward_hook(
        lambda _m, _a, out: out / 0
    )
    options = {"bits": 3, "group_size": 8} if method == "gptq" else {"sparsity": 0.5}
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.\w+_proj, calibration input"):
        compress(
            model,
            None,
            Recipe(method=method, calibration="random", **options),
            QUIET,
            calibration(),
        )
    hook.remove()


def test_a_result_that_is_no_number_is_never_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_calib_plugin.pruning.pipeline import Pipeline

    honest = Pipeline.compress_together

    def broken(self, weights, stats, dtype=torch.float32):
        results = honest(self, weights, stats, dtype)
        results[0].weight[0, 0] = float("inf")
        return results

    monkeypatch.setattr(Pipeline, "compress_together", broken)
    model = make_model()
    before = flat(model)
    with pytest.raises(NumericalError, match=r"layers\.0\.self_attn\.q_proj, result"):
        compress(model, None, Recipe(method="wanda", sparsity=0.5), QUIET, calibration())
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_left_as_found(fails: bool) -> None:
    model = make_model().train()
    model.model.layers[1].mlp.eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    if fails:
        model.model.layers[1].register_forward_pre_hook(lambda _m, _a: 1 / 0)
    training = [m.training for m in model.modules()]
    gradients = [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    torch.set_float32_matmul_precision("medium")
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    recipe = Recipe(method="sparsegpt", sparsity=0.5)
    try:
        compress(model, None, recipe, QUIET, calibration())
    except ZeroDivisionError:
        assert fails
    assert [m.training for m in model.modules()] == training
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert random.getstate() == python
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy, strict=True))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert model.config.use_cache
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision("highest")


def test_held_out_sequences_stay_out_of_the_statistics() -> None:
    """Changing a held-out sequence changes the reported error and not one weight."""
    ids = random_ids([32] * 10)
    held = engine.heldout_indices(10, 0.1)
    assert len(held) == 1
    other = list(ids)
    other[held[0]] = random_ids([32], seed=9)[0]
    results = []
    for sequences in (ids, other):
        model = make_model()
        report = compress(
            model,
            None,
            Recipe(method="gptq", bits=3, group_size=8),
            QUIET,
            CalibrationSet.of(sequences, seqlen=32),
        )
        results.append((flat(model), report))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].error()["calibration"] == results[1][1].error()["calibration"]
    assert results[0][1].error()["heldout"] != results[1][1].error()["heldout"]


def test_reported_error_is_the_output_error() -> None:
    model, dense = make_model(), make_model()
    recipe = Recipe(method="wanda", sparsity=0.5, heldout=0)
    report = compress(model, None, recipe, QUIET, calibration())
    name = "model.layers.0.self_attn.q_proj"
    rows: list[torch.Tensor] = []
    hook = dense.get_submodule(name).register_forward_pre_hook(
        lambda _m, args: rows.append(args[0][0].double())
    )
    with torch.no_grad():
        for ids in random_ids(LENGTHS):
            dense(input_ids=ids[None], use_cache=False)
    hook.remove()
    x = torch.cat(rows)
    w, v = (m.get_submodule(name).weight.double() for m in (dense, model))
    expected = ((x @ (v - w).t()) ** 2).sum() / ((x @ w.t()) ** 2).sum()
    row = next(r for r in report.layers if r.name == name)
    assert row.error_calibration == pytest.approx(expected.item(), rel=1e-4)
    assert row.error_heldout is None
    assert row.tokens == sum(LENGTHS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_keep_their_dtype(dtype: torch.dtype) -> None:
    for recipe in (Recipe(method="sparsegpt", pattern="2:4"), Recipe(method="rtn", group_size=8)):
        model = make_model().to(dtype)
        report = compress(model, None, recipe, QUIET, calibration())
        assert {p.dtype for p in model.parameters()} == {dtype}
        if recipe.method == "sparsegpt":
            assert report.achieved["sparsity"] == 0.5
        else:
            assert report.achieved["bits"] == 4.0


def test_ids_beyond_the_embeddings_are_refused() -> None:
    bad = CalibrationSet.of([torch.tensor([5, 200])], seqlen=8)
    with pytest.raises(UserError, match="token id 200 >= 97 rows"):
        compress(make_model(), None, Recipe(method="wanda", sparsity=0.5), QUIET, bad)


def test_a_single_sequence_holds_nothing_out_and_says_so() -> None:
    report = compress(
        make_model(), None, Recipe(method="wanda", sparsity=0.5), QUIET, calibration([16])
    )
    assert report.error()["heldout"] is None
    assert any("nothing held out" in w for w in report.warnings)


def test_the_side_file_has_one_row_a_layer(tmp_path) -> None:
    import hashlib
    import json

    runtime = Runtime(progress=False, report_dir=str(tmp_path))
    report = compress(
        make_model(), None, Recipe(method="wanda", sparsity=0.5), runtime, calibration()
    )
    file = next(tmp_path.iterdir())
    assert len(json.loads(file.read_text())["layers"]) == 21
    assert hashlib.sha256(file.read_bytes()).hexdigest() == report.report_sha256
    again = compress(
        make_model(), None, Recipe(method="wanda", sparsity=0.5), runtime, calibration()
    )
    assert again.report_file == report.report_file == str(file)
    assert json.loads(json.dumps(report.summary())) == report.summary()


def test_a_dispatched_model_gives_the_same_weights() -> None:
    """Modules with accelerate hooks (as parallelize=True places them) are replayed like others."""
    from accelerate import dispatch_model

    recipe = Recipe(method="sparsegpt", sparsity=0.5)
    expected = flat(compressed(recipe))
    model = make_model()
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    places = dict.fromkeys([*names, *(f"model.layers.{i}" for i in range(3))], "cpu")
    model = dispatch_model(model, places, force_hooks=True)
    forwards = [m.__dict__.get("forward") for m in model.modules()]
    compress(model, None, recipe, QUIET, calibration())
    assert torch.equal(flat(model), expected)
    assert [m.__dict__.get("forward") for m in model.modules()] == forwards
