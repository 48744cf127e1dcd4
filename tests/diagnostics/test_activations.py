"""Inspections of whole models: against plain forward passes, and with something planted."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from lm_calib_plugin import cli, engine
from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.diagnostics.activations import ALL, REST, Result, document, inspect
from lm_calib_plugin.diagnostics.activations.asking import asked
from lm_calib_plugin.diagnostics.activations.inputs import Grams
from lm_calib_plugin.diagnostics.activations.stream import Stream
from lm_calib_plugin.diagnostics.activations.watching import Watch
from lm_calib_plugin.engine.batches import Chunk
from lm_calib_plugin.errors import NumericalError, UserError
from tests.bank.corpora import write
from tests.tiny import make_model, make_tokenizer, random_ids, saved_model

LENGTHS = [16, 9, 16, 3, 12, 16, 1]


def set_of(sequences: Sequence[torch.Tensor]) -> CalibrationSet:
    return CalibrationSet.of(sequences, seqlen=max(map(len, sequences)))


def looked(model: Any, sets: dict[str, Sequence[torch.Tensor]], **given: Any) -> Result:
    made = {name: set_of(sequences) for name, sequences in sets.items()}
    options = {"batch_size": 3, "progress": False, **given}
    return inspect(model, make_tokenizer(), made, **options)


def found_in(result: Result) -> list[str]:
    return list(document(result, make_tokenizer(), "tiny").findings)


def plain_inputs(model: Any, sequences: Sequence[torch.Tensor]) -> dict[str, list[np.ndarray]]:
    """Inputs of every linear layer of the blocks, one sequence at a time, by plain hooks."""
    found: dict[str, list[np.ndarray]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _m, args, name=name: found.setdefault(name, []).append(
                args[0][0].double().numpy()
            )
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    with torch.no_grad():
        for ids in sequences:
            model(ids[None])
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen2"])
def test_as_plain_forward_passes(name: str) -> None:
    model, sequences = make_model(name), random_ids(LENGTHS)
    result = looked(model, {"a": sequences})
    plain = plain_inputs(model, sequences)
    assert sorted(plain) == sorted(layer for one in result.inputs for layer in one.layers)
    for one in result.inputs:
        for layer in one.layers:
            rows = np.concatenate(plain[layer])
            later = np.concatenate([x[1:] for x in plain[layer]])
            for part, x in ((ALL, rows), (REST, later)):
                found = result.sets["a"].inputs[one.name][part]
                assert found["tokens"] == len(x)
                assert found["amax"] == pytest.approx(np.abs(x).max(), rel=1e-4)
                expected = stats.kurtosis(x.reshape(-1), fisher=False)
                assert found["kurtosis"] == pytest.approx(expected, rel=1e-4)
                assert found["median"] == pytest.approx(np.median(np.abs(x)), rel=0.03)
                h = x.T @ x / len(x)
                share = np.trace(h) ** 2 / (h**2).sum() / len(h)
                assert result.rank_shares["a"][one.name][part] == pytest.approx(share, rel=1e-3)


def comparable(result: Result) -> Any:
    return [
        {name: one.inputs for name, one in result.sets.items()},
        {name: one.halves for name, one in result.sets.items()},
        {name: one.features for name, one in result.sets.items()},
        [[m.level, m.channel, m.sequence, m.position] for m in result.sets["a"].massive],
        {"|".join(names): pair for names, pair in result.pairs.items()},
        result.rank_shares,
    ]


def close(a: Any, b: Any, where: str = "") -> None:
    """Equal but for rounding of hidden states, which depends on the size of batches."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            if key not in ("top_channel", "beyond_error"):
                close(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            close(x, y, f"{where}/{number}")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=2e-2, abs=2e-3), where
    else:
        assert a == b, where


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_chunks_and_pads_do_not_count(name: str) -> None:
    model = make_model(name)
    sets = {"a": random_ids(LENGTHS), "b": random_ids([16] * 4, seed=2)}
    whole = looked(model, sets, batch_size=8, sample_rows=8)
    for size in (1, 2):
        close(comparable(looked(model, sets, batch_size=size, sample_rows=8)), comparable(whole))


