"""The header tree's parts that need no kernel: BTF that is joined, declarations, what is kept."""

from __future__ import annotations

import os
import re
import struct
import time
from pathlib import Path

import pytest

from hypermesh_ebpf.errors import HmebpfError, MissingBtf
from hypermesh_ebpf.image import bcc_tree, headers
from hypermesh_ebpf.image.bcc_tree import Taken
from hypermesh_ebpf.image.kernel_config import configuration
from hypermesh_ebpf.image.kernel_dump import dump_types, join_modules, module_btfs, read_btf
from tests.running import run_cli

INT, PTR, ARRAY, STRUCT, ENUM, TYPEDEF = 1, 2, 3, 4, 6, 8


# -- BTF of modules


class BtfWriter:
    """A BTF by hand: types as words, strings behind those of a base."""

    def __init__(self, first_string: int = 0) -> None:
        self.first_string = first_string
        self.strings = b"" if first_string else b"\0"
        self.types = b""

    def text(self, name: str) -> int:
        self.strings += name.encode() + b"\0"
        return self.first_string + len(self.strings) - len(name) - 1

    def add(self, name: str, kind: int, size: int, *words: int, members: int = 0) -> None:
        head = (self.text(name) if name else 0, kind << 24 | members, size)
        self.types += struct.pack(f"={3 + len(words)}I", *head, *words)

    def done(self) -> bytes:
        sizes = (0, len(self.types), len(self.types), len(self.strings))
        return struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, *sizes) + self.types + self.strings


def make_base() -> tuple[bytes, int]:
    """int (1) and struct base { int value; } (2); and the length of its strings."""
    base = BtfWriter()
    base.add("int", INT, 4, 1 << 24 | 32)
    base.add("base", STRUCT, 4, base.text("value"), 1, 0, members=1)
    return base.done(), len(base.strings)


def make_module(first_string: int, name: str) -> bytes:
    """struct NAME { struct base own; int many[3]; enum NAME_state *state; } over the base."""
    module = BtfWriter(first_string)
    module.add("", ARRAY, 0, 1, 1, 3)  # 3
    module.add(f"{name}_state", ENUM, 4, module.text(f"{name.upper()}_ON"), 7, members=1)  # 4
    module.add("", PTR, 4)  # 5
    members = (module.text("own"), 2, 0, module.text("many"), 3, 32, module.text("state"), 5, 128)
    module.add(name, STRUCT, 24, *members, members=3)  # 6
    module.add(f"{name}_t", TYPEDEF, 6)  # 7
    return module.done()


def test_types_of_modules_are_joined_to_the_kernels() -> None:
    base, strings = make_base()
    modules = [make_module(strings, name) for name in ("first", "second")]
    types = dump_types(join_modules(base, modules), "test")
    assert types.count("struct base {") == 1
    for name in ("first", "second"):
        wanted = (
            f"struct {name} {{\n\tstruct base own;\n\tint many[3];\n"
            f"\tenum {name}_state *state;\n}};"
        )
        assert wanted in types
        assert f"enum {name}_state {{\n\t{name.upper()}_ON = 7,\n}};" in types
        assert f"typedef struct {name} {name}_t;" in types


def test_joining_nothing_changes_nothing() -> None:
    base, _strings = make_base()
    assert dump_types(join_modules(base, []), "test") == dump_types(base, "test")


def test_only_the_running_kernel_has_modules(tmp_path: Path) -> None:
    (tmp_path / "vmlinux").touch()
    (tmp_path / "ext4").touch()
    assert module_btfs(str(tmp_path / "vmlinux")) == []


def test_btf_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(
        MissingBtf, match=r"missing: No such file or directory \(ENOENT\)"
    ) as caught:
        read_btf(str(tmp_path / "missing"))
    assert "HMEBPF_BTF=FILE" in str(caught.value.remedy)
    other = tmp_path / "other"
    other.write_bytes(b"no type information" * 100)
    with pytest.raises(MissingBtf, match="other: this is no BTF, or a damaged one"):
        dump_types(other.read_bytes(), str(other))


# -- declarations

TYPES = """
typedef unsigned int u32;

struct task_struct;

enum bpf_map_type {
	BPF_MAP_TYPE_UNSPEC = 0,
	BPF_MAP_TYPE_NEWER = 34,
};

enum {
	TASK_COMM_LEN = 16,
};

typedef enum {
	OURS_ALL = 0,
} ours_t;

typedef int (*filler_t)(void *, struct page *);

typedef void callback_t(int);

struct inside_of_public {
	int x;
};

struct nameidata {
	struct inside_of_public a;
};

struct sock_common {
	struct inside_of_public part;
	enum skc_state {
		A,
	} state;
	struct nameidata *pointer;
};

struct xdp_md {
	u32 data;
};

typedef struct {
	void (*in)(int);
} atomic_t;
"""
NOTHING: frozenset[str] = frozenset()


