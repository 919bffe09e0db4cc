"""Which cluster: the kubeconfig, else the service account of the pod that this runs in."""

import os
from importlib import metadata
from pathlib import Path

import yaml
from opd_core.errors import InvalidError

from opd_cli.cluster.connection import MANAGER, Connection

_POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def connect(kubeconfig: Path | None = None, context: str | None = None) -> Connection:
    """A connection; asks nothing yet.

    Raises:
        InvalidError: no kubeconfig and no service account, or the kubeconfig has no such context.
    """
    try:
        from kubernetes import client, config
    except ModuleNotFoundError as error:
        raise InvalidError(f"{error.name} is missing; in the checkout: pip install '.[cluster]'") from error

    if kubeconfig and not kubeconfig.is_file():
        raise InvalidError(f"--kubeconfig {kubeconfig}: no such file")
    # Read now: the client reads the variable once, when it is imported.
    files = str(kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config")
    settings = client.Configuration()
    contexts, current = _contexts(files)
    try:
        if contexts is None:
            config.load_incluster_config(client_configuration=settings)
            namespace = _POD_NAMESPACE.read_text().strip()
        else:
            chosen = context or current
            if chosen not in contexts:
                raise InvalidError(f"--context {chosen}: the kubeconfig has {', '.join(sorted(contexts)) or 'none'}")
            namespace = contexts[chosen]
            config.load_kube_config(files, chosen, client_configuration=settings)
    except config.ConfigException as error:
        why = "no such file, and this is no pod of a cluster" if contexts is None else str(error)
        raise InvalidError(f"{files}: {why}; give a kubeconfig with --kubeconfig FILE") from error
    settings.retries = 0  # whoever waits asks again, with an end
    settings.keep_alive = True  # a log may be silent for hours
    api = client.ApiClient(settings)
    api.user_agent = f"{MANAGER}/{metadata.version('diffusion-opd')}"
    options = (("kubeconfig", kubeconfig), ("context", context))
    return Connection(api, namespace, "".join(f" --{name}={value}" for name, value in options if value))


def _contexts(files: str) -> tuple[dict[str, str] | None, str]:
    """Contexts with their namespaces, None without a kubeconfig; and the current one, which need not be there."""
    from kubernetes.config import ConfigException
    from kubernetes.config.kube_config import KubeConfigMerger

    try:
        merged = KubeConfigMerger(files).config
        if merged is None:
            return None, ""
        namespaces = {each["name"]: each["context"].safe_get("namespace") or "default" for each in merged["contexts"]}
        return namespaces, merged.safe_get("current-context") or ""
    except (ConfigException, yaml.YAMLError, TypeError) as error:  # TypeError: its top is no mapping
        raise InvalidError(f"{files} is no kubeconfig: {error}; give one with --kubeconfig FILE") from error