def test_several_passes_find_what_one_does() -> None:
    model = make_model()
    sets = {"a": random_ids(LENGTHS), "b": random_ids([16] * 4, seed=2)}
    whole = looked(model, sets)
    assert whole.passes == 1
    # 32 * 32 (three times) and 48 * 48 numbers a block, two matrices of two sets.
    block = 16 * (3 * 32**2 + 48**2)
    parts = looked(model, sets, gram_bytes=block)
    assert (parts.passes, parts.left_out) == (3, [])
    assert comparable(parts) == comparable(whole)
    small = looked(model, sets, gram_bytes=block - 16)
    assert small.passes == 3
    assert small.left_out == [f"model.layers.{i}.mlp.down_proj" for i in range(3)]
    assert "frobenius" not in small.pairs["a", "b"]["model.layers.0.mlp.down_proj"][ALL]
    facts = document(small, None, "tiny").facts
    assert facts["no Gram matrix"].startswith("3 inputs")
    none = looked(model, sets, gram_bytes=0)
    assert (none.passes, none.rank_shares) == (1, {})
    assert none.sets["a"].inputs == whole.sets["a"].inputs


def test_a_pass_that_ran_out_of_memory_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    sets = {"a": random_ids([16] * 8), "b": random_ids([16] * 4, seed=2)}
    whole = looked(model, sets, batch_size=4)
    listen, update = Watch.listen, Stream.update

    def short(self: Any, state: Any, chunk: Any, number: int, *rest: Any) -> None:
        listen(self, state, chunk, number, *rest)
        if chunk.rows > 2 and chunk.numbers[0] == 4 and number == 1 and self.found:
            raise torch.OutOfMemoryError("in the middle of a block")

    def shorter(self: Any, level: int, chunk: Any) -> None:
        if chunk.rows > 1 and level == 2 and 4 in chunk.numbers:
            raise torch.OutOfMemoryError("at the residual stream")
        update(self, level, chunk)

    monkeypatch.setattr(Watch, "listen", short)
    monkeypatch.setattr(Stream, "update", shorter)
    again = looked(model, sets, batch_size=4)
    close(comparable(again), comparable(whole))
    a, b = again.sets["a"].stream, whole.sets["a"].stream
    assert a is not None
    assert b is not None
    assert torch.equal(a.medians[..., 1], b.medians[..., 1])
    torch.testing.assert_close(a.peaks, b.peaks)
    assert again.warnings == [f"out of memory: chunks reduced to {n} sequences" for n in (2, 1)]


def test_memory_does_not_grow_with_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    update, most = Stream.update, [0]

    def alive() -> int:
        tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
        storages = [t.untyped_storage() for t in tensors if t.device.type == "cpu"]
        return sum({one.data_ptr(): one.nbytes() for one in storages}.values())

    def watched(self: Any, level: int, chunk: Any) -> None:
        update(self, level, chunk)
        if level == 2 and chunk.numbers[0] % 16 == 14:
            most[0] = max(most[0], alive())

    monkeypatch.setattr(Stream, "update", watched)
    peaks = []
    # All samples are full with 32 sequences, those of first tokens too.
    for count in (32, 32, 128):
        gc.collect()
        most[0] = 0
        sequences = random_ids([16] * count)
        looked(model, {"a": sequences}, batch_size=2, sample_rows=8)
        # Ids are there as they were given, and once more in chunks that wait.
        peaks.append(most[0] - sum(16 * len(ids) for ids in sequences))
    every = 4 * 16 * 32 * (128 - 32)
    assert peaks[2] - peaks[1] < every / 8, "hidden states of more than a chunk live"


