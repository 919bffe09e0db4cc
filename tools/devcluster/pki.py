"""Certificates of a throwaway cluster, and kubeconfig files that carry them."""

import base64
import json
import subprocess
from pathlib import Path

_DAYS = "3650"


def make_authority(folder: Path) -> None:
    """ca.{crt,key} that signs everything, and sa.{key,pub} for service account tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    _openssl(*_key(folder / "ca.key"), "-x509", "-out", folder / "ca.crt", "-days", _DAYS, "-subj", "/CN=devcluster")
    _openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", folder / "sa.key")
    _openssl("pkey", "-in", folder / "sa.key", "-pubout", "-out", folder / "sa.pub")


def make_certificate(folder: Path, name: str, subject: str, alternatives: str) -> None:
    """<name>.{crt,key}, for clients and servers. `alternatives` as openssl writes them: `DNS:localhost,IP:127.0.0.1`."""
    signed = ("-x509", "-CA", folder / "ca.crt", "-CAkey", folder / "ca.key", "-out", folder / f"{name}.crt")
    usage = ("-addext", f"subjectAltName={alternatives}", "-addext", "extendedKeyUsage=serverAuth,clientAuth")
    leaf = ("-addext", "basicConstraints=critical,CA:FALSE")
    _openssl(*_key(folder / f"{name}.key"), *signed, "-days", _DAYS, "-subj", subject, *usage, *leaf)


def write_kubeconfig(folder: Path, name: str, server: str, to: Path) -> None:
    """A kubeconfig for certificate `name` that needs no other file, so that it can be copied anywhere."""

    def inline(file: str) -> str:
        return base64.b64encode((folder / file).read_bytes()).decode()

    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "devcluster",
        "contexts": [{"name": "devcluster", "context": {"cluster": "devcluster", "user": name}}],
        "clusters": [
            {"name": "devcluster", "cluster": {"server": server, "certificate-authority-data": inline("ca.crt")}}
        ],
        "users": [
            {
                "name": name,
                "user": {"client-certificate-data": inline(f"{name}.crt"), "client-key-data": inline(f"{name}.key")},
            }
        ],
    }
    to.touch(mode=0o600)
    to.write_text(json.dumps(config, indent=2))  # JSON is YAML


def _key(file: Path) -> tuple[str | Path, ...]:
    return ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", file)


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"openssl {arguments[0]}: {done.stderr.strip()}")
