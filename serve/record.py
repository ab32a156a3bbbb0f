"""What the head log says: the records, and the state that they fold to.

Pure: where records are kept is `headlog.py`'s business.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from export.bundle import Digest, TaskName, digest_of
from serve.access import TokenChange
from serve.task_settings import TaskSettings
from serve.trust import KeyChange, SignedBy

ORIGIN: Digest = digest_of(b"")  # what the first record names as the one before it


def _storable(text: str) -> str:
    # Half a surrogate pair passes for a string, in JSON too, and would fail only when the record
    # is written, in the middle of a swap.
    text.encode()
    return text


Text = Annotated[str, AfterValidator(_storable)]


class HeadLogError(Exception):
    """The head log contradicts itself: a record is missing, edited or out of order."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Verdict(_Entry):
    """What one admission gate said, and of which task's bundle if the record has several."""

    task: Text = ""
    gate: Text
    passed: bool
    reason: Text
    skipped: bool = Field(False, description="it did not look, and so did not refuse")


class Candidate(_Entry):
    """The other side of a version during a rollout."""

    bundle: Digest
    labels: tuple[Text, ...]
    share: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="of the callers that it answers; 0: a shadow, whose answers nobody gets"
    )
    signed: SignedBy | None = None


class TaskChange(_Entry):
    """A task's next version.

    One that retires the task has no bundle, and the labels it had; a rollback has the signature of
    the version that it goes back to.
    """

    task: TaskName
    version: Annotated[int, Field(ge=1)]
    action: Literal["push", "rollback", "canary", "shadow", "promote", "retire"]
    bundle: Digest | None = None
    labels: tuple[Text, ...]
    rolled_back_to: int | None = None
    signed: SignedBy | None = None
    candidate: Candidate | None = None

    def signature_of(self, bundle: Digest) -> SignedBy | None:
        """Who signed a bundle of this version, if it was asked for."""
        side = self.candidate if self.candidate and self.candidate.bundle == bundle else self
        return side.signed

    @model_validator(mode="after")
    def _has_a_bundle_unless_it_retires(self) -> TaskChange:
        if (self.action == "retire") != (self.bundle is None):
            raise ValueError(f"action is {self.action} and bundle is {self.bundle}")
        return self


class SettingsChange(_Entry):
    """A task's settings from here on; what it does not name has its default."""

    task: TaskName
    settings: TaskSettings


class HeldoutChange(_Entry):
    """The held-out sample that heads with these labels are compared on from here on."""

    task: TaskName
    labels: tuple[Text, ...]
    heldout: Digest = Field(description="digest of the blob that holds heldout.safetensors")


class TrunkChange(_Entry):
    """The trunk that every head fits which is live from here on."""

    trunk: Digest
    manifest: Digest = Field(description="digest of the blob that holds trunk.json")
    pictures: tuple[int, int] | None = Field(
        None, description="size_px and resize_px: how pictures are decoded for it"
    )


class Record(_Entry):
    """One immutable step of the log. An abort uses up its number and changes nothing."""

    schema_version: Literal[1] = 1
    number: Annotated[int, Field(ge=1)]
    kind: Literal["commit", "abort"]
    previous: Digest = Field(description="digest of the record before; of nothing for the first")
    writer: Text
    epoch: Text = Field(
        "", description="the cluster whose conductor writes the log from here on; mostly unsaid"
    )
    written_at: Text = Field(description="UTC, ISO 8601; for people, nothing is decided by it")
    changes: tuple[TaskChange, ...] = ()
    settings: tuple[SettingsChange, ...] = ()
    signing_keys: tuple[KeyChange, ...] = ()
    tokens: tuple[TokenChange, ...] = ()
    heldout: tuple[HeldoutChange, ...] = ()
    trunk: TrunkChange | None = None
    idempotency_key: Text = ""
    message: Text = ""
    who: Text = Field("", description="name of the token that asked for it, where one was")
    verdicts: tuple[Verdict, ...] = ()

    def to_bytes(self) -> bytes:
        """The bytes that are stored and that the next record's `previous` is the digest of."""
        # Defaults are left out, so that a field which a later version adds leaves the bytes of
        # older records as they were.
        body = self.model_dump(mode="json", exclude_defaults=True)
        body = {"schema_version": self.schema_version, **body}
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()

    @property
    def digest(self) -> Digest:
        """Digest of the stored bytes."""
        return digest_of(self.to_bytes())


