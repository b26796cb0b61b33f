"""Whether everything a dataset is made of may be distilled from: the teacher's licence and every prompt source's."""

from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np
import pyarrow as pa

from configs.errors import Refused

UNKNOWN = "unknown"


def licences(facts: pa.Table, kept_N: np.ndarray) -> dict[str, dict[str, int]]:
    """Kept traces by licence, the teacher's and the sources', in the order of names."""
    kept = facts.filter(pa.array(kept_N))
    return {side: _counted(kept[f"{side}_licence"]) for side in ("teacher", "source")}


def _counted(column: pa.ChunkedArray) -> dict[str, int]:
    counts = {row["values"] or UNKNOWN: row["counts"] for row in column.value_counts().to_pylist()}
    return dict(sorted(Counter(counts).items()))


def check_licences(found: Mapping[str, Mapping[str, int]], permitted: Collection[str], which: str = "that are kept") -> None:
    """Raises Refused for the first licence that is not listed: who distils must have read it. which: traces these are of."""
    for side, counted in found.items():
        for licence, traces in counted.items():
            if licence not in permitted:
                where = "teacher.licence" if side == "teacher" else "the licence of its entry in generate.prompts"
                raise Refused(
                    f"data build: {traces} traces {which} have the {side} licence {licence!r}, which data.permitted_licences "
                    f"({', '.join(permitted)}) does not list; read it, and list it if it permits distillation, or correct {where}"
                )
