"""hmebpf shows what the Linux kernel sees: packets, process executions, socket calls.

``open_monitor`` runs a bundled monitor; ``create_os_abstraction`` loads and attaches programs of
your own.

The public names are imported when they are first used, so that ``import hypermesh_ebpf`` costs
next to nothing: no bcc, rich, pyroute2 or numpy before something needs them.
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers take it for true; typing itself would cost 5 ms
if TYPE_CHECKING:
    from hypermesh_ebpf.attach_type import EbpfAttachType as EbpfAttachType
    from hypermesh_ebpf.bpf.columns import MapColumns as MapColumns
    from hypermesh_ebpf.errors import AlreadyAttached as AlreadyAttached
    from hypermesh_ebpf.errors import AttachError as AttachError
    from hypermesh_ebpf.errors import CompileError as CompileError
    from hypermesh_ebpf.errors import DetachError as DetachError
    from hypermesh_ebpf.errors import EmptyProgram as EmptyProgram
    from hypermesh_ebpf.errors import ForeignObject as ForeignObject
    from hypermesh_ebpf.errors import GuardError as GuardError
    from hypermesh_ebpf.errors import HmebpfError as HmebpfError
    from hypermesh_ebpf.errors import HookUnsupported as HookUnsupported
    from hypermesh_ebpf.errors import InterfaceBusy as InterfaceBusy
    from hypermesh_ebpf.errors import InterfaceNotFound as InterfaceNotFound
    from hypermesh_ebpf.errors import InvalidHandle as InvalidHandle
    from hypermesh_ebpf.errors import InvalidProgram as InvalidProgram
    from hypermesh_ebpf.errors import InvalidRegister as InvalidRegister
    from hypermesh_ebpf.errors import JumpOutOfRange as JumpOutOfRange
    from hypermesh_ebpf.errors import LoadError as LoadError
    from hypermesh_ebpf.errors import LossSeen as LossSeen
    from hypermesh_ebpf.errors import MalformedObject as MalformedObject
    from hypermesh_ebpf.errors import MapError as MapError
    from hypermesh_ebpf.errors import MisalignedProgram as MisalignedProgram
    from hypermesh_ebpf.errors import MissingBtf as MissingBtf
    from hypermesh_ebpf.errors import MissingDependency as MissingDependency
    from hypermesh_ebpf.errors import MissingPrivilege as MissingPrivilege
    from hypermesh_ebpf.errors import NotAttached as NotAttached
    from hypermesh_ebpf.errors import ObjectNotFound as ObjectNotFound
    from hypermesh_ebpf.errors import OutputError as OutputError
    from hypermesh_ebpf.errors import OverheadExceeded as OverheadExceeded
    from hypermesh_ebpf.errors import PinError as PinError
    from hypermesh_ebpf.errors import ProgramTooLong as ProgramTooLong
    from hypermesh_ebpf.errors import TargetGone as TargetGone
    from hypermesh_ebpf.errors import UnknownOpcode as UnknownOpcode
    from hypermesh_ebpf.errors import Unsupported as Unsupported
    from hypermesh_ebpf.errors import UsageError as UsageError
    from hypermesh_ebpf.errors import VerifierError as VerifierError
    from hypermesh_ebpf.errors import WorkerError as WorkerError
    from hypermesh_ebpf.metrics.sample import Degraded as Degraded
    from hypermesh_ebpf.metrics.sample import End as End
    from hypermesh_ebpf.metrics.sample import Event as Event
    from hypermesh_ebpf.metrics.sample import Histogram as Histogram
    from hypermesh_ebpf.metrics.sample import Loss as Loss
    from hypermesh_ebpf.metrics.sample import Sample as Sample
    from hypermesh_ebpf.metrics.sample import Start as Start
    from hypermesh_ebpf.opening import open_monitor as open_monitor
    from hypermesh_ebpf.os_abstraction import EbpfAbstraction as EbpfAbstraction
    from hypermesh_ebpf.os_abstraction import EbpfHandle as EbpfHandle
    from hypermesh_ebpf.os_abstraction import EbpfMetrics as EbpfMetrics
    from hypermesh_ebpf.os_abstraction import LoadedProgram as LoadedProgram
    from hypermesh_ebpf.os_abstraction import create_os_abstraction as create_os_abstraction

__version__ = "0.1.0"

_MODULES = {
    "hypermesh_ebpf.attach_type": ("EbpfAttachType",),
    "hypermesh_ebpf.bpf.columns": ("MapColumns",),
    "hypermesh_ebpf.errors": (
        "AlreadyAttached",
        "AttachError",
        "CompileError",
        "DetachError",
        "EmptyProgram",
        "ForeignObject",
        "GuardError",
        "HmebpfError",
        "HookUnsupported",
        "InterfaceBusy",
        "InterfaceNotFound",
        "InvalidHandle",
        "InvalidProgram",
        "InvalidRegister",
        "JumpOutOfRange",
        "LoadError",
        "LossSeen",
        "MalformedObject",
        "MapError",
        "MisalignedProgram",
        "MissingBtf",
        "MissingDependency",
        "MissingPrivilege",
        "NotAttached",
        "ObjectNotFound",
        "OutputError",
        "OverheadExceeded",
        "PinError",
        "ProgramTooLong",
        "TargetGone",
        "UnknownOpcode",
        "Unsupported",
        "UsageError",
        "VerifierError",
        "WorkerError",
    ),
    "hypermesh_ebpf.metrics.sample": (
        "Degraded",
        "End",
        "Event",
        "Histogram",
        "Loss",
        "Sample",
        "Start",
    ),
    "hypermesh_ebpf.os_abstraction": (
        "EbpfAbstraction",
        "EbpfHandle",
        "EbpfMetrics",
        "LoadedProgram",
        "create_os_abstraction",
    ),
    "hypermesh_ebpf.opening": ("open_monitor",),
}
__all__ = sorted(name for names in _MODULES.values() for name in names)  # noqa: PLE0605
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    """A public name, from the module that defines it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
