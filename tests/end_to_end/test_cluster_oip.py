"""A standard client drives the service through its front door, over two replicas."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import pytest
from tritonclient import http as triton
from tritonclient.utils import InferenceServerException

from tests.end_to_end.callers import png
from tests.end_to_end.program import Program
from tests.serve.harness import until
from tests.serve.oracle import Heads, expected_scores, some_picture

pytestmark = pytest.mark.cluster

TASK = "standard"
PICTURE = some_picture(0)


def pictures(num_rows: int) -> Any:
    """So many rows of the one picture."""
    given = triton.InferInput("image", [num_rows], "BYTES")
    given.set_data_from_numpy(np.array([png(PICTURE)] * num_rows, dtype=object))
    return given


def test_a_standard_client_drives_the_service(service: Program, heads: Heads) -> None:
    """Versions, compression, raw pictures, statistics of both replicas, unload and load."""
    with service.client() as pusher:
        for seed in (0, 1):
            pusher.push(heads(seed, TASK), key=f"standard {seed}")
    with triton.InferenceServerClient(f"127.0.0.1:{service.port}", concurrency=4) as client:
        assert client.is_server_ready()
        assert client.get_model_metadata(TASK)["versions"] == ["1", "2"]
        for seed, version in ((0, "1"), (1, "2"), (1, "")):
            for by in (None, "gzip", "deflate"):
                asked = [
                    client.async_infer(
                        TASK,
                        [pictures(3)],
                        model_version=version,
                        request_compression_algorithm=by,
                        response_compression_algorithm=by,
                    )
                    for _ in range(4)
                ]
                for request in asked:
                    found = request.get_result().as_numpy("scores")
                    truth = np.stack([expected_scores(PICTURE, seed)] * 3)
                    np.testing.assert_allclose(found, truth, atol=1e-5)

        def rows() -> list[int]:
            told = client.get_inference_statistics(TASK)["model_stats"]
            return [entry["inference_count"] for entry in told]

        until(lambda: rows() == [36, 72])
        client.unload_model(TASK)
        assert not client.is_model_ready(TASK)
        client.load_model(TASK)
        assert client.get_model_metadata(TASK)["versions"] == ["1", "2", "4"]
        with pytest.raises(InferenceServerException, match="Request for unknown model"):
            client.infer("standart", [pictures(1)])
    raw = httpx.post(
        f"{service.url}/v2/models/{TASK}/infer",
        content=png(PICTURE),
        headers={"inference-header-content-length": "0"},
    )

    assert raw.status_code == 200
    assert raw.headers["x-headstock-version"] == "4"
