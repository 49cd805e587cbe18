"""The two prompts of the demo.

Each is worded at some length on purpose: with the chat template and the default system prompt of
the embedded model it fills more than two KV blocks of 64 tokens, so that prefill and prefix
caching have something to do.
"""

DEMO_PROMPTS: tuple[str, ...] = (
    "Hello! Before we begin with the chapters of this course, I would like to know who I am "
    "talking to. Please introduce yourself in a few sentences: tell me your name, what kind of "
    "model you are, where you run, and what you can help me with while I learn how an inference "
    "engine works inside.",
    "I would like to see how carefully you can count, so here is a small exercise for you. Please "
    "list all prime numbers within 100, starting from the smallest one. Write them in ascending "
    "order, separated by commas, leave none of them out, and do not add any number that is not "
    "prime.",
)
"""User messages: the first asks for an introduction, the second for the primes within 100."""
