"""The header tree for BCC, used by the distribution's own BCC, and vmlinux.h, used by clang."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypermesh_ebpf.host.dependencies import find_bcc
from hypermesh_ebpf.image.bcc_tree import compile_with
from hypermesh_ebpf.image.headers import header_tree, vmlinux_header
from tests.running import COMMAND, ROOT, run_cli

VMLINUX = "/sys/kernel/btf/vmlinux"
pytestmark = pytest.mark.skipif(not os.path.exists(VMLINUX), reason="this kernel has no BTF")
_PATIENCE = 600  # an emulated machine takes its time


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the tests' own, in which the tree is made once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def tree(cache: Path) -> Path:
    """The tree as the command line gives it."""
    done = run_cli("headers")
    assert done.returncode == 0, done.stderr
    assert "making kernel headers" in done.stderr
    (line,) = done.stdout.splitlines()
    return Path(line)


def run_bcc(script: str, tree: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python script with the distribution's bcc, as its tools run: headers from the environment.

    ``script`` has BPF imported, and its arguments in ``sys.argv``.
    """
    places = [str(find_bcc().package_dir.parent)]
    env = {key: value for key, value in os.environ.items() if key != "BCC_KERNEL_SOURCE"}
    if tree:
        env["BCC_KERNEL_SOURCE"] = str(tree)
    start = f"import sys; sys.path += {places!r}\nfrom bcc import BPF\n"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", start + script, *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
    )


COUNT_EXECS = r"""
#include <uapi/linux/ptrace.h>
#include <linux/sched.h>
#include <linux/fs.h>
#include <linux/binfmts.h>
#include <linux/nsproxy.h>
#include <linux/pid_namespace.h>

struct found_t { u64 times, wrong; u32 inode; char name[DNAME_INLINE_LEN]; };
BPF_HASH(parents, u32, struct found_t);

RAW_TRACEPOINT_PROBE(sched_process_exec)
{
	struct task_struct *task = (struct task_struct *)ctx->args[0];
	struct linux_binprm *binprm = (struct linux_binprm *)ctx->args[2];
	struct found_t zero = {}, *found;
	u32 parent = task->real_parent->tgid;
	umode_t mode = binprm->file->f_inode->i_mode;
	if (binprm->argc != 3)
		return 0;
	found = parents.lookup_or_try_init(&parent, &zero);
	if (!found)
		return 0;
	found->times++;
	if (!S_ISREG(mode) || task->nsproxy->pid_ns_for_children->level > 32)
		found->wrong++;
	found->inode = binprm->file->f_inode->i_ino;
	struct qstr name = binprm->file->f_path.dentry->d_name;
	bpf_probe_read_kernel_str(found->name, sizeof(found->name), name.name);
	return 0;
}
"""


@pytest.mark.vm_wide
def test_program_of_bcc_attaches_and_counts(tree: Path) -> None:
    """Kernel structures are read at their places: what is found is what this test did."""
    script = """
import json, os, subprocess
b = BPF(text=sys.argv[1])
for _ in range(7):
    subprocess.run(["/bin/true", "one", "two"], check=True)
    subprocess.run(["/bin/true"], check=True)
rows = {key.value: value for key, value in b["parents"].items()}
mine = rows[os.getpid()]
print(json.dumps([mine.times, mine.wrong, mine.inode, mine.name.decode()]))
"""
    done = run_bcc(script, tree, COUNT_EXECS)
    assert done.returncode == 0, done.stderr
    times, wrong, inode, name = json.loads(done.stdout)
    true = Path("/bin/true").resolve()
    assert (times, wrong) == (7, 0)
    assert inode == true.stat().st_ino & 0xFFFFFFFF
    assert name == true.name[: len(name)]


def test_without_headers_bcc_compiles_nothing() -> None:
    """What the tree is for: this host has no headers, and BCC says so."""
    if Path(f"/lib/modules/{os.uname().release}/build").exists():
        pytest.skip("this host has kernel headers")
    done = run_bcc("BPF(text=sys.argv[1])", None, COUNT_EXECS)
    assert done.returncode != 0
    assert "Unable to find kernel headers" in done.stderr + done.stdout


