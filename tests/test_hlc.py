"""The hybrid logical clock."""

import operator
import os
import time
from itertools import pairwise

import pytest
from builders import NOON, Clock, together
from hypothesis import given
from hypothesis import strategies as st

from kkt_buffer import ClockDriftError, HybridLogicalClock, HybridTimestamp
from kkt_buffer.hlc import (
    MAX_DRIFT_SECONDS,
    assign_server_time,
    generate_hlc,
    successor,
    update_hlc_on_receive,
)

# What a wall clock may show, back and forth; no reading is further than the drift allowed from any other.
READINGS = st.integers(NOON - MAX_DRIFT_SECONDS // 2, NOON + MAX_DRIFT_SECONDS // 2)
COUNTERS = st.integers(0, 3)
ANY_TIMESTAMP = st.builds(HybridTimestamp, READINGS, COUNTERS)


def in_order(timestamps):
    return all(earlier < later for earlier, later in pairwise(timestamps))


class TestHybridTimestamp:
    @pytest.mark.parametrize(
        ("earlier", "later"),
        [
            (HybridTimestamp(NOON, 0), HybridTimestamp(NOON, 1)),
            (HybridTimestamp(NOON, 9), HybridTimestamp(NOON + 1, 0)),
            (HybridTimestamp(NOON + 9, 9, server_time=NOON), HybridTimestamp(NOON + 1, 0)),
            (HybridTimestamp(NOON, 0), HybridTimestamp(NOON - 9, 0, server_time=NOON + 1)),
            (HybridTimestamp(NOON + 9, 1, server_time=NOON), HybridTimestamp(NOON, 2, server_time=NOON)),
            (HybridTimestamp(NOON, 0, server_time=0), HybridTimestamp(1, 0)),
        ],
    )
    def test_order(self, earlier, later):
        """The server's time where it is known, else ours; then the counter."""
        assert earlier < later
        assert earlier <= later
        assert later > earlier
        assert later >= earlier
        assert not later < earlier
        assert not later <= earlier
        assert not earlier > later
        assert not earlier >= later

    @pytest.mark.parametrize("compare", [operator.le, operator.ge, operator.eq])
    def test_same(self, compare):
        assert compare(HybridTimestamp(NOON, 3), HybridTimestamp(NOON, 3))

    @pytest.mark.parametrize("compare", [operator.lt, operator.gt, operator.ne])
    def test_same_is_not_apart(self, compare):
        assert not compare(HybridTimestamp(NOON, 3), HybridTimestamp(NOON, 3))

    def test_equal_is_all_three(self):
        """Two timestamps at the same place in the order are equal only if every part is."""
        assert HybridTimestamp(NOON, 3) != HybridTimestamp(NOON - 5, 3, server_time=NOON)

    @pytest.mark.parametrize("compare", [operator.lt, operator.le, operator.gt, operator.ge])
    @pytest.mark.parametrize("other", [None, NOON, (NOON, 0), "2026-03-01"])
    def test_something_else(self, compare, other):
        """A timestamp has no order with what is none, on either side, and is never equal to it."""
        with pytest.raises(TypeError, match="not supported between instances of"):
            compare(HybridTimestamp(NOON, 0), other)
        with pytest.raises(TypeError, match="not supported between instances of"):
            compare(other, HybridTimestamp(NOON, 0))
        assert HybridTimestamp(NOON, 0) != other

    @pytest.mark.parametrize("compare", [operator.lt, operator.le, operator.gt, operator.ge])
    def test_other_side(self, compare):
        """What knows how to compare itself with a timestamp is asked."""

        class Always:
            def __lt__(self, other):
                return "asked"

            __le__ = __gt__ = __ge__ = __lt__

        assert "asked" == compare(HybridTimestamp(NOON, 0), Always())

    def test_sorted(self):
        first, second, third = HybridTimestamp(9, 0, server_time=3), HybridTimestamp(4, 0), HybridTimestamp(4, 1)
        assert [first, second, third] == sorted([third, first, second])

    def test_frozen(self):
        timestamp = HybridTimestamp(NOON, 0)
        with pytest.raises(AttributeError):
            timestamp.local_time = 0


class TestSuccessor:
    @pytest.mark.parametrize(
        ("last", "wall", "expected"),
        [
            (None, NOON, HybridTimestamp(NOON, 0)),
            (HybridTimestamp(NOON, 7), NOON + 1, HybridTimestamp(NOON + 1, 0)),
            (HybridTimestamp(NOON, 7), NOON, HybridTimestamp(NOON, 8)),
            (HybridTimestamp(NOON, 7), NOON - 3600, HybridTimestamp(NOON, 8)),
            (HybridTimestamp(0, 0), 0, HybridTimestamp(0, 1)),
        ],
    )
    def test_next(self, last, wall, expected):
        """The wall clock where it is ahead, with the counter at 0; else the last time, with the counter one up."""
        assert expected == successor(last, wall)

    @given(ANY_TIMESTAMP, READINGS)
    def test_greater(self, last, wall):
        assert successor(last, wall) > last


class TestNow:
    def test_first(self):
        assert HybridTimestamp(NOON, 0) == HybridLogicalClock(now=Clock()).now()

    def test_whole_seconds(self):
        """What a second has begun counts as that second."""
        assert HybridTimestamp(NOON, 0) == HybridLogicalClock(now=Clock(NOON + 0.999)).now()

    def test_same_second(self, clock):
        hlc = HybridLogicalClock(now=clock)
        assert [HybridTimestamp(NOON, counter) for counter in range(3)] == [hlc.now() for _ in range(3)]

    def test_next_second(self, clock):
        hlc = HybridLogicalClock(now=clock)
        hlc.now()
        hlc.now()
        clock.seconds += 1
        assert HybridTimestamp(NOON + 1, 0) == hlc.now()

    def test_set_back(self, clock):
        """A wall clock that was set back is waited for: the time stands, and the counter goes on."""
        hlc = HybridLogicalClock(now=clock)
        hlc.now()
        clock.seconds -= 86_400
        assert HybridTimestamp(NOON, 1) == hlc.now()
        clock.seconds += 86_400
        assert HybridTimestamp(NOON, 2) == hlc.now()
        clock.seconds += 1
        assert HybridTimestamp(NOON + 1, 0) == hlc.now()

    def test_system_clock(self):
        before = int(time.time())
        timestamp = HybridLogicalClock().now()
        assert before <= timestamp.local_time <= int(time.time())
        assert (0, None) == (timestamp.logical_counter, timestamp.server_time)


class TestResume:
    @pytest.mark.parametrize(
        ("wall", "expected"), [(NOON, HybridTimestamp(NOON + 5, 5)), (NOON + 6, HybridTimestamp(NOON + 6, 0))]
    )
    def test_goes_on(self, wall, expected):
        """A clock that starts anew goes on behind the last timestamp that it is given, whatever the wall clock says."""
        assert expected == HybridLogicalClock(HybridTimestamp(NOON + 5, 4), now=Clock(wall)).now()

    @pytest.mark.parametrize("server_time", [0, NOON - 1000, NOON + 1000])
    def test_server_time(self, server_time):
        """The OFD's time says nothing about our clock."""
        last = HybridTimestamp(NOON + 5, 4, server_time)
        assert HybridTimestamp(NOON + 5, 5) == HybridLogicalClock(last, now=Clock()).now()
        assert HybridTimestamp(NOON + 5, 5) == HybridLogicalClock(last, now=Clock()).update(HybridTimestamp(NOON, 9))


class TestUpdate:
    @pytest.mark.parametrize(
        ("last", "remote", "wall", "expected"),
        [
            # Each of the three may be the latest; the counter follows whichever it is.
            ((NOON, 4), (NOON + 1, 7), NOON + 2, (NOON + 2, 0)),
            ((NOON, 4), (NOON + 2, 7), NOON + 1, (NOON + 2, 8)),
            ((NOON + 2, 4), (NOON, 7), NOON + 1, (NOON + 2, 5)),
            # Two or three of them agree.
            ((NOON + 2, 4), (NOON + 2, 7), NOON, (NOON + 2, 8)),
            ((NOON + 2, 7), (NOON + 2, 4), NOON, (NOON + 2, 8)),
            ((NOON, 4), (NOON + 2, 7), NOON + 2, (NOON + 2, 8)),
            ((NOON + 2, 4), (NOON, 7), NOON + 2, (NOON + 2, 5)),
            ((NOON, 4), (NOON, 4), NOON, (NOON, 5)),
        ],
    )
    def test_kulkarni(self, last, remote, wall, expected):
        """The receive event of the paper: the latest of our time, the remote time and the wall clock."""
        hlc = HybridLogicalClock(HybridTimestamp(*last), now=Clock(wall))
        assert HybridTimestamp(*expected) == hlc.update(HybridTimestamp(*remote))

    def test_first(self):
        """A clock without a past takes over what it is told."""
        assert HybridTimestamp(NOON + 1, 8) == HybridLogicalClock(now=Clock()).update(HybridTimestamp(NOON + 1, 7))

    def test_goes_on(self):
        hlc = HybridLogicalClock(now=Clock())
        hlc.update(HybridTimestamp(NOON + 9, 7))
        assert HybridTimestamp(NOON + 9, 9) == hlc.now()

    @pytest.mark.parametrize("server_time", [0, NOON + 10 * MAX_DRIFT_SECONDS])
    @pytest.mark.parametrize(("local_time", "expected"), [(NOON + 1, (NOON + 2, 5)), (NOON + 3, (NOON + 3, 8))])
    def test_server_time(self, local_time, expected, server_time):
        """The OFD's time on a remote timestamp neither moves our clock nor is taken for drift."""
        hlc = HybridLogicalClock(HybridTimestamp(NOON + 2, 4), now=Clock())
        assert HybridTimestamp(*expected) == hlc.update(HybridTimestamp(local_time, 7, server_time))

    def test_far_behind(self):
        """Only a remote clock that is ahead can do harm."""
        assert HybridTimestamp(NOON, 0) == HybridLogicalClock(now=Clock()).update(HybridTimestamp(0, 7))


class TestDrift:
    @pytest.mark.parametrize("max_drift", [0, 60])
    def test_limit(self, max_drift):
        """As far ahead as is allowed is not too far."""
        hlc = HybridLogicalClock(now=Clock(), max_drift=max_drift)
        assert HybridTimestamp(NOON + max_drift, 1) == hlc.update(HybridTimestamp(NOON + max_drift, 0))

    @pytest.mark.parametrize("max_drift", [0, 60])
    def test_too_far(self, max_drift):
        hlc = HybridLogicalClock(now=Clock(), max_drift=max_drift)
        with pytest.raises(ClockDriftError) as caught:
            hlc.update(HybridTimestamp(NOON + max_drift + 1, 0))
        assert (max_drift + 1, max_drift) == (caught.value.ahead, caught.value.max_drift)

    def test_one_hour(self):
        """Without a word from the caller, an hour is allowed."""
        hlc = HybridLogicalClock(now=Clock())
        assert HybridTimestamp(NOON + 3600, 1) == hlc.update(HybridTimestamp(NOON + 3600, 0))
        with pytest.raises(ClockDriftError, match="3601 s ahead of ours, more than the 3600 s allowed"):
            hlc.update(HybridTimestamp(NOON + 3601, 0))

    def test_against_the_wall(self):
        """Drift is measured against the wall clock: else a chain of small steps would lead anywhere."""
        hlc = HybridLogicalClock(now=Clock(), max_drift=60)
        hlc.update(HybridTimestamp(NOON + 60, 0))
        with pytest.raises(ClockDriftError):
            hlc.update(HybridTimestamp(NOON + 61, 0))

    def test_clock_stays(self):
        """A refused timestamp leaves no trace."""
        hlc = HybridLogicalClock(HybridTimestamp(NOON, 4), now=Clock())
        with pytest.raises(ClockDriftError):
            hlc.update(HybridTimestamp(NOON + MAX_DRIFT_SECONDS + 1, 0))
        assert HybridTimestamp(NOON, 5) == hlc.now()


class TestThreads:
    def test_distinct(self):
        """No two threads ever get the same timestamp, and each one's own go up."""

        def wall():
            os.stat(".")  # a system call: the interpreter lets another thread in, so that a missing lock shows
            return NOON

        hlc = HybridLogicalClock(now=wall)

        def work(number):
            remote = HybridTimestamp(NOON, number)
            return [hlc.update(remote) if turn % 2 else hlc.now() for turn in range(100)]

        of_each = together(16, work)
        assert 16 * 100 == len({timestamp for own in of_each for timestamp in own})
        assert [True] * 16 == [in_order(own) for own in of_each]


class TestProcessClock:
    def test_generate(self):
        assert in_order([generate_hlc() for _ in range(100)])

    def test_update(self):
        """The functions share one clock: what one has received, the other goes on from."""
        remote = HybridTimestamp(generate_hlc().local_time + 60, 7)
        assert HybridTimestamp(remote.local_time, 8) == update_hlc_on_receive(remote)
        assert HybridTimestamp(remote.local_time, 9) == generate_hlc()

    def test_drift(self):
        before = generate_hlc()
        with pytest.raises(ClockDriftError):
            update_hlc_on_receive(HybridTimestamp(int(time.time()) + 2 * MAX_DRIFT_SECONDS, 0))
        assert generate_hlc().local_time < before.local_time + MAX_DRIFT_SECONDS


class TestAssignServerTime:
    @pytest.mark.parametrize("known", [None, 5])
    @pytest.mark.parametrize("server_time", [0, NOON])
    def test_assigned(self, known, server_time):
        """The rest stays as it is, and so does the timestamp that was given."""
        timestamp = HybridTimestamp(NOON, 3, known)
        assert HybridTimestamp(NOON, 3, server_time) == assign_server_time(timestamp, server_time)
        assert HybridTimestamp(NOON, 3, known) == timestamp

    def test_negative(self):
        with pytest.raises(ValueError, match="server_time: expected a whole number of 0 or more, got -1"):
            assign_server_time(HybridTimestamp(NOON, 3), -1)

    @pytest.mark.parametrize(
        ("server_time", "kind"),
        [(True, "bool"), (1.5, "float"), (float(NOON), "float"), ("5", "str"), (None, "NoneType")],
    )
    def test_no_int(self, server_time, kind):
        """Unix seconds are an int: a truth, a fraction or a text was meant for something else."""
        with pytest.raises(TypeError, match=f"server_time: expected a whole number of 0 or more, got a {kind}"):
            assign_server_time(HybridTimestamp(NOON, 3), server_time)


class TestAnyHistory:
    @given(
        st.none() | ANY_TIMESTAMP,
        st.lists(st.tuples(READINGS | st.floats(0, 2 * NOON), st.none() | ANY_TIMESTAMP), max_size=30),
    )
    def test_strictly_up(self, last, history):
        """
        Whatever the wall clock does and whatever comes in, each timestamp is greater than all before it and than the
        remote one that it answers; one that was refused changes nothing.
        """
        wall = Clock()
        hlc = HybridLogicalClock(last, now=wall)
        timestamps = [] if last is None else [last]
        for reading, remote in history:
            wall.seconds = reading
            if remote is None:
                timestamps.append(hlc.now())
            elif remote.local_time - int(reading) > MAX_DRIFT_SECONDS:
                with pytest.raises(ClockDriftError):
                    hlc.update(remote)
            else:
                timestamps.append(hlc.update(remote))
                assert timestamps[-1] > remote
        assert in_order(timestamps)

    @given(st.lists(st.tuples(READINGS, st.none() | ANY_TIMESTAMP), min_size=1, max_size=30))
    def test_latest_seen(self, history):
        """The time is the latest that was ever seen, on the wall or in a message: never ahead of it, never behind."""
        wall = Clock()
        hlc = HybridLogicalClock(now=wall)
        seen = []
        for reading, remote in history:
            wall.seconds = reading
            seen += [reading] if remote is None else [reading, remote.local_time]
            timestamp = hlc.now() if remote is None else hlc.update(remote)
            assert max(seen) == timestamp.local_time

    @given(st.data())
    def test_causality(self, data):
        """What happened before something else, on one clock or through messages, has the lesser timestamp."""
        walls = (Clock(), Clock())
        clocks = tuple(HybridLogicalClock(now=wall) for wall in walls)
        # Per clock, every event that happened before its next one; per message, the same and its own sending.
        past = (set(), set())
        under_way = ([], [])
        for _ in range(data.draw(st.integers(1, 20), "events")):
            here = data.draw(st.integers(0, 1), "clock")
            walls[here].seconds = data.draw(READINGS, "wall")
            if under_way[here] and data.draw(st.booleans(), "receive"):
                # In any order, and some never.
                remote, known = under_way[here].pop(data.draw(st.integers(0, len(under_way[here]) - 1), "message"))
                past[here].update(known)
                event = clocks[here].update(remote)
            else:
                event = clocks[here].now()
            assert [] == [earlier for earlier in past[here] if not earlier < event]
            past[here].add(event)
            if data.draw(st.booleans(), "send"):
                under_way[1 - here].append((event, set(past[here])))
