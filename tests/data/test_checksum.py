import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UnusableInput
from data.checksum import checked_json, parse_checked

JSON = st.dictionaries(st.text(max_size=8), st.recursive(st.integers() | st.text(max_size=8), st.lists, max_leaves=5), min_size=1)


@given(JSON, st.sampled_from([None, 1]))
def test_what_was_written_is_read_and_plain_json_sees_it_too(value: dict, indent: int | None) -> None:
    value.pop("checksum", None)
    value["rows"] = {"nested": {}}
    content = checked_json(value, indent=indent)
    assert parse_checked(Path("m.json"), content) == value
    assert {key: kept for key, kept in json.loads(content).items() if key != "checksum"} == value


@pytest.mark.parametrize("indent", [None, 1])
def test_every_single_flipped_bit_and_every_cut_is_noticed(indent: int | None) -> None:
    content = checked_json({"rows": 3, "facts": {"cost": 0.25, "names": ["stop", "length"]}}, indent=indent)
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(UnusableInput, match="m.json: not the bytes that were written"):
            parse_checked(Path("m.json"), bytes(damaged))
    for length in range(len(content)):
        with pytest.raises(UnusableInput):
            parse_checked(Path("m.json"), content[:length])


def test_a_manifest_without_a_checksum_is_not_believed() -> None:
    with pytest.raises(UnusableInput, match="the release that wrote it"):
        parse_checked(Path("m.json"), b'{"rows": 3}\n')
