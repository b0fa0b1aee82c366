"""Can this process work on a lake: credentials, reading, writing, conditional writes, clock?

Asked before long work, so it answers within seconds, whatever the store does.
"""

from __future__ import annotations

import threading
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Literal

from sgcd_core.errors import SgcdError, StorageError
from sgcd_core.io.store import Store, is_s3, join, local_path

#: Seconds a store has to answer all questions.
DEADLINE_SECONDS = 3.0
#: Clock difference that is said, and that is refused. S3 itself refuses 900 s.
SKEW_SAID, SKEW_REFUSED = 30.0, 300.0


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: Its name.
        answer: ok, warn or fail.
        found: A sentence; of a failure it says what to do.
        code: Stable code of a failure.
    """

    check: str
    answer: Literal["ok", "warn", "fail"]
    found: str
    code: str = ""


def check_lake(uri: str, *, seconds: float = DEADLINE_SECONDS) -> list[Finding]:
    """Ask the store at `uri`; at most `seconds` long, never raises for what it finds.

    One small object is written under the lake and deleted again.
    """
    if is_s3(uri):
        import botocore.session  # noqa: F401  loading it is this machine's time, not the store's
    found: list[Finding] = []
    done = threading.Event()

    def ask() -> None:
        for question in (_credentials, _access):
            found.extend(question(uri))
            if any(finding.answer == "fail" for finding in found):
                break
        done.set()

    # A daemon: a store that never answers must not keep the process from ending.
    threading.Thread(target=ask, daemon=True, name="lake-check").start()
    if not done.wait(seconds):
        text = f"no answer within {seconds:g} s. Check AWS_ENDPOINT_URL, the network and the mount."
        return [*list(found), Finding("store", "fail", text, "STORE-UNREACHABLE")]
    return found


def require_lake(uri: str, *, seconds: float = DEADLINE_SECONDS) -> list[Finding]:
    """`check_lake`, for a command that cannot go on after a failure.

    Raises:
        StorageError: With the code and sentence of the first failure.
    """
    found = check_lake(uri, seconds=seconds)
    for finding in found:
        if finding.answer == "fail":
            raise StorageError(finding.found, code=finding.code, where=uri)
    return found


def clock_finding(seconds: float, whose: str) -> Finding:
    """What a clock that runs `seconds` behind (negative: ahead of) `whose` means."""
    side = "behind" if seconds > 0 else "ahead of"
    off = abs(seconds)
    if off < SKEW_SAID:
        return Finding("clock", "ok", f"agrees with {whose}")
    text = f"this machine's clock is {off:.0f} s {side} {whose}"
    if off < SKEW_REFUSED:
        return Finding("clock", "warn", text)
    text += (
        f"; {SKEW_REFUSED:.0f} s are allowed, since the newest row of a scan is told by its time. "
        "Set it (NTP)."
    )
    return Finding("clock", "fail", text, "STORE-DENIED")


def _credentials(uri: str) -> list[Finding]:
    """Where the credentials come from; nothing of the credentials themselves."""
    if not is_s3(uri):
        return []
    from sgcd_core.io import s3

    if s3.anonymous():
        return [Finding("credentials", "ok", "none: unsigned requests (SGCD_S3_ANON=1)")]
    from botocore.exceptions import BotoCoreError
    from botocore.session import get_session

    try:
        have = get_session().get_credentials()
    except BotoCoreError as error:
        text = f"they cannot be read ({type(error).__name__}). Check AWS_PROFILE and its files."
        return [Finding("credentials", "fail", text, "STORE-DENIED")]
    if have is None:
        text = "none. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or a role."
        return [Finding("credentials", "fail", text, "STORE-DENIED")]
    if have.token and not hasattr(have, "refresh_needed"):
        text = f"from {have.method}, temporary: a job that outlives them stops with STORE-EXPIRED"
        return [Finding("credentials", "warn", text)]
    return [Finding("credentials", "ok", f"from {have.method}")]


def _access(uri: str) -> list[Finding]:
    """Write, read, refuse to overwrite, tell the time, delete."""
    where, store = join(uri, f"preflight-{uuid.uuid4().hex}.txt"), Store()
    made = [] if is_s3(uri) else _missing(Path(local_path(uri)))
    try:
        before = datetime.now(UTC)
        store.write_bytes(where, b"sgcd", if_absent=True)
        try:
            return _questions(store, where, before)
        finally:
            store.delete(where)
            for folder in made:
                with suppress(OSError):  # somebody else wrote something there
                    folder.rmdir()
    except SgcdError as error:
        if "RequestTimeTooSkewed" in error.message:
            text = "this machine's clock is so far off that S3 refuses it. Set it (NTP)."
            return [Finding("clock", "fail", text, error.code)]
        return [Finding("store", "fail", error.sentence, error.code)]


def _missing(folder: Path) -> list[Path]:
    """Folders that writing there makes, the innermost first."""
    return list(takewhile(lambda path: not path.exists(), (folder, *folder.parents)))


def _questions(store: Store, where: str, before: datetime) -> list[Finding]:
    if store.read_bytes(where) != b"sgcd":
        return [Finding("store", "fail", "what was written is not what is read.", "STORE-WRITE")]
    written = store.modified(where)
    try:
        store.write_bytes(where, b"again", if_absent=True)
        text = "conditional writes are ignored: two jobs could collide. Use a store that has them."
        return [Finding("store", "fail", text, "STORE-WRITE")]
    except FileExistsError:
        pass
    # The store's time lies between sending and answering; S3 tells it in whole seconds.
    after = datetime.now(UTC)
    middle = before + (after - before) / 2
    return [
        Finding("store", "ok", "reads, writes, conditional writes, deletes"),
        clock_finding((written - middle).total_seconds(), "the store's"),
    ]
