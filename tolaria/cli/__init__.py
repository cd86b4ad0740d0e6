"""The `tolaria` command: see a run, steer it, check it afterwards. One module for each command or family of them."""
