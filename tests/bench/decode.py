"""The decode loop (slots, refill) against `transformers.generate` in static batches: output tokens per second, one process.

    python -m tests.bench.decode --json

Same model (the embedded teacher, float32), same prompts, greedy, same number of rows, requests in the same order; the peer pads
on the left and waits for the longest row of each batch.
"""

import itertools

import torch
from transformers import AutoModelForCausalLM

from configs.schema import Teacher
from data.chat import dialect_of, encode_prompt
from data.curriculum import teacher_lessons
from data.engine import Request
from teacher.engines import load_tokenizer
from teacher.folders import EMBEDDED
from teacher.local_engine import LocalEngine
from tests.bench.frame import Result, interleave, main

ROWS, NUM_REQUESTS, MAX_TOKENS = 32, 256, 128


def requests() -> list[Request]:
    tokenizer = load_tokenizer(Teacher())
    stops = dialect_of(tokenizer).stop_ids(tokenizer)
    lessons = itertools.islice(teacher_lessons(7), NUM_REQUESTS)
    prompts = [tuple(encode_prompt(tokenizer, [{"role": "user", "content": lesson.question}])) for lesson in lessons]
    return [Request(str(index), prompt, stops, MAX_TOKENS, 0.0, 1.0, 0) for index, prompt in enumerate(prompts)]


def static_batches(model: torch.nn.Module, asked: list[Request]) -> float:
    """Output tokens of `generate` over batches of ROWS, stop tokens counted, padding not."""
    tokens = 0
    for start in range(0, len(asked), ROWS):
        batch = asked[start : start + ROWS]
        longest = max(len(request.prompt_ids) for request in batch)
        ids_BT = torch.tensor([[0] * (longest - len(request.prompt_ids)) + list(request.prompt_ids) for request in batch])
        mask_BT = torch.tensor([[0] * (longest - len(request.prompt_ids)) + [1] * len(request.prompt_ids) for request in batch])
        stops = list(batch[0].stop_ids)
        out_BT = model.generate(  # type: ignore[operator]
            input_ids=ids_BT,
            attention_mask=mask_BT,
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=stops,
            pad_token_id=0,
        )  # fmt: skip
        for row in out_BT[:, longest:].tolist():
            end = next((index + 1 for index, token in enumerate(row) if token in stops), len(row))
            tokens += end
    return float(tokens)


def measure(repeats: int) -> Result:
    asked = requests()
    engine = LocalEngine(EMBEDDED, dtype="fp32", batch_size=ROWS)
    engine.load()
    peer = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32, experts_implementation="grouped_mm").eval()
    with torch.inference_mode():
        return interleave(
            "decode", "output tokens/s", lambda: float(sum(len(done.token_ids) for done in engine.generate(asked))),
            lambda: static_batches(peer, asked), repeats=repeats,
        )  # fmt: skip


if __name__ == "__main__":
    main(__doc__ or "", measure)
