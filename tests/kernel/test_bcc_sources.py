"""Users' C for BCC: what becomes of it, compared with what BCC itself makes of the same text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hypermesh_ebpf.bpf.maps import TypedMap, read_map_spec
from hypermesh_ebpf.bpf.programs import close_all, create_maps, load_program
from hypermesh_ebpf.bpf.spec import PERF_COUNTERS, MapSpec
from hypermesh_ebpf.errors import (
    AttachError,
    CompileError,
    HmebpfError,
    LoadError,
    MissingBtf,
    PinError,
    Unsupported,
)
from hypermesh_ebpf.host.kernel_btf import btf_path
from hypermesh_ebpf.host.symbols import resolve_target
from hypermesh_ebpf.image.image import Image
from hypermesh_ebpf.program_view import make_view
from tests.compiler import ROOT, build_user_file, run_program
from tests.netns import needs_own_mounts

needs_btf = pytest.mark.skipif(not os.path.exists(btf_path()), reason="this kernel has no BTF")


def compile_user(folder: Path, text: str, *flags: str, **options: Any) -> Image:
    path = folder / "prog.c"
    path.write_text(text)
    return build_user_file(path, *flags, **options)[0]


@contextmanager
def loaded(image: Image) -> Iterator[tuple[dict[str, int], list[tuple[MapSpec, int]]]]:
    """Programs of a known kind by name, and all maps; closed at the end."""
    maps = create_maps(image.maps)
    programs = {}
    try:
        for spec in image.programs:
            if spec.kind in ("xdp", "tc", "tracepoint", "raw_tracepoint", "kprobe"):
                programs[spec.name] = load_program(spec, spec.kind, image.license, maps)
        yield programs, list(zip(image.maps, maps, strict=True))
    finally:
        close_all([*maps, *programs.values()])


# -- conventions

CONVENTIONS = """
BPF_HASH(counts, u32);
int kprobe__sys_clone(struct pt_regs *ctx) { counts.increment(1); return 0; }
int kretprobe____x64_sys_openat(struct pt_regs *ctx) { return 0; }
int kprobe__do_unlinkat(struct pt_regs *ctx, int dfd) { counts.increment(dfd); return 0; }
TRACEPOINT_PROBE(sched, sched_switch) { counts.increment(args->next_pid); return 0; }
TRACEPOINT_PROBE(syscalls, sys_enter_openat) { counts.increment(args->dfd); return 0; }
RAW_TRACEPOINT_PROBE(sched_process_exec) { return 0; }
KFUNC_PROBE(vfs_open, const struct path *path, struct file *file) { return 0; }
KRETFUNC_PROBE(vfs_open, const struct path *path, struct file *file, int ret) { return 0; }
LSM_PROBE(file_open, struct file *file) { return 0; }
int not_attached(struct pt_regs *ctx) { return 0; }
int on_packet(struct xdp_md *ctx) { return XDP_PASS; }
int classify(struct __sk_buff *skb) { return 0; }
int sample(struct bpf_perf_event_data *ctx) { return 0; }
static int helper(int x) { return x + 1; }
static __always_inline int inlined(int x) { return x + 1; }
inline int plain_inline(int x) { return x + 1; }
int uses_them(struct xdp_md *ctx) { return helper(inlined(0)); }
"""

# Record what BCC's own Python would attach, without the kernel.
BCCS_OWN = """
import json, os, sys
import bcc

class Recorder(bcc.BPF):
    found = {}

    def load_func(self, name, kind, *rest, **more):
        return bcc.BPF.Function(self, name, -1)

    def _note(self, fn_name, kind, target):
        self.found[fn_name.decode()] = f"{kind}:{target.decode()}"

    def attach_kprobe(self, event=b"", fn_name=b"", **more):
        self._note(fn_name, "kprobe", event)

    def attach_kretprobe(self, event=b"", fn_name=b"", **more):
        self._note(fn_name, "kretprobe", event)

    def attach_tracepoint(self, tp=b"", fn_name=b"", **more):
        self._note(fn_name, "tracepoint", tp)

    def attach_raw_tracepoint(self, tp=b"", fn_name=b""):
        self._note(fn_name, "raw_tracepoint", tp)

    def attach_kfunc(self, fn_name=b""):
        self._note(fn_name, "fentry", fn_name[len("kfunc__"):])

    def attach_kretfunc(self, fn_name=b""):
        self._note(fn_name, "fexit", fn_name[len("kretfunc__"):])

    def attach_lsm(self, fn_name=b""):
        self._note(fn_name, "lsm", fn_name[len("lsm__"):])

