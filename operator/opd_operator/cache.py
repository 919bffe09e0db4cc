"""The objects as they were last seen: filled by listing, kept up by events and by our own writes. Never ahead of the
API server, never behind what this process wrote itself."""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from opd_core.api.types import KIND

from opd_operator import names

Object = Mapping[str, Any]
Key = tuple[str, str]  # namespace, name of a distillation
_Family = tuple[str, str]  # namespace and uid of a distillation: what another namespace claims to own is another family
_GONE = 20_000  # deleted objects that are remembered


class Cache:
    def __init__(self) -> None:
        self.distillations: dict[Key, Object] = {}
        self._children: defaultdict[_Family, dict[tuple[str, str], Object]] = defaultdict(dict)
        self._gone: OrderedDict[str, None] = OrderedDict()  # uids

    def put(self, obj: dict[str, Any]) -> Key | None:
        """Keep `obj` unless a newer one is known. Returns the distillation that it concerns, if it is news."""
        metadata = obj["metadata"]
        if metadata["uid"] in self._gone:
            return None  # a page of a list, or the answer to a write, that is older than its deletion
        metadata.pop("managedFields", None)  # half of an object, and nobody here reads it
        if obj["kind"] == KIND:
            key = (metadata["namespace"], metadata["name"])
            if not _newer(obj, self.distillations.get(key)):
                return None
            self.distillations[key] = obj
            return key
        owner = _owner(obj)
        if owner is None:
            return None
        slot = (obj["kind"], metadata["name"])
        family = self._children[metadata["namespace"], owner[0]]
        if not _newer(obj, family.get(slot)):
            return None
        family[slot] = obj
        return metadata["namespace"], owner[1]

    def remove(self, obj: Object) -> Key | None:
        """Forget a deleted object. Returns the distillation that it concerns."""
        metadata = obj["metadata"]
        self._gone[metadata["uid"]] = None
        if len(self._gone) > _GONE:
            self._gone.popitem(last=False)
        if obj["kind"] == KIND:
            key = (metadata["namespace"], metadata["name"])
            last = self.distillations.get(key)
            if last is not None and last["metadata"]["uid"] == metadata["uid"]:
                del self.distillations[key]
                self._children.pop((metadata["namespace"], metadata["uid"]), None)
            return key
        owner = _owner(obj)
        if owner is None:
            return None
        slot, home = (obj["kind"], metadata["name"]), (metadata["namespace"], owner[0])
        family = self._children.get(home, {})
        known = family.get(slot)
        if known is not None and known["metadata"]["uid"] == metadata["uid"]:
            del family[slot]
            if not family:
                self._children.pop(home, None)
        return metadata["namespace"], owner[1]

    def children(self, obj: Object) -> list[Object]:
        """By uid, not by name: an object made again under an old name adopts nothing."""
        metadata = obj["metadata"]
        return list(self._children.get((metadata["namespace"], metadata["uid"]), {}).values())

    def replace(self, kind: str, listed: Iterable[dict[str, Any]], version: int) -> tuple[set[Key], int]:
        """Take over a complete list of one kind. Returns the distillations whose objects were news, and the newest
        version of what was: with a watch that works there is none, or its event is on the way."""
        present: set[str] = set()
        news: set[Key] = set()
        newest = 0
        for obj in listed:
            present.add(obj["metadata"]["uid"])
            if key := self.put(obj):
                news.add(key)
                newest = max(newest, _version(obj))
        for known in list(self._all(kind)):
            if known["metadata"]["uid"] not in present and _version(known) <= version and (key := self.remove(known)):
                news.add(key)
        return news, newest

    def _all(self, kind: str) -> Iterator[Object]:
        if kind == KIND:
            yield from self.distillations.values()
            return
        for family in list(self._children.values()):
            yield from (child for (of_kind, _), child in list(family.items()) if of_kind == kind)


def _owner(obj: Object) -> tuple[str, str] | None:
    """(uid, name) of the distillation."""
    for reference in obj["metadata"].get("ownerReferences") or []:
        if reference.get("kind") == KIND:
            return reference["uid"], reference["name"]
    labels = obj["metadata"].get("labels") or {}
    if names.OWNER in labels and names.DISTILLATION in labels:
        return labels[names.OWNER], labels[names.DISTILLATION]
    return None


def _newer(obj: Object, known: Object | None) -> bool:
    if known is None or known["metadata"]["uid"] != obj["metadata"]["uid"]:
        return True
    return _version(obj) > _version(known)


def _version(obj: Object) -> int:
    """Resource versions of one kind are ordered numbers (KEP-5504)."""
    return int(obj["metadata"]["resourceVersion"])
