"""HTML pages that stand in one file: a template, what goes into it, and the style that all pages share.

A template names what goes into it as `{{name}}`. A page's own style lies beside its template, under the template's name
with `.css`.
"""

import pathlib
import re

_SHARED_STYLE = pathlib.Path(__file__).with_suffix(".css")


def fill(template: pathlib.Path, **contents: str) -> str:
    """The template's text with `contents` in it; what looks like `{{name}}` within a content stays as it is."""
    text = template.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: contents[found[1]], text)


def style(template: pathlib.Path) -> str:
    """The shared style sheet, and behind it the page's own, which so has the last word."""
    own = template.with_suffix(".css")
    return _SHARED_STYLE.read_text(encoding="utf-8") + "\n" + own.read_text(encoding="utf-8")
