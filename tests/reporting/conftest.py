"""What the terminal's writer prints."""

import pytest

from shallower.reporting.writers import terminal


@pytest.fixture
def printed(capsys, monkeypatch):
    """Print parts of a story as on a terminal of so many columns, and give the text."""

    def show(*parts, width=80):
        monkeypatch.setenv("COLUMNS", str(width))
        capsys.readouterr()
        terminal.show(*parts)
        return capsys.readouterr().out

    return show
