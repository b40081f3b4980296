#!/usr/bin/env bash
# Installs the Debian packages that agentiso needs for the purposes named:
# build, run, test. Does nothing, and needs no root, when all are there.
set -euo pipefail

packages=()
need() { # need COMMAND PACKAGE
  PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null 2>&1 || packages+=("$2")
}

# Go 1.21 and later fetches the toolchain that go.mod names by itself.
go_usable() {
  local v
  v=$(go env GOVERSION 2>/dev/null | sed -n 's/^go1\.\([0-9]*\).*/\1/p') || return 1
  [ -n "$v" ] && [ "$v" -ge 21 ]
}

want_go=
for purpose in "$@"; do
  case $purpose in
  build)
    go_usable || want_go=1
    need git git
    ;;
  run)
    need qemu-system-x86_64 qemu-system-x86
    need mmdebstrap mmdebstrap
    need dpkg-deb dpkg
    # An ordinary user's mmdebstrap unpacks inside a user namespace.
    [ "$(id -u)" = 0 ] || need newuidmap uidmap
    [ -e /usr/share/keyrings/debian-archive-keyring.gpg ] || packages+=(debian-archive-keyring)
    ;;
  test)
    # cpio, e2fsck, xz and qemu-img check what our own code writes; make and
    # what follows builds the lean kernel.
    need cpio cpio
    need e2fsck e2fsprogs
    need losetup mount
    need fakeroot fakeroot
    need fakechroot fakechroot
    need xz xz-utils
    need qemu-img qemu-utils
    need busybox busybox-static
    need ip iproute2
    need nft nftables
    need mkfs.xfs xfsprogs
    need make make
    need gcc gcc
    need flex flex
    need bison bison
    need bc bc
    need rsync rsync
    [ -e /usr/include/libelf.h ] || packages+=(libelf-dev)
    [ -e /usr/include/openssl/opensslv.h ] || packages+=(libssl-dev)
    ;;
  *)
    echo "install-deps: unknown purpose $purpose (build, run, test)" >&2
    exit 2
    ;;
  esac
done

[ ${#packages[@]} -gt 0 ] || [ -n "$want_go" ] || exit 0

sudo=
if [ "$(id -u)" != 0 ]; then
  command -v sudo >/dev/null || {
    echo "install-deps: these packages are missing and there is no sudo: ${packages[*]} ${want_go:+golang-go (1.21 or later)}" >&2
    echo "  next: install them as root, then run make again" >&2
    exit 1
  }
  sudo=sudo
fi
apt() { DEBIAN_FRONTEND=noninteractive $sudo apt-get "$@"; }

echo "installing: ${packages[*]} ${want_go:+golang-go}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt update >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
if [ ${#packages[@]} -gt 0 ]; then
  apt install -y --no-install-recommends "${packages[@]}" >"$log" 2>&1 || { tail -20 "$log" >&2; exit 1; }
fi
if [ -n "$want_go" ]; then
  codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
  apt install -y --no-install-recommends golang-go >"$log" 2>&1 || { tail -20 "$log" >&2; exit 1; }
  go_usable || apt install -y --no-install-recommends -t "$codename-backports" golang-go >"$log" 2>&1 || true
  go_usable || {
    echo "install-deps: the distribution's Go is older than 1.21" >&2
    echo "  next: install Go from its download page, put it on PATH, then run make again" >&2
    exit 1
  }
fi
