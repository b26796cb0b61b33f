"""What was said about trace segments, kept over builds: a later build asks about new segments only.

One log a question and key. The key is a hash of everything that may change the answer (code versions, settings, the
prompts and benchmark items it is judged by), so that another key starts another log and nothing stale is ever read. A
log is a folder of committed segments like the traces themselves: each covers some trace segments, named by stem and
sha256, and holds a row for each of their completed traces, in their order; the last one that covers a trace segment counts,
because some answers are asked for again. Killed anywhere, a build loses what it had not committed. The logs lie under work/: a
sealed run needs none, and the files in verdicts/ are made of them.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from configs.errors import UnusableInput
from data.records import digest
from data.schema import schema_hash
from data.store import RunFolder, Segment, SegmentLog, commit_segment, read_segment

log = logging.getLogger(__name__)

KEY_BYTES = 6


class Part(NamedTuple):
    """What one trace segment's completed traces were found to be: a row each, in the segment's order."""

    stem: str
    sha256: str
    rows: pa.Table


class VerdictLog:
    """The parts of one question under one key and schema; those committed by earlier builds are read at once, and verified."""

    def __init__(self, run: RunFolder, name: str, key: str, schema: pa.Schema) -> None:
        self.name, self.schema = name, schema
        self.folder: Path = run.root / "work" / "judged" / f"{name}-{digest(key, schema_hash(schema), size=KEY_BYTES)}"
        self._parts: dict[str, Part] = {}
        for segment in SegmentLog(self.folder).look() if self.folder.is_dir() else ():
            self._take(segment)

    def _take(self, segment: Segment) -> None:
        """A damaged segment covers nothing: what it said is asked again."""
        try:
            table = read_segment(segment)
        except UnusableInput as damage:
            log.warning("%s; its traces are judged again", damage)
            return
        start = 0
        for stem, sha256, num_rows in segment.facts["covers"]:
            self._parts[stem] = Part(stem, sha256, table.slice(start, num_rows))
            start += num_rows

    def covers(self, segment: Segment) -> bool:
        part = self._parts.get(segment.path.stem)
        return part is not None and part.sha256 == segment.sha256

    def rows(self, segment: Segment) -> pa.Table:
        """Raises KeyError for a segment that is not covered."""
        return self._parts[segment.path.stem].rows

    def add(self, parts: Sequence[Part]) -> None:
        """The parts are durable: one commit, whatever their number."""
        if not parts:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        covers = [[part.stem, part.sha256, part.rows.num_rows] for part in parts]
        table = pa.concat_tables([part.rows for part in parts]).combine_chunks()
        commit_segment(self.folder, table, worker="build", facts={"covers": covers})
        self._parts.update({part.stem: part for part in parts})

    def read(self, wanted: Sequence[Segment]) -> pa.Table:
        """The rows of these segments, in their order. Raises KeyError for one that is not covered."""
        return pa.concat_tables([self.schema.empty_table(), *map(self.rows, wanted)])
