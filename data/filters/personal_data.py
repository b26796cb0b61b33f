"""Does somebody's address, telephone, account or card number stand in a text?

For precision before recall: reasoning is full of numbers, and most addresses in it are made up. What the standards reserve for
examples passes (RFC 2606 domains, the 555 exchange, the card networks' test numbers), checksums have to hold, and a number that
arithmetic could have made (each of them) needs a word before it that says what it is.
"""

import re
from collections.abc import Callable, Iterator

from configs.filters import PersonalDataFilter, PersonalDataKind
from data.filters.reserved import ENDINGS, EXAMPLE_DOMAINS, EXAMPLE_IBANS, EXAMPLE_LOCALS, IBAN_LENGTHS, TEST_CARDS
from data.filters.texts import Filtered, asked, in_lower_case, said


def personal_data(trace: Filtered, settings: PersonalDataFilter) -> str:
    """`personal_data:KIND` of the first kind, in the order of configs.filters.PersonalDataKind, of which a text holds one."""
    texts = (*said(trace), *(asked(trace) if settings.prompts else ()))
    return next((f"personal_data:{kind}" for kind in sorted(settings.kinds) if any(map(_HOLDS[kind], texts))), "")


# --- e-mail ------------------------------------------------------------------------------------------------------

_LOCAL = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._%+-"
_DOMAIN = re.compile(r"((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,4})([A-Za-z]{2,12})(?![A-Za-z0-9_(]|\.[A-Za-z0-9])")


def _email(text: str) -> bool:
    at = text.find("@")
    while at >= 0:
        domain = _DOMAIN.match(text, at + 1)
        if domain is not None and domain[2].lower() in ENDINGS:
            before = text[max(0, at - 64) : at]
            local = before[len(before.rstrip(_LOCAL)) :].strip(".")
            if len(local) > 1 and not _is_example(local.lower(), domain[1].lower()):
                return True
        at = text.find("@", at + 1)
    return False


def _is_example(local: str, labels: str) -> bool:
    names = labels.rstrip(".").split(".")
    return local.split("+")[0].rstrip("0123456789_.-") in EXAMPLE_LOCALS or not EXAMPLE_DOMAINS.isdisjoint(names)


# --- numbers -----------------------------------------------------------------------------------------------------

# A run of digits with at most one separator between two of them. Arithmetic's signs end it.
# The look behind stands after the first character: a pattern that begins with a set of characters is searched for in C.
_DIGITS = re.compile(r"[(+0-9](?<![0-9A-Za-z.,$+=*/^-].)(?:[ .)-]{0,2}[0-9]){8,24}(?![0-9A-Za-z]|[.,][0-9]| ?[=+*/^])")
_BESIDE = 48
"""Characters before a number in which the word may stand that says what it is."""
_PHONE_HINTS = ("phone", "tel", "call", "mobile", "cell", "fax", "whatsapp", "dial", "reach", "电话", "手机")
_PHONE_WORD = re.compile(
    r"\b(?:tele)?phone|\btel\b|\bmobile|\bcell\b|\bfax\b|\bwhatsapp|电话|手机"
    # What a program or a player calls is seldom a person: here the number has to follow at once.
    r"|\b(?:call|dial|reach)(?: (?:me|us|him|her|them|now|today))?(?: (?:at|on))?:? *$",
)
_CARD_HINTS = ("card", "visa", "amex", "american express", "credit", "debit", "信用卡", "银行卡")
_CARD_WORD = re.compile(r"\bcards?\b|\bvisa\b|master ?card|\bamex\b|american express|\bcredit\b|\bdebit\b|信用卡|银行卡")
_NORTH_AMERICAN = re.compile(r"(?:\+?1[ .-]?)?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}[ .-])([2-9][0-9]{2})[ .-]([0-9]{4})")
_INTERNATIONAL = re.compile(r"\+[1-9](?:[ .()-]{0,2}[0-9]){7,14}")
_GROUPED_CARD = re.compile(r"[0-9]{4}([ -])[0-9]{4}\1[0-9]{4}\1[0-9]{1,7}|3[47][0-9]{2}([ -])[0-9]{6}\2[0-9]{5}")
_NETWORKS = re.compile(
    r"4(?:[0-9]{12}|[0-9]{15})"  # Visa
    r"|5[1-5][0-9]{14}|2(?:22[1-9]|2[3-9][0-9]|[3-6][0-9]{2}|7[01][0-9]|720)[0-9]{12}"  # Mastercard
    r"|3[47][0-9]{13}"  # American Express
    r"|6(?:011|5[0-9]{2})[0-9]{12}"  # Discover
)


def _numbers(text: str, hints: tuple[str, ...], word: re.Pattern[str]) -> Iterator[str]:
    """Each long run of digits that has the word beside it; hints: of which one is in every text with such a word."""
    lowered = in_lower_case(text)
    if any(hint in lowered for hint in hints):
        for found in _DIGITS.finditer(lowered):
            if word.search(lowered, max(0, found.start() - _BESIDE), found.start()):
                yield found[0]


def _phone(text: str) -> bool:
    return any(map(_is_phone, _numbers(text, _PHONE_HINTS, _PHONE_WORD)))


def _is_phone(number: str) -> bool:
    """A North American number with an exchange other than 555 and n11, or one with another country's code."""
    digits = re.sub("[^0-9]", "", number)
    # 555-0100 to 555-0199 are reserved for fiction, and writers use all of the exchange.
    if "555" in number or len(set(digits)) < 4 or "1234567" in digits:
        return False
    if (local := _NORTH_AMERICAN.fullmatch(number)) is not None:
        return not local[1].endswith("11")
    return not number.startswith("+1") and _INTERNATIONAL.fullmatch(number) is not None


def _card(text: str) -> bool:
    # Who explains the checksum makes numbers up for it.
    return any(map(_is_card, _numbers(text, _CARD_HINTS, _CARD_WORD))) and "luhn" not in in_lower_case(text)


def _is_card(number: str) -> bool:
    digits = number.replace(" ", "").replace("-", "")
    if _NETWORKS.fullmatch(digits) is None or digits in TEST_CARDS or len(set(digits)) < 5 or not luhn(digits):
        return False
    return digits == number or _GROUPED_CARD.fullmatch(number) is not None


def luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B."""
    total = 0
    for index, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if index % 2 else 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


# --- accounts ----------------------------------------------------------------------------------------------------

_IBAN = re.compile(r"[A-Z](?<![A-Za-z0-9].)[A-Z][0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")


def _iban(text: str) -> bool:
    return any(_is_iban(found[0].replace(" ", "")) for found in _IBAN.finditer(text))


def _is_iban(value: str) -> bool:
    if len(value) != IBAN_LENGTHS.get(value[:2]) or value in EXAMPLE_IBANS:
        return False
    return int("".join(str(int(character, 36)) for character in value[4:] + value[:4])) % 97 == 1


_HOLDS: dict[PersonalDataKind, Callable[[str], bool]] = {"card": _card, "email": _email, "iban": _iban, "phone": _phone}
