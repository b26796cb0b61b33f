"""One attempt of a job at its stage: what the batch script runs on the first node, around srun.

It passes signals on, ends a step that hangs, and says in the run folder how the attempt went. Its exit code tells the script what
to do: 0 done; 2 unusable input, 3 refused; 75 back into the queue; 130 cancelled; 1 the same command would not get further.

A stage that failed for a reason of its own says 2 or 3, and stops the chain. Anything else may be the machine (a node that went
away, a rank that fell silent, a collective that timed out, memory): it is tried again, as after an interruption, unless two
attempts in a row have committed nothing.
"""

import argparse
import math
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from configs.cluster import seconds_of
from configs.errors import Busy, Interrupted, Refused, TracestillError, UnusableInput
from data.store import ROLLUP, RunFolder
from slurm import attempts
from slurm.attempts import Attempt, JobFolder
from slurm.chain import jobs_of
from slurm.client import SlurmFailed, call, own_address, queued
from slurm.nodes import HealthUnknown, leave_out, unfit_nodes
from slurm.progress import progress_of
from slurm.servers import close_servers, wait_for_server
from slurm.step import WARNED, Step, say
from slurm.topology import TOGETHER

LOOKS, LOOK_S = 4, 3.0
CANCELLED = 130
STOPPED = (Interrupted.exit_code, 128 + signal.SIGTERM, 128 + signal.SIGUSR2)
"""Of several nodes, srun ends those that are still stopping with SIGTERM once the first has ended with 75; the highest code
counts."""
_ERROR = re.compile(rb"^(?:\d+: )?(error: .*|slurmstepd(?:-\S+)?: error: .*|srun: error: .*)$", re.MULTILINE)
_EXITED = re.compile(rb"^srun: error: .*: Exited with exit code (\d+)$", re.MULTILINE)
_ASKED = re.compile(rb"^error: stopped by SIG")
TAIL_BYTES = 1 << 16
FULL_BYTES = 1 << 20
BAD_NODE, EARLY, BUSY = "bad node", "not begun", "busy"
NOT_BEGUN = (BAD_NODE, EARLY, BUSY)
"""Attempts that say nothing about progress."""
MAX_BUSY = 30
"""Times that a job may find another process at its stage, which has committed nothing in between: an hour, at the two minutes
that Slurm holds what is requeued. A controller that was killed has been seen to launch a job twice."""


class Verdict(NamedTuple):
    """code: this program's. outcome: one word for people and for `tracestill status`. reason: why, as one line."""

    code: int
    outcome: str
    reason: str


def judge(code: int, *, hung: str, cancelled: bool, said: str, earlier: Sequence[Attempt], before: str, after: str) -> Verdict:
    """What becomes of the job.

    code: the step's. hung: what the watchdog saw. said: the step's last word of an error. earlier: this job's other attempts,
    oldest first. before, after: what was committed when this one began, and now.
    """
    if code == 0 and not hung:
        return Verdict(0, "done", "")
    if code in (UnusableInput.exit_code, Refused.exit_code):
        return Verdict(code, "refused" if code == Refused.exit_code else "unusable", said)
    if cancelled:
        return Verdict(CANCELLED, "cancelled", said or "it was asked to end")
    why = hung or said or f"exit code {code}"
    if code == Busy.exit_code and Busy.says in said:
        waited = sum(one.outcome == BUSY and one.after == after for one in earlier)
        return Verdict(TracestillError.exit_code, "stuck", why) if waited >= MAX_BUSY else Verdict(code, BUSY, why)
    earlier = [one for one in earlier if one.outcome not in NOT_BEGUN]
    asked = code in STOPPED
    if earlier and earlier[-1].before == before == after:
        return Verdict(TracestillError.exit_code, "stuck", f"no progress in two attempts ({after or 'nothing committed'}): {why}")
    return Verdict(Interrupted.exit_code, "hung" if hung else "interrupted" if asked else "failed", why)


