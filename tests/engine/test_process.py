"""What the command line sets in its process: a Ctrl-C that arrives twice interrupts once."""

import subprocess
import sys
import textwrap

PROGRAM = """
    import os, signal, sys, time, types
    from glm_rlhf.engine import cli, process
    now = [0.0]
    time.monotonic = lambda: now[0]
    interrupts = []
    def run(_config):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:  # as torchrun passes on what the terminal has sent
            for seconds in (0.1, 2.0, 2.5):
                now[0] = seconds
                try:
                    os.kill(os.getpid(), signal.SIGINT)
                except KeyboardInterrupt:
                    interrupts.append(seconds)
    sys.modules["waiting"] = types.SimpleNamespace(run=run)
    command = cli.Command(name="doctor", summary="", root="config.tools:DoctorConfig", function="waiting:run")
    cli.COMMANDS = (command,)
    sys.argv = ["glm-rlhf", "doctor"]
    signal.signal(signal.SIGINT, signal.SIG_IGN if os.environ.get("IGNORES") else signal.default_int_handler)
    code = cli.main()
    os.kill(os.getpid(), signal.SIGINT)  # while the process ends
    print(code, interrupts)
"""


def test_a_ctrl_c_that_arrives_twice_is_one_line():
    program = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "130 [2.5]\n", done.stderr
    assert done.stderr == "glm-rlhf doctor: interrupted\n"


def test_a_background_job_ignores_it(monkeypatch):
    monkeypatch.setenv("IGNORES", "1")
    program = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert (done.stdout, done.stderr) == ("0 []\n", "")


LATER = """
    import atexit, os, signal, sys, time, types
    from glm_rlhf.engine import cli
    from glm_rlhf.parallel.runtime.preemption import handle_preemption_signals
    def run(_config):
        with handle_preemption_signals():
            os.kill(os.getpid(), signal.SIGINT)
            later = time.monotonic() + 2.5
            time.monotonic = lambda: later
            atexit.register(print, "the interpreter ends in its own time")
            os.kill(os.getpid(), signal.SIGINT)
            print("the run continues")
    sys.modules["training"] = types.SimpleNamespace(run=run)
    options = dict(name="doctor", summary="", root="config.tools:DoctorConfig", function="training:run")
    cli.COMMANDS = (cli.Command(**options),)
    sys.argv = ["glm-rlhf", "doctor"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(cli.main())
"""


def test_a_later_ctrl_c_ends_a_training_run_at_once():
    program = [sys.executable, "-c", textwrap.dedent(LATER)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines() == [
        "Ctrl-C: the run saves and exits as soon as it can; another one ends it without a save",
        "Ctrl-C again, more than 2 s after the first: the run ends without a save",
        "glm-rlhf doctor: interrupted",
    ]
