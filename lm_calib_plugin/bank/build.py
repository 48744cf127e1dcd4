"""Filling a bank: one pass of the dense model over every sequence of every part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lm_calib_plugin import engine, storage
from lm_calib_plugin.bank.layout import (
    FORMAT_VERSION,
    HEADER,
    PLAN,
    SETS,
    Header,
    InputRow,
    PartRow,
    SequenceRow,
    cells,
    gram_key,
)
from lm_calib_plugin.bank.packed import pack
from lm_calib_plugin.bank.store import Bank
from lm_calib_plugin.calibration import CalibrationSet
from lm_calib_plugin.engine.batches import Chunk, make_chunks, token_budget
from lm_calib_plugin.errors import CalibError, NumericalError, UserError
from lm_calib_plugin.guard import left_as_found
from lm_calib_plugin.placement import execution_device
from lm_calib_plugin.runtime import Runtime

# Gram matrices of one input that stay on the model's device; more of them wait in main memory.
DEVICE_BYTES = 4 << 30


@dataclass(frozen=True)
class Part:
    """What goes into a bank: the sequences of one source in one fold.

    Parameters
    ----------
    source, fold
        Names, unique together.
    calibration
        The sequences.
    second_order
        Keep Gram matrices, as SparseGPT and GPTQ and every judgment of an error need.
    groups
        Deal the sequences into so many groups and keep the Gram matrix of each: draws of a
        second-order method weigh groups, 16 or more are needed for that.
    """

    source: str
    fold: str
    calibration: CalibrationSet
    second_order: bool = True
    groups: int = 1


def build_bank(
    model: nn.Module,
    layers: Sequence[engine.TargetLayer],
    blocks: engine.Blocks,
    parts: Sequence[Part],
    folder: str | Path,
    *,
    exclude_first_token: bool = False,
    model_id: str | None = None,
    runtime: Runtime = Runtime(),  # noqa: B008 - frozen
) -> Bank:
    """Run the dense model once over all parts and keep the statistics of every layer input.

    Work goes block by block: the memory needed is that of the hidden states of all sequences and
    of the statistics of one block. A build that was interrupted goes on where it stopped; one
    that is finished is opened.

    Parameters
    ----------
    model, layers, blocks
        The dense model and the layers to be compressed later.
    parts
        What to remember.
    folder
        Where; made when missing.
    model_id
        Digest of the dense model, where the caller has it: taking it reads all weights.

    Returns
    -------
    Bank
        Open.

    Raises
    ------
    UserError
        When the folder holds another bank, or parts were made with different tokenizers.
    """
    folder = Path(folder)
    plan = _plan(model_id or engine.model_digest(model), layers, parts, exclude_first_token)
    with storage.only_once(folder / HEADER):
        if (folder / HEADER).exists():
            _same_plan(folder, plan)
            return Bank.open(folder)
        _same_plan(folder, plan)
        needed = _bytes(layers, parts)
        storage.require_space(folder, needed, "the statistics bank")
        storage.write_text(folder / PLAN, json.dumps(plan, indent=1))
        for number, part in enumerate(parts):
            target = folder / SETS / f"{number:03d}"
            if not target.exists():
                part.calibration.save(target)
        with left_as_found(model):
            header = _fill(model, layers, blocks, parts, folder, plan, runtime)
        storage.write_text(folder / HEADER, json.dumps(header.to_json(), indent=1))
    return Bank.open(folder)


def _plan(
    model_id: str,
    layers: Sequence[engine.TargetLayer],
    parts: Sequence[Part],
    exclude_first_token: bool,
) -> dict[str, Any]:
    """Return everything that decides the numbers of a bank."""
    tokenizers = {part.calibration.tokenizer for part in parts}
    if len(tokenizers) > 1:
        raise UserError(
            "calibration",
            f"the parts of the bank were made with {len(tokenizers)} different tokenizers",
            "one tokenizer, that of the model",
            "build the sets again with lm-calib calibrate ... --pretrained MODEL",
        )
    names = [(part.source, part.fold) for part in parts]
    if len(set(names)) < len(names):
        raise UserError("calibration", f"a part stands twice in {names}", "every part once")
    return {
        "format_version": FORMAT_VERSION,
        "model": model_id,
        "tokenizer": next(iter(tokenizers), ""),
        "exclude_first_token": exclude_first_token,
        "layers": [layer.name for layer in layers],
        "parts": [asdict(_row(part)) for part in parts],
    }


def _row(part: Part) -> PartRow:
    groups = min(part.groups, part.calibration.nsamples) if part.second_order else 1
    return PartRow(part.source, part.fold, part.calibration.calib_id, part.second_order, groups)


def _same_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Refuse a folder that holds, or was begun for, something else."""
    file = folder / PLAN
    if not file.exists():
        if folder.exists() and any(p.name != f"{HEADER}.lock" for p in folder.iterdir()):
            raise UserError(
                "bank", f"{folder} holds other files", "an empty or new folder, or a bank"
            )
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise CalibError(f"{file}: damaged; delete {folder} and build the bank again.") from None
    different = [name for name in plan if found.get(name) != plan[name]]
    if different:
        raise UserError(
            "bank",
            f"{folder} belongs to another bank ({', '.join(different)} differ)",
            "one folder for each choice of model, layers and parts",
            "name another folder, or delete this one",
        )


