"""What the service answers, as types: callers read them, and the OpenAPI schema is made of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, GetPydanticSchema
from typing_extensions import TypedDict

from export.bundle import Digest, Manifest, Sha256, TaskName
from serve.access import Rate, Scope, TokenId
from serve.rollout import Trial
from serve.task_settings import TaskSettings
from serve.trust import KeyName

Version = Annotated[int, Field(ge=1, description="Numbers the states that a task was in.")]
RecordNumber = Annotated[int, Field(ge=1, description="The record of the head log that says so.")]


def _described_as(kind: Any) -> GetPydanticSchema:
    """For a part that callers read as it comes, and that has a type of its own in here."""
    return GetPydanticSchema(lambda _, handler: handler.generate_schema(kind))


SettingsTold = Annotated[dict[str, bool | int | float | None], _described_as(TaskSettings)]
ManifestTold = Annotated[dict[str, Any], _described_as(Manifest)]
TrialTold = Annotated[dict[str, Any], _described_as(Trial)]
Moment = Annotated[str, Field(description="UTC, ISO 8601.", examples=["2026-11-21T20:00:00Z"])]


class Result(TypedDict):
    """What one version of a task says of a picture."""

    task: TaskName
    version: Version
    bundle: Digest
    label: Annotated[str, Field(description="The label of the best score.", examples=["cat"])]
    score: Annotated[float, Field(description="The best score.", examples=[0.97])]
    labels: NotRequired[
        Annotated[
            list[str],
            Field(
                description="The labels whose score reaches its threshold, in the order of the "
                "labels, perhaps none; only of tasks that give any number of labels.",
                examples=[["cat", "outdoors"]],
            ),
        ]
    ]
    scores: Annotated[
        dict[str, float],
        Field(description="By label; with `top` the best ones, best first."),
    ]


class Results(TypedDict):
    """One result for each picture, in their order."""

    results: list[Result]


class ResultOfPicture(Result):
    """What one version of a task says of one of several pictures."""

    picture: NotRequired[
        Annotated[int, Field(ge=0, description="Which picture; only if there are several.")]
    ]


class ResultsOfTasks(TypedDict):
    """One result for each picture and task, all from one snapshot of versions."""

    results: list[ResultOfPicture]


class Gate(TypedDict):
    """What one admission gate said."""

    task: Annotated[str, Field(description="Whose bundle it looked at; empty: the only one.")]
    gate: str
    passed: bool
    reason: str
    skipped: Annotated[bool, Field(description="It did not look, and so did not refuse.")]


class Swap(TypedDict):
    """What a swap took."""

    stage_ms: Annotated[float, Field(ge=0, description="Until every replica had loaded it.")]
    hold_ms: Annotated[float, Field(ge=0, description="How long rows of the task waited.")]
    replicas: Annotated[int, Field(ge=0, description="On how many it is live.")]


class Swapped(TypedDict):
    """A version that is live on every replica."""

    task: TaskName
    version: Version
    bundle: Digest | None
    repeated: Annotated[bool, Field(description="Its idempotency key had made it before.")]
    swap: Swap


class WouldMake(TypedDict):
    """What a push would make."""

    version: Version
    action: str
    bundle: Digest
    labels: list[str]
    heldout: Annotated[Digest | None, Field(description="The held-out sample that it brings.")]


class DryRun(TypedDict):
    """What the gates say of a push that was not made."""

    task: TaskName
    dry_run: Literal[True]
    would_make: WouldMake
    gates: list[Gate]


class MadeVersion(TypedDict):
    """A version of one of several tasks."""

    task: TaskName
    version: Version
    bundle: Digest | None


class SwappedTogether(TypedDict):
    """Versions of several tasks that went live in one moment."""

    versions: list[MadeVersion]
    repeated: Annotated[bool, Field(description="Its idempotency key had made them before.")]
    swap: Swap


class WouldMakeOne(TypedDict):
    """What a push of several would make of one task."""

    task: TaskName
    would_make: WouldMake
    gates: list[Gate]


class DryRunTogether(TypedDict):
    """What the gates say of a push of several that was not made."""

    dry_run: Literal[True]
    versions: list[WouldMakeOne]


class TrunkSwapped(SwappedTogether):
    """A trunk that went live, and the versions of all tasks that did with it."""

    trunk: Digest


class TrunkDryRun(DryRunTogether):
    """What the gates say of a trunk with its bundles, none of which was made live."""

    trunk: Digest


class Signer(TypedDict):
    """Which key signed, and when."""

    name: str
    key_id: str
    signed_at: Moment


class Candidate(TypedDict):
    """The other side of a version during a rollout."""

    bundle: Digest
    labels: list[str]
    share: Annotated[float, Field(ge=0, lt=1, description="Of the callers; 0: a shadow.")]
    signed_by: Signer | None


class TaskVersion(TypedDict):
    """One state that a task was in, and the record that made it so."""

    task: TaskName
    version: Version
    action: str
    bundle: Annotated[Digest | None, Field(description="null: it was retired.")]
    labels: list[str]
    rolled_back_to: Version | None
    signed_by: Signer | None
    candidate: Candidate | None
    record: RecordNumber
    written_at: Moment
    message: str
    who: Annotated[str, Field(description="Name of the token that asked for it, if there was one.")]
    idempotency_key: str
    gates: list[Gate]


class Rollout(TypedDict):
    """What is known of a candidate; counts and verdict only while a conductor can be reached."""

    mode: str
    bundle: Digest
    labels: list[str]
    share: float
    signed: NotRequired[Any]
    seen: NotRequired[TrialTold]
    verdict: NotRequired[Literal["worse", "good", "undecided"]]
    reason: NotRequired[str]


class TaskState(TaskVersion):
    """What is live of a task, and its settings."""

    settings: SettingsTold
    heldout: Annotated[Digest | None, Field(description="Its held-out sample.")]


class TaskDetails(TaskState):
    """What is live of a task, its settings, and how its rollout does if there is one."""

    rollout: NotRequired[Rollout]


class ScalingDecision(TypedDict):
    """How many replicas there should be, by which rule, and from what (docs/autoscaling.md)."""

    at: Moment
    text: Annotated[str, Field(description="All of it as a sentence.")]
    replicas: Annotated[int, Field(ge=0, description="That there should be.")]
    rule: Annotated[str, Field(examples=["rise"])]
    rate: Annotated[float, Field(description="Rows a second that arrived lately.")]
    demand: Annotated[float, Field(description="Rows a second that capacity is needed for.")]
    needed: Annotated[int, Field(ge=0, description="For that, before rules and bounds.")]
    queued: Annotated[int, Field(ge=0, description="Rows that waited.")]
    before: Annotated[int, Field(ge=0, description="Replicas until then, those that start too.")]
    age_s: Annotated[float, Field(description="Of what was known.")]
    replica_rate: Annotated[float, Field(description="Rows a second of one replica.")]
    startup_s: Annotated[float, Field(description="What a start was taken to take.")]


class ReplicaNumbers(TypedDict):
    """How many replicas there are, and why."""

    answering: Annotated[int, Field(ge=0)]
    wanted: Annotated[int | None, Field(description="null: their number is fixed.")]
    last: Annotated[ScalingDecision | None, Field(description="The last decision.")]
    changes: Annotated[
        list[ScalingDecision],
        Field(description="The last decisions that changed the number, the newest first."),
    ]


class Live(TypedDict):
    """What is live of every task, and on how many replicas."""

    trunk: Digest | None
    log_number: Annotated[int, Field(ge=0, description="The last record of the head log.")]
    tasks: list[TaskState]
    replicas: Annotated[
        ReplicaNumbers | None, Field(description="null: the conductor does not answer.")
    ]


class SettingsChange(TypedDict):
    """A change of a task's settings."""

    task: TaskName
    version: Version
    action: Literal["settings"]
    settings: SettingsTold
    changed: dict[str, bool | int | float | None]
    record: RecordNumber
    written_at: Moment
    message: str
    who: Annotated[str, Field(description="Name of the token that asked for it, if there was one.")]
    idempotency_key: str


