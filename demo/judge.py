"""The programmatic judge: does an image show its scene? Pure numpy and PIL.

Larger images are box-filtered to 128x128, so that the figures of different sizes are comparable.
"""

import math

import numpy as np
from PIL import Image

from demo.data import COLOURS, SHAPES, Scene, Thing, coverage

SIDE = 128
TEMPLATE_SIDE = 32
POSITION_TOLERANCE = 0.14  # of the side
MIN_COMPONENT = 0.006  # of the image's area: smaller spots are fringes, not shapes
MIN_COLOUR = 0.012  # of the image's area
MEASURES = ("colours", "shape", "count", "position", "all")

_NAMES = list(COLOURS)
_ANCHORS = np.array(list(COLOURS.values()), np.float32)


def nearest_colours(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (H, W) index into COLOURS."""
    distance = ((image.astype(np.float32)[:, :, None, :] - _ANCHORS) ** 2).sum(-1)
    return distance.argmin(-1)


def _normalised(mask: np.ndarray) -> np.ndarray:
    """Return the mask's bounding box, centred in a square, as (32, 32) float32 in [0, 1]."""
    rows, columns = np.where(mask)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    height, width = bottom - top, right - left
    side = max(height, width)
    square = np.zeros((side, side), np.uint8)
    y, x = (side - height) // 2, (side - width) // 2
    square[y : y + height, x : x + width] = mask[top:bottom, left:right] * 255
    return (
        np.asarray(
            Image.fromarray(square).resize((TEMPLATE_SIDE, TEMPLATE_SIDE), Image.BOX), np.float32
        )
        / 255
    )


_TEMPLATES = {
    shape: _normalised(
        coverage(Thing(shape=shape, colour="red", x=0.5, y=0.5, radius=0.31), SIDE) > 0.5
    )
    for shape in SHAPES
}


def nearest_shape(mask: np.ndarray) -> str:
    """Return the shape whose template has the largest soft intersection over union with the
    mask.
    """
    seen = _normalised(mask)
    return max(
        _TEMPLATES,
        key=lambda shape: (
            np.minimum(seen, _TEMPLATES[shape]).sum() / np.maximum(seen, _TEMPLATES[shape]).sum()
        ),
    )


def components(mask: np.ndarray, min_pixels: int) -> list[np.ndarray]:
    """Return 4-connected components of at least `min_pixels` as (H, W) bool masks, largest
    first.
    """
    height, width = mask.shape
    left, found = set(np.flatnonzero(mask.ravel()).tolist()), []
    while left:
        stack = [left.pop()]
        member = []
        while stack:
            pixel = stack.pop()
            member.append(pixel)
            column = pixel % width
            beside = ((pixel - 1,) if column else ()) + ((pixel + 1,) if column < width - 1 else ())
            for other in (pixel - width, pixel + width, *beside):
                if other in left:
                    left.discard(other)
                    stack.append(other)
        if len(member) >= min_pixels:
            component = np.zeros(height * width, bool)
            component[member] = True
            found.append(component.reshape(height, width))
    return sorted(found, key=lambda component: -component.sum())


def _colours_right(labels: np.ndarray, scene: Scene) -> bool:
    """Whether the border shows the background's colour and the other main colours are the
    shapes'.
    """
    rim = SIDE // 20
    inside = np.zeros_like(labels, bool)
    inside[rim:-rim, rim:-rim] = True
    background = np.bincount(labels[~inside], minlength=len(_NAMES)).argmax()
    if _NAMES[background] != scene.background:
        return False
    area = np.bincount(labels.ravel(), minlength=len(_NAMES)) / labels.size
    area[background] = 0
    wanted = {thing.colour for thing in scene.things}
    commonest = [_NAMES[i] for i in np.argsort(-area)[: len(wanted)] if area[i] > MIN_COLOUR]
    return set(commonest) == wanted


def _of_colour(labels: np.ndarray, colour: str, wanted: list[Thing]) -> dict[str, bool]:
    """Judge shape, count and position of the shapes of one colour.

    Nothing else of that colour may be in the image.
    """
    found = components(labels == _NAMES.index(colour), int(MIN_COMPONENT * labels.size))
    if len(found) < len(wanted):
        return {"shape": False, "count": False, "position": False}
    count_right = len(found) == len(wanted)
    found = found[: len(wanted)]
    centres = sorted(
        (np.argwhere(component).mean(0) / SIDE for component in found), key=lambda centre: centre[1]
    )
    ordered = sorted(wanted, key=lambda thing: thing.x)
    near = [
        math.hypot(y - thing.y, x - thing.x) <= POSITION_TOLERANCE
        for (y, x), thing in zip(centres, ordered, strict=True)
    ]
    shape_right = all(nearest_shape(component) == wanted[0].shape for component in found)
    return {"shape": shape_right, "count": count_right, "position": all(near)}


def judge(image: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Return what is right in the image, (H, W, 3) uint8.

    The keys are MEASURES; `all` combines the other four.
    """
    if image.shape[:2] != (SIDE, SIDE):
        image = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.BOX))
    labels = nearest_colours(image)
    right = {
        "colours": _colours_right(labels, scene),
        "shape": True,
        "count": True,
        "position": True,
    }
    for colour in dict.fromkeys(thing.colour for thing in scene.things):
        wanted = [thing for thing in scene.things if thing.colour == colour]
        for measure, value in _of_colour(labels, colour, wanted).items():
            right[measure] = right[measure] and value
    right["all"] = all(right.values())
    return right
