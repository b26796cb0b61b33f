"""The two stages of this package: every model on the same held-out items, and the folder a server loads."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from configs.errors import Refused, UnusableInput
from configs.progress import Count
from data.answer_grading import grade_answers, judge_version
from data.asking import Model
from data.dataset import load_dataset
from data.engine import Engine
from data.prompt_set import PromptSet, read_prompts
from data.records import Message
from data.stage import Context, Outcome, Stage
from data.store import ROLLUP, write_bytes, write_json
from student import gates
from student.certificate import read_certificate
from student.figures import aligned, lm_eval_rows
from student.folders import resolve, weights_sha256
from student.gates import GateRow, gate_table, judge, require, unmeasured
from student.results import evaluation_files, read_evaluated, read_lm_eval, read_metrics, write_gates
from student.scoring import Metrics
from student.targets import TargetSpec, stored_dtype
from student.unseen import trained_families

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from student.evaluate import AskJudge

# What loads torch is imported by the functions that need it: a finished stage is passed over without.

COMPARED = ("teacher", "base", "student")
NUM_RELOAD_PROMPTS = 24
NUM_TWINS = 64
NUM_SERVED_PROMPTS = 8
MATRIX_FILE = "parity.json"
SERVED_IN = {"gguf-f16": "fp16", "gguf-q8_0": "fp16", "gguf-q4_k_m": "fp16", "int8": "bf16", "int4": "bf16", "fp8": "bf16"}
"""What a server computes in, where that is not what the recipe says: its rounding decides near ties."""
JUDGED_LATER = ("gates", "headroom", "models")
"""Settings of `evaluate` that no figure of the run's own models depends on."""


class Target(NamedTuple):
    """A model to evaluate: who it is, its engine (not loaded yet), its tokenizer and the hash of its weights. judge: whom to ask
    about answers that no program can grade, if the recipe names one."""

    spec: TargetSpec
    engine: Engine
    tokenizer: "PreTrainedTokenizerBase"
    fingerprint: str
    judge: Model | None = None


OpenTarget = Callable[[Context, str], Target]
"""Opens a model by its name (student/targets.py). The front door supplies it: engines live in teacher/, which this package
never imports."""


def evaluate_models(
    context: Context, names: Sequence[str], open_target: OpenTarget, show: Callable[[Count], None], *, items_alone: bool = False
) -> dict[str, Metrics]:
    """Metrics of each named model on the run's held-out items, and its lm-eval suites unless items_alone; what an earlier attempt
    committed is not asked again."""
    from student.evaluate import evaluate_model, slices_of
    from student.lm_eval_suite import check_lm_suites, evaluate_lm_suites

    items = read_prompts(context.run, "eval")
    if not items:
        raise UnusableInput(
            "evaluate.suites: no evaluation item in the prompt set; expected at least one suite of items, beside those of lm_eval"
        )
    measured: dict[str, Metrics] = {}
    with PromptSet.open(context.run) as prompts:
        taught = trained_families(prompts)
    if context.recipe.evaluate.lm_eval_suites:
        check_lm_suites(context.recipe.evaluate, context.run, context.folders)
    gates.check_slices(context.recipe.evaluate.gates, {name for item in items for name in slices_of(item, taught)})
    for position, name in enumerate(names):
        target = open_target(context, name)

        def report(count: Count, name: str = name, position: int = position) -> None:
            said = count._replace(note=f"{count.note} {name}".strip())
            if not count.unit:  # attempts, of which each model has as many
                said = said._replace(done=position * count.total + count.done, total=len(names) * count.total)
            show(said)

        try:
            measured[name] = evaluate_model(
                target.spec.file, target.engine, target.tokenizer, items, context.recipe.evaluate, context.run, report,
                model_fingerprint=target.fingerprint, judge_timeout_s=context.recipe.data.verify_timeout_s,
                price=target.spec.price, trained_families=taught, ask_judge=_judge_of(context, target, show),
            )  # fmt: skip
            if context.recipe.evaluate.lm_eval_suites and not items_alone:
                evaluate_lm_suites(
                    target.spec.file, target.engine, target.tokenizer, context.recipe.evaluate, context.run, context.folders,
                    model_fingerprint=target.fingerprint, report=report,
                )  # fmt: skip
        except UnusableInput as error:
            if target.spec.server is None:
                raise
            # The http engine is most often a teacher, and speaks of its settings as such.
            raise UnusableInput(str(error).replace("teacher.engine", f"evaluate.models.{name}.server")) from error
        finally:
            target.engine.close()
    return measured


def _judge_of(context: Context, target: Target, show: Callable[[Count], None]) -> "AskJudge | None":
    settings, model = context.recipe.data.judging, target.judge
    if settings is None or model is None:
        return None
    return lambda answered: grade_answers(context.run, settings, answered, model, show, context.folders)


def evaluate(context: Context, open_target: OpenTarget, show: Callable[[Count], None]) -> Outcome:
    metrics = evaluate_models(context, COMPARED, open_target, show)
    files = [path for name in COMPARED for path in evaluation_files(context.run, name)]
    return Outcome(files, {}, "accuracy " + ", ".join(f"{name} {figures.accuracy or 0:.1%}" for name, figures in metrics.items()))


