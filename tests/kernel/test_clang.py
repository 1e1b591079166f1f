"""C for libbpf: compiled with our headers, and what clang says against it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypermesh_ebpf.bpf.btf import ENUM, ENUM64, Btf
from hypermesh_ebpf.bpf.maps import TypedMap
from hypermesh_ebpf.errors import (
    CompileError,
    HmebpfError,
    LoadError,
    MalformedObject,
    MissingDependency,
    Unsupported,
    VerifierError,
)
from hypermesh_ebpf.image.clang import (
    HEADERS,
    compile_object,
    compiler_flags,
    find_clang,
    instruction_set,
    is_libbpf_style,
)
from hypermesh_ebpf.image.elf import load_object
from hypermesh_ebpf.image.elf_file import read_sections
from tests.compiler import run_in_this_task, run_program
from tests.objects import ROOT


def has_clang() -> bool:
    try:
        find_clang()
    except MissingDependency:
        return False
    return True


pytestmark = pytest.mark.skipif(not has_clang(), reason="there is no clang")

HEAD = '#include "vmlinux.h"\n#include <bpf/bpf_helpers.h>\n'
TAIL = 'char LICENSE[] SEC("license") = "GPL";\n'


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vmlinux.h is made once for all tests, and not where the user keeps it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def compiled(body: str, *flags: str, head: str = HEAD) -> bytes:
    return compile_object(Path("/nowhere/test.bpf.c"), head + body + TAIL, flags)


def run_xdp(data: bytes) -> dict[str, object]:
    """Run an object's one XDP program on a packet; its global variables afterwards."""
    loaded = load_object(data, "test.o", {}, {})
    try:
        ((_spec, fd),) = loaded.programs
        assert fd is not None
        assert run_program(fd) == 2
        found: dict[str, object] = {}
        for spec, map_fd in loaded.maps:
            if spec.name in (".bss", ".data"):
                ((_key, values),) = TypedMap(spec, map_fd).entries()
                found |= values
        return found
    finally:
        for fd in [fd for _spec, fd in (*loaded.maps, *loaded.programs) if fd is not None]:
            os.close(fd)


def refusal(body: str, *flags: str, head: str = HEAD) -> CompileError:
    with pytest.raises(CompileError) as caught:
        compiled(body, *flags, head=head)
    assert caught.value.what == "compile test.bpf.c"
    assert caught.value.cause
    assert caught.value.remedy
    return caught.value


# ---- compiling ---------------------------------------------------------------------------------


def test_object_has_code_and_types() -> None:
    data = compiled('SEC("xdp") int pass(struct xdp_md *ctx) { return XDP_PASS; }\n')
    names = {section.name for section in read_sections(data)}
    assert {"xdp", "license", ".BTF", ".BTF.ext"} <= names


def test_macros_and_include_folders(tmp_path: Path) -> None:
    (tmp_path / "mine.h").write_text("#define ANSWER 40\n")
    body = '#include "mine.h"\nint seen;\nSEC("xdp") int f(void *ctx) { seen = ANSWER + MORE; '
    data = compiled(body + "return XDP_PASS; }\n", f"-I{tmp_path}", "-DMORE=2")
    assert run_xdp(data) == {"seen": 42}


def test_includes_beside_the_source(tmp_path: Path) -> None:
    (tmp_path / "mine.h").write_text("#define ANSWER 40\n")
    text = HEAD + '#include "mine.h"\nint x = ANSWER;\n' + TAIL
    assert compile_object(tmp_path / "a.bpf.c", text, [])


def test_users_own_headers_come_first(tmp_path: Path) -> None:
    (tmp_path / "bpf").mkdir()
    (tmp_path / "bpf/bpf_helpers.h").write_text("#error the user's own\n")
    assert "the user's own" in str(refusal("", f"-I{tmp_path}"))


def test_users_own_vmlinux_h_comes_first(tmp_path: Path) -> None:
    (tmp_path / "vmlinux.h").write_text("#error the user's own\n")
    with pytest.raises(CompileError) as caught:
        compile_object(tmp_path / "a.bpf.c", HEAD + TAIL, [])
    assert "the user's own" in str(caught.value)


def test_users_vmlinux_h_by_flag_comes_before_ours(tmp_path: Path) -> None:
    (tmp_path / "vmlinux.h").write_text("#error the user's own\n")
    assert "the user's own" in str(refusal("", f"-I{tmp_path}"))