def plant(norm: nn.Module, readers: Sequence[nn.Linear], channel: int, factor: float) -> None:
    with torch.no_grad():
        norm.weight[channel] *= factor  # type: ignore[operator, index]
        for reader in readers:
            reader.weight[:, channel] /= factor


def test_a_planted_outlier_channel_is_named_at_every_consumer() -> None:
    model, sequences = make_model(), random_ids([24] * 6)
    before = {"a": sequences}
    clean = looked(model, before)
    assert not any("times the median channel (" in s for s in found_in(clean))
    with torch.no_grad():
        logits = model(sequences[0][None]).logits
    layer = model.model.layers[1]
    attention = layer.self_attn
    plant(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], 5, 200.0)
    plant(layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj], 9, 100.0)
    with torch.no_grad():
        # The function is the same: only what its parts see has changed.
        torch.testing.assert_close(model(sequences[0][None]).logits, logits, rtol=1e-3, atol=1e-4)
    result = looked(model, {"a": sequences, "b": random_ids([24] * 6, seed=7)})
    inputs = result.sets["a"].inputs
    for name, channel in (
        ("model.layers.1.self_attn.q_proj+k_proj+v_proj", 5),
        ("model.layers.1.mlp.gate_proj+up_proj", 9),
    ):
        for part in (ALL, REST):
            entries = inputs[name][part]["outlier_channels"]
            assert [e["channel"] for e in entries] == [channel]
            times = inputs[name][ALL]["outlier_channels"][0]["times"]
        told = f"{name}: channel {channel} is {times:.0f} times the median channel (set a)."
        assert told in found_in(result)
        snr = inputs[name][ALL]["snr"]
        assert (
            snr["plain"]["int8 per tensor"]
            < clean.sets["a"].inputs[name][ALL]["snr"]["plain"]["int8 per tensor"]
        )
        assert snr["smoothed"]["int8 per tensor"] > snr["plain"]["int8 per tensor"]
        # The channel is the model's, not the text's.
        assert result.pairs["a", "b"][name][ALL]["jaccard"] == 1.0
    others = [n for n, parts in inputs.items() if ".1." not in n or "_proj+" not in n]
    assert not any(inputs[name][ALL]["outlier_channels"] for name in others)
    told = next(s for s in found_in(result) if s.startswith("2 of 12 inputs have channels"))
    assert told.endswith("without first tokens 2 do.")


def test_a_planted_dead_expert_is_named() -> None:
    model = make_model("mixtral", num_experts_per_tok=1)
    weight = model.model.layers[1].mlp.gate.weight
    with torch.no_grad():
        # One of x and -x is above 0, so that with one expert a token 0 is never chosen.
        weight[1], weight[2] = -weight[0], 0.0
    result = looked(model, {"a": random_ids([24] * 8), "b": random_ids([24] * 8, seed=4)})
    findings = found_in(result)
    for name in ("a", "b"):
        told = [s for s in findings if "model.layers.1.mlp.experts.2 saw no token" in s]
        assert any(f"(set {name}); an even share is 48." in s for s in told)
        tokens = result.sets[name].inputs["model.layers.1.mlp.experts.2.gate_up_proj"][ALL]
        assert tokens == {"tokens": 0}
    assert not any("layers.1.mlp.experts.0 saw no token" in s for s in findings)
    text = document(result, make_tokenizer(), "tiny").text()
    assert "## Experts with few tokens" in text


def test_first_tokens_of_experts_are_first_tokens() -> None:
    """The first row that an expert sees of a sequence is hardly ever its first token."""
    model, sequences = make_model("mixtral"), random_ids([16] * 6)
    result = looked(model, {"a": sequences})
    for index in range(3):
        firsts = [
            parts[ALL]["tokens"] - parts[REST]["tokens"]
            for name, parts in result.sets["a"].inputs.items()
            if f"layers.{index}.mlp.experts" in name and name.endswith("gate_up_proj")
        ]
        # Two experts a token, one first token a sequence.
        assert sum(firsts) == 2 * 6


