"""What the dense model tells of every sequence of a pool, in one forward pass.

A selector declares what it needs; the first question runs the pass, and the answers are kept.
Pads and the first token never count: the first position draws activations that are orders of
magnitude larger than all others, whatever the text.
"""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from lm_calib_plugin.calibration.generation import input_device
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.selectors.gradients import GradientProbe
from lm_calib_plugin.calibration.selectors.probes import (
    Batch,
    Maxima,
    MaximaProbe,
    MeanProbe,
    Probe,
    decoder_blocks,
    keep_parameters_still,
)
from lm_calib_plugin.errors import CalibError, NumericalError
from lm_calib_plugin.guard import left_as_found

NEEDS = frozenset({"nll", "means", "maxima", "gradients", "words"})
DIMENSIONS = 64
# Activations and logits of a batch are held to about these numbers of tokens and of values.
CPU_TOKENS, GPU_TOKENS = 4096, 16384
CPU_LOGITS, GPU_LOGITS = 1 << 25, 1 << 28


class Features:
    """Features of a pool, computed when first asked for.

    Parameters
    ----------
    sequences
        int64 ids of one dimension each.
    needs
        What will be asked; asking for more is an error of the selector.
    model
        The dense model on its device; left as found. None when only ``words`` are needed.
    tokenizer
        For ``words``.
    blocks
        Path of the list of decoder blocks, when it is not found by itself.
    batch_size
        Sequences at a time; None: a fixed rule by tokens. Halved when memory runs out.
    target
        Features of the sequences that the pool is compared with.
    """

    def __init__(
        self,
        sequences: Sequence[Tensor],
        needs: frozenset[str],
        *,
        model: Any = None,
        tokenizer: Any = None,
        blocks: str | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        target: Features | None = None,
    ) -> None:
        self.sequences, self.needs = sequences, needs
        self.model, self.tokenizer, self.blocks = model, tokenizer, blocks
        self.batch_size, self.progress, self._target = batch_size, progress, target
        self._found: dict[str, Any] = {}
        self.cost: dict[str, Any] = {}
        self._fits = 0

    @property
    def target(self) -> Features:
        """Features of the target sequences."""
        if self._target is None:
            raise LookupError("this selector does not declare `takes_target`")
        return self._target

    @property
    def nll(self) -> Tensor:
        """Mean NLL per token in nats, ``[sequences]`` float64; infinite for a single token."""
        found: Tensor = self._get("nll")
        return found

    @property
    def means(self) -> list[Tensor]:
        """Mean output of every block, ``[sequences, hidden]`` float32 each."""
        found: list[Tensor] = self._get("means")
        return found

    @property
    def maxima(self) -> list[Maxima]:
        """Largest magnitude of every input channel, for each distinct input of linear layers."""
        found: list[Maxima] = self._get("maxima")
        return found

    @property
    def gradients(self) -> Tensor:
        """Sketched gradients of each sequence's loss, ``[sequences, 1024]`` float64."""
        found: Tensor = self._get("gradients")
        return found

    @property
    def words(self) -> list[frozenset[str]]:
        """Distinct tokens of each sequence as text, in lower case without white space around."""
        found: list[frozenset[str]] = self._get("words")
        return found

    def projected(self, dimensions: int = DIMENSIONS) -> Tensor:
        """Return the means as one vector per sequence, ``[sequences, dimensions]`` float64.

        Each block's mean is scaled to unit length; all are concatenated and multiplied by a fixed
        Gaussian matrix of variance ``1 / dimensions``, which keeps distances in expectation.
        """
        total = torch.zeros(len(self.sequences), dimensions, dtype=torch.float64)
        for number, mean in enumerate(self.means):
            generator = torch.Generator().manual_seed(derive_seed("projection", number))
            shape = (mean.shape[1], dimensions)
            matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
            total += functional.normalize(mean.double(), dim=1) @ matrix
        return total / dimensions**0.5

    def _get(self, name: str) -> Any:
        if name not in self.needs:
            raise LookupError(f"this selector does not declare that it needs `{name}`")
        if name not in self._found:
            if name == "words":
                self._found["words"] = self._read_words()
            else:
                self._run()
        return self._found[name]

    def _read_words(self) -> list[frozenset[str]]:
        known: dict[int, str] = {}
        found = []
        for sequence in self.sequences:
            ids = set(sequence.tolist())
            for i in ids - known.keys():
                known[i] = self.tokenizer.decode([i]).strip().lower()
            found.append(frozenset(known[i] for i in ids) - {""})
        return found

    # --- the pass ----------------------------------------------------------------------------

    def _run(self) -> None:
        began = time.perf_counter()
        makers = {"means": MeanProbe, "maxima": MaximaProbe, "gradients": GradientProbe}
        probes: dict[str, Probe] = {n: make() for n, make in makers.items() if n in self.needs}
        handles: list[Any] = []
        with left_as_found(self.model), keep_parameters_still(self.model):
            try:
                blocks = decoder_blocks(self.model, self.blocks) if probes else nn.ModuleList()
                for probe in probes.values():
                    handles += probe.attach(blocks)
                losses = list(self._batches(probes))
            finally:
                for handle in handles:
                    handle.remove()
        self._found |= {name: probe.result() for name, probe in probes.items()}
        if "nll" in self.needs:
            self._found["nll"] = torch.cat(losses)
        self.cost = {
            "sequences": len(self.sequences),
            "tokens": sum(map(len, self.sequences)),
            "batch_size": self._fits,
            "seconds": round(time.perf_counter() - began, 3),
        }

    def _batches(self, probes: dict[str, Probe]) -> Iterator[Tensor]:
        """Yield losses of batch after batch; the size is halved when memory runs out."""
        size = self.batch_size or self._automatic_size()
        done, total = 0, len(self.sequences)
        with tqdm(
            total=total, desc="pool features", unit="sequence", disable=not self.progress
        ) as bar:
            while done < total:
                part = self.sequences[done : done + size]
                try:
                    losses = self._one(part, probes)
                except torch.OutOfMemoryError:
                    if len(part) == 1:
                        raise CalibError(
                            "select: out of memory with one sequence of the pool at a time; "
                            "lower seqlen, or use a selector that needs no model."
                        ) from None
                    size = len(part) // 2
                    gc.collect()
                    if torch.cuda.is_available():
                        torch.cuda.empty_cache()
                    continue
                done += len(part)
                bar.update(len(part))
                self._fits = size
                yield losses

    def _one(self, part: Sequence[Tensor], probes: dict[str, Probe]) -> Tensor:
        batch = Batch.of(part, input_device(self.model))
        scored = bool(self.needs & {"nll", "gradients"})
        for probe in probes.values():
            probe.begin(batch)
        given: dict[str, Any] = {"attention_mask": batch.mask, "use_cache": False}
        if not scored and "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            given["logits_to_keep"] = 1
        with torch.set_grad_enabled("gradients" in self.needs):
            logits = self.model(input_ids=batch.ids, **given).logits
            losses = sequence_losses(logits, batch) if scored else torch.zeros(len(part))
            results = [probe.finish(losses) for probe in probes.values()]
        if scored and not bool(torch.isfinite(losses).all()):
            raise NumericalError("output head", "features of the pool", "the loss is not finite")
        for probe, result in zip(probes.values(), results, strict=True):
            probe.commit(result)
        single = torch.tensor([len(ids) < 2 for ids in part])
        return losses.detach().double().cpu().masked_fill(single, torch.inf)

    def _automatic_size(self) -> int:
        """Return sequences a batch by fixed budgets, so that runs repeat exactly."""
        cpu = input_device(self.model).type == "cpu"
        tokens = CPU_TOKENS if cpu else GPU_TOKENS
        if self.needs & {"nll", "gradients"}:
            rows = self.model.config.get_text_config().vocab_size
            tokens = min(tokens, (CPU_LOGITS if cpu else GPU_LOGITS) // rows)
        return max(1, tokens // max(map(len, self.sequences)))


def sequence_losses(logits: Tensor, batch: Batch) -> Tensor:
    """Return the mean NLL per predicted token of each sequence, ``[batch]`` float32."""
    ids = batch.ids.to(logits.device)
    there = batch.mask.to(logits.device)[:, 1:].float()
    # One long list of positions: the loss over a transposed view takes several times as long.
    scores = logits[:, :-1].flatten(0, 1).float()
    each = functional.cross_entropy(scores, ids[:, 1:].flatten(), reduction="none")
    return (each.view_as(there) * there).sum(1) / there.sum(1).clamp(min=1)
