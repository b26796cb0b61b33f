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
) -> Path:
    """evaluation/NAME.lm_eval.json holds metric, standard error, n, task version and configuration hash of each task.

    folders: tried in turn for relative paths. The engine is loaded here; closing it is the caller's part. A server gives no
    likelihoods: tasks that need them have `unmeasured` instead of metrics.

    Raises:
        UnusableInput: lm-eval is not installed, or a folder or task cannot be used without the network.
    """
    require_lm_eval()
    harness = harness_of(engine, tokenizer, settings, model_fingerprint)
    base = run.evaluation / f"{name}.lm_eval"
    suites = []
    engine.load()
    for suite in settings.lm_eval_suites:
        folder = suite_folder(suite, folders)
        hashed = folder_sha256(folder)
        with offline(run.cache / "lm_eval" / hashed):
            tasks = load_tasks(suite, folder)
            measured = run_tasks(tasks, engine, tokenizer, suite, settings, harness, base)
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
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return tasks


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
        if not generates and engine.name == "http":
            log.warning("lm_eval %s: %s of %s not measured: %s", suite.path, ", ".join(chosen), base.name, UNSCORED)
            measured |= {name: {"unmeasured": UNSCORED} for name in chosen}
            continue
        chat = generates and suite.chat_template
        model = EngineModel(
            engine, tokenizer, harness, settings.sampling, settings.seed,
            ItemStore(base.with_name(f"{base.name}.items"), harness.key, segment_rows=settings.batch_size),
            ScoreStore(base.with_name(f"{base.name}.scores"), scored_under, segment_rows=settings.batch_size),
            chat=chat, context_tokens=suite.context_tokens,
        )  # fmt: skip
        random.seed(0)  # as lm-eval's own front end does: tasks may draw
        np.random.seed(FEWSHOT_SEED)
        with _complaints(f"lm_eval {suite.path}", model):
            found: Any = evaluate(
                model, {"tasks": chosen}, limit=suite.limit, log_samples=False, apply_chat_template=chat,
                bootstrap_iters=BOOTSTRAP_DRAWS,
            )  # fmt: skip
        measured |= {name: figures_of(name, found) for name in chosen}
    return dict(sorted(measured.items()))


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
    """Of a task's configuration as lm-eval gives it; functions by their source or name, never by where they lie in memory."""
    text = json.dumps(config, sort_keys=True, default=lambda value: _ADDRESS.sub("", str(value)), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


# --- offline -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def offline(cache: Path) -> Iterator[None]:
    """Hugging Face libraries fetch nothing here, and keep data sets in `cache`: one of this folder's content alone, because they
    know a local file by its path and its time. They read the environment when they are imported, which is long past: what they
    made of it is set too."""
    import datasets.config
    import huggingface_hub.constants

    changes = (
        (datasets.config, "HF_HUB_OFFLINE", True),
        (huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        (datasets.config, "HF_DATASETS_CACHE", str(cache)),
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