def _bytes(layers: Sequence[engine.TargetLayer], parts: Sequence[Part]) -> int:
    """Return an upper bound of the size on disk: no input shared between layers."""
    rows = sum(part.calibration.nsamples for part in parts)
    matrices = len(cells([_row(part) for part in parts]))
    widths = [layer.shape[1] for layer in layers]
    # Layers of one block usually share inputs; half is a fair bound.
    return sum(8 * rows * d + matrices * 2 * d * (d + 1) for d in widths) // 2


def _fill(
    model: nn.Module,
    layers: Sequence[engine.TargetLayer],
    blocks: engine.Blocks,
    parts: Sequence[Part],
    folder: Path,
    plan: dict[str, Any],
    runtime: Runtime,
) -> Header:
    exclude_first_token: bool = plan["exclude_first_token"]
    rows = [_row(part) for part in parts]
    sequences: list[SequenceRow] = []
    ids: list[Tensor] = []
    skipped = int(exclude_first_token)
    for number, part in enumerate(parts):
        weights = part.calibration.weights or (1.0,) * part.calibration.nsamples
        for i, (sequence, weight) in enumerate(
            zip(part.calibration.sequences, weights, strict=True)
        ):
            group = i % rows[number].groups
            sequences.append(SequenceRow(number, group, len(sequence) - skipped, weight))
            ids.append(sequence)
    device = execution_device(model.get_input_embeddings())  # type: ignore[operator]
    size = runtime.calib_batch_size
    if size == "auto":
        size = token_budget(device, max(map(len, ids)))
    chunks = make_chunks(ids, [], int(size), 0, skip_first=exclude_first_token)
    header = Header(
        model=plan["model"],
        tokenizer=plan["tokenizer"],
        exclude_first_token=exclude_first_token,
        parts=tuple(rows),
        sequences=tuple(sequences),
        inputs=(),
    )
    writer = _Writer(folder, header)
    done = engine.dense_pass(
        model, blocks, chunks, layers, writer, device, runtime.progress, "statistics bank"
    )
    return replace(
        header,
        inputs=tuple(row for index in sorted(writer.inputs) for row in writer.inputs[index]),
        files={str(index): writer.files[index] for index in sorted(writer.files)},
        seconds={stage: round(spent, 3) for stage, spent in done.seconds.items()},
    )


class _State:
    """Statistics of the inputs of one block."""

    def __init__(self, width: int, count: int, grams: Sequence[tuple[int, int]], device: Any):
        self.energy = torch.zeros(count, width, dtype=torch.float64, device=device)
        self.maximum = torch.zeros(count, width, device=device)
        self.total = torch.zeros(count, width, dtype=torch.float64, device=device)
        self.rows = torch.zeros(count, dtype=torch.float64, device=device)
        # By a fixed rule, never by free memory, so that a build repeats.
        small = 4 * width * width * len(grams) <= DEVICE_BYTES
        place = device if small else torch.device("cpu")
        self.grams = {cell: torch.zeros(width, width, device=place) for cell in grams}

    def add_gram(self, cell: tuple[int, int], x: Tensor, weight: float) -> None:
        """Add ``weight * x^T x`` to the Gram matrix of a cell, if it keeps one."""
        gram = self.grams.get(cell)
        if gram is None:
            return
        if gram.device == x.device:
            gram.addmm_(x.t(), x, alpha=weight)
        else:
            gram.add_((x.t() @ x).to(gram.device), alpha=weight)


