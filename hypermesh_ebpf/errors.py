"""Every way hmebpf can fail, as one tree.

    HmebpfError                 exit 1   anything below; catch this to catch all
    ├── UsageError              exit 2   an option or argument makes no sense
    ├── Unsupported             exit 3   this kernel cannot do it
    │   ├── HookUnsupported     exit 3   this kernel has no such hook
    │   ├── MissingPrivilege    exit 3   this process may not do it
    │   └── MissingBtf          exit 3   the kernel's type information cannot be read
    ├── MissingDependency       exit 1   BCC, libbpf or a Python package is not installed
    ├── CompileError            exit 1   clang refused a C source
    ├── InvalidProgram          exit 1   the bytes given are no program
    │   ├── EmptyProgram        exit 1   there are none
    │   ├── MisalignedProgram   exit 1   their number is no multiple of 8
    │   ├── ProgramTooLong      exit 1   more than 1,000,000 instructions
    │   ├── UnknownOpcode       exit 1   an instruction that does not exist
    │   ├── InvalidRegister     exit 1   a register that does not exist
    │   ├── JumpOutOfRange      exit 1   a jump that leaves the program
    │   ├── MalformedObject     exit 1   an ELF file that is cut short or damaged
    │   └── ForeignObject       exit 1   an ELF file for another machine than eBPF
    ├── VerifierError           exit 1   the kernel's verifier refused a program
    ├── LoadError               exit 1   a map or program could not be made
    ├── AttachError             exit 1   a program could not be attached
    │   ├── InterfaceNotFound   exit 1   no network interface of that name
    │   ├── InterfaceBusy       exit 1   somebody else's program is attached there
    │   └── AlreadyAttached     exit 1   this program is attached already
    ├── InvalidHandle           exit 1   no loaded program has this handle
    ├── NotAttached             exit 1   the program is attached nowhere
    ├── ObjectNotFound          exit 1   no program, map, link or pin of that name or id
    ├── PinError                exit 1   something could not be pinned or unpinned
    ├── DetachError             exit 1   a program of ours could not be taken off
    ├── MapError                exit 1   a map could not be read or written
    ├── TargetGone              exit 1   what we were attached to went away (interface removed)
    ├── WorkerError             exit 1   the worker process died or broke the protocol
    ├── GuardError              exit 1   the guard process could not be started
    ├── OutputError             exit 1   output could not be written (disk full)
    ├── LossSeen                exit 4   events were lost under --fail-on-loss
    └── OverheadExceeded        exit 5   stopped by --max-overhead

An error says what failed (``what``), why in the kernel's, clang's or libc's own words (``cause``),
and what the user can type to mend it (``remedy``).  Errors cross the worker boundary as plain
dictionaries (:meth:`HmebpfError.as_dict`, :func:`from_dict`).
"""

from __future__ import annotations

import errno as errno_names
import os
from typing import Any, ClassVar


class HmebpfError(Exception):
    """Anything that hmebpf reports as a failure.

    ``what`` names the attempt ("attach xdp to eth0"), ``cause`` the reason, ``remedy`` something
    the user can do, ``errno`` the system's error number where there was one, ``details`` the long
    text (compiler output, verifier log) that is shown under -v only.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        cause: str | None = None,
        remedy: str | None = None,
        *,
        errno: int | None = None,
        details: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.cause = cause
        self.remedy = remedy
        self.errno = errno
        self.details = details

    def __str__(self) -> str:
        return f"{self.what}: {self.cause}" if self.cause else self.what

    def as_dict(self) -> dict[str, Any]:
        """The error as plain data, for the way from the worker to its parent."""
        return {
            "class": type(self).__name__,
            "what": self.what,
            "cause": self.cause,
            "remedy": self.remedy,
            "errno": self.errno,
            "details": self.details,
        }


class UsageError(HmebpfError):
    """An option or argument makes no sense."""

    exit_code = 2


class Unsupported(HmebpfError):
    """This kernel cannot do what was asked."""

    exit_code = 3


class HookUnsupported(Unsupported):
    """This kernel has no such hook, or does not let programs run on it."""


class MissingPrivilege(Unsupported):
    """This process lacks a capability, or a lockdown or sysctl forbids the call."""


class MissingBtf(Unsupported):
    """The kernel's type information (BTF) cannot be read."""