def is_scancelled() -> bool:
    """Somebody has ended the job by Slurm's own command: requeueing would bring it back. False where Slurm does not say."""
    try:
        return says_cancelled(call("scontrol", "--oneliner", "show", "job", own_address()))
    except (SlurmFailed, UnusableInput):
        return False


def says_cancelled(shown: str) -> bool:
    """Of what scontrol shows of a job. While processes of a job that Slurm ends are there it is COMPLETING, and Slurm 22.05 hides
    why: after a preemption there is a PreemptTime, and at the time limit the time is used up."""
    fields = dict(word.split("=", 1) for word in shown.split() if "=" in word)
    state = fields.get("JobState", "")
    if "CANCELLED" in state or "COMPLETING" not in state:
        return "CANCELLED" in state
    try:
        is_over_time = seconds_of(fields["RunTime"]) >= seconds_of(fields["TimeLimit"])
    except (KeyError, ValueError):  # UNLIMITED
        is_over_time = False
    return fields.get("PreemptTime", "None") == "None" and not is_over_time


def stage_shards(options: argparse.Namespace, beat: Path) -> tuple[int, str]:
    """On every node of the job, once; watched over like the step itself. Returns the exit code, and what the watchdog saw.

    Raises _StoppedEarly when Slurm has ended it: this program hears of a preemption only where the site has it so.
    """
    command = ["srun", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--wait=0", sys.executable, "-P", "-m", "slurm.staging",
               options.staging, options.staged]  # fmt: skip
    step = Step(command, beat, options.silence, options.warning, options.loading)
    start = options.log.stat().st_size if options.log.is_file() else 0
    code, hung = step.wait()
    _hear_signals()
    beat.unlink(missing_ok=True)  # the step's own first count is still to come
    if step.was_asked:
        raise _StoppedEarly("a signal while shards were staged")
    failed = any(chosen not in STOPPED for chosen in chosen_codes(options.log, start))  # srun ended the others because of one
    if code in STOPPED and not hung and not failed:
        raise _StoppedEarly("Slurm while shards were staged")
    code = own_code(options.log, start, code)
    return (TracestillError.exit_code if code in STOPPED else code), hung


def last_error(log: Path | None, start: int) -> str:
    """The last line in which the step, or Slurm on its behalf, names an error; empty when there is none. When one node's part has
    failed, srun ends the others', which say that they were stopped: that is not the reason."""
    found = _ERROR.findall(_tail(log, start))
    own = [line for line in found if line.startswith(b"error: ")]
    reasons = [line for line in own if not _ASKED.match(line)]
    others = [line for line in found if b"Exited with exit code" not in line]  # that is known
    return (reasons or own or others or [b""])[-1].decode(errors="replace").removeprefix("error: ")


def own_code(log: Path | None, start: int, code: int) -> int:
    """The step's, by its own choice where one of its nodes chose: srun's is the highest of all nodes', and those that it ended
    because of that one say 75 or 143."""
    chosen = chosen_codes(log, start)
    return next((wanted for wanted in (Refused.exit_code, UnusableInput.exit_code) if code and wanted in chosen), code)


def chosen_codes(log: Path | None, start: int) -> list[int]:
    """With which nodes of the step have exited by themselves, as srun says when it was not 0."""
    return [int(found) for found in _EXITED.findall(_tail(log, start))]


def _full_disk(run: RunFolder) -> str:
    """A step that cannot write its log cannot say why, either."""
    return "" if shutil.disk_usage(run.root).free >= FULL_BYTES else f"{run.root}: no space left, for its log either; make room"


def _tail(log: Path | None, start: int) -> bytes:
    """What was added to the log since it had `start` bytes, the end of it."""
    if log is None:
        return b""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - TAIL_BYTES))
            return file.read()
    except OSError:
        return b""


