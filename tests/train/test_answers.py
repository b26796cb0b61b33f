"""Generated answers inside the training: equal to generate, judged by the prompts' verifiers, without a trace in the training."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from configs.errors import UnusableInput
from configs.schema import Recipe
from configs.training import CrossEntropy, Lora
from data.chat import dialect_of, encode_prompt
from data.records import Prompt
from data.store import RunFolder, seal
from data.verify.runner import RIGHT, TIMED_OUT, Item
from student.adapter_files import trainable
from student.model import load_tokenizer
from tests.data.hostile import HOSTILE
from tests.data.make_run import seal_prompts
from tests.train.answer_cases import LR, MAX_TOKENS, TEXTS, TOKENS_IN_STEP, answers_to, make_prompt, on_ranks, rows, student
from tests.train.fixtures import REPOSITORY, save_tiny_base
from train.answers import Answers, ValidationAnswers, answer_in, judge_in_time
from train.attention import DOCUMENTS
from train.engine_config import ADAM_BETAS
from train.greedy import answer_greedily, generating
from train.losses import SupervisedLoss


@pytest.fixture(scope="module")
def model() -> PeftModel:
    return student(Lora(rank=4, alpha=8, dropout=0.1))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("embedded")


@pytest.fixture(scope="module")
def said(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """What generate says to each text, alone and without padding."""
    return {text: generated(model, tokenizer, [text])[0] for text in TEXTS}


def ids_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts]


def generated(model: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The reference: transformers' generate, a prompt at a time."""
    stops, outputs = list(dialect_of(tokenizer).stop_ids(tokenizer)), []
    with generating(model):
        for ids in ids_of(tokenizer, texts):
            prompt = torch.tensor([ids])
            whole = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=MAX_TOKENS,
                eos_token_id=stops, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            outputs.append(whole[0, len(ids) :].tolist())  # type: ignore[index]
    return outputs


# --- greedy decoding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, len(TEXTS)])
def test_answers_are_those_of_generate_token_by_token(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, said: dict[str, list[int]], size: int
) -> None:
    stops = dialect_of(tokenizer).stop_ids(tokenizer)
    assert len({len(ids) for ids in ids_of(tokenizer, TEXTS)}) > 3  # so that a batch is padded
    for start in range(0, len(TEXTS), size):
        texts = TEXTS[start : start + size]
        with generating(model):
            found = answer_greedily(model, ids_of(tokenizer, texts), stop_ids=stops, max_tokens=MAX_TOKENS, pad_id=stops[0])
        assert found == [said[text] for text in texts]
    assert {answer[-1] in stops for answer in said.values()} == {True, False}  # some end by themselves, some are cut


def test_no_prompt_and_nobody_else_busy_is_no_pass(model: PeftModel) -> None:
    assert answer_greedily(model, [], stop_ids=[0], max_tokens=4, pad_id=0) == []


