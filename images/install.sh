#!/bin/sh
# In the last stage of an image: installs /wheels into /opt/opd, and makes the user that every pod runs as.
set -eu
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
python3 -m venv --without-pip /opt/opd
python3 -m pip --python /opt/opd/bin/python install --no-index --no-deps --no-compile /wheels/*.whl
# Byte code now, since the root will be read-only, and not checked against times, which layers may change. Some packages
# carry templates and code for other Pythons, which does not compile: no error.
/opt/opd/bin/python -m compileall -q -j0 --invalidation-mode unchecked-hash /opt/opd/lib || true
groupadd --gid 65532 nonroot
useradd --uid 65532 --gid 65532 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin nonroot
