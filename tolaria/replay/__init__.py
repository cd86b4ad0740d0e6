"""Replay: a run is done again from its log, without its policy, and has to come out the same, bit for bit.

`course`: what a run's files say of it. `again`: the same run once more, in a directory of its own. `trace`: what both
left on the way, and where the two first differ.
"""
