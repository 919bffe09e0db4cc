#!/bin/sh
# What the Containerfiles run: install.sh packages NAME | project
# Every package is checked against its digest, sources are built with pinned tools, and byte code is made now, since the
# root will be read-only.
set -eu
export PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
export UV_LINK_MODE=copy UV_NO_PROGRESS=1 UV_PYTHON_DOWNLOADS=never SOURCE_DATE_EPOCH=1580601600
here=$(dirname "$0")

# A mirror of packages is a secret of the build, so that its password stays out of every layer and history.
mirror=/run/secrets/PIP_INDEX_URL
if [ -f $mirror ]; then
  PIP_INDEX_URL=$(cat $mirror)
  export PIP_INDEX_URL UV_DEFAULT_INDEX="$PIP_INDEX_URL"
fi
# The certificates of the system, to which a company adds its own; pip and uv bring others.
system=/etc/ssl/certs/ca-certificates.crt
[ ! -f $system ] || export PIP_CERT=$system SSL_CERT_FILE=$system
[ -d /root/.cache/uv ] || export UV_NO_CACHE=1 # there if the builder mounts one

# uv is gone again at the end of the step: a read-only root has no use for it.
tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT
python3 -m pip install --quiet --require-hashes --target "$tools" -r "$here/uv.txt"

venv() { [ -d /opt/opd ] || python3 -m venv --without-pip /opt/opd; }
uv() { "$tools/bin/uv" pip install --quiet --python /opt/opd/bin/python --no-deps --build-constraints "$here/build.txt" "$@"; }

# compile ROOT: what was installed below it since this script began. Not checked against times, which layers may change.
# Some packages carry templates and code for other Pythons, which does not compile: no error.
compile() {
  find "$1/opt/opd/lib" -name '*.py' -cnewer "$tools/began" -print0 | xargs -0 -r -n 500 -P "$(nproc)" \
    /opt/opd/bin/python -m compileall -q --invalidation-mode unchecked-hash -s "$1" -p / || true
}

touch "$tools/began"
case $1 in
  packages)
    venv
    uv --require-hashes -r "$here/$2.txt"
    if [ "${DEVICE:-cuda}" = cpu ]; then
      # Gigabytes that PyTorch's CUDA build only opens on a GPU: cuDNN's kernels, what links or compiles CUDA code.
      cd /opt/opd/lib/python3*/site-packages
      find nvidia triton/backends -type f \
        \( -path '*/cudnn/lib/libcudnn_*' -o -path '*/backends/*/bin/*' -o -name '*.a' -o -name '*.bc' \) -delete
    fi
    compile ""
    getent passwd 65532 >/dev/null || {
      groupadd --gid 65532 nonroot
      useradd --uid 65532 --gid 65532 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin nonroot
    }
    ;;
  project) # into /project, from where a later stage copies it
    venv
    uv --prefix /project/opt/opd /source
    compile /project
    ;;
esac
