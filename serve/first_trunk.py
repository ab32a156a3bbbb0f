"""How a log comes by its trunk: from a folder into the store, while those who need it wait."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from export.bundle import TRUNK_MANIFEST, Digest, read_trunk_folder
from serve.headlog import HeadLog
from serve.record import LogView, TrunkChange
from serve.store import ask_until_answered
from serve.trunks import store_trunk

logger = logging.getLogger(__name__)

CHECK_S = 1.0


class OtherTrunkError(Exception):
    """The log has a trunk, and it is not the one that was given."""

    def __init__(self, *, live: Digest, given: Digest) -> None:
        super().__init__(
            f"The store serves trunk {live}, and the folder given is trunk {given}. Heads fit one "
            "trunk only: push the new one with a bundle of every live task, headstock push TRUNK "
            "BUNDLE..., or use another store."
        )


def store_folder(log: HeadLog, folder: Path) -> TrunkChange:
    """Put a trunk folder into the store; what names it in the log is for the conductor to write.

    The folder of the trunk that the log has may bring variants that the store has not yet.

    Raises:
        OtherTrunkError: the log has another trunk.
        BundleError: it is no trunk folder.
        StoreError: the store cannot be used.
    """
    manifest, files = read_trunk_folder(folder)
    logged = log.follow(LogView()).trunk
    if logged is not None and logged.trunk != manifest.digest:
        raise OtherTrunkError(live=logged.trunk, given=manifest.digest)
    return store_trunk(log, (folder / TRUNK_MANIFEST).read_bytes(), files)


def wait_for_trunk(url: str) -> None:
    """Return once the log at this URL names a trunk, however long that takes.

    Raises:
        StoreError: the log cannot be read.
    """
    log, view = ask_until_answered(lambda: HeadLog(url)), LogView()
    while (view := ask_until_answered(lambda: log.follow(view))).trunk is None:
        logger.warning("%s has no trunk; waiting for headstock trunk FOLDER", url)
        time.sleep(CHECK_S)
