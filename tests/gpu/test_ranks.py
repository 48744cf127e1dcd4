"""Several processes on GPUs: over NCCL where each has one, through the host where they share it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.ranks_cases import CASES, run

ROOT = Path(__file__).parents[2]
NAMES = (
    "wanda, even",
    "sparsegpt",
    "corrected in steps",
    "gptq",
    "experts",
    "static",
    "awq",
    "rtn",
)

WORKER = """
import datetime, json, sys
sys.path.insert(0, {root!r})
import torch
from tests.engine.ranks_cases import CASES, run
rank, folder, backend, device = int(sys.argv[1]), *sys.argv[2:]
if device != "cpu":
    torch.cuda.set_device(device)
torch.distributed.init_process_group(
    backend, init_method="file://" + folder + "/group", rank=rank, world_size=2,
    timeout=datetime.timedelta(seconds=100),
)
found = dict()
for name in {names!r}:
    model, report = run(CASES[name], device)
    found[name] = [report.weights_digest, report.processes]
    if rank == 0:
        weights = [p.detach().cpu().double() for p in model.parameters()]
        torch.save(torch.cat([w.flatten() for w in weights]), folder + "/" + name)
print(json.dumps(found))
torch.distributed.destroy_process_group()
"""


def two(folder: Path, backend: str, devices: list[str]) -> list[Any]:
    """What each of two processes found."""
    script = WORKER.format(root=str(ROOT), names=NAMES)
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", script, str(rank), str(folder), backend, device],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, device in enumerate(devices)
    ]
    found = []
    for process in processes:
        out, errors = process.communicate(timeout=250)
        assert process.returncode == 0, errors[-3000:]
        found.append(json.loads(out.splitlines()[-1]))
    return found


def alike(folder: Path, found: list[Any], device: str) -> None:
    """All processes hold the same weights, and those of one process within rounding."""
    assert found[0] == found[1]
    for name in NAMES:
        model, _ = run(CASES[name], device)
        one = torch.cat([p.detach().cpu().double().flatten() for p in model.parameters()])
        many = torch.load(folder / name, weights_only=True)
        agree = torch.isclose(many, one, rtol=1e-3, atol=1e-5).float().mean()
        assert agree > 0.999, name


@pytest.mark.gpu
def test_two_processes_share_a_gpu_through_the_host(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    alike(tmp_path, two(tmp_path, "gloo", ["cuda:0", "cuda:0"]), "cuda:0")


@pytest.mark.gpu
def test_each_process_has_a_gpu_of_its_own(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    alike(tmp_path, two(tmp_path, "cpu:gloo,cuda:nccl", ["cuda:0", "cuda:1"]), "cuda:0")


def test_the_way_to_ask_is_right(tmp_path: Path) -> None:
    """The same on the CPU, so that the tests above are known to run."""
    alike(tmp_path, two(tmp_path, "gloo", ["cpu", "cpu"]), "cpu")