from hypermesh_ebpf.host.filesystems import enter_private_mounts
from hypermesh_ebpf.image.headers import header_tree
enter_private_mounts()
os.environ["BCC_KERNEL_SOURCE"] = str(header_tree())
made = Recorder(text=sys.stdin.read().encode())
functions = [bcc.lib.bpf_function_name(made.module, i).decode()
             for i in range(bcc.lib.bpf_num_functions(made.module))]
print(json.dumps([made.found, functions]))
sys.stdout.flush()
os._exit(0)
"""


def bccs_python() -> str:
    """An interpreter that can import the distribution's bcc package."""
    for python in (sys.executable, "/usr/bin/python3"):
        if not subprocess.run([python, "-c", "import bcc"], capture_output=True).returncode:
            return python
    pytest.skip("no Python here can import bcc")


@needs_btf
def test_functions_are_attached_where_bcc_would_attach_them(tmp_path: Path) -> None:
    done = subprocess.run(
        [bccs_python(), "-c", BCCS_OWN],
        input=CONVENTIONS,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    bccs, functions = json.loads(done.stdout)
    image = compile_user(tmp_path, CONVENTIONS)
    assert {program.name for program in image.programs} == set(functions)
    ours = {}
    for program in image.programs:
        if program.attach:
            kind, _, target = program.attach.partition(":")
            assert kind == program.kind
            ours[program.name] = f"{kind}:{resolve_target(target)}"
    assert ours == bccs


@needs_btf
def test_kinds_of_functions_that_bcc_attaches_by_hand(tmp_path: Path) -> None:
    image = compile_user(tmp_path, CONVENTIONS)
    kinds = {program.name: program.kind for program in image.programs if not program.attach}
    assert kinds == {
        "not_attached": None,
        "on_packet": "xdp",
        "classify": "tc",
        "sample": "perf_event",
        "uses_them": "xdp",
    }


@needs_btf
def test_program_of_a_kind_that_cannot_be_attached_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="kmod_ret__security_file_open"):
        compile_user(tmp_path, "KMOD_RET(security_file_open) { return 0; }")


# -- maps

