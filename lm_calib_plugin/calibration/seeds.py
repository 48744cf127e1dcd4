"""Seeds of independent draws, derived from one seed."""

from __future__ import annotations

import hashlib

from lm_calib_plugin.storage import canonical_json


def derive_seed(*parts: int | str) -> int:
    """Return a seed of 63 bits made of the parts; equal parts give an equal seed everywhere."""
    hashed = hashlib.sha256(canonical_json(list(parts)).encode()).digest()
    return int.from_bytes(hashed[:8], "big") >> 1
