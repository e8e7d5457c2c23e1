"""Where the labels of a picture go so that they cover nothing. Geometry alone; draws nothing.

Lengths have one unit, whatever it is; x grows to the right, y upwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

RINGS = (0.8, 1.1, 1.5, 2.1, 2.9, 3.9, 5.1, 6.5, 8.1, 10.0)
"""Distances from a point that are tried for its label, in heights of a label."""
DEGREES = 15
ROUNDS = 4
PROBES = 12
"""Places of a leader line at which it is tested for crossing a label."""
LEADER_FROM = 0.9
"""From this distance on, in heights, a label needs a line to its point."""


Line: TypeAlias = list[tuple[float, float]]


class Box(NamedTuple):
    left: float
    low: float
    right: float
    high: float

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.low < other.high
            and other.low < self.high
        )

    def contains(self, x: float, y: float) -> bool:
        return self.left < x < self.right and self.low < y < self.high

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The place of the box that is nearest to a point."""
        return min(max(x, self.left), self.right), min(max(y, self.low), self.high)

    def distance(self, x: float, y: float) -> float:
        near_x, near_y = self.nearest(x, y)
        return math.hypot(x - near_x, y - near_y)

    def grown(self, by: float) -> Box:
        return Box(self.left - by, self.low - by, self.right + by, self.high + by)


def spread_out(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places for labels at least gap apart and within low..high, as near to the wanted ones as may be.

    wanted must be ascending. Labels that meet form a block around the mean of what they want. Where the
    room does not suffice, the gap shrinks.
    """
    if len(wanted) > 1:
        gap = min(gap, (high - low) / (len(wanted) - 1))
    blocks: list[tuple[float, int]] = []  # sum of what its labels want of its start, labels

    def start(block: tuple[float, int]) -> float:
        total, labels = block
        return max(low, min(total / labels, high - gap * (labels - 1)))

    for place in wanted:
        block = (place, 1)
        while blocks and start(blocks[-1]) + gap * blocks[-1][1] > start(block):
            total, labels = blocks.pop()
            block = (total + block[0] - gap * labels * block[1], labels + block[1])
        blocks.append(block)
    return [start(block) + gap * number for block in blocks for number in range(block[1])]


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    frame: Box,
    mark: float,
    taken: Sequence[Box] = (),
) -> list[Box]:
    """A box per label, near its point, covering no mark, no other label and no line to a label if possible.

    sizes: width and height of the labels. mark: half the side of the square that the mark of a point fills.
    taken: what no label should cover either.
    Every label in turn takes the cheapest of the places around its point, several times over.
    """
    spots: list[Box | None] = [None] * len(points)
    marks = [Box(x - mark, y - mark, x + mark, y + mark) for x, y in points]
    for _ in range(ROUNDS):
        before = list(spots)
        for index, (width, height) in enumerate(sizes):
            places = _places(points[index], width, height)
            others: list[tuple[Box, Line]] = [(box, []) for box in taken]
            others += [
                (theirs, _leader(theirs, points[other]))
                for other, theirs in enumerate(spots)
                if theirs is not None and other != index
            ]
            costs = [_cost(index, spot, points, marks, others, frame) for spot in places]
            spots[index] = places[costs.index(min(costs))]
        if spots == before:
            break
    return [spot for spot in spots if spot is not None]


def needs_leader(spot: Box, point: tuple[float, float]) -> bool:
    """Is the label so far from its point that a line should join them?"""
    return spot.distance(*point) > LEADER_FROM * (spot.high - spot.low)


def _places(point: tuple[float, float], width: float, height: float) -> list[Box]:
    places = []
    for ring in RINGS:
        for degrees in range(0, 360, DEGREES):
            across = math.cos(math.radians(degrees))
            up = math.sin(math.radians(degrees))
            left = point[0] + ring * height * across
            left -= width / 2 if abs(across) < 1e-6 else width if across < 0 else 0.0
            low = point[1] + ring * height * up - height / 2
            places.append(Box(left, low, left + width, low + height))
    return places


def _cost(
    index: int,
    spot: Box,
    points: Sequence[tuple[float, float]],
    marks: Sequence[Box],
    others: Sequence[tuple[Box, Line]],
    frame: Box,
) -> float:
    height = spot.high - spot.low
    point = points[index]
    own = spot.distance(*point)
    room = spot.grown(0.12 * height)
    cost = own / height
    if not (frame.left <= spot.left and spot.right <= frame.right):
        cost += 200
    if not (frame.low <= spot.low and spot.high <= frame.high):
        cost += 200
    line = _leader(spot, point)
    for other, mark in enumerate(marks):
        cost += 8 * room.overlaps(mark)
        if other == index:
            continue
        cost += 4 * any(mark.contains(x, y) for x, y in line)
        cost += 2 * (spot.distance(*points[other]) < own)
    for theirs, their_line in others:
        cost += 20 * room.overlaps(theirs)
        cost += 8 * any(theirs.contains(x, y) for x, y in line)
        cost += 8 * any(spot.contains(x, y) for x, y in their_line)
    return cost


def _leader(spot: Box, point: tuple[float, float]) -> Line:
    """Places on the line from a point to its label; none if the label is near."""
    if not needs_leader(spot, point):
        return []
    x, y = spot.nearest(*point)
    return [
        (point[0] + (x - point[0]) * step / PROBES, point[1] + (y - point[1]) * step / PROBES)
        for step in range(1, PROBES)
    ]
