"""Distillations of one namespace, for notebooks and programs; the commands of `opd` are thin over it."""

import difflib
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from opd_core.api.types import OPDDistillation
from opd_core.artifacts import StudentManifest
from opd_core.errors import InvalidError, UnavailableError
from opd_core.stages import Condition

from opd_cli.cluster import download, logs, students
from opd_cli.cluster.connection import APPLY, MANAGER, MERGE, TABLE, core, distillations
from opd_cli.cluster.distillation import Distillation, parse_time
from opd_cli.cluster.events import Event, event
from opd_cli.cluster.follow import follow
from opd_cli.cluster.kubeconfig import connect
from opd_cli.cluster.refusals import ConflictError, NotFoundError, RejectedError
from opd_cli.cluster.submission import Submission, content, explain, parse, said

LATEST = "latest"  # of students: the newest that passed its gate


class Distillations:
    """Distillations of one namespace.

    Every method raises an `OPDError` whose text says what to do: `RejectedError` where the API server says no,
    `NotFoundError` where there is no such object, `UnavailableError` where nobody answers or time is up.

    Args:
        namespace: default: the context's. kubeconfig: default: $KUBECONFIG, then ~/.kube/config, then the service
            account of the pod that this runs in. context: default: the kubeconfig's current one.
    """

    def __init__(
        self, namespace: str | None = None, *, kubeconfig: str | Path | None = None, context: str | None = None
    ) -> None:
        self.connection = connect(Path(kubeconfig) if kubeconfig else None, context)
        self.namespace = namespace or self.connection.namespace

    # ---------------------------------------------------------------------------------------------------- reading

    def get(self, name: str) -> Distillation:
        try:
            return self._read(name)
        except NotFoundError as error:
            raise self._missing(name) from error

    def list(self, *, all_namespaces: bool = False) -> Sequence[Distillation]:
        path = distillations("" if all_namespaces else self.namespace)
        return [Distillation(item) for item in self.connection.request("GET", path)["items"]]

    def watch(self, name: str, *, timeout: float | None = None) -> Generator[Distillation, None, None]:
        """The object as it is, then after each change, up to the state in which it is `finished`.

        Ends after `timeout` seconds; to end earlier, leave the loop or `close()` it.
        """
        with closing(self._follow(name, timeout)) as states:
            for state in states:
                yield state
                if state.finished:
                    return

    def wait(self, name: str, condition: Condition | str, *, timeout: float | None) -> Distillation:
        """The object once `condition` is True of its newest spec.

        Args:
            timeout: seconds; None waits as long as it takes.

        Raises:
            GateError, InvalidError, RefusedError, DivergedError, StorageError, OPDError: it has failed, so the
                condition cannot become True. UnavailableError: time is up.
        """
        wanted = Condition(condition)
        state: Distillation | None = None
        with closing(self._follow(name, timeout)) as states:
            for state in states:
                if state.reached(wanted):
                    return state
        assert timeout is not None, "without one only a state or an error ends the loop"
        found = state.condition(wanted) if state else None
        why = f"{found.reason}: {found.message}".rstrip(": ") if found else "the operator has not judged this spec yet"
        raise UnavailableError(f"{name} is not {wanted.value} after {timeout:g} s ({why})")

    def events(self, name: str) -> Sequence[Event]:
        """Of the object and of its pods, oldest first."""
        distillation = self.get(name)
        pods = {pod["metadata"]["uid"] for pod in logs.labelled(self.connection, distillation)}
        wanted = {distillation.manifest["metadata"]["uid"], *pods}
        items = self.connection.request("GET", core(self.namespace, "events"))["items"]
        events = [event(item) for item in items if item["involvedObject"].get("uid") in wanted]
        return sorted(events, key=lambda each: parse_time(each.time))

    def logs(
        self,
        name: str,
        role: logs.Role | str | None = None,
        *,
        follow: bool = False,
        previous: bool = False,
        all_ranks: bool = False,
        tell: Callable[[str], None] = lambda _: None,
    ) -> Generator[logs.LogLine, None, None]:
        """Lines of the pods of a role: teach, teachers, trainer, evaluator, endpoint.

        Args:
            role: default: that of the stage at work.
            follow: wait for the pods, then give their lines until they end; to end earlier, leave the loop.
            previous: of the containers before their last restart. all_ranks: of every training pod, not the first.
            tell: is told what is waited for.
        """
        chosen = logs.Role(role) if role else logs.ROLES[self.get(name).stage]
        wanted = logs.Wanted(chosen, follow, previous, all_ranks)
        return logs.read(self.connection, lambda: self.get(name), wanted, tell)

    def get_student(self, name: str, directory: str | Path, digest: str | None = None) -> StudentManifest:
        """Copy a student, by default the newest, to a new `directory`, through a pod that mounts its claim.

        Args:
            digest: or its first seven hexadecimal digits or more.
        """
        distillation = self.get(name)
        known = students.known(distillation)
        if not known:
            raise InvalidError(f"{name} has no student yet; wait for it: opd wait {name} --for=Trained")
        student = students.find(distillation, digest) if digest else known[-1]
        if student.uri is None:
            raise InvalidError(f"{name} does not say where student {student.digest} is")
        source = download.find_source(logs.labelled(self.connection, distillation), student.uri)
        return download.copy_student(
            self.connection, source, Path(directory), student.digest, distillation.spec["model"]["uri"]
        )

    # ---------------------------------------------------------------------------------------------------- writing

    def submit(
        self,
        spec: str | Path | Mapping[str, Any] | OPDDistillation,
        *,
        dry_run: bool = False,
        force_conflicts: bool = False,
    ) -> Submission:
        """Check a spec here, then apply it (server-side, as field manager `opd-cli`).

        Args:
            spec: a file, its content, or the object. dry_run: let the API server check it and keep nothing.
            force_conflicts: take over fields that others have set.

        Raises:
            SpecError: every problem of the spec at once. RejectedError: those that only the API server knows.
        """
        distillation = parse(spec)
        name, namespace = distillation.metadata.name, distillation.metadata.namespace or self.namespace
        if namespace != self.namespace:
            raise InvalidError(
                f"metadata.namespace is {namespace}, and this is namespace {self.namespace}; "
                f"give --namespace {namespace}"
            )
        manifest = said(distillation)
        try:
            before: Distillation | None = self._read(name)
        except NotFoundError:
            before = None
        try:
            after = self._apply(name, manifest, dry_run=dry_run, force=force_conflicts)
        except ConflictError as error:
            if any(claim.manager != MANAGER for claim in error.claims):
                raise explain(error, manifest, before) from error
            # What suspend and promote set is ours, too.
            after = self._apply(name, manifest, dry_run=dry_run, force=True)
        if before is None:
            return Submission(after, "created")
        return Submission(after, "unchanged" if content(before) == content(after) else "configured")

    def suspend(self, name: str, *, endpoint: bool = False) -> Distillation:
        """Free what trains and evaluates, or what serves."""
        return self._edit(name, {"endpoint": {"suspend": True}} if endpoint else {"suspend": True})

    def resume(self, name: str, *, endpoint: bool = False) -> Distillation:
        """Go on at the last checkpoint, or serve the same student again."""
        return self._edit(name, {"endpoint": {"suspend": False}} if endpoint else {"suspend": False})

    def promote(self, name: str, digest: str) -> Distillation:
        """Serve a student of this object, whether or not it passed its gate.

        Args:
            digest: or its first seven hexadecimal digits or more; `latest` is the newest that passes, now and later.
        """
        distillation = self.get(name)
        if not distillation.spec["endpoint"]["enabled"]:
            raise InvalidError(f"{name} serves no student: spec.endpoint.enabled is false; submit it with true")
        pinned = "" if digest == LATEST else students.find(distillation, digest).digest
        return self._edit(name, {"endpoint": {"studentDigest": pinned}})

    def rollback(self, name: str) -> Distillation:
        """Serve the student before the one that serves now; during a rollout, the one that it replaces."""
        return self._edit(name, {"endpoint": {"studentDigest": students.before(self.get(name)).digest}})

    def delete(self, name: str, *, wait: bool = False, timeout: float | None = None) -> None:
        """Delete the object and what belongs to it, but for students and checkpoints in its claim.

        Args:
            wait: until its pods are gone, too; `timeout` seconds at most, None for as long as it takes.
        """
        policy = {"propagationPolicy": "Foreground" if wait else "Background"}
        try:
            self.connection.request("DELETE", distillations(self.namespace, name), body=policy)
        except NotFoundError as error:
            raise self._missing(name) from error
        if wait:
            try:
                for _ in follow(self.connection, self.namespace, name, timeout):
                    pass
            except NotFoundError:
                return
            assert timeout is not None
            raise UnavailableError(f"{name} is still there after {timeout:g} s: its pods are ending")

    # ---------------------------------------------------------------------------------------------------- details

    def printed(self, *, all_namespaces: bool = False) -> dict[str, Any]:
        """What `kubectl get opd` prints, as a Table of meta.k8s.io/v1."""
        path = distillations("" if all_namespaces else self.namespace)
        return self.connection.request("GET", path, accept=TABLE)

    def _read(self, name: str) -> Distillation:
        return Distillation(self.connection.request("GET", distillations(self.namespace, name)))

    def _follow(self, name: str, timeout: float | None) -> Generator[Distillation, None, None]:
        self.get(name)  # says what is there instead
        yield from follow(self.connection, self.namespace, name, timeout)

    def _apply(self, name: str, manifest: Mapping[str, Any], *, dry_run: bool, force: bool) -> Distillation:
        query = {"fieldManager": MANAGER, "force": "true" if force else "", "dryRun": "All" if dry_run else ""}
        path = distillations(self.namespace, name)
        return Distillation(self.connection.request("PATCH", path, query, manifest, content_type=APPLY))

    def _edit(self, name: str, spec: Mapping[str, Any]) -> Distillation:
        path = distillations(self.namespace, name)
        try:
            return Distillation(
                self.connection.request("PATCH", path, {"fieldManager": MANAGER}, {"spec": spec}, content_type=MERGE)
            )
        except NotFoundError as error:
            raise self._missing(name) from error

    def _missing(self, name: str) -> NotFoundError:
        try:
            known = [each.name for each in self.list()]
        except RejectedError:  # who may get an object may not always list them
            known = []
        near = difflib.get_close_matches(name, known, n=3) or known[:3]
        remedy = f"did you mean {' or '.join(near)}?" if near else "`opd status -A` lists those of all namespaces"
        return NotFoundError(f"no distillation {name} in namespace {self.namespace}; {remedy}")
