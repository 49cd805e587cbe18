"""Chapter 8: rows on the device, the ladder of graphs, and a runner that is a step ahead."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_prompt, save_checkpoint, tiny_qwen3

from chapters.chapter08_cuda_graphs import toy
from chapters.chapter08_cuda_graphs.tape import TapeRecorder
from minivllm.attention.paged import PagedBatch
from minivllm.engine import graph_runner
from minivllm.engine.batches import HostBatch, HostSampling, TokenLogprobs
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.config import EngineConfig
from minivllm.engine.cuda_graphs import GraphLadder, NoRecorder, ladder_sizes
from minivllm.engine.device_rows import (
    DeviceRows,
    RowUpdates,
    StepInputs,
    apply_updates,
    begin_step,
    finish_step,
)
from minivllm.engine.graph_runner import GraphRunner
from minivllm.engine.model_runner import ModelRunner
from minivllm.engine.prompt_graphs import SEQUENCES, TOKENS, WORK_OF_DECODES, PromptGraphs
from minivllm.engine.row_table import RowTable
from minivllm.engine.sampling_params import SamplingParams
from minivllm.engine.scheduler import Scheduler
from minivllm.engine.sequence import Sequence, Status
from minivllm.engine.step_message import StepMessage
from minivllm.models.loader import load_model

CPU = torch.device("cpu")
NONSENSE = 12345


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# ---------------------------------------------------------------------------- rows: begin_step


def toy_rows() -> DeviceRows:
    """The toy before its first decode: ann in row 0, bob in row 1, cem in row 2; row 3 is nobody's.

    A table's entry that is not in use holds nonsense, as on a device where it is never wiped.
    """
    rows = DeviceRows.allocate(4, 4, "cpu")
    rows.flat.fill_(NONSENSE)
    rows.block_tables.fill_(NONSENSE)
    for row, (token, length, blocks) in enumerate(
        ((115, 16, [0]), (217, 18, [1, 2]), (332, 33, [3, 4, 5]))
    ):
        rows.last_token[row], rows.length[row], rows.num_outputs[row] = token, length, 1
        rows.seed[row], rows.temperature[row] = 70 - row, row / 2
        rows.block_tables[row, : len(blocks)] = int32(blocks)
    return rows


def begun(active: list[int], rows: DeviceRows | None = None) -> StepInputs:
    """What a step of these places reads; whatever it does not write stays 77."""
    out = StepInputs.allocate(len(active), 4, "cpu")
    for part in fields(out):
        getattr(out, part.name).fill_(77)
    begin_step(rows or toy_rows(), int32(active), out, 16)
    return out


def test_begin_step_finds_token_position_and_slot():
    out = begun([0, 1, 2])
    assert out.input_ids.tolist() == [115, 217, 332]
    assert out.positions.tolist() == [15, 17, 32], "the newest token stands at length - 1"
    assert out.slot_mapping.tolist() == [15, 2 * 16 + 1, 5 * 16]
    assert out.context.tolist() == [16, 18, 33], "the newest token attends to itself, too"


def test_begin_step_brings_what_the_sampler_needs():
    out = begun([2, 0])
    assert out.step.tolist() == [1, 1], "step counts the tokens that a row has generated"
    assert out.seed.tolist() == [68, 70]
    assert out.temperature.tolist() == [1.0, 0.0]


def test_begin_step_copies_the_blocks_in_use():
    tables = begun([1, 2]).block_tables.tolist()
    assert tables[0][:2] == [1, 2] and tables[1][:3] == [3, 4, 5]
    assert NONSENSE not in tables[0] + tables[1], "what lies behind a table's end was copied"


def test_begin_step_goes_by_places_and_not_by_rows():
    straight, crossed = begun([0, 1, 2]), begun([2, 0, 1])
    for part in fields(straight):
        there, here = getattr(straight, part.name), getattr(crossed, part.name)
        assert torch.equal(there[[2, 0, 1]], here), part.name


def test_padding_is_a_step_of_nobody():
    """Row 0 is ann's: padding that took row 0's slot would write into her block."""
    out = begun([1, -1, 0, -1])
    assert out.slot_mapping.tolist() == [33, -1, 15, -1], "slot -1 is written nowhere"
    assert out.context.tolist() == [18, 0, 16, 0]
    for name in ("input_ids", "positions", "step", "seed", "temperature"):
        assert getattr(out, name)[[1, 3]].tolist() == [0, 0], f"padding has {name} 0"


def test_begin_step_writes_into_memory_that_stays():
    out = StepInputs.allocate(3, 4, "cpu")
    before = [getattr(out, part.name).data_ptr() for part in fields(out)]
    rows, active = toy_rows(), int32([0, 1, 2])
    begin_step(rows, active, out, 16)
    assert before == [getattr(out, part.name).data_ptr() for part in fields(out)]
    assert torch.equal(rows.flat, toy_rows().flat), "begin_step changes no row"


# ---------------------------------------------------------------------------- rows: finish_step


def inputs_of(context: list[int], step: list[int]) -> StepInputs:
    out = StepInputs.allocate(len(context), 4, "cpu")
    out.context.copy_(int32(context))
    out.step.copy_(torch.tensor(step))
    return out


def test_finish_step_puts_tokens_into_their_rows():
    rows = toy_rows()
    finish_step(rows, int32([2, 0]), inputs_of([33, 16], [1, 1]), torch.tensor([333, 116]))
    assert rows.last_token.tolist() == [116, 217, 333, NONSENSE]
    assert rows.length.tolist() == [17, 18, 34, NONSENSE], "one token more than the step read"
    assert rows.num_outputs.tolist() == [2, 1, 2, NONSENSE]


def test_finish_step_of_padding_changes_nothing():
    rows = toy_rows()
    out = inputs_of([18, 0, 0], [1, 0, 0])
    finish_step(rows, int32([1, -1, -1]), out, torch.tensor([218, 5, 6]))
    assert rows.last_token.tolist() == [115, 218, 332, NONSENSE]
    assert rows.length.tolist() == [16, 19, 33, NONSENSE]
    expected = toy_rows()
    expected.last_token[1], expected.length[1], expected.num_outputs[1] = 218, 19, 2
    assert torch.equal(rows.flat, expected.flat)


def test_finish_step_can_be_run_again():
    """A graph is replayed for warm-up, and top-k chooses a step's tokens a second time."""
    rows, out = toy_rows(), inputs_of([16, 18], [1, 1])
    for tokens in ([1, 2], [116, 218]):
        finish_step(rows, int32([0, 1]), out, torch.tensor(tokens))
    assert rows.length.tolist()[:2] == [17, 19], "lengths must come from what the step read"
    assert rows.last_token.tolist()[:2] == [116, 218]
    assert rows.num_outputs.tolist()[:2] == [2, 2]


