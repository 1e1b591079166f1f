"""C in, programs in the kernel out: what BCC makes of a text, and the errors on the way."""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hypermesh_ebpf import monitors
from hypermesh_ebpf.bpf import maps
from hypermesh_ebpf.bpf.libbpf import check, libbpf
from hypermesh_ebpf.bpf.programs import read_program_info
from hypermesh_ebpf.bpf.spec import ProgramSpec
from hypermesh_ebpf.errors import CompileError, LoadError, VerifierError
from hypermesh_ebpf.image.bcc import find_map_refs
from hypermesh_ebpf.image.image import Image
from tests.compiler import ROOT, compile_text, loaded, run_program
from tests.programs import program_id

SHAPES = """
struct inner { u8 x; u32 y; };
struct padded { u8 a; u32 b; u16 c; };
struct arrays { u8 mac[6]; char text[5]; u16 words[3]; s8 signs[2]; };
struct outer { u8 a; struct inner in; struct inner more[2]; u8 b; };
struct anonymous { u8 a; struct { u8 b; u32 c; }; u16 d; };
struct with_union { u16 family; union { u32 v4; u64 v6[2]; } u; bool flag; };
struct packed { u8 a; u32 b; } __attribute__((packed));
struct bits { u32 a:3; u32 b:29; u8 c; };
struct matrix { u32 m[2][2]; u8 c; };
enum color { RED, GREEN, BLUE = 77 };
struct others { enum color color; void *pointer; s64 negative; __be16 port; };
typedef u64 pair_t[2];

BPF_ARRAY(padded, struct padded, 1);
BPF_ARRAY(arrays, struct arrays, 1);
BPF_ARRAY(outer, struct outer, 1);
BPF_ARRAY(anonymous, struct anonymous, 1);
BPF_ARRAY(with_union, struct with_union, 1);
BPF_ARRAY(packed, struct packed, 1);
BPF_ARRAY(bits, struct bits, 1);
BPF_ARRAY(matrix, struct matrix, 1);
BPF_ARRAY(others, struct others, 1);
BPF_ARRAY(pair, pair_t, 1);
BPF_PERCPU_ARRAY(sums, struct padded, 1);
BPF_TABLE("percpu_hash", struct padded, u16, by_shape, 8);
BPF_RINGBUF_OUTPUT(ring, 1);
BPF_STACK_TRACE(stacks, 1000);

/* The compiler, not the decoder, decides where the members are. */
int fill(struct xdp_md *ctx)
{
	u32 zero = 0;
	struct padded *p = padded.lookup(&zero);
	struct arrays *a = arrays.lookup(&zero);
	struct outer *o = outer.lookup(&zero);
	struct anonymous *n = anonymous.lookup(&zero);
	struct with_union *w = with_union.lookup(&zero);
	struct packed *k = packed.lookup(&zero);
	struct bits *b = bits.lookup(&zero);
	struct matrix *m = matrix.lookup(&zero);
	struct others *t = others.lookup(&zero);
	u64 *two = (u64 *)pair.lookup(&zero);
	struct padded *s = sums.lookup(&zero);
	if (!p || !a || !o || !n || !w || !k || !b || !m || !t || !two || !s)
		return XDP_ABORTED;
	p->a = 1; p->b = 2; p->c = 3;
	a->mac[0] = 4; a->mac[5] = 250; a->text[0] = 'h'; a->text[1] = 'i';
	a->words[0] = 5; a->words[2] = 60000; a->signs[1] = -6;
	o->a = 7; o->in.x = 8; o->in.y = 9; o->b = 14;
	o->more[0].x = 10; o->more[0].y = 11; o->more[1].x = 12; o->more[1].y = 13;
	n->a = 15; n->b = 16; n->c = 17; n->d = 18;
	w->family = 19; w->u.v4 = 20; w->flag = true;
	k->a = 21; k->b = 22;
	b->a = 1; b->c = 23;
	m->m[1][0] = 24; m->c = 25;
	t->color = BLUE; t->pointer = (void *)26; t->negative = -27; t->port = from_be16(443);
	two[0] = 28; two[1] = 29;
	s->a++; s->b += 2; s->c += 3;
	struct padded key = {};
	key.a = 30; key.b = 31; key.c = 32;
	u16 none = 0, *seen = by_shape.lookup_or_try_init(&key, &none);
	if (seen)
		(*seen)++;
	return XDP_PASS;
}

int other(struct xdp_md *ctx) { return XDP_DROP; }
"""