EVERY_MAP = """
struct key_t { u32 prefix; u32 address; };
BPF_HASH(m_hash); BPF_ARRAY(m_array, u64, 4); BPF_PROG_ARRAY(m_prog, 4);
BPF_PERF_OUTPUT(m_perf); BPF_PERF_ARRAY(m_counters, 4);
BPF_PERCPU_HASH(m_percpu_hash); BPF_PERCPU_ARRAY(m_percpu_array, u64, 4);
BPF_STACK_TRACE(m_stacks, 16); BPF_CGROUP_ARRAY(m_cgroups, 1);
BPF_TABLE("lru_hash", u32, u64, m_lru, 8);
BPF_TABLE("lru_percpu_hash", u32, u64, m_lru_percpu, 8);
BPF_LPM_TRIE(m_lpm, struct key_t, u64, 8);
BPF_ARRAY_OF_MAPS(m_array_of, "m_array", 2); BPF_HASH_OF_MAPS(m_hash_of, u32, "m_array", 2);
BPF_DEVMAP(m_dev, 2); BPF_SOCKMAP(m_sock, 2); BPF_CPUMAP(m_cpu, 2); BPF_XSKMAP(m_xsk, 2);
BPF_SOCKHASH(m_sockhash); BPF_CGROUP_STORAGE(m_cgroup_storage, u64);
BPF_PERCPU_CGROUP_STORAGE(m_percpu_cgroup_storage, u64);
BPF_QUEUE(m_queue, struct key_t, 4); BPF_STACK(m_stack, u32, 4);
BPF_SK_STORAGE(m_sk, u64); BPF_RINGBUF_OUTPUT(m_ring, 4);
BPF_INODE_STORAGE(m_inode, struct key_t); BPF_TASK_STORAGE(m_task, u64);
BPF_HISTOGRAM(m_dist); BPF_HISTOGRAM(m_by_key, struct key_t, 32);
BPF_TABLE_PUBLIC("hash", u32, u64, m_public, 8); BPF_TABLE_SHARED("hash", u32, u64, m_shared, 8);
int f(struct xdp_md *ctx) { m_dist.increment(bpf_log2l(3)); return XDP_PASS; }
"""
TYPES = {
    "m_hash": 1,
    "m_array": 2,
    "m_prog": 3,
    "m_perf": 4,
    "m_counters": 4,
    "m_percpu_hash": 5,
    "m_percpu_array": 6,
    "m_stacks": 7,
    "m_cgroups": 8,
    "m_lru": 9,
    "m_lru_percpu": 10,
    "m_lpm": 11,
    "m_array_of": 12,
    "m_hash_of": 13,
    "m_dev": 14,
    "m_sock": 15,
    "m_cpu": 16,
    "m_xsk": 17,
    "m_sockhash": 18,
    "m_cgroup_storage": 19,
    "m_percpu_cgroup_storage": 21,
    "m_queue": 22,
    "m_stack": 23,
    "m_sk": 24,
    "m_ring": 27,
    "m_inode": 28,
    "m_task": 29,
    "m_dist": 2,
    "m_by_key": 1,
    "m_public": 1,
    "m_shared": 1,
}


@needs_btf
def test_every_kind_of_map_is_found_and_made(tmp_path: Path) -> None:
    image = compile_user(tmp_path, EVERY_MAP)
    specs = {spec.name: spec for spec in image.maps}
    assert {name: spec.type for name, spec in specs.items()} == TYPES
    assert specs["m_ring"].max_entries == 4 * os.sysconf("SC_PAGE_SIZE")
    assert {name for name, spec in specs.items() if spec.histogram} == {"m_dist", "m_by_key"}
    assert specs["m_array_of"].inner == specs["m_hash_of"].inner == "m_array"
    assert specs["m_counters"].value_desc == PERF_COUNTERS
    assert specs["m_lpm"].flags == 1, "BPF_F_NO_PREALLOC"
    with loaded(image) as (programs, maps):
        assert run_program(programs["f"]) == 2
        assert {spec.name: read_map_spec(fd).type for spec, fd in maps} == TYPES
        (entries,) = [TypedMap(spec, fd).entries() for spec, fd in maps if spec.name == "m_dist"]
    assert entries[2] == (2, 1)


def test_map_of_maps_without_its_pattern_is_an_error() -> None:
    spec = MapSpec("outer", 12, 4, 4, 2, 0, None, None, inner="nowhere")
    with pytest.raises(LoadError, match="nowhere"):
        create_maps([spec])


VALUES = """
enum color { RED, GREEN, BLUE = 77 };
struct value_t {
	enum color color; u32 low:3; u32 high:29; char text[8]; u8 mac[6]; s64 negative;
	struct { u16 a; u16 b; } in; union { u32 v4; u8 bytes[4]; }; void *pointer; u16 grid[2][2];
};
BPF_ARRAY(values, struct value_t, 1);
int fill(struct xdp_md *ctx)
{
	u32 zero = 0;
	struct value_t *v = values.lookup(&zero);
	if (!v)
		return XDP_ABORTED;
	v->color = BLUE; v->low = 5; v->high = 1 << 20; v->text[0] = 'h'; v->text[1] = 'i';
	v->mac[0] = 1; v->mac[5] = 255; v->negative = -3; v->in.a = 8; v->in.b = 9;
	v->bytes[0] = 10; v->pointer = (void *)0x1234; v->grid[1][0] = 11;
	return XDP_PASS;
}
"""


