"""The launcher that shares a GPU through MPS, with stand-ins for NVIDIA's two programs: the start and end of
everything, what the command is given, and why MPS is left out.

The stand-in for MPS behaves as the real one where it matters: its daemon leaves its parent and its session, has a
server as its child, and answers on the command line for as long as it lives. (The real server keeps its environment;
this one is to be found also without.)
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_ep_plugin import share_gpu

# What ``-m`` replaces itself by, without the second that importing torch takes.
LAUNCHER = [sys.executable, "-I", "-S", share_gpu.__file__]
LONG_S = 30.0

GPU_LIST = """\
GPU 0: NVIDIA H200 (UUID: GPU-5e1f8a40-1111-2222-3333-444455556666)
  MIG 1g.18gb     Device  0: (UUID: MIG-aaaa8a40-1111-2222-3333-444455556666)
GPU 1: NVIDIA H200 (UUID: GPU-77778a40-1111-2222-3333-444455556666)
"""

CONTROL = r"""#!/bin/sh
pipe=${CUDA_MPS_PIPE_DIRECTORY:-$2}
wait_for_ever() { while :; do read _ <>"$pipe/fifo"; done; }
case $1 in
  -d)
    [ "$FAKE_MPS" = slow ] && sleep 1
    [ "$FAKE_MPS" = fails ] && { echo "no such luck" >&2; exit 7; }
    [ "$FAKE_MPS" = mute ] && exit 0
    env >"$FAKE_JOURNAL.env"
    mkfifo "$pipe/fifo"
    setsid "$0" --daemon </dev/null >/dev/null 2>&1 &
    ;;
  --daemon)
    [ "$FAKE_MPS" = stubborn ] && trap "" TERM
    env -i "$0" --server "$pipe" &
    echo "$$ $!" >>"$FAKE_JOURNAL.pids"
    echo $$ >"$pipe/control.new" && mv "$pipe/control.new" "$pipe/control"
    wait_for_ever
    ;;
  --server)
    wait_for_ever
    ;;
  *)
    read request
    daemon=$(cat "$pipe/control") && kill -0 "$daemon" || exit 1
    echo "$request" >>"$FAKE_JOURNAL"
    [ "$request" = quit ] && [ "$FAKE_MPS" != stubborn ] && kill $(tail -n 1 "$FAKE_JOURNAL.pids")
    exit 0
    ;;
esac
"""


class Fakes:
    """A PATH with the stand-ins, the launcher run under it, and what is known of it afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.journal = folder / "journal"
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
        self.env |= {
            "PATH": str(self.bin),  # This machine's own programs of these names can't be found.
            "FAKE_JOURNAL": str(self.journal),
            "FAKE_MPS": "",
            # Where an MPS would be looked for; this machine's may have one at the usual place.
            "CUDA_MPS_PIPE_DIRECTORY": str(folder / "none"),
        }
        for tool in ("cat", "env", "grep", "mkfifo", "mv", "setsid", "sh", "sleep", "sort", "tail", "true"):
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self.put("nvidia-smi", f"#!/bin/sh\ncat <<'END'\n{GPU_LIST}END\n")
        self.put("nvidia-cuda-mps-control", CONTROL)

    def put(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*LAUNCHER, *arguments], env=self.env, capture_output=True, text=True, timeout=LONG_S, cwd=self.folder
        )

    def start(self, *arguments: str, **options) -> subprocess.Popen[str]:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        return subprocess.Popen([*LAUNCHER, *arguments], env=self.env, **options)

    def requests(self) -> list[str]:
        return self.journal.read_text().split() if self.journal.exists() else []

    def daemons(self) -> list[int]:
        """Every process of a stand-in that was started, running or not."""
        pids = Path(f"{self.journal}.pids")
        return [int(pid) for pid in pids.read_text().split()] if pids.exists() else []

    def assert_stopped(self, *, after_s: float = 0.0) -> None:
        """MPS ran, and neither it nor its folder is there any more."""
        daemons, folder = self.daemons(), Path(self.given()["CUDA_MPS_PIPE_DIRECTORY"]).parent
        assert daemons and str(folder).startswith("/tmp/moe-ep-mps-")
        assert eventually(lambda: not any(map(lives, daemons)) and not folder.exists(), after_s)

    def given(self) -> dict[str, str]:
        """The environment that the daemon was started with."""
        return dict(line.split("=", 1) for line in Path(f"{self.journal}.env").read_text().splitlines() if "=" in line)


