#!/usr/bin/env bash
# Turns a fresh Debian 12 machine into a node; `make up` runs it, and so does every machine of the Vagrant lab.
#
#   provision.sh packages [test|vm] install the Debian packages that are missing (test, vm: those of the tests, too)
#   provision.sh venv DIR [EXTRA]   make or refresh a virtual environment with the pinned libraries
#   provision.sh up                 packages, program, images, daemon, bootstrap, CLI: a working one-node cluster
#   provision.sh down               stop everything that runs and remove every trace in the kernel
#   provision.sh purge              down, and remove the data and the program as well
#
# Every step looks first and does only what is missing, so it may be interrupted and run again at any point.
# Environment: CLUSTER_DOMAIN (default flynn.test), HOSTD_PREFIX (default /opt/hostd), HOSTD_* settings.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
prefix=${HOSTD_PREFIX:-/opt/hostd}
venv=$prefix/venv
links=${HOSTD_BIN_DIR:-/usr/local/bin}
domain=${CLUSTER_DOMAIN:-flynn.test}
python=/usr/bin/python3
export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

packages=(python3 python3-venv mmdebstrap nftables iptables iproute2 tini e2fsprogs zstd libseccomp2
    golang-github-containers-common ca-certificates git openssh-client openssl procps util-linux curl)
test_packages=(etcd-server postgresql haproxy nginx-light skopeo docker-registry gcc libc6-dev python3-dev)
vm_packages=(qemu-system-x86 qemu-utils)

say() { printf '%s\n' "----- $*"; }
die() { printf 'provision: %s\n' "$*" >&2; exit 1; }
need_root() { [ "$(id -u)" = 0 ] || die "needs root: it makes namespaces, cgroups and firewall rules. Try: sudo make ${1:-up}"; }

