"""Whether a change was made already by its idempotency key, and what else the key may have made."""

from __future__ import annotations

from serve.messages import (
    AnyChange,
    Change,
    KeyRequest,
    Refused,
    Swapped,
    TokenRequest,
    TrunkRollback,
)
from serve.record import (
    HeldoutChange,
    HeldoutVersion,
    KeyVersion,
    Made,
    SettingsChange,
    SettingsVersion,
    TaskChange,
    TaskVersion,
    TokenVersion,
    TrunkVersion,
)


def repeated(made: tuple[Made, ...], change: AnyChange) -> Swapped | Refused:
    """The same key gives the same answer, unless it is used for something else."""
    if _is_made_by(made, change):
        versions = tuple(one.change for one in made if isinstance(one, TaskVersion))
        trunk = next((one.change for one in made if isinstance(one, TrunkVersion)), None)
        return Swapped(versions, stage_ms=0.0, hold_ms=0.0, replicas=0, is_repeat=True, trunk=trunk)
    did = ", ".join(_did(one) for one in made)
    return Refused(
        "conflict",
        f"The idempotency key {change.key!r} already {did}; use a new key for another change.",
    )


def _is_made_by(made: tuple[Made, ...], change: AnyChange) -> bool:
    if isinstance(change, Change | KeyRequest | TokenRequest):
        return len(made) == 1 and _made_by_the_same(made[0], change)
    trunk = made[0].change if isinstance(made[0], TrunkVersion) else None
    versions = [one.change for one in made if isinstance(one, TaskVersion)]
    if isinstance(change, TrunkRollback):
        return trunk is not None and all(did.action == "rollback" for did in versions)
    pushes = {push.task: push for push in change.pushes}
    return (
        trunk == change.trunk
        and {did.task for did in versions} == set(pushes)
        and all(_made_version(did, pushes[did.task]) for did in versions)
    )


def touched(change: TaskChange | SettingsChange | HeldoutChange) -> str:
    """What a record did to a task."""
    if isinstance(change, TaskChange):
        return f"made version {change.version}"
    if isinstance(change, SettingsChange):
        return "changed the settings"
    return "set the held-out sample"


def _did(made: Made) -> str:
    if isinstance(made, KeyVersion):
        return f"changed the trust in key {made.change.name}"
    if isinstance(made, TokenVersion):
        return f"made or revoked token {made.change.name}"
    if isinstance(made, TrunkVersion):
        return f"brought trunk {made.change.trunk}"
    return f"{touched(made.change)} of task {made.change.task}"


def _made_by_the_same(made: Made, change: Change | KeyRequest | TokenRequest) -> bool:
    if isinstance(made, KeyVersion) or isinstance(change, KeyRequest):
        if not (isinstance(made, KeyVersion) and isinstance(change, KeyRequest)):
            return False
        is_same = made.change.is_revoked if change.trust is None else made.change == change.trust
        return is_same and made.change.key_id == change.key_id
    if isinstance(made, TokenVersion) or isinstance(change, TokenRequest):
        if not (isinstance(made, TokenVersion) and isinstance(change, TokenRequest)):
            return False
        is_same = made.change.is_revoked if change.token is None else made.change == change.token
        return is_same and made.change.token_id == change.token_id
    if isinstance(made, TrunkVersion) or made.change.task != change.task:
        return False
    if isinstance(made, HeldoutVersion):
        return change.bundle is None and made.change.heldout == change.heldout
    if isinstance(made, SettingsVersion):
        settings = made.change.settings
        return bool(change.settings) and settings.updated(change.settings) == settings
    return not change.settings and _made_version(made.change, change)


def _made_version(did: TaskChange, change: Change) -> bool:
    candidate = did.candidate
    if (candidate.share if candidate else None) != change.share:
        return False
    if change.promote:
        return did.action == "promote" or candidate is not None
    if change.bundle:
        return change.bundle == (candidate.bundle if candidate else did.bundle)
    if change.retires:
        return did.action == "retire"
    is_rollback = did.action == "rollback" and not change.heldout
    return is_rollback and change.to in {None, did.rolled_back_to}
