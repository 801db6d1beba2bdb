"""What takes long of the kit's checks of our own plugins runs with the long forms."""

from __future__ import annotations

import pytest

LONG = ("test_killed_attempt_can_be_repeated", "test_cancel_leaves_nothing_half_done", "test_cancel_is_obeyed")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name == "test_conformance.py" and getattr(item, "originalname", "") in LONG:
            item.add_marker(pytest.mark.long)
