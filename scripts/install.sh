#!/bin/sh
# A production install: scripts/install.sh PREFIX, as root. DESTDIR= moves what lies outside PREFIX.
# The environment holds a copy of the code; units are rendered for PREFIX; a configuration that is
# there already stays as it is. Run it again to update, then `systemctl restart graphoptd`.
set -eu
prefix=$1
root=${DESTDIR:-}
[ -n "$root" ] || [ "$(id -u)" = 0 ] || { echo "install: must be run as root" >&2; exit 1; }

EDITABLE= scripts/setup.sh "$prefix" ""
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
echo "installed into $prefix. Name your models in $root/etc/graphoptd/graphoptd.yaml, then:"
echo "  systemctl daemon-reload && systemctl enable --now graphoptd"
