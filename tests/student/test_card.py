import dataclasses
from pathlib import Path

import pytest
import yaml

from configs.errors import UnusableInput
from configs.evaluation import Gate
from configs.load import load_recipe
from configs.schema import Recipe
from data.checksum import checked_json
from data.store import RunFolder, sha256_file
from student.card import CardFacts, PromptSource, certificate_text, gather, recipe_text, render_card
from student.certificate import certified_settings, read_certificate
from student.export import Exported
from student.figures import cell
from student.gates import judge
from student.matrix import ParityRow
from student.parity import Parity
from student.results import read_evaluated, read_metrics
from student.scoring import Metrics
from tests.data.synthetic_run import make_run

RECIPE = Recipe.model_validate(
    {
        "name": "card",
        "teacher": {"model": "weights/T", "licence": "MIT"},
        "student": {"model": "weights/S", "licence": "Apache-2.0"},
    }
)
ROW = ParityRow("merged", 1.2e-3, 0.5, 0.9976, 0.95, 0.96, 1.0, 1.0, 22.5, 23.0, 4_200_000, 310.0, 12, 400)
MERGED = Exported("merged", Path("x"), ROW, {"dtype": "bf16"}, Parity("bf16", 1.2e-3, 0.5, 0.9976, 192, 1, 40))
FINDINGS = [MERGED, Exported("gguf-q8_0", Path("y"), ROW._replace(format="gguf-q8_0"), {}, None)]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> CardFacts:
    run = make_run(tmp_path_factory.mktemp("run"))
    metrics: dict[str, Metrics] = {}
    for name in ("teacher", "base", "student"):
        found = read_metrics(run, name)
        assert found is not None
        metrics[name] = found
    student = read_evaluated(run, "student")
    assert student is not None
    gates = judge({"accuracy": Gate(min=0.1), "hallucination_rate": Gate(max=0.0)}, student=student)
    gathered = gather(run, RECIPE, metrics, gates)
    assert gathered.dataset_sha256 == sha256_file(run.dataset / "manifest.json") and gathered.train_rows > 0
    return gathered


def test_the_card_states_where_the_student_comes_from(facts: CardFacts) -> None:
    card = render_card(facts, FINDINGS)
    for stated in (
        "weights/T, licence MIT",
        "weights/S, licence Apache-2.0",
        facts.dataset_sha256,
        facts.revision,
        "made up: 15, licence MIT",
    ):
        assert stated in card, stated
    assert f"{facts.train_rows} training and 0 validation traces" in card
    assert str(Path.cwd()) not in card


def test_the_card_shows_every_model_and_every_gate(facts: CardFacts) -> None:
    card = render_card(facts, FINDINGS)
    assert "|  | teacher | base | student |" in card and "| accuracy in chain_sum | " in card
    assert "1 of 2 gates passed" in card and "| hallucination_rate | " in card and "refused" in card
    assert (
        "| merged | 1.20e-03 | 99.76 % | 95 % (96 %) | 100 % (100 %) | 22.5 (23.0) | 4.2 MB | 310 |" in card
        and "192 greedy tokens" in card
    )


def test_a_card_without_gates_says_ungated(facts: CardFacts) -> None:
    card = render_card(dataclasses.replace(facts, gates=()), FINDINGS)
    assert "**ungated**" in card and "| gate |" not in card


def test_the_card_says_what_its_figures_do_not(facts: CardFacts) -> None:
    """The made-up run has no twins and no family without training traces; one of its two gates is refused."""
    card = render_card(facts, FINDINGS)
    said = card.split("## Limits\n")[1].split("\n## ")[0]
    assert "does **not** keep hallucination_rate" in said
    assert "how it does elsewhere was **not measured**" in said and "hangs on the wording was **not measured**" in said
    nobody = render_card(dataclasses.replace(facts, gates=(), metrics={}), FINDINGS)
    assert "it is **ungated**" in nobody and "It was **not evaluated**" in nobody and "model-index" not in nobody


def test_the_card_tells_what_training_cost_elsewhere(facts: CardFacts) -> None:
    student, base = facts.metrics["student"], facts.metrics["base"]
    worse = dataclasses.replace(student, twin_gap=0.125, slices={"unseen": dataclasses.replace(student, accuracy=0.1)})
    before = dataclasses.replace(base, slices={"unseen": dataclasses.replace(base, accuracy=0.9)})
    card = render_card(dataclasses.replace(facts, metrics={"student": worse, "base": before}), FINDINGS)
    assert "it answers 10.0 % right; its base, before training: 90.0 %" in card
    assert "Asked again in other words, the same items lose 12.5 points." in card


def test_front_matter_and_recipe_are_yaml_that_parses(facts: CardFacts) -> None:
    card = render_card(facts, FINDINGS)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "apache-2.0" and front["base_model"] == "weights/S"
    (result,) = front["model-index"][0]["results"]
    assert {one["type"]: one["value"] for one in result["metrics"]}["accuracy"] == pytest.approx(
        facts.metrics["student"].accuracy, abs=1e-4
    )
    recipe = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert Recipe.model_validate(recipe) == RECIPE


@pytest.mark.parametrize("name", ["embedded", "student-7b", "generic-moe"])
def test_the_recipe_in_the_card_loads_as_the_same_recipe(name: str) -> None:
    recipe = load_recipe(name).recipe
    assert Recipe.model_validate(yaml.safe_load(recipe_text(recipe))) == recipe


def test_a_source_name_cannot_break_its_table() -> None:
    assert cell("a | b\nc") == "a \\| b c"
    source = PromptSource("x|y", "MIT", 1)
    assert cell(source.source) == "x\\|y"


def test_the_card_states_the_gradient_certificate(facts: CardFacts, tmp_path: Path) -> None:
    assert "none (`tracestill train RECIPE --certify` makes one)" in render_card(facts, FINDINGS)
    run = RunFolder(tmp_path)
    run.metrics.mkdir()
    path = run.metrics / "certificate.json"
    said = {"holds": True, "largest_difference": 4e-7, "bound": 1e-5, "certified": certified_settings(facts.recipe)}
    path.write_bytes(checked_json(said))
    card = render_card(dataclasses.replace(facts, certificate=read_certificate(run, facts.recipe)), FINDINGS)
    assert f"gradients hold: within 4.0e-07 of a float64 reference, bound 1e-05; sha256 `{sha256_file(path)}`" in card
    assert "made with other" not in card
    settings = facts.recipe.train.model_copy(update={"zero_stage": 3, "sequence_parallel": 2})
    other = read_certificate(run, facts.recipe.model_copy(update={"train": settings}))
    assert certificate_text(other).endswith("; made with other train.zero_stage, train.sequence_parallel")
    path.write_bytes(path.read_bytes().replace(b"true", b"null"))
    with pytest.raises(UnusableInput, match="not the bytes that were written"):
        read_certificate(run, facts.recipe)
