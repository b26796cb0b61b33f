"""Which models an evaluation can be asked for, and where they lie. Opening them is the front door's: engines live in teacher/."""

import hashlib
import re
from pathlib import Path
from typing import Literal, NamedTuple

from configs.engines import HttpEngine
from configs.errors import UnusableInput
from configs.evaluation import OWN_MODELS, OtherModel, Price
from configs.schema import Recipe
from data.records import digest
from data.store import RunFolder, read_json, sha256_file
from student.folders import resolve, weights_sha256

Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, Dtype] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class TargetSpec(NamedTuple):
    """A model to evaluate. name: as people call it. file: of its figures in evaluation/. folder, adapter: of a local one. server,
    tokenizer: of one behind a URL. export: the format, of an exported one. price: dollars, where the recipe says."""

    name: str
    file: str
    kind: Literal["teacher", "local", "server", "export"]
    folder: Path | None = None
    adapter: Path | None = None
    dtype: Dtype = "bf16"
    server: HttpEngine | None = None
    tokenizer: str = ""
    export: str = ""
    price: Price | None = None

    def fingerprint(self) -> str:
        """Of its weights, an adapter's scaling among them, and the type that they are computed in; of a server, what it was asked
        for: which weights it has is its word."""
        if self.server is not None:
            return digest("server", list(self.server.urls), self.server.servers_file, self.server.model)
        assert self.folder is not None
        if self.adapter is None:
            return digest("local", weights_sha256(self.folder), self.dtype)
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            if not (self.adapter / name).is_file():
                raise UnusableInput(f"{self.name}: no {name} in {self.adapter}; expected a PEFT folder")
        read_json(self.adapter / ADAPTER_CONFIG)
        own = [sha256_file(self.adapter / name) for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)]
        return digest("local", weights_sha256(self.folder), *own, self.dtype)


def target_spec(recipe: Recipe, run: RunFolder, name: str) -> TargetSpec:
    """`teacher`, `base`, `student`, `export`, `export/FORMAT`, a name of evaluate.models, or a folder with a checkpoint or a PEFT
    adapter of the student's base. Raises UnusableInput for anything else, and for what is not there."""
    found = _spec(recipe, run, name)
    own = name.partition("/")[0]
    return found._replace(price=recipe.evaluate.prices.get(own))


def _spec(recipe: Recipe, run: RunFolder, name: str) -> TargetSpec:
    dtype = recipe.train.dtype
    if name == "teacher":
        return TargetSpec(name, name, "teacher")
    if name in ("base", "student"):
        adapter = run.checkpoints / "adapter" if name == "student" else None
        if adapter is not None and not (adapter / ADAPTER_CONFIG).is_file():
            raise UnusableInput(f"student: {adapter} holds no adapter; run: tracestill train")
        return TargetSpec(name, name, "local", resolve(recipe.student.model), adapter, dtype)
    if name.partition("/")[0] == "export":
        chosen = name.partition("/")[2] or recipe.export.formats[0]
        folder = run.export / chosen
        if "/" in chosen or not folder.is_dir():
            made = sorted(path.name for path in run.export.glob("[!.]*") if path.is_dir())
            raise UnusableInput(
                f"{name}: {folder} is not there; expected one of {', '.join(made) or 'none yet'}: tracestill export"
            )
        if chosen.startswith("gguf"):
            raise UnusableInput(
                f"{name}: a GGUF file is evaluated behind its server; start llama-server with it and name it in evaluate.models"
            )
        file = "export" if chosen == "merged" else f"export.{chosen}"
        if chosen == "adapter":
            return TargetSpec(name, file, "export", resolve(recipe.student.model), folder, recipe.export.dtype, export=chosen)
        return TargetSpec(name, file, "export", folder, None, stored_dtype(folder) or recipe.export.dtype, export=chosen)
    if (other := recipe.evaluate.models.get(name)) is not None:
        return _other(recipe, name, other)
    if Path(name).is_dir():
        return _folder(recipe, Path(name))
    raise UnusableInput(
        f"no model {name!r}: expected one of {', '.join((*OWN_MODELS, *recipe.evaluate.models))}, export/FORMAT, or a folder"
    )


def stored_dtype(folder: Path) -> Dtype | None:
    """What an exported folder's config.json says its weights are computed in: a merge that would have lost the adapter in the
    recipe's type is stored in float32, and loses it after all where it is opened in the other. None: it does not say."""
    config = read_json(folder / "config.json")
    return DTYPES.get(str(config.get("dtype", config.get("torch_dtype", ""))))


def _other(recipe: Recipe, name: str, other: OtherModel) -> TargetSpec:
    if other.server is not None:
        tokenizer = other.tokenizer or recipe.student.model
        return TargetSpec(
            name, f"model.{name}", "server", server=other.server, tokenizer=str(resolve(tokenizer)) if tokenizer else ""
        )
    assert other.folder is not None
    adapter = None if other.adapter is None else Path(other.adapter)
    if adapter is not None and not (adapter / ADAPTER_CONFIG).is_file():
        raise UnusableInput(f"evaluate.models.{name}.adapter {adapter}: no {ADAPTER_CONFIG}; expected a PEFT folder")
    folder = resolve(other.folder, f"evaluate.models.{name}.folder")
    return TargetSpec(name, f"model.{name}", "local", folder, adapter, other.dtype)


def _folder(recipe: Recipe, folder: Path) -> TargetSpec:
    where = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    file = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', folder.resolve().name) or 'model'}-{where}"
    if (folder / ADAPTER_CONFIG).is_file():
        return TargetSpec(str(folder), file, "local", resolve(recipe.student.model), folder, recipe.train.dtype)
    return TargetSpec(str(folder), file, "local", resolve(str(folder), "evaluate --compare"), None, recipe.train.dtype)