def test_a_step_feeds_the_next():
    rows, active = toy_rows(), int32([0, 1, 2, -1])
    rows.block_tables[0, 1] = 6
    for step in range(3):
        out = begun([0, 1, 2, -1], rows)
        assert out.positions.tolist() == [15 + step, 17 + step, 32 + step, 0]
        finish_step(rows, active, out, out.input_ids + 1)
    assert rows.last_token.tolist()[:3] == [118, 220, 335]


# ---------------------------------------------------------------------------- the table of rows


def running(
    name: str, length: int, blocks: list[int], *, generated: int = 0, **params: Any
) -> Sequence:
    """A sequence that holds ``blocks`` and is about to get its next token."""
    params = SamplingParams(**{"temperature": 0, **params})
    prompt = [1] * (length - generated)
    seq = Sequence(name, prompt, params, arrival=0, seed=2**40 + 7, max_len=64)
    for _ in range(generated):
        seq.append(1)
    seq.status, seq.block_table = Status.RUNNING, list(blocks)
    return seq


def told(updates: RowUpdates, rows: DeviceRows | None = None) -> DeviceRows:
    """The rows after these changes."""
    rows = rows or DeviceRows.allocate(updates.max_num_seqs, updates.max_blocks, "cpu")
    pairs = torch.tensor(list(updates.words.items()), dtype=torch.int32)
    apply_updates(rows.flat, pairs.view(-1, 2))
    return rows


def test_enter_tells_the_device_everything():
    table, updates = RowTable(4), RowUpdates(4, 4)
    seq = running("bob", 17, [1, 2], temperature=0.5)
    row = table.enter(seq, updates)
    rows = told(updates)
    assert seq in table and len(table) == 1 and table.places([seq]) == [row]
    assert rows.length[row] == 18, "its newest token has a place already"
    assert rows.num_outputs[row] == 1
    assert rows.seed[row] == 2**40 + 7 and rows.temperature[row] == 0.5
    assert rows.block_tables[row].tolist()[:2] == [1, 2]