SOCKETS = """
#include <net/sock.h>
#include <net/inet_sock.h>
#include <net/tcp_states.h>
#include <linux/tcp.h>
#include <bcc/proto.h>
int sockets(struct pt_regs *ctx, struct sock *sk)
{
	struct tcp_sock *tcp = tcp_sk(sk);
	u16 port = sk->sk_dport, family = sk->__sk_common.skc_family;
	if (family != AF_INET6 || sk->sk_state != TCP_ESTABLISHED)
		return -EAGAIN;
	return ntohs(port) + inet_sk(sk)->inet_sport + tcp->srtt_us + sk->sk_v6_daddr.s6_addr32[3];
}
"""
BLOCK = """
#include <linux/blk-mq.h>
#include <linux/blkdev.h>
int block(struct pt_regs *ctx, struct request *req)
{
	u64 flags = req->cmd_flags;
	if ((flags & REQ_OP_MASK) == REQ_OP_WRITE && flags & REQ_SYNC)
		return MINOR(req->bio->bi_bdev->bd_dev);
	return blk_rq_bytes(req) >> PAGE_SHIFT;
}
"""
PACKET = """
#include <uapi/linux/if_ether.h>
#include <uapi/linux/ip.h>
#include <linux/in.h>
#include <linux/skbuff.h>
#include <linux/netdevice.h>
int packet(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	struct ethhdr *eth = data;
	struct iphdr *ip = data + sizeof(*eth);
	if ((void *)(ip + 1) > end || eth->h_proto != htons(ETH_P_IP))
		return XDP_PASS;
	return ip->protocol == IPPROTO_TCP ? XDP_PASS : XDP_DROP;
}
int kernels_packet(struct pt_regs *ctx, struct sk_buff *skb)
{
	return ip_hdr(skb)->ttl + skb->dev->ifindex + skb->len;
}
"""
OWN_PRIVATE_TYPE = """
#include <linux/fs.h>
#include <linux/mount.h>
/* fs/namei.c and fs/mount.h keep these to themselves, so programs bring them. */
struct nameidata { struct path path; struct qstr last; int mine; };
struct mnt_namespace { atomic_t count; struct ns_common ns; int mine; };
int own(struct pt_regs *ctx, struct nameidata *found) { return found->mine; }
"""
PRIVATE_TYPES = """
#include <hmebpf/private.h>
#include <drm/drm_device.h>
int private_types(struct pt_regs *ctx, struct nameidata *found) { return found->depth; }
"""
VERSION = """
#include <linux/version.h>
#include <linux/kconfig.h>
#if LINUX_VERSION_CODE < KERNEL_VERSION(5, 10, 0)
#error
#endif
#if !IS_ENABLED(CONFIG_NET) || IS_ENABLED(CONFIG_NO_SUCH_OPTION) || defined(CONFIG_NO_SUCH_OPTION)
#error
#endif
_Static_assert(PAGE_SIZE == 1 << PAGE_SHIFT, "");
_Static_assert(sizeof(((struct task_struct *)0)->comm) == TASK_COMM_LEN, "");
int kernel_version(struct pt_regs *ctx, unsigned int *flags)
{
	struct dentry *dentry = container_of(flags, struct dentry, d_flags);
	return min_t(u32, 3, -1) + dentry->d_time;
}
"""


@pytest.mark.parametrize(
    "text",
    [
        SOCKETS,
        BLOCK,
        PACKET,
        OWN_PRIVATE_TYPE,
        PRIVATE_TYPES,
        VERSION,
    ],
    ids=["sockets", "block", "packet", "own private type", "private types", "version"],
)
def test_programs_with_kernel_includes_compile(text: str, tree: Path) -> None:
    done = run_bcc("BPF(text=sys.argv[1], cflags=['-Werror=implicit'])", tree, text)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_type_has_its_size(tree: Path) -> None:
    """All structures and unions of the kernel, private ones too, against bpftool."""
    if not shutil.which("bpftool"):
        pytest.skip("needs bpftool")
    argv = ["bpftool", "-j", "btf", "dump", "file", VMLINUX]
    types = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)["types"]
    tagged = [
        each
        for each in types
        if each["kind"] in ("STRUCT", "UNION", "ENUM") and each["name"] != "(anon)"
    ]
    # Two of one name get another in C.
    times = Counter(each["name"] for each in tagged)
    sizes = {
        (each["kind"].lower(), each["name"]): each["size"]
        for each in tagged
        if times[each["name"]] == 1 and each["kind"] != "ENUM"
    }
    assert len(sizes) > 5000
    asserts = [
        f'_Static_assert(sizeof({kind} {name}) == {size}, "");'
        for (kind, name), size in sizes.items()
    ]
    text = "\n".join(["#include <hmebpf/private.h>", *asserts, "int f(void *ctx) { return 0; }"])
    said = compile_with(tree, text, ["-ferror-limit=0", "-fno-caret-diagnostics"])
    wrong = {asserts[int(line) - 2] for line in re.findall(r"main\.c:(\d+):\d+: error", said)}
    # What BCC's older copy of bpf.h has is BCC's, and no structure of the kernel holds one of them.
    bccs = {
        line
        for line in wrong
        if re.search(r" (bpf_\w+|__sk_buff|xdp_md|sk_\w+_md|btf_ptr)\)", line)
    }
    assert wrong == bccs
    assert len(bccs) < 30
    assert not [line for line in said.splitlines() if "error: " in line and "main.c" not in line]


