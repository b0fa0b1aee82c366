"""`sgcd submit COMMAND …`: the same command as a job on a Ray cluster, through Ray's Jobs API.

The cluster holds the program (its image, see infra/docker) and its own credentials. A job's
description can be read by everyone who sees the cluster's dashboard, so nothing secret goes in it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray_jobs.context import quoted
from ray_jobs.outcome import STOPPED, Outcome
from ray_jobs.session import TOKEN
from sgcd_core.errors import StorageError, UsageError
from sgcd_core.io.store import is_s3, local_path, s3_path

log = logging.getLogger(__name__)

#: Tries to go on reading a job's log when the connection breaks, and the pause between them.
TRIES, PAUSE_SECONDS = 10, 2.0
#: Last lines of Ray's message that are shown of a job that could not begin: the cause is the last.
_MESSAGE_LINES = 12
#: How long a stopped job may take to commit what is finished.
STOP_SECONDS = "60"
#: What a job may be called: Ray takes any name and cannot find one with a slash again.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
#: Words in the name of a variable whose value is likely secret.
_SECRET = ("SECRET", "TOKEN", "PASSWORD", "PASSWD", "ACCESS_KEY", "CREDENTIAL", "PRIVATE")
#: A password in an address.
_LOGIN = re.compile(r"://[^/\s]*:[^/\s]*@")
_SEEN = (
    "everyone who sees the cluster's dashboard could read it. Give the cluster its credentials "
    "itself: a role, or a secret mounted into its pods."
)
#: Arguments that name what a command writes, and those that name what it reads.
_WRITTEN, _READ = ("lake", "out"), ("config", "anatomy", "sources", "scans")
#: The setting that may name a file of weights.
_ENCODER = "target_stage.encoder"
#: Left out of working directories that are shipped: not code, or more than code.
_EXCLUDES = [".git", ".venv", "work", "shared", "dist", "build", "*.nii", "*.nii.gz", "__pycache__"]


def run(args: Any) -> Outcome:
    """Submit, follow the log, end with the job's exit code."""
    words = [args.job, *args.words]
    check_addresses(check_words(words), shipped=bool(args.working_dir))
    if args.id is not None and not _NAME.fullmatch(args.id):
        raise UsageError(f"--id {args.id!r} may hold letters, digits and . _ - alone.")
    job: dict[str, Any] = {
        "entrypoint": shlex.join(["sgcd", *words]),
        "metadata": {"sgcd_command": args.job},
        "runtime_env": runtime_env(args.env, args.working_dir),
    }
    if args.working_dir:  # its code, not the one that is installed there
        job["entrypoint"] = shlex.join(["python", "-m", "ray_jobs.cli", *words])
    if args.dry_run:
        text = f"would submit: {job['entrypoint']}"
        return Outcome(text, data=job | {"address": args.address, "id": args.id})
    client = connect(args.address)
    running = False
    if args.id:
        with _answered(args.address):
            job["submission_id"], running = _named(client, args.id)
    name: str = job["submission_id"] if running else _submit(client, job)
    where = f" --address {quoted(args.address)}" if args.address else ""
    follow = f"ray job logs{where} --follow {name}"
    data: dict[str, Any] = {"job": name, "entrypoint": job["entrypoint"], "joined": running}
    if args.no_wait:
        text = f"job {name} is running already" if running else f"submitted job {name}"
        return Outcome(text, next=follow, data=data)
    try:
        tail(client, name, args.address, quiet=args.json)
    except KeyboardInterrupt:
        text = f"stopped watching; job {name} goes on (stop it with `ray job stop{where} {name}`)"
        return Outcome(text, next=follow, exit_code=STOPPED, data=data)
    with _answered(args.address):
        status, code, message, began = ended(client, name)
    data |= {"status": status, "message": message}
    text = f"job {name} {status.lower()} with exit code {code}"
    # What ended it before it began is in no log of its own.
    lines = [] if began or code == 0 else message.strip().splitlines()[-_MESSAGE_LINES:]
    follow = "" if code == 0 else follow
    return Outcome(text, next=follow, exit_code=code, lines=lines, data=data)


