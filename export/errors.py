"""The base of every error that a caller of this room can cause."""


class ExportError(ValueError):
    """A backbone or head cannot be exported, or the graph is not what was trained."""
