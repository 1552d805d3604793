#!/bin/sh
# The kernel's NBD driver, Linux 6.9 and later (6.12.117 of Debian 13): one NBD_CMD_RECONFIGURE with a new size and
# a new socket, for a device whose connection is broken and whose requests wait for a new one (dead_conn_timeout),
# first waits for these requests, to set the size, and only then takes the socket. So they fail with EIO at the end
# of that time, although a connection was offered in time. Sent as two commands, the socket first, it works.
# Linux 6.1 (of Debian 12) waits for nothing: the write goes through in both cases.
# Output seen: the four lines at the end of this script. Needs root on Debian 12, gcc, cpio, xz and
# qemu-system-x86_64 (no KVM), and two minutes. Exit 77: it could not be run here.
set -eu
old=6.1.0-50-cloud-amd64 new=6.12.117+deb13-cloud-amd64
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for program in gcc cpio xz qemu-system-x86_64; do command -v "$program" >/dev/null || exit 77; done
mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial"
mirror=$(apt-get indextargets --format '$(ORIGIN) $(REPO_URI)' 'Created-By: Packages' |
    awk '$1 == "Debian" { print $2; exit }')
for suite in bookworm bookworm-security trixie trixie-security; do
    case $suite in *-security) place=${mirror%/}-security ;; *) place=${mirror%/} ;; esac
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $place $suite main"
done >"$folder/sources"
apt() {
    apt-get -qq -o Dir::Etc::sourcelist="$folder/sources" -o Dir::Etc::sourceparts=- \
        -o Dir::State::lists="$folder/lists" -o Dir::Cache="$folder/cache" -o APT::Sandbox::User=root "$@" >/dev/null 2>&1
}
apt update || exit 77
cd "$folder"
apt download "linux-image-$old" "linux-image-$new" || exit 77

cat >init.c <<'C'
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/genetlink.h>
#include <linux/nbd.h>
#include <linux/nbd-netlink.h>
#include <linux/netlink.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>
#include <endian.h>

static int netlink, family, index_of_device;
static char packet[4096];

