#!/bin/sh
# A production install: scripts/install.sh PREFIX, as root. DESTDIR= moves what lies outside PREFIX.
# The environment holds a copy of the code; units are rendered for PREFIX; a configuration that is
# there already stays as it is. Run it again to update, then `systemctl restart graphoptd`.
# TORCH=, PIP_ARGS= and PYTHON= are those of scripts/setup.sh.
set -eu
umask 022 # the service's user must be able to read it, whatever root's habit is
prefix=$1
root=${DESTDIR:-}

fail() { echo "install: $*" >&2; exit 1; }

# The unit's ProtectHome and PrivateTmp hide these from the service, whatever their permissions.
is_hidden() { case $(readlink -m "$1")/ in /root/* | /home/* | /run/user/* | /tmp/* | /var/tmp/*) ;; *) return 1 ;; esac; }

# Where a Python that runs the service lies; an environment of uv or pyenv is often in a home.
library_of() { "$1" -c 'import sys; print(sys.base_prefix)' 2>/dev/null; }

pythons() {
    for each in ${PYTHON:-python3 python3.13 python3.12 python3.11 /usr/local/bin/python3 /usr/bin/python3}; do
        found=$(command -v "$each") && library=$(library_of "$found") || continue
        is_hidden "$library" || is_hidden "$(dirname "$found")" || echo "$found"
    done
}

[ -n "$root" ] || [ "$(id -u)" = 0 ] || fail "must be run as root"
case $prefix in /*) ;; *) fail "PREFIX=$prefix: name it from the root on, as units need it" ;; esac
is_hidden "$prefix" && fail "the unit hides $prefix from the service: choose a PREFIX outside of homes and /tmp"
if [ -x "$prefix/bin/python" ] && is_hidden "$(library_of "$prefix/bin/python")"; then
    fail "$prefix was made with a Python in a home, which the unit hides from the service: remove $prefix first"
fi
PYTHON=$(pythons | tr '\n' ' ')
[ -n "$PYTHON" ] || fail "no Python outside of homes and /tmp, which the unit hides from the service. Install one
  (apt install python3 python3-venv), or name one: PYTHON=/path/of/python3"
export PYTHON

EDITABLE= scripts/setup.sh "$prefix" runtimes
install -d "$root/etc/systemd/system" "$root/etc/sysusers.d" "$root/etc/tmpfiles.d"
for unit in systemd/*.service systemd/*.socket; do
    sed "s|@PREFIX@|$prefix|g" "$unit" >"$root/etc/systemd/system/$(basename "$unit")"
done
install -m 644 systemd/graphoptd.sysusers "$root/etc/sysusers.d/graphoptd.conf"
install -m 644 systemd/graphoptd.tmpfiles "$root/etc/tmpfiles.d/graphoptd.conf"
systemd-sysusers ${root:+--root="$root"} graphoptd.conf
systemd-tmpfiles ${root:+--root="$root"} --create graphoptd.conf
if [ ! -e "$root/etc/graphoptd/graphoptd.yaml" ]; then
    install -m 640 configs/graphoptd.yaml "$root/etc/graphoptd/graphoptd.yaml"
    [ -n "$root" ] || chgrp graphoptd /etc/graphoptd/graphoptd.yaml
fi
origin=$("$prefix/bin/python" -c 'import importlib.util; print(importlib.util.find_spec("torch").origin)')
is_hidden "$origin" && fail "torch lies in $origin, which the unit hides from the service: remove $prefix, and
  name a Python whose torch lies elsewhere, or leave TORCH=system out"
if [ -z "$root" ] && ! (cd / && setpriv --reuid=graphoptd --regid=graphoptd --clear-groups "$prefix/bin/python" -Ic 'import graphoptd.service'); then
    fail "the user graphoptd cannot run $prefix/bin/graphoptd: see to the permissions of the folders above it,
  of its Python and of its torch"
fi
echo "installed into $prefix. Name your models in $root/etc/graphoptd/graphoptd.yaml, then:"
echo "  systemctl daemon-reload && systemctl enable --now graphoptd"
