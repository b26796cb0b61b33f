"""A judge behind somebody's chat server: a model whose tokenizer nobody here has, and whose text is all that matters.

The http engine speaks in token ids. Here they are the text's bytes, so that it comes back as it came; what a server bills is
counted apart. The server knows its own stops. It is sent one more that nobody says, because some refuse a request whose list of
stops is empty.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from configs.judging import Judging
from data.asking import Codec, Tokens
from data.byte_tokenizer import build_byte_tokenizer
from data.engine import Completion, Request
from teacher.http.raw import Line
from teacher.http.reading import Prices, Reader
from teacher.http.replies import Reply
from teacher.http_engine import FIRST_WAIT_S, HttpEngine

END = "<|end of judgement|>"
OPENS_THINK = "<think>"
"""The whole of a template under which what a server cut off as reasoning is put back as the output of a model whose prompt opens
the think block."""


class _BillingReader(Reader):
    """Keeps what servers bill for each request, over all its asks."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prices: Prices) -> None:
        super().__init__(tokenizer, prices)
        self.billed: dict[str, Tokens] = {}

    def _cost(self, request: Request, line: Line, reply: Reply, new: int) -> float:
        if reply.usage is not None:
            so_far = self.billed.get(request.request_id, Tokens(0, 0))
            self.billed[request.request_id] = Tokens(
                so_far.prompt + reply.usage.prompt_tokens, so_far.output + reply.usage.output_tokens
            )
        return super()._cost(request, line, reply, new)


class JudgeEngine(HttpEngine):
    """The http engine over bytes."""

    def __init__(self, settings: Judging, *, first_wait_s: float = FIRST_WAIT_S) -> None:
        template = OPENS_THINK if settings.reasoning == "open" else "-"
        self.tokenizer = build_byte_tokenizer((END,), eos=END, pad=END, chat_template=template)
        super().__init__(settings.engine, settings.engine.model, self.tokenizer, first_wait_s=first_wait_s)
        self.reader: _BillingReader = _BillingReader(self.tokenizer, self.reader.prices)

    @property
    def codec(self) -> Codec:
        """encode gives nothing: the server renders the turns."""
        return Codec(lambda messages: (), self._text, tokens=self._tokens)

    def _text(self, ids: Sequence[int]) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False)
        assert isinstance(text, str)
        return text.removesuffix(END)

    def _tokens(self, completion: Completion) -> Tokens:
        """What was billed for it; 0 of 0 where the server does not say. Told once."""
        return self.reader.billed.pop(completion.request_id, Tokens(0, 0))