class HeldoutChange(TypedDict):
    """A change of a task's held-out sample."""

    task: TaskName
    version: Version
    action: Literal["heldout"]
    heldout: Digest
    labels: list[str]
    record: RecordNumber
    written_at: Moment
    message: str
    who: Annotated[str, Field(description="Name of the token that asked for it, if there was one.")]
    idempotency_key: str


class History(TypedDict):
    """Every state that a task was in and every change of its settings, oldest first."""

    versions: list[TaskVersion]
    settings: list[SettingsChange]
    heldout: list[HeldoutChange]


class Diff(TypedDict):
    """What changed from one version to another."""

    task: TaskName
    a: dict[str, Any]
    b: dict[str, Any]
    labels: dict[str, Any]
    metrics: dict[str, Any]
    packages: dict[str, Any]
    weights: dict[str, Any]
    golden: dict[str, Any] | None


class Use(TypedDict):
    """A version that had a bundle."""

    task: TaskName
    version: Version
    action: str
    is_live: bool
    record: RecordNumber
    written_at: Moment
    message: str


class KnownBundle(TypedDict):
    """A bundle that was ever live."""

    bundle: Digest
    manifest: ManifestTold
    used: list[Use]


class SignedVersion(TypedDict):
    """A live version that a key signed."""

    task: TaskName
    version: Version