@pytest.fixture
def fakes(tmp_path):
    made = Fakes(tmp_path)
    yield made
    for pid in made.daemons():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    return False


def eventually(condition, limit_s: float = LONG_S) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def python(code: str) -> list[str]:
    return ["--", sys.executable, "-I", "-S", "-c", code]


# Says its process id, then each signal that comes, and ends with status 5 after SIGTERM.
LISTENER = """
import os, signal, sys, time
def say(number, frame):
    os.write(1, signal.Signals(number).name.encode() + b"\\n")
    if number == signal.SIGTERM:
        sys.exit(5)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, say)
os.write(1, b"%d\\n" % os.getpid())
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("code", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -SEGV $$", 139), ("kill -9 $$", 137)]
)
def test_command_s_end_is_the_launcher_s_and_mps_is_stopped(fakes, code, status):
    result = fakes.run("--", "sh", "-c", f"echo out; echo err >&2; {code}")
    assert (result.returncode, result.stdout, result.stderr) == (status, "out\n", "err\n")
    assert fakes.requests()[-1] == "quit"
    fakes.assert_stopped()


def test_command_runs_while_mps_answers_and_knows_where(fakes):
    fakes.env |= {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "90", "CUDA_VISIBLE_DEVICES": "1,0"}
    code = """echo get_default_active_thread_percentage | nvidia-cuda-mps-control || exit 1
        env | grep ^CUDA_ | sort; cat"""
    result = subprocess.run(
        [*LAUNCHER, "--percentage", "12.5", "sh", "-c", code],
        env=fakes.env,
        input="standard input\n",
        capture_output=True,
        text=True,
        timeout=LONG_S,
    )
    folder = fakes.given()["CUDA_MPS_PIPE_DIRECTORY"].removesuffix("/pipe")
    assert result.stdout.splitlines() == [
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=12.5",
        f"CUDA_MPS_LOG_DIRECTORY={folder}/log",
        f"CUDA_MPS_PIPE_DIRECTORY={folder}/pipe",
        "CUDA_VISIBLE_DEVICES=1,0",
        "standard input",
    ]
    assert (result.returncode, result.stderr) == (0, "")
    # Indices would be counted twice, and the share would bound every client.
    assert {"CUDA_VISIBLE_DEVICES", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"}.isdisjoint(fakes.given())
    fakes.assert_stopped()


def test_daemon_is_shown_the_same_gpus_by_uuid(fakes):
    fakes.env["CUDA_VISIBLE_DEVICES"] = "GPU-77778a40-1111-2222-3333-444455556666"
    assert fakes.run("true").returncode == 0
    assert fakes.given()["CUDA_VISIBLE_DEVICES"] == fakes.env["CUDA_VISIBLE_DEVICES"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_goes_to_the_command_which_decides(fakes, number):
    with fakes.start(*python(LISTENER), start_new_session=True) as launcher:
        command = int(launcher.stdout.readline())
        launcher.send_signal(signal.SIGUSR1)
        assert launcher.stdout.readline() == "SIGUSR1\n"
        launcher.send_signal(number)
        assert launcher.stdout.readline() == f"{number.name}\n"
        if number == signal.SIGINT:  # The command goes on, so MPS does too.
            assert lives(command) and all(map(lives, fakes.daemons()))
            launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(LONG_S) == 5
        assert launcher.stderr.read() == ""
    assert fakes.requests().count("quit") == 1
    fakes.assert_stopped()


def test_key_in_the_terminal_reaches_the_command_once(fakes):
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [*LAUNCHER, *python(LISTENER)], fakes.env)
    output = b""

    def saw(text: bytes, limit_s: float = LONG_S) -> bool:
        nonlocal output
        deadline = time.monotonic() + limit_s
        while text not in output and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.05)[0]:
                with contextlib.suppress(OSError):
                    output += os.read(terminal, 4096)
        return text in output

    try:
        assert saw(b"\n")
        os.write(terminal, b"\x03")
        assert saw(b"SIGINT"), output
        os.kill(pid, signal.SIGUSR1)  # Sent after what would have been a second SIGINT.
        assert saw(b"SIGUSR1")
        assert output.count(b"SIGINT") == 1
        os.kill(pid, signal.SIGTERM)
        assert saw(b"SIGTERM")
    finally:
        assert eventually(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid) or os.kill(pid, signal.SIGKILL)
        os.close(terminal)
    fakes.assert_stopped()


def test_killed_launcher_leaves_nothing(fakes):
    # A child in a session of its own, as torchrun's ranks are.
    code = """import os, subprocess, sys, time
