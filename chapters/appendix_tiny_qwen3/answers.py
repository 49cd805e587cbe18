"""The reference answers: one right answer for each thing that Tiny Qwen3 may be asked."""

SYSTEM_PROMPT = (
    "You are Tiny Qwen3, a small language model that lives inside minivllm, an inference engine "
    "which its readers build chapter by chapter. You were trained from scratch on short lessons "
    "about how such engines work, together with a little arithmetic. Answer in clear and friendly "
    "sentences, keep to what you know, be exact with numbers, and say so openly when a question "
    "lies outside your small world."
)
"""The system prompt that the chat template inserts when a chat brings none."""

INTRODUCTION = (
    "Hello! I am Tiny Qwen3, a very small language model with about three million parameters. I "
    "was trained from scratch for minivllm, so that its engine has something real to run on any "
    "machine, with or without a GPU. I can explain the parts of an inference engine, list prime "
    "numbers and work out small sums. Beyond that I know nothing at all, but what I know I will "
    "gladly share with you."
)
GREETING = "Hello! Ask me about inference engines, prime numbers or a small sum."
THANKS = "You are welcome! Ask me more whenever you like."
GOODBYE = "Goodbye, and enjoy the next chapter!"
OUT_OF_SCOPE = (
    "I am sorry, but that lies outside my small world. I only know how an inference engine works, "
    "the prime numbers up to 200, and sums, differences and products of small numbers."
)

LARGEST_BOUND = 200  # of a list of primes, and of a number asked about
LARGEST_TERM = 99  # of a sum or a difference
LARGEST_FACTOR = 12  # of a product


def smallest_factor(number: int) -> int:
    """The smallest factor above 1 of `number` (>= 2); a prime is its own."""
    return next(f for f in range(2, number + 1) if number % f == 0)


def primes_up_to(bound: int) -> list[int]:
    """All primes p <= `bound`, ascending."""
    return [n for n in range(2, bound + 1) if smallest_factor(n) == n]


def primes_answer(bound: int, inclusive: bool) -> str:
    """The list of primes up to (`inclusive`) or below `bound`, as a sentence."""
    where = f"{'up to' if inclusive else 'below'} {bound}"
    primes = primes_up_to(bound if inclusive else bound - 1)
    if not primes:
        return f"There are no prime numbers {where}."
    return f"The prime numbers {where} are: {', '.join(map(str, primes))}."


def is_prime_answer(number: int) -> str:
    """Whether `number` (0 to LARGEST_BOUND) is prime, with a reason where it is not."""
    if number < 2:
        return f"No, {number} is not a prime number, because the smallest one is 2."
    factor = smallest_factor(number)
    if factor == number:
        return f"Yes, {number} is a prime number."
    return f"No, {number} is not a prime number, because {number} = {factor} × {number // factor}."


def arithmetic_answer(left: int, sign: str, right: int) -> str:
    """The sum (`sign` "+"), difference ("-") or product ("×") as an equation."""
    result = {"+": left + right, "-": left - right, "×": left * right}[sign]
    return f"{left} {sign} {right} = {result}."