static void put(int kind, const void *value, int length) { /* add an attribute to the packet */
    struct nlmsghdr *h = (void *)packet;
    struct nlattr *a = (void *)(packet + NLMSG_ALIGN(h->nlmsg_len));
    a->nla_type = kind, a->nla_len = NLA_HDRLEN + length;
    memcpy((char *)a + NLA_HDRLEN, value, length);
    h->nlmsg_len = NLMSG_ALIGN(h->nlmsg_len) + NLA_ALIGN(a->nla_len);
}
static void number(int kind, __u64 value) { put(kind, &value, 8); }
static void begin(int to, int command) {
    struct nlmsghdr *h = (void *)packet;
    struct genlmsghdr *g = NLMSG_DATA(h);
    memset(packet, 0, sizeof packet);
    h->nlmsg_len = NLMSG_LENGTH(GENL_HDRLEN), h->nlmsg_type = to, h->nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK;
    g->cmd = command, g->version = 1;
}
static int find(char *message, int kind) { /* the 16 or 32 bits of an attribute of the answer */
    struct nlmsghdr *h = (void *)message;
    for (char *at = (char *)NLMSG_DATA(h) + GENL_HDRLEN; at < message + h->nlmsg_len;
         at += NLA_ALIGN(((struct nlattr *)at)->nla_len))
        if (((struct nlattr *)at)->nla_type == kind)
            return ((struct nlattr *)at)->nla_len == 6 ? *(__u16 *)(at + 4) : *(int *)(at + 4);
    return -1;
}
static int send_it(int wanted) { /* send the packet and wait until it is done; 0, or what is wanted of the answer */
    char answer[4096];
    int found = 0;
    send(netlink, packet, ((struct nlmsghdr *)packet)->nlmsg_len, 0);
    for (;;) {
        int length = recv(netlink, answer, sizeof answer, 0);
        for (struct nlmsghdr *h = (void *)answer; NLMSG_OK(h, length); h = NLMSG_NEXT(h, length)) {
            if (h->nlmsg_type == NLMSG_ERROR) {
                if (((struct nlmsgerr *)NLMSG_DATA(h))->error)
                    printf("refused: %d\n", ((struct nlmsgerr *)NLMSG_DATA(h))->error);
                return found;
            }
            found = find((char *)h, wanted);
        }
    }
}
static void *serve(void *argument) { /* an NBD server that answers every request */
    int fd = (long)argument;
    static char data[1 << 20];
    struct nbd_request request;
    while (recv(fd, &request, sizeof request, MSG_WAITALL) == sizeof request) {
        struct nbd_reply reply = {.magic = htobe32(NBD_REPLY_MAGIC)};
        int kind = be32toh(request.type) & 0xffff, length = be32toh(request.len);
        memcpy(&reply.handle, &request.handle, 8);
        if (kind == NBD_CMD_WRITE) recv(fd, data, length, MSG_WAITALL);
        send(fd, &reply, sizeof reply, MSG_NOSIGNAL);
        if (kind == NBD_CMD_READ) send(fd, data, length, MSG_NOSIGNAL);
    }
    return NULL;
}
static int new_socket(int *server) {
    int pair[2];
    pthread_t thread;
    socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
    pthread_create(&thread, NULL, serve, (void *)(long)pair[1]);
    *server = pair[1];
    return pair[0];
}
static void socket_attribute(int fd) {
    struct { struct nlattr item, fd; int value; } inner = {{12, 0x8000 | NBD_SOCK_ITEM}, {8, NBD_SOCK_FD}, fd};
    put(0x8000 | NBD_ATTR_SOCKETS, &inner, sizeof inner);
}
static void *write_block(void *error) {
    char name[32], *block = aligned_alloc(4096, 4096);
    snprintf(name, sizeof name, "/dev/nbd%d", index_of_device);
    int fd = open(name, O_WRONLY | O_DIRECT);
    *(int *)error = pwrite(fd, block, 4096, 0) == 4096 ? 0 : errno;
    close(fd);
    return NULL;
}
static void try(const char *title, int apart) {
    int server, error, again;
    pthread_t writer;
    struct utsname name;
    begin(family, NBD_CMD_CONNECT);
    number(NBD_ATTR_SIZE_BYTES, 1 << 20), number(NBD_ATTR_BLOCK_SIZE_BYTES, 512);
    number(NBD_ATTR_SERVER_FLAGS, NBD_FLAG_HAS_FLAGS), number(NBD_ATTR_DEAD_CONN_TIMEOUT, 10);
    socket_attribute(new_socket(&server));
    index_of_device = send_it(NBD_ATTR_INDEX);
    sleep(1);
    shutdown(server, SHUT_RDWR); /* the server goes */
    sleep(1);
    pthread_create(&writer, NULL, write_block, &error);
    sleep(1);
    begin(family, NBD_CMD_RECONFIGURE);
    put(NBD_ATTR_INDEX, &index_of_device, 4);
    if (!apart) number(NBD_ATTR_SIZE_BYTES, 2 << 20);
    socket_attribute(new_socket(&again));
    send_it(0);
    if (apart) {
        begin(family, NBD_CMD_RECONFIGURE);
        put(NBD_ATTR_INDEX, &index_of_device, 4);
        number(NBD_ATTR_SIZE_BYTES, 2 << 20);
        send_it(0);
    }
    pthread_join(writer, NULL);
    uname(&name);
    printf("seen: Linux %s, %s: %s\n", name.release, title, error ? strerror(error) : "written");
    begin(family, NBD_CMD_DISCONNECT);
    put(NBD_ATTR_INDEX, &index_of_device, 4);
    send_it(0);
}
int main(void) {
    struct sockaddr_nl here = {AF_NETLINK};
    setvbuf(stdout, NULL, _IOLBF, 0);
    mkdir("/dev", 0755);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    syscall(SYS_finit_module, open("/nbd.ko", O_RDONLY), "max_part=0", 0);
    netlink = socket(AF_NETLINK, SOCK_RAW, NETLINK_GENERIC);
    bind(netlink, (void *)&here, sizeof here);
    begin(GENL_ID_CTRL, CTRL_CMD_GETFAMILY);
    put(CTRL_ATTR_FAMILY_NAME, "nbd", 4);
    family = send_it(CTRL_ATTR_FAMILY_ID);
    try("one command", 0);
    try("the socket first", 1);
    sync();
    reboot(RB_POWER_OFF);
}
C
gcc -O1 -w -static -pthread -o init init.c || exit 77
for kernel in "$old" "$new"; do
    dpkg-deb -x linux-image-"$kernel"_*.deb "$kernel"
    mkdir "$kernel/top"
    module=$(find "$kernel" -name 'nbd.ko*')
    case $module in *.xz) xz -dc "$module" ;; *) cat "$module" ;; esac >"$kernel/top/nbd.ko"
    cp init "$kernel/top/init"
    (cd "$kernel/top" && find . | cpio -o -H newc --quiet) >"$kernel/ramdisk"
    timeout 300 qemu-system-x86_64 -M q35 -accel tcg -cpu max -m 256M -nodefaults -no-reboot -display none \
        -serial stdio -kernel "$kernel/boot/vmlinuz-$kernel" -initrd "$kernel/ramdisk" \
        -append 'console=ttyS0 quiet panic=-1' </dev/null | tr -d '\r' | sed -n 's/^seen: //p'
done | tee out
cmp - out <<'E'
Linux 6.1.0-50-cloud-amd64, one command: written
Linux 6.1.0-50-cloud-amd64, the socket first: written
Linux 6.12.117+deb13-cloud-amd64, one command: Input/output error
Linux 6.12.117+deb13-cloud-amd64, the socket first: written
E
