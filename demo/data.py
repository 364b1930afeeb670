"""Captioned synthetic images: soft-shaded shapes on gradient backgrounds.

Used by the training stages, by demo/evaluate.py and by tests. A scene is described in fractions of
the image's side, so one scene renders at any size. Captions whose key is held out never reach the
training sampler.
"""

import hashlib
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 42),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 50),
    "green": (40, 165, 65),
    "cyan": (60, 205, 215),
    "blue": (40, 80, 215),
    "purple": (130, 50, 170),
    "pink": (250, 145, 195),
    "white": (243, 243, 240),
    "black": (30, 30, 36),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
UNNAMED_BACKGROUND = "white"  # if the caption names no background
NAMED_BACKGROUND_SHARE = 0.85
KIND_SHARES = {"single": 0.5, "count": 0.18, "pair": 0.32}
HELD_OUT_SHARE = 0.05
EVALUATION_SEED = 4242

# Radii as fractions of the side. A star reaches 1.1 radii from its centre: shapes of one image
# never touch.
SINGLE_RADII = {"small": (0.135, 0.165), "": (0.22, 0.26), "large": (0.33, 0.38)}
PAIR_RADII = {"small": (0.1, 0.12), "": (0.155, 0.175), "large": (0.2, 0.215)}
COUNT_RADII = {2: (0.165, 0.185), 3: (0.105, 0.12)}
PLACES = {
    "on the left": (0.27, 0.5),
    "on the right": (0.73, 0.5),
    "at the top": (0.5, 0.27),
    "at the bottom": (0.5, 0.73),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One shape. x, y (centre) and radius are fractions of the side; y grows downwards."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Content of a caption: its shapes, the background's colour and the kind of caption."""

    caption: str
    things: tuple[Thing, ...]
    background: str
    kind: str


# ---- captions
# ------------------------------------------------------------------------------------------


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def _described(size: str, colour: str, shape: str) -> str:
    return with_article(f"{size} {colour} {shape}".strip())


def _near(rng: random.Random, value: float, spread: float = 0.015) -> float:
    return value + rng.uniform(-spread, spread)


def _single(rng: random.Random, colours: list[str]) -> tuple[str, tuple[Thing, ...]]:
    size = rng.choices(list(SINGLE_RADII), [0.2, 0.5, 0.3])[0]
    colour, shape = rng.choice(colours), rng.choice(SHAPES)
    caption, (x, y) = _described(size, colour, shape), (0.5, 0.5)
    if size != "large" and rng.random() < 0.45:
        place = rng.choice(list(PLACES))
        caption, (x, y) = f"{caption} {place}", PLACES[place]
    radius = rng.uniform(*SINGLE_RADII[size])
    return caption, (
        Thing(shape=shape, colour=colour, x=_near(rng, x), y=_near(rng, y), radius=radius),
    )


def _count(rng: random.Random, colours: list[str]) -> tuple[str, tuple[Thing, ...]]:
    number = rng.choice([2, 3])
    colour, shape, radius = (
        rng.choice(colours),
        rng.choice(SHAPES),
        rng.uniform(*COUNT_RADII[number]),
    )
    columns, y = ((0.28, 0.72) if number == 2 else (0.2, 0.5, 0.8)), _near(rng, 0.5, 0.02)
    plural = "crosses" if shape == "cross" else shape + "s"
    things = tuple(
        Thing(shape=shape, colour=colour, x=_near(rng, x), y=y, radius=radius) for x in columns
    )
    return f"{'two' if number == 2 else 'three'} {colour} {plural}", things


def _pair(rng: random.Random, colours: list[str]) -> tuple[str, tuple[Thing, ...]]:
    sizes = rng.choices(list(PAIR_RADII), [0.2, 0.6, 0.2], k=2)
    if sizes == ["large", "large"]:  # two large shapes do not fit side by side
        sizes[rng.randrange(2)] = "small"
    names, shapes = rng.sample(colours, 2), rng.choices(SHAPES, k=2)
    relation = rng.choice(["above", "left of"])
    things, words = [], []
    for along, size, colour, shape in zip((0.26, 0.74), sizes, names, shapes, strict=True):
        x, y = (0.5, along) if relation == "above" else (along, 0.5)
        radius = rng.uniform(*PAIR_RADII[size])
        things.append(
            Thing(shape=shape, colour=colour, x=_near(rng, x), y=_near(rng, y), radius=radius)
        )
        words.append(_described(size, colour, shape))
    return f"{words[0]} {relation} {words[1]}", tuple(things)


_KINDS: dict[str, Callable[[random.Random, list[str]], tuple[str, tuple[Thing, ...]]]] = {
    "single": _single,
    "count": _count,
    "pair": _pair,
}


def any_scene(rng: random.Random, *, kind: str | None = None) -> Scene:
    """Return a random scene of the grammar, held out or not. `kind` fixes the kind of caption."""
    named = rng.random() < NAMED_BACKGROUND_SHARE
    background = rng.choice(list(COLOURS)) if named else UNNAMED_BACKGROUND
    kind = kind or rng.choices(list(KIND_SHARES), list(KIND_SHARES.values()))[0]
    caption, things = _KINDS[kind](rng, [name for name in COLOURS if name != background])
    if named:
        caption += rng.choice(
            [f" on {with_article(background)} background", f", {background} background"]
        )
    return Scene(caption=caption, things=things, background=background, kind=kind)


def caption_key(caption: str) -> str:
    """Return the caption in one of its two forms of naming the background.

    So both forms are held out, or neither.
    """
    return re.sub(r"(?:,| on an?) (\w+) background$", r" @ \1", caption)


def is_held_out(caption: str) -> bool:
    """Whether training never sees this caption. A hash of its key decides, so no list is needed."""
    digest = hashlib.sha256(caption_key(caption).encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def training_scene(rng: random.Random) -> Scene:
    while is_held_out((scene := any_scene(rng)).caption):
        pass
    return scene


def held_out_scenes(count: int, *, seed: int) -> list[Scene]:
    """Return `count` different held-out scenes, with kinds in the proportions of training."""
    rng, scenes, keys = random.Random(seed), [], set()
    bounds = {
        "single": KIND_SHARES["single"],
        "count": KIND_SHARES["single"] + KIND_SHARES["count"],
        "pair": 1.0,
    }
    while len(scenes) < count:
        kind = next(name for name, bound in bounds.items() if len(scenes) < round(bound * count))
        scene = any_scene(rng, kind=kind)
        key = caption_key(scene.caption)
        if is_held_out(scene.caption) and key not in keys:
            keys.add(key)
            scenes.append(scene)
    return scenes


def evaluation_scenes(count: int = 100) -> list[Scene]:
    """Return the fixed evaluation set: 100 held-out captions (50 single, 18 count, 32 pair)."""
    return held_out_scenes(count, seed=EVALUATION_SEED)


# ---- renderer
# ------------------------------------------------------------------------------------------


def _star() -> list[tuple[float, float]]:
    points = []
    for i in range(10):
        radius, angle = (1.08 if i % 2 == 0 else 0.46), -math.pi / 2 + i * math.pi / 5
        points.append((radius * math.cos(angle), radius * math.sin(angle) + 0.06))
    return points


def _heart() -> list[tuple[float, float]]:
    points = []
    for i in range(48):
        t = i / 48 * 2 * math.pi
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((16 * math.sin(t) ** 3 / 17, -y / 17 - 0.08))
    return points


def _cross(w: float = 0.34) -> list[tuple[float, float]]:
    corner = [(-w, -1), (w, -1), (w, -w), (1, -w), (1, w), (w, w)]
    return corner + [(-x, -y) for x, y in corner]


OUTLINES: dict[
    str, list[tuple[float, float]]
] = {  # polygons in radii around the centre; circle and ring are ellipses
    "square": [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)],
    "triangle": [(0, -0.98), (1, 0.82), (-1, 0.82)],
    "diamond": [(0, -1.1), (0.8, 0), (0, 1.1), (-0.8, 0)],
    "star": _star(),
    "heart": _heart(),
    "cross": _cross(),
}


def coverage(thing: Thing, size: int, *, oversample: int = 2) -> np.ndarray:
    """Return the fraction of each pixel that the shape covers: (size, size) float32 in [0, 1]."""
    side = size * oversample
    canvas = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(canvas)
    x, y, radius = thing.x * side, thing.y * side, thing.radius * side
    if thing.shape in OUTLINES:
        draw.polygon(
            [(x + dx * radius, y + dy * radius) for dx, dy in OUTLINES[thing.shape]], fill=255
        )
    else:
        draw.ellipse(
            [x - radius * 0.96, y - radius * 0.96, x + radius * 0.96, y + radius * 0.96], fill=255
        )
        if thing.shape == "ring":
            draw.ellipse(
                [x - radius * 0.5, y - radius * 0.5, x + radius * 0.5, y + radius * 0.5], fill=0
            )
    return np.asarray(canvas.resize((size, size), Image.BOX), np.float32) / 255


def _shadow(mask: np.ndarray, size: int) -> np.ndarray:
    """Return the mask, blurred and moved down and right by 3/128 of the side."""
    reach = 3 * size / 128
    blurred = Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(reach))
    offset = max(1, int(reach))
    return np.roll(np.asarray(blurred, np.float32) / 255, (offset, offset), (0, 1))