class MissingDependency(HmebpfError):
    """BCC, libbpf or a Python package is not installed."""


class CompileError(HmebpfError):
    """clang refused a C source; ``details`` has all it said."""


class InvalidProgram(HmebpfError):
    """The bytes given are no program; found before the kernel is asked."""


class EmptyProgram(InvalidProgram):
    """There are no instructions."""


class MisalignedProgram(InvalidProgram):
    """The size is no multiple of 8, the size of an instruction."""


class ProgramTooLong(InvalidProgram):
    """More instructions than any kernel takes (1,000,000)."""


class UnknownOpcode(InvalidProgram):
    """An instruction that does not exist."""


class InvalidRegister(InvalidProgram):
    """An instruction that names a register beyond r10, or writes r10."""


class JumpOutOfRange(InvalidProgram):
    """A jump or call that leads out of the program, or into the middle of an instruction."""


class MalformedObject(InvalidProgram):
    """An ELF file that is cut short or damaged, or that libbpf cannot make sense of."""


class ForeignObject(InvalidProgram):
    """An ELF file for another machine than eBPF, or of the other byte order."""


class VerifierError(HmebpfError):
    """The verifier refused a program; ``details`` has its whole log."""


class LoadError(HmebpfError):
    """The kernel refused to make a map or load a program, and not by its verifier."""


class AttachError(HmebpfError):
    """A program could not be attached."""


class InterfaceNotFound(AttachError):
    """There is no network interface of that name."""


class InterfaceBusy(AttachError):
    """Somebody else's program is attached to the interface."""


class AlreadyAttached(AttachError):
    """This program is attached already."""


class InvalidHandle(HmebpfError):
    """No loaded program has this handle: it was never given out, or unloaded."""


class NotAttached(HmebpfError):
    """The program is attached nowhere, so there is nothing to read or to take off."""


class ObjectNotFound(HmebpfError):
    """The kernel has no program, map, link or pin of that name or id."""


class PinError(HmebpfError):
    """Something could not be pinned to the BPF file system, or unpinned."""


class DetachError(HmebpfError):
    """A program of ours could not be taken off."""


class MapError(HmebpfError):
    """A map could not be read or written."""


class TargetGone(HmebpfError):
    """What we were attached to went away, for instance the interface was removed."""


class WorkerError(HmebpfError):
    """The worker process died, or did not keep to the protocol."""


class GuardError(HmebpfError):
    """The guard process, which detaches when we die, could not be started."""


class OutputError(HmebpfError):
    """Output could not be written, for instance because the disk is full."""


class LossSeen(HmebpfError):
    """Data was lost and the user asked to hear of it by the exit code (--fail-on-loss)."""

    exit_code = 4


class OverheadExceeded(HmebpfError):
    """Our programs took more CPU than --max-overhead allows."""

    exit_code = 5


def all_errors() -> dict[str, type[HmebpfError]]:
    """Every class of the tree by its name."""
    found: dict[str, type[HmebpfError]] = {}
    todo: list[type[HmebpfError]] = [HmebpfError]
    while todo:
        cls = todo.pop()
        found[cls.__name__] = cls
        todo += cls.__subclasses__()
    return found


def from_dict(data: dict[str, Any]) -> HmebpfError:
    """The error that :meth:`HmebpfError.as_dict` described, of its own class again."""
    cls = all_errors().get(data["class"], HmebpfError)
    return cls(
        data["what"],
        data.get("cause"),
        data.get("remedy"),
        errno=data.get("errno"),
        details=data.get("details"),
    )


def name_errno(number: int) -> str:
    """An error number's symbol: ``ENODEV``."""
    # Linux has one number for both; ENOTSUP is the name that nobody knows it by.
    if number == errno_names.EOPNOTSUPP:
        return "EOPNOTSUPP"
    return errno_names.errorcode.get(number, str(number))


def describe_errno(number: int, words: str | None = None) -> str:
    """The system's words for an error number, or better ones: ``No such device (ENODEV)``."""
    name = name_errno(number)
    plain = words or os.strerror(number)
    return plain if name == str(number) else f"{plain} ({name})"
