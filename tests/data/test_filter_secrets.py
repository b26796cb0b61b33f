"""Secrets: every kind is found, placeholders and explanations pass, and no verdict holds a value.

Values are put together here, by chance and from halves: a scanner that reads this file finds none.
"""

import base64
import random
import string
import zlib

import pytest

from configs.filters import SECRET_KINDS, SecretsFilter
from data.filters import apply
from tests.data.make_run import make_prompt, make_trace

PROMPT = make_prompt("What is 2 + 2?")
CAPITALS = "ABCDEFGHJKLMNP123456789"
BASE62 = string.digits + string.ascii_uppercase + string.ascii_lowercase


def draw(length: int, alphabet: str = BASE62, seed: int = 0) -> str:
    return "".join(random.Random(seed + length).choices(alphabet, k=length))


def checked(prefix: str, seed: int = 0) -> str:
    """A token whose last six characters are the checksum of the thirty before."""
    body, number, check = draw(30, seed=seed), 0, ""
    number = zlib.crc32(body.encode())
    for _ in range(6):
        number, digit = divmod(number, 62)
        check = BASE62[digit] + check
    return prefix + body + check


def token(*parts: bytes) -> str:
    """base64url without padding, joined by dots."""
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


def key_block(kind: str, newline: str = "\n") -> str:
    lines = [draw(64, BASE62 + "+/", seed) for seed in range(6)]
    return newline.join([f"-----BEGIN {kind}" + "PRIVATE KEY-----", *lines, f"-----END {kind}" + "PRIVATE KEY-----"])


SECRETS = [
    ("aws_key", "AK" + "IA" + draw(16, "ABCDEFGHJKLMNPQRSTUVWXYZ234567")),
    ("aws_key", "AS" + "IA" + draw(16, "ABCDEFGHJKLMNPQRSTUVWXYZ234567", 9)),
    ("github_token", checked("gh" + "p_")),
    ("github_token", checked("gh" + "s_", 5)),
    ("github_token", "github" + "_pat_" + draw(22) + "_" + draw(59)),
    ("gitlab_token", "gl" + "pat-" + draw(20)),
    ("google_key", "AI" + "za" + draw(35)),
    ("huggingface_token", "h" + "f_" + draw(34, string.ascii_letters)),
    ("jwt", token(b'{"alg":"HS256","typ":"JWT"}', b'{"sub":"81723","role":"admin"}', random.Random(1).randbytes(32))),
    ("npm_token", checked("np" + "m_", 2)),
    ("anthropic_key", "sk-" + "ant-" + "api03-" + draw(93)),
    ("openai_key", "sk-" + "proj-" + draw(40) + "T3Blbk" + "FJ" + draw(40, seed=1)),
    ("private_key", key_block("RSA ")),
    ("private_key", key_block("OPENSSH ", "\\n")),
    ("private_key", key_block("")),
    ("pypi_token", "pypi-" + "AgEIcHlwaS5vcmc" + draw(80)),
    ("sendgrid_key", "S" + "G." + draw(22) + "." + draw(43)),
    ("slack_token", "xox" + "b-" + draw(12, "123456789") + "-" + draw(24)),
    ("slack_webhook", f"https://hooks.slack.com/services/T{draw(8, CAPITALS)}/B{draw(9, CAPITALS)}/{draw(24)}"),
    ("stripe_key", "sk_" + "live_" + draw(24)),
]  # fmt: skip


AROUND = ("{}", "token = '{}'", "export KEY={};", "Use\n{}\nas the key.")


@pytest.mark.parametrize(("kind", "value"), SECRETS, ids=[f"{kind}-{index}" for index, (kind, _) in enumerate(SECRETS)])
def test_a_credential_is_found_wherever_it_stands_and_its_kind_alone_is_named(kind: str, value: str) -> None:
    traces = [make_trace(PROMPT, around.format(value)) for around in AROUND]
    assert {apply(trace, SecretsFilter()) for trace in traces} == {f"secret:{kind}"}


def test_every_kind_has_an_example_here() -> None:
    assert {kind for kind, _ in SECRETS} == set(SECRET_KINDS)


HARMLESS = [
    "AKIAIOSFODNN7" + "EXAMPLE",
    "AKIA" + "XXXXXXXXXXXXXXXX",
    "AKIA1234567890123456",
    "AKIA followed by 16 characters of base 32",
    "the word " + "AK" + "IA" + draw(30, string.ascii_uppercase),
    "gh" + "p_" + draw(36),  # no checksum
    "gh" + "p_" + "x" * 36,
    "gh" + "p_your_token_here",
    "gl" + "pat-xxxxxxxxxxxxxxxxxxxx",
    "AIza" + "SyYOUR_API_KEY_HERE_0123456789abcdef",
    "h" + "f_" + "x" * 34,
    "hf_hub_download(repo_id, filename)",
    "np" + "m_" + draw(36),
    "npm_config_registry",
    "sk-" + "..." + "abcd",
    "sk-" + "your-api-key-here",
    "sk-learn and sk-image are libraries",
    "-----BEGIN RSA " + "PRIVATE KEY-----\n...\n-----END RSA PRIVATE KEY-----",
    "A PEM file begins with -----BEGIN "
    + "PRIVATE KEY----- and then the base64 text of the key follows, 64 characters to a line.",
    "-----BEGIN CERTIFICATE-----\n" + "\n".join(draw(64) for _ in range(9)),
    "-----BEGIN PUBLIC KEY-----\n" + "\n".join(draw(64) for _ in range(9)),
    token(b'{"alg":"HS256","typ":"JWT"}', b'{"sub":"1234567890","name":"John Doe","iat":1516239022}', bytes(range(32))),
    token(b'{"some":"json value here"}', b'{"other":"json value here"}', bytes(range(32))),
    "eyJ is how base64 of an opening brace and a quote begins",
    "xox" + "b-your-token",
    "xox" + "p-000000000000-000000000000-xxxxxxxxxxxxxxxx",
    "https://hooks.slack" + ".com/services/T00000000/B00000000/XXXXXXXXXXXXXXXXXXXXXXXX",
    "sk_" + "test_" + draw(24),
    "sk_" + "live_xxxxxxxxxxxxxxxxxxxxxxxx",
    "SG" + ".xxxxxxxxxxxxxxxxxxxxxx.yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy",
    "pypi-install is no token",
    "sha256 " + "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "commit 3f786850e387550fdab836ed7e6dc881de23001b",
    "123e4567-e89b-12d3-a456-426614174000",
]


@pytest.mark.parametrize("text", HARMLESS, ids=range(len(HARMLESS)))
def test_placeholders_explanations_and_hashes_are_no_secrets(text: str) -> None:
    assert apply(make_trace(PROMPT, text), SecretsFilter()) == ""


def test_only_the_kinds_of_the_recipe_are_looked_for() -> None:
    trace = make_trace(PROMPT, SECRETS[0][1])
    assert apply(trace, SecretsFilter(kinds=("jwt", "private_key"))) == ""
    assert apply(trace, SecretsFilter(kinds=("aws_key",))) == "secret:aws_key"


def test_the_prompt_is_looked_at_where_the_recipe_says_so() -> None:
    trace = make_trace(make_prompt(f"What is {SECRETS[0][1]}?"))
    assert (apply(trace, SecretsFilter()), apply(trace, SecretsFilter(prompts=True))) == ("", "secret:aws_key")


def test_a_real_value_behind_a_placeholder_of_its_kind_is_found() -> None:
    assert apply(make_trace(PROMPT, f"AKIAIOSFODNN7EXAMPLE or {SECRETS[0][1]}"), SecretsFilter()) == "secret:aws_key"
