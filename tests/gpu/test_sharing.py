"""Statistics of a model on a CUDA device wait on the host, and come back bit by bit."""

from __future__ import annotations

import pytest
import torch

from lm_calib_plugin import Recipe, Report, Runtime, compress
from lm_calib_plugin.engine import shared_statistics
from tests.engine.test_sharing import calibration
from tests.tiny import in_dtype, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run(recipe: Recipe, name: str, dtype: torch.dtype) -> Report:
    model = in_dtype(make_model(name), dtype).to("cuda")
    return compress(model, None, recipe, Runtime(progress=False), calibration())


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_runs_are_what_they_are_alone(name: str, dtype: torch.dtype) -> None:
    cells = [
        Recipe(method=method, sparsity=sparsity, propagate="dense")
        for method in ("wanda", "sparsegpt")
        for sparsity in (0.3, 0.5)
    ]
    alone = [run(one, name, dtype) for one in cells]
    with shared_statistics() as shared:
        for one, expected in zip(cells, alone, strict=True):
            found = run(one, name, dtype)
            assert found.weights_digest == expected.weights_digest
            errors = [[r.error_calibration for r in x.layers] for x in (found, expected)]
            assert errors[0] == errors[1]
        assert shared.hits == 2


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_serves_all_kinds(name: str, dtype: torch.dtype) -> None:
    """Also where rows of 16 bits are summed as they are."""
    cells = [
        Recipe(method="wanda", sparsity=0.5, propagate="dense"),
        Recipe(method="sparsegpt", sparsity=0.5, propagate="dense"),
        Recipe(method="gptq", bits=4, group_size=8, propagate="dense"),
    ]
    alone = [run(one, name, dtype).weights_digest for one in cells]
    for order in (1, -1):
        with shared_statistics(kinds=("moments", "gram")) as shared:
            for one, expected in list(zip(cells, alone, strict=True))[::order]:
                assert run(one, name, dtype).weights_digest == expected
            assert shared.hits == 2
