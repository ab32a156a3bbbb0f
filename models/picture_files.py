"""Picture files as they lie in a folder: which can be read, and which are there twice."""

import hashlib
from pathlib import Path

from models.data import Picture, Skipped
from models.pictures import PictureError, decode

ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
# A JPEG is read to its end at 1/8 of its size, which is enough to find it damaged.
_PROBE_PX = 32


class PictureReader:
    """Reads pictures one by one and remembers what it left out.

    Args:
        root: Folder that names are relative to.
    """

    def __init__(self, root: Path) -> None:
        self.skipped: list[Skipped] = []
        self._root = root
        self._seen: dict[str, str] = {}

    def read(self, path: Path) -> Picture | None:
        """The picture, or None if it cannot be read or was read before under another name."""
        name = path.relative_to(self._root).as_posix()
        if path.is_dir() or path.suffix.lower() not in ENDINGS:
            return self.skip(name, f"not a {', '.join(ENDINGS)} file")
        try:
            data = path.read_bytes()
            decode(data, shorter_side_px=_PROBE_PX)
        except (PictureError, OSError) as error:
            return self.skip(name, str(error))
        key = hashlib.sha256(data).hexdigest()
        if first := self._seen.get(key):
            return self.skip(name, f"the same picture as {first}")
        self._seen[key] = name
        return Picture(path, key)

    def skip(self, name: str, reason: str) -> None:
        """Leave a file out."""
        self.skipped.append(Skipped(name, reason))

    def hint(self) -> str:
        """The first files left out, for an error about too few pictures."""
        some = "; ".join(f"{item.path}: {item.reason}" for item in self.skipped[:3])
        return f" Left out {len(self.skipped)} files, such as {some}" if some else ""
