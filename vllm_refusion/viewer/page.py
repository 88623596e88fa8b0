"""A trace as one self-contained HTML page: no network, no framework."""

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
    folder = files(__package__)
    page = (folder / "page.html").read_text(encoding="utf-8")
    for name, content in (
        ("style", (folder / "page.css").read_text(encoding="utf-8")),
        ("script", (folder / "page.js").read_text(encoding="utf-8")),
        ("data", data),  # last: what it holds is not replaced
    ):
        page = page.replace(f"[[{name}]]", content, 1)
    return page
