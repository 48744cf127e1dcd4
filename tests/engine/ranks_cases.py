"""What several processes compress together, and what each finds: run by the tests of ranks.

``python -m tests.engine.ranks_cases RANK COUNT FOLDER``: every process runs all cases in one
process group, and writes what it found to ``FOLDER/RANK.json``; the first one its weights, too.
"""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lm_calib_plugin import CalibrationSet, Recipe, Report, Runtime, compress
from lm_calib_plugin.engine import passes, shared_statistics
from tests.tiny import make_model, random_ids

LENGTHS = [32, 20, 7, 32, 15, 9, 31, 3, 12, 32]
EVEN = [24] * 10  # 2 of them held out, by 2: four chunks and one
GPTQ = {"method": "gptq", "bits": 3, "group_size": 8, "propagate": "dense"}
SPARSE = {"method": "sparsegpt", "sparsity": 0.5}
WANDA = {"method": "wanda", "sparsity": 0.5}

# name -> recipe, and what else differs from a small llama and sequences of many lengths
CASES: dict[str, dict[str, Any]] = {
    "wanda": {"recipe": WANDA},
    "wanda, even": {"recipe": {**WANDA, "heldout": 0.2}, "lengths": EVEN},
    "wanda, nothing held out": {"recipe": {**WANDA, "heldout": 0.0}},
    "wanda, dense inputs": {"recipe": {**WANDA, "propagate": "dense"}},
    "wanda, one chunk": {"recipe": WANDA, "size": 16},
    "wanda, two sequences": {"recipe": {**WANDA, "heldout": 0.0}, "lengths": [9, 32]},
    "wanda, one sequence": {"recipe": {**WANDA, "heldout": 0.0}, "lengths": [32]},
    "wanda, head": {"recipe": {**WANDA, "targets": "lm_head+*down_proj"}},
    "wanda, weights": {"recipe": WANDA, "weights": [1, 2, 3, 1, 1, 2, 1, 1, 4, 1]},
    "wanda, no first tokens": {"recipe": {**WANDA, "exclude_first_token": True}},
    "owl": {"recipe": {"method": "owl", "sparsity": 0.5}},
    "bias": {"recipe": {**WANDA, "update": "bias"}, "model": "gpt2"},
    "sparsegpt": {"recipe": SPARSE},
    "sparsegpt in steps": {"recipe": {**SPARSE, "true_sequential": True}},
    "sparsegpt, weights": {"recipe": SPARSE, "weights": [1, 2, 3, 1, 1, 2, 1, 1, 4, 1]},
    "corrected": {"recipe": {"method": "swap_pcg", "sparsity": 0.5}},
    "corrected in steps": {"recipe": {**SPARSE, "true_sequential": True, "correction": 0.5}},
    "gptq": {"recipe": GPTQ},
    "gptq by held-out": {"recipe": {**GPTQ, "method": "gptq_heldout"}},
    "experts": {"recipe": SPARSE, "model": "mixtral"},
    "more experts": {"recipe": WANDA, "model": "qwen2_moe"},
    "experts, moments": {"recipe": WANDA, "model": "mixtral", "lengths": [5, 4, 6, 3]},
    "rtn": {"recipe": {"method": "rtn", "bits": 4, "group_size": 8, "calibration": "none"}},
    "static": {"recipe": {"method": "rtn", "scheme": "W8A8_static"}},
    "static head": {"recipe": {"method": "rtn", "scheme": "W8A8_static", "targets": "lm_head"}},
    "awq": {"recipe": {"method": "awq", "bits": 4, "group_size": 8}},
    "smoothquant": {"recipe": {"method": "smoothquant", "scheme": "W8A8"}},
    "both": {"recipe": {**SPARSE, "method": "sparsegpt+gptq", "bits": 4, "group_size": 8}},
    "rotated": {"recipe": {"method": "rotation", "bits": 4, "group_size": 8}},
    "autoround": {
        "recipe": {"method": "rtn", "bits": 4, "group_size": 8, "rounding": "autoround?iters=5"},
    },
    "widths": {"recipe": {"method": "rtn", "bits": "auto:9", "group_size": 8}},
    "blocks": {"recipe": {"method": "shortgpt", "blocks": 1}},
    "shared": {"recipe": {**WANDA, "propagate": "dense"}, "shared": True},
    "by itself": {"recipe": SPARSE, "split": False},
}
# For three processes: few sequences, more processes than sequences, and the ways states travel.
FEW = {
    "wanda, four sequences": {"recipe": WANDA, "lengths": [32, 9, 20, 31]},
    "wanda, two sequences": CASES["wanda, two sequences"],
    "sparsegpt, one sequence": {"recipe": {**SPARSE, "heldout": 0.0}, "lengths": [32]},
    **{name: CASES[name] for name in ("sparsegpt", "corrected", "experts", "static", "awq")},
}