def test_ours_come_before_those_of_the_system(tmp_path: Path) -> None:
    """As libbpf-dev's would be in /usr/include."""
    (tmp_path / "bpf").mkdir()
    (tmp_path / "bpf/bpf_helpers.h").write_text("#error the system's\n")
    assert compiled("int x;\n", f"-isystem{tmp_path}")


def test_user_space_headers_of_the_kernel() -> None:
    """<linux/bpf.h> in the place of vmlinux.h, where linux-libc-dev is installed."""
    if not Path("/usr/include/linux/bpf.h").exists():
        pytest.skip("linux-libc-dev is not installed")
    head = "#include <linux/bpf.h>\n#include <bpf/bpf_helpers.h>\n#include <bpf/bpf_endian.h>\n"
    body = 'SEC("xdp") int f(struct xdp_md *ctx) { return XDP_PASS; }\n'
    assert run_xdp(compiled(body, head=head)) == {}


def test_instruction_set_of_this_kernel() -> None:
    assert instruction_set() == "v3"  # 5.1 and newer, which is all that the tests run on
    assert "-mcpu=v3" in compiler_flags(Path("x.c"), "")


# ---- what is wrong -----------------------------------------------------------------------------


def test_error_with_its_line() -> None:
    error = refusal(
        'SEC("xdp") int f(struct xdp_md *ctx)\n{\n    return nothing_of_this_name;\n}\n'
    )
    first = (error.cause or "").splitlines()[0]
    assert first.startswith("/nowhere/test.bpf.c:5:12: error: ")
    assert "nothing_of_this_name" in first
    assert "return nothing_of_this_name;" in (error.cause or "")


def test_missing_header() -> None:
    error = refusal('#include "none_such.h"\n')
    assert "'none_such.h' file not found" in str(error)
    assert "--cflag -IFOLDER" in (error.remedy or "")


def test_warnings_are_details() -> None:
    error = refusal("static int unused_label(void) { here: return 0; }\nint x = ;\n")
    assert "error: expected expression" in (error.cause or "")
    assert "unused label" in (error.details or "")
    assert "unused label" not in (error.cause or "").splitlines()[0]


def test_loop_of_includes(tmp_path: Path) -> None:
    (tmp_path / "again.h").write_text('#include "again.h"\n')
    assert "nested too deeply" in str(refusal('#include "again.h"\n', f"-I{tmp_path}"))


def test_no_clang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HMEBPF_CLANG", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependency) as caught:
        compiled("")
    assert "there is no clang on PATH" in str(caught.value)
    for words in ("apt install clang", "dnf install clang", "HMEBPF_CLANG"):
        assert words in (caught.value.remedy or "")
    monkeypatch.setenv("HMEBPF_CLANG", "/no/such/clang")
    with pytest.raises(MissingDependency, match="HMEBPF_CLANG=/no/such/clang"):
        compiled("")


def test_clang_with_a_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("clang-11", "clang-21"):
        (tmp_path / name).symlink_to("/bin/true")
    monkeypatch.delenv("HMEBPF_CLANG", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_clang() == str(tmp_path / "clang-21")


def test_clang_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HMEBPF_CLANG", "/bin/false")
    with pytest.raises(HmebpfError) as caught:
        compiled("")
    assert "gave no reason" in str(caught.value)


# ---- whose style -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '#include "vmlinux.h"\n',
        "#include <vmlinux.h>\n",
        '  #  include "../vmlinux.h"\n',
        "#include <linux/bpf.h>\n#include <bpf/bpf_helpers.h>\n",
        '#include "bpf_helpers.h"\n',
        'SEC("xdp") int f(void *ctx) { return 2; }\n',
        '__attribute__((section("xdp"))) int f(void *ctx) { return 2; }\n',
    ],
)
def test_libbpf_style(text: str) -> None:
    assert is_libbpf_style(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "#include <uapi/linux/bpf.h>\nBPF_HASH(counts);\nint f(void *ctx) { return 0; }\n",
        '/* SEC("xdp") */\nBPF_ARRAY(x, u64, 1);\n',
        '// #include "vmlinux.h"\nTRACEPOINT_PROBE(sched, sched_switch) { return 0; }\n',
        '/*\n#include "vmlinux.h"\n*/\nint kprobe__f(void *ctx) { return 0; }\n',
    ],
)
def test_bcc_style(text: str) -> None:
    assert not is_libbpf_style(text)


