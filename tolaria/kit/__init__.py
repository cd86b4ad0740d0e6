"""For people who write policies: a test of everything a policy promises, and what it would have done on a past run.

course       packets of a run that is only simulated        odd      states that are seldom seen
probe        the policy, watched from inside its process    subject  asking it, as a trainer does
judge        what the trainer would refuse, and why
conformance  the checks                                     replay   a recorded run, asked again
"""
