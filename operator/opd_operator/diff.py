"""What to apply and what to delete so that the children become what shall be. Pure."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kubernetes.utils.quantity import parse_quantity

Object = Mapping[str, Any]

# Never changed once made: a Job's template is immutable, and so is a ConfigMap named by its content.
_CREATED_ONCE = {"Job", "ConfigMap"}
_MOUNTED = {"ConfigMap", "ServiceAccount"}
_NOT_OURS = {"Pod"}  # they belong to their Jobs and Deployments


@dataclass(frozen=True)
class Changes:
    """In this order: what holds devices goes, what shall be is applied, what pods may mount goes last."""

    free: list[Object]
    apply: list[dict[str, Any]]
    sweep: list[Object]


def changes(
    desired: Iterable[dict[str, Any]],
    live: Iterable[Object],
    keep: Iterable[tuple[str, str]] = (),
    settled: Callable[[Object, Object], bool] = lambda manifest, found: False,
) -> Changes:
    """What makes the children what they shall be. An object that is being deleted is waited for; a ConfigMap stays as
    long as a Job that stays mounts it, since a Job keeps the spec that it was made with.

    What is applied has a uid where it is there already: it is about that object, and about no other of this name.

    Args:
        keep: (kind, name) of what stays as it is although nothing wants it any more.
        settled: whether applying this manifest would make what is there again, whatever it is.
    """
    existing = {(child["kind"], child["metadata"]["name"]): child for child in live if child["kind"] not in _NOT_OURS}
    apply, wanted = [], set(keep)
    for manifest in desired:
        key = (manifest["kind"], manifest["metadata"]["name"])
        wanted.add(key)
        found = existing.get(key)
        if found is None:
            apply.append(manifest)
        elif (
            not (_leaving(found) or manifest["kind"] in _CREATED_ONCE)
            and differs(manifest, found)
            and not settled(manifest, found)
        ):
            apply.append({**manifest, "metadata": {**manifest["metadata"], "uid": found["metadata"]["uid"]}})
    wanted |= {("ConfigMap", name) for key in wanted if key in existing for name in _mounted(existing[key])}
    unwanted = [child for key, child in existing.items() if key not in wanted and not _leaving(child)]
    return Changes(
        free=[child for child in unwanted if child["kind"] not in _MOUNTED],
        apply=apply,
        sweep=[child for child in unwanted if child["kind"] in _MOUNTED],
    )


def _mounted(child: Object) -> list[str]:
    """Names of the ConfigMaps in a Job's template."""
    if child["kind"] != "Job":
        return []
    volumes = child["spec"]["template"]["spec"].get("volumes") or []
    return [volume["configMap"]["name"] for volume in volumes if volume.get("configMap")]


def differs(wanted: Any, found: Any) -> bool:
    """Whether something of `wanted` is not so in `found`; what the API server and others add does not count."""
    if wanted == found:
        return False
    if isinstance(wanted, Mapping):
        if not wanted:
            return found not in (None, {})
        return not isinstance(found, Mapping) or any(differs(value, found.get(key)) for key, value in wanted.items())
    if isinstance(wanted, list):
        if len(wanted) != len(found or []):
            return True
        return any(differs(a, b) for a, b in zip(wanted, found or [], strict=True))
    if not wanted and found is None:  # the API server drops false, 0 and ""
        return False
    return not _same_quantity(wanted, found)


def shown(wanted: Any, found: Any) -> Any:
    """The part of `found` that `wanted` speaks of, lists as a whole."""
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        return {key: shown(value, found.get(key)) for key, value in wanted.items()}
    return found


def _same_quantity(wanted: Any, found: Any) -> bool:
    """The API server writes quantities in its own way: 1000m becomes 1."""
    if not (isinstance(wanted, str) and isinstance(found, str)):
        return False
    try:
        return bool(parse_quantity(wanted) == parse_quantity(found))
    except ValueError:
        return False


def _leaving(child: Object) -> bool:
    return "deletionTimestamp" in child["metadata"]
