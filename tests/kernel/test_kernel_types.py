"""The kernel structures that are declared for a C text, against bpftool and against the kernel."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypermesh_ebpf.errors import CompileError, MissingBtf
from hypermesh_ebpf.host.dependencies import find_bcc
from hypermesh_ebpf.image.kernel_types import KernelTypes
from tests.compiler import compile_text, loaded, run_in_this_task

VMLINUX = "/sys/kernel/btf/vmlinux"
needs_btf = pytest.mark.skipif(not os.path.exists(VMLINUX), reason="this kernel has no BTF")
needs_bpftool = pytest.mark.skipif(not shutil.which("bpftool"), reason="needs bpftool")
vm_too = pytest.mark.vm_too

STRUCTURES = (
    *("task_struct", "mm_struct", "signal_struct", "cred", "nsproxy", "linux_binprm"),
    *("file", "inode", "dentry", "super_block", "files_struct", "fdtable", "request", "bio"),
    *("socket", "sock", "inet_sock", "tcp_sock", "unix_sock", "sk_buff", "net_device"),
)


class Btf:
    """The kernel's types as bpftool lists them."""

    def __init__(self) -> None:
        argv = ["bpftool", "-j", "btf", "dump", "file", VMLINUX]
        text = subprocess.run(argv, capture_output=True, check=True, timeout=300).stdout
        self._types = {entry["id"]: entry for entry in json.loads(text)["types"]}
        self.structures = {
            entry["name"]: entry for entry in self._types.values() if entry["kind"] == "STRUCT"
        }

    def members(self, structure: dict[str, Any], base: int = 0) -> Iterator[tuple[str, int, int]]:
        """(name, offset in bytes, size in bytes) of all that are no bit fields."""
        for member in structure["members"]:
            place = base + member["bits_offset"]
            if member["name"] == "(anon)":
                yield from self.members(self._types[member["type_id"]], place)
            elif not member.get("bitfield_size") and place % 8 == 0:
                yield member["name"], place // 8, self._size(member["type_id"])

    def _size(self, type_id: int) -> int:
        found = self._types[type_id]
        if found["kind"] == "PTR":
            return 8
        if found["kind"] == "ARRAY":
            return int(found["nr_elems"]) * self._size(found["type_id"])
        return int(found["size"]) if "size" in found else self._size(found["type_id"])


@pytest.fixture(scope="module")
def btf() -> Btf:
    return Btf()


@needs_btf
@needs_bpftool
def test_every_member_is_where_bpftool_says(btf: Btf) -> None:
    """All members of some large structures, with the 300 types that they bring along."""
    lines = []
    for name in STRUCTURES:
        found = btf.structures[name]
        lines.append(f'_Static_assert(sizeof(struct {name}) == {found["size"]}, "{name}");')
        for member, offset, size in btf.members(found):
            place = f"{name}, {member}"
            lines.append(
                f"_Static_assert(__builtin_offsetof(struct {place}) == {offset} && "
                f'sizeof(((struct {name} *)0)->{member}) == {size}, "{place}");'
            )
    assert len(lines) > 1000
    text = "\n".join([*lines, "int nothing(void *ctx) { return 0; }"])
    image = compile_text(text, VMLINUX)  # or clang names the assertion that does not hold
    assert [program.name for program in image.programs] == ["nothing"]


READ_TASK = """
struct found {
	u32 pid, tgid, parent, uid;
	u64 open_files, start_code, start_time, max_fds, umask;
	s32 nice;
	char comm[16];
	char name[16];
};
BPF_ARRAY(result, struct found, 1);

int read_task(void *ctx)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task(), *parent = NULL;
	const struct cred *cred = NULL;
	struct signal_struct *signal = NULL;
	struct mm_struct *mm = NULL;
	struct file *exe = NULL;
	struct dentry *dentry = NULL;
	struct files_struct *files = NULL;
	struct fdtable *fdt = NULL;
	struct fs_struct *fs = NULL;
	const unsigned char *name = NULL;
	s32 prio = 0;
	u32 zero = 0;
	struct found *found = result.lookup(&zero);
	if (!found)
		return 0;
	bpf_probe_read_kernel(&found->pid, 4, &task->pid);
	bpf_probe_read_kernel(&found->tgid, 4, &task->tgid);
	bpf_probe_read_kernel(found->comm, 16, &task->comm);
	bpf_probe_read_kernel(&parent, 8, &task->real_parent);
	bpf_probe_read_kernel(&found->parent, 4, &parent->tgid);
	bpf_probe_read_kernel(&cred, 8, &task->cred);
	bpf_probe_read_kernel(&found->uid, 4, &cred->uid);
	bpf_probe_read_kernel(&signal, 8, &task->signal);
	bpf_probe_read_kernel(&found->open_files, 8, &signal->rlim[RLIMIT_NOFILE].rlim_cur);
	bpf_probe_read_kernel(&prio, 4, &task->static_prio);
	found->nice = prio - 120;
	bpf_probe_read_kernel(&mm, 8, &task->mm);
	bpf_probe_read_kernel(&found->start_code, 8, &mm->start_code);
	bpf_probe_read_kernel(&exe, 8, &mm->exe_file);
	bpf_probe_read_kernel(&dentry, 8, &exe->f_path.dentry);
	bpf_probe_read_kernel(&name, 8, &dentry->d_name.name);
	bpf_probe_read_kernel_str(found->name, 16, name);
	bpf_probe_read_kernel(&files, 8, &task->files);
	bpf_probe_read_kernel(&fdt, 8, &files->fdt);
	bpf_probe_read_kernel(&found->max_fds, 4, &fdt->max_fds);
	bpf_probe_read_kernel(&fs, 8, &task->fs);
	bpf_probe_read_kernel(&found->umask, 4, &fs->umask);
	return 0;
}
"""


