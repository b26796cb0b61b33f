"""The command line of a server of the teacher, from the recipe: what vLLM, SGLang or transformers is told of the layout.

Words in braces are known on the node only: {address} and {port} of this node, {head} of the job's first node, {peer_port} for its
nodes among themselves, {node} and {first_rank} of this node. slurm/serve.py fills them in.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from configs.cluster import Servers
from configs.errors import UnusableInput
from configs.schema import HttpEngine, Recipe

GLM = ("glm", "Glm")


class ServerCommand(NamedTuple):
    """first: of the node that answers requests. others: what the job's other nodes are told instead of nothing."""

    first: tuple[str, ...]
    others: tuple[str, ...] = ()


def server_command(recipe: Recipe, folders: Sequence[Path]) -> ServerCommand:
    """folders: where the model's folder is looked up, in order.

    Raises UnusableInput where the program cannot serve this layout.
    """
    settings, engine = recipe.slurm.servers, recipe.teacher.engine
    assert settings is not None and isinstance(engine, HttpEngine)
    model = settings.model or recipe.teacher.model
    name = engine.model or recipe.teacher.model
    match settings.program:
        case "vllm":
            return _vllm(recipe, engine, settings, model, name, is_glm(model, folders))
        case "sglang":
            return _sglang(recipe, engine, settings, model, name, is_glm(model, folders))
        case _:
            if recipe.teacher.hardware.nodes > 1:
                raise UnusableInput("slurm.servers.program transformers: one node; expected teacher.hardware.nodes 1")
            return ServerCommand(("transformers", "serve", model, "--host", "{address}", "--port", "{port}", *settings.options))


def _vllm(recipe: Recipe, engine: HttpEngine, settings: Servers, model: str, name: str, glm: bool) -> ServerCommand:
    """https://docs.vllm.ai/en/latest/serving/data_parallel_deployment/: data-parallel ranks over nodes, of which the first one
    has the front end; tensor-parallel groups stay inside a node."""
    teacher = recipe.teacher
    nodes, gpus, tensor = teacher.hardware.nodes, teacher.hardware.gpus_per_node, teacher.layout.tensor_parallel
    if tensor > gpus:
        raise UnusableInput(
            f"slurm.servers.program vllm: tensor_parallel {tensor} is more than a node's {gpus} GPUs; use program sglang"
        )
    copies = nodes * gpus // tensor
    words = ["vllm", "serve", model, "--served-model-name", name, "--tensor-parallel-size", str(tensor)]
    words += ["--enable-expert-parallel"] if teacher.layout.expert_parallel != 1 else []
    words += ["--kv-cache-dtype", "fp8"] if engine.kv_dtype == "fp8" else []
    words += ["--reasoning-parser", "glm45", "--tool-call-parser", "glm47", "--enable-auto-tool-choice"] if glm else []
    if copies > 1:
        words += ["--data-parallel-size", str(copies), "--data-parallel-size-local", str(gpus // tensor)]
        words += ["--data-parallel-address", "{head}", "--data-parallel-rpc-port", "{peer_port}"] if nodes > 1 else []
    words += settings.options
    others = (*words, "--headless", "--data-parallel-start-rank", "{first_rank}") if nodes > 1 else ()
    return ServerCommand((*words, "--host", "{address}", "--port", "{port}"), others)


def _sglang(recipe: Recipe, engine: HttpEngine, settings: Servers, model: str, name: str, glm: bool) -> ServerCommand:
    """https://docs.sglang.io/advanced_features/server_arguments.html: its tensor-parallel size is all GPUs of the launch;
    attention that is data-parallel splits them into --attn-dp-size groups (which releases before that option, and until the end
    of 2026, also know as --dp-size with --enable-dp-attention)."""
    teacher = recipe.teacher
    nodes, world = teacher.hardware.nodes, teacher.hardware.nodes * teacher.hardware.gpus_per_node
    words = ["python", "-m", "sglang.launch_server", "--model-path", model, "--served-model-name", name, "--tp-size", str(world)]
    words += ["--ep-size", str(world)] if teacher.layout.expert_parallel != 1 else []
    if (groups := world // teacher.layout.tensor_parallel) > 1:
        words += ["--attn-dp-size", str(groups)]
    words += ["--kv-cache-dtype", "fp8_e4m3"] if engine.kv_dtype == "fp8" else []
    words += ["--reasoning-parser", "glm45", "--tool-call-parser", "glm47"] if glm else []
    words += ["--nnodes", str(nodes), "--node-rank", "{node}", "--dist-init-addr", "{head}:{peer_port}"] if nodes > 1 else []
    words += ["--host", "{address}", "--port", "{port}", *settings.options]
    return ServerCommand(tuple(words), tuple(words) if nodes > 1 else ())


def is_glm(model: str, folders: Sequence[Path]) -> bool:
    """Whether its config.json is of the family whose replies need parsers; by its name where there is none to read."""
    for folder in folders:
        try:
            kind = json.loads((folder / model / "config.json").read_text()).get("model_type", "")
            return str(kind).startswith(GLM)
        except (OSError, ValueError, AttributeError):
            continue
    return "glm" in model.lower()
