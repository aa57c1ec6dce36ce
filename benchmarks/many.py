"""Run many configurations of quality.py, several at a time on one GPU, and bundle their results.

    python benchmarks/many.py jobs.txt --parallel 8 --limit 560 --out results.json -- --model DIR --tokens tokens/

Each line of jobs.txt holds the options of one run (see quality.py); '#' starts a comment. Runs share the GPU, so that
one computes while another loads or evaluates; step times then mean nothing, perplexities do not change. The bundle is
written anew whenever a run has ended.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs")
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--limit", type=float, default=3600, help="seconds, after which what is running is dropped")
    parser.add_argument("--out", required=True)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, common = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    jobs = [line.split("#")[0].strip() for line in Path(args.jobs).read_text().splitlines()]
    waiting = [job for job in jobs if job]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        running: list[tuple[subprocess.Popen, str, str]] = []
        number = 0
        while waiting or running:
            while waiting and len(running) < args.parallel:
                job = waiting.pop(0)
                script = str(Path(__file__).with_name("quality.py"))
                log = f"{folder}/{number:03}.log"
                command = [
                    sys.executable,
                    script,
                    "run",
                    *common,
                    *shlex.split(job),
                    "--out",
                    f"{folder}/{number:03}.json",
                ]
                with open(log, "w") as errors:  # the child keeps its own copy of the descriptor
                    running.append((subprocess.Popen(command, stderr=errors), job, log))
                number += 1
            time.sleep(0.5)
            for process, job, log in list(running):
                if process.poll() is not None:
                    running.remove((process, job, log))
                    if process.returncode:
                        print(f"FAILED {job}\n{Path(log).read_text()[-1500:]}", flush=True)
                    bundle(folder, args.out)
            if time.monotonic() - started > args.limit:
                for process, job, _ in running:
                    process.kill()
                    print(f"DROPPED {job}")
                print(f"NOT STARTED {waiting}")
                break


def bundle(folder: str, out: str) -> None:
    """One file with the results of all runs that have ended."""
    write_json(Path(out), {"runs": [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]})


if __name__ == "__main__":
    main()
