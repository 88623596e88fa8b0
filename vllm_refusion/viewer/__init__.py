"""Seeing how a response was decoded: recording traces and showing them.

``record`` makes a trace with an engine; ``page``, ``terminal`` and ``image`` show one. A trace is
plain JSON, described in docs/trace.md and by ``trace.schema.json``.
"""