def test_planted_massive_activations_are_named() -> None:
    model = make_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[1, 7] = -4000.0
    start = torch.tensor([1])
    sequences = [torch.cat([start, ids]) for ids in random_ids([15] * 5)]
    sequences[3][6] = 1
    result = looked(model, {"bos": sequences, "other": random_ids([16] * 5)})
    hidden: list[torch.Tensor] = []
    hooks = [
        b.register_forward_pre_hook(lambda _m, args: hidden.append(args[0][0].clone()))
        for b in model.model.layers
    ]
    hooks.append(
        model.model.layers[-1].register_forward_hook(
            lambda _m, _a, out: hidden.append((out if torch.is_tensor(out) else out[0])[0].clone())
        )
    )
    with torch.no_grad():
        for ids in sequences:
            model(ids[None])
    expected = np.zeros((2, 4, 32), dtype=int)
    for number, h in enumerate(hidden):
        size = h.abs().numpy()
        middle = np.sort(size, axis=1)[:, 15:16]
        heavy = (size > 100) & (size > 1000 * middle)
        expected[0, number % 4] += heavy[0]
        expected[1, number % 4] += heavy[1:].sum(0)
    stream = result.sets["bos"].stream
    assert stream is not None
    assert np.array_equal(stream.counts.numpy(), expected)
    assert expected[0].sum() >= 5
    top = result.sets["bos"].massive[0]
    assert (top.channel, top.token, top.value) == (7, 1, pytest.approx(-4000, rel=0.05))
    findings = found_in(result)
    told = next(s for s in findings if "massive activations at first tokens (set bos)" in s)
    assert told.startswith(f"{expected[0].sum()} ")
    assert "position 0 ('<s>'), channel 7" in told
    told = next(s for s in findings if "massive activations at other tokens (set bos)" in s)
    assert "position 6 ('<s>'), channel 7" in told
    assert any(s.startswith("No massive activation") and "(set other)" in s for s in findings)
    rows = next(
        s for s in document(result, make_tokenizer(), "t").sections if s.title.startswith("Massive")
    )
    assert rows.tables[0].rows[0][:3] == ["bos", top.level, 7]


def test_dead_channels_are_named() -> None:
    model = make_model()
    down = model.model.layers[2].mlp
    with torch.no_grad():
        down.up_proj.weight[[3, 17]] = 0
    result = looked(model, {"a": random_ids(LENGTHS), "b": random_ids(LENGTHS, seed=3)})
    told = "model.layers.2.mlp.down_proj: 2 of 48 channels were 0 at every token of every set"
    assert any(s.startswith(told) and "(3, 17)" in s for s in found_in(result))


def test_the_model_is_left_as_found() -> None:
    model, state = make_model().train(), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    looked(model, {"a": random_ids(LENGTHS)})
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_what_can_not_be_looked_at() -> None:
    with pytest.raises(UserError, match="no set"):
        looked(make_model(), {})
    with pytest.raises(UserError, match="token id 500"):
        looked(make_model(), {"a": [torch.tensor([1, 500])]})
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.down_proj, activations"):
        looked(model, {"a": random_ids(LENGTHS)})


def test_one_sequence_of_one_token() -> None:
    result = looked(make_model(), {"a": [torch.tensor([5])], "b": [torch.tensor([6])]})
    text = document(result, None, "tiny").text()
    assert "model.layers.0" in text
    assert result.sets["a"].inputs["model.layers.0.self_attn.o_proj"][REST] == {"tokens": 0}


