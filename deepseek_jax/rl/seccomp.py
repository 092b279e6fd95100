"""The system calls that a program in the sandbox is refused: a filter in the kernel's own form (classic BPF).

Namespaces and mounts would give it rights of its own; `ptrace` and its kin, other processes' memory; anonymous shared
memory and message queues, memory that stands in no process's account. Sockets but Unix ones are refused too: an empty
network still has a loopback, whose buffers are the whole machine's.
"""

import errno
import struct

# Name of the machine → its audit architecture and numbers (linux/audit.h, asm/unistd.h).
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_REFUSED = {
    "x86_64": {
        **{"mount": 165, "umount2": 166, "pivot_root": 155, "unshare": 272, "setns": 308},
        **{"ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "bpf": 321, "perf_event_open": 298},
        **{"memfd_create": 319, "shmget": 29, "msgget": 68, "add_key": 248, "request_key": 249, "keyctl": 250},
        **{"userfaultfd": 323},
    },
    "aarch64": {
        **{"mount": 40, "umount2": 39, "pivot_root": 41, "unshare": 97, "setns": 268},
        **{"ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "bpf": 280, "perf_event_open": 241},
        **{"memfd_create": 279, "shmget": 194, "msgget": 186, "add_key": 217, "request_key": 218, "keyctl": 219},
        **{"userfaultfd": 282},
    },
}
_EVERYWHERE = {"io_uring_setup": 425, "fsopen": 430, "pidfd_getfd": 438, "memfd_secret": 447}
_CLONE, _SOCKET = {"x86_64": 56, "aarch64": 220}, {"x86_64": 41, "aarch64": 198}
_CLONE3 = 435  # its flags lie in memory, where a filter cannot look: the C library falls back on clone
_NEW_NAMESPACES = 0x7E020000
_UNIX = 1
_X32 = 0x40000000  # the second numbering of x86-64

_LOAD, _RETURN = 0x20, 0x06
_EQUAL, _AT_LEAST, _ANY_BIT = 0x15, 0x35, 0x45
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; the argument's lower half


def system_call_filter(machine: str) -> bytes:
    """The filter for `platform.machine()`. ValueError for one whose system calls are not known here."""
    if machine not in _ARCHITECTURES:
        raise ValueError(f"the sandbox knows the system calls of {', '.join(_ARCHITECTURES)}, not of {machine}")
    refused = _RETURN, 0, 0, _ERROR | errno.EPERM
    allowed = _RETURN, 0, 0, _ALLOW
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
        *((_AT_LEAST, 0, 1, _X32), refused),
        *((_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)),
    ]
    for number in [*_REFUSED[machine].values(), *_EVERYWHERE.values()]:
        program += [(_EQUAL, 0, 1, number), refused]
    argument = _LOAD, 0, 0, _ARGUMENT
    program += [(_EQUAL, 0, 4, _CLONE[machine]), argument, (_ANY_BIT, 0, 1, _NEW_NAMESPACES), refused, allowed]
    program += [(_EQUAL, 0, 4, _SOCKET[machine]), argument, (_EQUAL, 1, 0, _UNIX), refused, allowed]
    return b"".join(struct.pack("=HBBI", *step) for step in [*program, allowed])