def gate_rows(context: Context) -> list[GateRow]:
    """The recipe's gates against the run's finished evaluation."""
    student, teacher, base = (read_evaluated(context.run, name) for name in ("student", "teacher", "base"))
    if student is None:
        raise UnusableInput(f"{context.run.evaluation}: no evaluation of the student; run: tracestill evaluate")
    settings = context.recipe.evaluate
    gates.check_slices(settings.gates, student.metrics.slices)
    return judge(settings.gates, student=student, teacher=teacher, base=base, seed=settings.seed)


def gate_refusal(context: Context) -> Refused | None:
    """What the gates say, shown as a table: None when every one passed. The verdicts are written down for the report."""
    rows = gate_rows(context)
    write_gates(context.run, rows)
    if rows:
        context.console.print(gate_table(rows), highlight=False, markup=False, soft_wrap=True)
    if lm_eval := lm_eval_rows({name: read_lm_eval(context.run, name) for name in COMPARED}):
        context.console.print(aligned(lm_eval), highlight=False, markup=False, soft_wrap=True)
    if (said := unmeasured(read_metrics(context.run, "student"))) is not None:
        context.console.print(f"evaluate  {said}", highlight=False, markup=False, soft_wrap=True)
    try:
        require(rows)
    except Refused as refusal:
        return refusal
    return None