@needs_btf
def needs_bccs_btf(image: Image) -> None:
    """Skip where the kernel refuses the BTF that BCC gives its maps: types are BCC's words then."""
    if not any(isinstance(spec.value_desc, dict) for spec in image.maps):
        pytest.skip("this kernel refuses the BTF of BCC's maps (seen on 5.10)")


@pytest.mark.vm_too
def test_values_are_told_by_btf_with_names_of_enums_and_bit_fields(tmp_path: Path) -> None:
    image = compile_user(tmp_path, VALUES)
    needs_bccs_btf(image)
    with loaded(image) as (programs, maps):
        run_program(programs["fill"])
        ((_zero, value),) = TypedMap(*maps[0]).entries()
    assert value == {
        "color": "BLUE",
        "low": 5,
        "high": 1 << 20,
        "text": "hi",
        "mac": [1, 0, 0, 0, 0, 255],
        "negative": -3,
        "in": {"a": 8, "b": 9},
        "v4": 10,
        "bytes": [10, 0, 0, 0],
        "pointer": "0x1234",
        "grid": [[0, 0], [11, 0]],
    }


RECORDS = """
enum verdict { PASS = 1, DROP };
struct nested_t { u8 a; u32 b; };
struct event_t { u32 pid; char comm[16]; struct nested_t nested; enum verdict verdict; };
BPF_PERF_OUTPUT(structs);
BPF_PERF_OUTPUT(numbers);
BPF_RINGBUF_OUTPUT(reserved, 1);
BPF_RINGBUF_OUTPUT(local, 1);
BPF_PERF_OUTPUT(silent);
int send(struct xdp_md *ctx)
{
	struct event_t event = {};
	event.pid = 4711; event.comm[0] = 'x'; event.nested.b = 5; event.verdict = DROP;
	structs.perf_submit(ctx, &event, sizeof(event));
	u64 number = 1ull << 40;
	numbers.perf_submit(ctx, &number, sizeof(number));
	struct event_t *slot = reserved.ringbuf_reserve(sizeof(struct event_t));
	if (slot) {
		__builtin_memset(slot, 0, sizeof(*slot));
		slot->pid = 4712;
		reserved.ringbuf_submit(slot, 0);
	}
	struct inside_t { u32 one; u16 two[2]; } inside = { 1, { 2, 3 } };
	local.ringbuf_output(&inside, sizeof(inside), 0);
	return XDP_PASS;
}
"""


@needs_btf
@pytest.mark.vm_too
def test_records_of_every_buffer_are_typed_events(tmp_path: Path) -> None:
    image = compile_user(tmp_path, RECORDS)
    needs_bccs_btf(image)
    assert {spec.name for spec in image.maps} == {
        "structs", "numbers", "reserved", "local", "silent",
    }  # fmt: skip
    with loaded(image) as (programs, maps):
        _monitor, collector = make_view(maps, "prog.c")
        try:
            for _ in range(3):
                run_program(programs["send"])
            fields = [dict(event.fields) for event in collector.events()]
            assert collector.collect().events_lost is None, "of ring buffers it is not known"
        finally:
            collector.close()
    by_map: dict[Any, list[Any]] = {}
    for each in fields:
        by_map.setdefault(each.pop("map"), []).append(each)
    nothing = {"a": 0, "b": 0}
    assert by_map == {
        "structs": 3 * [{"pid": 4711, "comm": "x", "nested": {"a": 0, "b": 5}, "verdict": "DROP"}],
        "numbers": 3 * [{"value": 1 << 40}],
        "reserved": 3 * [{"pid": 4712, "comm": "", "nested": nothing, "verdict": 0}],
        # Known inside the function alone: by what BCC tells of it.
        "local": 3 * [{"one": 1, "two": [2, 3]}],
    }


# -- pins

