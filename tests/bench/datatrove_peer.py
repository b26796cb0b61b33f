"""The peer of http_throughput: datatrove's checkpointed inference runner. Run with the Python of .bench/datatrove.

    .bench/datatrove/bin/python -P tests/bench/datatrove_peer.py URL COUNT CONCURRENCY FOLDER

Prints the seconds from the first document to the last written one; starting Python and importing are outside.
"""

import sys
import time
from pathlib import Path

from datatrove.data import Document  # pyright: ignore[reportMissingImports]
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner  # pyright: ignore[reportMissingImports]
from datatrove.pipeline.writers import JsonlWriter  # pyright: ignore[reportMissingImports]
from loguru import logger  # pyright: ignore[reportMissingImports]


async def rollout(document, generate):  # noqa: ANN001, ANN201  (datatrove's types are not in this environment)
    return await generate({"messages": [{"role": "user", "content": document.text}], "max_tokens": 20_000})


def main(url: str, count: int, concurrency: int, folder: Path) -> None:
    logger.remove()
    config = InferenceConfig(
        server_type="endpoint", model_name_or_path="tiny", endpoint_url=url, max_concurrent_generations=concurrency
    )
    runner = InferenceRunner(
        rollout,
        config,
        JsonlWriter(str(folder / "out"), output_filename="${rank}_${chunk_index}.jsonl.gz"),
        checkpoints_local_dir=str(folder / "checkpoints"),
        records_per_chunk=500,
    )
    documents = [Document(text=f"question {index}", id=f"r{index}") for index in range(count)]
    started = time.perf_counter()
    runner.run(iter(documents), rank=0)
    print(time.perf_counter() - started)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