def run(case: dict[str, Any], device: str = "cpu") -> tuple[Any, Report]:
    """Compress the model of a case, on a device."""
    lengths = case.get("lengths", LENGTHS)
    drawn = CalibrationSet.of(random_ids(lengths), seqlen=32, weights=case.get("weights"))
    runtime = Runtime(
        progress=False, calib_batch_size=case.get("size", 2), split=case.get("split", True)
    )
    recipe = Recipe(**case["recipe"])
    model = make_model(case.get("model", "llama")).to(device)
    given = drawn if recipe.terms else None
    if case.get("shared"):
        with shared_statistics():
            return model, compress(model, None, recipe, runtime, given)
    return model, compress(model, None, recipe, runtime, given)


def facts(report: Report) -> dict[str, Any]:
    """Return what a report says, but for time and memory."""
    table = report.table()
    return {
        "digest": report.weights_digest,
        "key": report.key,
        "layers": table["layers"],
        "transforms": table["transforms"],
        "grids": sorted(report.grids),
        "achieved": report.achieved,
        "warnings": report.warnings,
        "processes": report.processes,
        "stages": sorted(report.seconds),
    }


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone().contiguous() for name, p in model.named_parameters()}


def failing(rank: int) -> dict[str, str]:
    """Fail on one process in many ways; returns what each process is told."""
    told = {}

    def note(name: str, work: Any) -> None:
        try:
            work()
            told[name] = "done"
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"

    def broken() -> None:
        model = make_model()

        def hook(*_: Any) -> None:
            raise ValueError("no more")

        if rank == 1:
            model.model.layers[1].mlp.down_proj.register_forward_pre_hook(hook)
        drawn = CalibrationSet.of(random_ids(LENGTHS), seqlen=32)
        compress(model, None, Recipe(**WANDA), Runtime(progress=False, calib_batch_size=2), drawn)

    def nan() -> None:
        """NaN that only the sequences of the last process bring in."""
        model, sequences = make_model(), random_ids(LENGTHS)
        for ids in sequences:
            ids[ids == 50] = 51
        sequences[8][3] = 50
        with torch.no_grad():
            model.model.embed_tokens.weight[50] = float("nan")
        drawn = CalibrationSet.of(sequences, seqlen=32)
        runtime = Runtime(progress=False, calib_batch_size=2)
        compress(model, None, Recipe(**WANDA, heldout=0.0), runtime, drawn)

    def short_of_memory() -> None:
        """One process has to take smaller chunks."""
        real, left = passes.replay, [2 if rank == 1 else 0]

        def replay(block: Any, call: Any, hidden: torch.Tensor) -> torch.Tensor:
            if left[0] and len(hidden) > 1:
                left[0] -= 1
                raise torch.OutOfMemoryError("full")
            return real(block, call, hidden)

        passes.replay = replay
        try:
            told["halved"] = facts(run(CASES["wanda"])[1])  # type: ignore[assignment]
        finally:
            passes.replay = real

    other = {"recipe": {**WANDA, "sparsity": 0.4 + 0.1 * rank}}
    note("broken", broken)
    note("nan", nan)
    note("unlike", lambda: run(other))
    note("refused", lambda: run({"recipe": {**WANDA, "targets": "nothing"}}))
    note("memory", short_of_memory)
    note("afterwards", lambda: run(CASES["wanda"]))
    return told


def main() -> None:
    rank, count, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/group",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=100),
    )
    found: dict[str, Any] = {}
    for name, case in (CASES if count == 2 else FEW).items():
        model, report = run(case)
        found[name] = facts(report)
        if rank == 0:
            save_file(tensors(model), folder / f"{name}.safetensors")
    if count == 2:
        found["failing"] = failing(rank)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