def test_a_greedy_sequence_has_temperature_0():
    table, updates = RowTable(1), RowUpdates(1, 4)
    row = table.enter(running("ann", 15, [0], temperature=1e-9), updates)
    assert told(updates).temperature[row] == 0.0, "who is params.greedy has temperature 0"


def test_everybody_has_a_row_of_their_own():
    table, updates = RowTable(3), RowUpdates(3, 4)
    sequences = [running(name, 15, [place]) for place, name in enumerate(("ann", "bob", "cem"))]
    rows = [table.enter(seq, updates) for seq in sequences]
    assert sorted(rows) == [0, 1, 2] and table.places(sequences) == rows
    assert table.enter(sequences[1], updates) == rows[1], "who has a row keeps it"


def test_follow_tells_only_what_is_new():
    table, updates = RowTable(4), RowUpdates(4, 4)
    ann, bob = running("ann", 15, [0]), running("bob", 17, [1, 2])
    for seq in (ann, bob):
        table.enter(seq, updates)
    rows = told(updates)
    quiet = RowUpdates(4, 4)
    table.follow([ann, bob], quiet)
    assert not quiet.words, "nothing has changed, so nothing is to be sent"
    ann.block_table.append(6)
    table.follow([ann, bob], quiet)
    assert list(quiet.words.values()) == [6], "one new block is one word"
    told(quiet, rows)
    place = table.places([ann])[0]
    assert rows.block_tables[place].tolist()[:2] == [0, 6]
    again = RowUpdates(4, 4)
    table.follow([ann, bob], again)
    assert not again.words, "what was told once is known"


def test_follow_tells_of_exchanged_blocks():
    table, updates = RowTable(2), RowUpdates(2, 4)
    seq = running("ann", 40, [0, 1, 2])
    row = table.enter(seq, updates)
    rows = told(updates)
    seq.block_table[1] = 7
    seq.exchanged.append(1)
    later = RowUpdates(2, 4)
    table.follow([seq], later)
    entries = told(later, rows).block_tables[row].tolist()[:3]
    assert entries == [0, 7, 2], "entry 1 now holds block 7: seq.exchanged says so"
    assert seq.exchanged == [], "follow has told of them, so seq.exchanged must be empty now"
    assert len(later.words) == 1, "one block was exchanged, so one word is sent"


@pytest.mark.parametrize("reason", ["length", "abort"])
def test_the_row_of_a_finished_sequence_is_free(reason):
    table = RowTable(1)
    ann, bob = running("ann", 15, [0]), running("bob", 17, [1, 2])
    row = table.enter(ann, RowUpdates(1, 4))
    table.drop_stale()
    assert ann in table, "a sequence that runs keeps its row"
    ann.finish(reason)
    table.drop_stale()
    assert ann not in table and len(table) == 0
    updates = RowUpdates(1, 4)
    assert table.enter(bob, updates) == row
    assert told(updates).block_tables[row].tolist()[:2] == [1, 2]


def test_a_preempted_sequence_loses_its_row():
    """Its blocks are somebody else's now, and when it comes back it holds others."""
    table, updates = RowTable(2), RowUpdates(2, 4)
    seq = running("cem", 33, [3, 4, 5], generated=1)
    row = table.enter(seq, updates)
    rows = told(updates)
    seq.status, seq.block_table = Status.WAITING, []
    seq.num_preemptions += 1
    table.drop_stale()
    assert seq not in table, "it was preempted and has no blocks, so its row must be free"
    seq.status, seq.block_table = Status.RUNNING, [4, 3, 2]
    later = RowUpdates(2, 4)
    row = table.enter(seq, later)
    assert told(later, rows).block_tables[row].tolist()[:3] == [4, 3, 2]


def test_a_sequence_that_came_back_between_two_steps_is_stale():
    table = RowTable(2)
    seq = running("cem", 33, [3, 4, 5], generated=1)
    table.enter(seq, RowUpdates(2, 4))
    seq.num_preemptions += 1
    table.drop_stale()
    assert seq not in table, "it runs, but not on the blocks that its row knows"


# ---------------------------------------------------------------------------- the ladder


