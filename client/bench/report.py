"""A finished run on disk: requests.csv, summary.json, and report.html, one file without scripts or links (plots are inline SVG)."""

import csv
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .load import Record
from .plot import Curve, bars_svg, curves_svg
from .summary import Spread, Summary

__all__ = ["format_summary", "write_report"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1d2733; }
table { border-collapse: collapse; margin: 1rem 0; } td, th { padding: .25rem .8rem; border-bottom: 1px solid #dde3ea; text-align: right; }
td:first-child, th:first-child { text-align: left; } figure { margin: 1.5rem 0; } figcaption { color: #5b6b7d; }
"""
_COLUMNS = ("index", "due_s", "sent_s", "ttft_s", "tpot_s", "e2e_s", "num_input_tokens", "num_output_tokens", "error")


def format_summary(summary: Summary) -> str:
    """The figures as a table for the terminal."""
    lines = [f"{name:<28}{value}" for name, value in _figures(summary)]
    lines.append(f"{'':<18}" + "".join(f"{name:>10}" for name in Spread.__slots__))
    lines += [f"{name:<18}" + "".join(f"{cell:>10}" for cell in cells) for name, cells in _latencies(summary)]
    lines += [f"{count} x {error}" for error, count in summary.errors.items()]
    return "\n".join(lines)


def _figures(summary: Summary) -> list[tuple[str, str]]:
    figures = [
        ("requests", f"{summary.num_requests}, {summary.num_failed} failed"),
        ("seconds", f"{summary.duration_s:.2f}"),
        ("requests / s", f"{summary.requests_per_s:.2f}"),
        ("output tokens / s", f"{summary.output_tokens_per_s:.1f}"),
        ("all tokens / s", f"{summary.total_tokens_per_s:.1f}"),
        ("tokens in, out", f"{summary.input_tokens}, {summary.output_tokens}"),
        ("most requests at once", str(summary.most_at_once)),
        ("latest send, ms", f"{summary.latest_send_ms:.1f}"),
    ]
    if summary.goodput_requests_per_s is not None:
        limits = ", ".join(f"{name} <= {limit:g} ms" for name, limit in summary.slo_ms.items())
        figures.append(("goodput, requests / s", f"{summary.goodput_requests_per_s:.2f} ({limits})"))
    return figures


def _latencies(summary: Summary) -> list[tuple[str, list[str]]]:
    spreads = {"TTFT, ms": summary.ttft_ms, "TPOT, ms": summary.tpot_ms, "ITL, ms": summary.itl_ms, "E2E, ms": summary.e2e_ms}
    return [
        (name, [f"{getattr(spread, field):.2f}" for field in Spread.__slots__])
        for name, spread in spreads.items()
        if spread is not None
    ]


def write_report(folder: Path, records: Sequence[Record], summary: Summary, settings: Mapping[str, Any]) -> None:
    """Writes the three files into `folder`, which is made when missing. settings: what was run; it must hold no secret."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "requests.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        writer.writerows([_row(record) for record in records])
    content = {"settings": dict(settings), "summary": summary.as_dict()}
    (folder / "summary.json").write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(_page(records, summary, settings), encoding="utf-8")


def _row(record: Record) -> list[object]:
    failed = record.error is not None
    measured = {"ttft_s": None if failed else record.ttft_s, "tpot_s": None if failed else record.tpot_s, "e2e_s": record.e2e_s}
    return [
        round(value, 6) if isinstance(value, float) else value
        for value in (measured[name] if name in measured else getattr(record, name) for name in _COLUMNS)
    ]


def _page(records: Sequence[Record], summary: Summary, settings: Mapping[str, Any]) -> str:
    good = [record for record in records if record.error is None]
    head = "".join(f"<th>{name}</th>" for name in ("", *Spread.__slots__))
    rows = "".join(
        f"<tr><td>{name}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" for name, cells in _latencies(summary)
    )
    figures = "".join(f"<tr><td>{name}</td><td>{html.escape(value)}</td></tr>" for name, value in _figures(summary))
    given = "".join(f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v))}</td></tr>" for k, v in settings.items())
    errors = "".join(f"<li>{count} x {html.escape(error)}</li>" for error, count in summary.errors.items())
    plots = [
        (
            _share_plot("seconds", {"TTFT": [r.ttft_s for r in good], "E2E": [r.e2e_s for r in good]}),
            "Share of requests within a time",
        ),
        (
            _share_plot(
                "seconds", {"ITL": [gap for r in good for gap in r.gaps_s()], "TPOT": [t for r in good if (t := r.tpot_s)]}
            ),
            "Share of gaps between responses, and of mean token times, within a time",
        ),
        (_tokens_plot(good), "Output tokens a second over the run"),
        (_running_plot(records), "Requests under way over the run"),
    ]
    drawn = "".join(f"<figure>{svg}<figcaption>{caption}</figcaption></figure>" for svg, caption in plots if svg)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>turbotriton bench</title><style>{_STYLE}</style>"
        f"<h1>turbotriton bench</h1><table>{figures}</table><table><tr>{head}</tr>{rows}</table>{drawn}"
        f"{f'<h2>Failures</h2><ul>{errors}</ul>' if errors else ''}<h2>Settings</h2><table>{given}</table></html>\n"
    )


def _share_plot(axis: str, named: Mapping[str, Sequence[float]]) -> str:
    curves = []
    for name, seconds in named.items():
        ordered = sorted(seconds)
        kept = range(0, len(ordered), max(1, len(ordered) // 400))
        if ordered:
            curves.append(Curve(name, [(ordered[i], (i + 1) / len(ordered)) for i in kept] + [(ordered[-1], 1.0)]))
    return curves_svg(curves, axis, "share")


def _tokens_plot(records: Sequence[Record], num_bins: int = 60) -> str:
    end = max((record.ended_s for record in records), default=0.0)
    if end <= 0:
        return ""
    bins = [0.0] * num_bins
    for record in records:
        before = 0
        for at, tokens in record.responses:
            bins[min(num_bins - 1, int(at / end * num_bins))] += tokens - before
            before = tokens
    return bars_svg([count * num_bins / end for count in bins], end, "seconds", "tokens / s")


def _running_plot(records: Sequence[Record]) -> str:
    steps = sorted([(record.sent_s, 1) for record in records] + [(record.ended_s, -1) for record in records])
    points, running = [(0.0, 0.0)], 0
    for at, step in steps:
        points.append((at, float(running)))
        running += step
        points.append((at, float(running)))
    return curves_svg([Curve("running", points)], "seconds", "requests")
