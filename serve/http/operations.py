"""What each route takes and answers, for the OpenAPI schema: names, types, examples, errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from export.bundle import TaskName
from serve import answers
from serve.http.described import (
    CALLER,
    JSON,
    KEY,
    TIMEOUT,
    Operation,
    Parameter,
    query,
)
from serve.http.oip import operations as oip
from serve.task_settings import TaskSettings

PICTURE = ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
FORM = "multipart/form-data"


PATH_PARAMETERS = {
    **oip.PARAMETERS,
    "task": Parameter("task", "path", TaskName, "The task.", "pets", is_required=True),
    "digest": Parameter(
        "digest",
        "path",
        Annotated[str, Field(min_length=8)],
        "As answers name it, or its first eight digits or more.",
        "0f3a9c55",
        is_required=True,
    ),
    "token_id": Parameter(
        "token_id", "path", str, "An access token.", "1f2e3d4c5b6a", is_required=True
    ),
    "key_id": Parameter(
        "key_id", "path", str, "Id of a signing key.", "8d23ab90", is_required=True
    ),
}

Count = Annotated[int, Field(ge=1, le=999_999)]
Number = Annotated[int, Field(ge=1, lt=10**15)]
Share = Annotated[float, Field(gt=0, lt=1)]

TOP = query("top", Count, "How many scores to answer, the best first.", 3)
MESSAGE = query("message", str, "Why; shown by the history.", "more pictures of cats")
EXPECTED = query("expected", Number, "Refuse unless this version is live.", 7)
NEW_LABELS = query("new_labels", bool, "Declare that the labels change.", None)
DRY_RUN = query("dry_run", bool, "Only ask the gates.", None)

PICTURES: Mapping[str, Any] = {
    **dict.fromkeys(PICTURE, None),
    FORM: "image",
    JSON: answers.Base64Picture,
}
VERSIONED = {
    "x-headstock-version": "Version of the task that answers.",
    "x-headstock-bundle": "Its bundle.",
}
PREDICTION_ERRORS = (400, 404, 413, 415, 503)
CHANGE_ERRORS = (400, 404, 409, 413, 503)

OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("POST", "/predict/{task}"): Operation(
        "Ask one task of a picture, or of several.",
        "predictions",
        answers.Result | answers.Results,
        body=PICTURES,
        parameters=(TOP, TIMEOUT, CALLER),
        errors=PREDICTION_ERRORS,
        headers=VERSIONED,
    ),
    ("POST", "/predict"): Operation(
        "Ask several tasks of a picture, all from one snapshot of versions.",
        "predictions",
        answers.ResultsOfTasks,
        body=PICTURES,
        parameters=(
            query(
                "tasks",
                Annotated[str, Field(min_length=1)],
                "Names with commas between them, or * for all.",
                "pets,colours",
                is_required=True,
            ),
            TOP,
            TIMEOUT,
            CALLER,
        ),
        errors=PREDICTION_ERRORS,
    ),
    ("GET", "/tasks"): Operation("What is live.", "tasks", answers.Live, errors=(503,)),
    ("GET", "/tasks/{task}"): Operation(
        "What is live of one task.", "tasks", answers.TaskDetails, errors=(404, 503)
    ),
    ("PATCH", "/tasks/{task}"): Operation(
        "Change settings of a task on every replica.",
        "tasks",
        answers.TaskState,
        body={JSON: TaskSettings},
        parameters=(MESSAGE, KEY),
        errors=CHANGE_ERRORS,
    ),
    ("DELETE", "/tasks/{task}"): Operation(
        "Retire a task: it answers nothing any more.",
        "changes",
        answers.Swapped,
        parameters=(EXPECTED, MESSAGE, KEY),
        errors=(400, 404, 409, 503),
    ),
    ("GET", "/tasks/{task}/versions"): Operation(
        "Every version of a task and every change of its settings, oldest first.",
        "history",
        answers.History,
        errors=(404, 503),
    ),
    ("GET", "/tasks/{task}/card"): Operation(
        "The model card of the live bundle.",
        "tasks",
        media_type="text/markdown",
        errors=(404, 503),
    ),
    ("GET", "/tasks/{task}/diff"): Operation(
        "What changed between two versions.",
        "history",
        answers.Diff,
        parameters=(
            query("a", Number, "The first version.", 1, is_required=True),
            query("b", Number, "The second version.", 2, is_required=True),
        ),
        errors=(400, 404, 503),
    ),
    ("PUT", "/tasks/{task}/heldout"): Operation(
        "Replace the pictures that pushes of a task are compared on.",
        "tasks",
        answers.TaskState,
        body={"application/octet-stream": None},
        parameters=(EXPECTED, MESSAGE, KEY),
        errors=(*CHANGE_ERRORS, 422),
    ),
    ("POST", "/tasks/{task}/versions"): Operation(
        "Push a bundle; answers when it is live on every replica.",
        "changes",
        answers.Swapped | answers.DryRun,
        body={"application/zip": None},
        parameters=(
            query("canary", Share, "Share of the callers that it answers for now.", 0.1),
            query("shadow", bool, "Let it answer nobody, and only be compared.", None),
            NEW_LABELS,
            DRY_RUN,
            MESSAGE,
            KEY,
        ),
        errors=(*CHANGE_ERRORS, 422),
    ),
    ("POST", "/versions"): Operation(
        "Push bundles of several tasks, which go live in one moment or not at all.",
        "changes",
        answers.SwappedTogether | answers.DryRunTogether,
        body={FORM: "bundle"},
        parameters=(NEW_LABELS, DRY_RUN, MESSAGE, KEY),
        errors=(*CHANGE_ERRORS, 422),
    ),
    ("POST", "/trunks"): Operation(
        "Put a new trunk with a bundle of every live task in place of the one that is served.",
        "changes",
        answers.TrunkSwapped | answers.TrunkDryRun,
        body={FORM: "trunk bundle"},
        parameters=(NEW_LABELS, DRY_RUN, MESSAGE, KEY),
        errors=(*CHANGE_ERRORS, 422),
    ),
    ("POST", "/trunks/rollback"): Operation(
        "Serve the trunk before again, with the bundles that were live on it.",
        "changes",
        answers.TrunkSwapped,
        body={JSON: answers.TrunkRollback},
        is_body_required=False,
        parameters=(KEY,),
        errors=CHANGE_ERRORS,
    ),
    ("POST", "/tasks/{task}/promote"): Operation(
        "Make the candidate of a rollout live, or give it another share.",
        "changes",
        answers.Swapped,
        body={JSON: answers.Promotion},
        is_body_required=False,
        parameters=(KEY,),
        errors=CHANGE_ERRORS,
    ),
    ("POST", "/tasks/{task}/rollback"): Operation(
        "Make an older bundle live again, as a new version.",
        "changes",
        answers.Swapped,
        body={JSON: answers.Rollback},
        is_body_required=False,
        parameters=(KEY,),
        errors=CHANGE_ERRORS,
    ),
    ("GET", "/keys"): Operation(
        "The keys that may sign bundles.", "keys", answers.SigningKeys, errors=(503,)
    ),
    ("POST", "/keys"): Operation(
        "Trust a signing key, or change how far.",
        "keys",
        answers.SigningKey,
        body={JSON: answers.Trust},
        parameters=(KEY,),
        errors=(400, 409, 413, 422, 503),
    ),
    ("DELETE", "/keys/{key_id}"): Operation(
        "Trust a signing key no more.",
        "keys",
        answers.SigningKey,
        parameters=(MESSAGE, KEY),
        errors=(400, 404, 409, 503),
    ),
    ("GET", "/tokens"): Operation(
        "The access tokens.", "tokens", answers.AccessTokens, errors=(503,)
    ),
    ("POST", "/tokens"): Operation(
        "Let a token open this service from now on.",
        "tokens",
        answers.AccessToken,
        body={JSON: answers.NewToken},
        parameters=(KEY,),
        errors=(400, 409, 413, 503),
    ),
    ("DELETE", "/tokens/{token_id}"): Operation(
        "Let a token open nothing any more.",
        "tokens",
        answers.AccessToken,
        parameters=(MESSAGE, KEY),
        errors=(400, 404, 409, 503),
    ),
    ("GET", "/bundles/{digest}"): Operation(
        "Where a bundle came from, and where it was live.",
        "history",
        answers.KnownBundle,
        errors=(400, 404, 503),
    ),
    ("GET", "/log"): Operation(
        "Every record of the head log, one a line, as it is stored.",
        "history",
        media_type="application/x-ndjson",
        parameters=(
            query(
                "after", Annotated[int, Field(ge=0, lt=10**15)], "From the record after this.", 0
            ),
        ),
        errors=(400, 503),
    ),
    ("GET", "/metrics"): Operation(
        "Prometheus text of the whole fleet.",
        "operation",
        media_type="text/plain",
        errors=(503,),
    ),
    **oip.OPERATIONS,
    ("GET", "/openapi.json"): Operation("This schema.", "documentation", dict[str, Any]),
    ("GET", "/docs"): Operation(
        "This schema as a page to read and to try.", "documentation", media_type="text/html"
    ),
    ("GET", "/docs/rapidoc-min.js"): Operation(
        "What draws the page.", "documentation", media_type="text/javascript"
    ),
}