def test_ladder_sizes():
    assert ladder_sizes(4) == [1, 2, 4], "up to 4"
    assert ladder_sizes(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    assert ladder_sizes(20) == [1, 2, 4, 8, 16, 20], "the largest batch has a graph of its own"
    assert len(ladder_sizes(256)) == 35 and ladder_sizes(256)[-2:] == [248, 256]
    above = [256, 288, 320, 352, 384, 416, 448, 480, 512]
    assert ladder_sizes(512)[-9:] == above, "beyond 256 every 32"


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8, 9, 100, 257, 300])
def test_ladder_sizes_ascend_to_the_largest_batch(most):
    sizes = ladder_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == most


def test_ladder_sizes_of_nothing_are_refused():
    with pytest.raises(ValueError, match="most=0"):
        ladder_sizes(0)


def test_size_for_is_the_smallest_that_fits():
    ladder = GraphLadder([1, 2, 4, 8, 16], lambda size: None, NoRecorder())
    fits = [ladder.size_for(batch) for batch in range(1, 17)]
    assert fits == [1, 2, 4, 4, *[8] * 4, *[16] * 8]
    for batch in (0, 17):
        with pytest.raises(ValueError, match=f"batch={batch} has no graph"):
            ladder.size_for(batch)


class Notebook:
    """A recorder that writes down what is recorded and what is replayed."""

    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.replayed: list[int] = []
        self.ran: list[int] = []

    def work(self, size: int) -> None:
        self.ran.append(size)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        size = self.ran[-1]
        self.recorded.append(size)
        return lambda: self.replayed.append(size)


def test_the_largest_is_recorded_first():
    notes = Notebook()
    ladder = GraphLadder([1, 2, 4, 8], notes.work, notes)
    ladder.record()
    assert notes.recorded == [8, 4, 2, 1]
    assert ladder.seconds > 0, "record notes how long it took, in self.seconds"


def test_replay_runs_the_graph_and_not_the_work():
    notes = Notebook()
    ladder = GraphLadder([1, 2, 4, 8], notes.work, notes)
    ladder.record()
    notes.ran.clear()
    assert [ladder.replay(batch) for batch in (3, 1, 8, 5, 2)] == [4, 1, 8, 8, 2]
    assert notes.replayed == [4, 1, 8, 8, 2] and notes.ran == []


def test_what_is_recorded_reads_the_memory_that_was_there():
    """On a tape, which holds addresses as a graph does."""
    memory = {"x": torch.tensor([1.0, 2.0, 3.0, 4.0]), "y": torch.zeros(4)}

    def work(size: int) -> None:
        memory["y"][:size].copy_(memory["x"][:size] * 10)

    ladder = GraphLadder([1, 2, 4], work, TapeRecorder())
    ladder.record()
    memory["x"].copy_(torch.tensor([5.0, 6.0, 7.0, 8.0]))
    y = memory["y"].zero_()
    assert ladder.replay(2) == 2 and y.tolist() == [50, 60, 0, 0]
    assert ladder.replay(3) == 4 and y.tolist() == [50, 60, 70, 80]
    memory["x"] = torch.full((4,), -1.0)  # another tensor, of which no recording knows
    ladder.replay(4)
    assert y.tolist() == [50, 60, 70, 80]


def test_sizes_that_are_no_ladder_are_refused():
    for sizes in ([], [2, 1], [1, 1], [0, 1]):
        with pytest.raises(ValueError, match="ascending batch sizes"):
            GraphLadder(sizes, lambda size: None, NoRecorder())


def test_a_cleared_ladder_holds_no_graph():
    notes = Notebook()
    ladder = GraphLadder([1], notes.work, notes)
    ladder.record()
    ladder.clear()
    with pytest.raises(KeyError):
        ladder.replay(1)


# ---------------------------------------------------------------------------- short prompts


