"""The teacher: from requests to completions, wherever its weights lie.

An engine (data/engine.py) is one of three. `http_engine` asks a server. `local_engine` holds a model in one process and is
the oracle. `deepspeed_engine` holds a shard of it on each of many ranks. The last two share everything above the weights:
`runner` wraps a loaded model, `decode` is the loop over slots, `cache` keeps each slot's history, `sampling` picks tokens
from noise that knows only the request, `sparse_attention` makes GLM's decode step cheap, `experts` counts where tokens
went, `score` reads log-probabilities. `plan` and `folders` need no torch. Nothing here reads a recipe but `engines` and `plan`.

Held by tests: equal tokens from transformers' `generate`, one process and two, any batch, any order.
"""
