#!/bin/sh
# Ceph's object gateway (radosgw) 16.2.15, its Swift API: a GET of two ranges is answered with 206 and the first
# of them only, and a PUT with `If-None-Match: *` on a name that is taken is answered with 201 and overwrites
# the object. The S3 API of the same gateway refuses that PUT with 412, and answers two ranges as Swift's does.
# OpenStack Swift 2.38 sends multipart/byteranges, and refuses the PUT with 412. 18.2.7 and 20.2.4 do as 16.2.15.
# Output seen: the six lines at the end of this script. Needs root on Debian 12, for a mon, an osd and a gateway
# in a temporary folder, and half a minute after the download (130 MB). Exit 77: it could not be run here.
set -eu
version=16.2.15+ds-0+deb12u2
folder=$(mktemp -d)
trap 'kill $running 2>/dev/null || :; wait; rm -rf "$folder"' EXIT
running=
[ "$(id -u)" = 0 ] && [ "$(apt-cache policy radosgw | awk '/Candidate:/ { print $2 }')" = "$version" ] || exit 77

mkdir -p "$folder/debs/partial" "$folder/root/tmp" "$folder/root/proc" "$folder/root/dev" "$folder/root/c/rgw"
mkdir "$folder/root/c/mon" "$folder/root/c/osd"
: >"$folder/status" # so everything that they need is fetched, too, and nothing is installed here
apt-get -qq -y --no-install-recommends --download-only -o Dir::State::status="$folder/status" \
    -o Dir::Cache::archives="$folder/debs" install "radosgw=$version" "ceph-mon=$version" "ceph-osd=$version" \
    "ceph-common=$version" "ceph-base=$version" >/dev/null 2>&1
for package in "$folder"/debs/*.deb; do dpkg-deb -x "$package" "$folder/root"; done

set -- $(python3 -c 'import socket
all = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(one.getsockname()[1] for one in all))')
mon="[v2:127.0.0.1:$1,v1:127.0.0.1:$2]" port=$3
cat >"$folder/root/c/ceph.conf" <<C
[global]
fsid = 6d0d6b2e-2a5f-4c8e-9c53-0d9a5b1f7f10
mon host = $mon
public network = 127.0.0.0/8
ms mon client mode = crc
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 2
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = memstore
mon max pg per osd = 1000
mon data = /c/mon
osd data = /c/osd
mon data avail crit = 1
log file = /c/\$name.log
run dir = /c
admin socket = /c/\$name.asok
[client]
rgw frontends = beast endpoint=127.0.0.1:$port
rgw data = /c/rgw
C
export LC_ALL=C.UTF-8 CEPH_CONF=/c/ceph.conf
enter='mount --rbind /dev "$0/dev"; mount -t proc proc "$0/proc"; exec chroot "$0" "$@"'
inside() {
    unshare --mount sh -c "$enter" "$folder/root" "$@"
}
start() {
    unshare --mount sh -c "$enter" "$folder/root" "$@" >/dev/null 2>&1 &
    running="$running $!"
}
osd=$(cat /proc/sys/kernel/random/uuid)
{
    inside monmaptool --create --fsid 6d0d6b2e-2a5f-4c8e-9c53-0d9a5b1f7f10 --addv a "$mon" /c/monmap
    inside ceph-mon --mkfs -i a --monmap /c/monmap
    start ceph-mon -f -i a
    inside ceph osd new "$osd"
    inside ceph-osd -i 0 --mkfs --osd-uuid "$osd"
    start ceph-osd -f -i 0
    start radosgw -f -n client.rgw.a
    inside radosgw-admin user create --uid u --display-name u --access-key AK --secret-key SK
    inside radosgw-admin subuser create --uid u --subuser u:s --key-type swift --secret-key S --access full
} >"$folder/log" 2>&1 || { tail -3 "$folder/log" >&2; exit 77; }

python3 - "$port" <<'P' | tee "$folder/out"
import base64, hmac, http.client, sys, time
from email.utils import formatdate


def ask(method, path, headers, body=b""):
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=60)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer, answer.read()


def ask_s3(method, path, headers, body=b""):
    date = formatdate(usegmt=True)
    signed = hmac.digest(b"SK", f"{method}\n\n\n{date}\n{path}".encode(), "sha1")
    signature = base64.b64encode(signed).decode()
    return ask(method, path, {**headers, "Date": date, "Authorization": f"AWS AK:{signature}"}, body)


for _ in range(120):
    try:
        token = ask("GET", "/auth/v1.0", {"X-Auth-User": "u:s", "X-Auth-Key": "S"})[0].headers["X-Auth-Token"]
        break
    except OSError:
        time.sleep(0.5)
swift = {"X-Auth-Token": token}
ask("PUT", "/swift/v1/box", swift)
ask("PUT", "/swift/v1/box/name", swift, b"0123456789")
for api, send, place, who in (("Swift", ask, "/swift/v1/box/name", swift), ("S3", ask_s3, "/box/name", {})):
    answer, body = send("GET", place, {**who, "Range": "bytes=1-2,5-6"})
    print(api, "two ranges:", answer.status, answer.headers["Content-Range"], body.decode())
    answer, _ = send("PUT", place, {**who, "If-None-Match": "*"}, api.encode())
    print(api, "PUT of a name that is taken:", answer.status)
    print(api, "now stored:", send("GET", place, who)[1].decode())
P
cmp - "$folder/out" <<'C'
Swift two ranges: 206 bytes 1-2/10 12
Swift PUT of a name that is taken: 201
Swift now stored: Swift
S3 two ranges: 206 bytes 1-2/5 wi
S3 PUT of a name that is taken: 412
S3 now stored: Swift
C