def test_prompt_graphs_lay_out_a_step_and_pad_it():
    seen: list[dict[str, Any]] = []

    def work(batch, last, logits):
        seen.append(
            {
                "ids": batch.input_ids.tolist(),
                "positions": batch.positions.tolist(),
                "slots": batch.slot_mapping.tolist(),
                "boundaries": batch.cu_query_lens.tolist(),
                "context": batch.context.tolist(),
                "tables": batch.block_tables.tolist(),
                "last": last.tolist(),
            }
        )
        logits.copy_(batch.input_ids[last].float()[:, None].expand(-1, 5))

    class RunOnce(NoRecorder):
        def record(self, work: Callable[[], None]) -> Callable[[], None]:
            work()
            return work

    graphs = prompt_graphs(work, RunOnce())
    graphs.ladder.record()
    assert [len(step["ids"]) for step in seen] == sorted(TOKENS, reverse=True)
    assert all(set(step["slots"]) == {-1} for step in seen), "warm-up writes nowhere"
    assert all(set(step["ids"] + step["positions"] + step["last"]) == {0} for step in seen)
    batch = HostBatch(
        [7, 8, 9, 5, 6], [0, 1, 2, 0, 1], [0, 1, 2, 16, 17], [3, 2], [3, 2], [[0], [1]]
    )
    assert graphs.load(batch, [2, 4]).tolist() == [7, 8, 9, 5, 6]
    logits = graphs.replay(batch, [2, 4])
    assert logits[:, 0].tolist() == [9, 6]
    step = seen[-1]
    assert step["ids"] == [7, 8, 9, 5, 6] + [0] * 11
    assert step["slots"] == [0, 1, 2, 16, 17] + [-1] * 11
    assert step["boundaries"] == [0, 3, 5] + [5] * (16 - 2), "no more sequences than tokens"
    assert step["context"] == [3, 2] + [0] * (16 - 2)
    assert step["tables"][:2] == [[0, 0], [1, 0]]
    one = HostBatch([1], [0], [3], [1], [1], [[0]])
    graphs.load(one, [0])
    graphs.replay(one, [0])
    assert seen[-1]["slots"] == [3] + [-1] * 15, "the step before this one left a slot behind"
    tokens = list(range(20))
    larger = HostBatch(tokens, tokens, tokens, [20], [20], [[1, 0]])
    graphs.load(larger, [19])[3] = 77  # a token that only the device knows
    assert graphs.replay(larger, [19])[:, 0].tolist() == [19]
    assert seen[-1]["ids"] == [0, 1, 2, 77, *tokens[4:], 0, 0, 0, 0]
    assert seen[-1]["positions"] == [*tokens, 0, 0, 0, 0]
    assert seen[-1]["slots"] == [*tokens, -1, -1, -1, -1]
    assert seen[-1]["tables"][0] == [1, 0] and seen[-1]["last"][0] == 19


def prompt_graphs(work=None, recorder=None, **most: int) -> PromptGraphs:
    return PromptGraphs(
        work or (lambda *_: None),
        recorder or NoRecorder(),
        **({"max_tokens": 10_000, "max_seqs": 1000} | most),
        max_blocks=2,
        context_of_decodes=131_072,
        vocab_size=5,
        dtype=torch.float32,
        device=CPU,
    )


def test_which_steps_have_a_graph_of_prompts():
    def fits(graphs: PromptGraphs, count: int, sequences: int, context: int = 1) -> bool:
        lens = [[1] * sequences, [context] * sequences]
        return graphs.fits(HostBatch([0] * count, [], [], *lens, []))

    graphs = prompt_graphs()
    assert fits(graphs, TOKENS[-1], SEQUENCES)
    assert not fits(graphs, TOKENS[-1] + 1, 1) and not fits(graphs, 20, SEQUENCES + 1)
    many = 131_072 // 32
    assert fits(graphs, 40, 32, many) and not fits(graphs, 40, 32, many + 1), "too long to decode"
    assert graphs.fits(HostBatch([0] * 40, [], [], [40], [10 * WORK_OF_DECODES], []))
    small = prompt_graphs(max_tokens=100, max_seqs=3)
    assert small.ladder.sizes == [16, 24, 32, 48, 64, 96, 128]
    assert fits(small, 100, 3) and not fits(small, 100, 4)


def test_graphs_of_prompts_are_small_where_padding_costs_time(model, monkeypatch):
    runner = make_runner(GraphRunner, model)
    for settings, small, large in (
        ({"max_num_seqs": 256, "max_num_batched_tokens": 8192}, (512, 8), (8192, 256)),
        ({"max_num_seqs": 3, "max_num_batched_tokens": 5}, (5, 3), (5, 3)),
    ):
        config = EngineConfig(**settings)
        for hopper, most in ((False, small), (True, large)):
            monkeypatch.setattr(graph_runner, "runs_on_hopper", lambda *_, on=hopper: on)
            assert runner._most_in_prompt_graphs(config, torch.float32) == most