@dataclass(frozen=True, slots=True)
class TaskVersion:
    """One state that a task was in, and the record that made it so."""

    change: TaskChange
    number: int
    written_at: str
    message: str
    idempotency_key: str
    who: str
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True, slots=True)
class SettingsVersion:
    """Settings that a task had, and the record that made them so."""

    change: SettingsChange
    number: int
    written_at: str
    message: str
    idempotency_key: str
    who: str


@dataclass(frozen=True, slots=True)
class KeyVersion:
    """How far a signing key was trusted, and the record that made it so."""

    change: KeyChange
    number: int
    written_at: str
    message: str
    idempotency_key: str
    who: str


@dataclass(frozen=True, slots=True)
class HeldoutVersion:
    """A held-out sample that a task had, and the record that made it so."""

    change: HeldoutChange
    number: int
    written_at: str
    message: str
    idempotency_key: str
    who: str


@dataclass(frozen=True, slots=True)
class TokenVersion:
    """What an access token was for, and the record that made it so."""

    change: TokenChange
    number: int
    written_at: str
    message: str
    idempotency_key: str
    who: str


@dataclass(frozen=True, slots=True)
class TrunkVersion:
    """A trunk that was served, and the record that made it so."""

    change: TrunkChange
    number: int
    written_at: str
    message: str
    idempotency_key: str
    who: str


Made = TaskVersion | SettingsVersion | KeyVersion | HeldoutVersion | TokenVersion | TrunkVersion


@dataclass(frozen=True, slots=True)
class LogView:
    """Everything that the log says up to record `number`.

    Args:
        number: The last record folded, 0 for an empty log.
        tip: Digest of that record.
        live_number: The last record that is a commit, 0 if there is none.
        trunks: Every trunk and every set of its variants, oldest first; the last is served.
        tasks: Versions of each task, oldest first; the last is live, unless it retires the task.
        set_tasks: Settings of each task for which something was set, oldest first.
        key_history: What was said of each signing key, by its id, oldest first.
        token_history: What was said of each access token, by its id, oldest first.
        heldouts: Held-out samples of each task that ever had one, oldest first.
        keys: Number of the commit that each idempotency key made.
        epochs: The clusters that have held the pen, oldest first; the last holds it.
    """

    number: int = 0
    tip: Digest = ORIGIN
    live_number: int = 0
    trunks: tuple[TrunkVersion, ...] = ()
    tasks: Mapping[str, tuple[TaskVersion, ...]] = field(default_factory=dict)
    set_tasks: Mapping[str, tuple[SettingsVersion, ...]] = field(default_factory=dict)
    key_history: Mapping[str, tuple[KeyVersion, ...]] = field(default_factory=dict)
    token_history: Mapping[str, tuple[TokenVersion, ...]] = field(default_factory=dict)
    heldouts: Mapping[str, tuple[HeldoutVersion, ...]] = field(default_factory=dict)
    keys: Mapping[str, int] = field(default_factory=dict)
    epochs: tuple[str, ...] = ()

    @property
    def pen(self) -> str:
        """The cluster whose conductor may write commits; "" if none has said so."""
        return self.epochs[-1] if self.epochs else ""

    @property
    def trunk(self) -> TrunkChange | None:
        """The trunk that is served, or None if there is none yet."""
        return self.trunks[-1].change if self.trunks else None

    def trunk_at(self, number: int) -> TrunkChange | None:
        """The trunk that was served after a record: what versions of that record were made for."""
        before = (trunk.change for trunk in reversed(self.trunks) if trunk.number <= number)
        return next(before, None)

    def last(self, task: str) -> TaskVersion | None:
        """The version that a task is at, or None if it was never pushed."""
        return self.tasks[task][-1] if task in self.tasks else None

    def live(self, task: str) -> TaskVersion | None:
        """The version that answers, or None if the task was never pushed or is retired."""
        last = self.last(task)
        return None if last is None or last.change.bundle is None else last

    @property
    def settings(self) -> dict[str, TaskSettings]:
        """Settings of the tasks for which something was set; all others have the defaults."""
        return {task: history[-1].change.settings for task, history in self.set_tasks.items()}

    @property
    def signing_keys(self) -> dict[str, KeyChange]:
        """Every signing key that was ever trusted, by its id, as it is trusted now."""
        return {key_id: history[-1].change for key_id, history in self.key_history.items()}

    @property
    def tokens(self) -> dict[str, TokenChange]:
        """Every access token that was ever made, by its id, as it is known now."""
        return {token_id: history[-1].change for token_id, history in self.token_history.items()}

    def heldout(
        self,
        task: str,
        labels: tuple[str, ...],
        trunk: TrunkChange | None,
        *,
        until: int | None = None,
    ) -> HeldoutVersion | None:
        """The sample for these labels, decoded as for this trunk; what comes back finds its own.

        Args:
            until: Number of the last record that counts; all do if it is not given.
        """
        pictures = trunk.pictures if trunk else None
        for sample in reversed(self.heldouts.get(task, ())):
            if until is not None and sample.number > until:
                continue
            made_for = self.trunk_at(sample.number)
            if sample.change.labels == labels and (made_for and made_for.pictures) == pictures:
                return sample
        return None

    def made_by(self, key: str) -> tuple[Made, ...]:
        """What an idempotency key made: a trunk and versions of tasks, else what it set."""
        number = self.keys.get(key)
        if number is None:
            return ()
        versions = chain(self.trunks, *self.tasks.values())
        if made := tuple(version for version in versions if version.number == number):
            return made
        others = chain(
            self.set_tasks.values(),
            self.key_history.values(),
            self.token_history.values(),
            self.heldouts.values(),
        )
        return tuple(made for made in chain.from_iterable(others) if made.number == number)