install_packages() {
    local wanted=("${packages[@]}") missing=() name
    [ "${1:-}" != test ] || wanted+=("${test_packages[@]}")
    [ "${1:-}" != vm ] || wanted+=("${vm_packages[@]}")
    for name in "${wanted[@]}"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || missing+=("$name")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    need_root
    command -v apt-get >/dev/null || die "this machine has no apt-get; hostd is made for Debian 12"
    say "Installing ${missing[*]}"
    # What the tests need must not begin to serve on somebody's machine.
    local policy=/usr/sbin/policy-rc.d
    if [ "${1:-}" = test ] && [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# pip itself is fast when nothing is missing, but asking it costs seconds: a stamp of what went in saves that.
make_venv() {
    local dir=$1 extra=${2:-} stamp
    stamp=$(cat "$here/requirements.lock" "$here/pyproject.toml" <(echo "$extra $dir") | sha256sum)
    if [ "$(cat "$dir/.stamp" 2>/dev/null)" != "$stamp" ]; then
        say "Installing the pinned libraries into $dir"
        [ -x "$dir/bin/python" ] || $python -m venv "$dir"
        "$dir/bin/pip" install -q -r "$here/requirements.lock" 2> >(grep -v -e DEPRECATION -e WARNING >&2)
        if [ -n "$extra" ]; then
            "$dir/bin/pip" install -q -e "$here[$extra]" 2> >(grep -v -e DEPRECATION -e WARNING >&2)
        fi
        printf '%s' "$stamp" >"$dir/.stamp"
    fi
}

# iptables on Debian 12 speaks nft, and then so do we; where somebody chose legacy, python-iptables is needed.
install_legacy_backend() {
    case "$(iptables --version 2>/dev/null)" in
    *legacy*)
        "$venv/bin/python" -c 'import iptc' 2>/dev/null && return
        say "iptables is legacy here: installing python-iptables"
        apt-get install -y -qq --no-install-recommends gcc libc6-dev python3-dev >/dev/null
        "$venv/bin/pip" install -q python-iptables==1.2.0
        ;;
    esac
}

# The program: our packages, copied beside the libraries, and only when they differ from the checkout.
install_program() {
    local new stamp=$venv/.program
    new=$(cd "$here" && find hostd netns discovery controller router buildpack rootfs pyproject.toml -type f \
        ! -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum | sha256sum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$new" ]; then
        say "Installing hostd and flynn into $prefix"
        local build
        build=$(mktemp -d)
        (cd "$here" && cp -r hostd netns discovery controller router buildpack rootfs pyproject.toml README.md "$build/")
        "$venv/bin/pip" install -q --no-deps --no-build-isolation --force-reinstall "$build" 2> >(grep -v -e DEPRECATION -e WARNING >&2)
        rm -rf "$build"
        printf '%s' "$new" >"$stamp"
    fi
    mkdir -p "$links"
    local name
    for name in hostd hostd-bootstrap flynn; do ln -sfn "$venv/bin/$name" "$links/$name"; done
}

# HOSTD_NO_SYSTEMD: the tests bring up a node of their own beside the one that systemd may run.
has_systemd() { [ -z "${HOSTD_NO_SYSTEMD:-}" ] && [ -d /run/systemd/system ]; }

# A daemon that is older than the program is restarted; its jobs live on.
start_daemon() {
    local pid_file=${HOSTD_RUN_DIR:-/run/hostd}/hostd.pid is_old=
    if [ -e "$pid_file" ] && [ "$venv/.program" -nt "$pid_file" ]; then is_old=yes; fi
    if has_systemd; then
        sed "s|@VENV@|$venv|g" "$here/vagrant/hostd.service" >/etc/systemd/system/hostd.service
        systemctl daemon-reload
        systemctl enable --quiet hostd
        if [ -n "$is_old" ]; then systemctl restart hostd; else systemctl start hostd; fi
        local tries=0
        until "$venv/bin/hostd" status >/dev/null 2>&1; do
            tries=$((tries + 1))
            [ $tries -lt 90 ] || die "hostd does not come up; see: journalctl -u hostd"
            sleep 1
        done
    else
        if [ -n "$is_old" ] && kill -TERM "$(cat "$pid_file")" 2>/dev/null; then
            say "Restarting hostd with the new program; its jobs live on"
            while [ -e "/proc/$(cat "$pid_file" 2>/dev/null || echo none)" ]; do sleep 0.1; done
        fi
        "$venv/bin/hostd" up
    fi
}

up() {
    need_root up
    install_packages
    make_venv "$venv"
    install_legacy_backend
    install_program
    "$venv/bin/hostd-bootstrap" --check --domain "$domain"
    "$venv/bin/hostd" image build
    start_daemon
    "$venv/bin/hostd-bootstrap" --domain "$domain" --configure-cli
    cat <<EOF

The cluster is up. What to try next, in a folder with an app of yours (or in a copy of $here/examples/nodejs):

    flynn key-add                              # your SSH public key (ssh-keygen -t ed25519 makes one)
    git init -b main && git add . && git commit -m 'Hello'
    flynn create example
    git push flynn main
    flynn scale web=3
    curl -H 'Host: example.$domain' http://127.0.0.1/
    flynn ps; flynn log -f; flynn --help

    hostd ps; hostd status; make down; make purge
EOF
}

down() {
    need_root down
    if has_systemd && [ -e /etc/systemd/system/hostd.service ]; then
        systemctl disable --quiet hostd 2>/dev/null || true
    fi
    if [ -x "$venv/bin/hostd" ]; then "$venv/bin/hostd" down; else say "hostd is not installed: nothing to stop"; fi
    if has_systemd && [ -e /etc/systemd/system/hostd.service ]; then
        systemctl stop hostd 2>/dev/null || true
        rm -f /etc/systemd/system/hostd.service
        systemctl daemon-reload
    fi
}

purge() {
    down
    local name
    for name in hostd hostd-bootstrap flynn; do
        [ "$(readlink "$links/$name" 2>/dev/null)" != "$venv/bin/$name" ] || rm -f "$links/$name"
    done
    rm -rf -- "${HOSTD_STATE_DIR:-/var/lib/hostd}" "${HOSTD_RUN_DIR:-/run/hostd}" "${HOSTD_CACHE_DIR:-/var/cache/hostd}" "$prefix"
    say "Removed the data and the program. The Debian packages stay."
}

case "${1:-}" in
packages) install_packages "${2:-}" ;;
venv) make_venv "${2:?directory}" "${3:-}" ;;
up | down | purge) "$1" ;;
*)
    sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 64
    ;;
esac