class _Writer:
    """Visitor of the dense pass: sums per sequence and per group, one file a block."""

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder, self.header = folder, header
        self.cells = cells(header.parts)
        self.inputs: dict[int, list[InputRow]] = {}
        self.files: dict[int, dict[str, str]] = {}

    def wants(self, index: int) -> bool:
        """A block is done when its file and the note beside it agree."""
        try:
            note = json.loads(self._note(index).read_text(encoding="utf-8"))
            file = self._file(index)
            if storage.file_digest(file) != note["sha256"]:
                return True
            rows = [InputRow(**{**row, "layers": tuple(row["layers"])}) for row in note["inputs"]]
        except (OSError, ValueError, KeyError, TypeError):
            return True
        self.inputs[index] = rows
        self.files[index] = {"name": file.name, "sha256": note["sha256"]}
        return False

    def start(self, index: int, groups: Sequence[Sequence[engine.TargetLayer]]) -> list[_State]:
        """Return zeros."""
        count = len(self.header.sequences)
        return [_State(g[0].shape[1], count, self.cells, g[0].device) for g in groups]

    def listen(
        self, state: list[_State], chunk: Chunk, number: int, rows: Tensor, owners: Tensor
    ) -> None:
        """Add the rows of each sequence of the chunk to its own sums."""
        seen = state[number]
        if len(rows) != len(owners):
            raise CalibError(
                f"{len(rows)} input rows of {len(owners)} tokens: the rows of this layer can not "
                "be told apart by sequence, so it has no place in a bank; leave it out (ignore=)."
            )
        rows, owners = rows.float(), owners.to(rows.device)
        for place, sequence in enumerate(chunk.numbers):
            own = rows[owners == place]
            if not len(own):
                continue
            info = self.header.sequences[sequence]
            size = own.abs()
            seen.energy[sequence] += own.square().sum(0)
            seen.maximum[sequence] = torch.maximum(seen.maximum[sequence], size.amax(0))
            seen.total[sequence] += size.sum(0)
            seen.rows[sequence] += len(own)
            seen.add_gram((info.part, info.group), own, info.weight)

    def finish(
        self, index: int, groups: Sequence[Sequence[engine.TargetLayer]], state: list[_State]
    ) -> None:
        """Write the block's file, then the note that makes it count."""
        tensors: dict[str, Tensor] = {}
        for group, seen in zip(groups, state, strict=True):
            name = group[0].name
            if not bool(seen.energy.isfinite().all()):
                raise NumericalError(
                    name, "statistics bank", "NaN or Inf in the activations", "try dtype=float32"
                )
            tensors[f"{name}.energy"] = seen.energy.float().cpu()
            mean = seen.total / seen.rows.clamp_min(1)[:, None]
            tensors[f"{name}.maximum"] = seen.maximum.bfloat16().cpu()
            tensors[f"{name}.mean"] = mean.bfloat16().cpu()
            for (part, number), gram in seen.grams.items():
                tensors[gram_key(name, part, number)] = pack(gram).cpu()
        file = self._file(index)
        temporary = file.with_name(f".{file.name}.tmp")
        save_file(tensors, temporary)
        found = storage.file_digest(temporary)
        temporary.replace(file)
        self.inputs[index] = [
            InputRow(g[0].name, index, g[0].shape[1], tuple(layer.name for layer in g))
            for g in groups
        ]
        self.files[index] = {"name": file.name, "sha256": found}
        note = {"sha256": found, "inputs": [asdict(row) for row in self.inputs[index]]}
        storage.write_text(self._note(index), json.dumps(note))

    def _file(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def _note(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.json"