def render(scene: Scene, size: int, rng: random.Random) -> np.ndarray:
    """Return the scene as (size, size, 3) uint8.

    `rng` only chooses the direction of the background's gradient.
    """
    line = np.linspace(-1, 1, size, dtype=np.float32)
    x, y = line[None, :], line[:, None]
    dark = scene.background == "black"
    angle, depth = rng.uniform(0, 2 * math.pi), (10 if dark else 12)
    light = -0.7 * depth * (x * math.cos(angle) + y * math.sin(angle)) - 0.6 * depth * (
        x * x + y * y - 0.6
    )
    image = np.array(COLOURS[scene.background], np.float32) + light[..., None]
    for thing in scene.things:
        mask = coverage(thing, size)
        if not dark:  # a shadow on black is invisible
            image *= 1 - 0.22 * _shadow(mask, size)[..., None]
        dx, dy, radius = (x + 1) / 2 - thing.x, (y + 1) / 2 - thing.y, thing.radius
        highlight = 26 * np.exp(
            -((dx + 0.35 * radius) ** 2 + (dy + 0.4 * radius) ** 2) / (0.5 * radius * radius)
        )
        body = (
            np.array(COLOURS[thing.colour], np.float32)
            + (highlight - 14 * ((dx + dy) / (2 * radius)).clip(-0.4, 1.2))[..., None]
        )
        image += (body - image) * mask[..., None]
    return image.clip(0, 255).astype(np.uint8)


def training_images(count: int, *, seed: int, size: int) -> tuple[np.ndarray, list[str]]:
    """Return `count` training images, (count, size, size, 3) uint8, and their captions."""
    rng = random.Random(seed)
    images, captions = np.empty((count, size, size, 3), np.uint8), []
    for i in range(count):
        scene = training_scene(rng)
        images[i] = render(scene, size, rng)
        captions.append(scene.caption)
    return images, captions
