"""What conductor, replicas and pushers say to each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass

from export.bundle import Digest, Sha256, TaskName
from serve.access import TokenChange, TokenId
from serve.grounds import Grounds
from serve.metrics import Report
from serve.protocol import NO_ACK, Ack, Phase, ReplicaId
from serve.rates import Spent
from serve.record import Record, TaskChange, Text, TrunkChange, Verdict
from serve.rollout import Trial
from serve.statistics import ModelCounts
from serve.task_settings import Asked
from serve.trust import KeyChange, SignedBy

MAX_KEY_LENGTH = 256
MAX_MESSAGE_LENGTH = 2000


@dataclass(frozen=True)
class Poll:
    """A replica's standing question, and all that the conductor knows of it.

    Args:
        at: Number of the commit that its pointers follow.
        is_joined: Whether it was told that it may answer.
        veto: Why it cannot stage swap `veto_number`, if it cannot.
        heard: Sequence of the last directive it obeyed.
        trials: What it saw of rollouts since it started: task -> version and counts.
        spent: Requests that it answered of tokens that have a rate.
        models: What it counted of models since it started, as far as that changed since the last
            poll that was answered.
    """

    replica: ReplicaId
    at: int
    is_joined: bool
    ack: Ack = NO_ACK
    veto_number: int = 0
    veto: str = ""
    heard: int = 0
    metrics: Report | None = None
    trials: Mapping[str, tuple[int, Trial]] | None = None
    spent: Spent = field(default_factory=dict)
    models: ModelCounts | None = None


@dataclass(frozen=True)
class Directive:
    """Where the swap in progress stands; the conductor's answer to a poll.

    Args:
        sequence: Grows by one with every change, within one conductor's life.
        record: The proposal while staging, the record read back while flipping.
        undone: Number of a swap that was given up and whose abort stands, or 0.
        is_admitted: Whether the replica that asked may answer.
        spent: What each replica last said it had spent.
    """

    sequence: int
    phase: Phase
    number: int
    record: Record | None
    undone: int
    is_admitted: bool
    spent: Mapping[ReplicaId, Spent] = field(default_factory=dict)


@checked_dataclass(frozen=True)
class Change:
    """What a pusher asks for, checked when it is made.

    Args:
        bundle: Digest of a bundle that is in the store and passed the gates; None for everything
            but a push.
        retires: Whether the task is to answer nothing any more.
        heldout: Digest of a held-out sample for these labels: what the bundle of a push brings, or
            without a bundle what the task's is to be.
        pictures: How a sample without a bundle is decoded, as `TrunkChange` says it; if the trunk
            that is served takes others, it is refused.
        grounds: What the gates compared a push with; if that is no longer so, it is refused as
            "stale".
        to: The version to roll back to; None: the bundle that was live before.
        expected: Refuse unless this is the live version.
        settings: What to set, as `asked_settings` has checked it; nothing else changes then.
        share: Of the callers that the bundle, or the candidate that is promoted, shall answer
            beside what is live; 0: none (a shadow). None: it takes the place of what is live.
        promote: Make the candidate live, or give it another share.
        key: Idempotency key: the same key makes the same change only once.
        allow_new_labels: Whether the pusher declared that the labels change.
        who: Name of the token that asks; "" where none is asked for.
        signed: The bundle's signature, verified; None where none is asked for.

    Raises:
        ValidationError: a name, key or message that the log would not take.
    """

    task: TaskName
    key: Annotated[Text, Field(min_length=1, max_length=MAX_KEY_LENGTH)]
    bundle: Digest | None = None
    labels: tuple[str, ...] = ()
    to: int | None = None
    expected: int | None = None
    message: Annotated[Text, Field(max_length=MAX_MESSAGE_LENGTH)] = ""
    who: str = ""
    verdicts: tuple[Verdict, ...] = ()
    allow_new_labels: bool = False
    settings: Asked = ()
    signed: SignedBy | None = None
    share: Annotated[float, Field(ge=0, lt=1)] | None = None
    promote: bool = False
    retires: bool = False
    heldout: Digest | None = None
    pictures: tuple[int, int] | None = None
    grounds: Grounds | None = None


@checked_dataclass(frozen=True)
class Pushes:
    """Bundles of several tasks that go live in one moment, or none of them.

    Args:
        pushes: Of each task one.
        key: Idempotency key of all together, as in `Change`; those of the pushes say nothing.
        who: As in `Change`.
        trunk: What goes live with them in place of the trunk that is served.

    Raises:
        ValidationError: see `Change`.
    """

    pushes: tuple[Change, ...]
    key: Annotated[Text, Field(min_length=1, max_length=MAX_KEY_LENGTH)]
    message: Annotated[Text, Field(max_length=MAX_MESSAGE_LENGTH)] = ""
    who: str = ""
    trunk: TrunkChange | None = None


@checked_dataclass(frozen=True)
class TrunkRollback:
    """Back to the trunk that was served before, with the bundles that were live on it then.

    Args:
        key: Idempotency key, as in `Change`.
        expected: Refuse unless this trunk is served.
        who: As in `Change`.

    Raises:
        ValidationError: see `Change`.
    """

    key: Annotated[Text, Field(min_length=1, max_length=MAX_KEY_LENGTH)]
    message: Annotated[Text, Field(max_length=MAX_MESSAGE_LENGTH)] = ""
    expected: Digest | None = None
    who: str = ""


@checked_dataclass(frozen=True)
class KeyRequest:
    """What somebody asks about a signing key, checked when it is made.

    Args:
        key_id: The signing key.
        key: Idempotency key, as in `Change`.
        trust: How far it is to be trusted from here on; None: it is revoked.

    Raises:
        ValidationError: an id, key or message that the log would not take.
    """

    key_id: Sha256
    key: Annotated[Text, Field(min_length=1, max_length=MAX_KEY_LENGTH)]
    trust: KeyChange | None = None
    message: Annotated[Text, Field(max_length=MAX_MESSAGE_LENGTH)] = ""
    who: str = ""


@checked_dataclass(frozen=True)
class TokenRequest:
    """What somebody asks about an access token, checked when it is made.

    Args:
        key: Idempotency key, as in `Change`.
        token: What it is to be; None: it is revoked.

    Raises:
        ValidationError: an id, key or message that the log would not take.
    """

    token_id: TokenId
    key: Annotated[Text, Field(min_length=1, max_length=MAX_KEY_LENGTH)]
    token: TokenChange | None = None
    message: Annotated[Text, Field(max_length=MAX_MESSAGE_LENGTH)] = ""
    who: str = ""


AnyChange = Change | Pushes | TrunkRollback | KeyRequest | TokenRequest


@dataclass(frozen=True)
class Swapped:
    """A change that is live everywhere, with the versions of tasks and the trunk that it made.

    Args:
        phases_s: How long stage, hold, commit and flip took.
    """

    changes: tuple[TaskChange, ...]
    stage_ms: float
    hold_ms: float
    replicas: int
    is_repeat: bool = False
    phases_s: tuple[float, ...] = ()
    trunk: TrunkChange | None = None

    @property
    def change(self) -> TaskChange | None:
        """The version that a change of one task made, if it made any."""
        return self.changes[0] if self.changes else None


@dataclass(frozen=True)
class Refused:
    """A change that was not made.

    Args:
        kind: "conflict" (409), "gate" (422), "unknown" (404) or "unavailable" (503); "stale" (409)
            if something else went live since the gates compared, so that they have to compare anew.
    """

    kind: str
    reason: str
    verdicts: tuple[Verdict, ...] = field(default=())


Outcome = Swapped | Refused
