"""The settings of the service: typed, checked at start, from flags or `HEADSTOCK_*` variables."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from export.bundle import Precision
from serve.access import digest_of_token
from serve.runtime import LOOPBACK

PREFIX = "HEADSTOCK_"
CLIENT_VARIABLES = (
    "HEADSTOCK_SERVER",
    "HEADSTOCK_TOKEN",
    "HEADSTOCK_SHARED",
    "HEADSTOCK_KEY_PASSPHRASE",
)

NUM_REPLICAS = 2
REQUEST_TIMEOUT_S = 30.0
MIN_TOKEN_LENGTH = 32

Port = Annotated[int, Field(ge=1, le=65535)]


def _log_file(file: str) -> str:
    """As a store: replicas run elsewhere."""
    return file if file in {"", "-"} else _absolute(file)


def _absolute(store: str) -> str:
    """A folder is meant from where the command was typed; replicas run elsewhere."""
    return store if "://" in store else str(Path(store).expanduser().absolute())


def _listed(text: object) -> object:
    """Values with commas between, as a variable has them."""
    return [part.strip() for part in text.split(",")] if isinstance(text, str) else text


def _hashed(token: SecretStr) -> SecretStr:
    """The digest of a token; settings travel and are kept where a token should not be."""
    text = token.get_secret_value()
    if not text or re.fullmatch(r"sha256:[0-9a-f]{64}", text):
        return token
    if len(text) < MIN_TOKEN_LENGTH:
        raise ValueError(
            f"it has {len(text)} characters, expected {MIN_TOKEN_LENGTH} or more that are drawn by "
            "chance, as openssl rand -hex 32 draws them"
        )
    return SecretStr(f"sha256:{digest_of_token(text)}")


HashedToken = Annotated[
    SecretStr,
    AfterValidator(_hashed),
    PlainSerializer(SecretStr.get_secret_value, return_type=str, when_used="json"),
]


class SettingsError(ValueError):
    """A setting is unknown, missing or out of range."""


class ServeSettings(BaseSettings):
    """Settings of the service."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    store: Annotated[str, Field(min_length=1), AfterValidator(_absolute)] = Field(
        description="Where the head log lives: a folder, or an s3://, gs:// or az:// URL."
    )
    host: str = Field("127.0.0.1", description="Address that the service answers on.")
    port: Port = Field(8000, description="Port that the service answers on.")
    access: Literal["auto", "on", "off"] = Field(
        "auto", description="Whether tokens are asked for; auto: unless `host` is loopback."
    )
    admin_token: HashedToken = Field(
        SecretStr(""),
        description="A token that may do everything, to make the first others with; or its digest, "
        "as `sha256:` and 64 digits.",
    )
    replicas: PositiveInt | None = Field(
        None, description="Replica processes; 2 unless their number follows the load."
    )
    min_replicas: NonNegativeInt | None = Field(
        None,
        description="Fewest replicas where their number follows the load; 1 unless given. With 0 "
        "the last one goes too, and a request that comes then waits for its start.",
    )
    max_replicas: PositiveInt | None = Field(
        None, description="Most replicas; if it is given, their number follows the load."
    )
    keep_replicas_s: Annotated[float, Field(gt=0, le=3600)] | None = Field(
        None,
        description="How long replicas are kept after the load that needed them; 300, or as long "
        "as one takes to start, unless given.",
    )
    max_body_bytes: PositiveInt = Field(
        16 * 2**20, description="Largest request body accepted, as it is sent and once inflated."
    )
    max_header_bytes: PositiveInt = Field(
        32 * 2**10, description="Largest address and headers of a request together."
    )
    max_bundle_bytes: PositiveInt = Field(64 * 2**20, description="Largest pushed zip accepted.")
    max_push_bytes: PositiveInt = Field(
        256 * 2**20, description="Largest body accepted of a push of several bundles or a trunk."
    )
    max_head_bytes: PositiveInt = Field(
        64 * 2**20, description="Largest head.onnx or tail.onnx accepted."
    )
    adapter_memory_bytes: PositiveInt = Field(
        256 * 2**20,
        description="Memory of adapters in each replica; what does not fit waits on its disk.",
    )
    max_picture_pixels: PositiveInt = Field(
        50_000_000, description="Largest width x height of a picture, checked before decoding."
    )
    max_pictures: PositiveInt = Field(64, description="Most pictures in one request.")
    max_rows: PositiveInt = Field(
        20_000, description="Most answers in one request: its pictures times its tasks."
    )
    precision: Precision | Literal["auto"] = Field(
        "auto", description="Variant of the trunk: fp32, int8, fp16, or what its export picked."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where the trunk runs: cpu, cuda, or auto: a GPU if one can be used."
    )
    gpus_per_replica: Annotated[float, Field(ge=0, le=1)] = Field(
        0,
        description="Share of a GPU for each replica; 0: they share those evenly that Ray sees.",
    )
    batch_target_s: PositiveFloat = Field(
        0.01,
        description="A batch takes as many pictures as the trunk runs in this time.",
    )
    max_batch_pictures: PositiveInt = Field(
        32, description="Most pictures in a batch, however fast the trunk is."
    )
    max_queued: PositiveInt = Field(
        512, description="Most requests waiting in one replica, for their decoding too."
    )
    decode_threads: PositiveInt = Field(2, description="Threads that decode pictures.")
    request_timeout_s: PositiveFloat = Field(
        REQUEST_TIMEOUT_S,
        description="Longest time for one answer; x-headstock-timeout-ms asks for less.",
    )
    body_timeout_s: PositiveFloat = Field(
        30.0, description="Longest time for a body to arrive, and for headers."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed)] = Field(
        (),
        description="Web pages whose scripts may ask: their origins, with commas between, or `*`.",
    )
    tls_certificate: str = Field(
        "", description="PEM file of the certificate and what links it to its authority; for https."
    )
    tls_key: str = Field("", description="PEM file of the certificate's private key.")
    may_differ: bool = Field(
        False,
        description="Whether heads change while another cluster answers from the same store.",
    )
    webhook_url: Annotated[str, Field(pattern="^(https?://.+)?$")] = Field(
        "", description="Gets a POST when a rollout is ended by rule."
    )
    access_log: Annotated[str, AfterValidator(_log_file)] = Field(
        "", description="File that gets a line of JSON for each request; - is standard error."
    )
    swap_hold_s: PositiveFloat = Field(1.0, description="Longest pause of one task during a swap.")
    swap_stage_s: PositiveFloat = Field(
        10.0, description="Longest time for all replicas to load a bundle."
    )
    trunk_stage_s: PositiveFloat = Field(
        300.0, description="Longest time for all replicas to load a new trunk with all its heads."
    )
    memory_bytes: PositiveInt | None = Field(
        None,
        description="Memory of a replica; a second trunk has to fit into it beside the first.",
    )

    # Of a field, so that the error names the setting and shows no other.
    @field_validator("max_replicas")
    @classmethod
    def _bounds_fit(cls, most: int | None, others: Any) -> int | None:
        fixed, least = others.data.get("replicas"), others.data.get("min_replicas")
        if most is None and least is not None:
            raise ValueError("min_replicas is given, expected max_replicas beside it")
        if most is not None and fixed is not None:
            raise ValueError(f"replicas is {fixed}, expected that or bounds of it, and not both")
        if most is not None and least is not None and least > most:
            raise ValueError(f"min_replicas is {least}, expected at most max_replicas")
        return most

    @property
    def is_autoscaled(self) -> bool:
        """Whether the number of replicas follows the load."""
        return self.max_replicas is not None

    @property
    def fewest_replicas(self) -> int:
        """Replicas that there are at least."""
        if not self.is_autoscaled:
            return self.replicas or NUM_REPLICAS
        return 1 if self.min_replicas is None else self.min_replicas

    @property
    def first_replicas(self) -> int:
        """Replicas to start with; one at least, which shows that they can start."""
        return max(1, self.fewest_replicas)

    @property
    def may_sleep(self) -> bool:
        """Whether the last replica goes when nobody asks."""
        return self.fewest_replicas == 0

    @property
    def most_replicas(self) -> int:
        """Replicas that there may be at any time."""
        return self.max_replicas or self.first_replicas

    @property
    def needs_tokens(self) -> bool:
        """Whether callers are asked who they are.

        By where the service listens and never by who asks: behind the proxy all come from loopback.
        """
        return self.access == "on" or (self.access == "auto" and self.host not in LOOPBACK)

    @property
    def admin_sha256(self) -> str:
        """The digest of the token that may do everything; "" if there is none."""
        return self.admin_token.get_secret_value().removeprefix("sha256:")