@needs_btf
@vm_too
def test_a_program_reads_its_own_task() -> None:
    """Through pointers, embedded structures and an array of them, against /proc."""
    text = READ_TASK.replace("RLIMIT_NOFILE", str(int(resource.RLIMIT_NOFILE)))
    image = compile_text(text, VMLINUX)
    with loaded(image, "raw_tracepoint") as programs:
        run_in_this_task(programs.programs["read_task"])
        ((_key, found),) = programs.maps["result"].items()
    umask = os.umask(0o22)
    os.umask(umask)
    # Behind the name in brackets, the third field of proc(5)'s stat comes first.
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    assert found.pid == threading.get_native_id()
    assert found.tgid == os.getpid()
    assert found.parent == os.getppid()
    assert found.uid == os.getuid()
    comm = found.comm.split(b"\0")[0]  # what an older name left may follow (before Linux 5.17)
    assert comm.decode() == Path("/proc/self/comm").read_text().rstrip("\n")
    assert found.open_files == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert found.nice == os.nice(0)
    assert found.start_code == int(stat[26 - 3])
    assert found.name.split(b"\0")[0].decode() == Path(os.readlink("/proc/self/exe")).name[:15]
    assert found.max_fds == int(_status("FDSize"))
    assert found.umask == umask


def _status(name: str) -> str:
    for line in Path("/proc/self/status").read_text().splitlines():
        field, _, value = line.partition(":")
        if field == name:
            return value.strip()
    raise AssertionError(f"no {name} in /proc/self/status")


@pytest.fixture(scope="module")
def types() -> Iterator[KernelTypes]:
    if not os.path.exists(VMLINUX):
        pytest.skip("this kernel has no BTF")
    with KernelTypes(VMLINUX) as types:
        yield types


def test_only_what_is_named_is_declared(types: KernelTypes) -> None:
    declared = types.declare("int f(struct file *file) { return file->f_path.dentry->d_name.len; }")
    assert "struct dentry *dentry" in declared
    assert "f_inode" not in declared
    assert "task_struct" not in declared
    assert declared.index("struct qstr { union") < declared.index("struct dentry { union")
    assert declared.index("struct path { union") < declared.index("struct file { union")


@pytest.mark.parametrize(
    "text",
    [
        "/* struct no_such_thing */ int f;",
        "// struct no_such_thing\nint f;",
        'char *text = "struct no_such_thing";',
        'char *text = "a \\" quote and struct no_such_thing"; /* " */ int f;',
        "char quote = '\"'; /* struct no_such_thing */ char other = '\"';",
        "struct no_such_thing { int x; }; int f(struct no_such_thing *thing);",
        "int f(struct xdp_md *ctx);",  # BCC's own
    ],
    ids=["comment", "line comment", "string", "quote in a string", "quote", "own", "of BCC"],
)
def test_what_the_kernel_need_not_know(types: KernelTypes, text: str) -> None:
    assert types.declare(text) == ""


def test_slashes_in_a_string_are_no_comment(types: KernelTypes) -> None:
    assert "struct file" in types.declare('char *url = "http://x"; struct file *file;')
    assert "struct file" in types.declare('char *glob = "/*"; struct file *file; /* end */')


def test_what_headers_define_is_left_to_them(types: KernelTypes) -> None:
    assert types.declare("struct file *file;", "struct file { int own; };") == ""


@pytest.mark.parametrize("keyword", ["struct", "union"])
def test_unknown_structure_is_an_error(types: KernelTypes, keyword: str) -> None:
    with pytest.raises(CompileError, match=f"find {keyword} no_such_thing: .*BTF has no") as caught:
        types.declare(f"int f({keyword} no_such_thing *thing);")
    assert "bpftool btf dump" in str(caught.value.remedy)


def test_unknown_member_is_clangs_error() -> None:
    text = "int f(void *ctx) { return ((struct path *)ctx)->no_such_member; }"
    with pytest.raises(CompileError, match=r"test\.c:1:\d+: error: no member named"):
        compile_text(text, VMLINUX if os.path.exists(VMLINUX) else None)


def test_no_btf(tmp_path: Path) -> None:
    with pytest.raises(MissingBtf, match="No such file or directory") as caught:
        KernelTypes(str(tmp_path / "missing"))
    assert "CONFIG_DEBUG_INFO_BTF" in str(caught.value.remedy)
    other = tmp_path / "other"
    other.write_bytes(b"no type information" * 100)
    with pytest.raises(MissingBtf, match=str(other)):
        KernelTypes(str(other))


@needs_btf
@needs_bpftool
def test_structures_of_bccs_own_header_can_be_used(btf: Btf) -> None:
    """What BCC's copy of bpf.h defines and the kernel, too, must not be declared a second time."""
    library = Path(find_bcc().library).read_bytes()  # the header is a string in it
    of_bcc = {name.decode() for name in re.findall(rb"\nstruct (\w+) \{", library)}
    both = sorted(of_bcc & btf.structures.keys())
    assert "xdp_md" in both
    parameters = ", ".join(f"struct {name} *p{n}" for n, name in enumerate(both))
    compile_text(f"static int use({parameters});\nint f(void *ctx) {{ return 0; }}", VMLINUX)
