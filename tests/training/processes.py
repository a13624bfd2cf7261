"""Starts `worker.py` processes and reads their answers."""

import json
import os
import pathlib
import socket
import subprocess
import sys

WORKER = pathlib.Path(__file__).parent / "worker.py"
ROOT = WORKER.parent.parent.parent


def start(folder, *options) -> subprocess.Popen:
  """A worker in the background, its output piped."""
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, str(WORKER), str(folder), *map(str, options)]
  return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)


def finish(process: subprocess.Popen, timeout: float = 120) -> tuple[int, dict | None, str]:
  """Exit code, the answer if one was printed, and all output."""
  try:
    out, err = process.communicate(timeout=timeout)
  except subprocess.TimeoutExpired:
    process.kill()
    out, err = process.communicate()
    raise AssertionError(f"worker hung:\n{out}\n{err}") from None
  lines = [line for line in out.splitlines() if line.startswith("answer ")]
  return process.returncode, json.loads(lines[-1][7:]) if lines else None, out + err


def wait_for(process: subprocess.Popen, text: str) -> None:
  """Reads output until a line equals `text`."""
  for line in process.stdout:
    if line.strip() == text:
      return
  raise AssertionError(f"worker ended before printing {text!r}: {process.stderr.read()}")


def free_port() -> int:
  """A port of the loopback that nobody listens on."""
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    return server.getsockname()[1]