class KeyEntry(TypedDict):
    """A change of the trust in a key."""

    action: Literal["trust", "revoke"]
    name: str
    tasks: list[str]
    valid_until: Moment | None
    record: RecordNumber
    written_at: Moment
    message: str
    who: Annotated[str, Field(description="Name of the token that asked for it, if there was one.")]
    idempotency_key: str


class SigningKey(TypedDict):
    """A key that may sign bundles, or might once."""

    key_id: str
    name: str
    state: Annotated[str, Field(examples=["trusted"])]
    tasks: Annotated[list[str], Field(description="For which it may sign: names with * and ?.")]
    valid_until: Moment | None
    public_key: str
    signed_live: list[SignedVersion]
    history: list[KeyEntry]


class SigningKeys(TypedDict):
    """Every key that was ever trusted."""

    signatures_required: bool
    keys: list[SigningKey]


class TokenEntry(TypedDict):
    """A token that was made or revoked."""

    action: Literal["make", "revoke"]
    record: RecordNumber
    written_at: Moment
    message: str
    who: str
    idempotency_key: str


class AccessToken(TypedDict):
    """An access token, without the secret in it."""

    token_id: TokenId
    name: str
    state: Annotated[str, Field(examples=["valid"])]
    scopes: list[str]
    valid_until: Moment | None
    rate_per_s: float | None
    history: list[TokenEntry]


class AccessTokens(TypedDict):
    """Every token that was ever made."""

    tokens_required: bool
    tokens: list[AccessToken]


class NewToken(TypedDict):
    """A token that the caller has made; only its digest is told."""

    token_id: TokenId
    sha256: Sha256
    name: KeyName
    scopes: Annotated[list[Scope], Field(min_length=1, examples=[["predict:pets"]])]
    valid_until: NotRequired[str | None]
    rate_per_s: NotRequired[Rate | None]
    message: NotRequired[str]


class Promotion(TypedDict, total=False):
    """How to end or widen a rollout; all of it may be left out."""

    share: Annotated[float, Field(gt=0, lt=1)] | None
    expected: Version | None
    message: str


class Rollback(TypedDict, total=False):
    """Where to roll back to; the version before if nothing is said."""

    to: Version | None
    expected: Version | None
    message: str


class TrunkRollback(TypedDict, total=False):
    """What is expected to be served; all of it may be left out."""

    expected: Digest | None
    message: str


class Trust(TypedDict):
    """A key to trust, for which tasks and until when."""

    public_key: Annotated[str, Field(description="The text of a NAME.pub.")]
    name: str
    tasks: NotRequired[list[str]]
    until: NotRequired[str | None]
    message: NotRequired[str]


class Base64Picture(TypedDict):
    """A picture in JSON."""

    image: Annotated[str, Field(description="A JPEG, PNG or WebP file in base64.")]


class Problem(TypedDict):
    """What was wrong and what was expected (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    gates: NotRequired[list[Gate]]
