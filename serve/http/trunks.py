"""`POST /trunks`: a new trunk with the heads of all live tasks, and the way back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping
from datetime import UTC, datetime

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from export.bundle import (
    TRUNK_MANIFEST,
    BundleError,
    Digest,
    TrunkManifest,
    check_files,
    digest_of,
    read_trunk_manifest,
)
from serve.http.access import caller_in
from serve.http.body import File, check_fields, files_in, json_object
from serve.http.changes import MAX_COMMAND_BYTES, change_by, idempotency_key, malformed
from serve.http.problems import problem_of_refusal
from serve.http.push import PARAMETERS, Beside, Push, answer_of_several, wanted_in
from serve.http.query import check_parameters, flag_in
from serve.link import Link
from serve.messages import Pushes, TrunkRollback
from serve.proposal import propose
from serve.record import TrunkChange
from serve.references import stored_files
from serve.replica import Replica
from serve.trunk_proposal import trunk_refusal
from serve.trunks import ServedTrunk, store_trunk, trunk_change


class TrunkRoutes:
    """The routes of one replica that change the trunk."""

    def __init__(self, replica: Replica, link: Link, push: Push) -> None:
        self._replica, self._link, self._push = replica, link, push

    async def push(self, request: Request) -> Response:
        """Admit a trunk with a bundle of every live task, and make all of it live in one moment."""
        check_parameters(request, *PARAMETERS)
        replica = self._replica
        sent = await files_in(request, "trunk", "bundle", max_bytes=replica.settings.max_push_bytes)
        of_trunk = [file for file in sent if file.field == "trunk"]
        manifest, files, blobs = await asyncio.to_thread(_trunk_in, of_trunk)
        wanted = await wanted_in(request, [file for file in sent if file.field == "bundle"])
        trunk = trunk_change(manifest, digest_of(files[TRUNK_MANIFEST]))
        key, message = idempotency_key(request), request.query_params.get("message", "")
        view = await asyncio.to_thread(replica.history)
        pushes = tuple(one.change for one in wanted)
        who = caller_in(request).name
        if view.made_by(key):
            asked = Pushes(pushes, key, message, who, trunk)
            return answer_of_several(propose(view, asked, datetime.now(UTC)))
        # Said before anything is loaded; and again by the conductor, as the log stands then.
        if refused := trunk_refusal(view, trunk, pushes):
            return problem_of_refusal(refused)
        async with self._beside(trunk, blobs) as beside:
            if not flag_in(request, "dry_run"):
                manifest_bytes = files.pop(TRUNK_MANIFEST)
                await asyncio.to_thread(store_trunk, replica.log, manifest_bytes, files)
            outcome = await self._push.push(
                request,
                wanted,
                lambda checked: Pushes(tuple(checked), key, message, who, trunk),
                beside,
            )
        return answer_of_several(outcome)

    async def rollback(self, request: Request) -> Response:
        """Make the trunk live again that was served before, with the bundles that it had then."""
        command = await json_object(request, max_bytes=MAX_COMMAND_BYTES)
        check_fields(command, "expected", "message")
        try:
            change = TrunkRollback(
                key=idempotency_key(request),
                message=command.get("message", ""),  # pyrefly: ignore
                expected=command.get("expected"),  # pyrefly: ignore
                who=caller_in(request).name,
            )
        except ValidationError as error:
            raise malformed(error, {"key": "idempotency-key"}) from error
        await asyncio.to_thread(self._replica.history)  # said now if the store is away
        limit_s = self._replica.settings.request_timeout_s
        return answer_of_several(await change_by(self._link, change, limit_s=limit_s))

    @contextlib.asynccontextmanager
    async def _beside(
        self, trunk: TrunkChange, blobs: Mapping[Digest, bytes]
    ) -> AsyncGenerator[Beside]:
        """The trunk, loaded for the gates; let go afterwards, also if the caller goes meanwhile."""
        loading = asyncio.ensure_future(self._push.examine(self._replica.trunks.hold, trunk, blobs))
        try:
            held = await asyncio.shield(loading)
            yield Beside(held.running.engine, trunk)
        finally:
            held = None
            await asyncio.shield(self._let_go(loading))

    async def _let_go(self, loading: asyncio.Future[ServedTrunk]) -> None:
        await asyncio.wait({loading})
        if not loading.cancelled() and loading.exception() is None:
            await asyncio.to_thread(self._replica.trunks.let_go)


def _trunk_in(
    sent: list[File],
) -> tuple[TrunkManifest, dict[str, bytes], dict[Digest, bytes]]:
    """The manifest of a trunk and the files that serving needs, `trunk.json` among them.

    Both by their names and by their digests.

    Raises:
        BundleError: a file is missing or is not as the manifest says.
    """
    files = {file.name: file.data for file in sent}
    if TRUNK_MANIFEST not in files:
        raise BundleError(
            f"There is no {TRUNK_MANIFEST}; send each file of the trunk's folder as a file named "
            "trunk, under its own name."
        )
    manifest = read_trunk_manifest(files[TRUNK_MANIFEST])
    needed = stored_files(manifest)
    check_files({name: data for name, data in files.items() if name in needed}, needed)
    wanted = {name: files[name] for name in (TRUNK_MANIFEST, *needed)}
    return manifest, wanted, {digest_of(data): data for data in wanted.values()}
