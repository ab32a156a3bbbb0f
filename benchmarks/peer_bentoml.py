"""The peer's service on BentoML, without and with its adaptive batching.

Started as `bentoml serve benchmarks.peer_bentoml:Single` or `:Batched`; the variable PEER_FOLDER
names the model's folder. Batches come as multipart forms: a service that takes lists takes no bare
body.
"""

import os
from pathlib import Path
from typing import Annotated

import bentoml  # pyrefly: ignore[missing-import] (in the environment of the peer only)
from bentoml.validators import ContentType  # pyrefly: ignore[missing-import]

from benchmarks.peer_model import PeerModels

WORKERS = 2
Answer = dict[str, object]


@bentoml.service(workers=WORKERS, traffic={"timeout": 30}, logging={"access": {"enabled": False}})
class Single:
    """Each request by itself."""

    def __init__(self) -> None:
        self.models = PeerModels(Path(os.environ["PEER_FOLDER"]), 1)

    @bentoml.api(route="/predict")
    def predict(self, image: Annotated[Path, ContentType("image/jpeg")], /) -> Answer:  # noqa: D102
        return self.models.answers([image.read_bytes()])[0][0]


@bentoml.service(workers=WORKERS, traffic={"timeout": 30}, logging={"access": {"enabled": False}})
class Batched:
    """Requests that wait together run together."""

    def __init__(self) -> None:
        self.models = PeerModels(Path(os.environ["PEER_FOLDER"]), 1)

    @bentoml.api(route="/predict", batchable=True, max_batch_size=8, max_latency_ms=1000)
    def predict(self, image: list[Annotated[Path, ContentType("image/jpeg")]]) -> list[Answer]:  # noqa: D102
        return [answer[0] for answer in self.models.answers([path.read_bytes() for path in image])]