PINNED = """
BPF_TABLE_PINNED("hash", u32, u64, kept, 10, "PLACE/kept");
int count(struct xdp_md *ctx) { kept.increment(7); return XDP_PASS; }
"""
PINS = """
import os, struct, sys
from pathlib import Path
from hypermesh_ebpf.bpf.maps import TypedMap
from hypermesh_ebpf.bpf.programs import create_maps
from hypermesh_ebpf.bpf.libbpf import libbpf
from hypermesh_ebpf.errors import PinError
from tests.compiler import build_user_file
path, place = Path(sys.argv[1]), Path(sys.argv[2])
image = build_user_file(path)[0]
print(sorted(each.name for each in place.iterdir() if "debug" not in each.name))
(fd,) = create_maps(image.maps)
libbpf().bpf_map_update_elem(fd, struct.pack("=I", 7), struct.pack("=Q", 42), 0)
os.close(fd)
(again,) = create_maps(image.maps)
print(TypedMap(image.maps[0], again).entries())
path.write_text(path.read_text().replace("u64", "u32"))
try:
    create_maps(build_user_file(path)[0].maps)
except PinError as error:
    print(error.cause)
"""


@needs_btf
@needs_own_mounts
def test_pinned_map_is_pinned_at_load_and_found_again(tmp_path: Path) -> None:
    place = tmp_path / "bpffs"
    place.mkdir()
    path = tmp_path / "prog.c"
    path.write_text(PINNED.replace("PLACE", str(place)))
    script = f'mount -t bpf bpf {place} && exec "$0" -c "$1" {path} {place}'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, sys.executable, PINS],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    compiled, entries, refused = done.stdout.splitlines() or pytest.fail(done.stderr)
    assert compiled == "[]", "nothing is pinned while it is compiled"
    assert entries == "[(7, 42)]"
    assert "another map is pinned there" in refused


@needs_btf
def test_pin_outside_of_a_bpf_file_system_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    image = compile_user(tmp_path, PINNED.replace("PLACE", str(tmp_path)))
    with pytest.raises(PinError) as caught:
        create_maps(image.maps)
    assert "mount -t bpf" in str(caught.value.remedy)


# -- headers

TASK = """
{includes}
struct found_t {{ u32 pid; u32 parent; }};
BPF_ARRAY(found, struct found_t, 1);
RAW_TRACEPOINT_PROBE(sys_enter)
{{
	u32 zero = 0;
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct found_t *f = found.lookup(&zero);
	if (f) {{
		f->pid = bpf_get_current_pid_tgid() >> 32;
		f->parent = task->real_parent->tgid;
	}}
	return 0;
}}
"""


@needs_btf
@pytest.mark.parametrize(
    "includes",
    [
        pytest.param("", marks=pytest.mark.vm_too),
        "#include <uapi/linux/ptrace.h>\n#include <linux/sched.h>\n#include <net/sock.h>",
    ],
    ids=["none", "kernel headers"],
)
def test_kernel_structures_are_those_of_this_kernel(tmp_path: Path, includes: str) -> None:
    from tests.compiler import run_in_this_task

    image = compile_user(tmp_path, TASK.format(includes=includes))
    with loaded(image) as (programs, maps):
        run_in_this_task(programs["raw_tracepoint__sys_enter"])
        ((_zero, value),) = TypedMap(*maps[0]).entries()
    assert value == {"pid": os.getpid(), "parent": os.getppid()}


@needs_btf
def test_arguments_of_a_probed_function_come_from_registers(tmp_path: Path) -> None:
    text = """
    BPF_HASH(seen, u64);
    int kprobe__tcp_v4_connect(struct pt_regs *ctx, struct sock *sk, int length)
    { seen.increment(sk->__sk_common.skc_dport + length + PT_REGS_RC(ctx)); return 0; }
    int kprobe__sys_openat(struct pt_regs *ctx, int dfd, const char __user *name)
    { seen.increment(dfd); return 0; }
    int syscall__execve(struct pt_regs *ctx, const char __user *name, char **argv)
    { seen.increment((u64)argv); return 0; }
    """
    with loaded(compile_user(tmp_path, text)) as (programs, _maps):
        assert set(programs) == {"kprobe__tcp_v4_connect", "kprobe__sys_openat"}


