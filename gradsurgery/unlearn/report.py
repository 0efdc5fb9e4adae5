"""The report of a run."""

from __future__ import annotations

from typing import Any


def render(
    summary: dict[str, Any],
    config: dict[str, Any],
    environment: dict[str, Any],
    records: list[dict[str, Any]],
    results: list[dict[str, Any]],
) -> str:
    """The page."""
    return "<!doctype html>"
