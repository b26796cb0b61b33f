"""What a run came to: as one JSON object, as a table for the terminal, and as one self-contained HTML page.

Everything is read from manifests, figures and metrics files; nothing is recomputed from the models. A part whose stage has
not run is null in the JSON and absent from the page, so that a report can be made at any time.
"""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.table import Table

from data.report_page import read_page
from data.report_summary import MODELS, ModelFigures, Summary, count, nats, number, percent, report_json
from data.store import RunFolder, write_bytes

__all__ = ["Summary", "report_json", "result_table", "write_report"]


def result_table(summary: Summary) -> Table:
    """Teacher, base and student side by side, a family a row."""
    table = Table(title="held-out items", title_justify="left")
    table.add_column("")
    found: dict[str, ModelFigures] = {name: figures for name in MODELS if (figures := summary[name]) is not None}
    for name in found:
        table.add_column(name, justify="right")
    families = sorted({family for figures in found.values() for family in figures["by_family"]})
    table.add_row("accuracy", *(percent(figures["accuracy"]) for figures in found.values()), style="bold")
    for family in families:
        table.add_row(f"  {family}", *(percent(figures["by_family"].get(family)) for figures in found.values()))
    table.add_row("hallucination rate", *(percent(figures["hallucination_rate"]) for figures in found.values()), style="bold")
    table.add_row("abstention rate", *(percent(figures["abstention_rate"]) for figures in found.values()))
    table.add_row("omniscience index", *(number(figures["omniscience_index"]) for figures in found.values()))
    table.add_row("reasoning tokens / correct", *(number(figures["reasoning_tokens_per_correct"]) for figures in found.values()))
    return table


def write_report(run: RunFolder) -> Path:
    """report/index.html: one page that fetches nothing and runs no script. All text from traces is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "number": number, "count": count, "nats": nats}
    page = read_page(run, report_json(run))
    path = run.report / "index.html"
    write_bytes(path, environment.get_template("report.html.j2").render(page=page).encode())
    return path