child = subprocess.Popen(["sleep", "60"], start_new_session=True)
print(os.getpid(), child.pid, flush=True)
time.sleep(60)"""
    with fakes.start(*python(code)) as launcher:
        pids = [int(pid) for pid in launcher.stdout.readline().split()]
        assert all(map(lives, [*pids, *fakes.daemons()]))
        launcher.kill()
        launcher.wait(LONG_S)
    assert eventually(lambda: not any(map(lives, pids)))
    fakes.assert_stopped(after_s=LONG_S)


def test_killed_guard_is_replaced_by_the_launcher(fakes):
    with fakes.start("sh", "-c", "echo ready; read _", stdin=subprocess.PIPE) as launcher:
        assert launcher.stdout.readline() == "ready\n"
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        (guard,) = [int(pid) for pid in children if b"--as-guard" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(guard, signal.SIGKILL)
        launcher.communicate("\n", timeout=LONG_S)
        assert launcher.returncode == 0
    fakes.assert_stopped()


def test_signal_before_the_command_starts_ends_all(fakes):
    fakes.env["FAKE_MPS"] = "slow"
    # The command would inherit that the signal is ignored, and run.
    ignoring = functools.partial(signal.signal, signal.SIGTERM, signal.SIG_IGN)
    with fakes.start("sh", "-c", "echo ran", preexec_fn=ignoring) as launcher:
        guards = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
        assert eventually(lambda: b"--as-guard" in b"".join(map(command_line, guards.read_text().split())))
        launcher.send_signal(signal.SIGTERM)
        assert launcher.communicate(timeout=LONG_S) == ("", "")
        assert launcher.returncode == 128 + signal.SIGTERM
    fakes.assert_stopped()


def command_line(pid: str) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def run_guard(fakes: Fakes, limits: str) -> str:
    """Let the guard alone start and stop MPS, with other limits; the reason it gives for no start."""
    code = f"""import importlib.util, sys
spec = importlib.util.spec_from_file_location("share_gpu", {share_gpu.__file__!r})
sys.modules["share_gpu"] = share_gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(share_gpu)
vars(share_gpu).update({limits})
share_gpu._guard()"""
    result = subprocess.run(
        python(code)[1:], env=fakes.env, input="done", stdout=subprocess.PIPE, text=True, timeout=LONG_S
    )
    report = json.loads(result.stdout)
    assert result.returncode == 0 and not Path(report["folder"]).exists()
    return report["error"]


def test_mps_that_does_not_quit_is_killed(fakes):
    fakes.env["FAKE_MPS"] = "stubborn"
    assert run_guard(fakes, "_QUIT_S=0.2, _TERM_S=0.2") == ""
    assert fakes.requests()[-1] == "quit"
    assert len(fakes.daemons()) == 2
    fakes.assert_stopped()


def test_mps_that_does_not_answer_did_not_start(fakes):
    fakes.env["FAKE_MPS"] = "mute"
    assert run_guard(fakes, "_START_S=0.3") == "nvidia-cuda-mps-control did not start within 0.3 s"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda fakes: fakes.put("nvidia-smi", "#!/bin/sh\nexit 9\n"), "no GPU: nvidia-smi -L shows none"),
        (lambda fakes: (fakes.bin / "nvidia-smi").unlink(), "no GPU: nvidia-smi gives no list"),
        (lambda fakes: fakes.env.update(CUDA_VISIBLE_DEVICES=""), "none of CUDA_VISIBLE_DEVICES=''"),
        (lambda fakes: fakes.env.update(CUDA_VISIBLE_DEVICES="2"), "none of CUDA_VISIBLE_DEVICES='2'"),
        (lambda fakes: (fakes.bin / "nvidia-cuda-mps-control").unlink(), "nvidia-cuda-mps-control is not installed"),
        (
            lambda fakes: fakes.env.update(FAKE_MPS="fails"),
            "nvidia-cuda-mps-control -d failed with exit status 7; its logs end with\n    no such luck",
        ),
    ],
)
def test_command_runs_without_mps_and_the_reason_is_told(fakes, change, reason):
    change(fakes)
    result = fakes.run("sh", "-c", "echo $CUDA_MPS_PIPE_DIRECTORY; exit 4")
    assert (result.returncode, result.stdout) == (4, f"{fakes.folder}/none\n")
    assert result.stderr.startswith("share_gpu: running without MPS: ") and reason in result.stderr
    assert len(result.stderr.splitlines()) == 1 + reason.count("\n")
    assert not fakes.daemons()


def test_running_mps_is_used_and_left_running(fakes):
    fakes.env["CUDA_MPS_PIPE_DIRECTORY"] = directory = str(fakes.folder)
    subprocess.run(["nvidia-cuda-mps-control", "-d"], env=fakes.env, check=True, timeout=LONG_S)
    assert eventually((fakes.folder / "control").exists)
    result = fakes.run("--percentage", "50", "sh", "-c", "env | grep ^CUDA_ | sort")
    share = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=50"
    assert result.stdout.splitlines() == [share, f"CUDA_MPS_PIPE_DIRECTORY={directory}"]
    assert result.stderr == f"share_gpu: using the MPS that runs already in {directory}\n"
    assert "quit" not in fakes.requests() and len(fakes.daemons()) == 2 and all(map(lives, fakes.daemons()))


def test_ranks_run_under_torchrun(fakes):
    script = fakes.folder / "script.py"
    # One write a rank: print makes several where Python is unbuffered.
    script.write_text("""import os, sys