@needs_btf
def test_what_the_light_headers_lack_is_taken_from_all_of_the_kernels(tmp_path: Path) -> None:
    """No include says it, but a macro and a type need the kernel's headers: BCC's has them."""
    text = """
    int f(struct xdp_md *ctx) { struct ethhdr e = {}; atomic_t a; return e.h_proto + S_IFREG; }
    """
    assert compile_user(tmp_path, text).programs[0].kind == "xdp"


def test_own_headers_and_flags_are_found(tmp_path: Path) -> None:
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "other.h").write_text("#define OTHER 3\n")
    (tmp_path / "local.h").write_text("struct local_t { u32 a; u64 b; };\n#define LOCAL 2\n")
    text = """#include "local.h"
#include <other.h>
BPF_HASH(counts, struct local_t);
int f(struct xdp_md *ctx) { struct local_t key = {}; counts.increment(key);
  return LOCAL + OTHER + MORE; }
"""
    image = compile_user(tmp_path, text, "-I", str(tmp_path / "include"), "-DMORE=1")
    with loaded(image) as (programs, _maps):
        assert run_program(programs["f"]) == 6


# -- static probes

GENERATIONS = """
#include <uapi/linux/ptrace.h>
BPF_HASH(generations, int);
int collect(struct pt_regs *ctx)
{
	int generation = -1;
	bpf_usdt_readarg(1, ctx, &generation);
	generations.increment(generation);
	return 0;
}
"""
COLLECTOR = """
import gc
gc.disable()
print("ready", flush=True)
input()
for generation in (0, 1, 1, 2, 2, 2):
    gc.collect(generation)
print("done", flush=True)
input()
"""


@needs_btf
@pytest.mark.parametrize("include", [True, False])
def test_arguments_of_a_static_probe_are_read(tmp_path: Path, include: bool) -> None:
    from hypermesh_ebpf.attach import attach
    from hypermesh_ebpf.attach_type import EbpfAttachType
    from hypermesh_ebpf.host import executables

    python = os.path.realpath("/usr/bin/python3")
    try:
        executables.find_static_probes(python, "python", "gc__start")
    except HmebpfError as error:
        pytest.skip(str(error))
    text = GENERATIONS if include else GENERATIONS.replace("#include", "//")
    command = [python, "-I", "-c", COLLECTOR]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == "ready\n"
        point = EbpfAttachType.usdt(python, "python", "gc__start", pid=other.pid)
        image = compile_user(tmp_path, text, attach={"collect": str(point)})
        maps = create_maps(image.maps)
        program = load_program(image.programs[0], "uprobe", image.license, maps)
        made = attach(point, program, 0, lambda hold: None)
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "done\n"
        seen = dict(TypedMap(image.maps[0], maps[0]).entries())
        close_all([*made.descriptors, program, *maps])
        other.stdin.close()
    assert seen == {0: 1, 1: 2, 2: 3}


@needs_btf
def test_process_is_asked_for_where_bcc_needs_one(tmp_path: Path) -> None:
    python = os.path.realpath("/usr/bin/python3")
    with pytest.raises((CompileError, AttachError)) as caught:
        compile_user(tmp_path, GENERATIONS, attach={"collect": f"usdt:{python}:python:gc__start"})
    if isinstance(caught.value, AttachError):
        pytest.skip(str(caught.value))
    assert "pid=PID" in str(caught.value.remedy)


@needs_btf
def test_static_probe_that_the_file_has_not_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AttachError) as caught:
        compile_user(tmp_path, GENERATIONS, attach={"collect": f"usdt:{sys.executable}:no:probe"})
    assert "no:probe" in str(caught.value)


# -- errors

BROKEN = """{include}
BPF_HASH(counts);
int f(struct xdp_md *ctx)
{{
	return missing;
}}
"""


