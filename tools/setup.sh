#!/usr/bin/env bash
# Prepares .venv for the make targets: system packages, Python packages pinned with hashes, the tritonserver binary.
# Idempotent: where nothing changed it ends within a second. `make setup` calls it.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

python=${PYTHON:-}
if [ -z "$python" ]; then
  for candidate in python3.11 python3.12 python3.13 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      python=$candidate
      break
    fi
  done
fi
[ -n "$python" ] || die "no Python 3.11 or newer; on Debian or Ubuntu: sudo apt-get install python3 python3-venv libpython3-dev"
# opd_serving.teacher.server_binary.PYTHONS; said here, before gigabytes are fetched.
[ -n "${TRITONSERVER:-}" ] || "$python" -c 'import sys; sys.exit(sys.version_info[:2] > (3, 13))' ||
  die "$python is Python $("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])'), and Triton's Python backend has a stub for 3.11 to 3.13; install python3.13 with python3.13-venv and libpython3.13, or set TRITONSERVER to a tritonserver of your own"

# What the stamp covers: the interpreter and every file that says what belongs into the environment.
stamp=$({ "$python" -c 'import sys; print(sys.version, sys.prefix)'; cat requirements/{uv,dev}.txt pyproject.toml examples/tiny/pyproject.toml "$0"; } | sha256sum | cut -d' ' -f1)
if [ "$(cat .venv/setup.stamp 2>/dev/null)" = "$stamp" ]; then
  exit 0
fi

missing=()
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
"$python" -c '
import pathlib, sys, sysconfig
name = sysconfig.get_config_var("INSTSONAME") or ""
dirs = [sysconfig.get_config_var("LIBDIR") or "", "/usr/lib/" + (sysconfig.get_config_var("MULTIARCH") or "")]
sys.exit(not (name.endswith(".1.0") and any(pathlib.Path(d, name).exists() for d in dirs)))' || missing+=("lib$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')")
if [ ${#missing[@]} -gt 0 ]; then
  install="apt-get install -y --no-install-recommends ${missing[*]}"
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    say "system packages: $install"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive $install -qq; } >&2 || die "could not run: $install"
  else
    die "system packages are missing; run: sudo $install"
  fi
fi

[ -x .venv/bin/python ] || { say "virtual environment in .venv ($("$python" --version))"; "$python" -m venv .venv; }
.venv/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/uv.txt
say "Python packages from requirements/dev.txt (PyTorch is the CUDA build: some gigabytes the first time)"
export VIRTUAL_ENV=$PWD/.venv
# Compiled here: uv leaves that to the first import, which keeps nothing where PYTHONDONTWRITEBYTECODE is set, as in many
# container images; every program would then compile PyTorch and diffusers anew, 6 seconds of a core.
.venv/bin/uv pip sync -q --require-hashes --compile-bytecode requirements/dev.txt
.venv/bin/uv pip install -q --no-deps --no-build-isolation --reinstall-package diffusion-opd -e . -e examples/tiny
say "tritonserver"
.venv/bin/python -m opd_serving.teacher.server_binary >&2
echo "$stamp" >.venv/setup.stamp
say "done"
