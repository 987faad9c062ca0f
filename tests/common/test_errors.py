"""The one table: every class can be told to HTTP and gRPC clients, and found again by its code."""

from __future__ import annotations

import grpc
import pytest

from tandem.common import errors


def leaves(cls: type[errors.TandemError]) -> set[type[errors.TandemError]]:
    ours = {sub for sub in cls.__subclasses__() if sub.__module__ == errors.__name__}
    return ours.union(*(leaves(sub) for sub in ours))


def test_the_table_is_complete() -> None:
    assert set(errors.ALL) == leaves(errors.TandemError)


def test_codes_are_unique() -> None:
    assert len(errors.BY_CODE) == len(errors.ALL)
    assert {code: cls.code for code, cls in errors.BY_CODE.items()} == {code: code for code in errors.BY_CODE}


@pytest.mark.parametrize("cls", errors.ALL, ids=lambda cls: cls.__name__)
def test_each_has_a_status_for_every_boundary(cls: type[errors.TandemError]) -> None:
    assert 400 <= cls.http_status < 600
    assert grpc.StatusCode[cls.grpc_code] is not grpc.StatusCode.OK
    assert cls.type
    error = cls("what", param="p", retry_after=1.0)
    assert (str(error), error.message, error.param, error.retry_after) == ("what", "what", "p", 1.0)
    if issubclass(cls, errors.InvalidRequest):
        assert cls.http_status < 500
        assert not cls.retryable
