"""Leases: one holder at a time, the next one as soon as he is done, none waits for the dead."""

from __future__ import annotations

import json
import pickle
import threading
import time
from pathlib import Path

import pytest

from pipelines.lake import Lake
from pipelines.lease import lease
from sgcd_core.errors import BusyError

QUICK = {"beat": 0.05, "silence": 0.6}


def objects(lake: Lake) -> list[str]:
    return sorted(path.name for path in Path(lake.scratch("leases/job")).iterdir())


def test_one_at_a_time(tmp_lake: Lake) -> None:
    """Of many that want it at once each gets it, and never two together."""
    inside, most, done = 0, 0, []
    guard = threading.Lock()

    def work(number: int) -> None:
        nonlocal inside, most
        with lease(tmp_lake, "job", **QUICK):
            with guard:
                inside += 1
                most = max(most, inside)
            time.sleep(0.05)
            with guard:
                inside -= 1
                done.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (most, sorted(done)) == (1, [0, 1, 2, 3, 4])
    assert len(objects(tmp_lake)) == 1  # those before are gone


def test_a_living_holder_is_not_robbed(tmp_lake: Lake) -> None:
    with lease(tmp_lake, "job", **QUICK) as held:
        started = time.monotonic()
        with pytest.raises(BusyError) as caught, lease(tmp_lake, "job", wait=1.5, **QUICK):
            pass
        assert time.monotonic() - started >= 1.5  # more than twice the silence
        held.check()
    assert caught.value.code == "LAKE-BUSY" and caught.value.exit_code == 75


def test_asking_once_does_not_wait(tmp_lake: Lake) -> None:
    with lease(tmp_lake, "job", beat=0.1), pytest.raises(BusyError), lease(tmp_lake, "job", wait=0):
        pass
    with lease(tmp_lake, "job", wait=0):
        pass  # released
    with lease(tmp_lake, "another", wait=0), lease(tmp_lake, "job", wait=0):
        pass


def test_asking_once_takes_over_from_a_dead_holder(tmp_lake: Lake) -> None:
    """A job that a scheduler starts every night with `--wait 0` is not refused for ever."""
    with (
        lease(tmp_lake, "job", beat=3600) as dead,
        lease(tmp_lake, "job", wait=0, **QUICK) as mine,
    ):
        assert mine.hold.number == dead.hold.number + 1


def test_a_dead_holder_is_taken_over_and_told_so_when_it_wakes(tmp_lake: Lake) -> None:
    with lease(tmp_lake, "job", beat=3600) as asleep:  # as a machine that is paused
        started = time.monotonic()
        with lease(tmp_lake, "job", **QUICK) as awake:
            assert 0.6 <= time.monotonic() - started < 20
            assert awake.hold.number == asleep.hold.number + 1
            for holder in (asleep, pickle.loads(pickle.dumps(asleep.hold))):  # at once as it wakes
                with pytest.raises(BusyError, match="LAKE-BUSY"):
                    holder.check()
            awake.check()
        with pytest.raises(BusyError, match="LAKE-BUSY"):
            asleep.check()  # also when the other is done
        asleep._beat_seconds = 0
        asleep._live()
    body = json.loads(Path(tmp_lake.scratch("leases/job"), objects(tmp_lake)[-1]).read_text())
    assert body["released"] is True


def test_a_site_of_a_long_name_in_any_script_has_a_lease(tmp_lake: Lake) -> None:
    """Encoded, its letters are six to nine characters each, and a disk takes 255."""
    names = [f"new-site-target-{site}" for site in ("Ж" * 60, "Ж" * 61, "漢" * 40)]
    for name in names:
        with (
            lease(tmp_lake, name, wait=0, beat=0.1),
            pytest.raises(BusyError),
            lease(tmp_lake, name, wait=0),
        ):
            pass
    assert len(list(Path(tmp_lake.scratch("leases")).iterdir())) == len(names)


def test_the_work_that_fails_lets_the_next_one_in(tmp_lake: Lake) -> None:
    with pytest.raises(ValueError, match="work"), lease(tmp_lake, "job"):
        raise ValueError("work")
    with lease(tmp_lake, "job", wait=0):
        pass


@pytest.mark.s3
def test_the_same_over_s3(s3_server) -> None:  # type: ignore[no-untyped-def]
    lake = Lake.open(s3_server.uri("leases"), create=True)
    with (
        lease(lake, "job", beat=0.1, silence=30),
        pytest.raises(BusyError),
        lease(lake, "job", wait=0.5),
    ):
        pass
    with lease(lake, "job", wait=0) as second:
        assert second.hold.number == 2
