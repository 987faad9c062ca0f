from __future__ import annotations

import pytest

from tandem.cluster.scale import parse_sizes
from tandem.common.errors import ConfigError


def test_sizes() -> None:
    assert parse_sizes(["prefill=2", "decode=3"]) == {"prefill": 2, "decode": 3}
    assert parse_sizes(["prefill=0"]) == {"prefill": 0}


@pytest.mark.parametrize("size", ["prefill", "prefill=", "prefill=-1", "prefill=two", "router=1", "decode=0", "=1"])
def test_sizes_that_mean_nothing(size: str) -> None:
    with pytest.raises(ConfigError, match=size):
        parse_sizes([size])


def test_a_role_named_twice() -> None:
    with pytest.raises(ConfigError, match="decode=2"):
        parse_sizes(["decode=1", "decode=2"])
