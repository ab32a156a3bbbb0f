"""Bodies of inference requests, whatever is in them: read, or refused as the caller's mistake.

No fleet runs beside these: checked annotations draw random numbers in its threads, and hypothesis
takes that for a strategy's doing.
"""

from __future__ import annotations

import json
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve.http.oip.request import read_request
from serve.http.oip.tensors import TensorSpec
from serve.http.problems import RequestError

ANY_TIME = settings(deadline=None)  # a machine may be busy
IMAGE = TensorSpec("image", "BYTES", (-1,))


@ANY_TIME
@given(body=st.binary(max_size=120), length=st.integers(0, 120))
@example(body=b"{}", length=2)
@example(body=b'{"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES"}]}', length=66)
def test_any_bytes_are_a_request_or_the_callers_mistake(body: bytes, length: int) -> None:
    """Never a failure of ours."""
    _read_or_refuse(body, min(length, len(body)))


TENSORS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["image", "other"]),
        "datatype": st.sampled_from(["BYTES", "FP32"]),
        "shape": st.lists(st.integers(-1, 2**63) | st.just(1), max_size=3),
        "data": st.recursive(
            st.none() | st.integers() | st.text(max_size=5) | st.booleans(),
            lambda inner: st.lists(inner, max_size=3),
        ),
        "parameters": st.dictionaries(
            st.sampled_from(["binary_data_size", "x"]), st.integers(-1, 9) | st.none(), max_size=2
        ),
    }
)


@ANY_TIME
@given(inputs=st.lists(TENSORS, max_size=2), raw=st.binary(max_size=20))
def test_what_is_nearly_a_request_is_one_or_the_callers_mistake(
    inputs: list[dict[str, Any]], raw: bytes
) -> None:
    """The same with bodies that come closer."""
    header = json.dumps({"inputs": inputs}).encode()
    _read_or_refuse(header + raw, len(header))


def _read_or_refuse(body: bytes, length: int) -> None:
    """Read a request about pictures; what is read has as many rows as it says."""
    try:
        request, elements = read_request(body, length, IMAGE, max_rows=3)
    except RequestError as refused:
        status = refused.status
    else:
        status, rows = 200, request.inputs[0].shape[0] if length else 1
        assert len(elements) == rows
    assert status in {200, 400}
