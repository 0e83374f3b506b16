"""Runs a command whose processes use the same GPU at the same time, through a CUDA Multi-Process Service of its own.

    python -m moe_ep_plugin.share_gpu --ranks 4 -- train.py --steps 100
    python -m moe_ep_plugin.share_gpu --percentage 25 -- ./any_program

Without MPS the processes on a GPU take turns, and a kernel that waits for another rank waits for that rank's turn.
Where MPS isn't needed or can't be had, the command runs without it and a line on stderr says why. The exit status
is the command's: 128 + n if signal n ended it, 126 or 127 if it can't be run. No setting of a GPU is changed.

MPS is stopped again, however the command or this program ends. A guard, a process in its own session, starts and
stops it, and waits in between for the end of a pipe that ends with this program, also by SIGKILL. In that case the
guard ends the command first, even one that is just being started: that holds the pipe open until its exec. The daemon
detaches itself, but the guard is a subreaper, so daemon and servers stay its descendants; the command's processes are
known by the folder's name in their environment, whatever their session. If the guard is killed, this program stops
MPS in its place: only a SIGKILL to both leaves it running.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

_CONTROL = "nvidia-cuda-mps-control"
_PERCENTAGE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
_UUID = ("GPU-", "MIG-")
_GUARD = "--as-guard"
_FORWARDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
_SI_KERNEL = 0x80
_PR_SET_CHILD_SUBREAPER = 36

# Limits in seconds: nvidia-smi; MPS's start; its answer; the end of processes when asked, after SIGTERM, after SIGKILL.
_LIST_S, _START_S, _ASK_S, _QUIT_S, _TERM_S, _KILL_S = 30.0, 10.0, 5.0, 5.0, 5.0, 3.0


def main(argv: Sequence[str]) -> int:
    """Run the command that ``argv`` describes with MPS and return its exit status, or become it where MPS isn't used.

    Bad arguments raise SystemExit with status 2.
    """
    options = _parse(argv)
    command: list[str] = options.command
    if options.ranks:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
        command = [sys.executable, *torchrun, *command]
    environment = os.environ | ({_PERCENTAGE: f"{options.percentage:g}"} if options.percentage else {})
    reason = _why_without(options.ranks)
    try:
        if reason is None and _answers(os.environ):
            _say(f"using the MPS that runs already in {pipe_directory(os.environ)}")
        elif reason is None:
            # Signals wait until they are asked for, also while MPS starts and stops.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED | {signal.SIGCHLD})
            service = _Service()
            try:
                if (reason := service.start()) is None:
                    return _run(command, environment | _directories(service.folder), mask)
            finally:
                service.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if reason is not None:
            _say(f"running without MPS: {reason}")
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)  # Python ignores them, and what is ignored stays so.
        os.execvpe(command[0], command, environment)
    except OSError as error:
        _say(f"can't run {command[0]}: {error.strerror}")
        return 127 if isinstance(error, FileNotFoundError) else 126


def visible_gpus(listing: str, visible: str | None) -> int:
    """Count the GPUs of ``nvidia-smi -L`` that CUDA_VISIBLE_DEVICES shows: as in CUDA, up to the first unknown one."""
    total = sum(line.startswith("GPU ") for line in listing.splitlines())
    names = [str(index) for index in range(total)] if visible is None else map(str.strip, visible.split(","))

    def exists(name: str) -> bool:
        return int(name) < total if name.isdecimal() else name.startswith(_UUID) and f"UUID: {name}" in listing

    return len(list(itertools.takewhile(exists, names)))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    usage = "%(prog)s [--ranks N] [--percentage P] -- COMMAND..."
    parser = argparse.ArgumentParser(prog="python -m moe_ep_plugin.share_gpu", usage=usage, allow_abbrev=False)
    parser.add_argument(
        "--ranks", metavar="N", type=int, help="run a Python script, or -m MODULE, as N ranks: torchrun"
    )
    parser.add_argument("--percentage", metavar="P", type=float, help="share of a GPU's SMs that each process may use")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="program, or script with --ranks, and its arguments")
    options = parser.parse_args(argv)
    options.command = options.command[options.command[:1] == ["--"] :]
    if options.ranks is not None and options.ranks < 1:
        parser.error(f"--ranks is {options.ranks}, but must be at least 1")
    if options.percentage is not None and not 0 < options.percentage <= 100:
        parser.error(f"--percentage is {options.percentage:g}, but must be above 0 and at most 100")
    if not options.command:
        parser.error("there is no command; give one after --")
    if options.ranks and (first := options.command[0]) != "-m" and not os.path.isfile(first):
        parser.error(f"with --ranks the command is a Python script or -m MODULE, but {first} is not a file")
    return options


def _why_without(ranks: int | None) -> str | None:
    """The reason for which MPS isn't needed or can't be had, or None."""
    smi, visible = ["nvidia-smi", "-L"], os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        listed = subprocess.run(smi, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIST_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no GPU: nvidia-smi gives no list ({error})"
    count = 0 if listed.returncode else visible_gpus(listed.stdout, visible)
    if not count:
        return "no GPU: nvidia-smi -L shows none" + ("" if visible is None else f" of CUDA_VISIBLE_DEVICES={visible!r}")
    if ranks and ranks <= count:
        return f"every rank has a GPU of its own ({ranks} on {count})"
    return None if shutil.which(_CONTROL) else f"{_CONTROL} is not installed"


def _run(command: list[str], environment: Mapping[str, str], mask: Iterable[int]) -> int:
    """Run the command, forward signals to it and return its exit status."""
    unblock = functools.partial(signal.pthread_sigmask, signal.SIG_SETMASK, mask)
    process = subprocess.Popen(command, env=environment, preexec_fn=unblock)
    while process.poll() is None:
        seen = signal.sigtimedwait(_FORWARDED | {signal.SIGCHLD}, 1.0)
        # A key in the terminal reaches its whole foreground group; twice could cut the command's own clean-up short.
        from_key = seen and seen.si_code == _SI_KERNEL and seen.si_signo in (signal.SIGINT, signal.SIGQUIT)
        if seen and seen.si_signo != signal.SIGCHLD and not from_key:
            process.send_signal(seen.si_signo)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


class _Service:
    """The guard, seen from this program."""

    def __init__(self) -> None:
        self.folder = ""
        guard = [sys.executable, "-I", "-S", os.path.abspath(__file__), _GUARD]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        self._guard = subprocess.Popen(guard, stdin=pipe, stdout=pipe, stderr=null, start_new_session=True, cwd="/")

    def start(self) -> str | None:
        """Wait until MPS runs, and set ``folder``; the reason if it does not. A signal ends this program instead."""
        assert self._guard.stdout is not None
        deadline = time.monotonic() + _START_S + 2 * _ASK_S
        ready = False
        while not ready and time.monotonic() < deadline:
            ready = bool(select.select([self._guard.stdout], [], [], 0.1)[0])
            if signals := signal.sigpending() & _FORWARDED:
                raise SystemExit(128 + min(signals))
        if not (line := self._guard.stdout.readline() if ready else b""):
            return f"the process that starts it {'ended' if ready else 'did not answer'}"
        report: dict[str, str] = json.loads(line)
        self.folder = report["folder"]
        return report["error"] or None

    def close(self) -> None:
        """Have MPS stopped, or stop it here if the guard is gone."""
        try:
            self._guard.communicate(b"done", timeout=_START_S + 2 * _ASK_S + _QUIT_S + _TERM_S + _KILL_S + 5.0)
        except subprocess.TimeoutExpired:
            self._guard.kill()
        if os.path.exists(self.folder):
            _stop(self.folder)
        if self.folder and (left := _processes(self.folder, service=True)):
            _say(f"MPS could not be stopped: processes {left} do not end")


def _guard() -> None:
    """Body of the guard: start MPS, report on stdout, wait for the end of stdin, stop MPS."""
    for number in _FORWARDED:
        signal.signal(number, lambda *_: None)  # Not SIG_IGN, which the daemon would inherit.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    folder = tempfile.mkdtemp(prefix="moe-ep-mps-", dir="/tmp")  # A socket's path has at most 107 characters.
    try:
        print(json.dumps({"error": _start(folder), "folder": folder}), flush=True)
        if sys.stdin.read() != "done":
            _end(folder, service=False, patience_s=0.0)
    finally:
        _stop(folder)


def _start(folder: str) -> str:
    """Start MPS in ``folder``; the reason if it did not start, else nothing."""
    environment = os.environ | _directories(folder)
    for directory in _directories(folder).values():
        os.mkdir(directory)
    environment.pop(_PERCENTAGE, None)  # A daemon takes it for the limit of all its clients.
    # A daemon counts its GPUs from 0 again, so that a client's indices would mean others; UUIDs mean the same in both.
    if not all(name.strip().startswith(_UUID) for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",")):
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    deadline = time.monotonic() + _START_S
    why = f"{_CONTROL} did not start within {_START_S:g} s"
    with contextlib.suppress(subprocess.TimeoutExpired), open(f"{folder}/log/start.log", "wb") as log:
        null = subprocess.DEVNULL
        code = subprocess.call([_CONTROL, "-d"], env=environment, stdin=null, stdout=log, stderr=log, timeout=_START_S)
        if code:
            why, deadline = f"{_CONTROL} -d failed with exit status {code}", 0.0
    while time.monotonic() < deadline:
        if _answers(environment):
            return ""
        time.sleep(0.05)
    logs = [path.read_text(errors="replace") for path in sorted(Path(folder, "log").iterdir()) if path.is_file()]
    tail = [f"    {line}" for text in logs for line in text.splitlines()[-5:]]
    return "\n".join([why + ("; its logs end with" if tail else ""), *tail])


def _stop(folder: str) -> None:
    """Stop what runs in ``folder``, by force what does not stop when asked, and remove the folder."""
    _answers(os.environ | _directories(folder), "quit")
    _end(folder, service=True, patience_s=_QUIT_S)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:  # A container's first process may not collect them.
            pass
    shutil.rmtree(folder, ignore_errors=True)


def _end(folder: str, *, service: bool, patience_s: float) -> None:
    """Wait for the end of processes; terminate them after ``patience_s``, kill them after ``_TERM_S`` more."""
    deadline = time.monotonic() + patience_s
    told: dict[int, int] = {}
    quiet = 0
    while quiet < 2 and (passed := time.monotonic() - deadline) < _TERM_S + _KILL_S:
        number = 0 if passed < 0 else signal.SIGTERM if passed < _TERM_S else signal.SIGKILL
        left = _processes(folder, service=service)
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, number if told.get(pid) != number else 0)
            told[pid] = number
        quiet = 0 if left else quiet + 1  # Once is not enough: in the middle of an exec a process has no environment.
        time.sleep(0.05)


def _processes(folder: str, *, service: bool) -> list[int]:
    """The processes of the MPS in ``folder``, or all others that were given its folder."""
    mark = f"CUDA_MPS_PIPE_DIRECTORY={folder}/pipe".encode()
    parents: dict[int, int] = {}
    marked: dict[int, bool] = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
        with contextlib.suppress(OSError):  # It has ended, or is another user's.
            name, _, rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").partition("(")[2].rpartition(") ")
            state, parents[pid] = rest[0], int(rest.split()[1])
            # Daemon and server have one name: the kernel keeps 15 characters.
            if state not in "ZX" and name.startswith("nvidia-cuda-mps") == service:
                marked[pid] = False
                marked[pid] = mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")

    def descends(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and descends(parents[pid]))

    return [pid for pid in marked if marked[pid] or (service and descends(pid))]


def _answers(environment: Mapping[str, str], request: str = "get_server_list") -> bool:
    """Whether an MPS takes a request where CUDA would look for it with this environment."""
    if not os.path.exists(f"{pipe_directory(environment)}/control"):
        return False
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        line = request.encode() + b"\n"
        asked = subprocess.run([_CONTROL], input=line, env=environment, capture_output=True, timeout=_ASK_S)
        return asked.returncode == 0
    return False


def _directories(folder: str) -> dict[str, str]:
    return {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}


def pipe_directory(environment: Mapping[str, str]) -> str:
    """Where CUDA looks for an MPS with this environment; one that runs has its socket ``control`` there."""
    return environment.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps"


def _say(text: str) -> None:
    print(f"share_gpu: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == [_GUARD]:
        _guard()
    elif __package__:
        # The package brought torch and its threads, and a signal that this thread blocks would end a process that has
        # others. -I also keeps this folder, with its types.py, from the path.
        os.execv(sys.executable, [sys.executable, "-I", "-S", os.path.abspath(__file__), *sys.argv[1:]])
    else:
        raise SystemExit(main(sys.argv[1:]))
