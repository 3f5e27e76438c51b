#!/bin/sh
# The first process of a machine made of namespaces: a root of its own over the host's files, then
# systemd: boot.sh SCRATCH [FOLDER ...]. Run by manager.py inside `unshare`; SCRATCH has an empty folder
# `files` and a socket `notify`, which systemd tells when it is up.
# What is written anywhere goes into memory and is gone with the last process; each FOLDER is shown
# as the host has it, for it may lie on another file system than the host's root.
set -eu
files=$1/files root=$1/files/root notify=$1/notify
shift
mount --make-rprivate /
resolv=$(cat /etc/resolv.conf 2>/dev/null || true) # often a link into /run
mount -t tmpfs -o mode=755 tmpfs "$files"
mkdir "$files/upper" "$files/work" "$root"
mount -t overlay -o "lowerdir=/,upperdir=$files/upper,workdir=$files/work" overlay "$root"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
for folder in "$@"; do
    mkdir -p "$root$folder"
    mount --rbind "$folder" "$root$folder"
done

# As on a host that never had graphoptd, whatever this one has.
rm -rf "$root/etc/graphoptd" "$root/var/lib/graphoptd" "$root/var/spool/graphoptd" "$root/opt/graphoptd"
rm -rf "$root/var/log/journal" "$root/etc/resolv.conf"
echo "$resolv" >"$root/etc/resolv.conf"
mount -t tmpfs -o mode=755 tmpfs "$root/etc/systemd/system"

mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
umount -R "$root/sys/fs/cgroup"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mknod -m 666 "$root/dev/some-device" c 1 11 # the kernel's log; everybody may open it, but for DevicePolicy=
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"

# Of the host's units only the targets that services refer to, and the journal.
units=$root/run/units
mkdir -p "$units/sysinit.target.wants"
for unit in sysinit basic sockets multi-user shutdown; do
    cp "/lib/systemd/system/$unit.target" "$units/"
done
cp /lib/systemd/system/systemd-journald.service /lib/systemd/system/systemd-journald.socket \
    /lib/systemd/system/systemd-journald-dev-log.socket "$units/"
ln -s ../systemd-journald.service "$units/sysinit.target.wants/"

touch "$root/run/host-notify"
mount --bind "$notify" "$root/run/host-notify"
ip link set lo up
cd "$root"
mkdir -p .host
pivot_root . .host
umount -l /.host
# `container` keeps systemd from what belongs to the host: clocks, kernel settings, the console.
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    container=graphopt-test NOTIFY_SOCKET=/run/host-notify SYSTEMD_UNIT_PATH=/etc/systemd/system:/run/units \
    /lib/systemd/systemd --system --unit=multi-user.target --log-target=journal --show-status=no
