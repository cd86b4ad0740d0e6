"""Rehearsal: what a change would do to a live run, tried on the run itself and taken back bit for bit.

`change`: what is to be tried, from text to commands. `kept`: the whole state, kept and put back. `effect`: what two
arms say, in numbers and in words. `arms`: the rehearsal.
"""