def test_padding_of_a_step_with_prompts_is_a_third_at_most():
    sizes = prompt_graphs().ladder.sizes
    assert all(size - (less + 1) < size / 3 for less, size in pairwise(sizes))
    # The kernels that read them ask for 16 bytes at a time: two of these numbers.
    assert all(size % 2 == 0 for size in sizes)


# ---------------------------------------------------------------------------- a step as a message


@pytest.mark.parametrize(
    "message",
    [
        StepMessage(),
        StepMessage(updates=[(34, 5), (2**30, -1)], places=[0, 1, 2]),
        StepMessage(
            updates=[(0, 1)],
            places=[3],
            batch=HostBatch([5, 6], [0, 1], [16, 17], [2], [2], [[1]]),
            last=[1],
            waiting=[(0, 3)],
            sampling=HostSampling([0.5], [2**62], [1], [3], [float("inf")], None),
            num_logprobs=2,
        ),
    ],
)
def test_a_message_survives_its_bytes(message):
    data = message.encode()
    assert isinstance(data, bytes) and StepMessage.decode(data) == message


# ---------------------------------------------------------------------------- the runner


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return load_model(save_checkpoint(tiny_qwen3(), tmp_path_factory.mktemp("tiny")))


def make_runner(kind: type[ModelRunner], model: torch.nn.Module, **settings: Any) -> ModelRunner:
    config = EngineConfig(**{"block_size": 16, "num_kv_blocks": 40, "max_num_seqs": 6, **settings})
    return kind(model, config, model.config, max_model_len=128, dtype=torch.float32, device=CPU)


Answers = dict[str, tuple[list[int], list[TokenLogprobs | None]]]


def serve(
    runner: ModelRunner,
    requests: list[tuple[list[int], dict[str, Any]]],
    *,
    late: bool,
    aborted: tuple[int, int] | None = None,
    **settings: Any,
) -> tuple[Answers, Scheduler]:
    """Run requests to their end; late: launch a step before the last one's tokens are read.

    aborted: (step, request) of one that goes away.
    """
    blocks = BlockManager(runner.cache.num_blocks, runner.cache.block_size)
    scheduler = Scheduler(blocks, **{"max_num_seqs": 6, "max_num_batched_tokens": 64, **settings})
    sequences = [
        Sequence(
            str(place),
            prompt,
            SamplingParams(**params),
            arrival=place,
            seed=100 + place,
            max_len=128,
        )
        for place, (prompt, params) in enumerate(requests)
    ]
    found: Answers = {seq.request_id: ([], []) for seq in sequences}
    for seq in sequences:
        scheduler.add(seq)
    in_flight: Any = None
    for number in range(300):
        if not scheduler.has_unfinished:
            break
        if aborted is not None and aborted[0] == number:
            scheduler.finish(sequences[aborted[1]], "abort")
            continue
        step = scheduler.schedule()
        done = in_flight
        if late:
            in_flight = (step, runner.launch(step)) if step.scheduled else None
            result = done[1].result() if done else None
        else:
            done, result = (step, None), runner.run(step)
        scheduler.advance(step)
        if result is not None:
            for seq, token, logprobs in zip(
                done[0].sampling, result.token_ids, result.logprobs, strict=True
            ):
                if scheduler.resolve(seq, token):
                    found[seq.request_id][1].append(logprobs)
    assert not scheduler.has_unfinished
    for seq in sequences:
        found[seq.request_id] = (seq.output_token_ids, found[seq.request_id][1])
    return found, scheduler


GREEDY = {"temperature": 0, "max_tokens": 20}
MIX: list[tuple[list[int], dict[str, Any]]] = [
    (random_prompt(15, seed=1), GREEDY),
    (random_prompt(40, seed=2), {"temperature": 0.8, "max_tokens": 18}),
    (random_prompt(3, seed=3), {"temperature": 0.9, "top_k": 5, "max_tokens": 12}),
    (random_prompt(33, seed=4), {"temperature": 0, "logprobs": 3, "max_tokens": 9}),
    (
        random_prompt(20, seed=5),
        {"temperature": 0.7, "top_p": 0.8, "min_p": 0.01, "max_tokens": 25},
    ),
    (random_prompt(70, seed=6), {"temperature": 1.0, "logprobs": 0, "max_tokens": 4}),
    (random_prompt(16, seed=7), {**GREEDY, "max_tokens": 1}),
]


