"""What every specification of the models room shares."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Networks this small gain nothing from a second thread, and results keep to one order."""
    torch.set_num_threads(1)
