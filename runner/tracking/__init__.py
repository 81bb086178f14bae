"""Shows a run to trackers: a process of its own reads the run's record and sends what is new.

The record is there anyway, in files and in the store. So a tracker that is down, slow or refuses
delays nothing and loses nothing: what it has not got is sent later, by this supervisor or by the
next one, on this node or on another. The libraries are heavy and foreign, and stay in that process.
"""