def test_declarations_are_told_apart() -> None:
    found = {each.typedef or each.tag or each.text: each for each in bcc_tree.split(TYPES)}
    assert "".join(each.text for each in found.values()) == re.sub(r"\n+", "\n", TYPES).lstrip()
    assert found["u32"].kind == ""
    assert found["bpf_map_type"].enumerators == ("BPF_MAP_TYPE_UNSPEC", "BPF_MAP_TYPE_NEWER")
    assert (found["ours_t"].kind, found["ours_t"].enumerators) == ("enum", ("OURS_ALL",))
    assert {"filler_t", "atomic_t", "sock_common"} <= found.keys()
    assert found["atomic_t"].kind == "struct"


def test_private_types_are_kept_apart_unless_a_public_one_is_made_of_them() -> None:
    public, private = bcc_tree.private_apart(bcc_tree.split(TYPES))
    assert [each.tag for each in private if each.tag] == ["nameidata"]
    assert {"inside_of_public", "sock_common", "xdp_md"} <= {each.tag for each in public}


def left(text: str, tags: set[str], ordinary: set[str]) -> str:
    (declaration,) = bcc_tree.split(text)
    return bcc_tree.without(declaration, Taken(frozenset(tags), frozenset(ordinary), NOTHING))


def test_what_bcc_has_is_left_out() -> None:
    some = "enum bpf_map_type {\n\tOLD = 0,\n\tNEW = 34,\n};\n"
    assert left("struct xdp_md {\n\tint x;\n};\n", {"xdp_md"}, set()) == ""
    assert left("typedef unsigned int __u32;\n", set(), {"__u32"}) == ""
    assert left(some, {"bpf_map_type"}, {"OLD"}) == "enum {\n\tNEW = 34,\n};\n"
    assert left(some, set(), {"OLD"}) == "enum bpf_map_type {\n\tNEW = 34,\n};\n"
    assert left(some, {"bpf_map_type"}, {"OLD", "NEW"}) == ""
    # A structure has a member of this type: it must not be gone.
    assert left(some, set(), {"OLD", "NEW"}).startswith("enum bpf_map_type {\n\thmebpf_")
    assert (
        left("struct sock {\n\tint x;\n};\n", {"xdp_md"}, {"OLD"})
        == "struct sock {\n\tint x;\n};\n"
    )


def test_an_enumerator_of_the_kernel_replaces_our_constant() -> None:
    enum = "enum {\n\tTASK_COMM_LEN = 32,\n\t__REQ_SYNC = 11,\n};\n"
    macros = bcc_tree.macros(bcc_tree.split(enum))
    assert "#define TASK_COMM_LEN" in bcc_tree.macros([])
    assert "#define TASK_COMM_LEN" not in macros
    assert "#define REQ_SYNC (1ULL << __REQ_SYNC)\n" in macros


def test_macros_are_defined_once() -> None:
    names = re.findall(r"^#define (\w+)", bcc_tree.macros([]), re.M)
    repeated = {name for name in names if names.count(name) > 1}
    assert not [name for name in repeated if not _in_branches(name)]


def _in_branches(name: str) -> bool:
    """True where each definition is in another branch of the same #if."""
    between = re.split(rf"^#define {name}\b", bcc_tree.macros([]), flags=re.M)[1:-1]
    return all(re.search(r"^#el(se|if)", text, re.M) for text in between)


@pytest.mark.parametrize(
    ("release", "version"),
    [
        ("6.18.44-fc-v669", (6, 18, 44)),
        ("6.12.117+deb13-amd64", (6, 12, 117)),
        ("7.3", (7, 3, 0)),
        ("5.10.0-46-amd64", (5, 10, 0)),
    ],
)
def test_version_of_another_kernel(release: str, version: tuple[int, int, int]) -> None:
    assert headers.kernel_version(release) == version


def test_debian_tells_the_patch_level_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    build = "#1 SMP PREEMPT_DYNAMIC Debian 6.1.192-2 (2026-11-02)"
    monkeypatch.setattr("platform.release", lambda: "6.1.0-56-amd64")
    monkeypatch.setattr("platform.version", lambda: build)
    assert headers.kernel_version("6.1.0-56-amd64") == (6, 1, 192)


def test_configuration_is_told_by_the_kernels_types() -> None:
    types = "struct net {\n\tint user_ns;\n};\nstruct kmem_cache_cpu {\n\tint x;\n};\n"
    text = configuration("0.0-no-such-kernel", bcc_tree.by_tag(bcc_tree.split(types)))
    defined = set(re.findall(r"#define CONFIG_(\w+) 1\n", text))
    assert {"NET_NS", "SLUB", "NET"} <= defined
    assert not {"IPV6", "NUMA"} & defined


# -- what is kept


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/hmebpf/headers"


@pytest.fixture
def btf(tmp_path: Path) -> str:
    file = tmp_path / "some.btf"
    file.write_bytes(make_base()[0])
    return str(file)


def made(path: Path) -> int:
    """Tells one making of a file from another."""
    return path.stat().st_ino


