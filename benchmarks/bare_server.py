"""The same answer without Ray: one process of Starlette on uvicorn, as simple as it can be.

    python -m benchmarks.bare_server STORE TASK

Same decoding, engine and JSON as a replica. Decoding and the model run inside the event loop, in
which nothing else waits.
"""

from __future__ import annotations

import json
import socket
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from models.pictures import load_picture
from serve.batcher import Answer
from serve.contender import load_head
from serve.engine import LiveHead, Row
from serve.headlog import HeadLog
from serve.http.predict import result_of
from serve.record import LogView
from serve.trunks import load_engine


def main(store: str, task: str) -> None:
    """Serve one task until the process is ended."""
    log = HeadLog(store)
    view = log.follow(LogView())
    assert view.trunk is not None
    engine = load_engine(log, view.trunk, precision="fp32")
    change = view.tasks[task][-1].change
    assert change.bundle is not None
    bundle = log.get_served(change.bundle)
    head = LiveHead(task, change.version, bundle.digest, load_head(bundle))
    headers = {"x-headstock-version": str(head.version), "x-headstock-bundle": head.bundle}

    async def predict(request: Request) -> JSONResponse:
        picture = load_picture(await request.body(), engine.manifest.preprocessing)
        (scores,) = engine.run(picture[None], [Row(0, head)])
        assert not isinstance(scores, Exception)
        return JSONResponse(result_of(Answer(head, scores), None), headers=headers)

    app = Starlette(routes=[Route("/predict/{task}", predict, methods=["POST"])])
    with socket.create_server(("127.0.0.1", 0)) as front:
        url = f"http://127.0.0.1:{front.getsockname()[1]}/predict/{task}"
        sys.stdout.write(json.dumps({"url": url}) + "\n")
        sys.stdout.flush()
        config = uvicorn.Config(app, log_level="critical", access_log=False)
        uvicorn.Server(config).run(sockets=[front])


if __name__ == "__main__":
    main(*sys.argv[1:])