def fold(view: LogView, records: Iterable[Record]) -> LogView:
    """The state after these records, which must follow the view one by one.

    Raises:
        HeadLogError: a number is skipped or repeated, or a record does not name its predecessor.
    """
    number, tip, live_number, trunks = view.number, view.tip, view.live_number, view.trunks
    tasks, set_tasks, keys = dict(view.tasks), dict(view.set_tasks), dict(view.keys)
    key_history, token_history = dict(view.key_history), dict(view.token_history)
    heldouts, epochs = dict(view.heldouts), view.epochs
    for record in records:
        _check_follows(record, number, tip)
        number, tip = record.number, record.digest
        if record.epoch and record.epoch != (epochs[-1] if epochs else ""):
            epochs = (*epochs, record.epoch)
        if record.kind == "abort":
            continue
        live_number = number
        trunks += _trunk_versions(record)
        for change in record.changes:
            tasks[change.task] = (*tasks.get(change.task, ()), _version(record, change))
        for setting in record.settings:
            history = set_tasks.get(setting.task, ())
            set_tasks[setting.task] = (*history, _settings_version(record, setting))
        for key in record.signing_keys:
            key_history[key.key_id] = (*key_history.get(key.key_id, ()), _key_version(record, key))
        for token in record.tokens:
            known = token_history.get(token.token_id, ())
            token_history[token.token_id] = (*known, _token_version(record, token))
        for sample in record.heldout:
            samples = heldouts.get(sample.task, ())
            heldouts[sample.task] = (*samples, _heldout_version(record, sample))
        if record.idempotency_key:
            keys[record.idempotency_key] = number
    return LogView(
        number,
        tip,
        live_number,
        trunks,
        tasks,
        set_tasks,
        key_history,
        token_history,
        heldouts,
        keys,
        epochs,
    )


def _check_follows(record: Record, number: int, tip: Digest) -> None:
    if record.number != number + 1:
        raise HeadLogError(
            f"Record {record.number} follows record {number}; expected {number + 1}."
        )
    if record.previous != tip:
        raise HeadLogError(
            f"Record {record.number} names {record.previous} as the one before it, but record "
            f"{number} is {tip}: one of the two was edited or replaced."
        )


def _version(record: Record, change: TaskChange) -> TaskVersion:
    verdicts = tuple(v for v in record.verdicts if v.task in {"", change.task})
    return TaskVersion(change, *_origin(record), verdicts)


def _settings_version(record: Record, change: SettingsChange) -> SettingsVersion:
    return SettingsVersion(change, *_origin(record))


def _key_version(record: Record, change: KeyChange) -> KeyVersion:
    return KeyVersion(change, *_origin(record))


def _token_version(record: Record, change: TokenChange) -> TokenVersion:
    return TokenVersion(change, *_origin(record))


def _heldout_version(record: Record, change: HeldoutChange) -> HeldoutVersion:
    return HeldoutVersion(change, *_origin(record))


def _trunk_versions(record: Record) -> tuple[TrunkVersion, ...]:
    return (TrunkVersion(record.trunk, *_origin(record)),) if record.trunk else ()


def _origin(record: Record) -> tuple[int, str, str, str, str]:
    """Number, time, message, key and who asked."""
    return record.number, record.written_at, record.message, record.idempotency_key, record.who
