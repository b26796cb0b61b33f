"""No training prompt is an evaluation item: exact equality of the normalised text.

The prompts stage already splits by hash of the text; this is the second lock, on what was really generated from. It
attributes every hit to its item. Overlap by n-grams is another question and not asked here.
"""

from collections.abc import Iterable

from data.records import Prompt

VERSION = 1


def prompt_text(prompt: Prompt) -> str:
    """All turns, whitespace and case made one: a re-wrapped or re-capitalised item is the same item."""
    return " ".join(" ".join(message.get("content", "") for message in prompt.messages).split()).casefold()


def contaminated(training: Iterable[Prompt], evaluation: Iterable[Prompt]) -> dict[str, str]:
    """prompt_id of each training prompt whose text is an evaluation item's -> that item's prompt_id."""
    items = {prompt_text(item): item.prompt_id for item in evaluation}
    return {prompt.prompt_id: items[text] for prompt in training if (text := prompt_text(prompt)) in items}
