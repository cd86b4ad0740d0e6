"""How the gradients of a step come about and become the same on every rank.

sum                sync.py     one backward pass, DDP reduces while it runs
weighted, pcgrad   fused.py    into a buffer of our own, which is reduced once
                   owners.py   whose a sample is
                   tally.py    what came of it, from boundary to boundary
"""
