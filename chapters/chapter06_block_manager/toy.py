"""The toy of chapter 6: five requests, 8 blocks of 16 tokens, one token a letter.

ann, bob, cem and eve begin with the same 32 letters, which fill two blocks; eve asks what ann
asked.
"""

from chapters.chapter06_block_manager.driver import Driver, PretendModel, Request
from minivllm.engine.block_manager import BlockManager
from minivllm.engine.events import EventLog

NUM_BLOCKS, BLOCK_SIZE = 8, 16
SYSTEM = "You are the cook of this house. "
ANN, BOB, CEM = SYSTEM + "Any tea for three?", SYSTEM + "Salad now?", SYSTEM
DAN = "List all prime numbers up to one hundred. Say them in words."

# Name, prompt, how many letters to answer, and the step before which the request arrives.
REQUESTS = (
    Request("ann", ANN, 12, 0),
    Request("bob", BOB, 4, 0),
    Request("cem", CEM, 5, 12),
    Request("dan", DAN, 5, 12),
    Request("eve", ANN, 6, 13),
)


def play(*, caching: bool = True, log: EventLog | None = None) -> Driver:
    """Run the toy to its end and return the driver, whose ``answers`` are by name."""
    log = EventLog() if log is None else log
    manager = BlockManager(NUM_BLOCKS, BLOCK_SIZE, enable_prefix_caching=caching, events=log)
    driver = Driver(manager, PretendModel(NUM_BLOCKS, BLOCK_SIZE))
    driver.run(REQUESTS)
    return driver
