"""A question on the screen, with a line for the answer."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, Label

__all__ = ["Ask"]


class Ask(ModalScreen[str | None]):
    """Gives what was typed, or None where it was left with Escape."""

    CSS = """
    Ask { align: center middle; }
    Ask Vertical { width: 90%; max-width: 76; height: auto; border: solid; padding: 0 1; }
    Ask Label { width: 100%; }
    Ask Input { border: none; height: 1; padding: 0; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Back")]

    def __init__(self, question: str, example: str) -> None:
        super().__init__()
        self._question = question
        self._example = example

    def compose(self) -> ComposeResult:
        """The parts of the screen."""
        with Vertical():
            yield Label(f"{self._question}, for example {self._example}", markup=False)
            yield Input()
            yield Label("Enter: do it    Escape: leave it", markup=False)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter was pressed."""
        self.dismiss(event.value.strip())