def check_words(words: list[str]) -> Any:
    """Refuse here what the cluster would refuse: an unknown command, an option it does not have.

    Returns:
        The parsed arguments.

    Raises:
        UsageError: With what is wrong.
    """
    import contextlib
    import io

    from ray_jobs.parser import COMMANDS, build_parser

    if words[0] not in COMMANDS or words[0] == "submit":
        raise UsageError(f"`sgcd {words[0]}` is no command that can be submitted.")
    if any(_LOGIN.search(word) for word in words):
        raise UsageError(f"an address in the command has a password in it: {_SEEN}")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return build_parser().parse_args(words)
    except SystemExit:
        reason = said.getvalue().strip().rpartition("error: ")[2] or "asks for help only"
        raise UsageError(f"`sgcd {shlex.join(words)}`: {reason}") from None


def check_addresses(args: Any, *, shipped: bool) -> None:
    """Refuse addresses that mean another file or folder on the cluster than here.

    Args:
        args: Of the command.
        shipped: A checkout goes along, in which files to read may lie.

    Raises:
        UsageError: A path is relative to where this machine stands.
        StorageError: STORE-ADDRESS.
    """
    for address, written in _addresses(args):
        if is_s3(address):
            s3_path(address)
        elif not os.path.isabs(local_path(address)) and (written or not shipped):
            raise UsageError(
                f"{address} would be a file or folder of some machine of the cluster. Name an "
                "s3:// address, or by its full path one that all machines share."
            )


def _addresses(args: Any) -> Iterator[tuple[str, bool]]:
    """Every address that a command names, and whether the command writes there."""
    for name in (*_WRITTEN, *_READ):
        found = getattr(args, name, None) or []
        for address in [found] if isinstance(found, str) else found:
            yield address, name in _WRITTEN
    weights = [getattr(args, "features", None) or ""]
    pairs = (pair.partition("=") for pair in getattr(args, "settings", None) or ())
    weights += [value for key, _, value in pairs if key.strip() == _ENCODER]
    for spec in weights:
        name, colon, file = spec.partition(":")
        if is_s3(spec) or not colon:
            file = spec
        if file and (file != name or "/" in file or "." in file):
            yield file, False


def runtime_env(pairs: list[str], working_dir: str | None) -> dict[str, Any]:
    """Ray's runtime environment: variables and, if asked for, local code.

    Raises:
        UsageError: A variable looks secret, has no value or a password in it, or the folder is
            none.
    """
    # A job that is stopped commits what is finished; Ray's own three seconds may not be enough.
    env: dict[str, str] = {"RAY_JOB_STOP_WAIT_TIME_S": STOP_SECONDS}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if any(word in name.upper() for word in _SECRET):
            raise UsageError(f"--env {name}: {_SEEN}")
        if not sign:
            if name not in os.environ:
                raise UsageError(f"--env {name}: it is not set here. Write {name}=VALUE.")
            value = os.environ[name]
        if _LOGIN.search(value):
            raise UsageError(f"--env {name} has a password in it: {_SEEN}")
        env[name] = value
    found: dict[str, Any] = {"env_vars": env}
    if working_dir:
        if not os.path.isdir(os.path.join(working_dir, "ray_jobs")):
            raise UsageError(f"--working-dir {working_dir} holds no checkout of this program.")
        found |= {"working_dir": working_dir, "excludes": _EXCLUDES}
    return found


