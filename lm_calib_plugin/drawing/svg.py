"""SVG of matplotlib made fit for a page: light and dark, no style attributes, said in words.

A figure is drawn in sentinel colors, one for each role. In the file each becomes the color of the
light scheme and a class; who shows it in the dark overrides the class. Styles become attributes,
as a strict Content-Security-Policy refuses them.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from xml.etree import ElementTree

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_HREF = f"{{{_XLINK}}}href"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
# Name -> light, dark. Series: after Okabe and Ito, told apart by all kinds of color vision.
COLORS = {
    "ink": ("#1c1e21", "#e6e7e9"),
    "muted": ("#6a6f76", "#9aa0a8"),
    "grid": ("#dcdfe3", "#3a3f46"),
    "paper": ("#ffffff", "#15171a"),
    "s0": ("#0072b2", "#56a8e0"),
    "s1": ("#d55e00", "#f08a4b"),
    "s2": ("#009e73", "#3cc79f"),
    "s3": ("#b5578c", "#dd95be"),
    "s4": ("#c98a00", "#eebb55"),
    "s5": ("#5b4fb3", "#a59bee"),
    "s6": ("#7a6a4f", "#bfae90"),
}
SERIES = tuple(name for name in COLORS if re.fullmatch(r"s\d", name))
SENTINELS = {name: f"#fe01{number:02x}" for number, name in enumerate(COLORS)}
_NAMES = {sentinel: name for name, sentinel in SENTINELS.items()}
_PAINTS = {"fill": "pf", "stroke": "ps"}
_DROPPED = {"font-family", "font", "-inkscape-font-specification"}


@dataclass(frozen=True)
class Palette:
    """The colors to draw with: those of the light scheme, or sentinels."""

    colors: dict[str, str]

    def __getitem__(self, name: str) -> str:
        return self.colors[name]

    def series(self, number: int) -> str:
        """Return the color of a series; after the last comes the first again."""
        return self.colors[SERIES[number % len(SERIES)]]


LIGHT = Palette({name: light for name, (light, _) in COLORS.items()})
ADAPTIVE = Palette(SENTINELS)


def adaptive(raw: bytes, name: str, title: str, description: str) -> str:
    """Return an SVG element for a page, of a figure drawn with ``ADAPTIVE``.

    Parameters
    ----------
    raw
        What matplotlib wrote.
    name
        Prefix of all ids in it, so that many can stand in one page.
    title, description
        For those who can not see it.
    """
    for prefix, address in (("", _SVG), ("xlink", _XLINK)):
        ElementTree.register_namespace(prefix, address)
    root = ElementTree.fromstring(raw)  # noqa: S314 - what we have just drawn
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    mark = "p" + hashlib.sha256(name.encode()).hexdigest()[:8]
    ids: dict[str, str] = {}
    for element in root.iter():
        element.tail = None
        _presented(element)
        _renamed(element, mark, ids)
    for dropped in ("width", "height", "version", "id"):
        root.attrib.pop(dropped, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{mark}t {mark}d")
    root.set("stroke-linejoin", "round")
    root.set("font-family", FONT)
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        words = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": f"{mark}{tag[0]}"})
        words.text = text
        root.insert(place, words)
    return ElementTree.tostring(root, encoding="unicode")


def standalone(element: str) -> str:
    """Return a file of its own: the element, with the colors for a dark surrounding."""
    rules = "".join(
        f".pf-{name}{{fill:{dark}}}.ps-{name}{{stroke:{dark}}}"
        for name, (_, dark) in COLORS.items()
    )
    style = f"<style>@media (prefers-color-scheme:dark){{{rules}}}</style>"
    head, body = element.split(">", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}>{style}{body}\n'


def _presented(element: ElementTree.Element) -> None:
    """Turn a style attribute into attributes, and sentinels into colors with a class."""
    for line in element.attrib.pop("style", "").split(";"):
        name, _, value = (part.strip() for part in line.partition(":"))
        if name and name not in _DROPPED:
            element.set(name, value)
    classes = []
    for paint, prefix in _PAINTS.items():
        name = _NAMES.get(element.get(paint, "").lower(), "")
        if name:
            element.set(paint, COLORS[name][0])
            classes.append(f"{prefix}-{name}")
    if classes:
        element.set("class", " ".join(classes))


def _renamed(element: ElementTree.Element, mark: str, ids: dict[str, str]) -> None:
    """Give short ids of our own to what is referred to."""

    def own(old: str) -> str:
        return ids.setdefault(old, f"{mark}-{len(ids)}")

    if "id" in element.attrib:
        if element.tag == f"{{{_SVG}}}g":  # names of parts; nothing refers to them
            del element.attrib["id"]
        else:
            element.set("id", own(element.attrib["id"]))
    if element.get(_HREF, "").startswith("#"):
        element.set(_HREF, "#" + own(element.attrib[_HREF][1:]))
    for name, value in list(element.attrib.items()):
        match = re.fullmatch(r"url\(#(.+)\)", value)
        if match:
            element.set(name, f"url(#{own(match[1])})")
