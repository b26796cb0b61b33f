"""What train_vs_trl trains: a tiny Qwen3 with 65,536 words, conversations of random words, and both as every side needs them.

    base/                checkpoint folder: model, tokenizer, template
    dataset/             what `tracestill data build` hands to training
    pretokenised.json    settings that all sides share; the same conversations in the tokens and masks that the product makes of
                         them; the documents of each row of each optimizer step, as the product orders them

Conversations are log-normal in length; the answer is 60 % of one. Nothing here depends on the machine.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from configs.schema import Recipe
from data.packing import pack
from student.folders import EMBEDDED

PRETOKENISED = "pretokenised.json"
VOCABULARY = 65_536
MEDIAN_TOKENS, SIGMA, SUPERVISED_SHARE, MISSES = 240.0, 0.9, 0.6, 20
MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
TEMPLATE_TOKENS, LEAST_TOKENS = 12, 52
"""Of a conversation of two turns, beside its words; three are the assistant's: <think>, </think> and the stop."""
SHAPE = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 32_768, "tie_word_embeddings": False,
}  # fmt: skip


class Settings(NamedTuple):
    """What all sides share; the row is the unit of a forward pass."""

    row_tokens: int = 4_096
    rows_per_step: int = 2
    num_steps: int = 3
    lora_rank: int = 16
    lora_alpha: int = 32
    lr: float = 2e-4
    seed: int = 0


class Document(NamedTuple):
    """trained: 1 where the token is the assistant's."""

    ids: list[int]
    trained: list[int]

    @property
    def supervised(self) -> int:
        """Positions with a loss; nothing predicts the first token."""
        return sum(self.trained[1:])


class TrainSet(NamedTuple):
    """steps: the documents of each row of each optimizer step, as the product orders them."""

    settings: Settings
    documents: list[Document]
    steps: list[list[list[int]]]


def words_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, its space included, one a line's end: text and tokens correspond without loss."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    own = ["<unknown>", "\n", "user", "assistant", *(f" w{number}" for number in range(VOCABULARY))]
    vocabulary = {word: index for index, word in enumerate(own[: VOCABULARY - len(MARKERS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| ?[^\s]+"), "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    tokenizer.add_tokens([AddedToken(marker, special="think>" not in marker, normalized=False) for marker in MARKERS])
    template = (EMBEDDED / "chat_template.jinja").read_text()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def save_base(folder: Path, seed: int) -> PreTrainedTokenizerBase:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model("qwen3", vocab_size=VOCABULARY, **SHAPE)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = words_tokenizer()
    tokenizer.save_pretrained(folder)
    return tokenizer


def draw_lengths(settings: Settings, rng: np.random.Generator) -> list[int]:
    """Tokens of as many conversations as best-fit decreasing finds room for in the rows of all steps; MISSES in a row end it."""
    rows, lengths, misses = settings.rows_per_step * settings.num_steps, list[int](), 0
    while misses < MISSES:
        drawn = int(np.clip(rng.lognormal(np.log(MEDIAN_TOKENS), SIGMA), LEAST_TOKENS, settings.row_tokens))
        fits = len(pack(np.array([*lengths, drawn]), [settings.row_tokens], 0)) <= rows
        lengths, misses = ([*lengths, drawn], 0) if fits else (lengths, misses + 1)
    return lengths


def conversation(length: int, rng: np.random.Generator) -> list[dict[str, str | None]]:
    """Of `length` tokens; a quarter of the assistant's words are its answer."""

    def said(count: int) -> str:
        return "".join(f" w{number}" for number in rng.integers(0, VOCABULARY - 16, count))

    generated = round(SUPERVISED_SHARE * length) - 3
    asked, answered = length - TEMPLATE_TOKENS - generated, generated // 4
    return [
        {"role": "user", "content": said(asked), "reasoning_content": None},
        {"role": "assistant", "content": said(answered), "reasoning_content": said(generated - answered)},
    ]


def save_conversations(folder: Path, lengths: list[int], rng: np.random.Generator) -> None:
    import datasets

    rows = [
        {"trace_id": f"t{number:04d}", "prompt_id": f"p{number:04d}", "task": "words", "messages": conversation(length, rng)}
        for number, length in enumerate(lengths)
    ]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(folder))


def recipe_of(folder: Path, settings: Settings) -> Recipe:
    """The product's settings, but for the sizes and W&B, which no side uses. A checkpoint every other step."""
    return Recipe.model_validate(
        {
            "name": "train-vs-trl",
            "student": {"model": str(folder / "base"), "lora": {"rank": settings.lora_rank, "alpha": settings.lora_alpha}},
            "train": {
                "dtype": "fp32", "max_tokens_per_row": settings.row_tokens, "rows_per_step": settings.rows_per_step,
                "epochs": 1.0, "lr": settings.lr, "checkpoint_steps": 2, "seed": settings.seed, "wandb": "disabled",
            },
        }
    )  # fmt: skip


def make_train_set(folder: Path, settings: Settings) -> TrainSet:
    """Writes base/, dataset/ and pretokenised.json into the folder."""
    rng = np.random.default_rng(settings.seed)
    tokenizer = save_base(folder / "base", settings.seed)
    save_conversations(folder / "dataset", draw_lengths(settings, rng), rng)
    found = pretokenise(folder, settings, tokenizer)
    (folder / PRETOKENISED).write_text(json.dumps({**found._asdict(), "settings": settings._asdict()}))
    return found


def pretokenise(folder: Path, settings: Settings, tokenizer: PreTrainedTokenizerBase) -> TrainSet:
    """The product's own tokens, masks and rows."""
    from data.store import RunFolder
    from train.flops import arithmetic_of
    from train.setup import build_loss, load_corpus, training_order

    recipe = recipe_of(folder, settings)
    corpus = load_corpus(recipe, folder / "dataset", tokenizer, RunFolder(folder / "rendering"))
    loss = build_loss(recipe, corpus)  # rows are balanced by what they cost this model
    order = training_order(recipe, corpus, arithmetic_of(loss.model, loss.causal_lm), group=1, ranks=1)
    assert order.num_steps == settings.num_steps, f"{order.num_steps} steps, expected {settings.num_steps}"
    documents = [Document(list(one.ids), [int(trained) for trained in one.mask]) for one in corpus.train]
    return TrainSet(settings, documents, [[rows[0] for rows in order.step(index)] for index in range(order.num_steps)])


def read_settings(folder: Path) -> Settings:
    return Settings(**json.loads((folder / PRETOKENISED).read_text())["settings"])
