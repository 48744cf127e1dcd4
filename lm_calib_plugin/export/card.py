"""The model card of an exported folder."""

from __future__ import annotations

from typing import Any


def model_card(report: Any, provenance: Any, facts: dict[str, Any]) -> str:
    """Return the card as Markdown."""
    return f"# {provenance.pretrained}, compressed\n"


def base_license(pretrained: str) -> str | None:
    """Return the license of a base model as its card says, None if it is not known."""
    return None
