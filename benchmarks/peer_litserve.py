"""The peer's server on LitServe: `PYTHON -m benchmarks.peer_litserve FOLDER PORT MODELS BATCH`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import litserve  # pyrefly: ignore[missing-import] (in the environment of the peer only)
from fastapi import Depends, Request

from benchmarks.peer_model import PeerModels

WORKERS = 2
BATCH_WAIT_S = 0.005


async def raw_body(request: Request) -> bytes:
    """The body as it came: as JSON with base64, LitServe's default, it would cost more."""
    return await request.body()


class Api(litserve.LitAPI):
    """One or more models behind one address."""

    def setup(self, device: str) -> None:
        """Load the models in a worker."""
        del device
        self.models = PeerModels(FOLDER, NUM_MODELS)

    def decode_request(self, request: Annotated[bytes, Depends(raw_body)]) -> bytes:
        """The picture's bytes."""
        return request

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        """A batch is decoded and stacked where it is run."""
        return inputs

    def unbatch(self, output: list[Any]) -> list[Any]:
        """One answer a request."""
        return output

    def predict(self, x: Any) -> Any:
        """Answer one request, or a batch."""
        return self.models.answers(x if MAX_BATCH > 1 else [x])

    def encode_response(self, output: Any) -> dict[str, object]:
        """The same JSON as ours."""
        return {"results": output if MAX_BATCH > 1 else output[0]}


FOLDER, PORT, NUM_MODELS, MAX_BATCH = Path(sys.argv[1]), *map(int, sys.argv[2:5])

if __name__ == "__main__":
    api = Api(max_batch_size=MAX_BATCH, batch_timeout=BATCH_WAIT_S if MAX_BATCH > 1 else 0.0)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=WORKERS)
    server.run(host="127.0.0.1", port=PORT, log_level="critical", generate_client_file=False)
