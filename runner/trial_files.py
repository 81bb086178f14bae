"""The files by which a checkpoint is tried in a process of its own, all in one folder.

The supervisor leaves the question and the state there, `runner.training.validate` the answer.
"""

REQUEST, RESULT, SLOT = "request.json", "result.json", "slot"
