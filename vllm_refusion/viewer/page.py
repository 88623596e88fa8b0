"""Self-contained HTML pages, without a framework: a recorded trace, and a live one."""

from __future__ import annotations

import json
import re
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
    return _whole("page.html").replace("[[data]]", data, 1)


def live_html() -> str:
    """The page that asks its own server for responses and shows them as they are decoded."""
    return _whole("live.html")


def _whole(name: str) -> str:
    """The page of that name with the files that it names, as ``[[file]]``, in their places."""
    folder = files(__package__)
    text = (folder / name).read_text(encoding="utf-8").rstrip("\n")
    return re.sub(r"\[\[(\w+\.\w+)\]\]", lambda place: _whole(place[1]), text)
