"""What answers for the teacher: ranks of our own under DeepSpeed, one local process, or servers."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from configs.section import Section

TORCHRUN_GRACE_S = 30.0
"""Between the signal that torchrun passes on and its SIGKILL (torch.distributed.elastic, hard-wired)."""


class DeepSpeedEngine(Section):
    """The teacher sharded by DeepSpeed over torchrun processes: the default."""

    type: Literal["deepspeed"] = "deepspeed"
    processes: PositiveInt | None = None
    """Ranks on each node (CPU processes, or GPUs); absent: hardware.gpus_per_node. Teacher.world multiplies by hardware.nodes."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Compute dtype. float32 is exact against the oracle; bf16 is what a 744 B teacher fits in."""
    kv_dtype: Literal["fp32", "bf16", "fp8"] | None = None
    """Dtype of the cache; absent: the compute dtype, which is what this engine keeps. Another one is for planning only."""
    batch_size: PositiveInt = 64
    """Decode slots per rank. More slots share the fixed cost of a step; the cache grows linearly with them."""
    cache_bytes: PositiveInt | None = None
    """Most that the cache may take on a rank; absent: what the plan leaves free of the GPU, and no bound on a CPU."""
    prepared: str = ""
    """Folder of shards that `tracestill prepare` made for this layout; each rank then reads its own bytes alone. Empty: every
    rank loads from the checkpoint itself, which no model larger than a machine's memory survives."""
    timeout_s: PositiveFloat = 1800.0
    """Longest that a rank may be silent or a step may take, prefill of one chunk included, before the launch ends and names
    the rank it waited for."""


class LocalEngine(Section):
    """One process, plain transformers: the oracle, and the quickest way on one device."""

    type: Literal["local"] = "local"
    dtype: Literal["fp32", "bf16"] = "bf16"
    batch_size: PositiveInt = 64
    cache_bytes: PositiveInt | None = None
    """As for the deepspeed engine."""


class HttpEngine(Section):
    """Any OpenAI-compatible server (vLLM, SGLang, transformers serve), or several that serve the same model."""

    type: Literal["http"] = "http"
    base_urls: tuple[str, ...] = ()
    """Where servers listen, `/v1` included. Empty, without a servers_file: http://localhost:8000/v1."""
    servers_file: str = ""
    """File with one such URL a line, read again every health_s: for servers that come and go while a run goes on. Of a folder,
    its *.url files that are renewed at least once a minute."""
    model: str = ""
    """Model name to ask the server for; empty asks for teacher.model."""
    api: Literal["chat", "completions"] = "chat"
    """`chat`: the server applies its own template. `completions`: it is sent our token ids and returns its own (vLLM,
    SGLang), so that an unfinished output can be continued and a reasoning budget kept."""
    stream: bool = False
    """Replies arrive token by token: what is there can be salvaged when the run stops. Costs this side some CPU."""
    logprobs: bool = False
    """Ask for the log-probability of every token."""
    top_logprobs: NonNegativeInt = 0
    """And of this many of the likeliest at each position; they stay in the raw replies. Servers allow 5 or 20."""
    concurrency: PositiveInt = 32
    """Most requests in flight over all servers. Where the run starts; it falls when servers complain and rises again."""
    timeout_s: PositiveFloat = 3600.0
    """Longest silence of a server. Without `stream` a reply is silent until its last token: 65,536 tokens at 20 a second
    take 3,277 s."""
    deadline_s: PositiveFloat = 7200.0
    """A request's time in all, attempts and waits together; after it the request is an abort."""
    attempts: PositiveInt = 4
    """Asks of one request whose reply may be paid for in vain (unreadable, torn, timed out). Refusals of a busy server
    are free and are retried until the deadline."""
    health_s: PositiveFloat = 10.0
    """Time between two looks at each server's list of models."""
    drain_s: NonNegativeFloat = 15.0
    """When the run is asked to stop: how long what is in flight may go on."""
    price_input_per_million: NonNegativeFloat = 0.0
    """Dollars per million prompt tokens."""
    price_output_per_million: NonNegativeFloat = 0.0
    """Dollars per million output tokens."""
    ca_file: str = ""
    """PEM file of the authority that signed the servers' certificates; empty: the system's."""
    dtype: Literal["bf16", "fp8", "int4"] = "bf16"
    """What the server loads: part of who the teacher is, and the plan's business. int4 is weight-only: it computes in bf16."""
    kv_dtype: Literal["bf16", "fp8"] | None = None
    """What the server keeps in its cache; absent: bf16."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key. The key itself is never written anywhere."""

    @field_validator("base_urls", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        """A single URL is a list of one."""
        return (value,) if isinstance(value, str) else value

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers known before any file is read."""
        return self.base_urls if self.base_urls or self.servers_file else ("http://localhost:8000/v1",)

    @model_validator(mode="after")
    def _addresses_hold_no_secret(self) -> "HttpEngine":
        for index, url in enumerate(self.base_urls):
            if problem := server_url_problem(url):
                raise ValueError(f"base_urls[{index}]: {problem}")  # without the URL: what it must not hold is a password
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs {self.top_logprobs} needs logprobs: true")
        return self


def server_url_problem(url: str) -> str:
    """Why `url` cannot be a server's address, in words that repeat nothing of it; "" when it can."""
    try:
        parts = urlsplit(url.strip())
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, brackets that do not close
        return "not a URL; expected http(s)://host:port/v1"
    if "@" in parts.netloc:
        return "holds a user name or password; put the key into the variable that api_key_env names"
    if parts.query or parts.fragment:
        return "holds a query or fragment, which would be recorded; expected http(s)://host:port/v1"
    return "" if usable else "not a URL; expected http(s)://host:port/v1"
