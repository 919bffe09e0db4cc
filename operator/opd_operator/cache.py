"""The objects as they were last seen: filled by listing, kept up by events and by our own writes. Never ahead of the
API server, never behind what this process wrote itself.

Thousands of objects have to fit, and each is read only when somebody looks at it: what is kept is JSON, compressed
against the first object of its kind, which differs from it in little more than names.
"""

import json
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

from opd_core.api.types import KIND

from opd_operator import names

Object = Mapping[str, Any]
Key = tuple[str, str]  # namespace, name of a distillation
_Family = tuple[str, str]  # namespace and uid of a distillation: what another namespace claims to own is another family
_GONE = 20_000  # deleted objects that are remembered


class _Kept(NamedTuple):
    """`owner`: name of the distillation."""

    uid: str
    version: int
    owner: str
    packed: bytes


class Cache:
    def __init__(self) -> None:
        self._distillations: dict[Key, _Kept] = {}
        self._children: defaultdict[_Family, dict[tuple[str, str], _Kept]] = defaultdict(dict)
        self._gone: OrderedDict[str, None] = OrderedDict()  # uids
        self._samples: dict[str, bytes] = {}  # the first object of every kind

    def __len__(self) -> int:
        return len(self._distillations)

    def __iter__(self) -> Iterator[Key]:
        """The distillations that are known now."""
        return iter(list(self._distillations))

    def inhabited(self) -> list[Key]:
        """Of the distillations that have pods."""
        return [
            key
            for key, kept in list(self._distillations.items())
            if any(kind == "Pod" for kind, _ in self._children.get((key[0], kept.uid), ()))
        ]

    def get(self, key: Key) -> Object | None:
        """A distillation."""
        kept = self._distillations.get(key)
        return self._unpacked(kept, KIND) if kept else None

    def put(self, obj: dict[str, Any]) -> Key | None:
        """Keep `obj` unless a newer one is known. Returns the distillation that it concerns, if it is news."""
        metadata = obj["metadata"]
        if metadata["uid"] in self._gone:
            return None  # a page of a list, or the answer to a write, that is older than its deletion
        metadata.pop("managedFields", None)  # half of an object, and nobody here reads it
        if obj["kind"] == KIND:
            key = (metadata["namespace"], metadata["name"])
            if not _newer(obj, self._distillations.get(key)):
                return None
            self._distillations[key] = self._packed(obj, key[1])
            return key
        owner = _owner(obj)
        if owner is None:
            return None
        uid, name = owner
        slot = (obj["kind"], metadata["name"])
        family = self._children[metadata["namespace"], uid]
        if not _newer(obj, family.get(slot)):
            return None
        family[slot] = self._packed(obj, name)
        return metadata["namespace"], name

    def remove(self, obj: Object) -> Key | None:
        """Forget a deleted object. Returns the distillation that it concerns."""
        metadata = obj["metadata"]
        if obj["kind"] == KIND:
            return self._drop_distillation((metadata["namespace"], metadata["name"]), metadata["uid"])
        owner = _owner(obj)
        if owner is None:
            return None
        uid, name = owner
        self._drop_child((metadata["namespace"], uid), (obj["kind"], metadata["name"]), metadata["uid"])
        return metadata["namespace"], name

    def _drop_distillation(self, key: Key, uid: str) -> Key:
        self._bury(uid)
        known = self._distillations.get(key)
        if known is not None and known.uid == uid:
            del self._distillations[key]
            self._children.pop((key[0], uid), None)
        return key

    def _drop_child(self, home: _Family, slot: tuple[str, str], uid: str) -> None:
        self._bury(uid)
        family = self._children.get(home, {})
        known = family.get(slot)
        if known is not None and known.uid == uid:
            del family[slot]
            if not family:
                self._children.pop(home, None)

    def _bury(self, uid: str) -> None:
        self._gone[uid] = None
        if len(self._gone) > _GONE:
            self._gone.popitem(last=False)

    def children(self, obj: Object) -> list[Object]:
        """By uid, not by name: an object made again under an old name adopts nothing."""
        metadata = obj["metadata"]
        family = self._children.get((metadata["namespace"], metadata["uid"]), {})
        return [self._unpacked(kept, kind) for (kind, _), kept in family.items()]

    def retain(self, kind: str, present: Container[str], version: int) -> set[Key]:
        """Forget what a complete list of a kind, as of `version`, does not have; `present` are its uids. Returns the
        distillations whose objects were forgotten."""
        news: set[Key] = set()
        if kind == KIND:
            for key, kept in list(self._distillations.items()):
                if kept.uid not in present and kept.version <= version:
                    news.add(self._drop_distillation(key, kept.uid))
            return news
        for home, family in list(self._children.items()):
            for slot, kept in list(family.items()):
                if slot[0] == kind and kept.uid not in present and kept.version <= version:
                    self._drop_child(home, slot, kept.uid)
                    news.add((home[0], kept.owner))
        return news

    def _packed(self, obj: Object, owner: str) -> _Kept:
        text = json.dumps(obj).encode()
        deflate = zlib.compressobj(level=1, zdict=self._samples.setdefault(obj["kind"], text))
        return _Kept(obj["metadata"]["uid"], version_of(obj), owner, deflate.compress(text) + deflate.flush())

    def _unpacked(self, kept: _Kept, kind: str) -> Object:
        content: Object = json.loads(zlib.decompressobj(zdict=self._samples[kind]).decompress(kept.packed))
        return content


def _owner(obj: Object) -> tuple[str, str] | None:
    """(uid, name) of the distillation."""
    for reference in obj["metadata"].get("ownerReferences") or []:
        if reference.get("kind") == KIND and reference.get("apiVersion", "").startswith(f"{names.GROUP}/"):
            return reference["uid"], reference["name"]
    if obj["kind"] != "Pod":
        return None  # labels alone make nothing ours
    labels = obj["metadata"].get("labels") or {}
    if names.OWNER in labels and names.DISTILLATION in labels:
        return labels[names.OWNER], labels[names.DISTILLATION]
    return None


def _newer(obj: Object, known: _Kept | None) -> bool:
    return known is None or obj["metadata"]["uid"] != known.uid or version_of(obj) > known.version


def version_of(obj: Object) -> int:
    """Resource versions of one kind are ordered numbers (KEP-5504)."""
    return int(obj["metadata"]["resourceVersion"])