# -- what is kept


def test_tree_is_used_again(tree: Path) -> None:
    said: list[str] = []
    kconfig = tree / "include/linux/kconfig.h"
    inode = kconfig.stat().st_ino
    assert header_tree(report=said.append) == tree
    assert said == []
    assert kconfig.stat().st_ino == inode
    done = run_cli("headers")
    assert (done.stdout, done.stderr) == (f"{tree}\n", "")


@pytest.mark.parametrize("damage", ["half written", "stand-in lost"])
def test_damaged_tree_is_made_anew(damage: str, tree: Path) -> None:
    path = tree / ("include/hmebpf/vmlinux.h" if damage == "half written" else "include/net/sock.h")
    text = path.read_text()
    if damage == "half written":
        path.write_text(text[: len(text) // 2])
    else:
        path.unlink()
    said: list[str] = []
    assert header_tree(report=said.append) == tree
    assert len(said) == 1
    assert path.read_text() == text


def test_two_at_once_make_one(cache: Path, tree: Path) -> None:
    shutil.rmtree(tree)
    both = [
        subprocess.Popen([*COMMAND, "headers"], cwd=ROOT, stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    ended = [process.communicate(timeout=_PATIENCE) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    assert [out for out, _said in ended] == [f"{tree}\n"] * 2
    assert sorted(said.count("making") for _out, said in ended) == [0, 1], "the second one waited"
    assert compile_with(tree, SOCKETS, []) == ""


def test_place_of_ones_own(tmp_path: Path, cache: Path) -> None:
    done = run_cli("headers", "-o", str(tmp_path / "here"))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'here'}\n"), done.stderr
    assert compile_with(tmp_path / "here", BLOCK, []) == ""
    again = run_cli("headers", "-o", str(tmp_path / "here"))
    assert again.returncode == 1
    assert "Directory not empty" in again.stderr


def test_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hmebpf").mkdir()
    (tmp_path / "hmebpf").chmod(0o777)
    done = run_cli("headers", extra_env={"XDG_CACHE_HOME": str(tmp_path)})
    assert (done.returncode, done.stdout) == (1, "")
    assert f"keep the kernel headers: {tmp_path}/hmebpf: others may write it" in done.stderr
    assert "hint: name a directory of yours" in done.stderr


# -- vmlinux.h

RELOCATED = """
#include "vmlinux.h"
int f(struct task_struct *task) { return task->tgid; }
"""


def test_clang_relocates_what_is_read_through_vmlinux_h(cache: Path, tmp_path: Path) -> None:
    if not shutil.which("clang"):
        pytest.skip("needs clang")
    header = vmlinux_header()
    argv = ["clang", "-target", "bpf", "-g", "-O2", f"-I{header.parent}", "-c", "-x", "c", "-"]
    target = tmp_path / "some.o"
    done = subprocess.run([*argv, "-o", target], input=RELOCATED, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    raw: Any = target.read_bytes()
    assert b".BTF.ext\0" in raw
    assert re.search(rb"\x000:\d+\0", raw), "a relocation's access string, such as 0:123"
    assert run_cli("headers", "--vmlinux").stdout == f"{header}\n"


def test_cache_shows_and_clears_them(tmp_path: Path) -> None:
    own = {"XDG_CACHE_HOME": str(tmp_path)}
    path = run_cli("headers", "--vmlinux", extra_env=own).stdout.strip()
    shown = run_cli("cache", "show", extra_env=own).stdout
    assert f"kernel headers: {tmp_path}/hmebpf/headers/" in shown
    cleared = run_cli("cache", "clear", extra_env=own).stdout
    assert "1 sets of kernel headers removed" in cleared
    assert not os.path.exists(path)
    assert "kernel headers" not in run_cli("cache", "show", extra_env=own).stdout