def export(context: Context, open_target: OpenTarget, show: Callable[[Count], None]) -> Outcome:
    """Every format of the recipe, opened again and compared with base + adapter; merged weights are evaluated like the others."""
    from student.card import gather, render_card
    from student.export import Exported, Material, export_formats, exported_files
    from student.provenance import provenance

    run, recipe = context.run, context.recipe
    metrics = {name: found for name in COMPARED if (found := read_metrics(run, name)) is not None}
    items = read_prompts(run, "eval")
    training, held_out = _conversations(context, "train"), _conversations(context, "validation")
    material = Material(
        prompts=[item.messages for item in items[:: max(1, len(items) // NUM_RELOAD_PROMPTS)]],
        conversations=training,
        traces=held_out or training,
    )

    def card(made: Sequence[Exported]) -> str:
        return render_card(gather(run, recipe, metrics, gate_rows(context)), made)

    def trace_back(files: Mapping[str, str]) -> dict[str, Any]:
        return provenance(run, recipe, files)

    exported = export_formats(recipe.student.model, run.checkpoints / "adapter", recipe.export, run, material, card, trace_back)
    write_json(run.export / MATRIX_FILE, {"formats": [one.row._asdict() | {"notes": dict(one.notes)} for one in exported]})
    files = [run.export / MATRIX_FILE, *(path for one in exported for path in exported_files(one.folder))]
    said = [f"{one.name} keeps {one.row.retention:.2%}" for one in exported]
    said += [] if held_out else ["measured on training traces: the dataset holds none back (data.validation_share)"]
    if any(one.name == "merged" for one in exported):
        figures = evaluate_models(context, ("export/merged",), open_target, show)["export/merged"]
        files += evaluation_files(run, "export")
        said.append(f"accuracy {figures.accuracy or 0:.1%}")
    return Outcome(files, {"retention": {one.name: one.row.retention for one in exported}}, ", ".join(said))


def check_serving(context: Context) -> list[Any]:
    """Every exported format that something here can serve, served and asked; evaluation/serving.json holds what was found.

    Raises:
        UnusableInput: no export, or nothing here serves any of its formats.
        Refused: a server says something else than the student.
    """
    from student.export import format_of
    from student.model import load_tokenizer
    from student.serve_check import check_server, servers_for

    run, recipe = context.run, context.recipe
    made = [name for name in recipe.export.formats if (run.export / name).is_dir() and name != "adapter"]
    if not made:
        raise UnusableInput(f"{run.export}: nothing exported that a server loads by itself; add merged to export.formats")
    tokenizer = load_tokenizer(recipe.student.model)
    items = read_prompts(run, "eval")
    prompts = [item.messages for item in items[:: max(1, len(items) // NUM_SERVED_PROMPTS)]][:NUM_SERVED_PROMPTS]
    found, missing = [], list[UnusableInput]()
    for name in made:
        try:
            servers = servers_for(name)
        except UnusableInput as error:
            missing.append(error)
            continue
        folder = run.export / name
        dtype = SERVED_IN.get(name) or stored_dtype(folder) or recipe.export.dtype
        speaker = format_of(name, recipe.student.model, recipe.export).open(folder)
        path = next(folder.glob("*.gguf")) if name.startswith("gguf") else folder
        try:
            for server, program in servers:
                log = run.logs / f"serve.{name}.{server.program}.log"
                found.append(
                    check_server(
                        server,
                        program,
                        name,
                        path,
                        speaker,
                        tokenizer,
                        prompts,
                        dtype=dtype,
                        log=log,
                    )
                )
        finally:
            speaker.close()
    if not found:
        raise missing[0]
    write_json(run.evaluation / "serving.json", {"served": [one._asdict() for one in found]})
    return [*found, *map(str, missing)]


def _conversations(context: Context, split: str) -> list[list[Message]]:
    rows: Any = load_dataset(context.run)[split]
    return [
        [{key: value for key, value in message.items() if value is not None} for message in messages]  # type: ignore[misc]
        for messages in rows[:NUM_TWINS]["messages"]
    ]


def evaluated_under(context: Context, teacher_fingerprint: Callable[[Context], str]) -> dict[str, Any]:
    """What the figures depend on besides the prompt set and the adapter. A judge is part of it where the recipe names one."""
    judging = context.recipe.data.judging
    return {
        "teacher": teacher_fingerprint(context),
        "base": weights_sha256(resolve(context.recipe.student.model)),
        "evaluate": context.recipe.evaluate.model_dump(mode="json", exclude=set(JUDGED_LATER)),
    } | ({} if judging is None else {"judge": judge_version(judging, context.folders)})


def evaluate_stage(open_target: OpenTarget, teacher_fingerprint: Callable[[Context], str]) -> Stage:
    """Teacher, base and student on the items of the prompt set. Gates are no part of it: they judge its figures."""

    def identity(context: Context) -> dict[str, Any]:
        known_by = evaluated_under(context, teacher_fingerprint)
        settings = context.recipe.evaluate
        if not settings.lm_eval_suites:
            return known_by
        from student.lm_eval_suite import suite_hashes

        return known_by | {"lm_eval": suite_hashes(settings, context.folders)}

    def plan(context: Context) -> str:
        settings = context.recipe.evaluate
        return f"{', '.join(COMPARED)} on {len(settings.suites)} suites; gates: {', '.join(settings.gates) or 'none'}"

    def act(context: Context, show: Callable[[Count], None]) -> Outcome:
        return evaluate(context, open_target, show)

    return Stage("evaluate", "items", lambda run: run.evaluation, ("prompts", "checkpoints"), identity, act, plan)


def headroom_stage(open_target: OpenTarget, teacher_fingerprint: Callable[[Context], str]) -> Stage:
    """Teacher and base, before anything is trained. The evaluation of the student finds their completions in its store."""

    def identity(context: Context) -> dict[str, Any]:
        return evaluated_under(context, teacher_fingerprint)

    def plan(context: Context) -> str:
        return "teacher and base on the held-out items: is there something to distil?"

    def act(context: Context, show: Callable[[Count], None]) -> Outcome:
        metrics = evaluate_models(context, ("teacher", "base"), open_target, show, items_alone=True)
        files = []
        for name in metrics:
            for path in (context.run.evaluation / f"{name}.json", context.run.evaluation / f"{name}.arrow"):
                files.append(context.run.headroom / path.name)
                write_bytes(files[-1], path.read_bytes())
        return Outcome(files, {}, "accuracy " + ", ".join(f"{name} {one.accuracy or 0:.1%}" for name, one in metrics.items()))

    return Stage("headroom", "items", lambda run: run.headroom, ("prompts",), identity, act, plan)


def headroom_stands(context: Context) -> bool:
    """Whether it was measured, or nobody asks for it."""
    settings = context.recipe.evaluate
    return settings.headroom is None or not settings.prompt_suites or (context.run.headroom / ROLLUP).is_file()


def headroom_refusal(context: Context) -> Refused | None:
    """What the finished headroom stage says against training; None: nothing."""
    settings = context.recipe.evaluate
    if settings.headroom is None or not settings.prompt_suites:
        return None
    teacher, base = (read_evaluated(context.run, name, context.run.headroom) for name in ("teacher", "base"))
    if teacher is None or base is None:
        raise UnusableInput(f"{context.run.headroom}: no figures of teacher and base; run: tracestill evaluate RECIPE --headroom")
    found = gates.headroom_of(teacher.items, base.items, settings.headroom, seed=settings.seed)
    context.console.print(f"headroom  {gates.headroom_text(found)}", highlight=False, markup=False, soft_wrap=True)
    return gates.headroom_refusal(settings.headroom, found)


def export_stage(open_target: OpenTarget) -> Stage:
    """What a server loads. Its card states the gates and the certificate, so a change of either makes it anew."""

    def identity(context: Context) -> dict[str, Any]:
        settings = context.recipe.model_dump(mode="json", include={"export": True, "evaluate": {"gates"}})
        certificate = read_certificate(context.run, context.recipe)
        return settings if certificate is None else settings | {"certificate": certificate.sha256, "others": certificate.others}

    def plan(context: Context) -> str:
        settings = context.recipe.export
        return f"{', '.join(settings.formats)} in {settings.dtype}, reloaded and compared"

    def act(context: Context, show: Callable[[Count], None]) -> Outcome:
        return export(context, open_target, show)

    return Stage("export", "items", lambda run: run.export, ("checkpoints", "evaluation"), identity, act, plan)
