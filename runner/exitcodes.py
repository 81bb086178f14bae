"""How `runner` ends, for whoever started it. Otherwise the code is the trainer's own."""

FINISHED = 0
USAGE = 2  # the job file or the arguments are wrong: never retry
GIVEN_UP = 70  # EX_SOFTWARE: the failure budget is spent, or there is no progress
PREEMPTED = 75  # EX_TEMPFAIL: the state is durable, start me again
FENCED = 76  # EX_PROTOCOL: a newer attempt has the run
INTERRUPTED = 130  # 128 + SIGINT: stopped by Ctrl-C, the state is durable
