"""Self-contained HTML pages, without a framework: a recorded trace, and a live one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from vllm_refusion.viewer.timeline import Timeline


def html(trace: Mapping[str, Any]) -> str:
    """The page that plays all requests of ``trace``; #pass=3&theme=dark in its URL opens it there.

    ``#request=``, ``#pass=``, ``#token=`` count from 0, passes from 1 (0 is before the first).
    """
    timelines = [Timeline.of(trace, request).data() for request in trace["requests"]]
    data = json.dumps(timelines, ensure_ascii=False, separators=(",", ":"))
    # inside a script element only "<" can end it or start a comment
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    parts = {"style": "page.css", "player": "player.js", "script": "page.js"}
    return _filled("page.html", parts, data)


def live_html() -> str:
    """The page that asks its own server for responses and shows them as they are decoded."""
    parts = {"style": "page.css", "more-style": "live.css", "player": "player.js"}
    return _filled("live.html", parts | {"script": "live.js"})


def _filled(name: str, parts: Mapping[str, str], data: str = "") -> str:
    """The page of that name with files in their places, and at last data, of which none is."""
    folder = files(__package__)
    page = (folder / name).read_text(encoding="utf-8")
    for place, file in parts.items():
        page = page.replace(f"[[{place}]]", (folder / file).read_text(encoding="utf-8"), 1)
    return page.replace("[[data]]", data, 1)
