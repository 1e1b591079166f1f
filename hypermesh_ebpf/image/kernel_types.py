"""The kernel structures that a C text uses, written as C from the running kernel's BTF.

A program that says ``task->real_parent`` needs two members of a structure of 200; the whole
closure of ``task_struct`` would cost clang 100 ms and clash with the types in BCC's own headers.
So only the members that the text names are declared, each at the offset that BTF gives::

    struct task_struct { union {
      struct { char before_0[2304]; struct task_struct *real_parent; } __attribute__((packed));
      char size_[9728]; }; };

Types are found by name (``struct file``), then followed through the members named in the text to a
fixpoint, so that ``file->f_path.dentry`` brings ``struct path`` and ``struct dentry`` along.
BTF: https://docs.kernel.org/bpf/btf.html
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from hypermesh_ebpf.bpf.btf import ARRAY, ENUM, ENUM64, INT, PTR, STRUCT, UNION, Btf, BtfMember
from hypermesh_ebpf.errors import CompileError

_SIGNED = 1  # BTF_INT_SIGNED

# Comments, strings and characters: what they name is not used.
_NO_CODE = re.compile(r"""/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""", re.S)
_WORD = re.compile(r"[A-Za-z_]\w*")
_AGGREGATE = re.compile(r"\b(struct|union)\s+(\w+)")
_DEFINITION = re.compile(r"\b(?:struct|union)\s+(\w+)\s*\{")

# What BCC's copy of uapi/linux/bpf.h defines (0.26): a second definition would clash.
_IN_BCCS_BPF_H = frozenset(
    {
        "__sk_buff",
        "bpf_attr",
        "bpf_btf_info",
        "bpf_cgroup_dev_ctx",
        "bpf_cgroup_storage_key",
        "bpf_core_relo",
        "bpf_cpumap_val",
        "bpf_devmap_val",
        "bpf_dynptr",
        "bpf_fib_lookup",
        "bpf_flow_keys",
        "bpf_func_info",
        "bpf_insn",
        "bpf_iter_link_info",
        "bpf_line_info",
        "bpf_link_info",
        "bpf_list_head",
        "bpf_list_node",
        "bpf_map_info",
        "bpf_perf_event_data",
        "bpf_perf_event_value",
        "bpf_pidns_info",
        "bpf_prog_info",
        "bpf_raw_tracepoint_args",
        "bpf_redir_neigh",
        "bpf_sk_lookup",
        "bpf_sock",
        "bpf_sock_addr",
        "bpf_sock_ops",
        "bpf_sock_tuple",
        "bpf_sockopt",
        "bpf_spin_lock",
        "bpf_stack_build_id",
        "bpf_sysctl",
        "bpf_tcp_sock",
        "bpf_timer",
        "bpf_tunnel_key",
        "bpf_xdp_sock",
        "bpf_xfrm_state",
        "btf_ptr",
        "sk_msg_md",
        "sk_reuseport_md",
        "xdp_md",
    }
)


class KernelTypes:
    """The BTF of a kernel, open for look-ups; a context manager.

    Raises MissingBtf when ``path`` cannot be read or parsed.
    """

    def __init__(self, path: str) -> None:
        self._btf = Btf.open(path)

    def __enter__(self) -> KernelTypes:
        return self

    def __exit__(self, *exc: object) -> None:
        del self._btf

    def declare(self, text: str, headers: str = "", *, lenient: bool = False) -> str:
        """C declarations of the kernel structures that ``text`` uses, and no others.

        What ``headers``, the text's own, define is left to them.  Raises CompileError for a
        structure that neither the text nor this kernel defines; ``lenient`` leaves it to clang.
        """
        text = _NO_CODE.sub(" ", text)
        words = set(_WORD.findall(text))
        own = set(_DEFINITION.findall(text + headers)) | _IN_BCCS_BPF_H
        wanted = {(kind, name) for kind, name in _AGGREGATE.findall(text) if name not in own}
        if lenient:
            wanted = {each for each in wanted if self._has(*each)}
        ids = self._reach([self._find(kind, name) for kind, name in sorted(wanted)], words)
        named = {i: self._btf.type(i).name for i in ids if self._btf.type(i).name}
        forward = "".join(f"{self._keyword(i)} {name};\n" for i, name in named.items())
        return forward + "".join(self._define(i, named, words) for i in self._ordered(named, words))

    def _look_up(self, kind: str, name: str) -> int | None:
        return self._btf.find(name, (STRUCT if kind == "struct" else UNION,))

    def _has(self, kind: str, name: str) -> bool:
        return self._look_up(kind, name) is not None

    def _find(self, kind: str, name: str) -> int:
        found = self._look_up(kind, name)
        if found is None:
            raise CompileError(
                f"find {kind} {name}",
                f"this kernel's BTF has no {kind} of that name, and the source does not define it",
                "define it in the source, or check the name with "
                "`bpftool btf dump file /sys/kernel/btf/vmlinux format c`",
            )
        return found

    def _members(self, type_id: int, base: int = 0) -> Iterator[BtfMember]:
        """All named members; those of anonymous structures and unions at their place."""
        for member in self._btf.members(self._btf.type(type_id)):
            place = base + member.bit_offset
            if member.name:
                yield BtfMember(member.name, member.type, place, member.bit_size)
            elif self._btf.type(member.type).kind in (STRUCT, UNION):
                yield from self._members(member.type, place)

    def _element(self, type_id: int) -> int:
        """The id behind typedefs, qualifiers and arrays."""
        while (this := self._btf.type(type_id := self._btf.resolve(type_id))).kind == ARRAY:
            type_id = self._btf.array(this)[0]
        return type_id

    def _aggregate(self, type_id: int) -> int | None:
        """The structure or union that a type is, points to, or is an array of; else None."""
        type_id = self._element(type_id)
        this = self._btf.type(type_id)
        if this.kind == PTR:
            type_id = self._btf.resolve(this.size)
        return type_id if self._btf.type(type_id).kind in (STRUCT, UNION) else None

    def _reach(self, todo: list[int], words: set[str]) -> list[int]:
        """All ids reached from ``todo`` through members that the text names."""
        found: dict[int, None] = {}
        while todo:
            type_id = todo.pop(0)
            if type_id in found:
                continue
            found[type_id] = None
            for member in self._members(type_id):
                if member.name in words and (target := self._aggregate(member.type)):
                    todo.append(target)
        return list(found)

    def _ordered(self, named: dict[int, str], words: set[str]) -> list[int]:
        """The named types, embedded ones before those that hold them."""
        order: dict[int, None] = {}

        def visit(type_id: int) -> None:
            if type_id in order:
                return
            for member in self._members(type_id):
                inner = self._element(member.type)
                if member.name in words and inner in named and inner != type_id:
                    visit(inner)
            order[type_id] = None

        for type_id in named:
            visit(type_id)
        return list(order)

    def _keyword(self, type_id: int) -> str:
        return "union" if self._btf.type(type_id).kind == UNION else "struct"

    def _define(self, type_id: int, named: dict[int, str], words: set[str]) -> str:
        """One structure: a union of its wanted members, each behind its own padding."""
        lines: list[str] = []
        for member in self._members(type_id):
            if member.name not in words or member.bit_size or member.bit_offset % 8:
                continue
            declaration = self._declare_member(member, named)
            if declaration is None:
                continue
            offset = member.bit_offset // 8
            padding = f"char before_{len(lines)}[{offset}]; " if offset else ""
            lines.append(f"  struct {{ {padding}{declaration}; }} __attribute__((packed));\n")
        size = f"  char size_[{self._btf.type(type_id).size}];\n"
        keyword, name = self._keyword(type_id), named[type_id]
        return f"{keyword} {name} {{ union {{\n{''.join(lines)}{size}}}; }};\n"

    def _declare_member(self, member: BtfMember, named: dict[int, str]) -> str | None:
        """``type name`` of a member; None for an unnamed inner type, which no text can use."""
        type_id, dimensions = self._btf.resolve(member.type), ""
        while (this := self._btf.type(type_id)).kind == ARRAY:
            element, count = self._btf.array(this)
            dimensions += f"[{count}]"
            type_id = self._btf.resolve(element)
        target = f"{member.name}{dimensions}"
        if this.kind == PTR:
            pointee = self._aggregate(type_id)
            if pointee in named:
                return f"{self._keyword(pointee)} {named[pointee]} *{target}"
            return f"void *{target}"
        if this.kind in (STRUCT, UNION):
            if type_id in named:
                return f"{self._keyword(type_id)} {this.name} {target}"
            return f"char {member.name}[{this.size}]" if not dimensions else None
        if this.kind in (INT, ENUM, ENUM64):
            signed = this.kind == INT and self._btf.integer(this)[0] & _SIGNED
            return f"{'s' if signed else 'u'}{8 * this.size} {target}"
        return None
