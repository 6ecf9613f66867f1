"""One self-contained HTML page with plotly's pictures in it: it opens with the network off, and sends nothing anywhere.

What users give may hold anything. `plain` makes one printable line of it, `escape` makes that fit between tags, and `as_script` puts
data of any kind into a script. The page's policy forbids the browser every address, in case something slips through. page.css is what
pages look like, page.js what their scripts share.
"""

import base64
import html
import json
import unicodedata
from pathlib import Path

import numpy as np

from files.console import InputError

# 'unsafe-eval': plotly compiles its drawing of many points while it runs
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'unsafe-inline' 'unsafe-eval'",
        "style-src 'unsafe-inline'",
        "img-src data: blob:",
        "form-action 'none'",
        "base-uri 'none'",
    )
)
TYPES = {"float32": "f4", "int32": "i4"}  # numpy's names of types: plotly's
MOST_BYTES = 400  # of a text as it stands in a script
# what turns the direction of all text behind it, and how Unicode names that
TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def plotly_script() -> str:
    """plotly.js, to be inlined. Raises InputError where plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise InputError("a page needs plotly: pip install -r requirements.txt -c constraints.txt") from None
    return get_plotlyjs()


def plain(value: object, length: int = 160) -> str:
    """One line of at most `length` characters and MOST_BYTES bytes; � for control characters and halves of characters.

    Characters that only turn the direction of writing are left out: letters know their own.
    """
    line = " ".join(str(value)[: 8 * length].split())
    line = "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cs") else c for c in line)
    line = "".join(c for c in line if unicodedata.bidirectional(c) not in TURNS)
    cut = line[:length]
    while len(as_script(cut).encode()) > MOST_BYTES:
        cut = cut[: -max(1, len(cut) // 8)]
    return line if cut == line and len(str(value)) <= 8 * length else cut[: length - 1].rstrip() + "…"


def escape(value: object, length: int = 160) -> str:
    """A value as text between tags or in an attribute. Text from right to left does not turn round what stands beside it."""
    return f"<bdi>{html.escape(plain(value, length))}</bdi>"


def tag(name: str, content: str, kind: str = "") -> str:
    """`content`, which is HTML, between a tag of the class `kind`."""
    return f'<{name} class="{kind}">{content}</{name}>' if kind else f"<{name}>{content}</{name}>"


def as_script(value: object) -> str:
    """A value as JSON that can stand inside <script>: no text in it can end that."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def typed(values: np.ndarray) -> dict:
    """Numbers of one axis as plotly's typed array: base64 of float32 or int32."""
    values = np.ascontiguousarray(values, np.float32 if np.issubdtype(values.dtype, np.floating) else np.int32)
    return {"dtype": TYPES[values.dtype.name], "bdata": base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()}


def page(title: str, body: str, data: object, script: str) -> str:
    """The text of a page.

    body      HTML, in which everything of the user's has been escaped
    data      JSON values, which `script` finds as `data`
    Raises InputError where plotly is not installed.
    """
    here = Path(__file__)
    style, shared = (here.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".css", ".js"))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(plain(title))}</title>
<style>
{style}</style>
<script>{plotly_script()}</script>
</head>
<body>
{body}
<script type="application/json" id="data">{as_script(data)}</script>
<script>
{shared}
{script}</script>
</body>
</html>
"""
