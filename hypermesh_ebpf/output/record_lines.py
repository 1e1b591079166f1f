"""Lines of records that have one shape: made by a template, the same bytes as one by one.

What depends on the shape alone - names, braces, where which item goes - is written once.  Of the
items, whole columns are converted at once, and texts that come again are converted once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

from hypermesh_ebpf.metrics.event_log import Item, Records, Shape
from hypermesh_ebpf.metrics.sample import Row

_MOST_REMEMBERED = 10_000


class Template:
    """Text of records of one shape.  ``write`` gives the text of any value."""

    def __init__(self, text: str, items: Sequence[Item], write: Callable[[Any], str]) -> None:
        """``text`` is for the % operator, with one conversion for each of ``items``, in order."""
        self._text = text
        self._indexes = [item.index for item in items]
        self._columns = [_column_writer(item, write) for item in items]
        self._straight = self._indexes == list(range(len(items))) and not any(self._columns)

    def lines(self, head: str, rows: Sequence[tuple[Any, ...]]) -> list[str]:
        """A line for each record, all beginning with ``head``."""
        fill = (head.replace("%", "%%") + self._text).__mod__
        if self._straight and len(rows[0]) == len(self._indexes):
            return list(map(fill, rows))
        columns = list(zip(*rows, strict=True))
        written = [
            columns[index] if write is None else write(columns[index])
            for index, write in zip(self._indexes, self._columns, strict=True)
        ]
        return list(map(fill, zip(*written, strict=True)))


def json_template(shape: Shape, write: Callable[[Any], str]) -> Template:
    """The fields of a shape as the inside and the end of a JSON object."""
    items: list[Item] = []

    def text_of(pattern: Any) -> str:
        if isinstance(pattern, Item):
            items.append(pattern)
            return _CONVERSIONS[pattern.kind]
        if isinstance(pattern, Mapping):
            pairs = (f"{constant(name)}:{text_of(each)}" for name, each in pattern.items())
            return "{" + ",".join(pairs) + "}"
        if isinstance(pattern, list):
            return "[" + ",".join(map(text_of, pattern)) + "]"
        return constant(pattern)

    def constant(value: Any) -> str:
        return write(value).replace("%", "%%")

    assert shape.pattern is not None
    return Template(text_of(shape.pattern)[1:], items, write)


_CONVERSIONS = {"int": "%d", "pointer": '"%#x"', "float": "%s", "other": "%s", "nested": "%s"}


def _column_writer(
    item: Item, write: Callable[[Any], str]
) -> Callable[[Sequence[Any]], Iterator[str]] | None:
    """What makes text of a column; None where the template does."""
    if item.kind in ("int", "pointer"):
        return None
    if item.kind == "float":
        return lambda column: (write(each) if math.isfinite(each) else "null" for each in column)
    remembered = _Remembered(item.convert or (lambda value: value), write)
    return lambda column: map(remembered.__getitem__, column)


class _Remembered(dict[Any, Any]):
    """Texts of values by the items that they were made of."""

    def __init__(self, convert: Callable[[Any], Any], write: Callable[[Any], Any]) -> None:
        super().__init__()
        self._convert, self._write = convert, write

    def __missing__(self, item: Any) -> Any:
        if len(self) >= _MOST_REMEMBERED:
            self.clear()
        text = self[item] = self._write(self._convert(item))
        return text


class JsonLines:
    """JSON of records: a template for each shape, made when it is first met."""

    def __init__(self, write: Callable[[Any], str]) -> None:
        """``write`` is the encoder for everything else."""
        self._write = write
        self._templates: dict[Shape, Template] = {}

    def lines(self, records: Records, rows: Sequence[Any], head: Mapping[str, Any]) -> list[str]:
        """A line for each of ``rows``, regular records of that kind; ``head`` comes first."""
        template = self._templates.get(records.shape)
        if template is None:
            template = self._templates[records.shape] = json_template(records.shape, self._write)
        return template.lines(self._write(head)[:-1] + ",", rows)


class CsvRows:
    """Records as cells: ``fields`` in this order, of the record's fields as ``flatten`` has them.

    ``cell`` makes a cell of a value.
    """

    def __init__(
        self,
        fields: Sequence[str],
        flatten: Callable[[Row], Row],
        cell: Callable[[Any], Any],
    ) -> None:
        self._fields, self._flatten, self._cell = fields, flatten, cell
        self._columns: dict[Shape, list[_Column] | None] = {}

    def rows(self, records: Records, time: str) -> Iterator[tuple[Any, ...]] | None:
        """The cells of regular records, behind their time; None where they have to be made singly.

        So it is with members that are told apart by their values alone, as a union's.
        """
        if records.shape not in self._columns:
            self._columns[records.shape] = self._make_columns(records.shape)
        columns = self._columns[records.shape]
        if columns is None:
            return None
        items = list(zip(*records.rows, strict=True))
        times = repeat(time, len(records.rows))
        return zip(times, *(column(items) for column in columns), strict=False)

    def _make_columns(self, shape: Shape) -> list[_Column] | None:
        assert shape.pattern is not None
        flat = self._flatten(shape.pattern)
        items = [
            item
            for value in flat.values()
            for item in (value if isinstance(value, list) else [value])
            if isinstance(item, Item)
        ]
        if any(item.kind == "nested" for item in items):
            return None
        return [self._make_column(flat.get(name)) for name in self._fields]

    def _make_column(self, source: Any) -> _Column:
        """From what a pattern has in place of a value to what makes its column of all items."""
        if isinstance(source, Item):
            return self._make_item_column(source, self._cell)
        if isinstance(source, list) and source:  # an array of nothing is a constant
            parts = [self._make_item_column(each, lambda value: value) for each in source]
            cell = self._cell

            def column(items: list[tuple[Any, ...]]) -> Iterator[Any]:
                return map(cell, map(list, zip(*(part(items) for part in parts), strict=True)))

            return column
        constant = self._cell(source)
        return lambda items: repeat(constant)

    def _make_item_column(self, item: Item, cell: Callable[[Any], Any]) -> _Column:
        index = item.index
        if item.kind == "pointer":
            return lambda items: map(hex, items[index])
        if item.convert is None:
            return lambda items: items[index]
        remembered = _Remembered(item.convert, cell)
        return lambda items: map(remembered.__getitem__, items[index])


_Column = Callable[[list[tuple[Any, ...]]], Iterable[Any]]