@pytest.fixture(scope="module")
def shapes() -> Image:
    return compile_text('#include "hmebpf.h"\n' + SHAPES)


@pytest.mark.vm_too
def test_values_are_decoded_as_clang_laid_them_out(shapes: Image) -> None:
    with loaded(shapes) as programs:
        for _ in range(5):
            assert run_program(programs.programs["fill"]) == 2
        assert run_program(programs.programs["other"]) == 1
        names = [name for name in programs.maps if name not in ("ring", "stacks")]
        found = {name: programs.maps[name].items() for name in names}
    ((key, seen),) = found.pop("by_shape")
    assert (key.a, key.b, key.c, seen) == (30, 31, 32, 5)
    values = {name: value for name, ((_zero, value),) in found.items()}
    assert values.pop("bits")[4] == 23, "bytes: what they mean is not told"
    assert values.pop("matrix")[16] == 25
    assert values.pop("pair") == (28, 29)
    assert {name: value._asdict() for name, value in values.items()} == {
        "padded": {"a": 1, "b": 2, "c": 3},
        "sums": {"a": 5, "b": 10, "c": 15},
        "arrays": {
            "mac": (4, 0, 0, 0, 0, 250),
            "text": b"hi\0\0\0",
            "words": (5, 0, 60000),
            "signs": (0, -6),
        },
        "outer": {
            "a": 7,
            "in_x": 8,
            "in_y": 9,
            "more_0_x": 10,
            "more_0_y": 11,
            "more_1_x": 12,
            "more_1_y": 13,
            "b": 14,
        },
        "anonymous": {"a": 15, "b": 16, "c": 17, "d": 18},
        "with_union": {"family": 19, "u": (20).to_bytes(16, "little"), "flag": True},
        "packed": {"a": 21, "b": 22},
        "others": {"color": 77, "pointer": 26, "negative": -27, "port": 443 << 8 & 0xFF00 | 1},
    }


def test_image_names_everything(shapes: Image) -> None:
    assert {program.name for program in shapes.programs} == {"fill", "other"}
    assert shapes.license == "GPL"
    by_name = {spec.name: spec for spec in shapes.maps}
    assert by_name["ring"].type == maps.RINGBUF
    assert by_name["ring"].max_entries == os.sysconf("SC_PAGE_SIZE")
    assert by_name["by_shape"].max_entries == 8
    assert by_name["stacks"].max_entries == 1024, "rounded up to a power of two"


def test_image_survives_being_kept(shapes: Image) -> None:
    again = Image.from_bytes(shapes.to_bytes())
    assert again == shapes
    with loaded(again) as programs:
        assert run_program(programs.programs["fill"]) == 2


def test_map_references_skip_the_second_half_of_an_instruction() -> None:
    """A 64-bit constant takes two slots; what the second one looks like means nothing."""
    lookalike = b"\x18\x11\0\0\x07\0\0\0" * 2  # ld_imm64 of map descriptor 7, twice a half
    constant = b"\x18\x01\0\0\x07\0\0\0" + b"\x18\x11\0\0\x07\0\0\0"  # of the plain number 7
    end = b"\x95\0\0\0\0\0\0\0"
    assert find_map_refs(constant + lookalike + end, {7: 3}) == ((16, 3),)


