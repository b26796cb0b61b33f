"""Recipes: what is refused, and with which words."""

from pathlib import Path

import pytest

from configs.errors import UnusableInput
from configs.load import fingerprint, load_recipe, shipped_recipes
from configs.schema import DeepSpeedEngine, Train


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_parses(name: str) -> None:
    assert load_recipe(name).recipe.name == name


def write(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: x\nstudent: {lora: {targets: q_proj}}",
            "lora.targets: expected all-linear or a list like [q_proj], found 'q_proj'",
        ),
        ("name: x\ntrain: {objective: forward_kl}", "train.objective: expected a section like {type: forward_kl}, found"),
        ("name: x\ntrain: {longer_rows: 5}", "train.longer_rows: expected a list like [5], found 5"),
        ("name: x\ntrain: {lrr: 1}", "recipe.yaml: train.lrr: unknown key; did you mean lr?"),
        (
            "name: x\nteacher: {engine: {type: deepspeed, batch_sise: 1}}",
            "teacher.engine.batch_sise: unknown key; did you mean batch_size?",
        ),
        ("name: x\nteacher: {engine: {type: deepsped}}", "teacher.engine: unknown value 'deepsped'; did you mean deepspeed?"),
        ("name: x\ndata: {filters: [lenght]}", "data.filters.0: unknown value 'lenght'; did you mean length?"),
        ("name: x\ntrain: {lr: .inf}", "train.lr: input should be a finite number"),
        ("name: x\ngenerate: {prompts: [{type: jsonl, path: a, cuont: 3}]}", "cuont: unknown key; did you mean count?"),
        ("name: x\nevaluate: {models: {mine: {foldr: a}}}", "evaluate.models.mine.foldr: unknown key; did you mean folder?"),
        ("name: x\nevaluate: {gates: {accuracy: {mn: 1}}}", "evaluate.gates.accuracy.mn: unknown key; did you mean min?"),
        (
            "name: x\nevaluate: {gates: {acuracy: {min: 0.5}}}",
            "evaluate: gate 'acuracy': expected METRIC [of|above teacher|base] [in SLICE], such as",
        ),
        ("name: x\ntrain: {lr: -1}", "train.lr: input should be greater than 0, found -1"),
        (
            "name: x\ngenerate: {sampling: {top_p: 1.5}}",
            "generate.sampling.top_p: input should be less than or equal to 1, found 1.5",
        ),
        ("name: x\nevaluate: {gates: {accuracy: {min: 0.9, max: 0.1}}}", "gate min 0.9 is above max 0.1"),
        (
            "name: x\nteacher: {engine: {type: deepspeed, processes: 2}, layout: {expert_parallel: 3}}",
            "layout.expert_parallel 3 does not divide the 2 ranks",
        ),
        ("name: x\nteacher: {engine: {type: http}}\ngenerate: {budget: {max_cost: 5}}", "max_cost 5 can never be reached"),
        ("name: x\ngenerate: {canary: {max_cost: 5}}", "generate.canary.max_cost 5 can never be reached: no price is known"),
        ("name: x\ngenerate: {samples_per_prompt: 1000000000}", "generate.samples_per_prompt: input should be less than"),
        ("name: x\nteacher: {engine: {type: http, drain_s: 20}}", "drain_s 20 leaves nothing of generate.drain_seconds 20"),
        ("name: x\nteacher: {engine: {type: deepspeed}}\ngenerate: {drain_seconds: 30}", "expected less than 30"),
        ("name: a/b", "name: string should match pattern"),
        ("train: {lr: 1e-4}", "name: field required"),
        ("- a\n- b", "expected a mapping of sections, found list"),
        ("name: [", "not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_the_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UnusableInput) as raised:
        load_recipe(write(tmp_path, text))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_recipe_names_the_nearest_shipped_one() -> None:
    with pytest.raises(UnusableInput, match="did you mean embedded"):
        load_recipe("embeded")
    with pytest.raises(UnusableInput, match="no such file"):
        load_recipe("nowhere/at-all.yaml")


def test_overrides_are_typed_and_reach_lists() -> None:
    recipe = load_recipe(
        "embedded", ["train.lr=2e-4", "generate.prompts.0.count=7", "train.wandb=disabled", "evaluate.gates={}"]
    ).recipe
    assert recipe.train.lr == 2e-4 and recipe.generate.prompts[0].count == 7 and recipe.train.wandb == "disabled"
    assert recipe.evaluate.gates == {}


@pytest.mark.parametrize("override", ["train.lr", "=3", "train.lr.x=1", "generate.prompts.99.count=1", "train.nope=1"])
def test_a_wrong_override_is_refused(override: str) -> None:
    with pytest.raises(UnusableInput):
        load_recipe("embedded", [override])


def test_fingerprints_follow_values_only() -> None:
    assert fingerprint(Train(lr=1e-3)) == fingerprint(Train.model_validate({"lr": 0.001}))
    assert fingerprint(Train(lr=1e-3)) != fingerprint(Train(lr=2e-3))
    # sha256 of '{"a": 1, "b": [2.5, null]}', by sha256sum: another function would orphan every finished stage.
    assert fingerprint({"a": 1, "b": [2.5, None]}) == "2daaea6dd63221f9"


def test_engines_are_told_apart_by_type() -> None:
    assert isinstance(load_recipe("embedded").recipe.teacher.engine, DeepSpeedEngine)
    assert load_recipe("embedded", ["teacher.engine={type: local}"]).recipe.teacher.engine.type == "local"
