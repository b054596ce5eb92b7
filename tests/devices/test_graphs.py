"""Each shape is captured once and then replayed without Python. test_real_devices.py tests this on a real card."""

import pytest
import torch
from standin import TapePool

from pipeline.devices.graphs import GraphedFunction


class CountingPool(TapePool):
    """Counts captures and replays. The first captures raise `errors`, in this order."""

    def __init__(self, *errors):
        self.errors, self.captures, self.replays = list(errors), 0, 0

    def capture(self, function):
        self.captures += 1
        if self.errors and (error := self.errors.pop(0)):
            raise error
        replay, result = super().capture(function)

        def counted():
            self.replays += 1
            replay()

        return counted, result


def graphed(function, *errors):
    """(function, pool, reasons of failed captures)."""
    pool, reasons = CountingPool(*errors), []
    return GraphedFunction(function, pool, reasons.append), pool, reasons


def test_each_shape_is_captured_at_its_first_call_and_then_replayed():
    call, pool, reasons = graphed(lambda first, second: first.sum() + second)
    assert pool.captures == 0
    results = []
    for number, (rows, columns) in enumerate([(2, 3), (3, 3), (2, 3), (2, 4), (2, 3)], 1):
        given = torch.full((rows,), float(number)), torch.full((columns,), 0.5)
        results.append(call(*given))
        assert results[-1].tolist() == [rows * number + 0.5] * columns
        assert given[0].tolist() == [number] * rows
        assert pool.replays == number
    assert pool.captures == 3 and reasons == []
    assert results[0] is results[2] is results[4]  # overwritten in place


def test_a_replay_runs_no_python():
    """A counter, and a number that Python computes, stay what they were during the capture."""
    runs, total = [], torch.zeros(())

    def function(tensor):
        runs.append(1)
        total.add_(1)
        return tensor * len(runs)

    call, *_ = graphed(function)
    results = [call(torch.ones(1)).item() for _ in range(3)]
    assert len(runs) == 4 and results == [4, 4, 4]  # three warm-up calls and the capture
    assert total == 4 + 3  # what it does to tensors is repeated


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("\nCUDA error: stream is capturing\nCompile with TORCH_USE_"), "CUDA error: stream is capturing"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_shape_that_cannot_be_captured_runs_eagerly_and_is_not_tried_again(error, reason):
    call, pool, reasons = graphed(lambda tensor: 2 * tensor, error)
    for _ in range(3):
        assert call(torch.ones(3)).tolist() == [2, 2, 2]
    assert (pool.captures, pool.replays, reasons) == (1, 0, [reason])
    call(torch.ones(5))
    assert (pool.captures, pool.replays, reasons) == (2, 1, [reason])


def test_a_function_that_reads_a_tensors_value_cannot_be_captured():
    call, _, reasons = graphed(lambda tensor: torch.full((2,), tensor.sum().item()))
    assert [call(torch.full((3,), float(factor))).tolist() for factor in (1, 2)] == [[3, 3], [6, 6]]
    assert len(reasons) == 1


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("ours"), KeyboardInterrupt()]
)
def test_out_of_memory_and_other_errors_are_raised(error):
    call, pool, reasons = graphed(lambda tensor: 2 * tensor, error)
    with pytest.raises(type(error)):
        call(torch.ones(3))
    assert call(torch.ones(3)).tolist() == [2, 2, 2]
    assert (pool.captures, pool.replays, reasons) == (2, 1, [])
