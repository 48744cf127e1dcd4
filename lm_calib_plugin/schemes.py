"""Names of weight and activation formats, as the ecosystem writes them: ``W4A16``, ``FP8``, ..."""

from __future__ import annotations

from dataclasses import dataclass

from lm_calib_plugin.errors import UserError, listed, nearest


@dataclass(frozen=True)
class Scheme:
    """What a name stands for.

    Parameters
    ----------
    number
        Kind of number of the weights: ``int``, ``fp8``, ``nvfp4`` or ``mxfp4``.
    bits, group_size, symmetric
        As in a recipe; ``group_size`` is a default where ``fixed`` is false.
    act_bits
        Width of the activations, of the same kind of number; None: they stay as they are.
    act_dynamic
        Whether the range of an activation is that of each token, or calibrated.
    fixed
        Whether the format itself says which values share a scale.
    """

    number: str = "int"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_bits: int | None = None
    act_dynamic: bool = True
    fixed: bool = False


SCHEMES: dict[str, Scheme] = {
    "W4A16": Scheme(),
    "W3A16": Scheme(bits=3),
    "W2A16": Scheme(bits=2),
    "W8A16": Scheme(bits=8, group_size=-1),
    "W8A8": Scheme(bits=8, group_size=-1, act_bits=8),
    "W8A8_static": Scheme(bits=8, group_size=-1, act_bits=8, act_dynamic=False),
    "W4A8": Scheme(act_bits=8),
    "W4A4": Scheme(group_size=-1, act_bits=4),
    "FP8": Scheme("fp8", bits=8, group_size=-1, act_bits=8),
    "FP8_static": Scheme("fp8", bits=8, group_size=-1, act_bits=8, act_dynamic=False),
    "NVFP4": Scheme("nvfp4", bits=4, group_size=16, act_bits=4, fixed=True),
    "MXFP4": Scheme("mxfp4", bits=4, group_size=32, act_bits=4, fixed=True),
}


def scheme_name(value: object) -> str:
    """Return the name of a scheme as it is written here; upper and lower case are one.

    Raises
    ------
    UserError
        For a name that is not known.
    """
    names = {name.lower(): name for name in SCHEMES}
    found = names.get(str(value).strip().lower().replace("-", "_"))
    if found is None:
        raise UserError(
            "scheme",
            f"got {value!r}",
            nearest(str(value), SCHEMES),
            f"schemes: {listed(SCHEMES)}; others with bits, group_size, act_bits",
        )
    return found