def main(words: Sequence[str]) -> int:
    """What the batch script says. Returns the exit code."""
    options = _options().parse_args(words)
    _hear_signals()
    run, job_id = RunFolder(options.run_dir), int(os.environ["SLURM_JOB_ID"])
    folder, stage = JobFolder.of(run), options.stage
    before = after = ""
    earlier = attempts.attempts_of(folder, stage, job_id)
    try:
        try:
            before = after = progress_of(run, stage)
        finally:
            _note(lambda: _begin(folder, stage, job_id, before))
        if (verdict := prevented(options, run, job_id, earlier, before)) is None:
            start = options.log.stat().st_size if options.log.is_file() else 0
            beat = folder.beat(stage, job_id)
            code, hung = Step(options.command, beat, options.silence, options.warning, options.loading).wait()
            after = progress_of(run, stage)
            said = last_error(options.log, start) or (_full_disk(run) if code else "")
            code = own_code(options.log, start, code)
            if stage == "serve" and folder.closed.exists():
                verdict = Verdict(0, "done", "nobody asks it any more")
            else:
                is_over = folder.cancelled.exists() or (code in STOPPED and is_scancelled())
                verdict = judge(code, hung=hung, cancelled=is_over, said=said, earlier=earlier, before=before, after=after)
        else:
            code = verdict.code
    except _StoppedEarly as stop:
        code = Interrupted.exit_code
        is_over = folder.cancelled.exists() or is_scancelled()
        verdict = Verdict(CANCELLED if is_over else code, EARLY, f"stopped by {stop} before the step began")
    except (OSError, SlurmFailed) as error:  # what is away for a moment; it is the same to the next attempt, or it is not
        said = f"{error.filename or run.root}: {error.strerror}" if isinstance(error, OSError) else str(error)
        code = Interrupted.exit_code
        verdict = judge(code, hung="", cancelled=False, said=said, earlier=earlier, before=before, after=after)
    except TracestillError as error:  # a damaged file of the run, which whoever reads next would meet too
        code, verdict = error.exit_code, Verdict(error.exit_code, "unusable", str(error))
    _note(lambda: attempts.end(
        folder, stage, job_id, after=after, code=code, outcome=verdict.outcome, reason=verdict.reason
    ))  # fmt: skip
    if options.closes_servers and verdict.code in (0, UnusableInput.exit_code, Refused.exit_code):
        close_servers(run)
    if verdict.code != 0:
        say(f"{stage}: {verdict.outcome}: {verdict.reason}")
    return verdict.code


def prevented(
    options: argparse.Namespace, run: RunFolder, job_id: int, earlier: Sequence[Attempt], before: str
) -> Verdict | None:  # fmt: skip
    """Why the step is not begun; None: it can be."""
    if len(earlier) > 1 and not any(one.ended or one.before != before for one in earlier[-2:]):
        return Verdict(TracestillError.exit_code, "stuck", "two attempts in a row were killed before they could leave a word")
    if other := _other_at(run, options.stage, job_id):
        said = f"job {other}: {Busy.says}"
        return judge(Busy.exit_code, hung="", cancelled=False, said=said, earlier=earlier, before=before, after=before)
    is_cancelled = JobFolder.of(run).cancelled.exists
    missing = "" if is_cancelled() else _missing_input(run, options.input)
    if options.asks_servers and not missing and not is_cancelled():
        missing = wait_for_server(run)
    if is_cancelled():
        return Verdict(CANCELLED, "cancelled", "the run was cancelled before this attempt began")
    if missing:
        return Verdict(UnusableInput.exit_code, "unusable", missing)
    try:
        unfit = {} if options.health is None else unfit_nodes(options.health)
    except HealthUnknown as error:
        said = f"health check: {error}"
        return judge(1, hung="", cancelled=False, said=said, earlier=earlier, before=before, after=before)
    except Interrupted as stop:
        raise _StoppedEarly(f"{stop} during the health check") from stop
    if unfit:
        left = leave_out(run, job_id, unfit, times=sum(one.outcome == BAD_NODE for one in earlier))
        if left.is_futile:
            return Verdict(TracestillError.exit_code, "stuck", left.reason)
        return Verdict(Interrupted.exit_code, BAD_NODE, left.reason)
    if options.staging:
        start = options.log.stat().st_size if options.log.is_file() else 0
        code, hung = stage_shards(options, JobFolder.of(run).beat(options.stage, job_id))
        if code or hung:
            said = last_error(options.log, start)
            return judge(code, hung=hung, cancelled=False, said=said, earlier=earlier, before=before, after=before)
    return None