def test_bundled_sources_are_bccs() -> None:
    for path in (ROOT / "bpf_c").glob("*.c"):
        assert not is_libbpf_style(path.read_text()), path


# ---- our headers -------------------------------------------------------------------------------


def test_helper_numbers_are_the_kernels() -> None:
    """Of enum bpf_func_id in this kernel's BTF; an older kernel has fewer."""
    kernel = Btf.kernel()
    found = kernel.find("BPF_FUNC_unspec", (ENUM,)) or kernel.find("bpf_func_id", (ENUM, ENUM64))
    assert found is not None
    numbers = kernel.enumerators(kernel.type(found))
    text = (HEADERS / "bpf/bpf_helper_defs.h").read_text()
    ours = {
        f"BPF_FUNC_{name}": int(number)
        for number, name in re.findall(r"___helper\((\d+), [^,]+, bpf_(\w+),", text)
    }
    assert len(ours) > 200
    known = {name: number for name, number in numbers.items() if name in ours}
    assert {name: ours[name] for name in known} == known
    left_out = {name for name in numbers if name not in ours}
    assert left_out <= {"BPF_FUNC_unspec", "__BPF_FUNC_MAX_ID"}


def test_every_header_compiles_alone_and_with_all_others() -> None:
    names = sorted(path.name for path in (HEADERS / "bpf").glob("*.h"))
    assert len(names) == 5
    together = "".join(f"#include <bpf/{name}>\n" for name in names)
    for includes in [*(f"#include <bpf/{name}>\n" for name in names), together]:
        text = f'#include "vmlinux.h"\n{includes}int x;\n'
        assert compile_object(Path("headers.c"), text, ["-Werror", "-Wsystem-headers"])


CORE = HEAD + "#include <bpf/bpf_core_read.h>\n#include <bpf/bpf_tracing.h>\n"
ALL_HELPERS = "".join(
    f"    use((void *){name});\n"
    for name in re.findall(r"bpf_\w+(?=,)", (HEADERS / "bpf/bpf_helper_defs.h").read_text())
)


def test_byte_order() -> None:
    head = HEAD + "#include <bpf/bpf_endian.h>\n"
    body = """
    __u16 a; __u32 b; __u64 c, d;
    volatile __u16 port = 0x1234;
    SEC("xdp") int f(void *ctx)
    {
        _Static_assert(bpf_htons(0x1234) == 0x3412, "constant");
        a = bpf_htons(port);
        b = bpf_ntohl(0x01020304);
        c = bpf_cpu_to_be64(0x0102030405060708ULL);
        d = bpf_le64_to_cpu(0x0102030405060708ULL);
        return XDP_PASS;
    }
    """
    seen = run_xdp(compiled(body, head=head))
    assert seen["a"] == 0x3412
    assert seen["b"] == 0x04030201
    assert seen["c"] == 0x0807060504030201
    assert seen["d"] == 0x0102030405060708


def test_formatting() -> None:
    body = """
    char text[64], empty[8];
    long length;
    SEC("xdp") int f(void *ctx)
    {
        length = BPF_SNPRINTF(text, sizeof(text), "%d %s %x %c", -5, "word", 255, 'z');
        BPF_SNPRINTF(empty, sizeof(empty), "none");
        return XDP_PASS;
    }
    """
    seen = run_xdp(compiled(body))
    assert seen["text"] == "-5 word ff z"
    assert seen["length"] == len("-5 word ff z") + 1
    assert seen["empty"] == "none"


def test_printing_any_number_of_values() -> None:
    lines = "".join(
        f'bpf_printk("{" %d" * count}"{"".join(f", {n}" for n in range(count))});\n'
        for count in range(13)
    )
    body = f'SEC("xdp") int f(void *ctx) {{\n{lines}return XDP_PASS; }}\n'
    assert run_xdp(compiled(body, "-Werror")) == {}


def test_containers_offsets_and_versions() -> None:
    body = """
    struct outer { int a; struct { int b, c; } in; };
    struct outer outer = {.a = 5};
    int a, offset, version;
    SEC("xdp") int f(void *ctx)
    {
        int *c = &outer.in.c;
        barrier_var(c);
        a = container_of(c, struct outer, in.c)->a;
        offset = offsetof(struct outer, in.c);
        version = KERNEL_VERSION(5, 10, 300);
        barrier();
        return XDP_PASS;
    }
    """
    seen = run_xdp(compiled(body))
    assert (seen["a"], seen["offset"], seen["version"]) == (5, 8, (5 << 16) + (10 << 8) + 255)


