#!/usr/bin/env bash
# Builds what the development cluster runs from Go modules; what is there already is skipped. Prints the folder.
# usage: build.sh control-plane | node | crdcheck | helm | prometheus | traefik | browser      `node` includes the control plane
# Go is the one of PATH if it is new enough, else the one of .venv; Prometheus comes from Debian's package.
# OPD_KUBERNETES_VERSION picks another Kubernetes, OPD_DEVCLUSTER_CACHE another place for the programs.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
what=${1:?control-plane, node, crdcheck, helm, prometheus, traefik or browser}
pinned=v1.36.3
go_wanted=1.26 # of kube/go.mod
version=${OPD_KUBERNETES_VERSION:-$pinned}
bin=${OPD_DEVCLUSTER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/diffusion-opd/devcluster}/$version
mkdir -p "$bin"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export GOFLAGS="-buildvcs=false -trimpath" CGO_ENABLED=0

say() { printf 'devcluster: %s\n' "$*" >&2; }

alone() { # PART: two builds of one at once would only take twice as long; who wants another part does not wait
  exec 9>"$bin/.$1.lock" && flock 9
}

need_go() { # puts a Go that is new enough first into PATH
  local go version
  for go in "$(command -v go)" "$here/../../.venv/bin/go"; do
    # Asked outside of any module, so that it does not fetch the Go that a module wants.
    version=$(cd "$work" && "$go" env GOVERSION 2>/dev/null) || continue
    if printf 'go%s\n%s\n' "$go_wanted" "$version" | sort --check=quiet --version-sort; then
      PATH=$(dirname "$go"):$PATH
      return
    fi
  done
  say "building needs Go $go_wanted or newer; make setup installs one into .venv"
  exit 1
}

install() { # NAME PACKAGE@VERSION [go flag...]
  local name=$1 package=$2
  shift 2
  [ -x "$bin/$name" ] && return
  need_go
  say "building $name ${package##*@}"
  GOBIN=$work/out go install -ldflags "-s -w" "$@" "$package"
  mv "$work/out/$name" "$bin/$name"
}

module() { # PACKAGE@VERSION FOLDER: its source, writable
  cp -r "$(go mod download -json "$1" | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')" "$2"
  chmod -R u+w "$2"
}

