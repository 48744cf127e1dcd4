"""A model that was loaded from the cache leaves as the very folder of one that was compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lm_calib_plugin import Recipe, storage
from lm_calib_plugin.export.folder import export_model
from lm_calib_plugin.export.options import ExportOptions
from tests.artifacts.test_cache import FAMILIES, run
from tests.tiny import make_tokenizer


def exported(made: Any, given: dict[str, Any], out: Path) -> dict[str, str]:
    """Return the digests of weights and configuration of an exported folder."""
    model, report = made
    options = ExportOptions(check=False)
    export_model(model, make_tokenizer(), Recipe(**given), report, out, options)
    files = [*out.glob("*.safetensors"), out / "config.json"]
    return {file.name: storage.file_digest(file) for file in files}


@pytest.mark.parametrize("family", ["wanda", "gptq", "smoothquant", "rotation", "depth", "flap"])
def test_exports_of_a_hit_and_a_miss_are_the_same(family: str, tmp_path: Path) -> None:
    given, name = FAMILIES[family]
    found = []
    for number in range(2):
        made = run(tmp_path / "kept", given, name)
        assert made[1].cache["hit"] is bool(number)
        found.append(exported(made, given, tmp_path / str(number)))
    assert len(found[0]) >= 2
    assert found[0] == found[1]
