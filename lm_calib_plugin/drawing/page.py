"""A page in one file: its style and script inside, and a policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from string import Template

from lm_calib_plugin.drawing import svg
from lm_calib_plugin.drawing.markup import Markup, escape


def document(title: str, body: Markup, style: str, script: str = "") -> str:
    """Return a page.

    Parameters
    ----------
    body
        Everything that is seen.
    style, script
        Of this kind of page; the style comes after that of all pages.
    """
    style = Template(_part("base.css")).substitute(series=_series()) + style
    policy = "; ".join(
        [
            "default-src 'none'",
            f"style-src '{_hash(style)}'",
            f"script-src '{_hash(script)}'" if script else "script-src 'none'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    return Template(_part("page.html")).substitute(
        policy=policy,
        title=escape(title),
        style=style,
        script=f"<script>{script}</script>\n" if script else "",
        body=body,
    )


def _part(name: str) -> str:
    return (resources.files(__package__) / name).read_text("utf-8")


def _series() -> str:
    """Return the colors of series in plots, light and dark."""

    def rules(scope: str, dark: bool) -> str:
        return "".join(
            f"{scope}.pf-{name}{{fill:{svg.COLORS[name][dark]}}}"
            f"{scope}.ps-{name}{{stroke:{svg.COLORS[name][dark]}}}"
            for name in svg.SERIES
        )

    by_system = rules(':root:not([data-theme="light"]) ', True)
    by_choice = rules(':root[data-theme="dark"] ', True)
    return f"{rules('', False)}\n@media (prefers-color-scheme: dark){{{by_system}}}\n{by_choice}"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
