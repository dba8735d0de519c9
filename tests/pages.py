"""Pages of HTML, read by the parser of the standard library."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from io import BytesIO
from typing import Any

from PIL import Image

EMPTY = {"meta", "link", "img", "br", "input"}


class Elements(HTMLParser):
    """Collects every element with its attributes, the text of scripts, and the elements left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif not self.open or self.open[-1] != "style":
            self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def content(html: str) -> Any:
    """What the script of a page shows."""
    return json.loads(Elements(html).scripts[0])


def said(html: str) -> str:
    """The text of a page outside its script."""
    return " ".join(" ".join(Elements(html).text).split())


def check_self_contained(html: str) -> None:
    """Nothing is loaded from elsewhere, and no script is allowed but the page's own."""
    elements = Elements(html)
    assert elements.open == []
    for _, attributes in elements.found:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert [tag for tag, _ in elements.found if tag in {"iframe", "object", "embed", "form", "base"}] == []
    style = html[html.index("<style>") : html.index("</style>")]
    assert not re.search(r"url\(|@import|expression|</", style)
    data, script = elements.scripts
    assert elements.of("script") == [{"type": "application/json", "id": "data"}, {}]
    assert "<" not in data
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function|fetch|https?:", script
    )
    (policy,) = [meta["content"] for meta in elements.of("meta") if meta.get("http-equiv")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def image(uri: str) -> Image.Image:
    """A picture from its data URI."""
    return Image.open(BytesIO(base64.b64decode(uri.removeprefix("data:image/webp;base64,"))))
