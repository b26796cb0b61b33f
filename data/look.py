"""One trace segment as the judges see it: its completed rows, with everything that more than one of them needs made once."""

from collections.abc import Sequence
from functools import cached_property

import pyarrow as pa

from configs.errors import UnusableInput
from data.prompt_set import PromptSet
from data.records import Message, Prompt, Trace
from data.schema import check_schema, without_ids


class Look:
    """L completed traces of one segment. Token ids, logprobs and raw replies stay in Arrow: as Python objects the ids of one
    trace of 100,000 tokens take longer than all that is asked about it."""

    def __init__(self, table: pa.Table, prompts: PromptSet) -> None:
        """table: the segment's rows, aborted ones included. Raises UnusableInput for another schema."""
        check_schema(table, Trace)
        self.table = completed(table)
        self._prompts = prompts

    def __len__(self) -> int:
        return self.table.num_rows

    @cached_property
    def traces(self) -> list[Trace]:
        """turns and raw are empty."""
        return without_ids(self.table)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompt of each trace. Raises UnusableInput when one is not in the prompt set."""
        wanted = self.table["prompt_id"].to_pylist()
        different = list(dict.fromkeys(wanted))
        positions = self._prompts.positions_of(different)
        if (positions < 0).any():
            missing = different[int((positions < 0).argmax())]
            trace_id = self.table["trace_id"][wanted.index(missing)].as_py()
            raise UnusableInput(
                f"trace {trace_id} answers prompt {missing}, which is not in {self._prompts.path.parent}; "
                "the folder holds traces of another prompt set: use another --run-dir"
            )
        found = dict(zip(different, self._prompts.prompts(positions), strict=True))
        return [found[prompt_id] for prompt_id in wanted]

    @cached_property
    def answers(self) -> list[str]:
        """The last turn's content; "" for a truncated trace, whatever its last words look like."""
        return [trace.messages[-1].get("content", "") if trace.finish_reason == "stop" else "" for trace in self.traces]

    @cached_property
    def generated(self) -> list[str]:
        """What the teacher wrote: reasoning and content of the last turn."""
        return [written(trace.messages[-1:]) for trace in self.traces]

    @cached_property
    def conversations(self) -> list[str]:
        """Everything training would see, given turns included."""
        return [written(trace.messages) for trace in self.traces]


def written(messages: Sequence[Message]) -> str:
    """Reasoning and content of the turns, one after the other, a line apart."""
    parts = (message.get(part) for message in messages for part in ("reasoning_content", "content"))
    return "\n".join(part for part in parts if part)


def completed(table: pa.Table) -> pa.Table:
    """Aborted requests failed: they are no traces."""
    return table.filter(pa.array([reason != "abort" for reason in table["finish_reason"].to_pylist()], pa.bool_()))
