"""What the inputs of linear layers look like, and whether it depends on the text.

>>> result = inspect(model, tokenizer, {"c4": one_set, "code": another})  # doctest: +SKIP
>>> print(document(result, tokenizer, "my model").text())  # doctest: +SKIP
"""

from lm_calib_plugin.diagnostics.activations.inspection import GRAM_BYTES, inspect
from lm_calib_plugin.diagnostics.activations.report import document
from lm_calib_plugin.diagnostics.activations.result import ALL, REST, OfSet, Result

__all__ = ["ALL", "GRAM_BYTES", "REST", "OfSet", "Result", "document", "inspect"]
