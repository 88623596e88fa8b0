"""tests/support/on_gpus.py: its plan, and a trial of a lane."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import on_gpus
import pytest


@pytest.fixture
def problems(dev_problems_file, tmp_path) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(dev_problems_file.read_text().splitlines(keepends=True)[:12]))
    return path


@pytest.mark.parametrize("trial", [True, False])
def test_steps_need_steps_that_there_are(problems, tmp_path, trial):
    options = argparse.Namespace(
        data=problems, dev=problems, gguf=problems, next=tmp_path, trial=trial
    )
    lanes = on_gpus.plan(options, tmp_path)
    steps = [step for lane in lanes.values() for step in lane]
    names = [step.name for step in steps]
    assert len(set(names)) == len(names) > 20
    assert {name for step in steps for name in step.needs + step.after} <= set(names)


def test_what_fails_leaves_out_what_needs_it(tmp_path):
    def step(name: str, code: str, *needs: str, seconds: int = 60, after=()) -> on_gpus.Step:
        return on_gpus.Step(name, seconds, (sys.executable, "-c", code), needs=needs, after=after)

    runner = on_gpus.Runner(tmp_path, minutes=5)
    late = step("late", "import time; time.sleep(300)", seconds=1)
    first = [step("fails", "raise SystemExit(3)"), late]
    here = step("goes on", "print('here')", "waits too", after=("fails", "waits"))
    second = [step("waits", "", "fails"), here]
    cores = os.sched_getaffinity(0)
    threads = [runner.lane(lane, cores) for lane in (first, second, [step("waits too", "")])]
    for thread in threads:
        thread.join()
    assert runner.ended == {"fails": 3, "late": -9, "waits": -1, "waits too": 0, "goes on": 0}
    assert (tmp_path / "goes on.log").read_text() == "here\n"
    assert "left out waits" in (tmp_path / "steps.txt").read_text()


@pytest.mark.slow
def test_a_trial(problems, tmp_path):
    command = [sys.executable, "-P", on_gpus.__file__, tmp_path / "out", "--trial"]
    command += ["--data", problems, "--dev", problems, "--lanes", "base,twin,models"]
    subprocess.run([str(part) for part in command], check=True, timeout=500)
    steps = (tmp_path / "out/steps.txt").read_text().splitlines()
    assert [line.rsplit(" ", 1)[1] for line in steps if " end " in line] == ["0"] * 6
