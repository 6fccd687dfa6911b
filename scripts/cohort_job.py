"""python scripts/cohort_job.py runs/cohort/jobs/p1.json 4 0

The scripts that one patient of scripts/cohort.py goes through, one after another, each in a process of its own: on
4 threads and GPU 0 (without the last: on those that they find). What they print goes into p1.log, what is done
into p1.json.

It needs nothing but Python: it waits as long as a fit takes, and must outlive whatever happens to that.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

if sys.platform != "win32":  # where nothing keeps two commands from working on the same patient
    import fcntl

SCRIPTS = Path(__file__).resolve().parent
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")


def main(path: Path, threads: str, gpu: str | None = None) -> int:
    """Run those steps of `path` that aren't done. 1: one failed, or another process is at work; else 0."""
    environment = {**dict.fromkeys(THREADS, threads), **os.environ}  # what the user has set holds
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    log = path.with_suffix(".log")
    with log.open("ab") as file:
        for _ in range(20):  # whoever looks at it does so for an instant
            if claimed(file):
                break
            time.sleep(0.05)
        else:
            return 1
        job = json.loads(path.read_text(encoding="utf-8"))
        job["failure"] = ""
        write(path, job)  # killed from now on, it has no result
        for step, overrides in job["steps"].items():
            if step in job["seconds"]:
                continue
            file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {step}\n".encode())
            file.flush()
            begin, start = file.tell(), time.perf_counter()
            code = run([sys.executable, str(SCRIPTS / f"{step}.py"), *overrides], environment, file)
            spent = job.setdefault("spent", {})  # of all attempts: one that was interrupted goes on
            spent[step] = round(spent.get(step, 0.0) + time.perf_counter() - start, 3)
            if code == 0:
                job["seconds"][step] = spent[step]
            else:
                job["failure"] = f"{step}: {reason(code, log, begin)}"
            write(path, job)
            if code != 0:
                return 1
    return 0


def claimed(log: IO[bytes], shared: bool = False) -> bool:
    """Whether no other process works on this patient. The claim ends with the last process that has the log open,
    however that ends. A shared one is for looking: several may look."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(log, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def run(command: list[str], environment: dict[str, str], log: IO[bytes]) -> int:
    """The exit code of a command; the end of this process is passed on to it, so that it can save first."""
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    return process.wait()


def reason(code: int, log: Path, begin: int) -> str:
    """Why a step failed, in a line: what ended it, or its own words."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}" + (", out of memory perhaps" if code == -9 else "")
    with log.open("rb") as file:
        file.seek(begin)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit code {code}"])[-1]


def write(path: Path, job: dict[str, Any]) -> None:
    """All at once or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
