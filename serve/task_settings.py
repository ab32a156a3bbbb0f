"""What can be set for a task, apart from its head: checked here, kept in the head log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

SettingValue = bool | int | float | None
Asked = tuple[tuple[str, SettingValue], ...]  # settings by name, as a value that can be a key


# Neither never nor always: no counts could speak against those.
Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


class SettingError(ValueError):
    """There is no such setting, or it cannot have this value."""


class TaskSettings(BaseModel):
    """The settings of one task; a task that nothing was set for has the defaults."""

    # Strict, so that neither "false" nor 1 passes for a truth value.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    # Bounded, so that a share and its inverse stay ordinary numbers.
    weight: Annotated[float, Field(ge=1e-3, le=1e3, allow_inf_nan=False)] = Field(
        1.0, description="The task's fair share of a busy service, beside other tasks' weights."
    )
    pinned: bool = Field(False, description="Whether its adapter is never paged out.")
    deadline_s: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] | None = Field(
        None, description="Deadline of its requests; null: the service's `request_timeout_s`."
    )
    margin: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        0.01, description="Accuracy that a push may lose against what is live, chance aside."
    )
    max_slowdown: Annotated[float, Field(ge=1, le=1000, allow_inf_nan=False)] = Field(
        1.5,
        description="How many times as long as what is live answers may take: of a push, and of a "
        "candidate for half of them.",
    )
    min_compared: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        100, description="Pictures on which a candidate is compared before any verdict."
    )
    max_failures: Share = Field(
        0.01, description="Share of a candidate's rows that may have no scores."
    )
    max_disagreement: Share = Field(
        0.2, description="Share of the pictures to which a candidate may give another label."
    )
    max_less_confident: Share = Field(
        0.3,
        description="Share of the pictures on which a candidate's best score may be far lower.",
    )
    promote_good: bool = Field(
        False, description="Whether a candidate that is found good goes live by itself."
    )

    def updated(self, asked: Iterable[tuple[str, object]]) -> TaskSettings:
        """These settings with some of them changed.

        Raises:
            SettingError: no such setting, or a value that it cannot have.
        """
        try:
            return TaskSettings.model_validate({**self.model_dump(), **dict(asked)})
        except ValidationError as error:
            raise SettingError(_reason(error)) from error

    def different_from(self, other: TaskSettings) -> dict[str, SettingValue]:
        """Those of these settings that the other has otherwise."""
        theirs = other.model_dump()
        return {name: value for name, value in self.model_dump().items() if value != theirs[name]}


DEFAULTS = TaskSettings()


def asked_settings(values: Mapping[str, object]) -> Asked:
    """Check what is to be set.

    Raises:
        SettingError: nothing, no such setting, or a value that it cannot have.
    """
    if not values:
        raise SettingError(f"No setting is named; expected one or more of {_names()}.")
    checked = DEFAULTS.updated(values.items()).model_dump()
    return tuple((name, value) for name, value in checked.items() if name in values)


def _reason(error: ValidationError) -> str:
    """Name, value and what was expected, of the first setting that is wrong."""
    problem = error.errors(include_url=False)[0]
    name, value = problem["loc"][0], problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"{name} is {value!r:.100}: there is no such setting; expected {_names()}."
    return f"{name} is {value!r:.100}: {problem['msg']}."


def _names() -> str:
    return ", ".join(TaskSettings.model_fields)
