"""Moving a file to a server, as the command does it."""

import pytest

from kkt_buffer.move import move


@pytest.fixture
def moved(open_engine):
    """Move the file to the server; returns what `move` tells."""

    def moved(path, url):
        source, target = open_engine(path), open_engine(url)
        try:
            return move(source, target)
        finally:
            source.dispose()
            target.dispose()

    return moved
