"""What is called with a shape for the first time is recorded, once, or left as it is. On a real card: test_devices."""

from types import SimpleNamespace

import pytest
import torch

from pipeline.devices.graphs import Captured


def doubled(tensor):
    return 2 * tensor


class Recorder:
    """Notes which shapes it recorded and replayed; `errors`: what is raised instead, recording by recording."""

    def __init__(self, *errors):
        self.errors, self.recorded, self.replayed = list(errors), [], []

    def record(self, function, tensors):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        self.recorded.append(shapes)
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error

        def replay(*tensors):
            self.replayed.append(shapes)
            return function(*tensors)

        return replay


@pytest.fixture
def captured():
    """Makes (captured function, recorder, notes)."""

    def make(function, *errors):
        recorder, notes = Recorder(*errors), []
        return Captured(function, recorder, notes.append), recorder, notes

    return make


def test_each_shape_is_recorded_once_and_replayed_from_then_on(captured):
    call, recorder, notes = captured(doubled)
    for size in (4, 4, 2, 4, 2):
        assert call(torch.full((size,), float(size))).tolist() == [2 * size] * size
    assert recorder.recorded == [[(4,)], [(2,)]]
    assert recorder.replayed == [[(4,)], [(4,)], [(2,)], [(4,)], [(2,)]]  # the first call, too
    assert notes == []


def test_the_shapes_of_all_arguments_count(captured):
    call, recorder, _ = captured(lambda inputs, labels: inputs.sum() + labels.sum())
    for first, second in (((2, 3), 2), ((3, 2), 2), ((2, 3), 3), ((2, 3), 2)):
        call(torch.ones(first), torch.ones(second))
    assert recorder.recorded == [[(2, 3), (2,)], [(3, 2), (2,)], [(2, 3), (3,)]]


def test_nothing_is_recorded_before_the_first_call(captured):
    _, recorder, _ = captured(doubled)
    assert recorder.recorded == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("\nCUDA error: operation not permitted when stream is capturing\nCompile with TORCH_USE_"),
            "CUDA error: operation not permitted when stream is capturing",
        ),
        (NotImplementedError("no such kernel"), "no such kernel"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_what_cannot_be_recorded_is_called_as_it_is_and_not_tried_again(captured, error, said):
    call, recorder, notes = captured(doubled, error)
    for _ in range(3):
        assert call(torch.ones(3)).tolist() == [2, 2, 2]
    assert recorder.recorded == [[(3,)]]
    assert recorder.replayed == []
    assert notes == [said]
    call(torch.ones(5))  # another shape may do
    assert recorder.replayed == [[(5,)]]
    assert notes == [said]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), ValueError("ours"), KeyboardInterrupt()]
)
def test_too_little_memory_and_other_faults_end_the_call(captured, error):
    call, recorder, notes = captured(doubled, error)
    with pytest.raises(type(error)) as caught:
        call(torch.ones(3))
    assert caught.value is error
    assert notes == []
    call(torch.ones(3))
    assert recorder.recorded == [[(3,)]] * 2  # it was not taken for one that can't be recorded


def test_an_error_of_the_function_itself_is_the_callers():
    """What fails while it's recorded is called as it is, and then fails by itself."""

    def broken(tensor):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    notes = []
    recorder = SimpleNamespace(record=lambda function, tensors: function(*tensors))
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2"):
        Captured(broken, recorder, notes.append)(torch.ones(3))
