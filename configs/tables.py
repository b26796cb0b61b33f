"""What the tables of a plan look like, and how a figure is written in one."""

from rich import box
from rich.table import Table


def table_of(title: str, *columns: str) -> Table:
    """At most 80 columns: figures are short, and words fold."""
    table = Table(
        *columns, title=f"\n{title}", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False,
        show_header=any(columns), pad_edge=False,
    )  # fmt: skip
    table.columns[0].min_width = 14
    for column in table.columns[1:] if len(columns) > 3 else ():
        column.justify = "right"
    return table


def short(value: float | None, unit: str = "") -> str:
    """Four figures with a decimal prefix: 743.4 G."""
    if value is None:
        return "unknown"
    for prefix in ("", "k", "M", "G"):
        if abs(value) < 1000:
            return f"{value:.4g} {prefix}{unit}".rstrip()
        value /= 1000
    return f"{value:.4g} T{unit}"
