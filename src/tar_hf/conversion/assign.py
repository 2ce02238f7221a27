"""Puts a source's tensors into a model: each is used or dropped for a reason, and anything else is an error."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from tar_hf.conversion.checkpoint import ConversionError

MAX_REPORTED = 3  # problems named in an error, which is one line


@dataclass
class Report:
    """What a conversion did with the source's tensors."""

    used: list[str] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason -> names
    notes: list[str] = field(default_factory=list)

    def extend(self, other: "Report", prefix: str):
        """Adds another file's report; `prefix` tells its names apart."""
        self.used += [prefix + name for name in other.used]
        for reason, names in other.dropped.items():
            self.dropped.setdefault(reason, []).extend(prefix + name for name in names)
        self.notes += other.notes

    def __str__(self):
        lines = [f"{len(self.used)} tensors used, {sum(map(len, self.dropped.values()))} dropped"]
        for reason, names in self.dropped.items():
            lines += [f"dropped, {reason}:", *(f"  {name}" for name in names)]
        return "\n".join(lines + self.notes)


def match_tensors(
    source: Mapping[str, torch.Size],
    target: Mapping[str, torch.Size],
    source_name: Callable[[str], str],
    droppable: Mapping[str, str],
) -> tuple[dict[str, str], Report]:
    """
    Finds for every tensor of the target the one in the source.

    Args:
        source: Names and shapes in the source.
        target: Names and shapes that the target expects.
        source_name: The source's name of a target's tensor.
        droppable: Regular expressions of source names that may be left over, with the reason.

    Returns:
        The source's name for each target name, and the report.

    Raises:
        `ConversionError`: naming the missing, misshapen and surplus tensors with both shapes.
    """
    names = {name: source_name(name) for name in target}
    problems = []
    for name, origin in names.items():
        expected = tuple(target[name])
        if origin not in source:
            problems.append(f"missing {origin}, expected with shape {expected}")
        elif tuple(source[origin]) != expected:
            problems.append(f"{origin} must have the shape {expected}, got {tuple(source[origin])}")
    report = Report(used=list(names.values()))
    for origin in source.keys() - set(names.values()):
        reason = next((reason for pattern, reason in droppable.items() if re.fullmatch(pattern, origin)), None)
        if reason is None:
            problems.append(f"surplus {origin} of shape {tuple(source[origin])}, which no part of the model takes")
        else:
            report.dropped.setdefault(reason, []).append(origin)
    if problems:
        more = [f"and {len(problems) - MAX_REPORTED} more"] if len(problems) > MAX_REPORTED else []
        raise ConversionError("the tensors do not fit the model: " + "; ".join(sorted(problems)[:MAX_REPORTED] + more))
    for dropped in report.dropped.values():
        dropped.sort()
    return names, report


def assign_tensors(
    model: nn.Module,
    source: Mapping[str, torch.Tensor],
    source_name: Callable[[str], str],
    droppable: Mapping[str, str],
) -> Report:
    """
    Gives a model built on the meta device the source's tensors, without copying them.

    The tensors keep the source's dtype. Where it has several, all become the one that holds them exactly. See
    `match_tensors` for the arguments and errors.
    """
    names, report = match_tensors(
        {name: tensor.shape for name, tensor in source.items()},
        {name: tensor.shape for name, tensor in model.state_dict().items()},
        source_name,
        droppable,
    )
    for origin in names.values():
        if not source[origin].is_floating_point():
            raise ConversionError(f"{origin} must hold floating-point weights, got {source[origin].dtype}")
    dtypes = {source[origin].dtype for origin in names.values()}
    dtype = functools.reduce(torch.promote_types, dtypes)
    if len(dtypes) > 1:
        report.notes.append(f"the source mixes {', '.join(sorted(map(str, dtypes)))}: all became {dtype}")
    tensors = {name: source[origin].to(dtype) for name, origin in names.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return report
