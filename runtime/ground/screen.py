"""The terminal as every program of the house draws on it: no text from files and peers moves its cursor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment


class Screen(Console):
    """A console to which text is nothing but text: no marks such as [red], no :names: of pictures, no escapes.

    Styles come with the text objects and columns of the program alone. Signs that a terminal obeys are left out where
    `cutlayer.runtime.ground.text` has not replaced them before.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Every part of what is drawn, parts of parts too."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable() or segment.text == "\n":
                yield segment
            else:
                text = "".join(sign for sign in segment.text if sign.isprintable() or sign == "\n")
                yield Segment(text, segment.style)
