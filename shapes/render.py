"""Pictures of scenes: signed distances, antialiased edges, a little jitter.  numpy only; H = W = 64 px.

All shapes are centred on the middle of their bounding box.  `radius` r in px sets the scale; the shapes are drawn so
that their areas are alike (2.3 to 3.2 r^2) and size cannot be mistaken for shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shapes.scenes import Scene

Array = NDArray[np.float32]

SIDE_PX = 64
RADIUS_PX = {
    "small": 8.0,
    "large": 11.5,
}  # a small object covers four latent cells: less, and the autoencoder cannot draw it
RADIUS_JITTER = 0.04
COLOUR_JITTER = 0.03
SINGLE_JITTER_PX = 2.0
ALONG_PX = (16.0, 48.0)  # the two objects of a relation, along its axis
ALONG_JITTER_PX = 1.0  # around that: keeps a gap of 2 px between the largest
ACROSS_JITTER_PX = 4.0

COLOUR_RGB = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.16, 0.68, 0.22),
    "blue": (0.14, 0.28, 0.92),
    "yellow": (0.96, 0.86, 0.14),
    "purple": (0.66, 0.20, 0.78),
    "cyan": (0.18, 0.84, 0.90),
}
BACKGROUND_RGB = {
    "grey": (0.56, 0.56, 0.56),
    "beige": (0.86, 0.80, 0.70),
    "navy": (0.10, 0.12, 0.26),
    "brown": (0.38, 0.27, 0.20),
}
CENTRES_PX = {
    "left": (17.5, 32.0),
    "right": (46.5, 32.0),
    "centre": (32.0, 32.0),
    "top": (32.0, 17.5),
    "bottom": (32.0, 46.5),
}

_SQUARE_HALF = 0.9
_TRIANGLE_R = 1.35  # circumradius; height 1.5 of it
_CROSS_LONG, _CROSS_WIDE = 1.08, 0.38
# Area in units of r^2, and how far the centroid lies below the middle of the bounding box in units of r.
AREA = {
    "circle": np.pi,
    "square": 4 * _SQUARE_HALF**2,
    "triangle": 0.75 * np.sqrt(3.0) * _TRIANGLE_R**2,
    "cross": 4 * (2 * _CROSS_LONG * _CROSS_WIDE - _CROSS_WIDE**2),
}
CENTROID_DROP = {"circle": 0.0, "square": 0.0, "triangle": 0.25 * _TRIANGLE_R, "cross": 0.0}


@dataclass(frozen=True)
class Placed:
    """One object on the canvas: middle of its bounding box and radius in px, colour as RGB in [0, 1]."""

    shape: str
    x: float
    y: float
    radius: float
    rgb: tuple[float, float, float]


def _box(dx: Array, dy: Array, half_x: float, half_y: float) -> Array:
    """Signed distance to a box (exact inside and beside it; enough for edges one px wide)."""
    return np.maximum(np.abs(dx) - half_x, np.abs(dy) - half_y)


def signed_distance(shape: str, dx: Array, dy: Array, r: float) -> Array:
    """Distance in px to the outline, negative inside.  dx, dy: px right of and below the middle of the bounding box."""
    if shape == "circle":
        return np.asarray(np.sqrt(dx * dx + dy * dy) - r, dtype=np.float32)
    if shape == "square":
        return _box(dx, dy, _SQUARE_HALF * r, _SQUARE_HALF * r)
    if shape == "cross":
        long, wide = _CROSS_LONG * r, _CROSS_WIDE * r
        return np.minimum(_box(dx, dy, long, wide), _box(dx, dy, wide, long))
    if shape == "triangle":
        big = _TRIANGLE_R * r
        down = dy - 0.25 * big  # from the centroid, which lies below the middle of the bounding box
        return np.maximum(down, 0.5 * np.sqrt(3.0) * np.abs(dx) - 0.5 * down) - 0.5 * big
    raise ValueError(f"unknown shape {shape!r}")


_GRID_Y, _GRID_X = np.mgrid[0:SIDE_PX, 0:SIDE_PX].astype(np.float32) + 0.5


def coverage(shape: str, x: float, y: float, r: float) -> Array:
    """(64, 64) share of each pixel that the shape covers: a ramp one pixel wide across the outline."""
    return np.clip(0.5 - signed_distance(shape, _GRID_X - x, _GRID_Y - y, r), 0.0, 1.0)


def _jittered(rng: np.random.Generator, rgb: tuple[float, float, float]) -> tuple[float, float, float]:
    r, g, b = np.clip(np.asarray(rgb) + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER, 3), 0, 1)
    return float(r), float(g), float(b)


def place(scene: Scene, rng: np.random.Generator) -> tuple[list[Placed], tuple[float, float, float]]:
    """Draw exact positions, radii and colours within what the caption allows.  Returns (objects, background RGB)."""
    if scene.position is not None:
        centres = [np.asarray(CENTRES_PX[scene.position]) + rng.uniform(-SINGLE_JITTER_PX, SINGLE_JITTER_PX, 2)]
    else:
        centres = []
        for along in ALONG_PX:
            along += rng.uniform(-ALONG_JITTER_PX, ALONG_JITTER_PX)
            across = 32.0 + rng.uniform(-ACROSS_JITTER_PX, ACROSS_JITTER_PX)
            centres.append(np.asarray((along, across) if scene.relation == "left of" else (across, along)))
    placed = []
    for thing, (x, y) in zip(scene.things, centres, strict=True):
        radius = RADIUS_PX[thing.size] * rng.uniform(1 - RADIUS_JITTER, 1 + RADIUS_JITTER)
        rgb = _jittered(rng, COLOUR_RGB[thing.colour])
        placed.append(Placed(thing.shape, float(x), float(y), float(radius), rgb))
    return placed, _jittered(rng, BACKGROUND_RGB[scene.background])


def paint(placed: list[Placed], background: tuple[float, float, float]) -> Array:
    """(64, 64, 3) in [0, 1]: the objects over a plain background."""
    canvas = np.broadcast_to(np.asarray(background, np.float32), (SIDE_PX, SIDE_PX, 3))
    for item in placed:
        alpha = coverage(item.shape, item.x, item.y, item.radius)[..., None]
        canvas = canvas * (1 - alpha) + np.asarray(item.rgb, np.float32) * alpha
    return np.ascontiguousarray(canvas, dtype=np.float32)


def render(scene: Scene, rng: np.random.Generator) -> Array:
    """(64, 64, 3) in [0, 1]: one picture of a scene."""
    return paint(*place(scene, rng))
