"""Personal data: found by format and checksum with its word beside it; examples, sums and code pass."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.filters import PERSONAL_DATA_KINDS, PersonalDataFilter
from data.filters import apply
from data.filters.personal_data import luhn
from data.filters.reserved import EXAMPLE_IBANS, IBAN_LENGTHS, TEST_CARDS
from tests.data.make_run import make_prompt, make_trace


def reason(text: str, **settings: object) -> str:
    return apply(make_trace(make_prompt("What is 2 + 2?"), text), PersonalDataFilter.model_validate(settings))


def completed(digits: str) -> str:
    """A number whose last digit makes the sum hold: made up here, nobody's."""
    return next(digits + last for last in "0123456789" if luhn(digits + last))


def account(country: str, body: str) -> str:
    """An IBAN with its check digits."""
    number = int("".join(str(int(character, 36)) for character in body + country + "00"))
    return f"{country}{98 - number % 97:02}{body}"


CARD = completed("453278914062573")
FOUND = [
    ("email", "Write to m.oberhuber@tracemail.net today."),
    ("email", "<k.yamamoto-82@kyodai.ac.jp>"),
    ("email", "Contact: pelle.svensson+lists@mail.se."),
    ("email", "mailto:OBERHUBER@TRACEMAIL.ORG"),
    ("phone", "Call me at (212) 736-5091."),
    ("phone", "phone: 415-867-5409"),
    ("phone", "Tel. +49 30 90182046"),
    ("phone", "my mobile is +44 20 7946 1832, ask for Ann"),
    ("phone", "手机：+86 138 1039 2746"),
    ("card", f"card number {CARD}"),
    ("card", f"Visa {CARD[:4]} {CARD[4:8]} {CARD[8:12]} {CARD[12:]}"),
    ("card", f"credit card: {completed('37491827364501')}"),
    ("iban", f"IBAN {account('DE', '500105175407324931')}"),
    ("iban", "Pay to " + " ".join(account("GB", "BARC20038461729405")[at : at + 4] for at in range(0, 22, 4)) + "."),
    ("iban", account("FR", "30006000017283940516X84")),
]


@pytest.mark.parametrize(("kind", "text"), FOUND)
def test_personal_data_is_found_and_its_kind_alone_is_named(kind: str, text: str) -> None:
    assert reason(text) == f"personal_data:{kind}"
    assert reason(text, kinds=tuple(other for other in PERSONAL_DATA_KINDS if other != kind)) == ""


EXAMPLES = [
    "user@example.com and admin@test.org",
    "john.doe@gmail.com",
    "alice@wonderland.org",
    "info@siemens.de",
    "git@github.com:owner/repository.git",
    "name@company.com, your.name@yourdomain.com, foo@bar.com",
    "x@W.sum(axis=1) and A@B.T, weights@inputs.to(device)",
    "self.attention@values.map(f)",
    "@app.route('/index') and @dataclass",
    "user17@mail.ru",
    "Twitter: @somebody.com",
    "a@b.co",
    "Call 555-0147 or (212) 555-0123.",
    "phone = 123-456-7890",
    "telephone 000-000-0000",
    "the call stack at 212 736 5091 bytes",
    "345-678-9012 is what remains of the call of the function",
    "212-736-5091",
    "Subtract: 415 - 867 - 5409 = -5861",
    "x = +49 30 90182046 + 17",
    "call f(4158675409)",
    "The call returned 2127365091 after 3 seconds.",
    "phone 800-911-4321",
    "The product is 4532789140625731 * 3.",
    f"{CARD} is a large number.",
    f"card 4111 1111 1111 1111, and {CARD} as a Luhn example",
    "credit card 4242424242424242",
    "credit 4532789140625730",
    "amex card 3782 822463 10005",
    "debit 1234567812345670",
    "IBAN DE89 3704 0044 0532 0130 00",
    "IBAN DE12 5001 0517 5407 3249 31",
    "AB12 CD34 EF56 GH78 IJ90",
    "GB82 WEST 1234 5698 7654 32",
    "DE00",
    "304+713. 4+3+0=07, 0+1+0=01, 3+7+0=10. 1017",
    "pi = 3.14159265358979323846264338327950288419716939937510",
    "cards 1 2 3 4 5 6 7 8 9 10 11 12 13",
    "Dial 4 on 2026-11-22 15:36:55, ISBN 978-3-16-148410-0.",
    "192.168.178.201 and 2001:0db8:85a3:0000:0000:8a2e:0370:7334",
]


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_sums_and_code_are_nobody_s_data(text: str) -> None:
    assert reason(text) == ""


def test_the_prompt_is_looked_at_where_the_recipe_says_so() -> None:
    trace = make_trace(make_prompt("Who is m.oberhuber@tracemail.net?"))
    assert (apply(trace, PersonalDataFilter()), apply(trace, PersonalDataFilter(prompts=True))) == ("", "personal_data:email")


@settings(max_examples=40, deadline=None)
@given(st.text("0123456789", min_size=2, max_size=19))
def test_the_checksum_is_that_of_the_definition(digits: str) -> None:
    """From the right, every second digit doubled and its digits added."""
    doubled = "".join(str(int(digit) * (1 + index % 2)) for index, digit in enumerate(reversed(digits)))
    assert luhn(digits) == (sum(map(int, doubled)) % 10 == 0)


def test_the_lists_of_examples_are_well_formed() -> None:
    assert all(len(iban) == IBAN_LENGTHS[iban[:2]] for iban in EXAMPLE_IBANS)
    assert [number for number in sorted(TEST_CARDS) if not luhn(number)] == []
