"""Pages from templates, with everything they need inside them."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

from influence_framework.errors import InfluenceError

if TYPE_CHECKING:
    import jinja2

PACKAGE = "influence_framework.reporting"


class MissingExtraError(InfluenceError, ImportError):
    """What was asked for needs distributions that the package itself does not."""


def require_extra(extra: str, what: str, *modules: str) -> None:
    """Raise :class:`MissingExtraError` unless all of ``modules``, which ``extra`` brings, are there."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise MissingExtraError(
                f"{what} needs more than the package itself ({error}): "
                f"pip install 'influence-framework[{extra}]'"
            ) from error


def environment(*packages: str) -> jinja2.Environment:
    """Templates of a report, and those in the folders ``templates`` of ``packages``."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package) for package in (*packages, PACKAGE)]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def rendered(template: jinja2.Template, data: Any, **context: Any) -> str:
    """The page, with ``data`` for its script.

    The page allows no script but its own, told by its hash, and nothing from elsewhere.
    """
    from markupsafe import Markup

    script, style = _part("report.js"), _part("report.css")
    text = template.render(
        **context,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup(style),
        data=Markup(as_json(data)),
    )
    # Half of a surrogate pair is no text that a file could hold.
    return text.encode("utf-8", "replace").decode("utf-8")


def as_json(data: Any) -> str:
    """JSON that can stand inside a script element: nothing in it ends that, or begins a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _part(name: str) -> str:
    return (resources.files(PACKAGE) / "templates" / name).read_text(encoding="utf-8")


def number(value: float, *, signed: bool) -> str:
    """About three digits, with a true minus sign."""
    size = abs(value)
    sign = "+" if signed else ""
    if 0 < size < 0.01 or size >= 1e7:
        return f"{value:{sign}.1e}".replace("-", "−")
    decimals = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:{sign},.{decimals}f}".replace("-", "−")