def test_constant_tail_call() -> None:
    body = """
    int reached;
    int target(struct xdp_md *ctx);
    struct {
        __uint(type, BPF_MAP_TYPE_PROG_ARRAY);
        __uint(max_entries, 2);
        __uint(key_size, 4);
        __array(values, int(void *));
    } jumps SEC(".maps") = {.values = {[1] = (void *)&target}};
    SEC("xdp") int target(struct xdp_md *ctx) { reached = 7; return XDP_PASS; }
    SEC("xdp") int enter(struct xdp_md *ctx)
    {
        bpf_tail_call_static(ctx, &jumps, 1);
        return XDP_DROP;
    }
    """
    loaded = load_object(compiled(body), "test.o", {}, {})
    try:
        assert loaded.tail_called == ("target",)
        enter = next(fd for spec, fd in loaded.programs if spec.name == "enter")
        assert enter is not None
        assert run_program(enter) == 2
    finally:
        for fd in [fd for _spec, fd in (*loaded.maps, *loaded.programs) if fd is not None]:
            os.close(fd)


def test_numeric_loops() -> None:
    if Btf.kernel().find("bpf_iter_num", (4,)) is None:
        pytest.skip("this kernel has no numeric iterators (Linux 6.4)")
    body = """
    int sum, rounds;
    SEC("xdp") int f(void *ctx)
    {
        int i;
        bpf_for(i, 2, 6)
            sum += i;
        bpf_repeat(4)
            rounds++;
        return XDP_PASS;
    }
    """
    assert run_xdp(compiled(body)) == {"sum": 2 + 3 + 4 + 5, "rounds": 4}


def test_long_ways_through_pointers() -> None:
    """Nine steps, and the same by hand."""
    body = """
    int by_macro, by_hand, into;
    long result;
    char comm[16];
    SEC("raw_tp/sched_process_exit") int f(void *ctx)
    {
        struct task_struct *task = (void *)bpf_get_current_task(), *each = task;
        by_macro = BPF_CORE_READ(task, group_leader, group_leader, group_leader, group_leader,
                                 group_leader, group_leader, group_leader, real_parent, tgid);
        bpf_core_read(&each, sizeof(each), &task->real_parent);
        bpf_core_read(&by_hand, sizeof(by_hand), &each->tgid);
        result = BPF_CORE_READ_INTO(&into, task, real_parent, tgid);
        BPF_PROBE_READ_STR_INTO(&comm, task, group_leader, comm);
        return 0;
    }
    """
    loaded = load_object(compiled(body, head=CORE), "test.o", {}, {})
    try:
        ((_spec, fd),) = loaded.programs
        assert fd is not None
        run_in_this_task(fd)
        seen = next(
            TypedMap(spec, map_fd).entries()[0][1]
            for spec, map_fd in loaded.maps
            if spec.name == ".bss"
        )
    finally:
        for fd in [fd for _spec, fd in (*loaded.maps, *loaded.programs) if fd is not None]:
            os.close(fd)
    assert seen["by_macro"] == seen["by_hand"] == seen["into"] > 0
    assert seen["result"] == 0
    assert seen["comm"] == Path("/proc/self/comm").read_text().strip()