def test_a_rank_without_work_runs_as_many_passes_as_the_others(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    passes = []
    handle = model.get_base_model().register_forward_hook(lambda *_: passes.append(1))
    left = iter([True] * 5 + [False])
    with generating(model):
        answer_greedily(model, [], stop_ids=[0], max_tokens=4, pad_id=0, any_busy=lambda _: next(left))
    handle.remove()
    assert len(passes) == 5


# --- what is left of it ------------------------------------------------------------------------------------------


def everything(model: PeftModel) -> tuple[object, ...]:
    """All that a training goes on with."""
    tensors = [(name, tensor.clone()) for name, tensor in model.state_dict().items()]
    gradients = [(name, one.grad.clone()) for name, one in model.named_parameters() if one.grad is not None]
    modes = [module.training for module in model.modules()]
    numpy_state = np.random.get_state()
    randomness = (torch.get_rng_state(), random.getstate(), str(numpy_state))
    return tensors, gradients, modes, randomness, model.get_base_model().config._attn_implementation, torch.is_grad_enabled()  # type: ignore


def assert_equal(left: object, right: object) -> None:
    if isinstance(left, torch.Tensor):
        assert isinstance(right, torch.Tensor) and torch.equal(left, right)
    elif isinstance(left, list | tuple):
        assert isinstance(right, list | tuple)
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    else:
        assert left == right


def step_loss(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    row = rows(tokenizer)[0]
    return SupervisedLoss(model, CrossEntropy())(*row[:3])


def test_training_goes_on_bit_for_bit_as_if_nobody_had_asked(tokenizer: PreTrainedTokenizerBase) -> None:
    model = student(Lora(rank=4, alpha=8, dropout=0.1))
    next(iter(model.modules())).training = False  # an odd mode must come back as well
    torch.manual_seed(5)
    step_loss(model, tokenizer).backward()
    before = everything(model)
    answers_to([make_prompt(text) for text in TEXTS[:2]], tokenizer, max_tokens=4).measure(model, tokenizer, rank=0, size=1)
    assert_equal(everything(model), before)
    assert model.get_base_model().config._attn_implementation == DOCUMENTS  # type: ignore
    after = step_loss(model, tokenizer)
    torch.set_rng_state(before[3][0])  # type: ignore[index]
    assert torch.equal(after, step_loss(model, tokenizer))  # dropout draws what it would have drawn


def test_an_exception_while_generating_leaves_the_model_as_it_was(model: PeftModel) -> None:
    before = everything(model)
    with pytest.raises(RuntimeError, match="out of memory"), generating(model):
        raise RuntimeError("out of memory")
    assert_equal(everything(model), before)


# --- what answers are worth --------------------------------------------------------------------------------------


def test_answers_are_judged_by_their_own_prompts_verifiers(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, said: dict[str, list[int]]
) -> None:
    answers = {text: answer_in(tokenizer, ids) for text, ids in said.items()}
    whole, cut = [text for text in TEXTS if answers[text]], [text for text in TEXTS if len(said[text]) == MAX_TOKENS]
    assert len(whole) >= 2 and cut
    prompts = [make_prompt(text, answers[text] if text == whole[0] else "something else") for text in TEXTS]
    found = answers_to(prompts, tokenizer).measure(model, tokenizer, rank=0, size=1)
    lengths = sum(len(ids) for ids in said.values())
    stops = dialect_of(tokenizer).stop_ids(tokenizer)
    assert found == Answers(1, len(TEXTS), sum(ids[-1] not in stops for ids in said.values()), 0, lengths)
    assert found.accuracy == pytest.approx(1 / len(TEXTS)) and Answers().accuracy is None


def test_shares_of_any_number_of_ranks_add_up_to_the_same(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    answers = answers_to([make_prompt(text) for text in TEXTS], tokenizer, max_tokens=4, row_tokens=100)
    size = len(answers.groups) + 1  # the last rank has nothing to do
    alone = answers.measure(model, tokenizer, rank=0, size=1)
    shares = [answers.measure(model, tokenizer, rank=rank, size=size) for rank in range(size)]
    assert [sum(column) for column in zip(*shares, strict=True)] == list(alone) and shares[-1] == Answers()


def test_an_answer_counts_only_when_it_ended_by_itself_and_its_reasoning_is_closed(tokenizer: PreTrainedTokenizerBase) -> None:
    def read(text: str) -> str:
        return answer_in(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]

    assert read("<think>so</think>42<|im_end|>") == "42"
    assert read("<think>so</think>42") == "" and read("<think>so 42<|im_end|>") == ""


def hostile(answer: str) -> Item:
    return Item(replace(make_prompt("x", "right"), verifier="hostile"), answer)


def test_a_verifier_that_hangs_costs_no_more_than_the_deadline_and_leaves_no_process() -> None:
    children = set(child_processes())
    started = time.monotonic()
    found = judge_in_time([hostile("sleep"), hostile("right")], timeout_s=3600.0, within_s=1.0, verifiers=HOSTILE)
    assert time.monotonic() - started < 10.0 and found == [TIMED_OUT, TIMED_OUT]
    assert set(child_processes()) <= children | resource_trackers()


def child_processes() -> list[int]:
    found: list[int] = []
    for thread in Path(f"/proc/{os.getpid()}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ended while it was looked at
            found += map(int, (thread / "children").read_text().split())
    return found


def resource_trackers() -> set[int]:
    """multiprocessing's own helper, one a process for its lifetime."""
    return {pid for pid in child_processes() if b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()}


@pytest.mark.long
def test_what_was_judged_before_the_deadline_counts() -> None:
    items = [hostile("right"), hostile("die"), hostile("right"), hostile("sleep"), hostile("right")]
    found = judge_in_time(items, timeout_s=3600.0, within_s=30.0, verifiers=HOSTILE)
    assert [one.reason for one in found] == ["", "crashed", "", "timed_out", "timed_out"] and found[0] == RIGHT


# --- which prompts are asked -------------------------------------------------------------------------------------


def make_dataset(run: RunFolder, prompts: Sequence[Prompt], in_prompt_set: Sequence[Prompt]) -> RunFolder:
    """A sealed prompt set, and a sealed dataset with two rows in its validation split for each of `prompts`."""
    seal_prompts(run, in_prompt_set, len(in_prompt_set))
    split = datasets.Dataset.from_list([{"prompt_id": prompt.prompt_id} for prompt in prompts for _ in range(2)])
    datasets.DatasetDict({"validation": split}).save_to_disk(str(run.dataset))
    files = [path for path in run.dataset.rglob("*") if path.is_file()]
    seal(run, run.dataset, stage="data", fingerprint="f", inputs={}, files=files, counts={}, seconds=0.0)
    return run


def recipe(**train: object) -> Recipe:
    settings = {"validation_answers": 4, "validation_answer_tokens": 64, "max_tokens_per_row": 256}
    return Recipe.model_validate({"name": "x", "train": settings | train})


def asked(answers: ValidationAnswers) -> set[str]:
    return {question.prompt.prompt_id for group in answers.groups for question in group}


def test_prompts_are_chosen_by_hash_and_only_those_that_can_be_judged(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    good = [make_prompt(f"{number} + 1?") for number in range(9)]
    never = [
        make_prompt("b", verifier=""),
        make_prompt("c", verifier="llm_judge"),
        make_prompt("d" * 300),
        make_prompt("e", known=False),
    ]
    first = make_dataset(RunFolder(tmp_path / "first"), [*good, *never], [*never, *good, make_prompt("not a validation row")])
    second = make_dataset(RunFolder(tmp_path / "second"), [*never, *reversed(good)], [*good, *never])
    chosen = ValidationAnswers.of(first.root, recipe(), tokenizer)
    assert asked(chosen) == asked(ValidationAnswers.of(second.root, recipe(), tokenizer))
    assert len(asked(chosen)) == 4 and asked(chosen) <= {prompt.prompt_id for prompt in good}
    every = ValidationAnswers.of(first.root, recipe(validation_answers=100), tokenizer)
    assert asked(every) == {prompt.prompt_id for prompt in good} and asked(chosen) < asked(every)
    assert max(len(group) * (len(group[0].ids) + 64) for group in every.groups) <= 256


def test_a_dataset_from_elsewhere_is_refused_because_nobody_can_judge_its_answers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(
        UnusableInput, match="has no finished prompts and dataset; a dataset from elsewhere.*validation_answers to 0"
    ):
        ValidationAnswers.of(tmp_path, recipe(), tokenizer)
    run = make_dataset(RunFolder(tmp_path), [make_prompt("here"), make_prompt("elsewhere")], [make_prompt("here")])
    with pytest.raises(UnusableInput, match=f"{make_prompt('elsewhere').prompt_id} is not in the run's prompt set"):
        ValidationAnswers.of(run.root, recipe(), tokenizer)


def test_a_validation_split_without_a_prompt_that_can_be_asked_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    run = make_dataset(RunFolder(tmp_path), [make_prompt("a")], [make_prompt("a")])
    with pytest.raises(UnusableInput, match="none of the 1 validation prompts can be asked"):
        ValidationAnswers.of(run.root, recipe(validation_answer_tokens=256), tokenizer)


# --- on ranks ----------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "stage 2": (2, {}),
    "stage 3": (3, {}),
    "stage 3, DoRA": (3, {"dora": True}),
    "stage 3, trained head": (3, {"modules_to_save": ["lm_head", "embed_tokens"]}),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case on two ranks, under torchrun."""
    folder = tmp_path_factory.mktemp("ranks")
    save_tiny_base(folder / "base")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2"]
    job = json.dumps({"folder": str(folder), "cases": CASES})
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": "lo"}
    ended = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.train.answer_cases", job], env=environment, cwd=REPOSITORY,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=560,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-4000:]
    return folder


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_say_what_one_process_says_and_train_on_as_if_nobody_had_asked(ranks: Path, name: str) -> None:
    tokenizer = load_tokenizer(str(ranks / "base"))
    model = student(Lora.model_validate({"rank": 4, "alpha": 8} | CASES[name][1]), str(ranks / "base"))
    alone = {prompt.prompt_id: ids for prompt, ids in on_ranks(tokenizer).outputs(model, tokenizer, rank=0, size=1)}
    shares = [json.loads((ranks / f"{name}.{rank}.json").read_text()) for rank in range(2)]
    assert shares[0] | shares[1] == alone and len(shares[0]) + len(shares[1]) == len(alone) == 5
    found, first = load_file(ranks / f"{name}.gradients"), gradients_of(model, tokenizer)
    assert first.keys() == {key for key in found if not key.startswith("later.")}
    for key, gradient in first.items():
        assert (found[key] - gradient).norm() <= 1e-4 * gradient.norm(), key
    torch.nn.utils.clip_grad_norm_(trainable(model).values(), 1.0)
    torch.optim.AdamW(trainable(model).values(), lr=LR, betas=ADAM_BETAS, weight_decay=0.0).step()
    for key, gradient in gradients_of(model, tokenizer).items():
        # AdamW's first step is lr x sign(gradient), and where the gradient is all but zero its sign is rounding
        assert (found[f"later.{key}"] - gradient).norm() <= 2e-2 * gradient.norm(), key
    # and not by the weights that answered before the step
    assert any((found[f"later.{key}"] - gradient).norm() > 0.1 * gradient.norm() for key, gradient in first.items())


def gradients_of(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = SupervisedLoss(model, CrossEntropy())
    for row in rows(tokenizer):
        (loss(*row[:3]) / TOKENS_IN_STEP).backward()
    return {key: one.grad.clone() for key, one in trainable(model).items() if one.grad is not None}


def test_whoever_is_asked_to_stop_says_no_more_and_judges_nothing(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    asked: list[int] = []

    def is_stopped() -> bool:
        asked.append(1)
        return len(asked) > 3

    answers = answers_to([make_prompt(text) for text in TEXTS], tokenizer, max_tokens=24, row_tokens=100)
    outputs = answers.outputs(model, tokenizer, rank=0, size=1, is_stopped=is_stopped)
    assert 0 < sum(len(ids) for _, ids in outputs) < 24
    assert answers.measure(model, tokenizer, rank=0, size=1, is_stopped=is_stopped) == Answers()
