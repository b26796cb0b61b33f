"""Tasks of lm-evaluation-harness from a local folder, run through our engines, offline.

The harness builds contexts and computes metrics; the engine answers. Answers are stored as they come, once each (student/
lm_eval_model.py), so that a killed evaluation goes on where it was. evaluation/MODEL.lm_eval.json is written whole at the end.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from transformers import PreTrainedTokenizerBase

from configs.errors import TracestillError, UnusableInput
from configs.evaluation import Evaluate, LmEvalSuite
from configs.progress import Report
from data.engine import Engine
from data.records import digest
from data.store import RunFolder, sha256_file, write_json
from student.evaluate import Harness, harness_of
from student.item_store import ItemStore
from student.lm_eval_store import ScoreStore

if TYPE_CHECKING:
    from student.lm_eval_model import EngineModel

log = logging.getLogger(__name__)

GENERATES = "generate_until"
UNSCORED = "servers do not score given tokens"
UNPLAIN = "a server of chats is not asked for plain text"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
FEWSHOT_SEED = 1234
"""lm-eval's own default: the same examples as anybody else's."""
BOOTSTRAP_DRAWS = 1_000
"""For standard errors of metrics that have no formula; the mean has one. lm-eval draws 100,000 times."""


def evaluate_lm_suites(
    name: str,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    settings: Evaluate,
    run: RunFolder,
    folders: Sequence[Path],
    *,
    model_fingerprint: str,
    report: Report | None = None,
) -> Path:
    """evaluation/NAME.lm_eval.json holds metric, standard error, n, task version and configuration hash of each task.

    folders: tried in turn for relative paths. The engine is loaded here, and only when some answer is not stored yet; closing it
    is the caller's part. A task that the engine cannot be asked, or of which it left a request unanswered, has `unmeasured` and
    no metrics: a server gives no likelihoods, and one that is down is no model that is wrong.

    Raises:
        UnusableInput: lm-eval is not installed, or a folder or task cannot be used without the network.
    """
    require_lm_eval()
    harness = harness_of(engine, tokenizer, settings, model_fingerprint)
    base = run.evaluation / f"{name}.lm_eval"
    suites = []
    for suite in settings.lm_eval_suites:
        folder = suite_folder(suite, folders)
        hashed = folder_sha256(folder)
        with offline(run.cache / "lm_eval" / hashed):
            tasks = load_tasks(suite, folder)
            measured = run_tasks(tasks, engine, tokenizer, suite, settings, harness, base, report)
        suites.append({"path": suite.path, "files_sha256": hashed, "limit": suite.limit, "tasks": measured})
    path = base.with_name(f"{base.name}.json")
    write_json(path, {"name": name, "harness": harness.key, "lm_eval": importlib.metadata.version("lm-eval"), "suites": suites})
    return path


def check_lm_suites(settings: Evaluate, run: RunFolder, folders: Sequence[Path]) -> None:
    """Every task can be loaded, which is known before the first model is asked. Raises UnusableInput."""
    require_lm_eval()
    for suite in settings.lm_eval_suites:
        folder = suite_folder(suite, folders)
        with offline(run.cache / "lm_eval" / folder_sha256(folder)):
            load_tasks(suite, folder)


# --- the folder --------------------------------------------------------------------------------------------------


def require_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UnusableInput("evaluate.suites lm_eval: lm-eval is not installed; expected: pip install 'tracestill[lm-eval]'")


def suite_folder(suite: LmEvalSuite, folders: Sequence[Path]) -> Path:
    for folder in folders:
        if (folder / suite.path).is_dir():
            return (folder / suite.path).resolve()
    raise UnusableInput(
        f"lm_eval {suite.path}: no such folder beside the recipe or in the working directory; correct evaluate.suites path"
    )


def folder_sha256(folder: Path) -> str:
    """Over names and contents of all its files; what Python leaves there is none of them."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        whole.update(f"{path.relative_to(folder)}\0{sha256_file(path)}\n".encode(errors="surrogateescape"))
    return whole.hexdigest()


def suite_hashes(settings: Evaluate, folders: Sequence[Path]) -> dict[str, str]:
    """Path as the recipe writes it -> hash of the folder: part of what an evaluation is known by. Raises UnusableInput."""
    return {suite.path: folder_sha256(suite_folder(suite, folders)) for suite in settings.lm_eval_suites}


