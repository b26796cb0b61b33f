"""vLLM's own parser, from the environment of the benchmarks, understands what its servers are told."""

import json
import subprocess
from pathlib import Path

import pytest

from configs.load import load_recipe
from slurm.serving import server_command

ROOT = Path(__file__).parents[2]
VLLM = ROOT / ".bench" / "vllm" / "bin" / "python"
FILLED = {"{address}": "10.0.0.1", "{port}": "8000", "{head}": "10.0.0.1", "{peer_port}": "9000", "{first_rank}": "8"}
PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = make_arg_parser(FlexibleArgumentParser())
for words in json.loads(sys.stdin.read()):
    found = parser.parse_args(words)
    validate_parsed_serve_args(found)
    print(json.dumps({name: getattr(found, name) for name in (
        "model_tag", "tensor_parallel_size", "data_parallel_size", "data_parallel_size_local", "data_parallel_start_rank",
        "enable_expert_parallel", "kv_cache_dtype", "reasoning_parser", "tool_call_parser", "headless", "port")}))
"""


@pytest.mark.long
@pytest.mark.skipif(not VLLM.is_file(), reason="no vLLM in .bench/vllm: python -m tests.bench.setup")
def test_vllm_understands_what_its_servers_are_told() -> None:
    recipe = load_recipe(
        "glm52-fp8-16xh200", ["slurm.servers={model: weights/GLM-5.2-FP8, options: [--max-model-len=262144]}"]
    ).recipe
    said = server_command(recipe, (ROOT,))
    words = [[FILLED.get(word, word) for word in command[2:]] for command in (said.first, said.others)]
    done = subprocess.run(
        [str(VLLM), "-c", PARSE], input=json.dumps(words), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    first, other = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    same = {
        "model_tag": "weights/GLM-5.2-FP8", "tensor_parallel_size": 1, "data_parallel_size": 16, "data_parallel_size_local": 8,
        "enable_expert_parallel": True, "kv_cache_dtype": "fp8", "reasoning_parser": "glm45", "tool_call_parser": "glm47",
    }  # fmt: skip
    assert {name: first[name] for name in same} == {name: other[name] for name in same} == same
    assert (first["headless"], first["port"], other["headless"], other["data_parallel_start_rank"]) == (False, 8000, True, 8)