packages() { # apt packages, when a command or header of theirs is missing
  local missing=("$@")
  [ ${#missing[@]} = 0 ] && return
  say "system packages: ${missing[*]}"
  [ "$(id -u)" = 0 ] || { say "run: sudo apt-get install -y --no-install-recommends ${missing[*]}"; exit 1; }
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >&2
}

# One program that is etcd, API server, controller manager, scheduler, kubelet, proxy or kubectl, by the name it is called.
control_plane() {
  command -v openssl >/dev/null || packages openssl
  if [ ! -x "$bin/kube" ]; then
    need_go
    say "building Kubernetes $version (6 minutes on 2 cores)"
    cp -r "$here/kube" "$work/kube"
    cd "$work/kube"
    if [ "$version" != "$pinned" ]; then
      # k8s.io/kubernetes replaces its staging modules by folders of its repository; as a module it needs their releases.
      local staging=v0.${version#v1.} mod
      mod=$(go mod download -json "k8s.io/kubernetes@$version" | sed -n 's/.*"GoMod": "\(.*\)".*/\1/p')
      {
        printf 'module opd.dev/devcluster/kube\n\ngo %s\n\n' "$(sed -n 's/^go //p' "$mod")"
        sed -n "s|^\t\(k8s.io/[a-z-]*\) => ./staging.*|replace \1 => \1 $staging|p" "$mod"
        printf 'require (\n\tgo.etcd.io/etcd/server/v3 %s\n\tk8s.io/kubernetes %s\n)\n' \
          "$(sed -n 's|^\tgo.etcd.io/etcd/client/v3 \(v[^ ]*\).*|\1|p' "$mod")" "$version"
      } >go.mod
      rm go.sum
      go mod tidy
    fi
    local stamp=k8s.io/component-base/version minor=${version#v1.}
    go build -o "$work/kube.out" -ldflags "-s -w -X $stamp.gitVersion=$version -X $stamp.gitMajor=1 -X $stamp.gitMinor=${minor%%.*}" .
    mv "$work/kube.out" "$bin/kube"
    cd "$here"
  fi
  local name
  for name in etcd kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl; do ln -sfn kube "$bin/$name"; done
}

# What the oldest Kubernetes that the chart admits makes of a type; the version is in crdcheck/go.mod.
crdcheck() {
  local library program
  library=$(sed -n 's|^\tk8s.io/apiextensions-apiserver ||p' "$here/crdcheck/go.mod")
  program=crdcheck-$library
  if [ ! -x "$bin/$program" ]; then
    need_go
    say "building the check of types of Kubernetes 1${library#v0} (2 minutes on 2 cores)"
    (cd "$here/crdcheck" && go build -o "$work/$program" -ldflags "-s -w" .)
    mv "$work/$program" "$bin/$program"
  fi
  ln -sfn "$program" "$bin/crdcheck"
}

node() {
  local missing=()
  [ -x /usr/lib/cni/bridge ] || missing+=(containernetworking-plugins)
  command -v iptables >/dev/null || missing+=(iptables)
  command -v conntrack >/dev/null || missing+=(conntrack)
  command -v ip >/dev/null || missing+=(iproute2)
  command -v ipset >/dev/null || missing+=(ipset)
  command -v debootstrap >/dev/null || missing+=(debootstrap)
  command -v buildah >/dev/null || missing+=(buildah)
  command -v skopeo >/dev/null || missing+=(skopeo)
  [ -x "$bin/runc" ] || [ -f /usr/include/seccomp.h ] || missing+=(libseccomp-dev)
  [ -x "$bin/runc" ] || command -v pkg-config >/dev/null || missing+=(pkg-config)
  [ -e /usr/lib/x86_64-linux-gnu/libseccomp.so.2 ] || [ -e /usr/lib/aarch64-linux-gnu/libseccomp.so.2 ] || missing+=(libseccomp2)
  packages "${missing[@]}"
  local name
  for name in containerd ctr containerd-shim-runc-v2; do
    install "$name" "github.com/containerd/containerd/v2/cmd/$name@v2.4.2"
  done
  install coredns github.com/coredns/coredns@v1.14.7
  install kube-router github.com/cloudnativelabs/kube-router/v2/cmd/kube-router@v2.1.0
  CGO_ENABLED=1 install runc github.com/opencontainers/runc@v1.4.1 -tags seccomp
  if [ ! -x "$bin/pause" ]; then
    need_go
    go build -ldflags "-s -w" -o "$work/pause" "$here/pause/main.go"
    mv "$work/pause" "$bin/pause"
  fi
  local api=v1.6.1 # of traefik's go.mod
  if [ ! -d "$bin/gateway-api-$api" ]; then
    need_go
    module "sigs.k8s.io/gateway-api@$api" "$work/gateway-api"
    rm -rf "$bin"/gateway-api*
    mv "$work/gateway-api/config/crd/standard" "$bin/gateway-api-$api"
  fi
}

# A gateway for tests, without what no test asks of it: an extension point that is a folder of its repository and not in
# the module, the clouds whose DNS its ACME provider can write to, and passwords, for which it has a fork of go-http-auth.
traefik() {
  [ -x "$bin/traefik" ] && return
  need_go
  local traefik=v3.7.13
  say "building Traefik $traefik (3 minutes on 2 cores)"
  module "github.com/traefik/traefik/v3@$traefik" "$work/traefik"
  cd "$work/traefik"
  mkdir pkg/config/dynamic/ext
  printf 'module github.com/traefik/traefik/dynamic/ext\n\ngo %s\n' "$go_wanted" >pkg/config/dynamic/ext/go.mod
  printf 'package ext\n\ntype HTTP struct{}\n\ntype Router struct{}\n' >pkg/config/dynamic/ext/ext.go
  sed -i -e '/lego\/v5\/providers\/dns"/d' -e 's/dns\.NewDNSChallengeProviderByName([^)]*)/nil, errors.New("built without")/' \
    pkg/provider/acme/provider.go
  sed -i 's/goauth\.CheckSecret/func(string, string) bool { return false }/; s/RequireAuthStale/RequireAuth/' \
    pkg/middlewares/auth/basic_auth.go pkg/middlewares/auth/digest_auth.go
  go mod edit -replace github.com/abbot/go-http-auth=github.com/abbot/go-http-auth@v0.4.0
  go build -mod=mod -o "$work/traefik.out" -ldflags "-s -w" ./cmd/traefik
  mv "$work/traefik.out" "$bin/traefik"
  cd "$here"
}

# prometheus and promtool. Built from Go they would bring every cloud's SDK along.
prometheus() {
  [ -x "$bin/promtool" ] && [ -x "$bin/prometheus" ] && return
  say "Prometheus from the system package, which is fetched and not installed"
  command -v apt-get >/dev/null || { say "no apt-get here: put prometheus and promtool 2.42 or newer of https://prometheus.io into $bin"; exit 1; }
  local fetch=(apt-get download -qq -o APT::Sandbox::User=root prometheus) # the user _apt cannot write into $work
  cd "$work"
  {
    "${fetch[@]}" || { apt-get update -qq && "${fetch[@]}"; }
    dpkg-deb --extract prometheus_*.deb unpacked
  } >&2
  mv unpacked/usr/bin/prometheus unpacked/usr/bin/promtool "$bin/"
}

if [ "$what" = node ]; then
  alone control-plane
  control_plane
fi
alone "$what"
case $what in
  control-plane) control_plane ;;
  node) node ;;
  crdcheck) crdcheck ;;
  helm) install helm helm.sh/helm/v4/cmd/helm@v4.3.1 ;;
  prometheus) prometheus ;;
  traefik) traefik ;;
  browser) command -v chromium google-chrome >/dev/null || packages chromium ;;
  *) say "what is $what? control-plane, node, crdcheck, helm, prometheus, traefik or browser"; exit 2 ;;
esac
echo "$bin"