def load_tasks(suite: LmEvalSuite, folder: Path) -> dict[str, Any]:
    """Task name -> lm-eval's task, its documents read. Raises UnusableInput: none of that name, or it needs more than the
    folder."""
    from lm_eval.tasks import TaskManager

    where = f"lm_eval {suite.path}"
    check_syntax(where, folder)
    with _complaints(where), contextlib.chdir(folder):  # data files of a task are relative to the folder
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if unknown := [name for name in suite.tasks if name not in manager.all_tasks]:
            known = ", ".join(manager.all_tasks) or "none at all"
            raise UnusableInput(f"{where}: no task {unknown[0]!r} in the folder; expected one of {known}")
        if not (names := list(suite.tasks) or list(manager.all_subtasks)):
            raise UnusableInput(f"{where}: no task in the folder; expected YAML files with `task: NAME`")
        tasks = manager.load(names)["tasks"]
        for name, task in tasks.items():
            check_task(name, task, suite)
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return tasks


def check_task(name: str, task: Any, suite: LmEvalSuite) -> None:
    """What would be found out only when a model is asked, or never. Raises UnusableInput."""
    from student.lm_eval_model import GENERATION_KEYS

    where = f"lm_eval {suite.path}: task {name}"
    if absent := [metric for metric, function in getattr(task, "_metric_fn_list", {}).items() if function is None]:
        raise UnusableInput(f"{where}: metric {absent[0]!r} is none of lm-eval's own; expected one of those, or a !function")
    if task.OUTPUT_TYPE != GENERATES:
        return
    if unknown := sorted((task.get_config("generation_kwargs") or {}).keys() - GENERATION_KEYS):
        raise UnusableInput(
            f"{where}: generation_kwargs has {unknown[0]!r}, which is not known here; expected some of "
            f"{', '.join(sorted(GENERATION_KEYS))}"
        )
    if suite.chat_template and task.get_config("gen_prefix"):
        raise UnusableInput(f"{where}: gen_prefix begins an answer, which a chat does not allow; expected chat_template: false")


class _AnyTag(yaml.SafeLoader):
    """`!function` is lm-eval's; here only the syntax matters."""


_AnyTag.add_multi_constructor("!", lambda loader, suffix, node: None)


def check_syntax(where: str, folder: Path) -> None:
    """lm-eval passes over a file that it cannot parse, and its tasks with it. Raises UnusableInput."""
    for path in sorted(folder.rglob("*.yaml")):
        try:
            yaml.load(path.read_text(), _AnyTag)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            said = " ".join(str(error).split())
            raise UnusableInput(
                f"{where}: {path.relative_to(folder)}: not valid YAML: {said}; correct it or take it out"
            ) from error


# --- running -----------------------------------------------------------------------------------------------------


def run_tasks(
    tasks: Mapping[str, Any],
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    suite: LmEvalSuite,
    settings: Evaluate,
    harness: Harness,
    base: Path,
    report: Report | None = None,
) -> dict[str, Any]:
    """Task name -> its figures. Tasks that generate and tasks that compare likelihoods are run one after the other: a chat
    template is of use to the first alone."""
    from lm_eval.evaluator import evaluate

    from student.lm_eval_model import EngineModel

    scored_under = digest(harness.model_fingerprint, engine.name, engine.version)
    measured: dict[str, Any] = {}
    for generates in (True, False):
        chosen = {name: task for name, task in tasks.items() if (task.OUTPUT_TYPE == GENERATES) == generates}
        if not chosen:
            continue
        chat = generates and suite.chat_template
        if reason := why_unmeasured(engine, generates=generates, chat=chat):
            log.warning("lm_eval %s: %s of %s not measured: %s", suite.path, ", ".join(chosen), base.name, reason)
            measured |= {name: {"unmeasured": reason} for name in chosen}
            continue
        model = EngineModel(
            engine, tokenizer, harness, settings.sampling, settings.seed,
            ItemStore(base.with_name(f"{base.name}.items"), harness.key, segment_rows=settings.batch_size),
            ScoreStore(base.with_name(f"{base.name}.scores"), scored_under, segment_rows=settings.batch_size),
            chat=chat, context_tokens=suite.context_tokens, report=report,
        )  # fmt: skip
        random.seed(0)  # as lm-eval's own front end does: tasks may draw
        np.random.seed(FEWSHOT_SEED)
        with _complaints(f"lm_eval {suite.path}", model):
            found: Any = evaluate(
                model, {"tasks": chosen}, limit=suite.limit, log_samples=False, apply_chat_template=chat,
                bootstrap_iters=BOOTSTRAP_DRAWS,
            )  # fmt: skip
        for name in chosen:
            failed = model.aborted.get(name)
            measured[name] = figures_of(name, found) if failed is None else {"unmeasured": unanswered(failed)}
    return dict(sorted(measured.items()))


