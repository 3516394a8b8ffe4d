"""A process that has imported everything and forks a `gossamer` command line on request.

Importing torch takes seconds, and these tests start a hundred processes. Each is a real process:
its own pid, environment, folder and streams; only the imports are shared. Reads one JSON request
per line: {"argv", "env", "cwd", "stdout", "stderr"}; answers {"pid"} at once and {"pid", "status"}
when the child has ended (negative: by that signal).
"""

import json
import os
import select
import signal
import sys
from pathlib import Path


def main():
    import gossamer.algorithms.tasks.bundled
    import gossamer.launch.cli
    import gossamer.launch.processes
    import gossamer.launch.report_page
    import gossamer.launch.run
    import gossamer.launch.start
    import gossamer.runtime.transports.torch_distributed  # noqa: F401

    answer({"ready": True})
    pending, buffered = set(), b""
    while True:
        if select.select([0], [], [], 0.01 if pending else None)[0]:
            chunk = os.read(0, 1 << 16)
            if not chunk:
                break
            *lines, buffered = (buffered + chunk).split(b"\n")
            for line in lines:
                pid = fork(json.loads(line))
                pending.add(pid)
                answer({"pid": pid})
        for pid in list(pending):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                pending.discard(pid)
                answer({"pid": pid, "status": os.waitstatus_to_exitcode(status)})
    for pid in pending:
        os.kill(pid, signal.SIGKILL)


def answer(message):
    os.write(1, json.dumps(message).encode() + b"\n")


def fork(request):
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        streams = [os.devnull, request["stdout"], request["stderr"]]
        for number, path in enumerate(streams):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND
            os.dup2(os.open(path, flags, 0o600), number)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        if request["limit_bytes"]:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit_bytes"],) * 2)
        sys.path.insert(0, str(Path.cwd()))
        sys.argv = ["gossamer", *request["argv"]]
        from gossamer.launch.cli import main as command_line

        command_line()
        status = 0
    except SystemExit as done:
        status = done.code if isinstance(done.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
