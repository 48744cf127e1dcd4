"""What every path of the sweeps has to give: a loop over columns in float64, row by row.

Run as a program, with TRITON_INTERPRET=1 set, it checks the compiled kernels on the CPU and prints,
as JSON, what was wrong with each case (null: nothing).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

import torch
from torch import Tensor

from lm_calib_plugin import kernels
from lm_calib_plugin.kernels import Levels

# Columns and rows: ragged tiles, whole ones, a last block, one column, one row.
SHAPES = [(128, 20), (40, 16), (24, 5), (1, 3), (12, 1)]
PATTERNS = [(2, 4), (1, 4), (3, 6), (5, 12), (4, 8)]


def problem(columns: int, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a block ``[columns, rows]`` and an upper factor, float32."""
    own = torch.Generator().manual_seed(seed)
    upper = torch.randn(columns, columns, generator=own).triu(1) * 0.2 / max(1, columns) ** 0.25
    upper += torch.rand(columns, generator=own).add(0.5).diag()
    return torch.randn(columns, rows, generator=own), upper


def loop(
    block: Tensor, upper: Tensor, settle: Callable[[int, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Visit columns in float64; ``settle(i, columns)`` is what column ``i`` becomes."""
    block, upper = block.double().clone(), upper.double()
    errors = torch.zeros_like(block)
    for i in range(len(block)):
        found = settle(i, block)
        errors[i] = (block[i] - found) / upper[i, i]
        for k in range(i + 1, len(block)):
            block[k] -= upper[i, k] * errors[i]
        block[i] = found
    return block, errors


def near(found: Tensor, wanted: Tensor, share: float = 1e-5) -> None:
    """Compare with float64, relative to the size of the whole."""
    distance = float((found.cpu().double() - wanted).abs().max())
    assert distance <= share * float(wanted.abs().max().clamp(min=1e-3)), distance


def check_remove(device: str, compiled: bool, columns: int, rows: int) -> None:
    block, upper = problem(columns, rows)
    keep = torch.rand(columns, rows, generator=torch.Generator().manual_seed(1)) > 0.6
    wanted = loop(block, upper, lambda i, now: now[i] * keep[i])
    # A slice of a larger matrix, as in a sweep.
    whole = torch.cat([block, block + 1]).to(device)
    before = whole.clone()
    found = whole[:columns]
    errors = kernels.remove(found, upper.to(device), keep.to(device), compiled)
    near(found, wanted[0])
    near(errors, wanted[1])
    assert bool((found[~keep.to(device)] == 0).all())
    assert torch.equal(whole[columns:], before[columns:])
    plain = before[:columns].clone()
    near(errors, kernels.remove(plain, upper.to(device), keep.to(device), False).cpu().double())


def check_n_of_m(device: str, compiled: bool, columns: int, count: int, group: int) -> None:
    columns = columns // group * group
    block, upper = problem(columns, 18, seed=2)
    dead = torch.zeros(columns, dtype=torch.bool)
    dead[:: group + 1] = True
    block[:, 5] = 1.0  # ties
    upper[torch.arange(columns), torch.arange(columns)] = 1.0
    block[:, 6] = 0.0
    keep = torch.ones(columns, 18, dtype=torch.bool)

    def settle(i: int, now: Tensor) -> Tensor:
        if i % group == 0:
            for row in range(now.shape[1]):
                scores = [
                    0.0 if dead[k] else float(now[k, row] / upper[k, k]) ** 2
                    for k in range(i, i + group)
                ]
                order = sorted(range(group), key=lambda k: (scores[k], k))
                for k in order[: group - count]:
                    keep[i + k, row] = False
        return now[i] * keep[i]

    wanted = loop(block, upper, settle)
    found = block.to(device)
    errors, mask = kernels.remove_n_of_m(
        found, upper.to(device), dead.to(device), (count, group), compiled
    )
    assert torch.equal(mask.cpu(), keep)
    near(found, wanted[0])
    near(errors, wanted[1])


def check_round(
    device: str, compiled: bool, columns: int, rows: int, bits: int, symmetric: bool, masked: bool
) -> None:
    block, upper = problem(columns, rows, seed=3)
    own = torch.Generator().manual_seed(4)
    groups = max(1, columns // 8)
    scale = torch.rand(groups, rows, generator=own) * 0.2 + 0.05
    zero = torch.zeros(groups, rows)
    low = -(2 ** (bits - 1)) if symmetric else 0
    if not symmetric:
        zero = torch.randint(0, 2**bits, (groups, rows), generator=own).float()
    group = torch.randint(0, groups, (columns,), generator=own)
    high = low + 2**bits - 1
    keep = torch.rand(columns, rows, generator=own) > 0.5 if masked else None

    def settle(i: int, now: Tensor) -> Tensor:
        s, z = scale[group[i]].double(), zero[group[i]].double()
        found = ((now[i] / s).round().add(z).clamp(low, high) - z) * s
        return found if keep is None else found * keep[i]

    wanted = loop(block, upper, settle)
    levels = Levels(scale.to(device), zero.to(device), group.to(device), low, high)
    found = block.to(device)
    mask = None if keep is None else keep.to(device)
    errors = kernels.round_integers(found, upper.to(device), levels, mask, compiled)
    near(found, wanted[0])
    near(errors, wanted[1])


def check_no_number(device: str, compiled: bool) -> None:
    """What is no number stays none in its row, and is in no other."""
    block, upper = problem(24, 5)
    block[3, 1] = float("nan")
    keep = torch.ones(24, 5, dtype=torch.bool, device=device)
    keep[3] = False
    group = torch.arange(24, device=device) // 8
    scale, zero = (torch.full((3, 5), float(x), device=device) for x in (1, 0))
    levels = Levels(scale, zero, group, -4, 3)
    factor = upper.to(device)
    removed, rounded = block.to(device).clone(), block.to(device).clone()
    kernels.remove(removed, factor, keep, compiled)
    kernels.round_integers(rounded, factor, levels, None, compiled)
    for found in (removed, rounded):
        wrong = found.isnan().cpu()
        assert wrong[3:, 1].all()
        assert not wrong[:, [0, 2, 3, 4]].any()


def cases() -> dict[str, Callable[[str, bool], None]]:
    """Return the checks by name; each takes a device, and whether the kernel is to run."""
    found: dict[str, Callable[[str, bool], None]] = {}
    for shape in SHAPES:
        name = f"remove {shape[0]}x{shape[1]}"
        found[name] = lambda d, c, s=shape: check_remove(d, c, *s)  # type: ignore[misc]
    for pattern in PATTERNS:
        for columns in (24, 128) if pattern == (2, 4) else (24,):
            name = f"{pattern[0]}:{pattern[1]} of {columns}"
            found[name] = lambda d, c, n=columns, p=pattern: check_n_of_m(d, c, n, *p)  # type: ignore[misc]
    for bits, symmetric, masked in ((3, True, False), (4, False, False), (8, False, True)):
        for shape in SHAPES[1:3] if masked else SHAPES[:2]:
            name = f"round {shape[0]}x{shape[1]} {bits} {symmetric} {masked}"
            given = (*shape, bits, symmetric, masked)
            found[name] = lambda d, c, g=given: check_round(d, c, *g)  # type: ignore[misc]
    found["no number"] = check_no_number
    return found


def main() -> None:
    """Check the kernels in the interpreter of triton."""
    assert os.environ.get("TRITON_INTERPRET") == "1"
    said: dict[str, str | None] = {}
    for name, check in cases().items():
        try:
            check("cpu", True)
            said[name] = None
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(said))


if __name__ == "__main__":
    main()