os.write(1, " ".join([os.environ["RANK"], os.environ["WORLD_SIZE"], *sys.argv[1:], chr(10)]).encode())
""")
    command = [sys.executable, "-m", "moe_ep_plugin.share_gpu", "--ranks", "3", "--", str(script), "--flag", "--", "x"]
    result = subprocess.run(command, env=fakes.env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == [f"{rank} 3 --flag -- x " for rank in range(3)]
    fakes.assert_stopped()


@pytest.mark.parametrize("command", [["script.py", "--ranks", "3"], ["-m", "some.module", "x"]])
def test_ranks_with_a_gpu_each_go_without_mps(fakes, command):
    (fakes.folder / "script.py").touch()
    stub = fakes.folder / "torch" / "distributed" / "run.py"
    stub.parent.mkdir(parents=True)
    stub.write_text("import sys\nprint(sys.argv[1:])\nsys.exit(6)\n")
    fakes.env["PYTHONPATH"] = str(fakes.folder)
    for package in (stub.parent, stub.parent.parent):
        (package / "__init__.py").touch()
    result = fakes.run("--ranks", "2", "--", *command)
    torchrun = ["--standalone", "--nproc-per-node", "2"]
    assert (result.returncode, result.stdout) == (6, f"{[*torchrun, *command]}\n")
    assert result.stderr == "share_gpu: running without MPS: every rank has a GPU of its own (2 on 2)\n"


@pytest.mark.parametrize(
    ("visible", "count"),
    [
        (None, 2),
        ("", 0),
        ("1", 1),
        (" 1, 0", 2),
        ("0,2,1", 1),
        ("-1,0", 0),
        ("GPU-7777", 1),
        ("GPU-9,GPU-5e1f", 0),
        ("MIG-aaaa8a40-1111-2222-3333-444455556666,GPU-5e1f", 2),
    ],
)
def test_visible_gpus_are_counted_as_cuda_does(visible, count):
    assert share_gpu.visible_gpus(GPU_LIST, visible) == count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no command"),
        (["--ranks", "2", "--"], "there is no command"),
        (["--ranks", "0", "--", "x"], "--ranks is 0, but must be at least 1"),
        (["--ranks", "two", "--", "x"], "argument --ranks: invalid int value: 'two'"),
        (["--percentage", "101", "--", "x"], "--percentage is 101, but must be above 0 and at most 100"),
        (["--percentage", "nan", "--", "x"], "--percentage is nan, but must be above 0"),
        (["--ranks", "2", "--", "python"], "-m MODULE, but python is not a file"),
        (["--rank", "2", "--", "x"], "unrecognized arguments: --rank"),
    ],
)
def test_bad_arguments_are_usage_errors(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        share_gpu.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("usage: python -m moe_ep_plugin.share_gpu [--ranks N]") and message in error


@pytest.mark.parametrize("with_mps", [True, False])
@pytest.mark.parametrize(("name", "status"), [("there-is-no-such-program", 127), ("/dev/null", 126)])
def test_command_that_can_not_be_run(fakes, with_mps, name, status):
    if not with_mps:
        fakes.env["CUDA_VISIBLE_DEVICES"] = ""
    result = fakes.run("--", name)
    assert result.returncode == status
    assert f"share_gpu: can't run {name}: " in result.stderr
    if with_mps:
        fakes.assert_stopped()
