"""The name of an artifact changes with everything that may change the model or its report."""

from __future__ import annotations

import inspect
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lm_calib_plugin import CalibrationSet, Recipe, Runtime, compression, engine, registry
from lm_calib_plugin.artifacts import request
from lm_calib_plugin.artifacts.request import asked, request_key
from lm_calib_plugin.errors import UserError
from lm_calib_plugin.recipe import read_arguments
from tests.artifacts.test_cache import FAMILIES, LENGTHS, calibration
from tests.tiny import make_model, random_ids, saved_model

BASE: dict[str, Any] = {"method": "gptq", "bits": 3, "group_size": 16}


def key(
    given: dict[str, Any] = BASE,
    data: CalibrationSet | None = None,
    model: Any = None,
    runtime: Runtime | None = None,
) -> str:
    """Return the request of a recipe, as :func:`compress` gets to it."""
    model = make_model("llama_tied") if model is None else model
    data = calibration() if data is None else data
    job = compression._checked(model, None, Recipe(**given), runtime or Runtime(), data)
    compression._identify(job)
    compression._draw(job)
    return request_key(asked(job))


def other_data(**changes: Any) -> CalibrationSet:
    ids = random_ids(changes.pop("lengths", LENGTHS), changes.pop("seed", 1))
    return CalibrationSet.of(ids, seqlen=32, **changes)


OPTIONS: list[dict[str, Any]] = [
    {"method": "rtn"},
    {"bits": 4},
    {"bits": "auto:4"},
    {"bits": "auto:4.5"},
    {"group_size": 8},
    {"symmetric": False},
    {"damp": 0.02},
    {"damp": "auto"},
    {"act_order": False},
    {"compat": "reference"},
    {"correction": 0.5},
    {"grid": "mse"},
    {"grid": "mse?steps=10"},
    {"rounding": "rtn", "transform": "awq"},
    {"transform": "smoothquant"},
    {"transform": "rotation"},
    {"transform": "rotation?seed=1"},
    {"act_bits": 8},
    {"act_bits": 8, "act_dynamic": False},
    {"act_bits": 8, "act_dynamic": False, "observer": "mse"},
    {"kv_bits": 8},
    {"kv_bits": 4},
    {"propagate": "dense"},
    {"true_sequential": True},
    {"exclude_first_token": True},
    {"heldout": 0.25},
    {"heldout": 0},
    {"overrides": {"*down_proj": {"bits": 4}}},
    {"overrides": {"*up_proj": {"bits": 4}}},
    {"targets": "*q_proj"},
    {"ignore": "*q_proj"},
    {"targets": "*proj+lm_head", "untie": True},
    {"method": "wanda+gptq", "sparsity": 0.5},
    {"method": "sparsegpt+gptq", "sparsity": 0.5},
    {"method": "wanda+gptq", "sparsity": 0.5, "allocation": "owl"},
    {"method": "wanda+gptq", "sparsity": 0.5, "allocation": "owl?m=7"},
    {"method": "wanda+gptq", "pattern": "2:4"},
    {"method": "wanda+gptq", "sparsity": 0.5, "bits": 16},
]


def test_every_option_changes_the_request() -> None:
    recipes = [BASE, *({**BASE, **options} for options in OPTIONS)]
    keys = [key(given) for given in recipes]
    twins = [
        (recipes[i], recipes[j]) for i in range(len(keys)) for j in range(i) if keys[i] == keys[j]
    ]
    assert twins == []
    assert keys[0] == key()


def test_families_have_requests_of_their_own() -> None:
    keys = {name: key(given, model=make_model(arch)) for name, (given, arch) in FAMILIES.items()}
    assert len(set(keys.values())) == len(FAMILIES)


def test_data_and_model_change_the_request() -> None:
    half = make_model("llama_tied").to(torch.bfloat16)
    eager = make_model("llama_tied", attn_implementation="eager")
    changed = make_model("llama_tied")
    changed.config.rope_parameters = {**changed.config.rope_parameters, "rope_theta": 5e4}
    found = [
        key(),
        key(data=other_data(seed=2)),
        key(data=other_data(lengths=LENGTHS[:-1])),
        key(data=other_data(tokenizer="another")),
        key(data=other_data(weights=[2.0] + [1.0] * (len(LENGTHS) - 1))),
        key(model=make_model("llama_tied", seed=1)),
        key(model=make_model("llama")),
        key(model=make_model("mistral", tie_word_embeddings=True)),
        key(model=half),
        key(model=eager),
        key(model=changed),
    ]
    assert len(set(found)) == len(found)
    # The same ids in another set, from another file, are the same data.
    assert key(data=other_data(seed=1)) == found[0]


