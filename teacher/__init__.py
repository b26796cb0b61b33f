"""The teacher: from requests to completions, wherever its weights lie.

An engine (data/engine.py) is one of three. `http_engine` asks a server. `local_engine` holds a model in one process and is
the oracle. `deepspeed_engine` holds a shard of it on each of many ranks; `parallel` holds a layout's degrees, `families` what an
architecture needs, `heartbeat` who is missing when a collective hangs. `engines` opens what a recipe means.

The last two share everything above the weights. `runner` wraps a loaded model. `decode` is the loop over slots: `row` is one
live request, `admission` how many may be live, `cache` keeps their history, `sampling` picks tokens from noise that knows only
the request, `score` reads log-probabilities. `sparse_attention` and `indexer` do GLM's attention in `tiles` of bounded bytes.
`experts` counts where tokens went.

Before a GPU is touched: `plan` (arithmetic in `planning/`) says what fits, how fast and at what price, without torch. `prepare`
turns a checkpoint into per-rank shards, once. `probe` measures on the machine what `plan` calculated.

Held by tests: equal tokens from transformers' `generate`, one process and two and four, any batch, any order, any budget.
"""
