"""A function called in a process of its own, whose result is kept in a file.

So memory, threads and warm-up are the function's own, a crash is only its own, and what is done stays
done: a result that is there is not computed again.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from machine import ROOT, machine

from stnerp import InputError, StnerpError

Rerun = Literal["none", "failed", "all"]


def recorded(
    path: Path, function: str, arguments: Mapping[str, Any], timeout_s: float, rerun: Rerun = "none"
) -> dict[str, Any]:
    """The record of a function's call: read where there is one, else made now.

    Args:
        path: of the record, a .json; what the function prints goes into a .log beside it.
        function: "module:name" of this folder; it takes the arguments by name and returns a JSON object.
        arguments: anything that JSON can write.
        timeout_s: then the process and all its children are ended, and the call counts as failed.
        rerun: records that are made again: none, those that failed, or all.

    Returns:
        `arguments`, `result` (empty where it failed), `failure` (empty where it didn't, else one line),
        and `machine`.

    Raises:
        InputError: the record there is of other arguments.
    """
    asked = json.loads(json.dumps(dict(arguments)))  # as they will be read again: no tuples
    if path.is_file() and rerun != "all":
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not (record["failure"] and rerun == "failed"):
            if record["arguments"] != asked:
                raise InputError(f"{path}: was measured with other settings; choose another out= or rerun=true")
            return record
    path.parent.mkdir(parents=True, exist_ok=True)
    result, failure = _call(path, function, asked, timeout_s)
    record = {"arguments": asked, "result": result, "failure": failure, "machine": machine()}
    write_json(path, record)
    return record


def write_json(path: Path, value: Any) -> None:
    """All at once or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _call(path: Path, function: str, arguments: dict[str, Any], timeout_s: float) -> tuple[dict[str, Any], str]:
    """The function's result and the reason why there is none."""
    answer = path.with_name(f".{path.stem}.answer")
    answer.unlink(missing_ok=True)
    command = [sys.executable, __file__, function, str(answer)]
    with path.with_suffix(".log").open("w", encoding="utf-8") as log:
        # A session of its own, so that its children can be ended with it.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, start_new_session=True
        )
        try:
            process.communicate(json.dumps(arguments), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return {}, f"stopped after {timeout_s:g} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if not answer.is_file():
        code = process.returncode
        how = f"killed by {signal.Signals(-code).name}, out of memory perhaps" if code < 0 else f"exit code {code}"
        return {}, f"the process ended without an answer ({how}); see {path.with_suffix('.log').name}"
    value = json.loads(answer.read_text(encoding="utf-8"))
    answer.unlink()
    return value["result"], value["failure"]


def answered(function: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """What a function returns, and in one line why it failed if it did; a traceback goes to stderr."""
    module, _, name = function.partition(":")
    try:
        return getattr(importlib.import_module(module), name)(**arguments), ""
    except Exception as error:
        traceback.print_exc()
        reason = " ".join(str(error).split()) or "no reason given"
        return {}, reason if isinstance(error, StnerpError) else f"{type(error).__name__}: {reason}"


if __name__ == "__main__":
    sys.path.append(str(ROOT / "scripts"))
    result, failure = answered(sys.argv[1], json.load(sys.stdin))
    write_json(Path(sys.argv[2]), {"result": result, "failure": failure})