def test_kept_header_is_used_again(btf: str, store: Path) -> None:
    first = headers.vmlinux_header(btf)
    assert "struct base {" in first.read_text()
    assert "preserve_access_index" in first.read_text()
    assert first.parent.parent == store
    assert [path.stat().st_mode & 0o777 for path in (store, store.parent)] == [0o700, 0o700]
    inode = made(first)
    assert headers.vmlinux_header(btf) == first
    assert made(first) == inode
    assert headers.vmlinux_header(btf, fresh=True) == first
    assert made(first) != inode
    assert [path.name for path in store.iterdir()] == [first.parent.name], "nothing else is left"


def test_another_kernel_has_another_header(btf: str, tmp_path: Path) -> None:
    other = tmp_path / "other.btf"
    base, strings = make_base()
    other.write_bytes(join_modules(base, [make_module(strings, "more")]))
    assert headers.vmlinux_header(btf) != headers.vmlinux_header(str(other))


@pytest.mark.parametrize("damage", ["cut", "changed", "lost", "no manifest", "a file", "more"])
def test_damaged_header_is_made_anew(damage: str, btf: str) -> None:
    path = headers.vmlinux_header(btf)
    text = path.read_text()
    if damage == "cut":
        path.write_text(text[:20])
    elif damage == "changed":
        path.write_text(text.replace("base", "evil"))
    elif damage == "lost":
        path.unlink()
    elif damage == "no manifest":
        (path.parent / "MANIFEST").unlink()
    elif damage == "a file":
        (path.parent / "MANIFEST").unlink()
        path.unlink()
        path.parent.rmdir()
        path.parent.touch()
    else:
        (path.parent / "asm.h").write_text("#error")
    assert headers.vmlinux_header(btf) == path
    assert path.read_text() == text
    assert sorted(os.listdir(path.parent)) == ["MANIFEST", "vmlinux.h"]


def test_what_a_killed_process_left_is_removed(btf: str, store: Path) -> None:
    path = headers.vmlinux_header(btf)
    old, new = store / ".123-vmlinux", store / ".124-vmlinux"
    for folder in (old, new):
        folder.mkdir()
        (folder / "vmlinux.h").touch()
    os.utime(old, (time.time() - 9000, time.time() - 9000))
    headers.vmlinux_header(btf, fresh=True)
    assert sorted(os.listdir(store)) == [new.name, path.parent.name]


def test_only_the_last_used_are_kept(tmp_path: Path, store: Path) -> None:
    base, strings = make_base()
    paths = []
    for number in range(6):
        file = tmp_path / f"{number}.btf"
        file.write_bytes(join_modules(base, [make_module(strings, f"module{number}")]))
        paths.append(headers.vmlinux_header(str(file)))
        os.utime(paths[-1].parent, (number, number))
    assert [path.exists() for path in paths] == [False, False, True, True, True, True]


@pytest.mark.parametrize("which", ["store", "above", "far above"])
def test_directory_that_others_may_write_is_refused(which: str, btf: str, store: Path) -> None:
    headers.vmlinux_header(btf)
    folder = {"store": store, "above": store.parent, "far above": store.parent.parent}[which]
    folder.chmod(0o777)
    with pytest.raises(HmebpfError, match=f"{folder}: others may write it") as caught:
        headers.vmlinux_header(btf)
    assert "XDG_CACHE_HOME" in str(caught.value.remedy)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")
@pytest.mark.parametrize("which", ["store", "far above"])
def test_directory_of_another_user_is_refused(which: str, btf: str, store: Path) -> None:
    headers.vmlinux_header(btf)
    folder = store if which == "store" else store.parent.parent
    os.chown(folder, 12345, -1)
    with pytest.raises(HmebpfError, match=f"{folder}: belongs to uid 12345, not to us"):
        headers.vmlinux_header(btf)


def test_cache_that_cannot_be_made(btf: str, store: Path) -> None:
    store.parent.parent.write_text("a file is in the way")
    with pytest.raises(HmebpfError, match=r"keep the kernel headers: .*: "):
        headers.vmlinux_header(btf)


def test_place_of_ones_own_must_be_free(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "some.h").touch()

    place = tmp_path / "place"
    assert headers.place_at(place, make) == place
    assert os.listdir(place) == ["some.h"]
    with pytest.raises(HmebpfError, match="Directory not empty") as caught:
        headers.place_at(place, make)
    assert "does not exist yet" in str(caught.value.remedy)
    with pytest.raises(HmebpfError, match="No such file or directory"):
        headers.place_at(tmp_path / "no/such/folder", make)
    assert sorted(os.listdir(tmp_path)) == ["place"], "nothing half-made is left"


# -- the command line


def test_options_that_do_not_go_together() -> None:
    for words, cause in (
        (["--btf", "x"], "--btf and --release belong together"),
        (["--release", "6.1"], "--btf and --release belong together"),
        (["--vmlinux", "-o", "x"], "--vmlinux goes with --fresh alone"),
    ):
        done = run_cli("headers", *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert cause in done.stderr


def test_kernel_without_btf(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    done = run_cli("headers", extra_env={"HMEBPF_BTF": missing})
    assert (done.returncode, done.stdout) == (3, "")
    assert f"{missing}: No such file or directory" in done.stderr
    assert "hint: use a kernel built with CONFIG_DEBUG_INFO_BTF=y" in done.stderr