def test_data_counts_where_only_the_report_depends_on_it() -> None:
    """Errors in the report of a method without data are measured on some."""
    given = {"method": "magnitude", "sparsity": 0.5}
    assert key(given) != key(given, other_data(seed=2))
    assert key(given) != key({**given, "heldout": 0.3})


def test_kernels_do_not_count() -> None:
    given = {"method": "rtn", "scheme": "W8A8"}
    assert key(given) == key({**given, "execution": "simulated"})
    assert key() == key(runtime=Runtime(eval_tokens=8, progress=False))
    # Stages written out are the method of their name.
    assert key({"method": "wanda", "sparsity": 0.5}) == key(
        {"method": "magnitude", "score": "wanda", "sparsity": 0.5}
    )


def test_what_moves_last_bits_of_sums_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks as they come out, whoever chose their size; and threads."""

    def by(size: Any) -> str:
        return key(runtime=Runtime(calib_batch_size=size, progress=False))

    # Automatic chunks hold all of these few sequences, and more than all are all.
    assert by("auto") == by(len(LENGTHS)) == by(500) == key()
    assert len({by(1), by(3), by("auto")}) == 3
    before = key()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert key() != before


def test_without_data_chunks_do_not_count() -> None:
    keys = set()
    for size in ("auto", 1, 3):
        runtime = Runtime(calib_batch_size=size, progress=False)
        recipe = Recipe(method="magnitude", sparsity=0.5)
        job = compression._checked(make_model(), None, recipe, runtime, None)
        compression._identify(job)
        compression._draw(job)
        assert job.calibration is None
        keys.add(request_key(asked(job)))
    assert len(keys) == 1


def test_a_cast_that_reaches_the_frequencies_is_another_request(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    cast = AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16)
    assert engine.weights_digest(loaded) == engine.weights_digest(cast)
    assert key(model=loaded) != key(model=cast)


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (request, "REQUEST_VERSION", 2),
        (request, "version_of", lambda package: "9.9"),
        (request, "PACKAGES", ("torch",)),
        (platform, "machine", lambda: "riscv64"),
        (torch.backends.cpu, "get_cpu_capability", lambda: "VSX"),
    ],
)
def test_hardware_and_versions_change_the_request(
    owner: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = key()
    monkeypatch.setattr(owner, name, value)
    assert key() != before


def test_the_name_of_a_cuda_device_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, device: str) -> None:
            self.device = torch.device(device)

    class Model:
        def parameters(self) -> list[Fake]:
            return [Fake("cuda:0"), Fake("cuda:1"), Fake("cuda:0"), Fake("mps")]

    names = {0: "H100", 1: "H100"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: names[d.index])
    assert engine.circumstances(Model())["hardware"] == ["cuda H100", "mps"]  # type: ignore[arg-type]
    names[1] = "A100"
    assert engine.circumstances(Model())["hardware"] == ["cuda A100", "cuda H100", "mps"]  # type: ignore[arg-type]


def test_every_field_of_a_recipe_is_accounted_for() -> None:
    """A new field has to be part of the request, or to act through something that is."""
    source = inspect.getsource(request.asked)
    kinds = ("pruning", "quantization", "joint")
    rows = [row for kind in kinds for row in registry.table(kind).values()]
    through_method = {name for row in rows for name in row.options}
    through_data = set(Recipe.calibration_fields())
    through_layers = {"targets", "ignore"}
    no_part = {"schema_version", "execution"}
    known = through_method | through_data | through_layers | no_part
    for name in Recipe.model_fields:
        assert name in known or name in source, name


# --- the argument --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (True, True),
        ("true", True),
        ("True", True),
        ("yes", True),
        (1, True),
        ("1", True),
        (False, False),
        ("false", False),
        (0, False),
        (None, False),
        ("some/folder", "some/folder"),
        ("./true", "true"),
        (Path("some/folder"), "some/folder"),
        (Path("true"), "true"),
    ],
)
def test_the_argument_is_a_flag_or_a_folder(given: Any, meant: Any) -> None:
    found = Runtime(cache=given).cache
    assert found == meant
    assert type(found) is type(meant)


def test_a_home_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert Runtime(cache="~/kept").cache == "/home/me/kept"


@pytest.mark.parametrize("given", ["", " ", 3, 0.5, [], {}])
def test_other_values_are_refused(given: Any) -> None:
    with pytest.raises(UserError, match="^cache: got .*true, false or a folder"):
        Runtime(cache=given)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(UserError, match="^cache: .*file is a file; name a folder"):
            Runtime(cache=str(path))


def test_the_harness_takes_it() -> None:
    recipe, runtime = read_arguments({"method": "wanda", "sparsity": 0.5, "cache": "true"})
    assert runtime.cache is True
    assert "cache" not in recipe.to_metadata()
