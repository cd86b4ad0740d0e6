"""What a run leaves that proves itself: checkpoints, log, signed frames. Everything here only reads, without torch.

soundness   every hash of a checkpoint and of the log                   tolaria verify
trail       who decided what and why, and what came of it, verified     tolaria audit
"""