def why_unmeasured(engine: Engine, *, generates: bool, chat: bool) -> str:
    """Why this engine cannot be asked; "" when it can."""
    if engine.name != "http":
        return ""
    if not generates:
        return UNSCORED
    api = getattr(getattr(engine, "engine", None), "api", "chat")  # of teacher.http_engine, which this package never imports
    return UNPLAIN if api == "chat" and not chat else ""


def unanswered(failed: Mapping[str, int]) -> str:
    """`2 requests without an answer: busy 1, no_server 1`."""
    return f"{sum(failed.values())} requests without an answer: " + ", ".join(f"{why} {n}" for why, n in sorted(failed.items()))


def figures_of(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """One task of lm-eval's results as JSON values: stderr null where there is none."""
    values = found["results"][name]
    metrics = []
    for key, value in values.items():
        metric, _, chosen = key.partition(",")
        if chosen and not metric.endswith("_stderr"):
            stderr = values.get(f"{metric}_stderr,{chosen}")
            metrics.append(
                {
                    "metric": metric,
                    "filter": chosen,
                    "value": _number(value),
                    "stderr": _number(stderr),
                    "higher_is_better": found["higher_is_better"].get(name, {}).get(metric),
                }
            )
    return {
        "metrics": metrics,
        "n": found["n-samples"][name]["effective"],
        "num_fewshot": found["n-shot"].get(name),
        "version": found["versions"].get(name),
        "config_sha256": config_sha256(found["configs"][name]),
    }


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float | np.number) and not isinstance(value, bool) else None


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def config_sha256(config: Mapping[str, object]) -> str:
    """Of a task's configuration as lm-eval gives it; functions by their source or name, never by where they lie in memory, and
    without the path of its file, which lm-eval puts into `metadata`."""
    metadata = config.get("metadata")
    if isinstance(metadata, Mapping):
        config = {**config, "metadata": {key: value for key, value in metadata.items() if key != "config_source"}}
    text = json.dumps(config, sort_keys=True, default=lambda value: _ADDRESS.sub("", str(value)), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


# --- offline -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def offline(cache: Path) -> Iterator[None]:
    """Hugging Face libraries fetch nothing here, and keep data sets in `cache`: one of this folder's content alone, because they
    know a local file by its path and its time. They read the environment when they are imported, which is long past: what they
    made of it is set too. Offline, they still look whether a data file behind a URL is there: asked four times, measured."""
    import datasets.config
    import datasets.data_files
    import huggingface_hub.constants
    from fsspec.core import split_protocol

    find = datasets.data_files.url_to_fs

    def find_here(url: str, **options: Any) -> Any:
        if any(split_protocol(hop)[0] not in (None, "file", "zip") for hop in url.split("::")):
            raise ConnectionError(f"{url} is not a file of this machine")
        return find(url, **options)

    changes = (
        (datasets.config, "HF_HUB_OFFLINE", True),
        (huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        (datasets.config, "HF_DATASETS_CACHE", str(cache)),
        (datasets.data_files, "url_to_fs", find_here),
    )
    before = [getattr(module, name) for module, name, _ in changes]
    environment = {name: os.environ.get(name) for name in OFFLINE}
    os.environ.update(OFFLINE)
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(changes, before, strict=True):
            setattr(module, name, value)
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _complaints(where: str, model: "EngineModel | None" = None) -> Iterator[None]:
    """Whatever a task or its files make lm-eval raise is one line; what the engine died of is raised as it is."""
    try:
        yield
    except (TracestillError, AssertionError):
        raise
    except Exception as error:  # YAML, datasets, jinja2, metrics, and functions of the folder raise whatever they like
        if model is not None and error is model.failure:
            raise
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UnusableInput(f"{where}: {said}; expected tasks whose data and metrics need nothing but the folder") from error
