"""Rollouts that arrive: in order, none lost, the source held back, errors passed on, threads ended."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_prefix import RolloutGroup, TokenCount
from megatron_prefix.balancing import StepPlanner
from megatron_prefix.cost_model import CostModel
from megatron_prefix.streaming import RolloutStream, StreamedStep, follow_rollouts

pytestmark = pytest.mark.ci_oldest

PLANNER = StepPlanner(CostModel(row=1.0), 2)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "rollouts"]


def group(number: int) -> RolloutGroup:
    return RolloutGroup(TokenCount(5), [TokenCount(1 + number), TokenCount(3)], [0.0, 1.0], f"g{number}")


def all_steps(stream: RolloutStream) -> list[StreamedStep]:
    found = []
    while (step := stream.next_step()) is not None:
        found.append(step)
    return found


def ids(step: StreamedStep) -> list[str | None]:
    return [each.group_id for each in step.groups.values() if isinstance(each, RolloutGroup)]


@pytest.mark.parametrize(("count", "sizes", "left"), [(9, [4, 4], 1), (10, [4, 4, 2], 0), (1, [], 1), (0, [], 0)])
def test_steps_are_groups_in_order_of_arrival(count: int, sizes: list[int], left: int) -> None:
    with RolloutStream(map(group, range(count)), PLANNER, groups_per_step=4, capacity=3) as stream:
        found = all_steps(stream)
        assert [len(step.groups) for step in found] == sizes and stream.left_over == left
        assert stream.state_dict() == {"consumed": sum(sizes)}
        assert stream.next_step() is None and stream.left_over == left
    assert [name for step in found for name in ids(step)] == [f"g{n}" for n in range(sum(sizes))]
    for step in found:
        assert step.plan.groups == tuple(step.groups) and all(rank.groups for rank in step.plan.ranks)
        assert step.plan.packs(step.groups, 1)


@pytest.mark.parametrize("taken", [0, 1, 2, 3])
def test_a_restored_stream_goes_on_where_the_saved_one_was(taken: int) -> None:
    with RolloutStream(map(group, range(11)), PLANNER, groups_per_step=3) as stream:
        before = [stream.next_step() for _ in range(taken)]
        state = json.loads(json.dumps(stream.state_dict()))
    assert len(before) == taken
    with RolloutStream(map(group, range(11)), PLANNER, groups_per_step=3, **state) as stream:
        after = all_steps(stream)
    assert [i for step in after for i in step.groups] == list(range(3 * taken, 11))


def test_a_source_with_fewer_groups_than_were_taken_is_refused() -> None:
    message = "the source ended after 4 groups, but the saved run took 6"
    stream = RolloutStream(map(group, range(4)), PLANNER, groups_per_step=3, consumed=6)
    with stream, pytest.raises(ValueError, match=message):
        stream.next_step()


def test_the_source_is_held_back_and_a_stream_can_be_closed_while_it_waits() -> None:
    """The buffer holds two, and one is in the thread's hands."""
    made: list[int] = []
    fourth = threading.Event()

    def source() -> Iterator[RolloutGroup]:
        for number in range(1000):
            made.append(number)
            if number == 3:
                fourth.set()
            yield group(number)

    with RolloutStream(source(), PLANNER, groups_per_step=2, capacity=2) as stream:
        assert not fourth.wait(0.3) and made == [0, 1, 2]
        step = stream.next_step()
        assert step is not None and list(step.groups) == [0, 1]
        assert fourth.wait(10)
    assert len(made) <= 6


def test_an_error_of_the_source_comes_after_the_whole_steps_before_it() -> None:
    def source() -> Iterator[RolloutGroup]:
        yield from map(group, range(5))
        raise KeyError("the sampler is gone")

    with RolloutStream(source(), PLANNER, groups_per_step=2) as stream:
        assert [list(step.groups) for step in (stream.next_step(), stream.next_step()) if step] == [[0, 1], [2, 3]]
        for _ in range(2):
            with pytest.raises(KeyError, match="the sampler is gone"):
                stream.next_step()
        assert stream.left_over == 1


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="1 groups per step cannot feed 2 data-parallel ranks"):
        RolloutStream([], PLANNER, groups_per_step=1)
    with pytest.raises(ValueError, match="capacity must be at least 1 and consumed at least 0, got 0 and 0"):
        RolloutStream([], PLANNER, groups_per_step=2, capacity=0)


# ---- a file that grows


def line(number: int) -> bytes:
    responses = [{"tokens": [1] * (number + 1), "reward": 1.0}, {"tokens": [2], "reward": 0.0}]
    return json.dumps({"group_id": f"g{number}", "prompt": [5, 6], "responses": responses}).encode() + b"\n"


def test_a_growing_file_is_read_by_whole_lines(tmp_path: Path) -> None:
    """It appears late, and is written in pieces that end anywhere."""
    path, stop = tmp_path / "rollouts.jsonl", threading.Event()
    text = b"".join(line(n) for n in range(6))[:-1]  # the last line has no end
    with RolloutStream(follow_rollouts(path, stop=stop, poll_s=0.001), PLANNER, groups_per_step=2, stop=stop) as stream:

        def write() -> None:
            for at in range(0, len(text), 37):
                with path.open("ab") as file:
                    file.write(text[at : at + 37])
            stop.set()

        writer = threading.Thread(target=write)
        writer.start()
        found = all_steps(stream)
        writer.join()
    assert [ids(step) for step in found] == [["g0", "g1"], ["g2", "g3"], ["g4", "g5"]]


def test_half_a_line_waits_and_closing_ends_the_wait(tmp_path: Path) -> None:
    path, stop = tmp_path / "rollouts.jsonl", threading.Event()
    path.write_bytes(line(0) + line(1) + line(2)[:10])
    seen: list[str | None] = []

    def source() -> Iterator[RolloutGroup]:
        for each in follow_rollouts(path, stop=stop, poll_s=0.001):
            seen.append(each.group_id)
            yield each

    with RolloutStream(source(), PLANNER, groups_per_step=2, stop=stop) as stream:
        assert stream.next_step() is not None
        assert not stop.wait(0.1)
        assert seen == ["g0", "g1"]
        with path.open("ab") as file:
            file.write(line(2)[10:] + line(3))
        step = stream.next_step()
        assert step is not None and ids(step) == ["g2", "g3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (line(0) + b"{}\n", r"rollouts.jsonl:2: a line must have either"),
        (line(0) + line(1)[:20], r"rollouts.jsonl:2: not JSON.*cut short"),
        (
            b'{"group_id": "a", "prompt": [1], "response": [2], "reward": 1}\n',
            "rollouts.jsonl:1: no group line, and more",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: bytes, message: str) -> None:
    path, stop = tmp_path / "rollouts.jsonl", threading.Event()
    path.write_bytes(text)
    stop.set()
    with pytest.raises(ValueError, match=message):
        list(follow_rollouts(path, stop=stop))


def test_a_file_that_got_shorter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(line(0) + line(1))
    groups = follow_rollouts(path, poll_s=0.001)
    assert [next(groups).group_id, next(groups).group_id] == ["g0", "g1"]
    path.write_bytes(line(0))
    with pytest.raises(ValueError, match="it got shorter"):
        next(groups)
    path.unlink()
