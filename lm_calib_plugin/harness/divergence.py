"""``divergence=true``: the dense model beside the compressed one, at all that a harness scores.

The harness makes batches, cuts windows and answers several requests from one row of logits. We
look at each row that it scores, run the dense model on the same batch, and find by the token ids of
a row which requests it answers. A position counts once for each document, however many requests
share its logits; rows that only fill up batches or processes never count.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from torch.nn import functional

from lm_calib_plugin.diagnostics.tokens import TokenDivergence, token_divergence
from lm_calib_plugin.guard import several_processes
from lm_calib_plugin.harness.divergence_sums import GENERATED, SCORED, Place, Request, Sums
from lm_calib_plugin.harness.listening import Noted, counted_reads

# Why a request, or a row of a batch, was not compared.
NOT_FINITE = "logits that are not finite, or infinitely far apart"
UNKNOWN = "rows of batches that belong to no known request"
NO_TOKENS = "generations without a token"


class Watch:
    """Compares the model of a harness class with its dense twin while it is evaluated.

    Parameters
    ----------
    lm
        The harness model.
    dense
        What it was before it was compressed; it takes inputs where the model does.
    """

    def __init__(self, lm: Any, dense: Any) -> None:
        self._lm, self._dense = lm, dense
        self.sums = Sums()
        self._everyone: list[Any] = []
        self._table: dict[bytes, dict[Place, list[int]]] = {}
        self._done: set[bytes] = set()
        self._requests: list[Request] | None = None
        self._batch: tuple[Tensor, Tensor, Tensor] | None = None
        self._row = 0

    @contextlib.contextmanager
    def scoring(self, requests: Sequence[Any], rolling: bool = False) -> Iterator[None]:
        """Compare at all rows that are scored inside, for these requests of the harness."""
        self._requests = _named(requests)
        if rolling:
            self._cut(requests)
        try:
            yield
        finally:
            self._requests, self._batch = None, None
            self._table, self._done = {}, set()

    def tokenized(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> None:
        """Take the token ids of all requests of ``scoring``, context and continuation, in order.

        Windows of rolling requests are known before; for them nothing is done.
        """
        if self._requests is None or self._table:
            return
        for request, (_, context, continuation) in zip(self._requests, requests, strict=True):
            self._expect(Place(request), context, continuation)

    def release(self) -> None:
        """Forget the logits of the last batch, before the next one needs their memory."""
        self._batch = None

    def passed(self, inputs: Tensor, logits: Tensor) -> None:
        """Take a batch that the model has been run on, and run the dense model on it.

        Trials for the largest batch come here as well, so that the memory they find is enough for
        both; none of their rows is scored.
        """
        if self._requests is None:
            return
        self._batch = None
        with self._timed(inputs):
            dense = self._logits(self._dense, inputs)
        self._batch, self._row = (inputs.cpu(), dense, logits), 0

    def scored(self, contlen: int | None = None, inplen: int | None = None) -> None:
        """Compare the next row of the batch, of which the first ``inplen`` positions are no pads.

        The harness asks for the ``contlen`` positions that it scores of each row once, in order.
        """
        if self._batch is None or inplen is None:
            return
        ids, dense, compressed = self._batch
        row = self._row
        self._row += 1
        key = _digest(ids[row, :inplen].tolist())
        if key in self._done:
            return
        self._done.add(key)
        expected = self._table.get(key)
        if expected is None:
            self.sums.left[UNKNOWN] += 1
            return
        with self._timed(dense):
            scored = max(len(tokens) for tokens in expected.values())
            part = slice(inplen - scored, inplen)
            self._compare(dense[row, part], compressed[row, part], expected)

    @contextlib.contextmanager
    def generating(self, requests: Sequence[Any]) -> Iterator[None]:
        """Compare along what is generated inside, for these requests of the harness."""
        noted = Noted(self._lm.cache_hook, _named(requests), requests)
        self._noted, self._lm.cache_hook = noted, noted
        try:
            yield
        finally:
            self._lm.cache_hook = noted.hook
            for request, found in noted.matched():
                if found is None or not len(found):
                    self.sums.left[NO_TOKENS] += 1
                elif not _finite(found):
                    self.sums.left[NOT_FINITE] += 1
                else:
                    tally = self.sums.tally(request.task, GENERATED)
                    tally.add(request.document, found)
                    tally.add_tokens(request.document, found.nll_dense, found.nll_compressed)
                    tally.requests.add((request.document, request.number, len(tally.requests)))

    def generated(self, prompts: Tensor, mask: Tensor | None, found: Tensor, stop: Any) -> None:
        """Compare both models on what was generated: prompt and answer, by teacher forcing.

        Parameters
        ----------
        prompts, mask
            ``[batch, length]``, padded on the left.
        found
            Prompts and answers, ``[batch, longer]``.
        stop
            Texts that end an answer; what comes after the first of them never counts.
        """
        width = prompts.shape[1]
        with self._timed(found):
            for row, ids in enumerate(found):
                start = 0 if mask is None else int(width - mask[row].sum())
                count = self._kept(ids[width:].tolist(), [text for text in stop or () if text])
                asked = ids[start : width + count]
                self._noted.found.append(self._along(asked, count) if count else None)

    def watch_cache(self, database: Any) -> None:
        """Count answers that a response cache gives instead of the model."""
        if database is not None:
            self.sums.cached = counted_reads(database)

    def gather(self) -> None:
        """Add up what every process of a data-parallel run has seen; all have to call it."""
        if several_processes():
            everyone: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, self.sums.plain())
            self._everyone = everyone

    def report(self) -> tuple[dict[str, Any], list[str]]:
        """Return the block of the summary, and a warning for each thing that was not compared."""
        total = self.sums
        if self._everyone:
            total = Sums()
            for plain in self._everyone:
                total.merge(plain)
        return total.report(), total.warnings()

    def _cut(self, requests: Sequence[Any]) -> None:
        """Expect the windows that the harness cuts running text into."""
        assert self._requests is not None
        for request, asked in zip(self._requests, requests, strict=True):
            windows = get_rolling_token_windows(
                token_list=self._lm.tok_encode(asked.args[0]),
                prefix_token=self._lm.prefix_token_id,
                max_seq_len=self._lm.max_length,
                context_len=1,
            )
            for number, window in enumerate(windows):
                self._expect(Place(request, number), *make_disjoint_window(window))

    def _expect(self, place: Place, context: list[int], continuation: list[int]) -> None:
        """Remember which request a row answers; long ones lose their beginning, as in HFLM."""
        kept = (context + continuation)[-(self._lm.max_length + 1) :]
        self._table.setdefault(_digest(kept[:-1]), {})[place] = continuation

    def _compare(self, dense: Tensor, compressed: Tensor, expected: dict[Any, list[int]]) -> None:
        longest = max(expected.values(), key=len)
        found = token_divergence(dense, compressed, torch.tensor(longest))
        if not _finite(found):
            self.sums.left[NOT_FINITE] += len(expected)
            for place in expected:
                self.sums.unanswered(place.request)
            return
        documents: dict[tuple[str, Any], int] = defaultdict(int)
        several = len(set(map(tuple, expected.values()))) > 1
        likely = [_log_softmax(logits) for logits in (dense, compressed)] if several else []
        for place, tokens in expected.items():
            request = place.request
            owner = (request.task, request.document)
            documents[owner] = max(documents[owner], len(tokens))
            nll = [found.nll_dense, found.nll_compressed]
            if several:
                nll = [_nll(one, tokens) for one in likely]
            self.sums.tally(request.task, SCORED).add_tokens(request.document, *nll)
            self.sums.answered(request, *(-float(one.sum()) for one in nll))
        for (task, document), count in documents.items():
            self.sums.tally(task, SCORED).add(document, found.last(count))

    def _along(self, ids: Tensor, count: int) -> TokenDivergence:
        """Compare at the last ``count`` tokens of a sequence."""
        first, second = (self._logits(m, ids[None])[0] for m in (self._dense, self._lm.model))
        part = slice(len(ids) - count - 1, len(ids) - 1)
        return token_divergence(first[part], second[part], ids[-count:])

    def _kept(self, new: list[int], stop: Sequence[str]) -> int:
        """Return how many generated tokens belong to the answer, its end included."""
        ends = {self._lm.eot_token_id, *_end_tokens(self._lm.model)}
        count = next((i for i, token in enumerate(new, 1) if token in ends), len(new))

        def ended(tokens: int) -> bool:
            text = self._lm.tok_decode(new[:tokens])
            return any(mark in text for mark in stop)

        if not count or not ended(count):
            return count
        low, high = 1, count  # a text that holds a mark holds it when more is written
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if ended(middle) else (middle + 1, high)
        return low

    def _logits(self, model: Any, ids: Tensor) -> Tensor:
        """Run a model as HFLM runs its own."""
        dtype, kind = self._lm.mixed_precision_dtype, self._lm.device.type
        with torch.no_grad(), torch.autocast(kind, dtype, enabled=dtype is not None):
            logits: Tensor = model(ids).logits
        return logits

    @contextlib.contextmanager
    def _timed(self, like: Tensor) -> Iterator[None]:
        _wait(like)
        start = time.perf_counter()
        try:
            yield
        finally:
            _wait(like)
            self.sums.seconds += time.perf_counter() - start


def _named(requests: Sequence[Any]) -> list[Request]:
    found = []
    for number, request in enumerate(requests):
        document = getattr(request, "doc_id", None)
        found.append(
            Request(
                getattr(request, "task_name", None) or "unnamed",
                f"request {number}" if document is None else document,
                getattr(request, "idx", 0),
                request.args[0] == "",
                getattr(request, "request_type", "") == "loglikelihood",
            )
        )
    return found


def _digest(ids: Sequence[int]) -> bytes:
    raw = torch.tensor(ids, dtype=torch.int64).numpy().tobytes()
    return hashlib.blake2b(raw, digest_size=16).digest()


def _log_softmax(logits: Tensor) -> Tensor:
    return functional.log_softmax(logits.float(), dim=-1)


def _nll(log_probabilities: Tensor, tokens: list[int]) -> Tensor:
    """Return the negative log-likelihoods of tokens at the last positions."""
    where = torch.tensor(tokens, device=log_probabilities.device)[:, None]
    return -log_probabilities[-len(tokens) :].gather(1, where)[:, 0].double().cpu()


def _finite(found: TokenDivergence) -> bool:
    values = (found.js, found.kl, found.nll_dense, found.nll_compressed)
    return all(bool(torch.isfinite(value).all()) for value in values)


def _end_tokens(model: Any) -> list[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]


def _wait(like: Tensor) -> None:
    if like.device.type == "cuda":
        torch.cuda.synchronize(like.device)
