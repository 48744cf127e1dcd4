"""Outlier channels put into a model on purpose: its function stays, its activations do not.

A channel that one layer writes and others read can be made ``factor`` times as large where it is
written, with the columns that read it ``factor`` times as small. By powers of two this changes no
bit of what the model returns, and all of what a quantizer sees: one large channel sets the range of
a tensor, and the others have few levels left. So a small trained model becomes as fragile as some
large ones were (arXiv 2405.20835, 2211.10438). It is labeled as synthetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lm_calib_plugin import engine
from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.checks import check_whole, vocab_size
from lm_calib_plugin.diagnostics.scoring import logits_of
from lm_calib_plugin.engine.wiring import LINEAR, MAPS, NORM, Feed, wiring_of
from lm_calib_plugin.errors import (
    NumericalError,
    UnsupportedModelError,
    UserError,
    listed,
    nearest,
)
from lm_calib_plugin.guard import left_as_found

CHOICES = ("random", "large", "bursty", "steady", "specific")
FEEDS = {"norm": (NORM,), "linear": (LINEAR,), "all": (LINEAR, NORM)}
LABEL = "lm_calib_synthetic"
NOTE = (
    "Synthetic: outlier channels were put into this model on purpose. It computes what the "
    "original computes; what quantization does to it says nothing about the original."
)
_TINY = torch.finfo(torch.float32).tiny
# Of the largest logit: what other last bits on the way may change.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_TOLERANCE_16 = 0.05


@dataclass(frozen=True)
class Injected:
    """One source whose channels were made larger.

    ``source`` is a norm or a linear layer (``kind``), ``channels`` are its outputs, ``factors``
    what each was multiplied by, ``readers`` the layers that read them. ``widened`` is how many
    times as large the range of the whole tensor became on the text (None without one).
    """

    source: str
    kind: str
    channels: tuple[int, ...]
    factors: tuple[float, ...]
    readers: tuple[str, ...]
    widened: float | None


@dataclass(frozen=True)
class OutlierRecord:
    """What was done to a model; also kept in ``config.lm_calib_synthetic``.

    ``difference`` is the largest difference of logits before and after, over the largest logit.
    """

    factor: float
    choose: str
    feeds: str
    seed: int
    injected: tuple[Injected, ...]
    difference: float

    def plain(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return asdict(self)


@dataclass(frozen=True)
class Activity:
    """How large each input channel of a layer is over tokens: largest and mean ``|x|``, ``[in]``.

    Float32, on the CPU.
    """

    peak: Tensor
    mean: Tensor


@torch.no_grad()
def inject_outliers(
    model: nn.Module,
    factor: float = 32.0,
    channels: int = 1,
    seed: int = 0,
    choose: str = "bursty",
    feeds: str = "norm",
    text: Sequence[Tensor] = (),
    against: Sequence[Tensor] = (),
) -> OutlierRecord:
    """Make channels of every block larger and what reads them smaller, in place.

    Parameters
    ----------
    model
        Of an architecture whose wiring is known, see :mod:`~lm_calib_plugin.engine.wiring`.
    factor
        A power of two, more than 1.
    channels
        Outputs of each source to scale, at most.
    seed
        Of the choice ``random``.
    choose
        Which channels. ``random``: any. ``large``: with the largest values on ``text``. ``bursty``:
        with the largest value over the mean, among the half with large values; they are large on
        few tokens, so ranges for each token mend most. ``steady``: the opposite; ranges for each
        token are nearly as bad as one for all then. ``specific``: that are large on ``text`` and
        small on ``against``; each is scaled by at most ``factor``, and no more than leaves the
        range on ``against`` as it is, so what a calibration text sees depends on what it is about.
    feeds
        Sources: ``norm``, what norms write (where SmoothQuant mends); ``linear``, what other layers
        write (values of attention, gates of MLPs), or ``all``.
    text, against
        Token ids, 1-D each. Only ``random`` does without.

    Returns
    -------
    OutlierRecord
        The model carries it too, in ``config.lm_calib_synthetic``, after those put in before.

    Raises
    ------
    UserError
        For a factor that is no power of two, an unknown choice, or a text that is missing.
    UnsupportedModelError
        When the wiring of the architecture is not known.
    NumericalError
        When logits changed by more than rounding; the model is of no use then.

    Notes
    -----
    Channels of a value head feed all query heads of its group, and are scaled together. SmoothQuant
    undoes an injection after norms exactly, whatever its text: with inputs ``f`` times as large and
    columns ``f`` times as small, its factor ``max|X|^a / max|W|^(1-a)`` is ``f`` times as large.
    """
    _check(factor, channels, choose, feeds, text, against)
    check_whole(model, "pretrained", "an injection")
    chosen = [feed for feed in _all_feeds(model) if feed.kind in FEEDS[feeds]]
    if not chosen:
        raise UserError("feeds", f"got {feeds}", "no block of this model has such sources")
    probes = _probes(model, text)
    with left_as_found(model):
        before = [logits_of(model, ids[None], "original") for ids in probes]
        seen = activity_of(model, text) if text else {}
        other = activity_of(model, against) if choose == "specific" else {}
        injected = []
        for feed in chosen:
            mine = seen.get(feed.name)
            if choose == "specific":
                score, factors = _unseen(seen[feed.name], other[feed.name], feed.rows, factor)
            else:
                generator = torch.Generator().manual_seed(derive_seed(seed, "outliers", feed.name))
                score = _score(choose, mine, len(feed.rows), generator)
                factors = torch.full((len(feed.rows),), float(factor))
            injected.append(_scale(feed, score, factors, channels, mine))
        difference = _difference(model, probes, before)
    record = OutlierRecord(float(factor), choose, feeds, seed, tuple(injected), difference)
    _label(model.config, record)
    return record


def synthetic_label(config: Any) -> Mapping[str, Any] | None:
    """Return what a configuration says of injected outliers, None for an ordinary model."""
    return getattr(config, LABEL, None)


@torch.no_grad()
def activity_of(model: nn.Module, text: Sequence[Tensor]) -> dict[str, Activity]:
    """Return the activity of what each source writes, by its name; memory is that of one sequence.

    Parameters
    ----------
    text
        Token ids, 1-D each, at least one.
    """
    peaks: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    hooks = []
    for feed in _all_feeds(model):

        def watch(_: nn.Module, args: tuple[Any, ...], name: str = feed.name) -> None:
            x = args[0].detach().flatten(0, -2).float().abs()
            peak, total = x.amax(0), x.sum(0)
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak
            sums[name] = sums[name] + total if name in sums else total

        hooks.append(feed.readers[0].register_forward_pre_hook(watch))
    try:
        with left_as_found(model):
            for ids in text:
                logits_of(model, ids[None], "original")
    finally:
        for hook in hooks:
            hook.remove()
    tokens = sum(len(ids) for ids in text)
    return {name: Activity(peak.cpu(), sums[name].cpu() / tokens) for name, peak in peaks.items()}


def _all_feeds(model: nn.Module) -> list[Feed]:
    kind = str(getattr(engine.text_config(getattr(model, "config", None)), "model_type", ""))
    if kind not in MAPS:
        raise UnsupportedModelError(
            "pretrained",
            f"which layers feed which is not known for {type(model).__name__} ({kind})",
            f"architectures: {listed(sorted(MAPS))}",
        )
    wiring = wiring_of(model, engine.find_blocks(model))
    return [feed for block in wiring.blocks for feed in block]


def _check(
    factor: float,
    channels: int,
    choose: str,
    feeds: str,
    text: Sequence[Tensor],
    against: Sequence[Tensor],
) -> None:
    if not (math.isfinite(factor) and factor > 1 and math.log2(factor).is_integer()):
        raise UserError("factor", f"got {factor:g}", "a power of two above 1", "for instance 32")
    if channels < 1:
        raise UserError("channels", f"got {channels}", "1 or more")
    for name, given, known in (("choose", choose, CHOICES), ("feeds", feeds, tuple(FEEDS))):
        if given not in known:
            raise UserError(
                name, f"got {given!r}", nearest(given, known), f"one of {listed(known)}"
            )
    if choose != "random" and not text:
        raise UserError(
            "text", f"choose={choose} looks at activations, and there is no text", "", "give one"
        )
    if choose == "specific" and not against:
        raise UserError("against", "choose=specific compares two texts, and there is one")


def _probes(model: nn.Module, text: Sequence[Tensor]) -> list[Tensor]:
    """Return sequences to compare logits on: the first of the text, and a random one."""
    generator = torch.Generator().manual_seed(derive_seed(0, "outliers", "probe"))
    return [*text[:1], torch.randint(0, vocab_size(model), (32,), generator=generator)]


def _score(choose: str, seen: Activity | None, width: int, generator: torch.Generator) -> Tensor:
    """Return which inputs of the readers are wanted most, ``[in]``; those out of question: -1."""
    if choose == "random" or seen is None:
        return torch.rand(width, generator=generator)
    if choose == "large":
        return seen.peak
    burst = seen.peak / seen.mean.clamp(min=_TINY)
    wanted = burst if choose == "bursty" else 1 / burst.clamp(min=_TINY)
    return torch.where(seen.peak >= seen.peak.median(), wanted, -1.0)


def _unseen(seen: Activity, other: Activity, rows: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """Return scores and factors: the largest that leave the range on the other text as it is."""
    peak = _widest(rows.cpu(), other.peak)[rows.cpu()]
    room = other.peak.max() / peak.clamp(min=_TINY)
    factors = torch.exp2(room.log2().floor()).clamp(1.0, most)
    return factors * seen.peak, factors


def _widest(rows: Tensor, x: Tensor) -> Tensor:
    """Return for every output of a source the largest value of the inputs that it feeds."""
    found = torch.full((int(rows.max()) + 1,), -torch.inf)
    return found.scatter_reduce_(0, rows, x.float(), "amax")


def _scale(
    feed: Feed, score: Tensor, factors: Tensor, channels: int, seen: Activity | None
) -> Injected:
    """Scale the best channels of a source, and the columns of its readers."""
    rows = feed.rows.cpu()
    sources = rows.unique()
    best = _widest(rows, score)[sources]
    top = sources[best.topk(min(channels, len(sources))).indices].sort().values
    s = torch.where(torch.isin(rows, top), factors, 1.0)
    feed.multiply(feed.divide(1 / s))
    widened = None if seen is None else float((s * seen.peak).max() / seen.peak.max())
    own = _widest(rows, s)[top]
    return Injected(
        feed.name,
        feed.kind,
        tuple(top.tolist()),
        tuple(own.tolist()),
        feed.reader_names,
        widened,
    )


def _difference(model: nn.Module, probes: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    worst = 0.0
    for ids, old in zip(probes, before, strict=True):
        new = logits_of(model, ids[None], "changed").double()
        gap = float((new - old.double()).abs().max() / old.double().abs().max().clamp(min=_TINY))
        allowed = _TOLERANCE.get(old.dtype, _TOLERANCE_16)
        if gap > allowed:
            what = f"logits moved by {gap:.2g} of the largest, more than {allowed:g}"
            raise NumericalError("the model", "injection", what, "use dtype=float32")
        worst = max(worst, gap)
    return worst


def _label(config: Any, record: OutlierRecord) -> None:
    before = synthetic_label(config) or {"note": NOTE, "outliers": []}
    setattr(config, LABEL, {**before, "outliers": [*before["outliers"], record.plain()]})
