"""Which services answer from one head log now, as each says of itself.

A marker object for each, written every few seconds while it answers. Ages are differences between
two times of the store's own clock, so clocks of machines need not agree. Nothing that keeps the log
right depends on it: it only lets a push be refused that not everybody would see at once.
"""

from __future__ import annotations

from datetime import timedelta

from serve.store import Store

FOLDER = "clusters/"
SHOW_EVERY_S = 3.0
GONE_AFTER = timedelta(seconds=10)


class Presence:
    """The marker of one cluster, and a look at those of others."""

    def __init__(self, store: Store, cluster: str) -> None:
        self._store, self._name = store, f"{FOLDER}{cluster}"

    def show(self) -> None:
        """Say that this cluster answers.

        Raises:
            StoreError: the store cannot be written.
        """
        self._store.put(self._name, b"", f"The marker {self._name}")

    def others(self) -> list[str]:
        """The other clusters that answered lately, after this one has shown itself.

        Raises:
            StoreError: the store cannot be read.
        """
        markers = {marker.name: marker.written_at for marker in self._store.list(FOLDER)}
        mine = markers.pop(self._name)
        return [
            name.removeprefix(FOLDER)
            for name, written_at in markers.items()
            if written_at > mine - GONE_AFTER
        ]
