"""What servers of the teacher are told, and how they come and go with their jobs."""

import shlex
import subprocess
from pathlib import Path

import pytest

from configs.errors import UnusableInput
from configs.load import load_recipe
from data.store import RunFolder
from slurm.scripts import Chain, render_scripts
from slurm.serving import server_command
from slurm.topology import previous_of, stages_of

ROOT = Path(__file__).parents[2]


def words(name: str, *overrides: str) -> tuple[list[str], list[str]]:
    found = server_command(load_recipe(name, overrides).recipe, (ROOT,))
    return list(found.first), list(found.others)


def value(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_glm_on_one_node_of_eight_is_tensor_parallel() -> None:
    first, others = words("glm52-fp8-8xh200", "slurm.servers={model: weights/GLM-5.2-FP8, options: [--max-model-len=262144]}")
    assert first[:3] == ["vllm", "serve", "weights/GLM-5.2-FP8"] and others == []
    assert value(first, "--served-model-name") == "zai-org/GLM-5.2-FP8" and value(first, "--tensor-parallel-size") == "8"
    assert value(first, "--kv-cache-dtype") == "fp8" and value(first, "--tool-call-parser") == "glm47"
    assert "--enable-expert-parallel" not in first and "--data-parallel-size" not in first
    assert "--max-model-len=262144" in first and first[-4:] == ["--host", "{address}", "--port", "{port}"]


def test_glm_on_two_nodes_has_data_parallel_attention_and_one_front_end() -> None:
    first, others = words("glm52-fp8-16xh200", "slurm.servers={}")
    assert value(first, "--data-parallel-size") == "16" and value(first, "--data-parallel-size-local") == "8"
    assert value(first, "--data-parallel-address") == "{head}" and "--enable-expert-parallel" in first
    assert "--headless" not in first and "--headless" in others and "--port" not in others
    assert value(others, "--data-parallel-start-rank") == "{first_rank}"


def test_sglang_takes_all_gpus_as_its_tensor_parallel_size() -> None:
    first, others = words("glm52-fp8-16xh200", "slurm.servers={program: sglang}")
    assert value(first, "--tp-size") == value(first, "--ep-size") == value(first, "--attn-dp-size") == "16"
    assert "--enable-dp-attention" not in first and value(first, "--kv-cache-dtype") == "fp8_e4m3"
    assert value(first, "--dist-init-addr") == "{head}:{peer_port}" and others == first


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["slurm.servers={}", "teacher.layout.tensor_parallel=16"], "more than a node's 8 GPUs; use program sglang"),
        (["slurm.servers={program: transformers}"], "slurm.servers.program transformers: one node"),
    ],
)
def test_a_layout_that_a_program_cannot_serve_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UnusableInput, match=message):
        words("glm52-fp8-16xh200", *overrides)


def test_servers_without_an_engine_that_asks_them_are_refused() -> None:
    with pytest.raises(UnusableInput, match=r"slurm.servers are asked by teacher.engine http"):
        load_recipe("embedded", ["slurm.servers={}"])


def test_stages_that_ask_wait_for_a_server_and_not_for_its_job(tmp_path: Path) -> None:
    recipe = load_recipe("glm52-fp8-16xh200", ["slurm.servers={jobs: 3}"]).recipe
    run = RunFolder(tmp_path / "run")
    chain = Chain(recipe, "glm52-fp8-16xh200", (), run, recipe.slurm, tmp_path, ROOT)
    texts = {script.stage: script.text for script in render_scripts(chain)}
    assert previous_of(stages_of(recipe), "headroom") == previous_of(stages_of(recipe), "serve") == "prompts"
    assert "#SBATCH --array=0-2\n" in texts["serve"] and "#SBATCH --nodes=2\n" in texts["serve"]
    assert "#SBATCH --gres=gpu:h200:8" in texts["serve"] and "--gres" not in texts["generate"]
    for stage in ("headroom", "generate", "evaluate"):
        assert " --asks-servers" in texts[stage]
        assert f"teacher.engine.servers_file={run.root / 'slurm' / 'servers'}" in texts[stage]
    assert " --asks-servers" not in texts["train"] and "servers_file" not in texts["train"]
    assert [stage for stage, text in texts.items() if "--closes-servers" in text] == ["evaluate", "report"]
    for text in texts.values():
        assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    step = texts["serve"].split("srun --kill-on-bad-exit=1 --wait=0")[1].split("&\n")[0].replace("\\\n", "")
    assert shlex.split(step)[:4] == ["python", "-P", "-m", "slurm.serve"]
