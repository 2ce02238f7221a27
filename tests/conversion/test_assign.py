"""Every tensor of a source is used, dropped for a reason, or an error that names it with both shapes."""

import pytest
import torch
from torch import nn

from tar_hf.conversion.assign import Report, assign_tensors, match_tensors
from tar_hf.conversion.checkpoint import ConversionError

TARGET = {"a.weight": (2, 3), "a.bias": (2,), "b.weight": (1, 2), "b.bias": (1,)}
DROPPABLE = {r"teacher\..*": "left over", r"head\.\w+": "unused head"}


def source_name(name):
    return "net." + name


def shapes(**changes):
    """The source that fits TARGET, after `changes`: None takes an entry out."""
    source = {source_name(name): shape for name, shape in TARGET.items()}
    source |= {name.replace("__", "."): shape for name, shape in changes.items()}
    return {name: torch.Size(shape) for name, shape in source.items() if shape is not None}


def refusal(source):
    with pytest.raises(ConversionError) as caught:
        match_tensors(source, TARGET, source_name, DROPPABLE)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_match():
    names, report = match_tensors(shapes(), TARGET, source_name, DROPPABLE)
    assert names == {name: f"net.{name}" for name in TARGET}
    assert sorted(report.used) == sorted(names.values()) and report.dropped == {}


def test_missing():
    assert "missing net.a.bias, expected with shape (2,)" in refusal(shapes(net__a__bias=None))


def test_surplus():
    assert "surplus extra.weight of shape (7, 5)" in refusal(shapes(extra__weight=(7, 5)))


def test_misshapen_names_both_shapes():
    assert "net.a.weight must have the shape (2, 3), got (3, 2)" in refusal(shapes(net__a__weight=(3, 2)))


def test_a_size_of_one_is_not_broadcast():
    assert "must have the shape (2,), got (1, 2)" in refusal(shapes(net__a__bias=(1, 2)))


def test_every_kind_at_once():
    message = refusal(shapes(net__a__weight=(3, 2), net__a__bias=None, extra=()))
    for part in ("missing net.a.bias", "net.a.weight must have", "surplus extra of shape ()"):
        assert part in message


def test_many_problems_stay_one_short_line():
    message = refusal({f"x{i}": torch.Size((1,)) for i in range(100)})
    assert message.count(";") == 3 and message.endswith("and 101 more") and len(message) < 400


def test_dropped_with_reasons():
    source = shapes(teacher__z=(1,), teacher__a__b=(2,), head__probe=(3,))
    _, report = match_tensors(source, TARGET, source_name, DROPPABLE)
    assert report.dropped == {"left over": ["teacher.a.b", "teacher.z"], "unused head": ["head.probe"]}


def test_only_whole_names_are_droppable():
    assert "surplus head.mlp.weight" in refusal(shapes(head__mlp__weight=(1,)))
    assert "surplus my.teacher.weight" in refusal(shapes(my__teacher__weight=(1,)))


@pytest.fixture
def model():
    with torch.device("meta"):
        return nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 1)})


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {source_name(name): torch.randn(shape, generator=generator).to(dtype) for name, shape in TARGET.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_assigned_as_they_are(model, dtype):
    source = tensors(dtype)
    report = assign_tensors(model, source, source_name, DROPPABLE)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype and parameter.requires_grad
        assert parameter.data_ptr() == source[source_name(name)].data_ptr(), "no copy"
    assert report.notes == []


def test_mixed_dtypes_become_float32_and_are_noted(model):
    source = tensors() | {"net.a.weight": torch.rand(2, 3).bfloat16(), "net.a.bias": torch.rand(2).half()}
    report = assign_tensors(model, source, source_name, DROPPABLE)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model["a"].weight.bfloat16(), source["net.a.weight"])
    assert torch.equal(model["a"].bias.half(), source["net.a.bias"])
    assert report.notes == ["the source mixes torch.bfloat16, torch.float16, torch.float32: all became torch.float32"]


def test_dropped_tensors_do_not_decide_the_dtype(model):
    assign_tensors(model, tensors(torch.float16) | {"teacher.x": torch.zeros(1)}, source_name, DROPPABLE)
    assert model["a"].weight.dtype == torch.float16


@pytest.mark.parametrize("names", [["net.a.weight"], [source_name(name) for name in TARGET]], ids=["one", "all"])
def test_integers_are_no_weights(model, names):
    """A quantised checkpoint: its integers mean nothing without their scales."""
    source = tensors() | {name: torch.ones(TARGET[name.removeprefix("net.")], dtype=torch.int8) for name in names}
    with pytest.raises(ConversionError, match=r"int8"):
        assign_tensors(model, source, source_name, DROPPABLE)


def test_model_stays_as_it_was_after_an_error(model):
    with pytest.raises(ConversionError):
        assign_tensors(model, tensors() | {"extra": torch.zeros(1)}, source_name, DROPPABLE)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_report_reads_well():
    report = Report(["w"], {"unused": ["h.1", "h.2"]}, ["a note"])
    report.extend(Report(["v"], {"unused": ["g"], "old": ["o"]}, ["another"]), prefix="vq.")
    assert str(report).splitlines() == [
        "2 tensors used, 4 dropped",
        *("dropped, unused:", "  h.1", "  h.2", "  vq.g"),
        *("dropped, old:", "  vq.o"),
        *("a note", "another"),
    ]