def _other_at(run: RunFolder, stage: str, job_id: int) -> int | None:
    """Another job that has begun this stage before us. Its lock on the run folder would tell too, but for file systems whose
    locks hold on one node alone (Lustre with localflock); workers that generate have leases besides."""
    if stage in TOGETHER:
        return None
    folder = JobFolder.of(run)
    try:
        others = [job.job_id for job in jobs_of(run, queued()).get(stage, []) if job.state == "RUNNING" and job.job_id != job_id]
    except (SlurmFailed, UnusableInput):
        return None
    newest = {job: found[-1] for job in (*others, job_id) if (found := attempts.attempts_of(folder, stage, job))}
    begun = {job: (one.started, job) for job, one in newest.items() if one.ended is None}
    return next((job for job in others if job in begun and job_id in begun and begun[job] < begun[job_id]), None)


def _begin(folder: JobFolder, stage: str, job_id: int, before: str) -> None:
    folder.beat(stage, job_id).parent.mkdir(parents=True, exist_ok=True)
    folder.beat(stage, job_id).unlink(missing_ok=True)  # of an earlier attempt
    restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    attempts.begin(folder, stage, job_id, restart, os.environ.get("SLURM_JOB_NODELIST", ""), before)


def _note(write: Callable[[], None]) -> None:
    """Records of attempts are for people and for the rule of two attempts in vain: a full disk must not make a stage that is done
    look as if it had failed."""
    try:
        write()
    except OSError as error:
        say(f"slurm/attempts: {error.strerror}: this attempt is not recorded")


class _StoppedEarly(BaseException):
    """A signal before the step: nothing has begun, and the job goes back into the queue."""


def _hear_signals() -> None:
    for number in WARNED:
        signal.signal(number, _stop_before_the_step)


def _stop_before_the_step(number: int, _: FrameType | None) -> None:
    raise _StoppedEarly(signal.Signals(number).name)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m slurm.attempt", description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--input", help="folder of the run whose manifest has to be there")
    parser.add_argument("--log", type=Path, required=True, help="where the step's words go")
    parser.add_argument("--silence", type=float, required=True, help="seconds without a count after which the step hangs")
    parser.add_argument("--loading", type=float, default=math.inf, help="likewise, before the first count")
    parser.add_argument("--warning", type=float, required=True, help="seconds that a step has for stopping when it is asked to")
    parser.add_argument("--health", type=shlex.split, help="words of python -m slurm.health, asked on every node first")
    parser.add_argument("--staging", help="folder of shards to copy to every node first")
    parser.add_argument("--staged", help="where to on the node; variables in it are filled in there")
    parser.add_argument("--asks-servers", action="store_true", help="wait until a server of the teacher has registered")
    parser.add_argument("--closes-servers", action="store_true", help="nobody asks the teacher's servers after this stage")
    parser.add_argument("command", nargs="+")
    return parser


def _missing_input(run: RunFolder, folder: str | None) -> str:
    """A dependency can be satisfied by a job that wrote nothing; the manifest is the proof."""
    if folder is None:
        return ""
    for _ in range(LOOKS):  # another node's view of a shared folder may be a moment old
        if (run.root / folder / ROLLUP).is_file():
            return ""
        time.sleep(LOOK_S)
    return f"{run.root / folder / ROLLUP} does not exist: the stage before has not finished"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
