"""Self-contained HTML pages: style, script and data are in one file, which loads nothing and runs no other script."""

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

from gptjax.report.metrics import plain

escape = html.escape
"""Makes text safe in HTML, between tags and in attributes in double quotes."""


def page(title: str, body: str, data: Any, script: str) -> str:
    """Builds a page.

    The content security policy allows only this script, by its hash, and no network. So text that was not escaped by
    mistake could still not run a script.

    Args:
        title: Plain text.
        body: HTML; text from users is escaped.
        data: JSON values, which the script reads from the element `data`.
        script: File name of the script, in this package.
    """
    code = asset("dom.js") + asset(script)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{asset("page.css")}</style>
</head>
<body>
{body}
<noscript><p class="note">The charts need JavaScript, which is turned off here.</p></noscript>
<script type="application/json" id="data">{json_for_html(data)}</script>
<script>{code}</script>
</body>
</html>
"""


def chart_page(title: str, lines: Sequence[str], data: Any) -> str:
    """Builds a page of log lines and the charts of `data`."""
    body = f"""<h1>{escape(title)}</h1>
<pre>{escape(chr(10).join(lines))}</pre>
<div class="controls" id="controls"></div>
<div class="charts" id="charts"></div>"""
    return page(f"{title} · gptjax", body, data, "report.js")


def json_for_html(data: Any) -> str:
    """JSON that can neither end its script element nor begin a comment. NaN becomes null."""
    text = json.dumps(plain(data), allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


@cache
def asset(name: str) -> str:
    """The text of a file of this package."""
    return (resources.files("gptjax.report") / name).read_text(encoding="utf-8")
