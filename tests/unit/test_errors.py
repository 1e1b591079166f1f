"""The tree of errors: what its docstring promises, and the way across the worker boundary."""

from __future__ import annotations

import errno
import importlib
import json
import pkgutil
import re

import pytest

import hypermesh_ebpf
from hypermesh_ebpf import errors
from hypermesh_ebpf.bpf.verifier import explain_refusal
from hypermesh_ebpf.errors import HmebpfError, all_errors, describe_errno, from_dict

# "    │   └── MissingBtf          exit 3   the kernel's type information ..."
_LINE = re.compile(r"^    (?P<branch>[│├└─ ]*)(?P<name>[A-Z]\w+) +exit (?P<code>\d)   \S", re.M)


def drawn() -> dict[str, tuple[str | None, int]]:
    """The tree as the module's docstring draws it: name to (parent, exit code)."""
    found: dict[str, tuple[str | None, int]] = {}
    path: list[str] = []
    for match in _LINE.finditer(errors.__doc__ or ""):
        depth = len(match["branch"]) // 4
        path = [*path[:depth], match["name"]]
        found[match["name"]] = (path[-2] if depth else None, int(match["code"]))
    return found


def test_tree_is_as_drawn() -> None:
    real: dict[str, tuple[str | None, int]] = {"HmebpfError": (None, 1)}
    for name, cls in all_errors().items():
        if cls is not HmebpfError:
            (base,) = cls.__bases__
            real[name] = (base.__name__, cls.exit_code)
    assert drawn() == real
    assert len(real) > 15


def test_no_error_is_defined_elsewhere() -> None:
    """One tree, one file; what crosses the worker boundary must be known on the other side."""
    for module in pkgutil.walk_packages(hypermesh_ebpf.__path__, "hypermesh_ebpf."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert {cls.__module__ for cls in all_errors().values()} == {errors.__name__}


def test_all_are_public() -> None:
    for name, cls in all_errors().items():
        assert getattr(hypermesh_ebpf, name) is cls
        assert cls.__doc__


@pytest.mark.parametrize("name", all_errors())
def test_round_trip(name: str) -> None:
    cls = all_errors()[name]
    error = cls("attach xdp to eth0", "No such device", "ip link", errno=19, details="a\nb\udc80")
    again = from_dict(json.loads(json.dumps(error.as_dict())))
    assert type(again) is cls
    assert again.exit_code == cls.exit_code
    assert vars(again) == vars(error)
    assert str(again) == str(error) == "attach xdp to eth0: No such device"
    bare = from_dict(json.loads(json.dumps(cls("only what").as_dict())))
    assert str(bare) == "only what"
    assert (bare.cause, bare.remedy, bare.errno, bare.details) == (None,) * 4


def test_error_of_a_class_that_is_not_known_here() -> None:
    error = from_dict({"class": "FromTheFuture", "what": "do it", "cause": "because"})
    assert type(error) is HmebpfError
    assert str(error) == "do it: because"


def test_exit_codes_are_the_promised_ones() -> None:
    assert {name: cls.exit_code for name, cls in all_errors().items() if cls.exit_code != 1} == {
        "UsageError": 2,
        "Unsupported": 3,
        "HookUnsupported": 3,
        "MissingPrivilege": 3,
        "MissingBtf": 3,
        "LossSeen": 4,
        "OverheadExceeded": 5,
    }


REFUSED = """\
0: R1=ctx() R10=fp0
0: (b7) r1 = 0                        ; R1=0
1: (63) *(u32 *)(r10 -4) = r1         ; R1=0 R10=fp0 fp-8=0000????
2: (18) r1 = 0xffff8b30819eb800       ; R1=map_ptr(map=m,ks=4,vs=8)
6: (85) call bpf_map_lookup_elem#1    ; R0=map_value_or_null(id=1,map=m,ks=4,vs=8)
7: (79) r0 = *(u64 *)(r0 +0)
R0 invalid mem access 'map_value_or_null'
"""
EXPLAINED = """
Verification failed: Register Type Safety: Invalid dereference

Reason:
  R0 may be NULL here (a nullable map value pointer). The program could dereference NULL on this
  path, so the verifier cannot prove this access is safe.

At:
  insn 7
       | ^-- error: invalid dereference of R0 (a nullable map value pointer)

Suggestion:
  Add a NULL check before the access and dereference the pointer
  only on the non-NULL path.

"""
SUM = "processed 7 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0\n"


@pytest.mark.parametrize(
    ("log", "remedy"),
    [
        (
            REFUSED + SUM,
            "compare the pointer with NULL before using it: the look-up may have found nothing",
        ),
        (
            REFUSED + EXPLAINED + SUM,
            "Add a NULL check before the access and dereference the pointer only on the "
            "non-NULL path.",
        ),
    ],
    ids=["as it was", "as Linux 7.3 explains it"],
)
def test_verifiers_log_is_cut_to_its_telling_lines(log: str, remedy: str) -> None:
    error = explain_refusal("f", errno.EACCES, log)
    assert error.cause is not None
    *shown, omitted = error.cause.splitlines()
    assert [line.strip() for line in shown] == REFUSED.splitlines()[2:]
    left_out = len(log.splitlines()) - len(shown)
    assert omitted == f"  ({left_out} lines of the verifier's log omitted; see them with -v)"
    assert error.remedy == remedy
    assert error.details == log


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("R0 !read_ok", "r0 = 0"),
        ("R2 !read_ok", "before it is read"),
        ("R1 invalid mem access 'map_value_or_null'", "NULL"),
        ("invalid access to packet, off=14 size=2, R2(id=0,off=14,r=0)", "data_end"),
        ("invalid indirect read from stack R2 off -24+16 size 24", "zero the structure"),
        ("back-edge from insn 5 to 2", "bound"),
        ("BPF program is too large. Processed 1000001 insn", "split"),
        ("cannot call GPL-restricted function from non-GPL compatible program", "license"),
        ("unknown func bpf_probe_read#4", "helper"),
        ("combined stack size of 2 calls is 544. Too large", "per-CPU array"),
        ("unreachable insn 3", "exit"),
        ("R2 unbounded memory access, use 'var &= const' or 'if (var < const)'", "bound the value"),
        ("something that nobody has seen yet", "the instruction named last"),
    ],
)
def test_verifiers_words_have_a_remedy(said: str, word: str) -> None:
    """The kernel's messages (kernel/bpf/verifier.c), and what to do about them."""
    error = explain_refusal("f", errno.EACCES, f"0: (95) exit\n{said}\n{SUM}")
    assert word in (error.remedy or "")


def test_errno_in_words() -> None:
    assert describe_errno(errno.ENODEV) == "No such device (ENODEV)"
    assert describe_errno(4000) == "Unknown error 4000"
