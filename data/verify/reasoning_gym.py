"""A reasoning-gym task's own scorer, rebuilt from what the prompt carries.

`prompt.details` is JSON text {"task", "params", "entry"}: the scorer reads the entry's metadata and sometimes its own
configuration. JSON turns tuples into lists and integer keys into strings, which two tasks of reasoning-gym 0.1.25 do
not survive (arc_agi and rearc score their own reference 0.05 afterwards, 1.0 before), and five more score it 0 even
before (boxnet, graph_color, propositional_logic, rubiks_cube, rush_hour). That is what data.verify.self_check is for.
"""

import functools
import json
from collections.abc import Callable

from data.records import Prompt


def score(prompt: Prompt, answer: str) -> float:
    """The task's score in [0, 1]. Partial scores are paid for well-formed wrong answers (letter_counting gives "13" half
    of the points for 3), so that only 1.0 means right.

    Raises:
        ValueError: no details, or a task that this reasoning-gym does not have.
    """
    try:
        details = json.loads(prompt.details)
        task, params, entry = details["task"], details.get("params", {}), details["entry"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"prompt {prompt.prompt_id}: details hold no reasoning-gym entry ({error!r})") from error
    return float(_scorer(task, json.dumps(params, sort_keys=True))(answer, entry))


@functools.cache
def _scorer(task: str, params: str) -> Callable[[str, dict], float]:
    import reasoning_gym  # 1.5 s, 4 s on a busy machine; only where a reasoning-gym answer is judged

    return reasoning_gym.create_dataset(task, size=1, seed=0, **json.loads(params)).score_answer


def prepare() -> None:
    """Pays for the import, so that no answer's deadline does."""
    import reasoning_gym  # noqa: F401
