"""What a text for BCC says by the names of its functions and the macros of its maps."""

from __future__ import annotations

from pathlib import Path

import pytest

from hypermesh_ebpf.attach_type import EbpfAttachType
from hypermesh_ebpf.errors import CompileError, Unsupported
from hypermesh_ebpf.image.conventions import (
    MapHint,
    attach_point,
    includes,
    map_hints,
    record_types,
    strip_comments,
    tracepoints,
)


@pytest.mark.parametrize(
    ("function", "kind", "attach"),
    [
        ("kprobe__do_unlinkat", "kprobe", "kprobe:do_unlinkat"),
        ("kretprobe__do_unlinkat", "kretprobe", "kretprobe:do_unlinkat"),
        ("kprobe__sys_clone", "kprobe", "kprobe:syscall:clone"),
        ("kprobe____x64_sys_clone", "kprobe", "kprobe:syscall:clone"),
        ("kretprobe____arm64_sys_openat", "kretprobe", "kretprobe:syscall:openat"),
        ("tracepoint__sched__sched_switch", "tracepoint", "tracepoint:sched:sched_switch"),
        ("raw_tracepoint__sys_enter", "raw_tracepoint", "raw_tracepoint:sys_enter"),
        ("kfunc__vfs_open", "fentry", "fentry:vfs_open"),
        ("kfunc____x64_sys_openat", "fentry", "fentry:__x64_sys_openat"),
        ("kfunc__vmlinux__vfs_open", "fentry", "fentry:vfs_open"),
        ("kretfunc__foo__bar", "fexit", "fexit:foo__bar"),
        ("lsm__bprm_check_security", "lsm", "lsm:bprm_check_security"),
        ("count", None, None),
        ("syscall__execve", None, None),
    ],
)
def test_name_of_a_function_tells_where_it_runs(
    function: str, kind: str | None, attach: str | None
) -> None:
    assert attach_point(function, "", {"vmlinux", "kvm"}) == (kind, attach)
    if attach:
        assert EbpfAttachType.parse(attach).kind == kind, "an attach point that is one"


@pytest.mark.parametrize(
    "function", ["kmod_ret__security_file_open", "bpf_iter__task", "kretfunc__kvm__kvm_vcpu_kick"]
)
def test_what_cannot_be_attached_is_refused_by_its_name(function: str) -> None:
    with pytest.raises(Unsupported) as caught:
        attach_point(function, "", {"vmlinux", "kvm"})
    assert function.rpartition("__")[2] in caught.value.what
    assert caught.value.cause and caught.value.remedy


@pytest.mark.parametrize(
    ("arguments", "kind", "attach"),
    [
        ("struct xdp_md *ctx", "xdp", None),
        ("struct __sk_buff *skb", "tc", None),
        ("struct bpf_perf_event_data *ctx", "perf_event", None),
        ("struct bpf_raw_tracepoint_args *ctx", "raw_tracepoint", None),
        ("struct bpf_sock *sk", "cgroup", None),
        ("struct pt_regs *ctx, struct sock *sk", None, None),
        ("const struct xdp_md * ctx", "xdp", None),
        (
            "struct tracepoint__syscalls__sys_enter_openat *args",
            "tracepoint",
            "tracepoint:syscalls:sys_enter_openat",
        ),
        ("void *ctx", None, None),
        ("", None, None),
    ],
)
def test_first_argument_tells_where_a_function_without_convention_runs(
    arguments: str, kind: str | None, attach: str | None
) -> None:
    code = f"static int other(struct __sk_buff *skb) {{ return 0; }}\nint f({arguments})\n{{ }}"
    assert attach_point("f", code) == (kind, attach)


def test_declaration_or_call_is_not_the_definition() -> None:
    code = "int f(struct __sk_buff *skb);\nint g(void) { return f(0); }\nint f(struct xdp_md *x) {}"
    assert attach_point("f", code) == ("xdp", None)


def test_comments_go_and_lines_and_strings_stay() -> None:
    text = 'a /* "x\n\n" */ b // c\nchar *s = "/* no */ // comment"; // \\\nstill\nd'
    code = strip_comments(text)
    assert code.count("\n") == text.count("\n")
    assert '"/* no */ // comment"' in code
    assert "still" not in code and "x" not in code and "c\n" not in code


