"""The walk over the blocks of a model: find, observe, compress, propagate. Knows no method."""

from lm_calib_plugin.engine.batches import heldout_indices
from lm_calib_plugin.engine.dense import Visitor, dense_pass
from lm_calib_plugin.engine.discovery import (
    Blocks,
    check_config,
    check_supported,
    find_blocks,
    text_config,
)
from lm_calib_plugin.engine.fingerprint import (
    circumstances,
    model_digest,
    parameter_hashes,
    weights_digest,
)
from lm_calib_plugin.engine.kv_cache import quantize_kv
from lm_calib_plugin.engine.layers import (
    CHOSEN,
    HEAD,
    TargetLayer,
    by_module,
    find_layers,
    matches,
    untied,
)
from lm_calib_plugin.engine.plan import Plan, WalkResult
from lm_calib_plugin.engine.reach import check_reach
from lm_calib_plugin.engine.reshape import ReshapeResult, check_reshape, reshape
from lm_calib_plugin.engine.residence import check_room, is_offloaded, resident
from lm_calib_plugin.engine.rotation import rotate
from lm_calib_plugin.engine.run_statistics import kind_of
from lm_calib_plugin.engine.selection import select_layers
from lm_calib_plugin.engine.sharing import Shared, share_in, shared_here, shared_statistics
from lm_calib_plugin.engine.ties import values, whereabouts
from lm_calib_plugin.engine.walk import run

__all__ = [
    "CHOSEN",
    "HEAD",
    "Blocks",
    "Plan",
    "ReshapeResult",
    "Shared",
    "TargetLayer",
    "Visitor",
    "WalkResult",
    "by_module",
    "check_config",
    "check_reach",
    "check_reshape",
    "check_room",
    "check_supported",
    "circumstances",
    "dense_pass",
    "find_blocks",
    "find_layers",
    "heldout_indices",
    "is_offloaded",
    "kind_of",
    "matches",
    "model_digest",
    "parameter_hashes",
    "quantize_kv",
    "reshape",
    "resident",
    "rotate",
    "run",
    "select_layers",
    "share_in",
    "shared_here",
    "shared_statistics",
    "text_config",
    "untied",
    "values",
    "weights_digest",
    "whereabouts",
]