@needs_btf
@pytest.mark.parametrize("include", ["", "#include <linux/sched.h>"], ids=["light", "full"])
def test_line_of_an_error_is_the_users(tmp_path: Path, include: str) -> None:
    with pytest.raises(CompileError) as caught:
        compile_user(tmp_path, BROKEN.format(include=include))
    assert caught.value.what == "compile prog.c"
    assert str(caught.value.cause).startswith("prog.c:5:9: error: use of undeclared identifier")


@pytest.mark.parametrize(
    ("text", "telling", "remedy"),
    [
        ('#!/usr/bin/python3\nfrom bcc import BPF\nb = BPF(text="")', "Python", "BPF(text="),
        ("int x = 3;\nint f(struct xdp_md *c) { return x; }", "global variable", "BPF_ARRAY"),
        (
            "__attribute__((noinline)) static int g(int n) { return n + bpf_get_prandom_u32(); }\n"
            "int f(struct xdp_md *c) { return g(1); }",
            "not inlined",
            "__always_inline",
        ),
        (
            "int f(struct pt_regs *ctx) { u64 x = 0; bpf_usdt_readarg(1, ctx, &x); return x; }",
            "bpf_usdt_readarg",
            "f=usdt:",
        ),
        ("int f(struct xdp_md *ctx) { FILTER return 0; }", "FILTER", "-DFILTER"),
    ],
    ids=["python", "global", "noinline", "usdt", "placeholder"],
)
def test_what_only_bccs_python_could_do_is_explained(
    tmp_path: Path, text: str, telling: str, remedy: str
) -> None:
    with pytest.raises(CompileError) as caught:
        compile_user(tmp_path, text)
    assert telling in str(caught.value.cause)
    assert remedy in str(caught.value.remedy)


# -- cache


@needs_btf
def test_image_is_kept_until_something_of_it_changes(tmp_path: Path) -> None:
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    (tmp_path / "local.h").write_text("#define LOCAL 2\n")
    path = tmp_path / "prog.c"
    path.write_text(
        '#include "local.h"\nTRACEPOINT_PROBE(sched, sched_switch) '
        '{ bpf_trace_printk("%d", args->next_pid + LOCAL); return 0; }\n'
    )

    def build(*flags: str) -> tuple[Image, bool]:
        image, told = build_user_file(path, *flags, use_cache=True, env=env)
        return image, "compiling prog.c" in told

    first, compiled = build()
    assert compiled
    assert build() == (first, False)
    assert first.programs[0].attach == "tracepoint:sched:sched_switch", "kept with the rest"
    assert build("-DX=1")[1]
    (tmp_path / "local.h").write_text("#define LOCAL 3\n")
    changed, compiled = build()
    assert compiled and changed != first


@needs_btf
def test_text_that_is_no_utf8_compiles(tmp_path: Path) -> None:
    path = tmp_path / "prog.c"
    path.write_bytes(b"/* \xe9t\xe9 */ int f(struct xdp_md *ctx) { return XDP_PASS; }")
    assert build_user_file(path)[0].programs[0].kind == "xdp"


# -- without BTF


def test_kernel_without_btf_compiles_what_needs_no_kernel_structures(tmp_path: Path) -> None:
    env = {"HMEBPF_BTF": "/nonexistent"}
    text = """
    struct key_t { u32 length; };
    BPF_HASH(lengths, struct key_t);
    int f(struct xdp_md *ctx)
    { struct key_t key = { ctx->data_end - ctx->data }; lengths.increment(key); return XDP_PASS; }
    """
    image = compile_user(tmp_path, text, env=env)
    with loaded(image) as (programs, maps):
        run_program(programs["f"], bytes(77))
        assert TypedMap(*maps[0]).entries() == [({"length": 77}, 1)]
    if not os.path.isdir(f"/lib/modules/{os.uname().release}/build"):
        with pytest.raises(MissingBtf) as caught:
            compile_user(tmp_path, "#include <linux/sched.h>\n" + text, env=env)
        assert "HMEBPF_BTF" in str(caught.value.remedy)