def test_hints_come_from_the_macros_of_the_maps() -> None:
    code = strip_comments(
        """
        BPF_HISTOGRAM(dist);
        BPF_HISTOGRAM(by_disk, struct key_t, 512);
        BPF_TABLE("histogram", int, u64, third, 64);
        // BPF_HISTOGRAM(commented);
        BPF_HASH(plain, struct { u32 a, b; }, u64);
        BPF_ARRAY(pattern, u64, 4);
        BPF_ARRAY_OF_MAPS(outer, "pattern", 10);
        BPF_HASH_OF_MAPS(hashed, struct key_t, "pattern");
        BPF_TABLE("array_of_maps$pattern", int, int, table, 3);
        BPF_TABLE_PINNED("hash", u32, u64, kept, 10, "/sys/fs/bpf/" "kept");
        BPF_TABLE_PINNED("hash", u32, struct pair(a, b), flagged, 10, "/sys/fs/bpf/f", 1);
        BPF_XSKMAP(unpinned, 4);
        BPF_XSKMAP(sockets, 4, "/sys/fs/bpf/xsk");
        BPF_PERF_ARRAY(cycles, NUM_CPUS);
        #define HERE(n) BPF_HISTOGRAM(n)
        int f(void *ctx) { dist.increment(bpf_log2l(3)); return 0; }
        """
    )
    hints = map_hints(code)
    assert hints.pop("n") == MapHint(histogram=True), "a macro of the text's own: of no map"
    assert hints == {
        "dist": MapHint(histogram=True),
        "by_disk": MapHint(histogram=True),
        "third": MapHint(histogram=True),
        "outer": MapHint(inner="pattern"),
        "hashed": MapHint(inner="pattern"),
        "table": MapHint(inner="pattern"),
        "kept": MapHint(pinned="/sys/fs/bpf/kept"),
        "flagged": MapHint(pinned="/sys/fs/bpf/f"),
        "sockets": MapHint(pinned="/sys/fs/bpf/xsk"),
        "cycles": MapHint(counters=True),
    }


def test_linear_histogram_is_not_one_by_powers_of_two() -> None:
    code = "BPF_HISTOGRAM(dist); int f(void *ctx) { dist.increment(3); return 0; }"
    assert map_hints(code)["dist"].histogram is False


def test_pin_whose_path_cannot_be_read_is_an_error() -> None:
    with pytest.raises(CompileError) as caught:
        map_hints('BPF_TABLE_PINNED("hash", u32, u64, kept, 10, WHERE);')
    assert "kept" in caught.value.what and "WHERE" in str(caught.value.cause)


def test_types_of_records_are_found() -> None:
    code = """
    int f(struct pt_regs *ctx) {
        struct data_t data = {}, *other;
        u64 now = 3;
        const struct small s = {};
        struct event_t *e = ring.ringbuf_reserve(sizeof(struct event_t));
        plain.perf_submit(ctx, &data, sizeof(data));
        pointer.perf_submit(ctx, other_pointer, sizeof(struct other_t));
        number.perf_submit(ctx, &now, sizeof(now));
        ring.ringbuf_submit(e, 0);
        out.ringbuf_output(&s, sizeof(s), 0);
        packet.perf_submit_skb(skb, skb->len, &data, sizeof(data));
        arrow->perf_submit(ctx, (void *)&data, sizeof(struct data_t));
        unknown.perf_submit(ctx, make(), size());
    }
    """
    assert record_types(code) == {
        "plain": "struct data_t",
        "pointer": "struct other_t",
        "number": "u64",
        "ring": "struct event_t",
        "out": "struct small",
        "packet": "struct data_t",
        "arrow": "struct data_t",
    }


def test_includes_and_tracepoints_of_a_text() -> None:
    code = strip_comments(
        '#include <linux/sched.h>\n  # include "own.h"\n// #include <not/this.h>\n'
        "TRACEPOINT_PROBE(sched, sched_switch) {}\n"
        "int f(struct tracepoint__irq__softirq_entry *args) {}\n"
        "TRACEPOINT_PROBE( sched,sched_switch ) {}"
    )
    assert includes(code) == [("linux/sched.h", True), ("own.h", False)]
    assert tracepoints(code) == [("sched", "sched_switch"), ("irq", "softirq_entry")]


def test_own_headers_are_followed_and_the_kernels_told_apart(tmp_path: Path) -> None:
    from hypermesh_ebpf.image.user_text import UserSource

    (tmp_path / "more").mkdir()
    (tmp_path / "own.h").write_text('#include "deeper.h"\n#include <linux/types.h>\nint own;')
    (tmp_path / "deeper.h").write_text('#include "own.h"\n#include <net/sock.h>\nint deeper;')
    (tmp_path / "more" / "far.h").write_text("int far;")
    text = '#include "own.h"\n#include <far.h>\n#include <stddef.h>\nint f(void *ctx) {}'
    flags = ["-I", str(tmp_path / "more"), "-DX=1"]
    source = UserSource.read("prog.c", text, flags, tmp_path)
    assert {Path(path).name for path in source.headers} == {"own.h", "deeper.h", "far.h"}
    assert set(source.kernel_headers) == {"linux/types.h", "net/sock.h"}
    assert source.needs_kernel_headers
    assert source.flags == (f"-iquote{tmp_path}", f"-I{tmp_path}/more", "-DX=1")
    assert all(word in source.code for word in ("int own;", "int deeper;", "int far;"))
    light = UserSource.read("prog.c", "#include <linux/types.h>\nint f(void *ctx) {}")
    assert not light.needs_kernel_headers