def load_settings(**flags: object) -> ServeSettings:
    """Flags that are given win over the environment, which wins over the defaults.

    Raises:
        SettingsError: names the setting, its value and what was expected.
    """
    refuse_unknown_variables()
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return ServeSettings.model_validate(given)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in problem["loc"])
        setting = f"Setting {name} ({PREFIX}{name.upper()})"
        if problem["type"] == "missing":
            what = ServeSettings.model_fields[name].description
            raise SettingsError(f"{setting} is missing. {what}") from error
        value = "as it is given" if name == "admin_token" else repr(problem["input"])
        # Without the cause where it would show the secret.
        cause = None if name == "admin_token" else error
        raise SettingsError(f"{setting} is {value}: {problem['msg']}.") from cause


def refuse_unknown_variables() -> None:
    """A misspelt setting would otherwise be a default that nobody meant.

    Raises:
        SettingsError: names the variable and the setting that is closest.
    """
    names = [name.upper() for name in ServeSettings.model_fields]
    known = [PREFIX + name for name in names]
    for variable in os.environ:
        if variable.startswith(PREFIX) and variable not in (*known, *CLIENT_VARIABLES):
            # Without the prefix, which would make all of them close.
            closest = get_close_matches(variable.removeprefix(PREFIX), names, n=1)
            hint = (
                f" Did you mean {PREFIX}{closest[0]}?"
                if closest
                else f" Known are {', '.join(known)}."
            )
            raise SettingsError(f"The variable {variable} is not a setting.{hint}")