def check_same(ours: Answers, plain: Answers, skip: set[str] | None = None) -> None:
    for name, (tokens, logprobs) in plain.items():
        if name in (skip or set()):
            continue
        assert ours[name][0] == tokens, f"request {name}"
        for mine, theirs in zip(ours[name][1], logprobs, strict=True):
            assert (mine is None) == (theirs is None)
            if theirs is not None:
                assert mine.token_ids == theirs.token_ids and mine.rank == theirs.rank
                assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


@pytest.mark.parametrize("late", [False, True], ids=["in turn", "a step late"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"policy": "mixed"},
        {"policy": "mixed", "max_num_batched_tokens": 10},
        {"max_num_seqs": 2},
    ],
    ids=["prefill first", "mixed", "small chunks", "few rows"],
)
def test_graph_runner_gives_the_tokens_of_the_plain_runner(model, settings, late):
    plain, _ = serve(make_runner(ModelRunner, model), MIX, late=False, **settings)
    ours, _ = serve(make_runner(GraphRunner, model), MIX, late=late, **settings)
    check_same(ours, plain)


def give_prompts_graphs(runner: GraphRunner, max_tokens: int) -> list[int]:
    """Run steps with prompts on memory that stays, as a GPU does; returns their sizes as they run.

    PyTorch's attention loops over lengths on the host, which a graph has none of: they are read
    from the memory of the step.
    """
    sizes: list[int] = []

    def work(batch, last, logits):
        sizes.append(len(batch.input_ids))
        query_lens = [n for n in batch.cu_query_lens.diff().tolist() if n]
        tokens, count = sum(query_lens), len(query_lens)
        assert (batch.slot_mapping[tokens:] == -1).all()
        if count:
            real = PagedBatch(
                input_ids=batch.input_ids[:tokens],
                positions=batch.positions[:tokens],
                slot_mapping=batch.slot_mapping[:tokens],
                cu_query_lens=batch.cu_query_lens[: count + 1],
                context=batch.context[:count],
                block_tables=batch.block_tables[:count],
                query_lens=tuple(query_lens),
                context_lens=tuple(batch.context[:count].tolist()),
            )
            runner._prompt(real, last, logits)

    runner.prompts = PromptGraphs(
        work,
        NoRecorder(),
        max_tokens=max_tokens,
        max_seqs=6,
        max_blocks=runner.rows.block_tables.shape[1],
        context_of_decodes=WORK_OF_DECODES // 64,
        vocab_size=runner.logits.shape[1],
        dtype=runner.logits.dtype,
        device=CPU,
    )
    runner.prompts.ladder.record()
    return sizes


@pytest.mark.parametrize("late", [False, True], ids=["in turn", "a step late"])
@pytest.mark.parametrize("policy", ["prefill_first", "mixed"])
def test_steps_with_prompts_may_be_recorded(model, policy, late):
    """Decodes beside prompts, too, whose newest tokens only the device knows."""
    plain, _ = serve(make_runner(ModelRunner, model), MIX, late=False, policy=policy)
    runner = make_runner(GraphRunner, model)
    sizes = give_prompts_graphs(runner, 64)
    ours, _ = serve(runner, MIX, late=late, policy=policy)
    check_same(ours, plain)
    assert 64 in sizes and set(sizes) <= {16, 24, 32, 48, 64}


def test_a_runner_that_was_closed_needs_no_search_for_garbage(model):
    runner = make_runner(GraphRunner, model)
    runner.prompts = PromptGraphs(
        runner._prompt,
        NoRecorder(),
        max_tokens=16,
        max_seqs=2,
        max_blocks=runner.rows.block_tables.shape[1],
        context_of_decodes=1,
        vocab_size=runner.logits.shape[1],
        dtype=runner.logits.dtype,
        device=CPU,
    )
    gone = weakref.ref(runner)
    gc.disable()
    try:
        runner.close()
        del runner
        assert gone() is None, "something in it still refers to it"
    finally:
        gc.enable()


