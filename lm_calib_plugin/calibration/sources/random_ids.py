"""``random``: uniform token ids, a control that carries no language at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lm_calib_plugin.calibration.seeds import derive_seed
from lm_calib_plugin.calibration.sources.base import Context, IdSource
from lm_calib_plugin.calibration.tokens import text_ids
from lm_calib_plugin.errors import UserError


class RandomIds(IdSource):
    """Every id of the vocabulary that is not special is equally likely at every place."""

    name = "random"

    def __init__(self, argument: str = "", options: Any = ()) -> None:
        super().__init__(argument, options)
        self._vocabulary = 0

    def validate(self) -> None:
        """Refuse an argument; there is nothing to name."""
        if self.argument:
            raise UserError(
                "calibration", f"`random` takes no argument, got `{self.argument}`", "write random"
            )

    def sequences(self, context: Context) -> list[Tensor]:
        """Draw ``context.count`` tensors of exactly ``context.seqlen`` ids."""
        ids = torch.tensor(text_ids(context.tokenizer, context.vocab_size), dtype=torch.int64)
        self._vocabulary = len(ids)
        generator = torch.Generator().manual_seed(derive_seed(context.seed, "ids"))
        shape = (context.count, context.seqlen)
        return list(ids[torch.randint(len(ids), shape, generator=generator)])

    def provenance(self) -> dict[str, Any]:
        """Tell how many ids were drawn from."""
        return {"fingerprint": None, "licence": None, "vocabulary": self._vocabulary}
