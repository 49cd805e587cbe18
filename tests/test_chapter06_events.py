"""Chapter 6: the event log, and the film that is drawn from it."""

import json

import pytest
from block_helpers import blocks_of, make_sequence, manager_of

from chapters.chapter06_block_manager.film import frames
from minivllm.engine.events import KINDS, Event, EventLog, read_events


def log_with_clock() -> EventLog:
    """A log whose clock moves on by half a second a look."""
    ticks = iter(range(1000))
    return EventLog(clock=lambda: 10 + next(ticks) / 2)


def test_events_carry_step_time_and_numbers():
    log = log_with_clock()
    log.add("shared", "a", [3, 4], 32)
    log.step = 2
    log.add("evicted", None, [5], 7)
    log.add("finished", "a", (), 9, step=1)
    assert log.events == [
        Event(0, 0.5, "shared", "a", (3, 4), (32,)),
        Event(2, 1.0, "evicted", None, (5,), (7,)),
        Event(1, 1.5, "finished", "a", (), (9,)),
    ]
    assert log.events[0]["tokens"] == 32 and log.events[1]["identity"] == 7
    with pytest.raises(KeyError, match="an event of kind 'shared' has"):
        log.events[0]["identity"]
    with pytest.raises(AttributeError):
        log.events[0].step = 3


def test_events_keep_their_own_copy_of_a_table():
    log, table = EventLog(), [1, 2]
    log.add("released", "a", table)
    table.append(3)
    assert log.events[0].blocks == (1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_events_need_their_numbers(kind: str):
    log, numbers = EventLog(), range(len(KINDS[kind]))
    log.add(kind, "a", (), *numbers)
    with pytest.raises(AssertionError, match="needs"):
        log.add(kind, "a", (), *numbers, 1)


def test_events_of_a_kind_and_of_a_request():
    log = EventLog()
    for kind, name in (("taken", "a"), ("taken", "b"), ("released", "a")):
        log.add(kind, name, [0])
    assert [event.request_id for event in log.of("taken")] == ["a", "b"]
    assert [event.kind for event in log.of(request_id="a")] == ["taken", "released"]
    assert log.of("taken", "released") == log.of() == log.events
    assert log.of("taken", request_id="b") == [log.events[1]]


def test_events_survive_as_json_lines(tmp_path):
    log = log_with_clock()
    for index, (kind, names) in enumerate(KINDS.items()):
        log.step = index
        log.add(kind, None if index % 3 == 0 else "a", range(index % 2), *range(len(names)))
    log.write(tmp_path / "log.jsonl")
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert first == {"step": 0, "time": 0.5, "kind": "shared", "tokens": 0}
    assert read_events(tmp_path / "log.jsonl") == log.events


@pytest.mark.parametrize(
    "line",
    ["{", "7", "[]", "{}", '{"step": 1, "time": 0, "kind": "odd"}', '{"kind": "evicted"}'],
)
def test_a_line_that_is_no_event(tmp_path, line: str):
    (tmp_path / "log.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="this line is no event"):
        read_events(tmp_path / "log.jsonl")


def test_without_a_log_nothing_is_recorded():
    manager = manager_of(4)
    assert manager.events is None
    seq = make_sequence(blocks_of(1, 2))
    assert manager.admit(seq)
    manager.release(seq)


def test_what_a_manager_records():
    log = log_with_clock()
    manager = manager_of(3, events=log)
    first, second, third = (make_sequence([*blocks_of(1), value]) for value in (2, 3, 4))
    for seq in (first, second):
        assert manager.admit(seq)
        manager.cache_full_blocks(seq, len(seq))
    assert not manager.admit(third), "no block is left"
    assert manager.grow(first, len(first))
    manager.release(first)
    manager.release(second)
    manager.release(second)
    manager.forget_all()
    events = [(event.kind, event.blocks, event.numbers) for event in log.events]
    assert all(blocks for _, blocks, _ in events), (
        "an event without blocks: _extend was called for 0 blocks, or less; grow must not do that"
    )
    assert events == [
        ("taken", (0, 1), ()),
        ("cached", (0,), (1, 0)),
        ("shared", (0,), (16,)),
        ("taken", (2,), ()),
        ("released", (0, 1), ()),
        ("released", (0, 2), ()),
        ("evicted", (0,), (1,)),
    ]
    assert {event.request_id for event in log.events} == {"r", None}


def test_frames_of_an_event_log():
    """What is given back at a step's end was held in it; what is given back in its middle not."""
    events = [
        Event(0, 0, "taken", "a", (0, 1)),
        Event(0, 0, "cached", "a", (0,), (1, 0)),
        Event(2, 0, "released", "a", (0, 1)),
        Event(2, 0, "shared", "b", (0,), (16,)),
        Event(2, 0, "step ended", None, (), (1, 1)),
        Event(2, 0, "released", "b", (0,)),
        Event(3, 0, "evicted", None, (0,), (1,)),
    ]
    found = list(frames(events, 2))
    assert [frame.step for frame in found] == [0, 1, 2, 3]
    assert [frame.holders for frame in found] == [
        (("a",), ("a",)),
        (("a",), ("a",)),
        (("b",), ()),
        ((), ()),
    ]
    assert [frame.findable[0] for frame in found] == [True, True, True, False]