def disassembled(data: bytes, tmp_path: Path) -> str:
    (tmp_path / "test.o").write_bytes(data)
    command = ["llvm-objdump", "-d", "--no-show-raw-insn", str(tmp_path / "test.o")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


REGISTERS = """
SEC("kprobe/x") int BPF_KPROBE(entry, long a, int b, void *c, long d, long e)
{
    return a + b + (long)c + d + e;
}
SEC("kretprobe/x") int BPF_KRETPROBE(leave, long result) { return result; }
SEC("kprobe/y") int no_macro(struct pt_regs *ctx)
{
    return PT_REGS_IP(ctx) + PT_REGS_SP(ctx) + PT_REGS_FP(ctx) + PT_REGS_PARM6(ctx);
}
SEC("ksyscall/z") int BPF_KSYSCALL(call, int fd, const char *path, long b, long c)
{
    return fd + c;
}
SEC("fentry/x") int BPF_PROG(traced, int a, struct file *file, char b, long c)
{
    return a + b + c + (long)file;
}
SEC("lsm/x") int BPF_PROG(plain) { return 0; }
"""


@pytest.mark.parametrize("machine", ["x86", "arm64"])
def test_arguments_of_functions_on_both_machines(machine: str) -> None:
    """Compiles for either, whatever this one is: for the other with its two structures declared."""
    here = {"x86_64": "x86", "aarch64": "arm64"}.get(os.uname().machine)
    head = CORE
    if machine != here:
        own = {
            "x86": "struct pt_regs { unsigned long di, si, dx, cx, r8, r9, r10, ax, sp, bp, ip; };",
            "arm64": "struct user_pt_regs { __u64 regs[31], sp, pc, pstate; };\n"
            "struct pt_regs { struct user_pt_regs user_regs; __u64 orig_x0; };",
        }[machine]
        head = (
            "typedef unsigned char __u8; typedef unsigned short __u16; typedef unsigned __u32;"
            "typedef unsigned long long __u64; typedef signed char __s8; typedef int __s32;"
            "typedef long long __s64; typedef __u16 __be16; typedef __u32 __be32, __wsum;"
            f"struct file;\n#define __VMLINUX_H__\n{own}\n" + CORE.partition("\n")[2]
        )
    other = {"x86": "arm64", "arm64": "x86"}[machine]
    flags = [f"-U__TARGET_ARCH_{other}", f"-D__TARGET_ARCH_{machine}", "-Werror"]
    assert compiled(REGISTERS, *flags, head=head)


def test_all_helpers_can_be_named() -> None:
    count = ALL_HELPERS.count("use(")
    assert count == 211
    body = f"void use(void *helper);\nstatic void use_all(void)\n{{\n{ALL_HELPERS}}}\n"
    assert compiled(body)


# ---- what compiles and cannot be loaded --------------------------------------------------------


MAP = (
    "struct { __uint(type, %s); __uint(max_entries, %s); "
    "__type(key, __u32); __type(value, __u64); }"
)
USE = "__u32 k = 0; bpf_map_lookup_elem(&m, &k); return 2; }"


@pytest.mark.parametrize(
    ("body", "error", "words", "remedy"),
    [
        ("int x;", MalformedObject, "there is no program in it", 'SEC("xdp")'),
        (
            'extern int gone(int x); SEC("xdp") int f(void *ctx) { return gone(3); }',
            MalformedObject,
            "BTF for extern 'gone'",
            "define it in the source",
        ),
        (
            'extern const int none __ksym; SEC("xdp") int f(void *ctx) { return none; }',
            Unsupported,
            "'none': not found in kernel BTF",
            "__weak",
        ),
        (
            'extern int CONFIG_NONE __kconfig; SEC("xdp") int f(void *ctx) { return CONFIG_NONE; }',
            Unsupported,
            "'CONFIG_NONE' (strong): not resolved",
            "__weak",
        ),
        (
            'static long (*h)(void) = (void *)9999; SEC("xdp") int f(void *ctx) { return h(); }',
            VerifierError,
            "this kernel has no such helper",
            "newer kernel",
        ),
        (
            f'{MAP % ("999", "4")} m SEC(".maps"); SEC("xdp") int f(void *ctx) {{ {USE}',
            Unsupported,
            "map 'm': failed to create: Invalid argument",
            "does not know it",
        ),
        (
            f'{MAP % ("2", "4000000000")} m SEC(".maps"); SEC("xdp") int f(void *ctx) {{ {USE}',
            LoadError,
            "map 'm': failed to create: ",
            "",
        ),
        (
            'struct old { int a, b, c, d; }; struct old SEC("maps") m = {1, 4, 8, 9};'
            f'SEC("xdp") int f(void *ctx) {{ {USE}',
            MalformedObject,
            "legacy map definitions in 'maps' section",
            '".maps"',
        ),
        (
            'int x; SEC("xdp") int f(void *ctx) { for (;;) x++; return 2; }',
            VerifierError,
            "infinite loop",
            "",
        ),
    ],
)
def test_errors_at_load(body: str, error: type[HmebpfError], words: str, remedy: str) -> None:
    with pytest.raises(HmebpfError) as caught:
        run_xdp(compiled(body + "\n"))
    assert type(caught.value) is error, caught.value
    assert words in str(caught.value)
    assert remedy in (caught.value.remedy or "")
    assert len(str(caught.value).splitlines()) <= 8  # the rest is in the details
