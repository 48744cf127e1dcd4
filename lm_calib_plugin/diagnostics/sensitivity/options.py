"""What may be asked of ``lm-calib inspect sensitivity``, checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_calib_plugin.errors import UserError, listed, nearest
from lm_calib_plugin.values import number, patterns, whole

GROUPS, BLOCKS, NOISE, DEPTH = PROBES = ("groups", "blocks", "noise", "depth")
GAUSSIAN, UNIFORM, ALIGNED = NOISES = ("gaussian", "uniform", "aligned")
WEIGHTS, INPUTS = PLACES = ("weights", "inputs")
COSINE, L1, L2, LOGIT, LOSS = METRICS = ("cosine", "l1", "l2", "logit", "loss")
UNITS = ("block", "attention", "mlp")
SIZES = tuple(2.0**-power for power in range(8, 0, -1))
# How the options are typed where their name in Python is another one.
_TYPED = {
    "probes": "probe",
    "noises": "noise",
    "place": "noise_in",
    "layers": "noise_layers",
    "seeds": "noise_seeds",
    "metrics": "metric",
}


@dataclass(frozen=True)
class SensitivityOptions:
    """What is asked.

    Parameters
    ----------
    probes
        ``groups``, ``blocks``, ``noise``, ``depth``, or several joined by ``+``.
    recompress
        Compress anew for every variant of groups and blocks, instead of exchanging weights.
    ends
        Blocks in the groups of first and last ones; None: 2, or 1 in models of fewer than 6.
    noises
        Kinds of noise: ``gaussian``, ``uniform``, and ``aligned`` (signs of the rounding error of
        the recipe); None: ``gaussian``, and ``aligned`` where there is such an error.
    place
        Noise on ``weights`` or ``inputs`` of layers.
    layers
        Name patterns of the layers that get noise; ``attention`` and ``mlp`` stand for all layers
        in these. None: all layers that the recipe means.
    seeds
        Draws of each kind of noise.
    sizes
        Relative sizes of noise, rising.
    rise
        Nats; the size at which the NLL has risen by so much is told.
    unit
        What is ranked: ``block``, ``attention`` or ``mlp``.
    metrics
        Ways to rank: ``cosine``, ``l1``, ``l2``, ``logit``, ``loss``; None: all.
    against
        Further calibration expressions to rank with.
    draws
        Sets drawn of each expression to rank with.

    Raises
    ------
    UserError
        For every value that can not be used.
    """

    probes: Any = (GROUPS,)
    recompress: bool = False
    ends: int | None = None
    noises: Any = None
    place: str = WEIGHTS
    layers: Any = None
    seeds: int = 2
    sizes: Sequence[float] = SIZES
    rise: float = 0.1
    unit: str = UNITS[0]
    metrics: Any = None
    against: Any = ()
    draws: int = 1

    def __post_init__(self) -> None:
        own = object.__setattr__
        own(self, "probes", _words("probes", self.probes, PROBES))
        for name, allowed in (("noises", NOISES), ("metrics", METRICS)):
            if getattr(self, name) is not None:
                own(self, name, _words(name, getattr(self, name), allowed))
        for name, allowed in (("place", PLACES), ("unit", UNITS)):
            own(self, name, _words(name, (getattr(self, name),), allowed)[0])
        for name in ("ends", "seeds", "draws"):
            if getattr(self, name) is not None:
                own(self, name, whole(_typed(name), getattr(self, name), lowest=1))
        if self.layers is not None:
            own(self, "layers", patterns(_typed("layers"), self.layers))
        own(self, "against", _expressions(self.against))
        self._check_noise()

    def _check_noise(self) -> None:
        own = object.__setattr__
        own(self, "rise", number("rise", self.rise, "nats, above 0"))
        if not self.rise > 0:
            raise UserError("rise", f"got {self.rise:g}", "nats, above 0", "for instance 0.1")
        sizes = tuple(float(size) for size in self.sizes)
        own(self, "sizes", sizes)
        good = all(math.isfinite(size) and size > 0 for size in sizes)
        if not (good and len(sizes) > 1 and list(sizes) == sorted(set(sizes))):
            raise UserError(
                "sizes", f"got {list(sizes)}", "two or more, above 0 and rising", "(0.01, 0.1)"
            )
        if self.place == INPUTS and ALIGNED in (self.noises or ()):
            raise UserError(
                _typed("noises"),
                f"`{ALIGNED}` on inputs",
                "signs are those of the rounding error of weights",
                f"--noise {GAUSSIAN}, or --noise-in {WEIGHTS}",
            )

    @property
    def compresses(self) -> bool:
        """Whether nothing can be said without a recipe."""
        return bool({GROUPS, BLOCKS} & set(self.probes)) or ALIGNED in (self.noises or ())


def _typed(name: str) -> str:
    return _TYPED.get(name, name)


def _words(name: str, value: Any, allowed: Sequence[str]) -> tuple[str, ...]:
    """Return words joined by ``+``, or of a list, each once, in the order of what is allowed."""
    parts = value.split("+") if isinstance(value, str) else list(value)
    parts = [str(part).strip() for part in parts]
    for part in parts or [""]:
        if part not in allowed:
            raise UserError(
                _typed(name), f"got {part!r}", nearest(part, allowed), f"allowed: {listed(allowed)}"
            )
    return tuple(word for word in allowed if word in parts)


def _expressions(value: Any) -> tuple[str, ...]:
    """Return calibration expressions, which have no comma in them."""
    parts = value.split(",") if isinstance(value, str) else list(value or ())
    texts = [str(part).strip() for part in parts]
    if not all(texts) or len(set(texts)) < len(texts):
        raise UserError(
            "against",
            f"got {value!r}",
            "calibration expressions joined by commas, each once",
            "for instance --against code,wikitext2",
        )
    return tuple(texts)
