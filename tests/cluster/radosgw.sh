#!/usr/bin/env bash
# A real S3 server for tests: Ceph's radosgw with one monitor and one OSD in memory, on this machine, under one directory.
#
#   tests/cluster/radosgw.sh DIR PORT ACCESS_KEY SECRET_KEY
#
# Runs until it is killed, and then stops what it started; says "ready" when the server answers. Needs Debian's packages ceph-mon,
# ceph-osd, ceph-common and radosgw (16.2), installed, or unpacked below $CEPH_ROOT (dpkg -x). Ports PORT, PORT+1, PORT+2.
set -euo pipefail

dir="$(mkdir -p "$1" && cd "$1" && pwd)"
port="$2" access="$3" secret="$4"
root="${CEPH_ROOT:-}"
if [ -n "$root" ]; then
    lib="$root/usr/lib/x86_64-linux-gnu"
    export PATH="$root/usr/bin:$PATH" PYTHONPATH="$root/usr/lib/python3/dist-packages"
    export LD_LIBRARY_PATH="$lib:$root/lib/x86_64-linux-gnu:$lib/ceph:$root/usr/lib/ceph"
else
    lib=/usr/lib/x86_64-linux-gnu
fi

started=()
stop() {
    for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait
}
trap stop EXIT
trap 'exit 0' TERM INT

fsid="$(cat /proc/sys/kernel/random/uuid)"
osd="$(cat /proc/sys/kernel/random/uuid)"
addresses="[v2:127.0.0.1:$((port + 1))/0,v1:127.0.0.1:$((port + 2))/0]"
mkdir -p "$dir"/{mon,osd,rgw,run}

cat >"$dir/ceph.conf" <<CONF
[global]
fsid = $fsid
mon_host = $addresses
mon_initial_members = a
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
keyring = $dir/keyring
admin_socket = $dir/run/\$name.\$pid.asok
run_dir = $dir/run
log_file = $dir/\$name.log
crash_dir = $dir/run
plugin_dir = $lib/ceph
erasure_code_dir = $lib/ceph/erasure-code
osd_class_dir = $lib/rados-classes
mon_data = $dir/mon
mon_data_avail_crit = 1
osd_data = $dir/osd
osd_objectstore = memstore
memstore_device_bytes = 2147483648
osd_crush_chooseleaf_type = 0
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 2
osd_pool_default_pgp_num = 2
osd_pool_default_pg_autoscale_mode = off
mon_allow_pool_size_one = true
rgw_data = $dir/rgw
rgw_frontends = beast endpoint=127.0.0.1:$port
rgw_num_rados_handles = 1
rgw_thread_pool_size = 32
CONF
export CEPH_CONF="$dir/ceph.conf"

ceph-authtool --create-keyring "$dir/keyring" --gen-key -n mon. --cap mon 'allow *'
ceph-authtool "$dir/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
ceph-authtool "$dir/keyring" --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'
ceph-authtool "$dir/keyring" --gen-key -n client.rgw --cap mon 'allow rw' --cap osd 'allow rwx'
monmaptool --create --addv a "$addresses" --fsid "$fsid" "$dir/monmap"
ceph-mon --mkfs -i a --monmap "$dir/monmap" --keyring "$dir/keyring"
ceph-mon -f -i a &
started+=($!)

# The same id on both sides: the monitors know the OSD by it.
python="${PYTHON:-python3}"
key="$(ceph-authtool "$dir/keyring" -n osd.0 -p)"
printf '{"cephx_secret": "%s"}' "$key" >"$dir/osd.json"
"$python" "$(command -v ceph)" --connect-timeout 60 auth rm osd.0
"$python" "$(command -v ceph)" --connect-timeout 60 osd new "$osd" -i "$dir/osd.json"
ceph-osd --mkfs -i 0 --osd-uuid "$osd"
ceph-osd -f -i 0 &
started+=($!)

radosgw -f -n client.rgw &
started+=($!)
radosgw-admin -n client.rgw user create --uid test --display-name test --access-key "$access" --secret-key "$secret" >/dev/null
until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do sleep 0.2; done
echo ready
wait -n
