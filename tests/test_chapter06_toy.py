"""Chapter 6's toy, and what it counts."""

import torch

from chapters.chapter06_block_manager import film, memory, toy
from chapters.chapter06_block_manager.driver import Driver, PretendModel, Request
from chapters.chapter06_block_manager.measure import PagedModel
from minivllm.engine.block_manager import BlockManager, hash_block
from minivllm.models.hub import model_folder
from minivllm.models.loader import load_model

FILM = """
  block 0  2222aaaaaaaaccccceeeeee
  block 1  2222aaaaaaaa+++++eeeeee
  block 2  aaaaaaaaaaaa+cccceeeeee
  block 3  aaaaaaaaaaaaddddd++++++
  block 4  bbbb........ddddd++++++
  block 5  ............ccccceeeeee
  block 6  ............ddddd++++++
  block 7  ............ddddd++++++
"""


def pieces(prompt: str) -> list[list[int]]:
    """The full blocks of a prompt of the toy."""
    size = toy.BLOCK_SIZE
    ends = range(size, len(prompt) + 1, size)
    return [[ord(letter) for letter in prompt[end - size : end]] for end in ends]


def chain(blocks: list[list[int]]) -> list[int]:
    """Their names, each made of the one before."""
    names: list[int] = []
    for block in blocks:
        names.append(hash_block(names[-1] if names else 0, block))
    return names


def test_toy_names_chain():
    ann, bob, dan = (chain(pieces(prompt)) for prompt in (toy.ANN, toy.BOB, toy.DAN))
    assert len(ann) == 3 and len(bob) == 2 and len(dan) == 3
    assert ann[:2] == bob, "equal beginnings must have equal names"
    assert len({*ann, *dan}) == 6
    swapped = chain([pieces(toy.ANN)[0], *pieces(toy.DAN)[1:]])
    assert swapped[0] == ann[0] and not {*swapped[1:]} & {*dan}, (
        "a name must change with everything that stands before its block"
    )


def test_toy_film():
    driver = toy.play()
    lines = list(film.as_text(list(film.frames(driver.manager.events.events, toy.NUM_BLOCKS))))
    wrong = [
        f"is        {line.strip()}\nshould be {wanted.strip()}"
        for line, wanted in zip(lines, FILM.strip("\n").split("\n"), strict=True)
        if line != wanted
    ]
    assert not wrong, "\n".join(wrong)


def test_toy_finds_80_tokens():
    driver = toy.play()
    assert driver.found == {"ann": 0, "bob": 32, "cem": 16, "dan": 0, "eve": 32}
    assert (driver.model.num_run, driver.manager.peak_held) == (181, 7)
    driver.manager.check([])
    alone = toy.play(caching=False)
    assert sum(alone.found.values()) == 0 and alone.model.num_run == 181 + 80


def test_toy_answers_do_not_depend_on_the_others():
    """A block with somebody else's content would change what its readers answer."""
    together = toy.play().answers
    for request in toy.REQUESTS:
        driver = Driver(
            BlockManager(toy.NUM_BLOCKS, toy.BLOCK_SIZE),
            PretendModel(toy.NUM_BLOCKS, toy.BLOCK_SIZE),
        )
        driver.run([request])
        alone = driver.answers[request.name]
        assert together[request.name] == alone, (
            f"{request.name} is told {together[request.name]!r}, but {alone!r} when alone"
        )


def test_the_driver_keeps_its_promises():
    """However small the pool, whoever is let in gets all blocks that it asks for later."""
    requests = [
        Request(str(i), [i % 3] * (5 + 11 * i % 50), 1 + 7 * i % 40, i % 13) for i in range(40)
    ]
    for num_blocks in (6, 7, 9, 14):
        manager = BlockManager(num_blocks, 16)
        driver = Driver(manager, PretendModel(num_blocks, 16))
        driver.run(requests)
        assert {name: len(answer) for name, answer in driver.answers.items()} == {
            request.name: request.new for request in requests
        }
        manager.check([])


def test_a_shared_prefix_changes_no_token_of_a_model():
    """The embedded model on chapter 5's pages: 192 of 200 tokens are found the second time."""
    model = load_model(model_folder(None), dtype=torch.float32)
    paged, generator = PagedModel(model, 40), torch.Generator().manual_seed(0)
    for _ in range(5):
        prompt = torch.randint(model.config.vocab_size, (200,), generator=generator).tolist()
        first, second, other = (
            Request(name, tokens, 1).sequence()
            for name, tokens in (("a", prompt), ("b", prompt), ("c", prompt[:100] + prompt[:100]))
        )
        tokens = []
        for seq, found in ((first, 0), (other, 96), (second, 192)):
            assert paged.manager.admit(seq) and seq.num_computed == found
            tokens.append(paged.run(seq))
            paged.manager.release(seq)
        assert tokens[0] == tokens[2], "K and V that were found are not those of the prompt"
        paged.manager.forget_all()


def test_memory_of_rows_and_blocks():
    """What the two ways save follows from the lengths alone."""
    lengths = memory.workload()
    prompts = sum(memory.SYSTEM_TOKENS + prompt for prompt, _ in lengths)
    rows, alone = memory.count_rows(), memory.count_blocks(16, sharing=False)
    assert rows.prompt_tokens == alone.prompt_tokens == prompts
    assert rows.peak_tokens == 256 * 2548 and alone.used > 0.98 > rows.used
    shared = memory.count_blocks(256, sharing=True)
    assert shared.prompt_tokens == prompts - 255 * 256, "one block of 256 fits into 500 tokens"
