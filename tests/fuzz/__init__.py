"""A fuzzer of our own: random input, valid and broken, for every command that reads what others wrote.

Each case ends with exit code 0 and the very rows that `oracle` gives, or with exit code 2 and one message;
never 1, never a traceback, never a hang, and nothing that was there before is changed. A case is a
function of its number and the seed alone: `python -m tests.fuzz --seed 0 --only prepare --first 17
--cases 1` runs one again.
"""
