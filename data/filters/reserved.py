"""What stands for nobody: names, numbers and domains that standards, networks and habit keep for examples."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ENDINGS = _words("""
    com org net edu gov mil int info biz io ai dev app co me eu uk de fr es it nl be ch at se no fi dk pl cz sk hu ro bg gr pt
    ie ru ua tr il in cn jp kr tw hk sg my th id ph vn au nz ca us mx br ar cl za ng ke eg
""")
"""Top-level domains where people have their mail. `x@W.sum` is a product of matrices, and the whole list of 1,500 holds `map`."""

EXAMPLE_DOMAINS = _words("""
    example test invalid localhost domain mydomain yourdomain otherdomain email company mycompany yourcompany acme corp
    org site website foo bar baz foobar host server sample demo somewhere anywhere school university b c x y abc xyz
""")
"""Labels of a domain: RFC 2606 and what else is written for "some company"."""

EXAMPLE_LOCALS = _words("""
    a b c x y user username users test testing tester example sample foo bar foobar name first last firstname lastname
    first.last firstname.lastname john jane doe johndoe janedoe john.doe jane.doe jane.smith john.smith jsmith jdoe alice bob
    carol charlie dave eve mallory you your yourname your.name your_name your_email youremail me email mail someone somebody
    anyone nobody admin root info support contact hello help sales service team office hr billing noreply no-reply donotreply
    webmaster postmaster git abuse security
""")
"""Before the at sign, digits at the end left out: placeholders, and addresses of offices rather than persons."""

TEST_CARDS = _words("""
    4111111111111111 4242424242424242 4012888888881881 4000056655665556 4000000000000002 4222222222222 5555555555554444
    5105105105105100 5200828282828210 5425233430109903 2223003122003222 2222405343248877 378282246310005 371449635398431
    378734493671000 6011111111111117 6011000990139424 6011981111111113 4532015112830366 4539148803436467 4556737586899855
    4916338506082832 4485275742308327
""")
"""What card networks and payment processors publish for testing, and what texts about checksums copy."""

EXAMPLE_IBANS = _words("""
    GB82WEST12345698765432 GB29NWBK60161331926819 DE89370400440532013000 FR1420041010050500013M02606
    FR7630006000011234567890189 ES9121000418450200051332 NL91ABNA0417164300 IT60X0542811101000000123456 CH9300762011623852957
    BE68539007547034 AT611904300234573201 PL61109010140000071219812874 SE4550000000058398257466 NO9386011117947
    DK5000400440116243
""")
"""The SWIFT registry's own, and those of textbooks."""

IBAN_LENGTHS = {
    "AT": 20, "BE": 16, "BG": 22, "CH": 21, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "EE": 20, "ES": 24, "FI": 18, "FR": 27,
    "GB": 22, "GR": 27, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IS": 26, "IT": 27, "LI": 21, "LT": 20, "LU": 20, "LV": 21,
    "MC": 27, "MT": 31, "NL": 18, "NO": 15, "PL": 28, "PT": 25, "RO": 24, "RS": 22, "SA": 24, "SE": 24, "SI": 19, "SK": 24,
    "TR": 26, "UA": 29, "AE": 23,
}  # fmt: skip
"""Characters by country (SWIFT IBAN registry, the larger countries)."""