@pytest.mark.parametrize(
    ("text", "telling", "line"),
    [
        ("int f(void *ctx) { return 0 }", "expected ';'", 1),
        ("int f(void *ctx)\n{\n\treturn nothing;\n}", "use of undeclared identifier 'nothing'", 3),
        ('#include "no_such.h"\nint f(void *ctx) { return 0; }', "'no_such.h' file not found", 1),
        ("BPF_HASH(seen);\nint f(void *c) { u64 k; seen.no_such(&k); return 0; }", "no_such", 2),
        ("#error not this way", "not this way", 1),
    ],
    ids=["syntax", "unknown name", "missing header", "unknown method", "refuses"],
)  # fmt: skip
def test_compile_error_names_file_line_and_cause(text: str, telling: str, line: int) -> None:
    with pytest.raises(CompileError) as caught:
        compile_text(text)
    error = caught.value
    assert error.what == "compile test.c"
    assert error.cause is not None and error.details is not None and error.remedy
    first = error.cause.splitlines()[0]
    assert first.startswith(f"test.c:{line}:")
    assert telling in first
    assert first in error.details
    assert "/virtual/main.c" not in error.details


def test_long_compile_error_is_cut_and_counted() -> None:
    text = "".join(f"int f{n}(void *ctx) {{ return nothing{n}; }}\n" for n in range(15))
    with pytest.raises(CompileError) as caught:
        compile_text(text)
    error = caught.value
    assert error.cause is not None and error.details is not None
    shown = error.cause.splitlines()
    said = error.details.splitlines()
    assert len(shown) < 8
    assert "nothing0" in shown[0]
    assert "nothing1" not in error.cause, "one error is enough"
    assert said[-1] == "15 errors generated."
    omitted = len(said) - 1 - (len(shown) - 1)
    assert shown[-1] == f"  ({omitted} more lines; see them with -v)"
    assert "nothing14" in error.details


def test_map_that_the_kernel_refuses_is_not_the_compilers_error() -> None:
    text = "BPF_HASH(vast, u32, u64, 1 << 31);\nint f(void *ctx) { return 0; }"
    with pytest.raises(CompileError, match=r"could not open bpf map: vast, error: ") as caught:
        compile_text(text)
    assert "at the line" not in str(caught.value.remedy), "there is none"


UNCHECKED = """
int f(struct xdp_md *ctx)
{
	u8 *data = (u8 *)(long)ctx->data;
	int sum = 0;
#pragma unroll
	for (int i = 0; i < 30; i++)
		sum += i;
	return sum + data[5];
}
"""


@pytest.mark.vm_too
def test_verifier_error_shows_the_telling_end() -> None:
    with pytest.raises(VerifierError) as caught, loaded(compile_text(UNCHECKED)):
        pass
    error = caught.value
    assert error.what == "load program f: refused by the kernel's verifier"
    assert error.cause is not None and error.details is not None and error.remedy
    assert "invalid access to packet" in error.cause
    shown, said = error.cause.splitlines(), error.details.splitlines()
    assert len(shown) <= 6
    assert "processed" not in error.cause
    if len(said) > len(shown):
        omitted = len(said) - len(shown) + 1
        assert shown[-1] == f"  ({omitted} lines of the verifier's log omitted; see them with -v)"
    assert "processed" in error.details, "the whole log is there"


@pytest.mark.skipif(not shutil.which("bpftool"), reason="needs bpftool")
def test_what_the_kernel_says_of_a_program_is_what_bpftool_says(shapes: Image) -> None:
    statistics = check(libbpf().bpf_enable_stats(0))  # BPF_STATS_RUN_TIME, while this is open
    try:
        with loaded(shapes) as programs:
            fd = programs.programs["fill"]
            run_program(fd, repeat=211)
            info = read_program_info(fd)
            argv = ["bpftool", "-j", "prog", "show", "id", str(program_id(fd))]
            listed = json.loads(subprocess.run(argv, capture_output=True, check=True).stdout)
    finally:
        os.close(statistics)
    assert (info.id, info.tag) == (listed["id"], listed["tag"])
    assert info.run_count == 211
    assert (info.run_count, info.run_time_ns) == (listed["run_cnt"], listed["run_time_ns"])
    assert info.missed in (0, None)


def test_headers_come_from_the_project_alone() -> None:
    """No kernel header is used, installed or not: the C library's and the kernel's are not seen."""
    for header in ("linux/if_ether.h", "linux/sched.h", "stdio.h"):
        with pytest.raises(CompileError, match="file not found"):
            compile_text(f"#include <{header}>\nint f(void *ctx) {{ return 0; }}")