def test_graph_runner_after_preemptions(model):
    """A pool of 12 blocks: whoever comes back has other blocks, and maybe another row."""
    requests = [
        (random_prompt(15, seed=place), {"temperature": place % 2 * 0.5, "max_tokens": 40})
        for place in range(5)
    ]
    plain, _ = serve(make_runner(ModelRunner, model), requests, late=False)
    for policy in ("prefill_first", "mixed"):
        small = make_runner(GraphRunner, model, num_kv_blocks=12)
        ours, scheduler = serve(small, requests, late=True, policy=policy)
        assert scheduler.num_preemptions > 0
        check_same(ours, plain)


def test_an_abort_leaves_the_others_alone(model):
    plain, _ = serve(make_runner(ModelRunner, model), MIX, late=False)
    runner = make_runner(GraphRunner, model)
    ours, _ = serve(runner, MIX, late=True, aborted=(6, 1))
    assert len(ours["1"][0]) < len(plain["1"][0])
    check_same(ours, plain, skip={"1"})


def addresses(runner: GraphRunner) -> dict[str, int]:
    """Where all that a recorded step reads or writes lies."""
    tensors = {"active": runner.active, "tokens": runner.tokens, "logits": runner.logits}
    tensors |= {"rows": runner.rows.flat, "k": runner.cache.k, "v": runner.cache.v}
    tensors |= {part.name: getattr(runner.inputs, part.name) for part in fields(runner.inputs)}
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def test_a_step_works_on_the_memory_that_was_recorded(model):
    runner = make_runner(GraphRunner, model)
    before = addresses(runner)
    serve(runner, MIX, late=True)
    moved = {name for name, place in addresses(runner).items() if place != before[name]}
    assert not moved, f"{moved} lie elsewhere now, and no graph knows"


def test_padding_writes_into_no_block(model):
    """3 sequences in a graph of 4, in a cache whose other slots hold a mark."""
    runner = make_runner(GraphRunner, model)
    runner.cache.k.fill_(7.5)
    runner.cache.v.fill_(7.5)
    runner.ladder.record()
    assert (runner.cache.k == 7.5).all(), "recording runs nothing but padding"
    requests = [(random_prompt(length, seed=length), GREEDY) for length in (15, 17, 30)]
    _, scheduler = serve(runner, requests, late=True)
    written = (runner.cache.k != 7.5).flatten(3).any(-1).any(0).sum().item()
    # Every token but each one's last is computed, and tokens that came too late are nobody's.
    most = sum(len(prompt) + 20 for prompt, _ in requests)
    assert most - 3 <= written <= most
    assert scheduler.block_manager.num_free == scheduler.block_manager.num_blocks


def test_only_changes_are_sent():
    """A block every 16 tokens, and else nothing at all."""
    requests = tuple(toy.Request(name, 100 * i, 15, 30) for i, name in enumerate("abc", start=1))
    game = toy.play(requests, num_blocks=12)
    decodes = [note for note in game.notes if note.size]
    assert len(decodes) == 29
    assert sum(len(note.sent) for note in decodes) == 2 * 3
    assert sum(not note.sent for note in decodes) == 27


def test_runner_facts_and_close(model):
    runner = make_runner(GraphRunner, model)
    assert runner.facts.sizes == ladder_sizes(6) == [1, 2, 4, 6]
    assert runner.facts.seconds > 0 and runner.facts.num_bytes == 0
    assert runner.overlaps and not make_runner(ModelRunner, model).overlaps
    runner.close()
    with pytest.raises(KeyError):
        runner.ladder.replay(1)


@pytest.mark.gpu
def test_real_graphs_give_the_tokens_of_the_plain_runner(tmp_path: Path):
    device = torch.device("cuda")
    folder = save_checkpoint(tiny_qwen3(), tmp_path)
    model = load_model(folder, dtype=torch.float32, device=device)
    config = EngineConfig(block_size=16, num_kv_blocks=40, max_num_seqs=6)

    def build(kind: type[ModelRunner]) -> ModelRunner:
        return kind(
            model, config, model.config, max_model_len=128, dtype=torch.float32, device=device
        )

    plain, _ = serve(build(ModelRunner), MIX, late=False)
    for late in (False, True):
        runner = build(GraphRunner)
        assert runner.facts.num_bytes > 0
        ours, _ = serve(runner, MIX, late=late)
        runner.close()
        check_same(ours, plain)
