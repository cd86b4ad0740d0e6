"""Orders of an operator to a live run: what they say, how the run takes them in, how they are sent.

`words`: orders and their outcomes, to bytes and back. `desk`: rank 0's side. `client`: the other side, without torch.
"""

from tolaria.orders.words import Order, Outcome

__all__ = ["Order", "Outcome"]
