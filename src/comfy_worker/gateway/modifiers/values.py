"""A dict that records which of its values are never read."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from typing import Any


class RecordedValues(dict[str, Any]):
    """A dict that records which of its initial keys were never read.

    Attributes:
        unread: these keys.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__(given)
        self.unread = dict.fromkeys(given)

    def __getitem__(self, key: str) -> Any:
        self.unread.pop(key, None)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.unread.pop(key, None)  # type: ignore[call-overload]
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value or the default."""
        self.unread.pop(key, None)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        """Return a value, or the default, and remove it."""
        self.unread.pop(key, None)
        return super().pop(key, *default)

    def __iter__(self) -> Iterator[str]:
        self.unread.clear()
        return super().__iter__()

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        """Return all items, and count them as read."""
        self.unread.clear()
        return super().items()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        """Return all values, and count them as read."""
        self.unread.clear()
        return super().values()