def test_program_with_too_many_instructions_is_an_error(shapes: Image) -> None:
    program = replace(shapes.program("other"), instructions=b"\xb7\0\0\0\0\0\0\0" * (1 << 20))
    with pytest.raises((LoadError, VerifierError), match="load program other"), loaded(
        replace(shapes, programs=(program,))
    ):  # fmt: skip
        pass


# Every image of a monitor that some options and rung ask for: the programs in it, as JSON lines.
BUILD_ALL = """
import json, sys
from hypermesh_ebpf import monitors
from hypermesh_ebpf.image.source import build_image, bundled_directory
from tests.unit.test_declarations import every_choice

monitor, built = monitors.load(sys.argv[1]), {}
choices = list(every_choice(monitor))
if "pid" in choices[0]:
    choices += [{**options, "pid": 0} for options in choices]
for options in choices:
    for rung in monitor.rungs:
        defines = {**monitor.defines(options), **rung.defines}
        key = json.dumps([sorted(defines.items()), rung.needs_btf])
        if key not in built:
            path = bundled_directory() / monitor.source
            built[key] = build_image(path, defines, needs_btf=rung.needs_btf, use_cache=False).image
        image = built[key]
        wanted = sorted({hook.program for hook in rung.hooks})
        settings = monitor.settings(options)
        maps = {spec.name: spec.value_size for spec in image.maps}
        print(json.dumps({
            "rung": rung.name,
            "missing": [name for name in wanted if name not in {p.name for p in image.programs}],
            "unused": [p.name for p in image.programs if p.name not in wanted],
            "settings": [maps.get("settings"), settings and len(settings)],
        }))
"""


@pytest.mark.skipif(not os.path.exists("/sys/kernel/btf/vmlinux"), reason="this kernel has no BTF")
@pytest.mark.parametrize("name", monitors.names())
def test_every_rung_of_a_monitor_compiles_and_has_its_programs(name: str) -> None:
    """Those that this kernel cannot attach, too: they must not fail on another one."""
    done = subprocess.run(
        [sys.executable, "-c", BUILD_ALL, name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        found = json.loads(line)
        assert found["missing"] == [], f"rung {found['rung']}"
        assert found["unused"] == [], f"rung {found['rung']}"
        assert found["settings"][0] == found["settings"][1], "the C structure and its packing"
    assert len(done.stdout.splitlines()) >= len(monitors.load(name).rungs)


def test_compiling_does_not_read_the_symbols_of_the_kernel() -> None:
    """BCC does by itself: all 200,000 of them, 0.15 s of each compilation."""
    libc = ctypes.CDLL(None, use_errno=True)
    watch = check(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    try:
        check(libc.inotify_add_watch(watch, b"/proc/kallsyms", _IN_OPEN))
        (program,) = compile_text(READS_MEMORY).programs
        assert not select.select([watch], [], [], 0)[0]
        with open("/proc/kallsyms"):
            assert select.select([watch], [], [], 0)[0], "it would have been seen"
    finally:
        os.close(watch)
    # BCC puts bpf_probe_read() in the place of helpers that it takes for unknown to the kernel.
    found = [number for op, _registers, _offset, number in instructions(program) if op == _CALL]
    assert found == [_PROBE_READ_USER, _PROBE_READ_KERNEL]
    assert len(Path("/proc/kallsyms").read_text().splitlines()) > 1000, "nobody else's changed"


def instructions(program: ProgramSpec) -> list[tuple[int, int, int, int]]:
    """struct bpf_insn's members: opcode, registers, offset, immediate."""
    return list(struct.iter_unpack("=BBhi", program.instructions))


_CALL = 0x85
_PROBE_READ_USER, _PROBE_READ_KERNEL = 112, 113  # enum bpf_func_id
_IN_OPEN = 0x20  # include/uapi/linux/inotify.h
READS_MEMORY = """
int read_it(struct bpf_raw_tracepoint_args *ctx)
{
	u64 word = 0;
	bpf_probe_read_user(&word, sizeof(word), (void *)ctx->args[0]);
	bpf_probe_read_kernel(&word, sizeof(word), (void *)ctx->args[1]);
	return word;
}
"""