def test_what_is_asked() -> None:
    found = asked("null:random", ["null:ellipsis, null:ascii", "random"], {"nsamples": "4"})
    assert list(found.recipes) == ["null:random", "null:ellipsis", "null:ascii", "random"]
    recipe = found.recipes["null:ascii"]
    assert (recipe.nsamples, recipe.seqlen, found.seqlen_given) == (4, 256, False)
    assert asked("random", gram=False).gram_bytes == 0
    named = asked("noise=null:random", ["dots=null:ellipsis,null:shuffle(random)"])
    assert list(named.recipes) == ["noise", "dots", "null:shuffle(random)"]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["inspect", "activations", *arguments, "--device", "cpu", "--quiet"])
    return int(end.value.code or 0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = saved_model(tmp_path / "model", num_hidden_layers=2)
    prose, digits = write(tmp_path, "prose"), write(tmp_path, "digits")
    out = tmp_path / "out"
    given = ["--pretrained", model, "--calibration", prose, "--against", f"{digits},null:random"]
    # No length is given, and ours is more than the model accepts.
    assert run(*given, "--nsamples", "4", "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"Activations of {model}\n\n* ")
    assert f"{prose} and {digits} look" in printed
    data = json.loads((out / "activations.json").read_text())
    assert set(data["sets"]) == {prose, digits, "null:random"}
    summary = data["sets"][prose]["calibration"]
    assert (summary["nsamples"], summary["seqlen"]) == (4, 64)
    assert len(data["pairs"]) == 3
    assert data["model_digest"]
    assert data["asked"][prose]["nsamples"] == 4
    page = (out / "activations.html").read_text()
    assert page.count("<figure>") == 7
    assert "Overlap of outlier channels by layer" in page
    assert (out / "activations-activation-magnitude-by-layer.png").exists()
    # A finished set, alone, is taken as it is.
    folder = str(tmp_path / "set")
    shape = ["--nsamples", "3", "--seqlen", "12", "--out", folder]
    with pytest.raises(SystemExit):
        cli.main(["calibrate", prose, "--pretrained", model, *shape, "--quiet"])
    assert run("--pretrained", model, "--calibration", f"set:{folder}", "--no-gram") == 0
    printed = capsys.readouterr().out
    assert "3 sequences of at most 12 tokens" in printed
    assert "1 pass, no Gram matrices" in printed


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        (["--calibration", "none"], "calibration: got none"),
        (["--calibration", "random", "--against", "random"], "against: random is named twice"),
        (["--calibration", "random", "--against", "c4,"], "against: got an empty expression"),
        (["--calibration", "random", "--against", "nowhere"], "against: "),
        (["--calibration", "random", "--gram-memory", "0"], "gram_memory: got 0"),
        (["--calibration", "random", "--seqlen", "0"], "seqlen: "),
        (["--calibration", "random", "--dtype", "int3"], "dtype: "),
    ],
)
def test_errors_come_before_the_model(
    arguments: list[str], argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--pretrained", "/no/model", *arguments) == 2
    assert capsys.readouterr().err.startswith(f"error: {argument}")


def test_rows_that_do_not_tell_their_token_are_said() -> None:
    watch = Watch({}, {}, Grams(0, 1), 8, 0, 32)
    model = make_model()
    layer = next(x for x in engine.find_layers(engine.find_blocks(model))[0])
    state = watch.start(0, [[layer]])
    chunk = Chunk(torch.zeros(2, 4, dtype=torch.int64), None, False, (0, 1), places=True)
    watch.listen(state, chunk, 0, torch.randn(3, 32), chunk.owners())
    watch.listen(state, chunk, 0, torch.randn(8, 32), chunk.owners())
    watch.finish(0, [[layer]], state)
    both = watch.found[layer.name]
    assert (both.unplaced, both.first.rows, both.rest.rows) == (3, 2, 9)


def test_a_set_of_another_tokenizer_is_refused() -> None:
    other = CalibrationSet.of([[1, 2]], seqlen=4, tokenizer="another")
    with pytest.raises(UserError, match="made with tokenizer another"):
        inspect(make_model(), make_tokenizer(), {"a": other}, progress=False)