def connect(address: str | None) -> Any:
    """A client of the cluster's Jobs API; Ray adds its token where RAY_AUTH_MODE=token.

    Raises:
        StorageError: CLUSTER when it does not answer or refuses the token.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(address)
    except Exception as error:
        # Ray raises whatever it finds: ConnectionError, RuntimeError, ValueError, its own.
        raise cluster_error(error, address) from error


def cluster_error(error: Exception, address: str | None) -> StorageError:
    """What Ray raised, with a way on."""
    text = str(error)
    hint = "Give --address (http://HEAD:8265) or RAY_API_SERVER_ADDRESS, and check that it is up."
    refused = any(sign in text for sign in ("uthentication", "Unauthorized", "Forbidden", "token"))
    if refused:
        hint = f"Set {TOKEN}."
    what = "refuses this token" if refused else "does not answer"
    return StorageError(
        f"the Ray cluster {what} ({type(error).__name__}).", code="CLUSTER",
        where=address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
        or "this machine", hint=hint,
    )  # fmt: skip


def _named(client: Any, name: str) -> tuple[str, bool]:
    """A job NAME or NAME-2, NAME-3, … that runs, and True; else the next free one, and False."""
    runs = {
        int(job.submission_id[len(name) + 1 :] or 1): job
        for job in client.list_jobs()
        if re.fullmatch(re.escape(name) + r"(-[0-9]+)?", job.submission_id or "")
    }
    for number in sorted(runs, reverse=True):
        if not runs[number].status.is_terminal():
            return str(runs[number].submission_id), True
    return (f"{name}-{max(runs) + 1}" if runs else name), False


def _submit(client: Any, job: dict[str, Any]) -> str:
    try:
        return str(client.submit_job(**job))
    except (RuntimeError, ConnectionError) as error:
        raise StorageError(
            f"the cluster did not take the job: {str(error).strip().splitlines()[-1][:300]}",
            code="CLUSTER",
        ) from error


@contextmanager
def _answered(address: str | None) -> Iterator[None]:
    """Raise CLUSTER where the head does not answer."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        raise cluster_error(error, address) from error


def tail(client: Any, name: str, address: str | None = None, *, quiet: bool = False) -> None:
    """Print the job's log until it ends; a connection that breaks is made again.

    Raises:
        StorageError: CLUSTER, the head stays away, or has forgotten the job.
    """
    from aiohttp import ClientError

    stream = sys.stderr if quiet else sys.stdout
    shown = 0

    async def follow() -> None:
        nonlocal shown
        passed = 0  # a new connection begins at the first line again
        async for text in client.tail_job_logs(name):
            fresh = text[max(0, shown - passed) :]
            passed += len(text)
            shown = max(shown, passed)
            if fresh:
                print(fresh, end="", file=stream, flush=True)

    failures = 0
    while True:
        before = shown
        try:
            asyncio.run(follow())
            if client.get_job_status(name).is_terminal():
                return
        except (RuntimeError, OSError, ClientError) as error:
            log.info("event=log_broken job=%s error=%s", name, type(error).__name__)
            if _is_forgotten(client, name):
                raise StorageError(
                    f"the head knows no job {name} any more: it was started anew.", code="CLUSTER",
                    where=address, hint="Run the same command again; what is done stays done.",
                ) from error  # fmt: skip
            failures = failures + 1 if shown == before else 1
            if failures >= TRIES:
                raise cluster_error(error, address) from error
        time.sleep(PAUSE_SECONDS)


def _is_forgotten(client: Any, name: str) -> bool:
    """Whether the head answers, and knows no such job."""
    try:
        client.get_job_status(name)
    except RuntimeError as error:
        return f"{name} does not exist" in str(error)
    except OSError:
        pass
    return False


def ended(client: Any, name: str) -> tuple[str, int, str, bool]:
    """Status, exit code and message of a job that has ended, and whether it had begun."""
    info = client.get_job_info(name)
    status, code = info.status.value, info.driver_exit_code
    began = code is not None or status == "STOPPED"
    if status == "STOPPED":  # by a person: the same command goes on
        code = STOPPED
    elif code is None:
        code = 0 if status == "SUCCEEDED" else StorageError.exit_code
    code = code if code >= 0 else StorageError.exit_code
    return status, code, str(info.message or ""), began
