"""Sizes as people write and read them."""

import pytest
from huggingface_hub.serialization._base import parse_size_to_int
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.errors import UsageError
from converter.sizes import parse_size, size_text


@settings(max_examples=200)
@given(
    st.integers(1, 999),
    st.sampled_from(["", ".5", ".25"]),
    st.sampled_from(["KB", "mb", "GB", "Tb"]),
)
def test_sizes_are_parsed_as_huggingface_hub_does(number: int, rest: str, unit: str) -> None:
    for text in (f"{number}{rest}{unit}", f" {number}{rest} {unit} "):
        assert parse_size(text) == parse_size_to_int(text)


def test_a_size_without_a_unit_is_in_bytes() -> None:
    assert parse_size("1500000") == 1_500_000


@pytest.mark.parametrize(
    "text",
    [
        *("", "GB", "0", "0GB", "-1GB", "1e3GB", "nanGB", "infGB", "5GiB", "5 G", "1,5GB", "٣GB"),
        *("9" * 5000 + "GB", "0.0000001KB", "1_000MB"),
    ],
)
def test_invalid_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0.0 kB"),
        (999_949, "999.9 kB"),
        (10**6, "1.00 MB"),
        (3_360_000, "3.36 MB"),
        (10**9, "1.00 GB"),
        (2_514_000_000_000, "2514.00 GB"),
    ],
)
def test_a_size_has_the_largest_unit_that_fits(count: int, text: str) -> None:
    assert size_text(count) == text


def test_sizes_that_are_compared_are_written_in_one_unit() -> None:
    assert size_text(50_000_000, "GB") == "0.05 GB"
    assert size_text(5 * 10**9, "MB") == "5000.00 MB"
