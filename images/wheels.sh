#!/bin/sh
# In the first stage of an image: wheels.sh packages NAME makes the wheels of requirements/NAME.txt, wheels.sh project ours.
# Every package is checked against its digest; sources are built with pinned tools, and always to the same bytes.
set -eu
export SOURCE_DATE_EPOCH=1580601600 PYTHONHASHSEED=0
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
here=$(dirname "$0")

pip() { python3 -m pip --python "$here/venv/bin/python" "$@"; }

case $1 in
  packages)
    python3 -m venv --without-pip "$here/venv"
    pip install --require-hashes -r "$here/build.txt"
    pip wheel --no-deps --no-build-isolation --require-hashes -r "$here/$2.txt" --wheel-dir /wheels
    ;;
  project)
    pip wheel --no-deps --no-build-isolation --wheel-dir /wheels /source
    ;;
esac
